"""How many edits turn a segmentation into the ground truth: splits by minimum cuts in its graph, then merges.

After the min-cut metric of Sheridan et al., Nature Methods 2023: while a segment holds fragments of two neurons, two of
them are chosen and cut apart as a proofreader's split would do it. A cut that runs elsewhere than between the neurons
needs further ones, and leaves pieces to merge.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lsdseg.engine.evaluate.metrics import SLIVER
from lsdseg.rag.proofread import components, edges_within, min_cut
from lsdseg.rag.store import Edges, Ids

# A segmentation that takes more is not worth counting: edges of a segment, times cuts, summed; about ten seconds.
MOST_WORK = 10**7


class EditsNeeded(NamedTuple):
    """Numbers of edits.

    Attributes:
        splits: how many cuts.
        merges: how many merges are needed then.
    """

    splits: int
    merges: int


class _Parts(NamedTuple):
    """The fragments that count: the largest part of each lies in a neuron, and is no sliver of it."""

    fragments: Ids  # ascending
    neurons: NDArray[np.uint64]
    voxels: NDArray[np.int64]


def edits_needed(
    lut: NDArray[np.uint64],
    edge_batches: Iterable[Edges],
    threshold: float,
    pairs: NDArray[np.uint64],
    counts: NDArray[np.int64],
) -> EditsNeeded | None:
    """Count the splits and merges that a segmentation needs; None if it takes more than MOST_WORK.

    Args:
        lut: uint64 (2, n), fragments, ascending, and their segments.
        edge_batches: (u, v, scores) of the graph, uint64, uint64 and float32 (m,). They are read once.
        threshold: scores up to which edges hold.
        pairs: uint64 (k, 2), fragments and neurons that overlap, see `count_overlaps`.
        counts: int64 (k,), the voxels that they share.
    """
    parts = _parts(pairs, counts)
    rows = np.searchsorted(lut[0], parts.fragments).clip(max=lut.shape[1] - 1)
    segments = np.where(lut[0][rows] == parts.fragments, lut[1][rows], 0)
    per_segment = np.unique(np.stack([segments, parts.neurons], axis=1), axis=0)
    ids, neurons = np.unique(per_segment[:, 0], return_counts=True)
    mixed = ids[(neurons > 1) & (ids > 0)]
    pure = per_segment[~np.isin(per_segment[:, 0], mixed)]
    pieces, splits, work = Counter(pure[:, 1].tolist()), 0, 0
    inside = np.isin(lut[1], mixed)
    fragments, owners = lut[0][inside], lut[1][inside]
    first, second, scores = edges_within(fragments, edge_batches, threshold)
    edges, owner = (fragments[first], fragments[second], scores), owners[first]
    for segment in mixed:
        own = owner == segment
        held = edges[0][own], edges[1][own], edges[2][own]
        for neuron in _cut_apart(fragments[owners == segment], held, parts):
            if neuron is not None:
                pieces[neuron] += 1
                continue
            splits, work = splits + 1, work + len(held[0])
            if work > MOST_WORK:
                return None
    return EditsNeeded(splits, sum(count - 1 for count in pieces.values()))


def _parts(pairs: NDArray[np.uint64], counts: NDArray[np.int64]) -> _Parts:
    neurons, inverse = np.unique(pairs[:, 1], return_inverse=True)
    sizes = np.bincount(inverse, counts, len(neurons))[inverse]
    order = np.lexsort((pairs[:, 1], counts, pairs[:, 0]))
    fragments = pairs[order, 0]
    largest = order[np.append(fragments[1:] != fragments[:-1], True)[: len(order)]]
    kept = largest[(counts[largest] >= SLIVER * sizes[largest]) & (pairs[largest, 0] > 0)]
    return _Parts(pairs[kept, 0], pairs[kept, 1], counts[kept])


def _cut_apart(fragments: Ids, edges: Edges, parts: _Parts) -> Iterator[int | None]:
    """Cut a segment until no piece has two neurons: yields None for each cut, and the neuron of each piece."""
    todo = [(fragments, edges)]
    while todo:
        fragments, edges = todo.pop()
        piece_of = components(fragments, edges[0], edges[1])
        for piece in np.unique(piece_of):
            own = fragments[piece_of == piece]
            at = np.flatnonzero(np.isin(parts.fragments, own))
            at = at[np.argsort(-parts.voxels[at], kind="stable")]  # the largest first
            others = at[parts.neurons[at] != parts.neurons[at[:1]]]
            if not len(others):
                yield from map(int, parts.neurons[at[:1]])
                continue
            held = np.isin(edges[0], own)
            u, v, scores = edges[0][held], edges[1][held], edges[2][held]
            cut = min_cut(u, v, scores, int(parts.fragments[at[0]]), int(parts.fragments[others[0]]))
            yield None
            todo.append((own, (u[~cut], v[~cut], scores[~cut])))
