"""Agglomeration of a region adjacency graph as a whole, from what each block knows exactly.

A score that a block computes for itself sees only a part of the neurites: which regions have merged farther away, it
cannot know. So a block says only what its fragments touch, face by face (`find_contacts`). The graph of all blocks is
then agglomerated (`merge_contacts`), greedily and closest pair first, as waterz does with a volume in memory (Funke et
al., TPAMI 2019).

Mean and quantiles of affinities are reducible: merging two regions never brings a third one closer than it was to the
nearer of them. With ties broken in a way that is reducible, too, the result does not depend on the order in which the
contacts come, and so neither on blocks nor on workers (compare Lu, Zlateski and Seung, arXiv 2106.10795).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsdseg.engine.post.affinities import float_affinities, voxel_pairs
from lsdseg.engine.post.graph import Edges, number_fragments, threshold_of_merge
from lsdseg.errors import UserError
from lsdseg.files import write_whole

BINS = 256  # as in waterz' histograms
UNIT = 2**24  # affinities are added up in whole units, which are exact in any order

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Contacts:
    """Pairs of fragments that share faces of voxels, and the affinities across these faces.

    Attributes:
        u: uint64 (n,), the smaller id of each pair; pairs are sorted by u, then v, and each occurs once.
        v: uint64 (n,), the larger id.
        sums: int64 (n,), the sum of the affinities, in 1 / UNIT.
        starts: int64 (n + 1,), where the histogram of each pair begins in the next two, and where the last one ends.
        bins: uint8, the bins of each histogram that are not empty, ascending: affinities from bin / 256 on.
        counts: int64, the number of faces in each of these bins.
    """

    u: NDArray[np.uint64]
    v: NDArray[np.uint64]
    sums: NDArray[np.int64]
    starts: NDArray[np.int64]
    bins: NDArray[np.uint8]
    counts: NDArray[np.int64]

    TYPES: ClassVar[tuple[Any, ...]] = (np.uint64, np.uint64, np.int64, np.int64, np.uint8, np.int64)

    def save(self, path: Path) -> None:
        """Write them to a file, which appears whole or not at all."""
        with write_whole(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Contacts:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            with np.load(path) as arrays:
                return cls(**{column.name: arrays[column.name] for column in fields(cls)})
        except Exception as error:  # zipfile and numpy raise what they like at a damaged file
            raise UserError(
                f"{path} is missing or damaged: run 03_agglomerate_blockwise.py with DATA.DROP_DS_MONGOTABLE True"
            ) from error

    @classmethod
    def of_all(cls, parts: Iterable[Contacts]) -> Contacts:
        """Put parts together that have no pair in common.

        Raises:
            ValueError: two of them have one.
        """
        given = [part for part in parts if len(part.u)] or [cls(*(np.empty(0, dtype) for dtype in cls.TYPES))]
        together = [np.concatenate(columns) for columns in zip(*(vars(part).values() for part in given), strict=True)]
        u, v, sums, _, bins, counts = together
        lengths = np.concatenate([np.diff(part.starts) for part in given])
        begins = np.cumsum(lengths) - lengths
        order = np.lexsort((v, u))
        u, v, lengths = u[order], v[order], lengths[order]
        if ((u[1:] == u[:-1]) & (v[1:] == v[:-1])).any():
            raise ValueError("two parts have the same pair of fragments")
        starts = np.append(0, np.cumsum(lengths))
        gather = np.arange(starts[-1]) + np.repeat(begins[order] - starts[:-1], lengths)
        return cls(u, v, sums[order], starts, bins[gather], counts[gather])


def find_contacts(affinities: ArrayLike, fragments: ArrayLike, first_id: int, last_id: int) -> Contacts:
    """Find the contacts of fragments, those whose smaller id lies in first_id..last_id.

    Args:
        affinities: (3, z, y, x), channels z, y, x; uint8 in 0..255 or floating point in 0..1.
        fragments: (z, y, x), any unsigned ids, 0 is background. One voxel around those with these ids is enough.
        first_id: the first id.
        last_id: the last one.

    Raises:
        ValueError: affinities of another type or range, or of another shape than the fragments.
    """
    floats = float_affinities(affinities)
    unsigned, ids = number_fragments(fragments)
    if floats.shape[1:] != unsigned.shape:
        raise ValueError(f"affinities of shape {floats.shape} and fragments of shape {unsigned.shape} do not fit")
    numbers, count = unsigned.astype(np.int64), len(ids)
    own = (ids >= first_id) & (ids <= last_id)
    keys, values = [], []
    for channel, offset in zip(floats, ((-1, 0, 0), (0, -1, 0), (0, 0, -1)), strict=True):
        here, there = voxel_pairs(numbers.shape, offset)
        first, second = numbers[here], numbers[there]
        smaller, larger = np.minimum(first, second), np.maximum(first, second)
        touching = (smaller != larger) & (smaller > 0) & own[smaller]
        keys.append(smaller[touching] * count + larger[touching])
        values.append(channel[here][touching])
    pairs, affinity = np.concatenate(keys), np.concatenate(values)
    bins = np.minimum((affinity * np.float32(BINS)).astype(np.int64), BINS - 1)
    binned, counts = np.unique(pairs * BINS + bins, return_counts=True)
    contacts, starts = np.unique(binned // BINS, return_index=True)
    units = np.rint(affinity.astype(np.float64) * UNIT)
    sums = np.bincount(np.searchsorted(contacts, pairs), units, len(contacts)).astype(np.int64)
    u, v = np.divmod(contacts, max(count, 1))
    starts = np.append(starts, len(binned)).astype(np.int64)
    return Contacts(ids[u], ids[v], sums, starts, (binned % BINS).astype(np.uint8), counts.astype(np.int64))


def merge_contacts(contacts: Contacts, merge_function: str) -> Edges:
    """Agglomerate the fragments of a whole graph, and score each contact by the threshold at which its two become one.

    The pair with the lowest score merges first. Of several, it is the one whose last pair of fragments comes first in
    the order of ids: a merged contact cannot come earlier than the first of its parts, so ties are reducible as scores
    are. So the components of the edges up to a threshold are the regions at that threshold.

    Args:
        contacts: of the whole graph.
        merge_function: "mean", "hist_quant_N", or "hist_quant_N_initmax", see `scoring_function`.

    Returns:
        The columns u, v and scores, as `score_edges`: one row for each contact.
    """
    quantile = -1 if merge_function == "mean" else int(merge_function.split("_")[2])
    ids, ends = np.unique(np.concatenate([contacts.u, contacts.v]), return_inverse=True)
    u, v = ends[: len(contacts.u)].astype(np.int64), ends[len(contacts.u) :].astype(np.int64)
    merged = _merge(len(ids), u.copy(), v.copy(), _borders(contacts, merge_function), quantile)
    scores = threshold_of_merge(u, v, *merged, len(ids))
    return contacts.u, contacts.v, scores


class _Borders(NamedTuple):
    """What is known of each edge: sum of its affinities, number of its faces, and a histogram in a common pool.

    A histogram has `length` bins from `begin` on in `bins` and `counts`, of which `end[0]` are in use.
    """

    sums: Numbers
    faces: Numbers
    begin: Numbers
    length: Numbers
    bins: Numbers
    counts: Numbers
    end: Numbers


class _Lists(NamedTuple):
    """A linked list of half-edges for each node: 2 * e is edge e at its first node, 2 * e + 1 at its other; -1 none."""

    following: Numbers
    head: Numbers
    tail: Numbers
    degree: Numbers


def _borders(contacts: Contacts, merge_function: str) -> _Borders:
    """Return what a merge function needs of each contact, in arrays that may be changed."""
    starts, bins, counts = contacts.starts, contacts.bins, contacts.counts
    faces = np.add.reduceat(counts, starts[:-1]) if len(contacts.u) else np.empty(0, np.int64)
    if merge_function.endswith("initmax"):  # only the largest affinity of each counts, at first
        last = starts[1:] - 1
        starts, bins, counts = np.arange(len(faces) + 1), bins[last], counts[last]
    elif merge_function == "mean":  # no histograms are needed
        starts, bins, counts = np.zeros(len(faces) + 1, np.int64), bins[:0], counts[:0]
    # Merged histograms are appended. When the end is reached, those that are left are moved to the front.
    pool = np.zeros((2, 2 * len(bins) + 2 * BINS + 1), np.int64)
    pool[:, : len(bins)] = bins, counts
    return _Borders(
        contacts.sums.copy(), faces, starts[:-1].copy(), np.diff(starts), pool[0], pool[1], np.array([len(bins)])
    )


@numba.njit(cache=True)
def _merge(
    node_count: int, u: Numbers, v: Numbers, borders: _Borders, quantile: int
) -> tuple[Numbers, Numbers, NDArray[np.float32]]:
    """Merge nodes, closest pair first: the two nodes and the score of each merge with a score below 1.

    Of two nodes that merge, the one with fewer edges gives its own to the other: edges to nodes that both touch become
    one. The arguments are changed.
    """
    lists = _make_lists(u, v, node_count)
    edges = {}
    for e in range(len(u)):
        edges[u[e] * node_count + v[e]] = e
    alive, order = np.ones(len(u), np.bool_), np.arange(len(u))
    score = np.array([_score(borders, e, quantile) for e in range(len(u))])
    queue = [(score[e], order[e], e) for e in range(len(u))]
    heapq.heapify(queue)
    first, second = np.empty(node_count, np.int64), np.empty(node_count, np.int64)
    merge_score, merges = np.empty(node_count, np.float32), 0
    while len(queue) > 0 and queue[0][0] < 1:
        value, place, e = heapq.heappop(queue)
        if not alive[e] or value != score[e] or place != order[e]:
            continue
        a, b = (u[e], v[e]) if lists.degree[u[e]] >= lists.degree[v[e]] else (v[e], u[e])
        first[merges], second[merges], merge_score[merges] = a, b, value
        merges += 1
        alive[e] = False
        del edges[min(a, b) * node_count + max(a, b)]
        half = lists.head[b]
        while half >= 0:
            after, f = lists.following[half], half // 2
            if alive[f]:
                c = v[f] if half % 2 == 0 else u[f]
                del edges[min(b, c) * node_count + max(b, c)]
                key = min(a, c) * node_count + max(a, c)
                if key in edges:
                    g = edges[key]
                    alive[f] = False
                    _combine(borders, f, g, alive)
                    order[g], score[g] = max(order[g], order[f]), _score(borders, g, quantile)
                    heapq.heappush(queue, (score[g], order[g], g))
                    lists.degree[c] -= 1
                else:
                    edges[key] = f
                    if half % 2 == 0:
                        u[f] = a
                    else:
                        v[f] = a
                    _append(lists, half, a)
            half = after
        lists.degree[a] -= 1  # the edge that has merged
    return first[:merges], second[:merges], merge_score[:merges]


@numba.njit(cache=True)
def _make_lists(u: Numbers, v: Numbers, node_count: int) -> _Lists:
    none = np.full(node_count, -1)
    lists = _Lists(np.full(2 * len(u), -1), none, none.copy(), np.zeros(node_count, np.int64))
    for e in range(len(u)):
        _append(lists, 2 * e, u[e])
        _append(lists, 2 * e + 1, v[e])
    return lists


@numba.njit(cache=True)
def _append(lists: _Lists, half: int, node: int) -> None:
    lists.following[half] = -1
    if lists.head[node] < 0:
        lists.head[node] = half
    else:
        lists.following[lists.tail[node]] = half
    lists.tail[node] = half
    lists.degree[node] += 1


@numba.njit(cache=True)
def _score(borders: _Borders, e: int, quantile: int) -> float:
    """One minus the mean, or minus a quantile from a histogram, as waterz takes it."""
    if quantile < 0:
        return float(1 - borders.sums[e] / (borders.faces[e] * UNIT))
    histogram = slice(borders.begin[e], borders.begin[e] + borders.length[e])
    counts, passed = borders.counts[histogram], 0
    pivot = quantile * counts.sum() // 100 + 1
    for i in range(len(counts)):
        passed += counts[i]
        if passed >= pivot:
            return float(1 - (borders.bins[histogram][i] + 0.5) / BINS)
    return 0.0  # the 100th percentile


@numba.njit(cache=True)
def _combine(borders: _Borders, f: int, g: int, alive: NDArray[np.bool_]) -> None:
    """Add edge f to edge g."""
    borders.sums[g] += borders.sums[f]
    borders.faces[g] += borders.faces[f]
    begin, length, bins, counts, end = borders.begin, borders.length, borders.bins, borders.counts, borders.end
    if end[0] + length[f] + length[g] >= len(bins):
        _compact(borders, f, alive)
    i, j, to = begin[f], begin[g], end[0]
    last_i, last_j = i + length[f], j + length[g]
    while i < last_i or j < last_j:
        take_i = j == last_j or (i < last_i and bins[i] <= bins[j])
        take_j = i == last_i or (j < last_j and bins[j] <= bins[i])
        bins[to], counts[to] = bins[i] if take_i else bins[j], take_i * counts[i] + take_j * counts[j]
        i, j, to = i + take_i, j + take_j, to + 1
    begin[g], length[g], end[0] = end[0], to - end[0], to


@numba.njit(cache=True)
def _compact(borders: _Borders, also: int, alive: NDArray[np.bool_]) -> None:
    """Move the histograms of edges that are alive, and of one more, to the front of the pool."""
    kept = alive.copy()
    kept[also] = True
    used = np.flatnonzero(kept)
    end = 0
    for e in used[np.argsort(borders.begin[used])]:
        begin = borders.begin[e]
        for i in range(borders.length[e]):
            borders.bins[end + i], borders.counts[end + i] = borders.bins[begin + i], borders.counts[begin + i]
        borders.begin[e] = end
        end += borders.length[e]
    borders.end[0] = end
