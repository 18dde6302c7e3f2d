import itertools
import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsdseg.data_utils.skeletons import Skeleton
from lsdseg.data_utils.swc import read_skeletons, read_swc
from lsdseg.engine.evaluate.skeletons import make_skeletons, score_skeletons
from lsdseg.errors import UserError


def line(y, points=11):
    """A skeleton of 10 lines of 10 nm along x."""
    places = np.array([[5, 10 * y + 5, 10 * x + 5] for x in range(points)], float)
    return Skeleton(places, np.stack([np.arange(points - 1), np.arange(1, points)], axis=1))


def score(labels, *skeletons):
    return score_skeletons(dict(zip("ab", skeletons, strict=False)), labels, (10, 10, 10), (0, 0, 0))


def test_erl_without_errors_is_the_length():
    labels = np.array([[[1] * 11, [2] * 11]], np.uint64)
    result = score(labels, line(0), line(1))
    assert (result["erl"], result["normalized_erl"]) == (100, 1)
    assert [(n["splits"], n["merged_with"]) for n in result["neurons"]] == [(0, []), (0, [])]


def test_erl_of_a_split():
    """The run of 100 nm falls into 40 and 50 nm, and a line of 10 nm between them: (40² + 50²) / 100 = 41 nm."""
    result = score(np.array([[[1] * 5 + [2] * 6]], np.uint64), line(0))
    assert result["erl"] == pytest.approx(41)
    assert result["normalized_erl"] == pytest.approx(0.41)
    assert result["neurons"][0]["splits"] == 1


def test_a_merged_segment_has_no_run():
    """Neuron a lies in 1 (50 nm) and, merged with b, in 2: 50² / 100 = 25 nm, b has none, so on average 12.5 nm."""
    result = score(np.array([[[1] * 6 + [2] * 5, [2] * 11]], np.uint64), line(0), line(1))
    assert result["erl"] == pytest.approx(12.5)
    assert [n["merged_with"] for n in result["neurons"]] == [["b"], ["a"]]


def test_longer_neurons_weigh_more():
    """(100 * 100 + 50 * 50) / 150, and background has no run."""
    labels = np.array([[[1] * 11, [2] * 11]], np.uint64)
    assert score(labels, line(0), line(1, 6))["erl"] == pytest.approx(12500 / 150)
    assert score(labels * np.uint64(0), line(0))["erl"] == 0
    assert score(labels[..., :6], line(0))["erl"] == 50  # what leaves the volume is left out
    with pytest.raises(ValueError, match="inside"):
        score(labels[..., :1], line(0))


def test_swc_is_read_as_x_y_z(tmp_path):
    (tmp_path / "n.swc").write_text("# a comment\n1 0 1.5 2 3 1 -1\n7 0 4 2 3 1 1\n")
    skeleton = read_skeletons(tmp_path)["n"]
    assert skeleton.points.tolist() == [[3, 2, 1.5], [3, 2, 4]]
    assert skeleton.lengths.tolist() == [2.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 1 2 3 1 -1\n2 0 1 2 3 1 9\n", "parent 9, which is missing"),
        ("1 0 1 2 3 1 2\n2 0 1 2 3 1 1\n", "loop"),
        ("1 0 1 2 3 1 -1\n1 0 1 2 3 1 -1\n", "again"),
        ("1 0 1 2 x 1 -1\n", "line 1"),
        ("1 0 nan 2 3 1 -1\n", "line 1"),
        ("1 0 1 2\n", "line 1"),
        ("", "no points"),
    ],
)
def test_broken_swc_is_refused(tmp_path, text, message):
    (tmp_path / "n.swc").write_text(text)
    with pytest.raises(UserError, match=message):
        read_swc(tmp_path / "n.swc")


def test_skeletons_of_labels_follow_them():
    labels = np.zeros((9, 20, 60), np.uint64)
    labels[2:7, 3:8, 2:58] = 2**63
    labels[2:7, 10:15, 2:58] = 4
    labels[0, 0, 0] = 9
    skeletons = make_skeletons(labels, (40, 10, 10), (1000, 0, 0))
    assert list(skeletons) == ["4", str(2**63)]
    assert 480 <= skeletons["4"].lengths.sum() <= 600
    result = score_skeletons(skeletons, labels, (40, 10, 10), (1000, 0, 0))
    assert result["normalized_erl"] == 1
    assert score_skeletons(skeletons, labels != 0, (40, 10, 10), (1000, 0, 0))["erl"] == 0


