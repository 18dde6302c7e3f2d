"""Where to look first, without ground truth: how much the prediction contradicts a segmentation.

LSDs say, at every voxel, where the center of its neurite lies, as far as a Gaussian window sees. The segmentation says
that too: its own LSDs are computed from it. Where two neurites are merged, the window sees both in the segmentation,
but the network saw one, so the two centers lie apart. The distance between them is a length in nm, whatever the
threshold and wherever blocks end.

Every volume has some distance everywhere. So the volume is cut into small cubes, and only cubes count in which the
mean distance within a segment is well above that of the whole volume. Splits do not show in it; `splits` finds them.
`shape` adds what is odd in the shape of a segment.
"""

import csv
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.data_utils.checks import check_labels
from lsdseg.data_utils.labels import grow_boundary
from lsdseg.data_utils.layout import FRAGMENTS, prediction_name, quality_path
from lsdseg.data_utils.placement import offset_nm, voxel_size_nm
from lsdseg.data_utils.volumes import has_array, open_array, read, require_whole
from lsdseg.engine.evaluate.evaluate import segmentations_in
from lsdseg.engine.evaluate.shape import Grid, Shape, Widths, radii_in, shapes_of, widths_in
from lsdseg.engine.evaluate.splits import Split, from_stored, known, rank_splits, touching_in
from lsdseg.engine.sample import DISAGREEMENT, Sample, best_segmentation, samples_of
from lsdseg.engine.training.lsd import local_shape_descriptors
from lsdseg.errors import UserError
from lsdseg.files import write_whole

LSDS = prediction_name("lsds")
ABOVE = 1.5  # a cube counts by how far its mean distance is above this times that of the volume
CUBE = 1.25  # width of a cube in sigma of the LSDs: about the radius of a neurite
FILLED = 0.1  # a segment that fills less of a cube says nothing there
BLOCK = 128  # voxels along each axis that are read at a time, about; context comes in addition
LEAST = 1000  # voxels of a segment whose contacts are listed
SHOWN = 10  # of each list that are printed
WINDOW = 3  # the window of the LSDs ends at so many sigma


@dataclass
class Doubt:
    """One segment of the list.

    Attributes:
        segment: its id.
        doubt: by how much the distance is too large, summed over the cubes: nm x cubic micrometers.
        mean_nm: mean distance in the segment.
        worst_nm: mean distance in its worst cube.
        z: where that is, in nm.
        y: the same.
        x: the same.
        voxels: of the segment, without those at its boundary.
        orphan: whether it touches no face of the volume. Neurites do not end inside a small volume: one that does is
            probably split off from another.
        caliber: by how many times its radius changes suddenly, at most; 1 if nowhere.
        neck: how many times as thick as the neck between them the thinner one of two bodies is, at most; 1 if there is
            only one that is thicker than sigma.
        neck_z: where that neck is, in nm; None if there is none.
        neck_y: the same.
        neck_x: the same.
        disagreement: of the views of the prediction, its mean in the segment, 0..1; None if it was not kept.
    """

    segment: int
    doubt: float
    mean_nm: float
    worst_nm: float
    z: float
    y: float
    x: float
    voxels: int
    orphan: bool = False
    caliber: float = 1.0
    neck: float = 1.0
    neck_z: float | None = None
    neck_y: float | None = None
    neck_x: float | None = None
    disagreement: float | None = None


class Cubes(NamedTuple):
    """What segments have in cubes; one row for each segment in each cube.

    Attributes:
        segments: uint64 (n,).
        voxels: int64 (n,), how many voxels of the cube are the segment's.
        sums: float64 (n,), sum of the distances at these voxels, in nm.
        places: float64 (n, 3), mean position of these voxels in nm, z, y, x.
        unsure: float64 (n,), sum of the disagreement of views at these voxels; NaN if it was not kept.
    """

    segments: NDArray[np.uint64]
    voxels: NDArray[np.int64]
    sums: NDArray[np.float64]
    places: NDArray[np.float64]
    unsure: NDArray[np.float64]


