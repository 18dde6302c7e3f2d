"""Skeletons of neurons: points in nm and the lines between them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, dijkstra, minimum_spanning_tree
from scipy.spatial import cKDTree

TWIG = 1.5  # radii at a fork: what is not longer lies in the neurite itself, at a bump of its surface
PASSES = 32  # of smoothing


@dataclass(frozen=True)
class Skeleton:
    """A neuron as points and the lines between them.

    Attributes:
        points: float64 (n, 3), z, y, x in nm.
        edges: int64 (m, 2), indices of the two points of each line.
        radii: float64 (n,), in nm. None if they are not known.
    """

    points: NDArray[np.float64]
    edges: NDArray[np.int64]
    radii: NDArray[np.float64] | None = None

    @property
    def lengths(self) -> NDArray[np.float64]:
        """Length of each edge in nm, float64 (m,)."""
        lengths: NDArray[np.float64] = np.linalg.norm(np.diff(self.points[self.edges], axis=1)[:, 0], axis=1)
        return lengths

    def graph(self) -> csr_array:
        """Return the edges as a matrix (n, n) that holds the length of each once."""
        return coo_array((self.lengths, self.edges.T), shape=(len(self.points),) * 2).tocsr()

    def parents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the points (n,) such that parents come first, and the parent (n,) of each point, -1 for none.

        The edges must be trees.
        """
        count, part = connected_components(self.graph(), directed=False)
        roots = np.unique(part, return_index=True)[1]
        above = len(self.points)  # a point that holds the roots together
        ends = np.concatenate([self.edges, np.stack([np.full(count, above), roots], axis=1)]).T
        graph = coo_array((np.ones(ends.shape[1]), ends), shape=(above + 1,) * 2)
        order, parents = breadth_first_order(graph.tocsr(), above, directed=False)
        return order[1:].astype(np.int64), np.where(parents == above, -1, parents)[:-1].astype(np.int64)


