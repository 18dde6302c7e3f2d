"""Agglomeration of a region adjacency graph as a whole, from what each block knows exactly.

A score that a block computes for itself sees only a part of the neurites: which regions have merged farther away, it
cannot know. So a block says only what its fragments touch, face by face (`find_contacts`). The graph of all blocks is
then agglomerated (`settle`), greedily and closest pair first, as waterz does with a volume in memory (Funke et
al., TPAMI 2019).

Mean and quantiles of affinities are reducible: merging two regions never brings a third one closer than it was to the
nearer of them. With ties broken in a way that is reducible, too, the result does not depend on the order in which the
contacts come, and so neither on blocks nor on workers. It also means that two regions that are each other's closest may
merge before anything else is known, if all contacts of both are (Lu, Zlateski and Seung, arXiv 2106.10795). `settle`
does that with a part of a graph and leaves the rest, which is smaller.

Mutex watershed is reducible in the same way. A pair has a weight that attracts or repels, the surer is heard first, and
of two that become one the surer stands for both. A pair that repels is heard, too, and then stays as it is: what would
attract it comes later (`signed`).

A limit keeps large regions apart unless they are surely one. Regions only grow, so merging two never lets one of them
merge with a third that it was kept from, and what is said above holds.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsdseg.engine.offsets import DIRECT_NEIGHBORS, Offset
from lsdseg.engine.post.affinities import float_affinities, voxel_pairs
from lsdseg.engine.post.graph import LARGEST_ID, number_fragments, threshold_of_merge

BINS = 256  # as in waterz' histograms
MEAN, MUTEX = -1, -2  # rules that are no quantile
UNIT = 2**24  # affinities are added up in whole units, which are exact in any order

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Contacts:
    """Pairs of fragments that share faces of voxels, and the affinities across these faces.

    Attributes:
        u: uint64 (n,), the smaller id of each pair; pairs are sorted by u, then v, and each occurs once.
        v: uint64 (n,), the larger id.
        sums: int64 (n,), the sum of the affinities, in 1 / UNIT; for mutex watershed the weight.
        starts: int64 (n + 1,), where the histogram of each pair begins in the next two, and where the last one ends.
        bins: uint8, the bins of each histogram that are not empty, ascending: affinities from bin / 256 on.
        counts: int64, the number of faces in each of these bins.
        tie_u, tie_v: uint64 (n,), the last pair of fragments that each stands for: of contacts that are equally close,
            the one whose last pair comes first in the order of ids is the first to merge.
        open_ids: uint64 (m,), the regions with contacts that may not be among these, because they touch what lies
            beyond the box that was looked at.
        open_sides: uint8 (m,), where it lies: bit 2 * axis is before the box, bit 2 * axis + 1 is after it.
        sized_ids: uint64 (k,), the regions whose sizes are known here, ascending.
        sizes: int64 (k,), in voxels.
    """

    u: NDArray[np.uint64]
    v: NDArray[np.uint64]
    sums: NDArray[np.int64]
    starts: NDArray[np.int64]
    bins: NDArray[np.uint8]
    counts: NDArray[np.int64]
    tie_u: NDArray[np.uint64]
    tie_v: NDArray[np.uint64]
    open_ids: NDArray[np.uint64]
    open_sides: NDArray[np.uint8]
    sized_ids: NDArray[np.uint64]
    sizes: Numbers

    @classmethod
    def of_all(cls, parts: Sequence[Contacts], inner_sides: Sequence[int] | None = None) -> tuple[Contacts, Numbers]:
        """Put parts together that have no pair in common.

        Args:
            parts: one or more.
            inner_sides: the sides of each, in bits as `open_sides`, behind which another part lies. None: nothing is
                open any more.

        Returns:
            All contacts, and for each its index in the concatenated parts.

        Raises:
            ValueError: two of them have the same pair.
        """
        together = {name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0].__dict__}
        lengths = np.concatenate([np.diff(part.starts) for part in parts])
        order = np.lexsort((together["v"], together["u"]))
        begins = np.cumsum(lengths) - lengths
        starts, gather = _gather(begins[order], lengths[order])
        for name in ("u", "v", "sums", "tie_u", "tie_v"):
            together[name] = together[name][order]
        u, v = together["u"], together["v"]
        if ((u[1:] == u[:-1]) & (v[1:] == v[:-1])).any():
            raise ValueError("two parts have the same pair of fragments")
        inner = [255] * len(parts) if inner_sides is None else list(inner_sides)
        outer = ~np.repeat(np.array(inner, np.uint8), [len(part.open_ids) for part in parts])
        still = together["open_sides"] & outer
        together |= {"open_ids": together["open_ids"][still > 0], "open_sides": still[still > 0]}
        by_id = np.argsort(together["sized_ids"])
        together |= {"sized_ids": together["sized_ids"][by_id], "sizes": together["sizes"][by_id]}
        together |= {"starts": starts, "bins": together["bins"][gather], "counts": together["counts"][gather]}
        return cls(**together), order


def _gather(begins: Numbers, lengths: Numbers) -> tuple[Numbers, Numbers]:
    """For ranges that are to lie one after the other: where each starts then, and the indices to take."""
    starts = np.append(0, np.cumsum(lengths))
    return starts, np.arange(starts[-1]) + np.repeat(begins - starts[:-1], lengths)


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
    keys, values, sides = [], [], np.zeros(count, np.uint8)
    for channel, offset in zip(floats, DIRECT_NEIGHBORS, strict=True):
        here, there = voxel_pairs(numbers.shape, offset)
        first, second = numbers[here], numbers[there]
        mark_sides(sides, own, first, second, offset)
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
    return Contacts(
        ids[u],
        ids[v],
        sums,
        starts,
        (binned % BINS).astype(np.uint8),
        counts.astype(np.int64),
        ids[u],
        ids[v],
        *open_and_sized(ids, sides, own, numbers),
    )


def mark_sides(
    sides: NDArray[np.uint8],
    own: NDArray[np.bool_],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    offset: Offset,
) -> None:
    """Note in `sides`, in bits as `Contacts.open_sides`, where the partners lie of own fragments that others have.

    Args:
        sides: of each fragment.
        own: of each fragment whether it is an own one.
        first, second: numbers of the fragments of voxels, and of their partners at the offset.
        offset: z, y, x. A partner across an edge may lie on any of its sides, so all of them count.
    """
    ahead = sum((1 if step < 0 else 2) << 2 * axis for axis, step in enumerate(offset) if step)
    behind = sum((2 if step < 0 else 1) << 2 * axis for axis, step in enumerate(offset) if step)
    sides[first[own[first] & ~own[second] & (second > 0)]] |= np.uint8(ahead)
    sides[second[own[second] & ~own[first] & (first > 0)]] |= np.uint8(behind)


def open_and_sized(
    ids: NDArray[np.uint64], sides: NDArray[np.uint8], own: NDArray[np.bool_], numbers: Numbers
) -> tuple[NDArray[np.uint64], NDArray[np.uint8], NDArray[np.uint64], Numbers]:
    """The last four columns of `Contacts`, of fragments with these ids that lie in `numbers`, see `mark_sides`."""
    sizes = np.bincount(numbers.ravel(), minlength=len(ids))
    return ids[sides > 0], sides[sides > 0], ids[own], sizes[own]


def simplified(contacts: Contacts, merge_function: str) -> Contacts:
    """Drop from the histograms of contacts that have not merged yet what a merge function does not need."""
    starts, bins, counts = contacts.starts, contacts.bins, contacts.counts
    one_each = np.arange(len(contacts.u) + 1)
    if merge_function.endswith("initmax"):  # only the largest affinity of each counts, at first
        return replace(contacts, starts=one_each, bins=bins[starts[1:] - 1], counts=counts[starts[1:] - 1])
    if merge_function == "mean":
        faces = np.add.reduceat(counts, starts[:-1]) if len(contacts.u) else counts[:0]
        return replace(contacts, starts=one_each, bins=np.zeros(len(faces), np.uint8), counts=faces)
    return contacts


class Limit(NamedTuple):
    """What keeps large regions apart that touch at a weak spot, where one wrong merge costs most.

    Attributes:
        voxels: regions of so many voxels or more are large.
        score: two large regions do not merge at a higher score.
    """

    voxels: int
    score: float


NO_LIMIT = Limit(LARGEST_ID, 1.0)


class Settled(NamedTuple):
    """What became of the contacts of a part.

    Attributes:
        rest: the contacts of the regions that are left.
        place: int64 (n,), for each contact the one of `rest` that it is part of; -1 if its two regions are one now.
        scores: float32 (n,), the threshold at which they became one; NaN if they did not.
    """

    rest: Contacts
    place: Numbers
    scores: NDArray[np.float32]


def settle(contacts: Contacts, merge_function: str, limit: Limit = NO_LIMIT) -> Settled:
    """Merge the regions of a part of a graph that merge whatever lies beyond it, closest pair first.

    These are pairs that are each other's closest, neither of them open. Where nothing is open, it is all pairs with a
    score below 1: the greedy agglomeration of a graph. So the components of the contacts up to a threshold are the
    regions at that threshold. Of pairs that are equally close, see `tie_u`; a merged contact cannot come earlier than
    the first of its parts, so ties are reducible as scores are.

    Args:
        contacts: those of a part, as `simplified` leaves them.
        merge_function: "mean", "hist_quant_N", or "hist_quant_N_initmax", see `scoring_function`; or "mutex".
        limit: keeps large regions apart.
    """
    rules = {"mean": MEAN, "mutex": MUTEX}
    rule = rules[merge_function] if merge_function in rules else int(merge_function.split("_")[2])
    count = len(contacts.u)
    ids, ends = np.unique(np.concatenate([contacts.u, contacts.v]), return_inverse=True)
    u, v = ends[:count].astype(np.int64), ends[count:].astype(np.int64)
    by_tie = np.lexsort((contacts.tie_v, contacts.tie_u))
    order = np.empty(count, np.int64)
    order[by_tie] = np.arange(count)
    borders, now_u, now_v = _borders(contacts), u.copy(), v.copy()
    nodes = _Nodes(np.isin(ids, contacts.open_ids), _sizes_of(ids, contacts))
    kept, gone, scores, alive = _merge(now_u, now_v, borders, rule, order, nodes, limit)

    region = np.arange(len(ids))
    for a, b in zip(kept[::-1], gone[::-1], strict=True):
        region[b] = region[a]
    low, high = np.minimum(now_u, now_v)[alive], np.maximum(now_u, now_v)[alive]
    keys, by_pair = np.unique(low * len(ids) + high, return_index=True)
    left = np.flatnonzero(alive)[by_pair]
    starts, gather = _gather(borders.begin[left], borders.length[left])
    last = by_tie[order[left]]
    rest_u, rest_v = ids[low[by_pair]], ids[high[by_pair]]
    rest = Contacts(
        rest_u,
        rest_v,
        borders.sums[left],
        starts,
        borders.bins[gather].astype(np.uint8),
        borders.counts[gather],
        contacts.tie_u[last],
        contacts.tie_v[last],
        contacts.open_ids,
        contacts.open_sides,
        *_sizes_left(contacts, ids, nodes.sizes, np.concatenate([rest_u, rest_v, contacts.open_ids])),
    )
    pairs = np.minimum(region[u], region[v]) * len(ids) + np.maximum(region[u], region[v])
    place = np.where(region[u] == region[v], -1, np.searchsorted(keys, pairs))
    return Settled(rest, place, threshold_of_merge(u, v, kept, gone, scores, len(ids)))


def _sizes_of(ids: NDArray[np.uint64], contacts: Contacts) -> Numbers:
    """The sizes of regions, ids ascending; 0 where they are not known. Such a region is open: it does not merge."""
    sizes = np.zeros(len(ids), np.int64)
    known = np.isin(contacts.sized_ids, ids)
    sizes[np.searchsorted(ids, contacts.sized_ids[known])] = contacts.sizes[known]
    return sizes


def _sizes_left(
    contacts: Contacts, ids: NDArray[np.uint64], sizes: Numbers, left: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], Numbers]:
    """Of regions that are left, those with a known size, and that size: what `_sizes_of` and `_merge` made of it."""
    sized = contacts.sized_ids[np.isin(contacts.sized_ids, left)]
    before = contacts.sizes[np.searchsorted(contacts.sized_ids, sized)]
    at = np.searchsorted(ids, sized).clip(max=max(len(ids) - 1, 0))
    return sized, np.where(ids[at] == sized, sizes[at], before) if len(ids) else before


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


class _Nodes(NamedTuple):
    """Of each node whether it is stuck, and its size in voxels."""

    stuck: NDArray[np.bool_]
    sizes: Numbers


class _Lists(NamedTuple):
    """A linked list of half-edges for each node: 2 * e is edge e at its first node, 2 * e + 1 at its other; -1 none."""

    following: Numbers
    head: Numbers
    tail: Numbers
    degree: Numbers


def _borders(contacts: Contacts) -> _Borders:
    """Return what is known of each contact in arrays that may be changed."""
    starts, bins, counts = contacts.starts, contacts.bins, contacts.counts
    faces = np.add.reduceat(counts, starts[:-1]) if len(contacts.u) else counts[:0]
    # Merged histograms are appended. When the end is reached, those that are left are moved to the front.
    pool = np.zeros((2, 2 * len(bins) + 2 * BINS + 1), np.int64)
    pool[:, : len(bins)] = bins, counts
    return _Borders(
        contacts.sums.copy(), faces, starts[:-1].copy(), np.diff(starts), pool[0], pool[1], np.array([len(bins)])
    )


@numba.njit(cache=True)
def _merge(
    u: Numbers, v: Numbers, borders: _Borders, rule: int, order: Numbers, nodes: _Nodes, limit: Limit
) -> tuple[Numbers, Numbers, NDArray[np.float32], NDArray[np.bool_]]:
    """Merge nodes, closest pair first, unless one of them is stuck: its closest may be another one.

    Of two nodes that merge, the one with fewer edges gives its own to the other: edges to nodes that both touch become
    one. All arguments are changed: what they say of the edges that are left is what became of them.

    Args:
        u, v, borders, order: of each edge its nodes, what is known of it, and which of equally close ones comes first.
        rule, nodes: see `_score` and `_Nodes`.
        limit: keeps large nodes apart.

    Returns: of each merge the node that stays, the one that goes, and the score; which edges are left.
    """
    stuck, sizes, node_count = nodes.stuck, nodes.sizes, len(nodes.stuck)
    lists, edges = _make_lists(u, v, node_count), _by_nodes(u, v, node_count)
    alive, score = np.ones(len(u), np.bool_), np.array([_score(borders, e, rule) for e in range(len(u))])
    queue = [(score[e], order[e], e) for e in range(len(u))]
    heapq.heapify(queue)
    first, second = np.empty(node_count, np.int64), np.empty(node_count, np.int64)
    merge_score, merges = np.empty(node_count, np.float32), 0
    while len(queue) > 0 and queue[0][0] < 1:
        value, place, e = heapq.heappop(queue)
        if not alive[e] or value != score[e] or place != order[e]:
            continue
        if rule == MUTEX and borders.sums[e] <= 0:  # keeps its nodes apart: what they learn later is less sure
            continue
        if stuck[u[e]] or stuck[v[e]]:  # and so is the other: this was its closest
            stuck[u[e]] = stuck[v[e]] = True
            continue
        if value > limit.score and min(sizes[u[e]], sizes[v[e]]) >= limit.voxels:
            continue
        a, b = (u[e], v[e]) if lists.degree[u[e]] >= lists.degree[v[e]] else (v[e], u[e])
        first[merges], second[merges], merge_score[merges] = a, b, value
        merges += 1
        sizes[a] += sizes[b]
        alive[e] = False
        del edges[min(a, b) * node_count + max(a, b)]
        half = lists.head[b]
        while half >= 0:
            after, f = lists.following[half], half // 2
            if alive[f]:
                c = u[f] if half % 2 else v[f]
                del edges[min(b, c) * node_count + max(b, c)]
                key = min(a, c) * node_count + max(a, c)
                if key in edges:
                    g = edges[key]
                    alive[f] = False
                    _absorb(borders, f, g, rule, order, score, alive)
                    heapq.heappush(queue, (score[g], order[g], g))
                    lists.degree[c] -= 1
                else:
                    edges[key] = f
                    (v if half % 2 else u)[f] = a
                    _append(lists, half, a)
            half = after
        lists.degree[a] -= 1  # the edge that has merged
    return first[:merges], second[:merges], merge_score[:merges], alive


@numba.njit(cache=True)
def _by_nodes(u: Numbers, v: Numbers, node_count: int) -> dict[int, int]:
    """Return key of a pair of nodes, smaller * node_count + larger -> its edge."""
    edges = {}
    for e in range(len(u)):
        edges[u[e] * node_count + v[e]] = e
    return edges


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
def _score(borders: _Borders, e: int, rule: int) -> float:
    """One minus the mean, or minus a quantile from a histogram, as waterz takes it.

    For mutex watershed it is how unsure the weight is, 0..0.5, so that all that merge do so below 0.5.
    """
    if rule == MUTEX:
        return float(0.5 - abs(borders.sums[e]) / (2 * UNIT))
    if rule == MEAN:
        return float(1 - borders.sums[e] / (borders.faces[e] * UNIT))
    histogram = slice(borders.begin[e], borders.begin[e] + borders.length[e])
    counts, passed = borders.counts[histogram], 0
    pivot = rule * counts.sum() // 100 + 1
    for i in range(len(counts)):
        passed += counts[i]
        if passed >= pivot:
            return float(1 - (borders.bins[histogram][i] + 0.5) / BINS)
    return 0.0  # the 100th percentile


@numba.njit(cache=True)
def _absorb(
    borders: _Borders,
    f: int,
    g: int,
    rule: int,
    order: Numbers,
    score: NDArray[np.float64],
    alive: NDArray[np.bool_],
) -> None:
    """Let edge g stand for edge f, too."""
    if rule != MUTEX:
        _combine(borders, f, g, alive)
        order[g], score[g] = max(order[g], order[f]), _score(borders, g, rule)
    elif (score[f], order[f]) < (score[g], order[g]):  # only the surer one is heard
        borders.sums[g], order[g], score[g] = borders.sums[f], order[f], score[f]


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
