"""What the steps have in common: a grid of blocks of INS_SEGMENT.BLOCK_SIZE voxels, and labels stored along it."""

from collections.abc import Callable, Sequence
from typing import Any

import daisy
import numpy as np
from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array

from lsdseg.data_utils.placement import offset_nm, units_per_nanometer, voxel_size_nm
from lsdseg.data_utils.records import START_OVER, Record, record_of
from lsdseg.data_utils.volumes import MISSING, chunk_shape, create_array, has_array, open_array, seal_array
from lsdseg.engine.blocks.markers import missing_blocks
from lsdseg.engine.blocks.step import BlockStep
from lsdseg.engine.post.block_tree import Position
from lsdseg.engine.sample import Sample
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk

# Chunks of labels are at most this wide: what a viewer loads for one screen.
LARGEST_CHUNK = 64


def block_step(
    sample: Sample,
    name: str,
    open_worker: str,
    *,
    arguments: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    context: Sequence[int] | None = None,
    rate: Callable[[int], str] | None = None,
) -> BlockStep:
    """A step over the blocks of a sample.

    Args:
        sample: what is worked on.
        name: of the step.
        open_worker: "module:function", see `BlockStep`.
        arguments: for open_worker, beside those of the sample.
        settings: what the result depends on, see `BlockStep`.
        context: voxels along z, y, x that a block reads on every side; INS_SEGMENT.CONTEXT if None.
        rate: see `BlockStep`.

    Raises:
        UserError: there are no affinities, whose voxels the blocks divide.
    """
    volume, blocks = sample.affinities, sample.cfg.INS_SEGMENT
    margin = Coordinate(blocks.CONTEXT if context is None else context) * volume.voxel_size
    write_roi = Roi(volume.roi.begin, Coordinate(blocks.BLOCK_SIZE) * volume.voxel_size)
    return BlockStep(
        name=name,
        sample=sample.name,
        total_roi=volume.roi.grow(margin, margin),
        read_roi=write_roi.grow(margin, margin),
        write_roi=write_roi,
        open_worker=open_worker,
        arguments=sample.arguments | (arguments or {}),
        markers=sample.markers(name),
        settings=settings or {},
        per_nanometer=units_per_nanometer(volume),
        rate=rate,
    )


def begun_labels(
    sample: Sample, dataset: str, record: Record, *, instead: str = "", replaced: str = ""
) -> Record | None:
    """Return the record of labels that another run has begun, None if there are none to go on with.

    Args:
        sample: the sample.
        dataset: name of the labels in its output.
        record: what they would be made from now.
        instead: what to do with labels of others, for the message.
        replaced: the step whose labels are replaced, because nothing is built on them.

    Raises:
        UserError: they are made from something else, or by others.
    """
    if not has_array(sample.output, dataset):
        return None
    begun = record_of(open_array(sample.output, dataset))
    if begun is None:
        raise UserError(f"{dataset} in {sample.output} does not say what it was made from: {instead}{START_OVER}")
    if begun.step == replaced:
        return None
    begun.require_same(f"{dataset} in {sample.output}", record)
    return begun


def create_labels(sample: Sample, dataset: str, attributes: dict[str, Any]) -> None:
    """Create an empty label volume (uint64) on the voxels of the affinities, whose chunks no two blocks share.

    Raises:
        UserError: there is no room on disk.
    """
    volume = sample.affinities
    shape = volume.shape[-3:]
    with room_on_disk(sample.output):
        create_array(
            sample.output,
            dataset,
            shape,
            voxel_size=voxel_size_nm(volume),
            offset=offset_nm(volume),
            dtype=np.uint64,
            chunk_shape=chunk_shape(sample.cfg.INS_SEGMENT.BLOCK_SIZE, shape, LARGEST_CHUNK),
            attributes=attributes,
        )


def seal_labels(sample: Sample, dataset: str, step: BlockStep, source: Array) -> None:
    """Record that labels are complete, and which blocks are missing: in them, or in the array they were made from."""
    missing = [*missing_blocks(step.markers), *source.attrs.get(MISSING, [])]
    seal_array(sample.output, dataset, [place for n, place in enumerate(missing) if place not in missing[:n]])


def block_grid(sample: Sample) -> Position:
    """Number of blocks along z, y, x."""
    return block_step(sample, "", "").grid


def block_position(sample: Sample, begin: Coordinate, level: int = 0) -> Position:
    """The position of the node of the tree whose box begins there."""
    array, block = sample.affinities, Coordinate(sample.cfg.INS_SEGMENT.BLOCK_SIZE)
    return tuple((begin - array.roi.begin) // (block * array.voxel_size * 2**level))


def block_number(position: Position, grid: Position) -> int:
    """The number under which daisy, and so the graph, knows the block at a position."""
    block = Roi(position, (1, 1, 1))
    number: int = daisy.Block(Roi((0, 0, 0), grid), block, block).block_id[1]  # type: ignore[no-untyped-call]
    return number