def quality(cfg: CfgNode, segmentation: str | None = None) -> None:
    """List segments and contacts of every test volume, the most doubtful first, beside the output.

    Writes SAMPLE_quality.json, SAMPLE_quality.csv (segments, likely merges) and SAMPLE_quality_splits.csv (contacts).

    Args:
        cfg: the config that the network was trained with; its LSD_SIGMA and GROWBOUNDARY_STEPS are used.
        segmentation: a dataset, or its last part. None: the one that scored best, or else the middle one.

    Raises:
        UserError: there are no LSDs, no affinities or no such segmentation, or they do not fit together.
    """
    for sample in samples_of(cfg):
        name = _choose(sample, segmentation)
        array = open_array(sample.output, name)
        grid = Grid(array.shape, _cube(sample, array))
        cubes, widths = _measure(sample, array, name, grid)
        doubts, mean = rank_segments(cubes, math.prod(grid.cube), voxel_size_nm(array))
        outer, shapes = ids_at_faces(array), shapes_of(widths, grid, voxel_size_nm(array), sample.cfg.MODEL.LSD_SIGMA)
        for doubt in doubts:
            doubt.orphan = doubt.segment not in outer
            _describe(doubt, shapes.get(doubt.segment, Shape()), array)
        sizes = {doubt.segment: doubt.voxels for doubt in doubts}
        splits = rank_splits(touching_in(sample, array, name), sizes, LEAST)
        lists = {"segments": list(map(asdict, doubts)), "splits": list(map(asdict, splits))}
        files = {
            "_splits.csv": _table(Split, lists["splits"]),
            ".csv": _table(Doubt, lists["segments"]),
            ".json": json.dumps({"segmentation": name, "mean_nm": mean} | lists, indent=1),
        }
        for ending, content in files.items():
            with write_whole(quality_path(sample.output, ending)) as partial:
                partial.write_text(content, encoding="utf-8")
        print(f"{name} in {sample.output}: centers lie {mean:.0f} nm apart on average; the most likely merges:")
        if sample.disagreement is None and has_array(sample.output, DISAGREEMENT):
            print(f"warning: {DISAGREEMENT} in {sample.output} is of another prediction than the affinities: not used")
        for doubt in doubts[:SHOWN]:
            print(f"{doubt.segment:>20}  doubt {doubt.doubt:8.3f}  {doubt.worst_nm:4.0f} nm apart at {_place(doubt)}")
        orphans = sum(doubt.orphan and doubt.voxels >= LEAST for doubt in doubts)
        print(f"{orphans} segments of {LEAST} voxels or more are orphans: they touch no face of the volume")
        print("the most likely splits:")
        for split in splits[:SHOWN]:
            ends = f"{split.segment} and {split.other}"
            print(f"{ends:>30}  affinity {split.affinity:.2f} across {split.faces} faces, at {_place(split)}")
        print(f"all {len(doubts)} segments are in {quality_path(sample.output, '.csv')}, all {len(splits)} contacts in")
        print(f"{quality_path(sample.output, '_splits.csv')}; python view.py --worst or --splits walks through them")


def ids_at_faces(segmentation: Array) -> set[int]:
    """Return the ids at the faces of a volume, (z, y, x)."""
    found: set[int] = set()
    for axis in range(3):
        for at in (slice(0, 1), slice(segmentation.shape[axis] - 1, segmentation.shape[axis])):
            face = tuple(at if n == axis else slice(None) for n in range(3))
            found |= set(np.unique(read(segmentation, face)).tolist())
    return found


def _describe(doubt: Doubt, shape: Shape, segmentation: Array) -> None:
    """Enter the shape of a segment."""
    doubt.caliber, doubt.neck = shape.caliber, shape.neck
    if shape.place:
        middle = (np.array(shape.place) + 0.5) * voxel_size_nm(segmentation) + offset_nm(segmentation)
        doubt.neck_z, doubt.neck_y, doubt.neck_x = middle.tolist()


def _place(found: Doubt | Split) -> str:
    return ", ".join(f"{value:.0f}" for value in (found.z, found.y, found.x)) + " nm (z, y, x)"


def _table(kind: type[Doubt | Split], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(kind)])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def center_distance(
    segmentation: NDArray[np.unsignedinteger],
    predicted: NDArray[np.float32],
    sigma: float,
    voxel_size: Sequence[float],
    context: Sequence[int],
    downsample: int = 1,
    boundary: int = 0,
) -> NDArray[np.float32]:
    """Compute how far the centers that a segmentation has lie from those that LSDs predict.

    Args:
        segmentation: unsigned (z, y, x), with context on each side; 0 is background.
        predicted: float32 (10, z, y, x) in 0..1, LSDs without context; or (6, z, y, x) of sections.
        sigma: of the LSDs, in nm.
        voxel_size: in nm, z, y, x.
        context: voxels along each axis; WINDOW * sigma and the boundary, for what does not depend on where the
            array ends.
        downsample: as for `local_shape_descriptors`.
        boundary: voxels that segments are eroded by first, as labels were in training.

    Returns:
        float32 (z, y, x) without context, in nm; NaN at background and boundary.
    """
    sections = len(predicted) == 6
    inside = tuple(slice(c, size - c) for c, size in zip(context, segmentation.shape, strict=True))
    labels = grow_boundary(segmentation, boundary, (1, 2) if sections else (0, 1, 2))
    if sections:
        own = np.stack([local_shape_descriptors(section, sigma, voxel_size[1:], downsample) for section in labels], 1)
    else:
        own = local_shape_descriptors(labels, sigma, voxel_size, downsample)
    dims = 2 if sections else 3
    # A channel holds the distance in units of 2 sigma.
    apart: NDArray[np.float32] = 2 * sigma * np.linalg.norm(own[:dims, *inside] - predicted[:dims], axis=0)
    return np.where(labels[inside] > 0, apart, np.float32(np.nan))


