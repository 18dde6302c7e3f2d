"""Edits of segmentations: the log on disk, and what they do to the graph."""

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import Delaunay

from lsdseg.errors import UserError
from lsdseg.rag.edits import Edit, EditLog, active
from lsdseg.rag.proofread import MUST, apply_edits, components, merging_pair, min_cut

CHECKOUT = Path(__file__).resolve().parents[1]


def ids(*values):
    return np.array(values, np.uint64)


def edit(number, action, a, b=0):
    return Edit(number, action, a, b, "me", "now", "")


def edges(*rows):
    u, v, scores = zip(*rows, strict=True)
    return ids(*u), ids(*v), np.array(scores, np.float32)


def segments_of(graph, threshold, *edits, fragments=None):
    """Fragment -> segment, after edits."""
    u, v, scores = graph
    nodes = np.unique(np.concatenate([u, v])) if fragments is None else ids(*fragments)
    hold = scores <= np.float32(threshold)
    lut = np.stack([nodes, components(nodes, u[hold], v[hold])])
    return dict(apply_edits(lut, [graph], edits, threshold).T.tolist())


# 1 - 2 = 3 - 4, where the middle edge is the weakest, and 8 - 9 apart from them.
CHAIN = edges((1, 2, 0.1), (2, 3, 0.4), (3, 4, 0.2), (8, 9, 0.1))


def test_split_removes_the_weakest_edge():
    assert segments_of(CHAIN, 0.5) == {1: 1, 2: 1, 3: 1, 4: 1, 8: 8, 9: 8}
    assert segments_of(CHAIN, 0.5, edit(1, "split", 1, 4)) == {1: 1, 2: 1, 3: 3, 4: 3, 8: 8, 9: 8}
    assert segments_of(CHAIN, 0.3, edit(1, "split", 1, 4)) == segments_of(CHAIN, 0.3)  # they are apart already


def test_merge_joins_segments_that_need_not_touch():
    assert set(segments_of(CHAIN, 0.5, edit(1, "merge", 4, 9)).values()) == {1}
    assert segments_of(CHAIN, 0.3, edit(1, "merge", 4, 9)) == {1: 1, 2: 1, 3: 3, 4: 3, 8: 3, 9: 3}


def test_later_edits_win():
    merged, split = edit(1, "merge", 4, 9), edit(2, "split", 9, 1)
    assert segments_of(CHAIN, 0.5, merged, split) == {1: 1, 2: 1, 3: 3, 4: 3, 8: 3, 9: 3}
    assert segments_of(CHAIN, 0.5, merged, edit(2, "split", 4, 9)) == segments_of(CHAIN, 0.5)
    again = (edit(1, "split", 1, 4), edit(2, "merge", 2, 3))
    assert segments_of(CHAIN, 0.5, *again) == segments_of(CHAIN, 0.5)


def test_merge_holds_while_something_else_can_be_cut():
    graph = edges((1, 2, 0.1), (2, 3, 0.1), (3, 4, 0.1))
    together = segments_of(graph, 0.5, edit(1, "merge", 2, 3), edit(2, "split", 1, 4))
    assert together[2] == together[3]
    assert together[1] != together[4]


def test_fragments_that_are_gone_are_named():
    with pytest.raises(ValueError, match="edit 7 names fragment 5, which is no longer there"):
        segments_of(CHAIN, 0.5, edit(7, "merge", 1, 5))
    with pytest.raises(ValueError, match="fragment 99"):
        segments_of(CHAIN, 0.5, edit(1, "split", 99, 1))


def test_surest_contact_between_two_segments():
    graph = edges((1, 2, 0.1), (3, 4, 0.1), (1, 4, 0.9), (2, 3, 0.8), (8, 9, np.nan))
    lut = np.stack([ids(1, 2, 3, 4, 8, 9), ids(1, 1, 3, 3, 8, 9)])
    assert merging_pair(lut, [graph], 1, 3) == (2, 3)
    assert merging_pair(lut, [graph], 3, 1) == (3, 2)
    assert merging_pair(lut, [graph], 8, 9) == (8, 9)
    assert merging_pair(lut, [graph], 9, 1) == (9, 1)  # they do not touch


graphs = st.lists(
    st.tuples(st.integers(1, 7), st.integers(1, 7), st.sampled_from([MUST, 0, 0.1, 0.25, 0.5])).filter(
        lambda edge: edge[0] < edge[1]
    ),
    min_size=1,
    max_size=14,
    unique_by=lambda edge: edge[:2],
)


@given(graphs)
@settings(deadline=None, max_examples=100)
def test_min_cut_is_the_least_of_all_cuts(rows):
    """All ways to put the fragments on two sides, tried one by one."""
    u, v, scores = edges(*rows)
    nodes = np.unique(np.concatenate([u, v])).tolist()
    a, b = nodes[0], nodes[-1]
    cut = min_cut(u, v, scores, a, b)
    worst = max(float(scores.max()), 1e-9)
    weights = np.where(scores == MUST, 1e7, 1 + np.rint(99_999 * (1 - scores.astype(float) / worst) ** 3))
    least = np.inf
    for sides in itertools.product([True, False], repeat=len(nodes) - 2):
        side = dict(zip(nodes, [True, *sides, False], strict=True))
        across = [side[x] != side[y] for x, y in zip(u.tolist(), v.tolist(), strict=True)]
        least = min(least, weights[across].sum())
    assert weights[cut].sum() == least
    kept = components(ids(*nodes), u[~cut], v[~cut])
    assert kept[0] != kept[-1]


