"""Segments from edges, against scipy's connected components; LUTs on disk and on fragments."""

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lsdseg.data_utils.layout import lut_path
from lsdseg.engine.post.tables import KEY, check_lut, connected_segments, load_lut, relabel, save_lut
from lsdseg.errors import UserError

VOXELS_IN_BLOCK = 1000
THRESHOLDS = [0.5, 0.1, 0.3]


@pytest.fixture
def graph():
    """Ids of 40 blocks, with gaps between them, and edges (u, v, scores), a tenth of which never merge."""
    random = np.random.default_rng(0)
    counts = random.integers(0, 60, 40)
    ids = np.concatenate([np.arange(1, n + 1) + block * VOXELS_IN_BLOCK for block, n in enumerate(counts)])
    ids = ids.astype(np.uint64) + np.uint64(2**60)
    u, v = random.choice(ids, (2, 3000))
    scores = random.random(3000, dtype=np.float32)
    scores[:300] = np.nan
    return ids, (u, v, scores)


def expected_segments(ids, edges, threshold):
    """The smallest id of each component, by scipy."""
    u, v, scores = edges
    kept = scores <= np.float32(threshold)
    rows, columns = np.searchsorted(ids, u[kept]), np.searchsorted(ids, v[kept])
    count, component = connected_components(coo_array((np.ones(kept.sum()), (rows, columns)), (len(ids), len(ids))))
    smallest = np.full(count, 2**64 - 1, np.uint64)
    np.minimum.at(smallest, component, ids)
    return smallest[component]


def test_segments_are_connected_components_at_every_threshold(graph):
    ids, edges = graph
    luts = connected_segments(ids, [edges], THRESHOLDS)
    assert list(luts) == sorted(THRESHOLDS)
    counts = []
    for threshold, lut in luts.items():
        assert lut.dtype == np.uint64
        assert (lut[0] == ids).all()
        assert (lut[1] == expected_segments(ids, edges, threshold)).all()
        counts.append(len(np.unique(lut[1])))
    assert len(ids) > counts[0] > counts[1] > counts[2] > 1


def test_order_direction_and_batches_of_edges_do_not_matter(graph):
    ids, edges = graph
    expected = connected_segments(ids, [edges], THRESHOLDS)
    random = np.random.default_rng(1)
    for size in (7, 1000, 5000):
        order = random.permutation(len(edges[0]))
        u, v, scores = (column[order] for column in edges)
        batches = ((v[i : i + size], u[i : i + size], scores[i : i + size]) for i in range(0, len(u), size))
        luts = connected_segments(ids, batches, THRESHOLDS[::-1])
        assert all((luts[threshold] == expected[threshold]).all() for threshold in THRESHOLDS)


def test_scores_are_compared_as_they_are_stored():
    ids, one, two = np.array([1, 2], np.uint64), np.array([1], np.uint64), np.array([2], np.uint64)
    thresholds = [round(0.01 * i, 2) for i in range(1, 101)]
    for threshold in thresholds:
        luts = connected_segments(ids, [(one, two, np.array([threshold], np.float32))], thresholds)
        assert [t for t in thresholds if luts[t][1, 1] == 1] == [t for t in thresholds if t >= threshold]


def test_graphs_without_edges_or_nodes():
    ids = np.array([3, 4, 2**63], np.uint64)
    nothing = np.array([], np.uint64), np.array([], np.uint64), np.array([], np.float32)
    for batches in ([], [nothing]):
        assert (connected_segments(ids, batches, [0.5])[0.5] == np.stack([ids, ids])).all()
    assert connected_segments(ids[:0], [nothing], [0.5])[0.5].shape == (2, 0)
    with pytest.raises(ValueError, match=r"2 ends of edges .* 0 nodes"):
        connected_segments(ids[:0], [(ids[:1], ids[:1], np.zeros(1, np.float32))], [0.5])