def sum_in_cubes(
    distance: NDArray[np.float32],
    segmentation: NDArray[np.unsignedinteger],
    cube: Sequence[int],
    voxel_size: Sequence[float],
    offset: Sequence[float],
    disagreement: NDArray[np.float32] | None = None,
) -> Cubes:
    """Sum distances over the voxels that each segment has in each cube.

    Args:
        distance: float32 (z, y, x), NaN where nothing is known.
        segmentation: unsigned (z, y, x).
        cube: its width in voxels along each axis. The first cube begins where the array does.
        voxel_size: in nm.
        offset: of the array in nm.
        disagreement: float32 (z, y, x), of the views; None if it was not kept.
    """
    known = np.isfinite(distance)
    at = np.nonzero(known)
    grid = [-(-size // width) for size, width in zip(distance.shape, cube, strict=True)]
    number = np.ravel_multi_index([i // width for i, width in zip(at, cube, strict=True)], grid)
    ids, inverse = np.unique(segmentation[known], return_inverse=True)
    keys, rows = np.unique(inverse * math.prod(grid) + number, return_inverse=True)
    voxels = np.bincount(rows, minlength=len(keys))
    middle = [np.bincount(rows, i, len(keys)) / np.maximum(voxels, 1) + 0.5 for i in at]
    places = np.stack(middle, axis=1) * np.array(voxel_size) + np.array(offset)
    sums = np.bincount(rows, distance[known], len(keys)).astype(np.float64)
    segments = ids[keys // math.prod(grid)].astype(np.uint64)
    unsure = np.full(len(keys), np.nan) if disagreement is None else np.bincount(rows, disagreement[known], len(keys))
    return Cubes(segments, voxels, sums, places, unsure.astype(np.float64))


def rank_segments(cubes: Cubes, cube_voxels: int, voxel_size: Sequence[float]) -> tuple[list[Doubt], float]:
    """Rank segments by how far, and over how large a part of them, the distance is above that of the whole volume.

    Args:
        cubes: of the whole volume, see `sum_in_cubes`.
        cube_voxels: voxels of a cube.
        voxel_size: in nm.

    Returns:
        The segments, the most doubtful first, and the mean distance in nm.
    """
    mean = float(cubes.sums.sum() / max(cubes.voxels.sum(), 1))
    ids, rows = np.unique(cubes.segments, return_inverse=True)
    distances = cubes.sums / np.maximum(cubes.voxels, 1)
    distances[cubes.voxels < FILLED * cube_voxels] = 0
    excess = np.maximum(distances - ABOVE * mean, 0) * cubes.voxels * math.prod(voxel_size) / 1e9
    doubt = np.bincount(rows, excess, len(ids))
    voxels = np.bincount(rows, cubes.voxels, len(ids))
    means = np.bincount(rows, cubes.sums, len(ids)) / np.maximum(voxels, 1)
    by_distance = np.lexsort((distances, rows))
    worst = by_distance[np.searchsorted(rows[by_distance], np.arange(len(ids)), side="right") - 1]
    order = np.lexsort((-distances[worst], -doubt))
    unsure = np.bincount(rows, cubes.unsure, len(ids)) / np.maximum(voxels, 1)
    doubts = []
    for row in order.tolist():
        at, (z, y, x) = worst[row], cubes.places[worst[row]].tolist()
        found = Doubt(
            int(ids[row]), float(doubt[row]), float(means[row]), float(distances[at]), z, y, x, int(voxels[row])
        )
        found.disagreement = known(unsure[row])
        doubts.append(found)
    return doubts, mean


def _choose(sample: Sample, segmentation: str | None) -> str:
    """The dataset to look at, and a check that the prediction is there."""
    names = [name for name in segmentations_in(sample.output) if name != FRAGMENTS]
    if segmentation is None:
        best = best_segmentation(sample.output)
        return best if best in names else names[len(names) // 2]
    found = [name for name in names if segmentation in (name, name.rpartition("/")[2])]
    if not found:
        raise UserError(f"there is no {segmentation} in {sample.output}: choose from {', '.join(names)}")
    return found[0]


def _cube(sample: Sample, array: Array) -> list[int]:
    """Width of a cube in voxels; 1 across sections, if the network saw them one by one."""
    sections = bool(sample.cfg.DATA.DIM_2D)
    width = CUBE * sample.cfg.MODEL.LSD_SIGMA
    return [
        1 if sections and axis == 0 else max(1, round(width / size)) for axis, size in enumerate(voxel_size_nm(array))
    ]


def _predictions_of(sample: Sample, array: Array, name: str) -> tuple[Array, Array | None]:
    """The predicted LSDs, and the disagreement of views if it was kept.

    Raises:
        UserError: they or the segmentation are missing or damaged, or they do not lie on the same voxels.
    """
    lsds, disagreement = open_array(sample.output, LSDS), sample.disagreement
    check_labels(array, f"{name} in {sample.output}")
    require_whole(sample.output, name)
    for dataset, predicted, channels in ((LSDS, lsds, (6, 10)), (DISAGREEMENT, disagreement, (1,))):
        if predicted is None:
            continue
        require_whole(sample.output, dataset)
        if (array.roi, array.voxel_size) != (predicted.roi, predicted.voxel_size) or predicted.shape[0] not in channels:
            raise UserError(
                f"{name} has shape {array.shape} at {offset_nm(array)} nm, but {dataset} in {sample.output} has "
                f"{predicted.shape} at {offset_nm(predicted)}: predict and segment with the same config"
            )
    return lsds, disagreement


def _measure(sample: Sample, array: Array, name: str, grid: Grid) -> tuple[Cubes, Widths]:
    """Read a segmentation and the LSDs block by block, and measure what each segment has in each cube.

    Raises:
        UserError: as for `_predictions_of`.
    """
    predicted, disagreement = _predictions_of(sample, array, name)
    model, size, sections = sample.cfg.MODEL, voxel_size_nm(array), predicted.shape[0] == 6
    window, boundary, coarse = WINDOW * model.LSD_SIGMA, model.GROWBOUNDARY_STEPS, model.LSD_DOWNSAMPLE
    # At least one voxel more than the window: the radii of the neighbors of a block count, too.
    context = [coarse * math.ceil((math.ceil(window / along) + max(boundary, 1)) / coarse) for along in size]
    if sections:
        context[0] = 0
    step = [width * max(1, BLOCK // width) for width in grid.cube]
    cubes, widths = [], []
    for slices in tqdm(list(_boxes(array.shape, step)), name, unit="block", leave=False, delay=2):
        lsds = from_stored(read(predicted, (slice(None), *slices)))
        unsure = None if disagreement is None else from_stored(read(disagreement, (0, *slices)))
        segmentation = _with_context(array, slices, context)
        apart = center_distance(segmentation, lsds, model.LSD_SIGMA, size, context, coarse, boundary)
        begin = [along.start for along in slices]
        at = [o + first * along for o, first, along in zip(offset_nm(array), begin, size, strict=True)]
        cubes.append(sum_in_cubes(apart, read(array, slices), grid.cube, size, at, unsure))
        radii = _with_one_voxel(radii_in(segmentation, size, window, sections), context)
        widths.append(widths_in(_with_one_voxel(segmentation, context), radii, begin, grid, sections))
    return (
        Cubes(*(np.concatenate(column) for column in zip(*cubes, strict=True))),
        Widths(*(np.concatenate(column) for column in zip(*widths, strict=True))),
    )


def _with_one_voxel(around: NDArray[Any], context: Sequence[int]) -> NDArray[Any]:
    """Cut a block with context to one voxel more on each side, and add 0 where there is no context."""
    padded = np.pad(around, [(max(0, 1 - width),) * 2 for width in context])
    cut = [max(0, width - 1) for width in context]
    return padded[tuple(slice(width, size - width) for width, size in zip(cut, padded.shape, strict=True))]


def _boxes(shape: Sequence[int], step: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Slices of the blocks of a volume."""
    starts = [range(0, size, width) for size, width in zip(shape, step, strict=True)]
    for begin in itertools.product(*starts):
        yield tuple(slice(b, min(b + width, size)) for b, width, size in zip(begin, step, shape, strict=True))


def _with_context(array: Array, slices: Sequence[slice], context: Sequence[int]) -> NDArray[np.unsignedinteger]:
    """Read a block with context. At the faces of the volume it is mirrored, as raw was for the prediction."""
    box, missing = [], []
    for along, width, size in zip(slices, context, array.shape, strict=True):
        first, last = along.start - width, along.stop + width
        box.append(slice(max(first, 0), min(last, size)))
        missing.append((max(-first, 0), max(last - size, 0)))
    mirrored: NDArray[np.unsignedinteger] = np.pad(read(array, tuple(box)), missing, mode="reflect")
    return mirrored