def run_lengths(skeletons, labels, voxel_size, offset):
    """Expected run lengths by their definition: how long is the run at a place, on average over all places?

    What is left of the skeletons without split, merged and omitted edges falls into parts. A run is what one can walk
    without an error, and parts of a skeleton that lie in one segment count as one: nothing is wrong between them.

    Returns:
        name -> length, expected run length without and with such parts counted as one.
    """
    segment = {}
    for name, skeleton in skeletons.items():
        for number, point in enumerate(skeleton.points.tolist()):
            voxel = [math.floor((p - o) / size) for p, o, size in zip(point, offset, voxel_size, strict=True)]
            inside = all(0 <= v < n for v, n in zip(voxel, labels.shape, strict=True))
            segment[name, number] = int(labels[*voxel]) if inside else None
    found = {}
    for name, skeleton in skeletons.items():
        whole, right = nx.Graph(), nx.Graph()
        for edge in skeleton.edges.tolist():
            ends = [(name, end) for end in edge]
            one, other = (segment[end] for end in ends)
            if one is None or other is None:
                continue
            length = math.dist(*skeleton.points[edge])
            whole.add_edge(*ends, length=length)
            merged = any(there == one and owner != name for (owner, _), there in segment.items())
            if one == other != 0 and not merged:
                right.add_edge(*ends, length=length)
        total = whole.size("length")
        expected = []
        for tied in (False, True):
            for place, another in itertools.combinations(list(right), 2) if tied else ():
                if segment[place] == segment[another] and not right.has_edge(place, another):
                    right.add_edge(place, another, length=0.0)
            runs = [right.subgraph(part).size("length") for part in nx.connected_components(right)]
            expected.append(sum(run / total * run for run in runs) if total else 0.0)
        if total:
            found[name] = (total, *expected)
    return found


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ids=st.integers(1, 12))
def test_erl_is_that_of_its_definition(seed, ids):
    rng = np.random.default_rng(seed)
    voxel_size, offset = (40, 10, 10), (-80, 100, 0)
    chosen = np.append(0, rng.integers(1, 2**63, ids, np.uint64))
    labels = np.kron(rng.choice(chosen, (2, 3, 3)), np.ones((2, 2, 2), np.uint64))
    skeletons = {}
    for name in "abc"[: rng.integers(1, 4)]:
        count = rng.integers(1, 12)
        points = np.array(offset) + rng.uniform(0, 1, (count, 3)) * labels.shape * voxel_size
        parents = [(n, rng.integers(0, n)) for n in range(1, count) if rng.uniform() < 0.9]  # a forest
        for one, parent in parents:  # close to its parent, so that many edges stay in a segment; some leave the labels
            points[one] = points[parent] + rng.normal(0, 0.7, 3) * voxel_size
        skeletons[name] = Skeleton(points, np.array(parents, np.int64).reshape(-1, 2))
    expected = run_lengths(skeletons, labels, voxel_size, offset)
    whole = sum(length for length, *_ in expected.values())
    if not whole:
        with pytest.raises(ValueError, match="inside"):
            score_skeletons(skeletons, labels, voxel_size, offset)
        return
    result = score_skeletons(skeletons, labels, voxel_size, offset)
    assert [neuron["name"] for neuron in result["neurons"]] == list(expected)
    for neuron in result["neurons"]:
        length, apart, together = expected[neuron["name"]]
        assert neuron["length"] == pytest.approx(length)
        assert neuron["erl"] == pytest.approx(together)
        assert apart <= neuron["erl"] * (1 + 1e-9)
    erl = sum(length * together for length, _, together in expected.values()) / whole
    best = sum(length * length for length, *_ in expected.values()) / whole  # nothing wrong: the run is the neuron
    assert result["erl"] == pytest.approx(erl)
    assert result["erl_best"] == pytest.approx(best)
    assert result["normalized_erl"] == pytest.approx(erl / best)