def test_edges_of_other_fragments_are_counted(graph):
    ids, (u, v, scores) = graph
    u, v = u.copy(), v.copy()
    u[:3] = ids[0] - np.uint64(1)
    v[5], v[2000] = ids[-1] + np.uint64(1), ids[500] + np.uint64(VOXELS_IN_BLOCK // 2)
    batches = [(u[i : i + 100], v[i : i + 100], scores[i : i + 100]) for i in range(0, 3000, 100)]
    with pytest.raises(ValueError, match=f"5 ends of edges .* {len(ids)} nodes"):
        connected_segments(ids, batches, [0.5])
    for wrong in (ids[::-1], np.repeat(ids, 2)):
        with pytest.raises(ValueError, match="ascend"):
            connected_segments(wrong, [], [0.5])


def test_relabel_maps_every_voxel(graph):
    ids, edges = graph
    lut = connected_segments(ids, [edges], [0.1])[0.1]
    segment_of = dict(zip(*lut.tolist(), strict=True)) | {0: 0}
    random = np.random.default_rng(2)
    first = ids[0] // np.uint64(VOXELS_IN_BLOCK) * np.uint64(VOXELS_IN_BLOCK)
    one_block = ids[ids - first <= VOXELS_IN_BLOCK]
    for present in (one_block, ids, ids[5:6], ids[::7]):
        fragments = random.choice(np.append(present, np.uint64(0)), (5, 6, 70))
        segments = relabel(fragments, lut)
        assert segments.dtype == np.uint64
        assert segments.tolist() == [[[segment_of[x] for x in row] for row in plane] for plane in fragments.tolist()]
        assert (relabel(fragments[:, ::2].swapaxes(0, 2), lut) == segments[:, ::2].swapaxes(0, 2)).all()
    assert not relabel(np.zeros((3, 4, 5), np.uint64), lut).any()
    assert relabel(np.zeros((0, 4, 5), np.uint64), lut).shape == (0, 4, 5)


def test_relabel_refuses_a_lut_of_other_fragments(graph):
    ids, edges = graph
    lut = connected_segments(ids, [edges], [0.1])[0.1]
    gap = ids[:-1][np.diff(ids) > 1][0] + np.uint64(1)
    for stranger in (1, gap, ids[-1] + np.uint64(1), 2**64 - 1):
        fragments = np.full((2, 3, 4), ids[7], np.uint64)
        fragments[1, :2, 3] = stranger
        with pytest.raises(ValueError, match=r"2 voxels .* other fragments"):
            relabel(fragments, lut)
    with pytest.raises(ValueError, match="other fragments"):
        relabel(fragments, lut[:, :0])


def test_luts_on_disk(graph, tmp_path):
    ids, edges = graph
    lut = connected_segments(ids, [edges], [0.1])[0.1]
    output = tmp_path / "sample_A.zarr"
    assert lut_path(output, "hist_quant_50", 0.29).name == "seg_sampleA_edges_hist_quant_50_29.npz"
    path = lut_path(output, "mean", 0.7)
    for rows in (lut[:, :0], lut):
        save_lut(path, rows)
        assert [file.name for file in path.parent.iterdir()] == ["seg_sampleA_edges_mean_70.npz"]
        assert np.load(path)["fragment_segment_lut"].dtype == np.uint64
        assert (np.load(path)["fragment_segment_lut"] == rows).all()
        assert (load_lut(path) == rows).all()
    assert isinstance(load_lut(path), np.memmap)
    assert (relabel(ids, load_lut(path)) == lut[1]).all()

    np.savez_compressed(path, **{KEY: lut})
    assert (load_lut(path) == lut).all()


def test_files_that_are_no_luts(tmp_path):
    path = tmp_path / "seg.npz"
    with pytest.raises(UserError, match=r"no look-up table .*seg\.npz"):
        load_lut(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(UserError, match=r"seg\.npz is not a look-up table"):
        load_lut(path)
    save_lut(path, np.zeros((2, 100), np.uint64))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"seg\.npz is not a look-up table"):
        load_lut(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "lut", [np.zeros((2, 3), object), np.zeros((2, 3)), np.zeros((2, 3), np.int64), np.zeros((3, 2), np.uint64)]
)
def test_arrays_that_are_no_luts(tmp_path, save, lut):
    save(tmp_path / "seg.npz", **{KEY: lut})
    with pytest.raises(UserError, match=r"seg\.npz is not a look-up table"):
        load_lut(tmp_path / "seg.npz")


@pytest.mark.parametrize(
    ("fragments", "segments", "reason"),
    [
        ([1, 2, 3], [0, 0, 0], "do not have the id"),
        ([1, 2, 3], [1, 1, 4], "do not have the id"),
        ([1, 2, 3], [1, 1, 2], "do not have the id"),
        ([0, 0, 0], [0, 0, 0], "do not ascend"),
        ([1, 3, 2], [1, 1, 1], "do not ascend"),
    ],
)
def test_values_that_are_no_luts(tmp_path, fragments, segments, reason):
    save_lut(tmp_path / "seg.npz", np.array([fragments, segments], np.uint64))
    with pytest.raises(UserError, match=rf"seg\.npz .*{reason}.*04_find_segments_full"):
        check_lut(tmp_path / "seg.npz", load_lut(tmp_path / "seg.npz"))


def test_values_of_luts(graph, tmp_path):
    ids, edges = graph
    for nodes in (ids, ids[:0]):
        lut = connected_segments(nodes, [edges] if len(nodes) else [], [0.1])[0.1]
        save_lut(tmp_path / "seg.npz", lut)
        check_lut(tmp_path / "seg.npz", load_lut(tmp_path / "seg.npz"))


def test_a_full_disk_keeps_the_lut_that_was_there(small_disk):
    path = small_disk(64) / "seg.npz"
    save_lut(path, np.ones((2, 100), np.uint64))
    with pytest.raises(UserError, match="No space"):
        save_lut(path, np.zeros((2, 10_000), np.uint64))
    assert load_lut(path).all()
    assert list(path.parent.iterdir()) == [path]