def test_ten_thousand_fragments_are_split_within_a_second():
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(10_000, 3)) * [40, 1, 1]
    corners = Delaunay(points).simplices
    pairs = np.concatenate([corners[:, [i, j]] for i, j in itertools.combinations(range(4), 2)])
    pairs = np.unique(np.sort(pairs, axis=1), axis=0).astype(np.uint64) + np.uint64(1)
    # Two neurites that meet at x = 20, where merges were less sure.
    across = (points[pairs - 1][..., 0] < 20).sum(axis=1) == 1
    scores = np.where(across, rng.uniform(0.4, 0.5, len(pairs)), rng.uniform(0, 0.3, len(pairs))).astype(np.float32)
    ends = int(points[:, 0].argmin()) + 1, int(points[:, 0].argmax()) + 1
    began = time.perf_counter()
    cut = min_cut(*pairs.T, scores, *ends)
    assert time.perf_counter() - began < 1
    assert (cut == across).all()


def test_log_keeps_who_when_and_what(tmp_path):
    log = EditLog(tmp_path / "sample.edits", "made123")
    assert log.read() == []
    log.merge(5, 9, author="ada")
    log.split(2**64 - 1, 3)
    assert log.undo().number == 2
    log.merge(5, 7)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["action"] for line in lines] == ["merge", "split", "undo", "merge"]
    assert lines[0] == lines[0] | {"edit": 1, "a": 5, "b": 9, "author": "ada", "fragments": "made123"}
    assert lines[0]["time"].endswith("+00:00")
    assert lines[2]["undoes"] == 2
    assert [edit.number for edit in active(log.read())] == [1, 4]
    assert log.undo().number == 4
    assert log.undo().number == 1
    with pytest.raises(UserError, match=r"no edit in .* to take back"):
        log.undo()
    with pytest.raises(UserError, match="a merge takes two fragments, but both are 4"):
        log.merge(4, 4)
    assert len(log.read()) == 6


def test_half_a_line_is_reported_and_replaced(tmp_path, capsys):
    log = EditLog(tmp_path / "sample.edits")
    log.merge(1, 2)
    whole = log.path.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 2):
        log.path.write_bytes(whole + whole[:length])
        assert [edit.a for edit in log.read()] == [1]
        (line,) = capsys.readouterr().out.splitlines()
        assert "ends in half a line" in line
        log.split(3, 4)
        assert [edit.action for edit in log.read()] == ["merge", "split"]
        assert not capsys.readouterr().out
    log.path.write_bytes(whole.rstrip(b"\n"))  # written by hand, and whole
    log.merge(5, 6)
    assert [edit.a for edit in log.read()] == [1, 5]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense\n", "line 2 of .* is damaged"),
        ('{"edit": 2, "action": "paint", "a": 1, "b": 2}\n', "no merge, split, mark or undo"),
        ('{"edit": 2, "action": "merge", "a": 1, "b": -2}\n', "its b is -2"),
        ('{"edit": 2, "action": "merge", "a": true, "b": 2}\n', "its a is True"),
        ('{"edit": 2, "action": "split", "a": 2, "b": 2}\n', "both fragments are the same"),
        ('{"edit": 3, "action": "merge", "a": 1, "b": 2}\n', "lines are missing or doubled"),
        ('{"edit": 2, "action": "undo", "undoes": 2}\n', "no edit 2 to take back"),
        ('{"edit": 2, "action": "merge", "a": 1, "b": 2, "fragments": "older"}\n', "line 2 .* other fragments"),
        ("[" * 100_000 + "\n", "line 2 of .* is damaged"),
    ],
)
def test_damaged_logs_are_refused(tmp_path, line, reason):
    log = EditLog(tmp_path / "sample.edits", "newer")
    log.merge(1, 2)
    before = log.path.read_bytes()
    log.path.write_bytes(before + line.encode())
    for use in (log.read, lambda: log.merge(3, 4), log.undo):
        with pytest.raises(UserError, match=reason):
            use()
    assert log.path.read_bytes() == before + line.encode()


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_any_bytes_end_well_or_in_one_line(tmp_path_factory, content):
    log = EditLog(tmp_path_factory.mktemp("log") / "sample.edits")
    log.path.write_bytes(content)
    with contextlib.suppress(UserError):
        log.read()


WRITER = """
import sys
from lsdseg.rag.edits import EditLog
log = EditLog(sys.argv[1])
for n in range(1, int(sys.argv[2]) + 1):
    print(log.merge(n, n + 1, author=sys.argv[3]).number, flush=True)
"""


def writer(path, count, author):
    command = [sys.executable, "-c", WRITER, str(path), str(count), author]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_at_once(tmp_path):
    path = tmp_path / "sample.edits"
    for process in [writer(path, 100, name) for name in "ab"]:
        process.communicate()
        assert process.returncode == 0
    edits = EditLog(path).read()
    for name in "ab":
        assert [edit.a for edit in edits if edit.author == name] == list(range(1, 101))


def test_killed_writer_loses_nothing_that_it_confirmed(tmp_path):
    path = tmp_path / "sample.edits"
    for _ in range(3):
        before = len(EditLog(path).read())
        with writer(path, 10**6, "killed") as process:
            confirmed = [process.stdout.readline() for _ in range(20)]
            process.send_signal(signal.SIGKILL)
            confirmed += process.stdout.readlines()
        assert before + len(confirmed) <= len(EditLog(path).read()) <= before + len(confirmed) + 1
    EditLog(path).undo()


def test_full_disk_keeps_the_log_whole(small_disk):
    log = EditLog(small_disk(64) / "sample.edits")
    log.merge(1, 2)

    def fill():
        for n in range(10_000):
            log.merge(n + 3, n + 4)

    with pytest.raises(UserError, match=r"no room|No space"):
        fill()
    edits = log.read()
    assert edits[-1].number == len(edits)
    with pytest.raises(UserError):
        log.merge(1, 3)
    assert len(log.read()) == len(edits)
