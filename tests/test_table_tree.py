"""Look-up tables in a tree of blocks."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsdseg.engine.post.table_tree import TableTree
from lsdseg.engine.post.tables import connected_segments

IDS_IN_BLOCK = 20


def ranges_around(position, grid):
    """Number in the grid -> ids, of a block and its neighbors."""
    around = product(*(range(max(0, at - 1), min(at + 2, size)) for at, size in zip(position, grid, strict=True)))
    numbers = [int(np.ravel_multi_index(place, grid)) for place in around]
    return {number: (number * IDS_IN_BLOCK + 1, (number + 1) * IDS_IN_BLOCK) for number in numbers}


def in_a_tree(folder, grid, thresholds, ids, edges, top):
    """The LUTs, with levels up to `top`."""
    tree = TableTree(folder, grid, thresholds)
    u, v, scores = edges
    blocks = (u - np.uint64(1)) // np.uint64(IDS_IN_BLOCK)
    for position in np.ndindex(grid):
        own, ranges = int(np.ravel_multi_index(position, grid)), ranges_around(position, grid)
        first, last = ranges[own]
        is_own, is_near = blocks == own, np.isin(blocks, list(ranges)) & (blocks != own)
        inside = ids[(ids >= first) & (ids <= last)]
        tree.settle_block(position, inside, *((u[s], v[s], scores[s]) for s in (is_own, is_near)), ranges)
    for level in range(1, top + 1):
        for position in np.ndindex(tree.level_grid(level)):
            tree.settle_node(level, position)
    left = tree.size(top)
    tree.settle_top(top)
    for level in range(top, 0, -1):
        for position in np.ndindex(tree.level_grid(level)):
            tree.tell_node(level, position)
    parts = [tree.tables_of_block(position) for position in np.ndindex(grid)]
    return {value: np.concatenate([part[value] for part in parts], axis=1) for value in thresholds}, left


def random_graph(grid, rng, edges):
    """Fragments in blocks, and edges between those of the same block or of neighbors."""
    ids = np.flatnonzero(rng.random(np.prod(grid) * IDS_IN_BLOCK) < 0.6).astype(np.uint64) + np.uint64(1)
    a, b = rng.choice(ids, (2, edges))
    places = [np.stack(np.unravel_index((n.astype(int) - 1) // IDS_IN_BLOCK, grid)) for n in (a, b)]
    near = (abs(places[0] - places[1]).max(axis=0) <= 1) & (a != b)
    u, v = np.minimum(a, b)[near], np.maximum(a, b)[near]
    scores = rng.random(len(u)).astype(np.float32)
    scores[rng.random(len(u)) < 0.1] = np.nan
    return ids, (u, v, scores)


@settings(deadline=None, max_examples=25)
@given(
    grid=st.tuples(*[st.integers(1, 4)] * 3),
    seed=st.integers(0, 2**32 - 1),
    density=st.floats(0, 3),
    top=st.integers(0, 3),
)
def test_segments_are_those_of_one_process(tmp_path_factory, grid, seed, density, top):
    rng, thresholds = np.random.default_rng(seed), (0.1, 0.4, 0.9)
    ids, edges = random_graph(grid, rng, int(density * np.prod(grid) * IDS_IN_BLOCK))
    found, _ = in_a_tree(tmp_path_factory.mktemp("tree"), grid, thresholds, ids, edges, top)
    for value, lut in connected_segments(ids, [edges], thresholds).items():
        order = np.argsort(found[value][0])
        np.testing.assert_array_equal(found[value][:, order], lut)


def test_boxes_leave_only_what_they_share_with_others(tmp_path):
    grid = (1, 8, 8)
    ids, edges = random_graph(grid, np.random.default_rng(0), 5 * 64 * IDS_IN_BLOCK)
    left = [in_a_tree(tmp_path / str(top), grid, (0.5,), ids, edges, top)[1] for top in range(4)]
    assert left[0] > left[1] > left[2] > left[3] == 0


def test_edges_to_unknown_fragments_are_an_error(tmp_path):
    tree = TableTree(tmp_path, (1, 1, 2), (0.5,))
    edge = (np.array([1], np.uint64), np.array([999], np.uint64), np.array([0.1], np.float32))
    with pytest.raises(ValueError, match="not among the nodes"):
        tree.settle_block((0, 0, 0), np.array([1], np.uint64), edge, edge, ranges_around((0, 0, 0), (1, 1, 2)))
