"""Skeletons of segmentations: tubes whose axes are known, cut into blocks, read back from both formats."""

import json
import subprocess
import sys

import cc3d
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from skimage.measure import euler_number
from skimage.morphology import skeletonize

from lsdseg.config.loader import CHECKOUT
from lsdseg.data_utils import export_skeletons
from lsdseg.data_utils.export import export_dataset
from lsdseg.data_utils.layout import RAW
from lsdseg.data_utils.skeletons import Skeleton, join, prune
from lsdseg.data_utils.swc import read_skeletons
from lsdseg.data_utils.thinning import thin
from lsdseg.data_utils.volumes import write_array
from lsdseg.engine.evaluate.skeletons import score_skeletons
from lsdseg.errors import UserError

SHAPE, VOXEL_SIZE, OFFSET = (50, 60, 110), (30, 20, 10), (300, -40, 70)
SEGMENTATION = "volumes/segmentation_050"
BIG = 2**63 + 5  # as an id
RADIUS = 110  # nm


def place(*fractions):
    """Points (n, 3) in nm at fractions of the volume along z, y, x."""
    where = np.stack(np.broadcast_arrays(*fractions), axis=1)
    return np.array(OFFSET) + where * np.multiply(SHAPE, VOXEL_SIZE)


def straight(begin, end):
    """Points from one place to another, both as fractions of the volume."""
    along = np.linspace(0, 1, 400)[:, None]
    return place(*(np.array(begin) * (1 - along) + np.array(end) * along).T)


def within(axis, radius=RADIUS):
    """Voxels whose centers are closer to an axis than a radius in nm."""
    centers = (np.indices(SHAPE).reshape(3, -1).T + 0.5) * VOXEL_SIZE + OFFSET
    distances, _ = cKDTree(axis).query(centers, distance_upper_bound=radius)
    return np.isfinite(distances).reshape(SHAPE)


def export(tmp_path, ids, to, **options):
    """Store ids and export them, in blocks of 32 voxels unless they were set before."""
    write_array(tmp_path / "in.zarr", SEGMENTATION, ids, voxel_size=VOXEL_SIZE, offset=OFFSET)
    out = tmp_path / to
    export_dataset(tmp_path / "in.zarr", out, to=to, dataset=None, overwrite=False, **options)
    return out


def read_precomputed(folder):
    """Decode every skeleton as the specification says: segment -> a skeleton in z, y, x."""
    info = json.loads((folder / "info").read_text())
    assert (info["@type"], info["transform"]) == ("neuroglancer_skeletons", [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0])
    assert info["vertex_attributes"] == [{"id": "radius", "data_type": "float32", "num_components": 1}]
    found = {}
    for file in folder.iterdir():
        if file.name != "info":
            content = file.read_bytes()
            points, edges = np.frombuffer(content, "<u4", 2)
            assert len(content) == 8 + 12 * points + 8 * edges + 4 * points
            x_y_z = np.frombuffer(content, "<f4", 3 * points, 8).reshape(-1, 3)
            ends = np.frombuffer(content, "<u4", 2 * edges, 8 + 12 * points).reshape(-1, 2)
            radii = np.frombuffer(content, "<f4", points, 8 + 12 * points + 8 * edges)
            found[file.name] = Skeleton(x_y_z[:, ::-1].astype(float), ends.astype(np.int64), radii.astype(float))
    return found


def trees(skeleton):
    count, _ = connected_components(skeleton.graph(), directed=False)
    assert len(skeleton.edges) == len(skeleton.points) - count  # no loops
    return count


def degrees(skeleton):
    return np.bincount(skeleton.edges.ravel(), minlength=len(skeleton.points))


def are_inside(skeleton, mask):
    voxels = np.floor((skeleton.points - OFFSET) / VOXEL_SIZE).astype(int)
    return mask[tuple(voxels.T)].all()


@pytest.fixture
def blocks(monkeypatch):
    """Blocks so small that SHAPE has 2 x 2 x 4, with context that is wider than RADIUS."""
    monkeypatch.setattr(export_skeletons, "BLOCK", 32)
    monkeypatch.setattr(export_skeletons, "CONTEXT", 180)


