"""How many edits a segmentation needs, by hand."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lsdseg.engine.evaluate import edits_needed as module
from lsdseg.engine.evaluate.edits_needed import edits_needed
from lsdseg.rag.proofread import components


def needed(edges, overlaps, threshold=0.5):
    """Edits of the segments of a graph, rows (u, v, score), given rows (fragment, neuron, voxels)."""
    u, v, scores = (np.array(column) for column in zip(*edges, strict=True))
    u, v, scores = u.astype(np.uint64), v.astype(np.uint64), scores.astype(np.float32)
    rows = np.array(overlaps)
    ids = np.unique(np.concatenate([u, v, rows[:, 0].astype(np.uint64)]))
    hold = scores <= np.float32(threshold)
    lut = np.stack([ids, components(ids, u[hold], v[hold])])
    pairs, counts = rows[:, :2].astype(np.uint64), rows[:, 2].astype(np.int64)
    order = np.lexsort(pairs.T[::-1])
    return edits_needed(lut, [(u, v, scores)], threshold, pairs[order], counts[order])


A, B, C = 7, 8, 9  # neurons
# 1 - 2 = 3 - 4, where the middle edge is the weakest.
CHAIN = [(1, 2, 0.1), (2, 3, 0.4), (3, 4, 0.2)]


def test_one_cut_where_the_merge_was_least_sure():
    assert needed(CHAIN, [(1, A, 50), (2, A, 40), (3, B, 40), (4, B, 50)]) == (1, 0)
    # Below the threshold of the merge, nothing is wrong.
    assert needed(CHAIN, [(1, A, 50), (2, A, 40), (3, B, 40), (4, B, 50)], threshold=0.3) == (0, 0)
    # A neuron in two segments needs a merge.
    assert needed([*CHAIN, (9, 10, 0.1)], [(1, A, 50), (4, B, 50), (9, A, 30)]) == (1, 1)
    assert needed(CHAIN, [(1, A, 50), (2, A, 40), (3, A, 40), (4, A, 50)]) == (0, 0)


def test_a_cut_elsewhere_needs_another_one_and_a_merge():
    edges = [(1, 2, 0.4), (2, 3, 0.2), (3, 4, 0.1)]
    assert needed(edges, [(1, A, 50), (2, A, 40), (3, B, 40), (4, B, 50)]) == (2, 1)


def test_what_takes_too_long_is_not_counted(monkeypatch):
    monkeypatch.setattr(module, "MOST_WORK", 5)
    assert needed(CHAIN, [(1, A, 50), (4, B, 50)]) == (1, 0)
    assert needed([(1, 2, 0.4), (2, 3, 0.4), (3, 4, 0.4)], [(1, A, 50), (2, B, 50), (3, C, 50), (4, A, 50)]) is None


def test_three_neurons_take_two_cuts():
    edges = [(1, 2, 0.4), (2, 3, 0.4)]
    assert needed(edges, [(1, A, 50), (2, B, 50), (3, C, 50)]) == (2, 0)


def test_slivers_and_the_smaller_part_of_a_fragment_need_nothing():
    assert needed(CHAIN, [(1, A, 500), (2, A, 400), (3, A, 500), (4, B, 9), (9, B, 2000)]) == (0, 0)
    assert needed(CHAIN, [(1, A, 50), (2, A, 40), (3, A, 40), (4, A, 50), (4, B, 40)]) == (0, 0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.1, 0.2, 0.3, 0.6])).filter(
            lambda edge: edge[0] < edge[1]
        ),
        min_size=1,
        unique_by=lambda edge: edge[:2],
    ),
    st.lists(st.sampled_from([A, B, C]), min_size=9, max_size=9),
)
def test_no_edits_are_fewer_than_the_least(edges, neurons):
    """Each cut makes one piece more: pieces of one neuron each are what segments and cuts give."""
    overlaps = [(n + 1, neuron, 100) for n, neuron in enumerate(neurons)]
    splits, merges = needed(edges, overlaps)
    ids = np.arange(1, 10, dtype=np.uint64)
    hold = [edge for edge in edges if edge[2] <= 0.5]
    u, v = (np.array([edge[n] for edge in hold], np.uint64) for n in (0, 1))
    segments = components(ids, u, v)
    in_segments = {(int(segment), neuron) for segment, neuron in zip(segments, neurons, strict=True)}
    assert splits >= len(in_segments) - len(set(segments.tolist()))
    assert len(set(segments.tolist())) + splits == len(set(neurons)) + merges
