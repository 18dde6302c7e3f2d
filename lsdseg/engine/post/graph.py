"""Fragments and scored edges of one block: arrays in, arrays out.

A fragment is one 6-connected body within one block, each block has its own range of ids, and an edge belongs to the
block of its smaller id. So the edges of a volume are complete, and none is written twice: where two fragments touch,
two voxels share a face, and both lie in the block of the smaller id or in the layer of voxels around it. With a context
of one voxel, that block sees the whole border of the two.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import cc3d
import fastremap
import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsdseg.engine.post.agglomerate import merge_stages
from lsdseg.engine.post.fragments import extract_fragments

LARGEST_ID = 2**63 - 1  # databases know no unsigned integers

# The columns u, v and score, as `score_edges` returns them.
Edges = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float32]]


def fragments_of_block(
    affinities: ArrayLike,
    *,
    context: Sequence[Any],
    block: int,
    voxels_in_block: int,
    mask: ArrayLike | None = None,
    extract: Callable[..., NDArray[np.uint64]] = extract_fragments,
    **settings: Any,
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float64]]:
    """Extract the fragments of one block, and give them ids that no other block uses.

    They are extracted with context and cropped to the block. Where the pieces of a fragment are connected only through
    the context, each becomes a fragment of its own, since one id must not stand for two bodies.

    Args:
        affinities: (c, z, y, x), the block and its context, channels as ``extract`` takes them.
        context: voxels around the block along z, y, x; a pair (before, after) for an axis along which they differ,
            as they do where the volume ends.
        block: the block's number, from 0.
        voxels_in_block: the same for every block: this one has ids block * voxels_in_block + 1..n.
        mask: (z, y, x) like the affinities; fragments are made where it is not 0.
        extract: what makes the fragments, `extract_fragments` or `mutex_watershed`.
        settings: further arguments of ``extract``.

    Returns:
        fragments: uint64 (z, y, x) without context, 0 is background.
        ids: uint64 (n,), those in ``fragments``, ascending.
        centers: float64 (n, 3), the fragments' centers of mass in voxels: 0 is the middle of the block's first voxel.

    Raises:
        ValueError: affinities of another type or range, no room for the block inside the context, more voxels than
            ``voxels_in_block``, or ids above 2**63 - 1.
    """
    first_id = block * voxels_in_block + 1
    if first_id + voxels_in_block - 1 > LARGEST_ID:
        raise ValueError(f"block {block} of {voxels_in_block} voxels: its fragment ids would not fit into 63 bits")
    grown = extract(affinities, mask=mask, **settings)
    widths = [np.broadcast_to(width, 2) for width in context]
    inner = grown[tuple(slice(w[0], size - w[1]) for w, size in zip(widths, grown.shape, strict=True))]
    if not 0 < inner.size <= voxels_in_block:
        raise ValueError(
            f"a context of {context} leaves {inner.size} of {grown.shape} voxels; it must be 1..{voxels_in_block}"
        )
    pieces, count = cc3d.connected_components(np.ascontiguousarray(inner), connectivity=6, return_N=True)
    ids = np.arange(first_id, first_id + count, dtype=np.uint64)
    centers = cc3d.statistics(pieces)["centroids"][1:]
    return np.append(np.uint64(0), ids)[pieces], ids, centers


def score_edges(affinities: ArrayLike, fragments: ArrayLike, merge_function: str) -> Edges:
    """Score every pair of fragments that share a face of a voxel by the threshold at which their regions merge.

    Regions merge in the order in which `agglomerate` merges them. An edge's score is that of the merge that brings its
    two fragments into one region, or of an earlier merge if that scored higher. So the components of the edges up to a
    threshold are the regions at that threshold. With the histogram merge functions they equal those of `agglomerate`.
    ``mean`` is finer than the 256 bins by which waterz orders merges: it is exact at multiples of 1/256.

    Args:
        affinities: (3, z, y, x), channels z, y, x; uint8 in 0..255 or floating point in 0..1.
        fragments: (z, y, x), any unsigned ids, 0 is background.
        merge_function: a name that `scoring_function` knows.

    Returns:
        u: uint64 (m,), the smaller id of each pair; pairs are sorted by u, then v, and each occurs once.
        v: uint64 (m,), the larger id.
        scores: float32 (m,) in 0..1; NaN where the two are still apart after every merge with a score below 1.

    Raises:
        UserError: unknown merge function.
        ValueError: affinities of another type or range, or of another shape than the fragments.
    """
    numbers, ids = number_fragments(fragments)
    # Scores are 0 or more: the first stage merges nothing, and its region graph lists all neighbors.
    stages = merge_stages(
        affinities, numbers, [-1, 1], merge_function, return_merge_history=True, return_region_graph=True
    )
    (_, _, region_graph), (_, history, _) = stages
    u, v, _ = _columns(region_graph, "u", "v", "score")
    a, b, merge_scores = _columns(history, "a", "b", "score")
    scores = threshold_of_merge(u, v, a, b, np.maximum.accumulate(merge_scores), len(ids))
    return ids[u], ids[v], scores


def number_fragments(fragments: ArrayLike) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Fragments numbered 1..n in the order of their ids (uint64, C order), and the id of every number; 0 stays 0.

    An order that depends on the ids only, because waterz breaks ties by it.
    """
    numbers, mapping = fastremap.renumber(np.asarray(fragments, np.uint64, order="C"), preserve_zero=True)
    mapping = mapping | {0: 0}
    ids = np.fromiter(mapping.keys(), np.uint64, len(mapping))
    sorted_ids, ranks = np.unique(ids, return_inverse=True)
    table = np.empty(len(ids), np.uint64)
    table[np.fromiter(mapping.values(), np.int64, len(mapping))] = ranks
    return table[numbers], sorted_ids


def _columns(
    rows: list[dict[str, Any]], first: str, second: str, score: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Two int64 columns and a float32 one of waterz' list of dicts, without a Python loop."""
    table = np.fromiter(map(itemgetter(first, second, score), rows), "i8, i8, f4", len(rows))
    return table["f0"].copy(), table["f1"].copy(), table["f2"].copy()


@numba.njit(cache=True)
def threshold_of_merge(
    u: NDArray[np.int64],
    v: NDArray[np.int64],
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    scores: NDArray[np.float32],
    node_count: int,
) -> NDArray[np.float32]:
    """Return the score of the merge (a, b) that connects each pair (u, v), NaN if none does.

    The merge forest is a union-find by size without path compression, each node marked with the merge that gave it a
    parent. Marks rise towards the root, so the way up from u and v, always from the lower mark, ends where they meet at
    the mark of their lowest common ancestor; the forest is at most log2(n) deep.
    """
    never = len(scores)
    parent, size, merge = np.arange(node_count), np.ones(node_count, np.int64), np.full(node_count, never)
    for i in range(len(scores)):
        x, y = a[i], b[i]
        while parent[x] != x:
            x = parent[x]
        while parent[y] != y:
            y = parent[y]
        if size[x] < size[y]:
            x, y = y, x
        parent[y], merge[y] = x, i
        size[x] += size[y]

    result = np.empty(len(u), np.float32)
    for i in range(len(u)):
        x, y, last = u[i], v[i], never
        while x != y:
            if merge[x] > merge[y]:
                x, y = y, x
            last = merge[x]
            if last == never:
                break
            x = parent[x]
        result[i] = np.nan if last == never else scores[last]
    return result