def test_a_curved_tube_has_one_line_along_its_axis(tmp_path, blocks):
    t = np.linspace(0, 1, 2000)
    axis = place(0.12 + 0.76 * t, 0.5 + 0.32 * np.sin(5 * t), 0.12 + 0.76 * t)
    tube = within(axis)
    out = export(tmp_path, np.where(tube, np.uint64(BIG), np.uint64(0)), "precomputed", skeletons=True)
    assert json.loads((out / "info").read_text())["skeletons"] == "skeletons"
    ((name, skeleton),) = read_precomputed(out / "skeletons").items()
    assert name == str(BIG)
    assert trees(skeleton) == 1
    assert sorted(degrees(skeleton))[:3] == [1, 1, 2]
    assert degrees(skeleton).max() == 2
    assert are_inside(skeleton, tube)
    along_axis = cKDTree(axis)
    ends = cKDTree(axis[[0, -1]]).query(skeleton.points)[0] < RADIUS
    assert 0 < ends.sum() < len(ends) / 3
    off_axis = along_axis.query(skeleton.points)[0]
    assert off_axis[~ends].max() < 30  # a voxel, or up to three in x
    assert np.median(off_axis) < 15
    assert off_axis.max() < RADIUS
    assert along_axis.query(skeleton.points)[1].max() > 0.95 * len(axis)
    length = np.linalg.norm(np.diff(axis, axis=0), axis=1).sum()
    assert skeleton.lengths.sum() == pytest.approx(length, rel=0.05)
    assert skeleton.radii[~ends] == pytest.approx(RADIUS, abs=30)

    (swc,) = read_skeletons(export(tmp_path, np.where(tube, np.uint64(BIG), np.uint64(0)), "swc")).values()
    assert trees(swc) == 1
    for mine, other in ((swc, skeleton), (skeleton, swc)):
        distances, nearest = cKDTree(mine.points).query(other.points)
        assert distances.max() < 0.01
        np.testing.assert_allclose(mine.radii[nearest], other.radii, rtol=1e-5)
    scores = score_skeletons({"swc": swc}, tube.astype(np.uint64), VOXEL_SIZE, OFFSET)
    assert scores["normalized_erl"] == pytest.approx(1)


def test_a_fork_has_one_branch_point_and_three_ends(tmp_path, blocks):
    middle = (0.5, 0.5, 0.5)
    arms = [straight(middle, end) for end in ((0.5, 0.5, 0.1), (0.15, 0.2, 0.9), (0.85, 0.8, 0.9))]
    fork = within(np.concatenate(arms), 90)
    (skeleton,) = read_skeletons(export(tmp_path, fork.astype(np.uint32), "swc")).values()
    assert trees(skeleton) == 1
    assert [int((degrees(skeleton) == count).sum()) for count in (1, 3)] == [3, 1]
    assert degrees(skeleton).max() == 3
    assert np.linalg.norm(skeleton.points[degrees(skeleton) == 3] - arms[0][0]) < 90
    ends = skeleton.points[degrees(skeleton) == 1]
    assert cKDTree(ends).query([arm[-1] for arm in arms])[0].max() < 110
    assert are_inside(skeleton, fork)


def test_blocks_do_not_show(tmp_path, blocks, monkeypatch):
    """Neurites that fill space, in blocks and in one piece: as many trees, of the same length."""
    noise = np.random.default_rng(2).random((9, 40, 50, 64))
    ids = np.argmax([gaussian_filter(n, [60 / v for v in VOXEL_SIZE]) for n in noise], axis=0).astype(np.uint64)
    found = {}
    for folder, block in (("cut", 32), ("whole", 192)):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(export_skeletons, "BLOCK", block)
        found[folder] = read_skeletons(export(tmp_path / folder, ids, "swc"))
    assert [*found["cut"]] == [*found["whole"]] == sorted(map(str, range(1, 9)))
    for name, cut in found["cut"].items():
        mask = ids == int(name)
        assert trees(cut) == trees(found["whole"][name]) == cc3d.connected_components(mask, return_N=True)[1]
        assert are_inside(cut, mask)
    cut, whole = (sum(one.lengths.sum() for one in found[folder].values()) for folder in found)
    assert cut == pytest.approx(whole, rel=0.1)


def test_what_is_thicker_than_the_context_is_one_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(export_skeletons, "BLOCK", 25)
    monkeypatch.setattr(export_skeletons, "CONTEXT_VOXELS", (4, 4))
    ids = within(straight((0.5, 0.5, 0.1), (0.5, 0.5, 0.9)), 500)
    (skeleton,) = read_skeletons(export(tmp_path, ids.astype(np.uint64), "swc")).values()
    assert trees(skeleton) == 1
    assert np.ptp(skeleton.points, axis=0)[2] > 500
    assert are_inside(skeleton, ids)
    assert (skeleton.radii < 500).all()


def test_small_segments_have_one_point(tmp_path, blocks):
    ids = np.zeros(SHAPE, np.uint64)
    ids[31, 31, 31], ids[31:33, 31:33, 95:97] = 7, BIG  # at the corner of a block, and across eight
    ids[10, 40, 20:100] = 8  # one voxel thick
    ids[40, 5, 5] = ids[40, 5, 9] = 9  # two parts
    ids[:2] = np.uint64(2**64 - 1)  # unlabeled
    out = export(tmp_path, ids, "swc")
    found = read_skeletons(out)
    assert sorted(found) == sorted(map(str, (7, 8, 9, BIG)))
    assert found["7"].points.tolist() == [[300 + 31.5 * 30, -40 + 31.5 * 20, 70 + 31.5 * 10]]
    assert (out / "7.swc").read_text().splitlines()[-1] == "1 0 385 590 1245 10 -1"
    assert len(found[str(BIG)].points) <= 2
    assert found["8"].lengths.sum() == pytest.approx(79 * 10)
    assert (len(found["9"].points), len(found["9"].edges)) == (2, 0)


