"""Scores of segmentations, with what the region adjacency graph adds to them.

A look-up table and the fragments are a segmentation already: whoever reads it sees the fragments through the table. So
thresholds can be compared before any of them is written. And the graph says how many edits each of them needs.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.config.implementations import MERGE_FUNCTIONS
from lsdseg.data_utils.layout import FRAGMENTS, final_segmentation_name, lut_path
from lsdseg.data_utils.placement import place_like
from lsdseg.data_utils.records import identity, record_of
from lsdseg.data_utils.volumes import has_array, open_array, read
from lsdseg.engine.evaluate.edits_needed import edits_needed
from lsdseg.engine.evaluate.evaluate import EDITS, FromGraph, evaluate, overlaps, written_in
from lsdseg.engine.evaluate.metrics import Table, count_overlaps
from lsdseg.engine.post.methods import method_that_scores
from lsdseg.engine.post.steps.fragments import require_fragments
from lsdseg.engine.post.steps.grid import block_grid
from lsdseg.engine.post.steps.tables import require_current
from lsdseg.engine.post.tables import Lut, existing_lut, load_lut, lut_record, relabel
from lsdseg.engine.sample import Sample
from lsdseg.errors import UserError
from lsdseg.rag import open_store

# What comes after the merge function in the name of a table: 70, or 70_4 for 0.704.
HUNDREDTHS = re.compile(r"(\d+)(?:_(\d+))?")


def score(
    cfg: CfgNode,
    skeletons: Path | None = None,
    truth_file: Path | None = None,
    truth_dataset: str | None = None,
    fragments: str = FRAGMENTS,
    tables: bool = False,
) -> None:
    """Score the test volumes, see `evaluate`.

    Args:
        cfg: the config.
        skeletons, truth_file, truth_dataset, fragments: as for `evaluate`.
        tables: score what look-up tables stand for, too, where it was not written. Without any segmentation that was
            written, it is scored anyway.

    Raises:
        UserError: as for `evaluate`.
    """

    def from_graph(sample: Sample) -> FromGraph:
        unwritten = unwritten_segmentations(sample) if tables or not written_in(sample.output) else {}
        return FromGraph(unwritten, _Edits(sample))

    evaluate(cfg, skeletons, truth_file, truth_dataset, fragments, from_graph)


def unwritten_segmentations(sample: Sample) -> dict[str, Array]:
    """Return the segmentations that look-up tables stand for and that were not written, by their dataset to be.

    Tables that were made from other fragments, or before the last edit, are left out, which is printed.
    """
    found: dict[str, Array] = {}
    for merge_function, threshold in _tables(sample):
        name = final_segmentation_name(merge_function, threshold)
        if has_array(sample.output, name):
            continue
        try:
            path = existing_lut(sample.output, merge_function, threshold)
            require_current(sample, path, require_fragments(sample))
            labels = _Labels(sample, path)
        except UserError as error:
            print(f"a table is left out: {error}")
            continue
        array = place_like(labels.fragments, labels)
        made_by = {"method": method_that_scores(merge_function).name, "merge_function": merge_function}
        record = lut_record(path)
        array.attrs.update(made_by | {"threshold": threshold} | (record.attributes if record else {}))
        found[name] = array
    return found


def _tables(sample: Sample) -> Iterator[tuple[str, float]]:
    """Merge function and threshold of each look-up table of a sample."""
    for merge_function in (*MERGE_FUNCTIONS, "mutex"):
        path = lut_path(sample.output, merge_function, 0)
        start = path.stem.removesuffix("0")
        names = {file.stem if file.suffix == ".npz" else file.name for file in path.parent.glob(f"{start}*")}
        matches = (HUNDREDTHS.fullmatch(name.removeprefix(start)) for name in sorted(names))
        for value in sorted(float(f"{match[1]}.{match[2] or 0}") / 100 for match in matches if match):
            yield merge_function, round(value, 8)


class _Edits:
    """Counts the edits that segmentations of a sample need which were made from its graph, if that fits into memory."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __call__(self, segmentation: Array) -> dict[str, int]:
        """Return the columns EDITS of a segmentation; nothing without its table and its graph."""
        sample, record = self.sample, record_of(segmentation)
        if record is None or record.inputs.get(FRAGMENTS) != self.fragments or "threshold" not in segmentation.attrs:
            return {}
        merge_function, threshold = str(segmentation.attrs["merge_function"]), float(segmentation.attrs["threshold"])
        try:
            path = existing_lut(sample.output, merge_function, threshold)
            store = open_store(sample.cfg, sample.output, "r", self.fragments)
        except UserError:
            return {}
        if path.is_dir() or store.count_nodes() > sample.cfg.INS_SEGMENT.FRAGMENTS_IN_MEMORY:
            return {}
        needed = edits_needed(load_lut(path), store.edges(merge_function), threshold, *self.overlaps)
        return dict(zip(EDITS, needed, strict=True)) if needed else {}

    @cached_property
    def fragments(self) -> str:
        """Id of the fragments that there are."""
        name = self.sample.fragments_dataset
        return identity(open_array(self.sample.output, name)) if has_array(self.sample.output, name) else ""

    @cached_property
    def overlaps(self) -> Table:
        """The voxels that fragments share with neurons, see `count_overlaps`."""
        fragments, truth = open_array(self.sample.output, self.sample.fragments_dataset), self.sample.ground_truth
        if truth is None:
            raise ValueError(f"{self.sample.volume} has no ground truth")
        return count_overlaps(overlaps(fragments, truth, self.sample.ground_truth_mask, description="edits"))


class _Labels:
    """Fragments on disk, seen through a look-up table."""

    dtype = np.dtype(np.uint64)

    def __init__(self, sample: Sample, lut: Path) -> None:
        self.fragments = open_array(sample.output, sample.fragments_dataset)
        self.path, self.lut, self.block = lut, Lut(lut, block_grid(sample)), sample.cfg.INS_SEGMENT.BLOCK_SIZE
        self.shape, self.ndim, self.chunks = self.fragments.shape, 3, self.fragments.chunk_shape

    def __getitem__(self, slices: Any) -> NDArray[np.uint64]:
        """Read voxels."""
        voxels = read(self.fragments, slices)
        try:
            return relabel(voxels, self.lut.of_blocks(*self._blocks(slices)))
        except ValueError as error:
            raise UserError(f"{self.path}: {error}; run 03 and 04 again") from error

    def _blocks(self, slices: Any) -> Iterator[tuple[int, ...]]:
        """Positions of the blocks that have some of the voxels."""
        if slices is ...:
            slices = (slice(None),) * 3
        ranges = [s.indices(size) for s, size in zip(slices, self.shape, strict=True)]
        return product(
            *(range(first // b, -(-last // b)) for (first, last, _), b in zip(ranges, self.block, strict=True))
        )
