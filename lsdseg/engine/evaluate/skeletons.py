"""Scores from skeletons: how far one can walk along a neuron in the segmentation before an error.

Unlike VOI, they do not depend on how thick a neuron is, nor on where exactly its boundary lies.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import cKDTree
from skimage.morphology import skeletonize
from tqdm import tqdm

from lsdseg.errors import UserError


@dataclass(frozen=True)
class Skeleton:
    """A neuron as points and the lines between them.

    Attributes:
        points: float64 (n, 3), z, y, x in nm.
        edges: int64 (m, 2), indices of the two points of each line.
    """

    points: NDArray[np.float64]
    edges: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.float64]:
        """Length of each edge in nm, float64 (m,)."""
        lengths: NDArray[np.float64] = np.linalg.norm(np.diff(self.points[self.edges], axis=1)[:, 0], axis=1)
        return lengths


def read_swc(path: Path) -> Skeleton:
    """Read a skeleton from an SWC file: lines of id, type, x, y, z, radius and the parent's id, -1 for none, in nm.

    Raises:
        UserError: the file cannot be read; a line is no such line; an id occurs twice; a parent is missing, or parents
            form a loop.
    """
    rows: dict[int, tuple[list[float], int]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give SWC files, or a folder of them") from error
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            x, y, z = map(float, words[2:5])
            one, parent = int(words[0]), int(words[6])
            if not all(map(math.isfinite, (x, y, z))):
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(
                f"line {number} of {path} is no line of SWC: write id, type, x, y, z, radius, parent"
            ) from None
        if one in rows:
            raise UserError(f"line {number} of {path} has the id {one} again: give every point an id of its own")
        rows[one] = [z, y, x], parent
    if not rows:
        raise UserError(f"{path} has no points: leave it out")
    number_of = {one: number for number, one in enumerate(rows)}
    edges = []
    for one, (_, parent) in rows.items():
        if parent < 0:
            continue
        if parent not in number_of:
            raise UserError(f"{path}: point {one} has the parent {parent}, which is missing: add it, or write -1")
        edges.append((number_of[one], number_of[parent]))
    _refuse_loops(path, {one: parent for one, (_, parent) in rows.items()})
    return Skeleton(np.array([place for place, _ in rows.values()]), np.array(edges, np.int64).reshape(-1, 2))


def _refuse_loops(path: Path, parents: Mapping[int, int]) -> None:
    rooted: set[int] = set()
    for start in parents:
        walked: set[int] = set()
        one = start
        while one >= 0 and one not in rooted:
            if one in walked:
                raise UserError(f"{path}: the parents of point {one} form a loop: write -1 as the parent of its root")
            walked.add(one)
            one = parents[one]
        rooted |= walked


def read_skeletons(path: Path) -> dict[str, Skeleton]:
    """Read an SWC file, or all in a folder, by name.

    Raises:
        UserError: there is none, or as for `read_swc`.
    """
    files = sorted(path.glob("*.swc")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"no *.swc in {path}: name the folder with the skeletons")
    return {file.stem: read_swc(file) for file in files}


def make_skeletons(
    labels: NDArray[Any], voxel_size: Sequence[float], offset: Sequence[float], least_voxels: int = 1000
) -> dict[str, Skeleton]:
    """Make a skeleton of each object by thinning (Lee et al., CVGIP 1994), as lines between neighboring voxels.

    Args:
        labels: unsigned ids (z, y, x), 0 is background.
        voxel_size: in nm.
        offset: of the labels in nm.
        least_voxels: smaller objects get none.

    Returns:
        Object id -> skeleton, without objects whose skeleton has one point only.
    """
    ids, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    numbers = numbers.reshape(labels.shape)
    boxes = find_objects(numbers + 1)  # numbers start at 0, which find_objects skips
    made = {}
    work = zip(ids.tolist(), counts, strict=True)
    for number, (one, count) in enumerate(tqdm(work, "skeletons", len(ids), leave=False, delay=2)):
        if one == 0 or count < least_voxels:
            continue
        box = boxes[number]
        # Thinning treats the array's faces as background only with a margin.
        voxels = np.argwhere(skeletonize(np.pad(numbers[box] == number, 1))) - 1 + [side.start for side in box]
        pairs = cKDTree(voxels).query_pairs(1.8, output_type="ndarray")  # 26 neighbors
        if not len(pairs):
            continue
        points = (voxels + 0.5) * np.array(voxel_size) + np.array(offset)
        lengths = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
        tree = minimum_spanning_tree(coo_array((lengths, pairs.T), shape=(len(points),) * 2).tocsr()).tocoo()
        made[str(one)] = Skeleton(points, np.stack([tree.row, tree.col], axis=1).astype(np.int64))
    return made


def segments_at(
    skeleton: Skeleton, labels: NDArray[Any], voxel_size: Sequence[float], offset: Sequence[float]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Look up the segment at each point.

    Returns:
        The ids, 0 outside the labels, and where points lie inside.
    """
    voxels = np.floor((skeleton.points - np.array(offset)) / np.array(voxel_size)).astype(np.int64)
    inside = ((voxels >= 0) & (voxels < labels.shape)).all(axis=1)
    found = np.zeros(len(voxels), labels.dtype)
    found[inside] = labels[tuple(voxels[inside].T)]
    return found, inside


