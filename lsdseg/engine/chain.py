"""From raw to a segmentation: which scripts to run, one after the other, in memory or block by block.

A script goes on with what is there, and refuses to if that was made from something else. Here, everything but the input
is a result that can be made again, so what was made from something else is replaced, and nothing else is: another
threshold costs a look-up table, another network everything.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.config.model_types import task_channels
from lsdseg.data_utils.formats import PLACE
from lsdseg.data_utils.layout import data_folder, final_segmentation_name
from lsdseg.data_utils.place_files import place_of, write_place
from lsdseg.data_utils.placement import voxel_size_nm
from lsdseg.data_utils.records import Record, is_made
from lsdseg.data_utils.rescale import rescale_record
from lsdseg.data_utils.volumes import open_array
from lsdseg.engine.block_size import BYTES_PER_VOXEL, SHARE
from lsdseg.engine.memory import available_memory
from lsdseg.engine.post.methods import method_of
from lsdseg.engine.post.steps.edges import require_edges
from lsdseg.engine.post.steps.fragments import begun_fragments, require_fragments
from lsdseg.engine.post.steps.relabel import is_extracted
from lsdseg.engine.post.steps.tables import tables_left
from lsdseg.engine.post.whole import is_segmented
from lsdseg.engine.predict.blockwise import begun_prediction
from lsdseg.engine.predict.predict import is_predicted, prediction_record
from lsdseg.engine.sample import Sample
from lsdseg.errors import UserError
from lsdseg.files import byte_count

ANEW = ("DATA.DROP_DS_MONGOTABLE", "True")
# Voxels along an axis. A volume in wider chunks, such as whole sections, is copied before its tiles are predicted.
WIDEST_CHUNK = 1024
# At which blocks are joined where a method has no threshold.
JOINED_AT = 0.5

# A script, and its arguments.
Command = tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """What `segment.py` does with one volume.

    Attributes:
        cfg: the config; DATA.HOME is the work folder.
        raw: zarr with the volume, of any voxel size.
        out: zarr that gets the segmentations, on the voxels of the volume.
        config: what to pass to each script: -c, a file, and KEY VALUE pairs.
        blockwise: work block by block, not in memory.
    """

    cfg: CfgNode
    raw: Path
    out: Path
    config: tuple[str, ...]
    blockwise: bool

    @cached_property
    def rescaled(self) -> Path:
        """The zarr with the volume on the voxels of the network, or where it has these, a file that names it."""
        suffix = PLACE if self._is_read_in_place() else ".zarr"
        return data_folder(self.cfg, "test") / f"{self.out.stem}{suffix}"

    def _is_read_in_place(self) -> bool:
        """Return whether the volume is predicted without a copy: its voxels fit, and tiles read no chunk many times."""
        raw = open_array(self.raw, self.cfg.DATA.RAW)
        return voxel_size_nm(raw) == tuple(self.cfg.MODEL.VOXEL_SIZE) and max(raw.chunk_shape) <= WIDEST_CHUNK

    @property
    def sample(self) -> Sample:
        """The rescaled volume and what is made of it, opened anew each time."""
        return Sample(self.cfg, self.rescaled)

    @property
    def merge_function(self) -> str:
        """The merge function whose graph, tables and segmentations are made block by block."""
        return method_of(self.cfg.INS_SEGMENT).merge_function(self.cfg.INS_SEGMENT)

    @property
    def results(self) -> dict[str, tuple[str, float]]:
        """Name of each segmentation in `out` -> its name in the sample's output, and its threshold."""
        names = method_of(self.cfg.INS_SEGMENT).segmentation_names(self.cfg.INS_SEGMENT)
        thresholds = {name: JOINED_AT if threshold is None else threshold for threshold, name in names.items()}
        if not self.blockwise:
            return {name: (name, threshold) for name, threshold in thresholds.items()}
        return {name: (final_segmentation_name(self.merge_function, t), t) for name, t in thresholds.items()}

    def commands(self) -> Iterator[Command]:
        """Yield the commands that are left, one by one: which one is next may depend on what the last one did."""
        key = self.cfg.DATA.RAW
        raw, size = open_array(self.raw, key), tuple(self.cfg.MODEL.VOXEL_SIZE)
        if self.rescaled.suffix == PLACE:
            shutil.rmtree(self.rescaled.with_suffix(".zarr"), ignore_errors=True)  # of a network for other voxels
            write_place(self.rescaled, place_of(self.raw, key))
        elif not _is_made(self.rescaled, key, rescale_record(raw, size, labels=False)):
            there = ("--voxel-size", *map(str, size), "--overwrite")
            yield "data_utils/rescale.py", str(self.raw), str(self.rescaled), "--dataset", key, *there
        yield from self._in_blocks() if self.blockwise else self._in_memory()
        for name, (made, _) in self.results.items():
            record = rescale_record(open_array(self.sample.output, made), voxel_size_nm(raw), raw, labels=True)
            if not _is_made(self.out, name, record):
                back = ("--like", str(self.raw), key, "--labels", "--add", "--overwrite")
                source = (str(self.sample.output), str(self.out), "--dataset", made, "--to", name)
                yield "data_utils/rescale.py", *source, *back

    def _in_memory(self) -> Iterator[Command]:
        record = prediction_record(self.sample)
        done, anew = _state(lambda: is_predicted(self.sample, record))
        if not done:
            yield "predicter.py", *self.config, *anew
        if not is_segmented(self.sample):
            yield "instance_segmenter.py", *self.config

    def _in_blocks(self) -> Iterator[Command]:
        record = prediction_record(self.sample)
        done, anew = _state(lambda: is_predicted(self.sample, record))
        if not done:
            anew = anew or _state(lambda: begun_prediction(self.sample, record))[1]
            yield "super_predicter_daisy.py", *self.config, *anew
        merge_function = self.merge_function
        if not _state(lambda: bool(require_fragments(self.sample)))[0]:
            yield "02_extract_fragments_blockwise.py", *self.config, *_state(lambda: begun_fragments(self.sample))[1]
        fragments = require_fragments(self.sample)
        if not _state(lambda: bool(require_edges(self.sample, merge_function, fragments)))[0]:
            yield "03_agglomerate_blockwise.py", *self.config
        if tables_left(self.sample, merge_function, [threshold for _, threshold in self.results.values()]):
            yield "04_find_segments_full.py", *self.config, "-mf", merge_function, *self._only_threshold()
        for _, threshold in self.results.values():
            done, anew = _state(partial(is_extracted, self.sample, merge_function, threshold))
            if not done:
                at = ("-mf", merge_function, "-th", f"{threshold:g}")
                yield "05_extract_segmentation_from_lut.py", *self.config, *anew, *at

    def _only_threshold(self) -> tuple[str, ...]:
        method_has_thresholds = None not in method_of(self.cfg.INS_SEGMENT).segmentation_names(self.cfg.INS_SEGMENT)
        return () if method_has_thresholds else ("-th", f"{JOINED_AT:g}")