def groups(ids: NDArray[np.uint64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each id and its indices, both in ascending order."""
    order = np.argsort(ids, kind="stable")
    names, starts = np.unique(ids[order], return_index=True)
    yield from zip(names.tolist(), np.split(order, starts[1:]), strict=True) if len(ids) else ()


def trace(
    voxels: NDArray[np.int64],
    voxel_size: Sequence[float],
    offset: Sequence[float],
    radii: NDArray[np.float64] | None = None,
) -> Skeleton:
    """Draw lines between neighboring voxels of a curve, without loops.

    Args:
        voxels: (n, 3), z, y, x. Their centers become the points.
        voxel_size: in nm.
        offset: where voxel 0 begins, in nm.
        radii: (n,), in nm.

    Returns:
        One tree for each part that hangs together by faces, edges or corners.
    """
    pairs = cKDTree(voxels).query_pairs(1.8, output_type="ndarray")  # 26 neighbors
    points = (voxels + 0.5) * np.array(voxel_size) + np.array(offset)
    return _as_trees(Skeleton(points, pairs.astype(np.int64), radii))


def join(skeleton: Skeleton) -> Skeleton:
    """Draw the shortest lines that make one tree of a skeleton."""
    while True:
        count, part = connected_components(skeleton.graph(), directed=False)
        if count == 1:
            return _as_trees(skeleton)
        edges = np.concatenate([skeleton.edges, _to_the_nearest(skeleton.points, part, count)])
        skeleton = Skeleton(skeleton.points, edges, skeleton.radii)


def prune(tree: Skeleton, slack: float) -> Skeleton:
    """Leave twigs out: branches that reach not farther than TWIG radii at their fork and `slack` nm.

    The longest path is kept, and so is the longest branch at the end of each fork.

    Args:
        tree: one tree, with radii.
        slack: in nm.
    """
    assert tree.radii is not None
    graph = tree.graph()
    start = int(dijkstra(graph, directed=False, indices=0).argmax())  # an end of the longest path
    depth = dijkstra(graph, directed=False, indices=start)
    order, parents = breadth_first_order(graph, start, directed=False)
    parents[start] = start
    tip = list(range(len(order)))  # the point that lies deepest of those that are reached through each
    for point in order[:0:-1].tolist():
        if depth[tip[point]] > depth[tip[parents[point]]]:
            tip[parents[point]] = tip[point]
    reach = np.linalg.norm(tree.points[tip] - tree.points[parents], axis=1)
    far = reach > TWIG * tree.radii[parents] + slack
    kept = np.zeros(len(order), bool)
    kept[start] = True
    for point in order[1:].tolist():
        kept[point] = kept[parents[point]] and (tip[point] == tip[parents[point]] or far[point])
    number = np.cumsum(kept) - 1
    edges = tree.edges[kept[tree.edges].all(axis=1)]
    return Skeleton(tree.points[kept], number[edges], tree.radii[kept])


def smooth(tree: Skeleton, slack: float) -> Skeleton:
    """Move points towards the middle of their neighbors again and again: steps from voxel to voxel become a line.

    Ends stay where they are. No point is moved farther than its radius less `slack`, so that it stays in the neuron.

    Args:
        tree: one tree, with radii: distances to the nearest center of a voxel outside.
        slack: half the diagonal of a voxel in nm.
    """
    assert tree.radii is not None
    neighbors = coo_array((np.ones(len(tree.edges)), tree.edges.T), shape=(len(tree.points),) * 2).tocsr()
    neighbors = neighbors + neighbors.T
    degree = neighbors.sum(axis=1)[:, None]
    farthest = np.maximum(0, tree.radii - slack)[:, None]
    points = tree.points
    for _ in range(PASSES):
        middle = np.where(degree > 1, neighbors @ points / np.maximum(degree, 1), points)
        moved = (points + middle) / 2 - tree.points
        distance = np.linalg.norm(moved, axis=1, keepdims=True)
        points = tree.points + moved * np.minimum(1, farthest / np.maximum(distance, farthest + 1e-9))
    return Skeleton(points, tree.edges, tree.radii)


def gather(skeletons: Sequence[Skeleton]) -> Skeleton:
    """Return several skeletons with radii as one."""
    before = np.cumsum([0, *(len(one.points) for one in skeletons)])
    edges = [one.edges + count for one, count in zip(skeletons, before, strict=False)]
    radii = [one.radii for one in skeletons if one.radii is not None]
    return Skeleton(np.concatenate([one.points for one in skeletons]), np.concatenate(edges), np.concatenate(radii))


def _as_trees(skeleton: Skeleton) -> Skeleton:
    """Leave out the longest line of each loop."""
    tree = minimum_spanning_tree(skeleton.graph()).tocoo()
    return Skeleton(skeleton.points, np.stack([tree.row, tree.col], axis=1).astype(np.int64), skeleton.radii)


def _to_the_nearest(points: NDArray[np.float64], part: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Return for each part the two indices of the shortest line to another part, int64 (count, 2).

    The numbers of two parts differ in at least one bit, so the nearest is found by looking at one bit after the other.
    """
    best, lines = np.full(count, np.inf), np.zeros((count, 2), np.int64)
    for bit in range((count - 1).bit_length()):
        for value in (0, 1):
            here = part >> bit & 1 == value
            ours, theirs = np.flatnonzero(here), np.flatnonzero(~here)
            distances, nearest = cKDTree(points[theirs]).query(points[ours])
            order = np.argsort(distances, kind="stable")
            numbers, first = np.unique(part[ours][order], return_index=True)
            shortest = order[first]
            better = distances[shortest] < best[numbers]
            chosen = shortest[better]
            best[numbers[better]] = distances[chosen]
            lines[numbers[better]] = np.stack([ours[chosen], theirs[nearest[chosen]]], axis=1)
    return lines