def score_skeletons(
    skeletons: Mapping[str, Skeleton],
    labels: NDArray[Any],
    voxel_size: Sequence[float],
    offset: Sequence[float],
) -> dict[str, Any]:
    """Compute the expected run length (Januszewski et al., Nature Methods 2018) of a segmentation.

    It is the expected length, along a skeleton, of the segment at a random place of all skeletons. An edge counts if
    both ends are in one segment, and that segment has points of no other skeleton. All lengths of one segment in one
    skeleton add up. Segment 0 is no segment. Lines that leave the labels are left out. funlib.evaluate is stricter:
    there, a skeleton that shares any segment with another one has no run at all.

    Args:
        skeletons: by name.
        labels: the segmentation (z, y, x).
        voxel_size: in nm.
        offset: of the labels in nm.

    Returns:
        erl: in nm.
        erl_best: that of a segmentation without errors, in nm.
        normalized_erl: their ratio, 0..1.
        neurons: per skeleton name, length, erl, splits (edges between different segments) and merged_with (names of the
            skeletons that share a segment with it).

    Raises:
        ValueError: no line lies inside the labels.
    """
    looked_up = {name: segments_at(one, labels, voxel_size, offset) for name, one in skeletons.items()}
    owners: dict[int, set[str]] = {}
    for name, (segments, _) in looked_up.items():
        for segment in np.unique(segments[segments != 0]).tolist():
            owners.setdefault(segment, set()).add(name)
    neurons: list[dict[str, Any]] = []
    for name, skeleton in skeletons.items():
        segments, inside = looked_up[name]
        within = inside[skeleton.edges].all(axis=1)
        ends, lengths = segments[skeleton.edges[within]], skeleton.lengths[within]
        runs: dict[int, float] = {}
        for (one, other), length in zip(ends.tolist(), lengths.tolist(), strict=True):
            if one == other != 0 and len(owners[one]) == 1:
                runs[one] = runs.get(one, 0.0) + length
        total = float(lengths.sum())
        if total == 0:
            continue
        shared = set().union(*(owners[segment] for segment in np.unique(segments[segments != 0]).tolist())) - {name}
        erl = sum(run**2 for run in runs.values()) / total
        splits = int(np.count_nonzero(ends[:, 0] != ends[:, 1]))
        neurons.append({"name": name, "length": total, "erl": erl, "splits": splits, "merged_with": sorted(shared)})
    whole = sum(neuron["length"] for neuron in neurons)
    if not whole:
        raise ValueError("no line of a skeleton lies inside the segmentation")
    erl = sum(neuron["erl"] * neuron["length"] for neuron in neurons) / whole
    best = sum(neuron["length"] ** 2 for neuron in neurons) / whole
    return {"erl": erl, "erl_best": best, "normalized_erl": erl / best, "neurons": neurons}
