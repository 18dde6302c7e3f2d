"""A sample: one volume of the test folder and all that is made of it, opened once and passed on."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from funlib.persistence import Array
from yacs.config import CfgNode

from lsdseg.data_utils.layout import (
    FRAGMENTS,
    block_markers,
    output_path,
    prediction_name,
    sample_name,
    scores_path,
    volumes_in,
)
from lsdseg.data_utils.masks import open_mask
from lsdseg.data_utils.records import ATTRIBUTE
from lsdseg.data_utils.volumes import has_array, open_array, source_defaults
from lsdseg.engine.offsets import DIRECT_NEIGHBORS, Offset, offsets_of
from lsdseg.errors import UserError

AFFINITIES = prediction_name("affs")


class Sample:
    """A volume and its output zarr.

    Arrays are opened when they are first asked for, and raise UserError if they cannot be used.

    Attributes:
        cfg: the config.
        volume: the zarr that the user provides.
        output: the zarr that prediction and segmentation write; see `output_path`.
        name: the sample's name in logs, tables and collections.
        truth_file: the zarr with the neuron labels and their mask; the volume, unless someone sets another.
    """

    def __init__(self, cfg: CfgNode, volume: Path | str, output: Path | str | None = None):
        self.cfg = cfg
        self.volume = Path(volume)
        self.output = output_path(cfg, volume) if output is None else Path(output)
        self.name = sample_name(self.output)
        self.truth_file = self.volume

    @classmethod
    def of_arguments(cls, cfg: CfgNode, arguments: dict[str, str]) -> Sample:
        """The sample whose `arguments` a worker was given."""
        return cls(cfg, arguments["volume"], arguments["output"])

    @property
    def arguments(self) -> dict[str, str]:
        """What workers need to open the sample; what JSON can hold."""
        return {"volume": str(self.volume.absolute()), "output": str(self.output.absolute())}

    def markers(self, step: str) -> Path:
        """Folder that records which blocks of a step are done."""
        return block_markers(self.output, step)

    @cached_property
    def raw(self) -> Array:
        """Raw, (z, y, x)."""
        return open_array(self.volume, self.cfg.DATA.RAW, **source_defaults(self.cfg))

    @cached_property
    def truth_dataset(self) -> str:
        """Name of the neuron labels in `truth_file`; may be set to another."""
        return str(self.cfg.DATA.NEURON_LABELS)

    @cached_property
    def ground_truth(self) -> Array | None:
        """Neuron labels, (z, y, x), None if the volume has none."""
        return self._optional(self.truth_dataset)

    @cached_property
    def ground_truth_mask(self) -> Array | None:
        """Mask of the neuron labels, (z, y, x), None if the volume has none."""
        return self._optional(self.cfg.DATA.NEURON_LABELS_MASK)

    @cached_property
    def mask(self) -> Array | None:
        """INS_SEGMENT.MASK_FILE, None if there is none."""
        return open_mask(self.cfg.INS_SEGMENT)

    @cached_property
    def fragments_dataset(self) -> str:
        """Name of the fragments in the output: FRAGMENTS, or else what the published scripts call them, if they exist.

        Those are named by INS_SEGMENT.EPSILON_AGGLOMERATE, volumes/segmentation_025. A segmentation that was made here
        in memory can have that name, too; it says what it was made from.
        """
        published = f"volumes/segmentation_{str(self.cfg.INS_SEGMENT.EPSILON_AGGLOMERATE).replace('.', '')}"
        if has_array(self.output, FRAGMENTS) or not has_array(self.output, published):
            return FRAGMENTS
        attributes = open_array(self.output, published).attrs
        return FRAGMENTS if ATTRIBUTE in attributes or "method" in attributes else published

    @cached_property
    def affinities(self) -> Array:
        """Predicted affinities, (c, z, y, x).

        Raises:
            UserError: there are none, or they cannot be segmented: not one offset for each channel, or no neighbor in y
                or x.
        """
        try:
            array = open_array(self.output, AFFINITIES)
        except UserError as error:
            raise UserError(f"{error}; run predicter.py first") from error
        offsets = offsets_of(array)
        where = f"{AFFINITIES} in {self.output} has the offsets {[list(offset) for offset in offsets]}"
        if any(len(offset) != 3 for offset in offsets) or len(array.shape) != 4 or len(offsets) != array.shape[0]:
            raise UserError(
                f"{where} and the shape {array.shape}: its attribute offsets needs z, y, x for every channel"
            )
        if not set(DIRECT_NEIGHBORS[1:]) <= set(offsets):
            raise UserError(f"{where}: predict affinities with the neighbors [0, -1, 0] and [0, 0, -1] among them")
        return array

    @cached_property
    def offsets(self) -> list[Offset]:
        """Offset (z, y, x) in voxels of each channel of the affinities."""
        return offsets_of(self.affinities)

    def _optional(self, dataset: str) -> Array | None:
        if not has_array(self.truth_file, dataset):
            return None
        return open_array(self.truth_file, dataset, **source_defaults(self.cfg))


def best_segmentation(output: Path) -> str | None:
    """Return the dataset of the segmentation that 06 found best, None if it did not run or left a damaged file."""
    try:
        best = json.loads(scores_path(output).read_text(encoding="utf-8"))["best"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return best if isinstance(best, str) else None


def samples_of(cfg: CfgNode) -> list[Sample]:
    """The sample of every volume in the test folder.

    Raises:
        UserError: there is no volume, or TRAIN.CHECKPOINT is not set; two volumes would have the same sample name.
    """
    samples: dict[str, Sample] = {}
    for sample in (Sample(cfg, volume) for volume in volumes_in(cfg, "test")):
        if sample.name in samples:
            raise UserError(
                f"{samples[sample.name].volume.name} and {sample.volume.name} in {sample.volume.parent} would share "
                f"tables and logs, because both are named {sample.name} there: rename one"
            )
        samples[sample.name] = sample
    return list(samples.values())
