"""Scores from skeletons: how far one can walk along a neuron in the segmentation before an error.

Unlike VOI, they do not depend on how thick a neuron is, nor on where exactly its boundary lies.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import fastremap
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lsdseg.data_utils.skeletons import Skeleton, groups, trace
from lsdseg.data_utils.thinning import thin


def make_skeletons(
    labels: NDArray[Any], voxel_size: Sequence[float], offset: Sequence[float], least_voxels: int = 1000
) -> dict[str, Skeleton]:
    """Make a skeleton of each object by thinning, as lines between neighboring voxels.

    Args:
        labels: unsigned ids (z, y, x), 0 is background.
        voxel_size: in nm.
        offset: of the labels in nm.
        least_voxels: smaller objects get none.

    Returns:
        Object id -> skeleton, without objects whose skeleton has one point only.
    """
    ids, counts = fastremap.unique(labels, return_counts=True)
    large = fastremap.mask_except(labels, ids[(ids != 0) & (counts >= least_voxels)].tolist())
    total = int(np.count_nonzero(large))
    with tqdm(total=total, desc="skeletons", unit="voxel", unit_scale=True, leave=False, delay=2) as bar:
        curves = thin(large, bar)
    voxels = np.argwhere(curves)
    traced = ((one, trace(voxels[points], voxel_size, offset)) for one, points in groups(large[curves]))
    return {str(one): skeleton for one, skeleton in traced if len(skeleton.edges)}


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