def bytes_in_memory(cfg: CfgNode, raw: Path) -> int:
    """Return about how much memory it takes to segment a volume at once."""
    volume = open_array(raw, cfg.DATA.RAW)
    voxels = math.prod(volume.shape) * math.prod(voxel_size_nm(volume)) / math.prod(cfg.MODEL.VOXEL_SIZE)
    affinities = sum(task_channels(cfg).values()) if cfg.INS_SEGMENT.METHOD == "mutex" else 3
    as_float = 4
    return int(voxels * (affinities * as_float + BYTES_PER_VOXEL[cfg.INS_SEGMENT.METHOD]))


def fits_in_memory(cfg: CfgNode, raw: Path) -> bool:
    """Say how much memory a volume takes and how much there is, and return whether it is enough."""
    needed, free = bytes_in_memory(cfg, raw), available_memory()
    fits = needed < SHARE * free
    print(
        f"segmenting {raw.name} at once takes about {byte_count(needed)}, and {byte_count(free)} are free: "
        f"{'in memory' if fits else 'block by block'}"
    )
    return fits


def _is_made(path: Path, dataset: str, record: Record) -> bool:
    """Return whether a dataset is there, whole, and made from what the record says."""
    return _state(lambda: is_made(path, dataset, record))[0]


def _state(check: Callable[[], object]) -> tuple[bool, Command]:
    """Return whether a step is done, and what to add to its command if it was done or begun from something else."""
    try:
        return bool(check()), ()
    except UserError:
        return False, ANEW
