"""Edits of a segmentation, made on its region adjacency graph: arrays in, arrays out.

The segments at a threshold are the connected components of the edges with a score up to it. A merge adds an edge that
must hold. A split removes the weakest edges that hold two fragments together: those of a minimum cut between them,
within their segment. Edits are made again, in their order, on the graph at any threshold; a later edit wins over
earlier ones.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, maximum_flow

from lsdseg.rag.edits import Edit
from lsdseg.rag.store import Edges, Ids

STEPS = 10**5  # capacities are whole numbers from 1 to this
LARGEST = 2**26  # flows are int32, and several edges may join the same two fragments
MUST = -1.0  # score of an edge that must hold


def components(ids: Ids, u: Ids, v: Ids) -> NDArray[np.uint64]:
    """Find the connected components of a graph.

    Args:
        ids: uint64 (n,), all fragments, ascending.
        u: uint64 (m,), first fragment of each edge.
        v: uint64 (m,), second fragment of each edge.

    Returns:
        uint64 (n,): for each fragment the smallest id in its component.
    """
    return _smallest(ids, _component_numbers(len(ids), np.searchsorted(ids, u), np.searchsorted(ids, v)))


def min_cut(u: ArrayLike, v: ArrayLike, scores: ArrayLike, a: int, b: int) -> NDArray[np.bool_]:
    """Find the edges to remove so that no path leads from fragment a to b, and as little as possible is removed.

    An edge counts by the third power of how far its score lies below the worst one. So a large contact that was merged
    with doubts is cut, rather than the few sure contacts of a small fragment. Edges that must hold (`MUST`) are removed
    only where nothing else separates the two. Of equally good cuts, it is the one next to a or the one next to b,
    whichever leaves the more even parts.

    Args:
        u: unsigned (m,), first fragment of each edge.
        v: unsigned (m,), second fragment of each edge.
        scores: floating point (m,), merge scores in 0..1, or `MUST`.
        a: a fragment.
        b: another one.

    Returns:
        bool (m,): which edges to remove. None, if a and b are not connected.

    Raises:
        ValueError: a and b are the same.
    """
    if a == b:
        raise ValueError(f"fragment {a} cannot be separated from itself")
    u, v = np.asarray(u, np.uint64), np.asarray(v, np.uint64)
    ids, ends = np.unique(np.concatenate([u, v]), return_inverse=True)
    first, second = ends[: len(u)], ends[len(u) :]
    places = np.searchsorted(ids, np.array([a, b], np.uint64))
    if (np.append(ids, 0)[places] != [a, b]).any():
        return np.zeros(len(u), bool)
    source, sink = map(int, places)
    graph = csr_array(
        (np.tile(_capacities(scores), 2), (np.append(first, second), np.append(second, first))),
        shape=(len(ids), len(ids)),
        dtype=np.int32,
    )
    residual = graph - maximum_flow(graph, source, sink).flow
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    sides = []
    for start, directed in ((source, residual), (sink, csr_array(residual.T))):
        side = np.zeros(len(ids), bool)
        side[breadth_first_order(directed, start, return_predecessors=False)] = True
        sides.append(side)
    side = max(sides, key=lambda side: min(side.sum(), (~side).sum()))
    cut: NDArray[np.bool_] = side[first] != side[second]
    return cut


def apply_edits(
    lut: NDArray[np.uint64], edge_batches: Iterable[Edges], edits: Sequence[Edit], threshold: float
) -> NDArray[np.uint64]:
    """Make edits in a look-up table from fragments to segments. Segments that no edit names stay as they are.

    Args:
        lut: uint64 (2, n), fragments, ascending, and the segments at the threshold, without edits.
        edge_batches: (u, v, scores) of the graph, uint64, uint64 and float32 (m,). They are read once.
        edits: those that count, in their order; see `lsdseg.rag.edits.active`.
        threshold: scores up to which edges hold.

    Returns:
        uint64 (2, n), a new table. A segment has the id of its smallest fragment.

    Raises:
        ValueError: an edit names a fragment that is not in the table.
    """
    if not edits:
        return lut.copy()
    rows = _rows_of(lut[0], edits)
    inside = np.isin(lut[1], np.unique(lut[1][rows]))
    ids = lut[0][inside]
    u, v, scores = edges_within(ids, edge_batches, threshold)
    for edit in edits:
        ends = np.searchsorted(ids, np.array([edit.a, edit.b], np.uint64))
        if edit.action == "merge":
            u, v = np.append(u, ends[0]), np.append(v, ends[1])
            scores = np.append(scores, np.float32(MUST))
            continue
        numbers = _component_numbers(len(ids), u, v)
        held = np.flatnonzero(numbers[u] == numbers[ends[0]])
        keep = np.ones(len(u), bool)
        keep[held[min_cut(u[held], v[held], scores[held], *map(int, ends))]] = False
        u, v, scores = u[keep], v[keep], scores[keep]
    edited = lut.copy()
    edited[1, inside] = _smallest(ids, _component_numbers(len(ids), u, v))
    return edited


def merging_pair(lut: NDArray[np.uint64], edge_batches: Iterable[Edges], first: int, second: int) -> tuple[int, int]:
    """Choose two fragments to merge two segments by: those of the surest edge between them.

    Args:
        lut: uint64 (2, n), fragments, ascending, and their segments.
        edge_batches: as for `apply_edits`.
        first: a segment.
        second: another one.

    Returns:
        A fragment of the first and one of the second segment. If the two do not touch, the smallest ones.
    """
    best, pair = np.inf, (first, second)
    for u, v, scores in edge_batches:
        segments_u, segments_v = (lut[1][np.searchsorted(lut[0], ends)] for ends in (u, v))
        for from_, to in ((segments_u, segments_v), (segments_v, segments_u)):
            between = np.flatnonzero((from_ == first) & (to == second))
            known = np.where(np.isnan(scores[between]), 2, scores[between])  # an edge without a score merges last
            if len(between) and known.min() < best:
                best, at = float(known.min()), between[known.argmin()]
                pair = (int(u[at]), int(v[at])) if from_ is segments_u else (int(v[at]), int(u[at]))
    return pair


def _capacities(scores: ArrayLike) -> NDArray[np.int32]:
    """How much each edge counts: 1 at the worst score, `STEPS` at 0, and more than all others where it must hold."""
    scores = np.asarray(scores, np.float64)
    must = scores == MUST
    worst = max(float(scores.max(initial=0)), 1e-9)
    capacities = 1 + np.rint((STEPS - 1) * (1 - scores.clip(0) / worst) ** 3)
    capacities[must] = min(capacities[~must].sum() + 1, LARGEST)
    return capacities.astype(np.int32)


def edges_within(
    ids: Ids, edge_batches: Iterable[Edges], threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Edges up to a threshold between some fragments, as their numbers in `ids`, and their scores."""
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    for u, v, scores in edge_batches:
        first, second = np.searchsorted(ids, u), np.searchsorted(ids, v)
        there = (np.append(ids, 0)[first] == u) & (np.append(ids, 0)[second] == v) & (scores <= np.float32(threshold))
        found.append((first[there], second[there], scores[there]))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    first, second, kept = (np.concatenate(column) for column in zip(*found, strict=True))
    return first, second, kept


def _rows_of(ids: Ids, edits: Sequence[Edit]) -> NDArray[np.int64]:
    """Rows of the fragments that edits name.

    Raises:
        ValueError: there is no such fragment.
    """
    named = np.array([(edit.a, edit.b) for edit in edits], np.uint64)
    rows = np.searchsorted(ids, named)
    missing = np.append(ids, 0)[rows] != named
    if missing.any():
        edit, end = np.argwhere(missing)[0]
        raise ValueError(f"edit {edits[edit].number} names fragment {named[edit, end]}, which is no longer there")
    return rows


def _component_numbers(count: int, u: NDArray[np.int64], v: NDArray[np.int64]) -> NDArray[np.int32]:
    graph = csr_array((np.ones(len(u), bool), (u, v)), shape=(count, count))
    numbers: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return numbers


def _smallest(ids: Ids, numbers: NDArray[np.int32]) -> NDArray[np.uint64]:
    """The smallest id of the component of each node, given ascending ids and numbers of components."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return ids[first][inverse]