def test_full_and_empty_volumes(tmp_path):
    full = np.ones((6, 7, 8), np.uint32)
    (skeleton,) = read_skeletons(export(tmp_path, full, "swc")).values()
    assert np.isfinite(skeleton.radii).all()
    (tmp_path / "empty").mkdir()
    assert not list(export(tmp_path / "empty", full * 0, "swc").iterdir())
    out = export(tmp_path / "empty", full * 0, "precomputed", skeletons=True)
    assert [file.name for file in (out / "skeletons").iterdir()] == ["info"]


def test_regions_and_new_ids(tmp_path):
    ids = np.zeros(SHAPE, np.uint64)
    ids[10, 40, 20:100] = BIG
    out = export(tmp_path, ids, "swc", region="300:900,-40:1160,370:570", renumbered=True)
    (points,) = (skeleton.points for skeleton in read_skeletons(out).values())
    assert [file.name for file in out.iterdir()] == ["1.swc"]
    assert (points.min(axis=0).tolist(), points.max(axis=0).tolist()) == ([615, 770, 375], [615, 770, 565])


def test_command_line_and_refusals(tmp_path):
    ids = np.zeros(SHAPE, np.uint64)
    ids[10, 40, 20:100] = 3
    write_array(tmp_path / "in.zarr", SEGMENTATION, ids, voxel_size=VOXEL_SIZE, offset=OFFSET)
    write_array(tmp_path / "in.zarr", RAW, ids.astype(np.uint8), voxel_size=VOXEL_SIZE, offset=OFFSET)
    negative = np.full((2, 2, 2), -3, np.int64)
    write_array(tmp_path / "negative.zarr", SEGMENTATION, negative, voxel_size=VOXEL_SIZE, offset=OFFSET)
    command = [sys.executable, str(CHECKOUT / "data_utils" / "export.py"), str(tmp_path / "in.zarr"), "--to"]
    last = ["precomputed", str(tmp_path / "out"), "--skeletons"]
    done = subprocess.run([*command, *last], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    export_dataset(
        tmp_path / "in.zarr", tmp_path / "out", to="precomputed", dataset=SEGMENTATION, overwrite=True, skeletons=True
    )
    assert [*read_precomputed(tmp_path / "out" / "skeletons")] == ["3"]
    for source, dataset, to, skeletons, message in [
        ("in.zarr", RAW, "swc", False, "skeletons are made of a segmentation, which volumes/raw is not"),
        ("in.zarr", RAW, "precomputed", True, "--skeletons is for a segmentation .*: leave it out for volumes/raw"),
        (
            "in.zarr",
            None,
            "swc",
            True,
            "--skeletons is for a segmentation that is written --to precomputed: leave it out",
        ),
        ("negative.zarr", None, "swc", False, "holds the id -3, which is no uint64 .*: .*--renumber or --to hdf5"),
    ]:
        with pytest.raises(UserError, match=message):
            export_dataset(
                tmp_path / source, tmp_path / "no", to=to, dataset=dataset, overwrite=False, skeletons=skeletons
            )
    assert not list(tmp_path.glob("*no"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.swc").write_text("1 0 1 2 3 1 -1\n")
    with pytest.raises(UserError, match="is not replaced, because it is no folder of SWC skeletons that"):
        export_dataset(tmp_path / "in.zarr", tmp_path / "mine", to="swc", dataset=None, overwrite=True)


def test_thinning_keeps_what_hangs_together():
    rng = np.random.default_rng(0)
    labels = np.argmax([gaussian_filter(rng.random((24, 40, 40)), 2) for _ in range(9)], axis=0).astype(np.uint64)
    labels[labels == 8] = BIG
    curves, differ = thin(labels), 0
    for one in np.unique(labels[labels != 0]):
        before, after = labels == one, curves & (labels == one)
        assert euler_number(before, 3) == euler_number(after, 3)
        assert cc3d.connected_components(before, return_N=True)[1] == cc3d.connected_components(after, return_N=True)[1]
        differ += (after != skeletonize(np.pad(before, 1))[1:-1, 1:-1, 1:-1].astype(bool)).sum()
    assert not (curves & (labels == 0)).any()
    assert curves.sum() < 0.1 * curves.size
    assert differ < 0.02 * curves.sum()
    assert thin(np.ones((2, 2, 1), np.uint8)).any()  # all four are at a side at once


def test_parts_are_joined_by_the_shortest_lines_and_twigs_left_out():
    line = np.array([[0, 0, x] for x in range(0, 100, 10)], float)
    twig, branch = np.array([[0, 20, 50.0]]), np.array([[0, y, 30] for y in range(20, 80, 10)], float)
    points = np.concatenate([line, twig, branch])
    whole = join(Skeleton(points, np.empty((0, 2), np.int64), np.full(len(points), 15.0)))
    assert trees(whole) == 1
    assert whole.lengths.sum() == pytest.approx(90 + 20 + 20 + 50)
    pruned = prune(whole, slack=1)  # 20 < 1.5 * 15 + 1 < 70
    assert sorted(map(tuple, pruned.points)) == sorted(map(tuple, np.concatenate([line, branch])))
    assert trees(pruned) == 1
