"""Tables of segments: in memory and block by block, always what a count of all voxels finds."""

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsdseg.data_utils import segment_tables, sorted_rows
from lsdseg.data_utils.records import Record
from lsdseg.data_utils.segment_tables import (
    NEIGHBORS,
    SEGMENTS,
    find_segment,
    finish_tables,
    read_table,
    remove_tables,
    require_tables,
    write_range,
    write_tables,
)
from lsdseg.data_utils.volumes import open_array, read, write_array
from lsdseg.engine.post import segments
from lsdseg.engine.post.segments import SegmentTree, segments_in, segments_of_volume
from lsdseg.errors import UserError

VOXEL_SIZE, OFFSET = (40, 8, 4), (400, -80, 4000)
DATASET = "volumes/segmentation_050"


def expected_tables(labels, voxel_size, offset, fragments=None, edges=None):
    """Both tables by brute force, as data frames. Edges are between fragments: u, v and scores."""
    rows = []
    size, begin = np.array(voxel_size), np.array(offset)
    for segment in np.unique(labels[labels > 0]):
        at = np.argwhere(labels == segment)
        low, high = at.min(axis=0), at.max(axis=0) + 1
        inside = np.nan if fragments is None else len(np.unique(fragments[labels == segment]))
        outer = bool((low == 0).any() or (high == labels.shape).any())
        nm = [*(begin + low * size), *(begin + high * size), *(begin + (at.mean(axis=0) + 0.5) * size)]
        rows.append([segment, len(at), *nm, inside, outer])
    names = [f"{what}_{axis}" for what in ("begin", "end", "center") for axis in "zyx"]
    table = pandas.DataFrame(rows, columns=["id", "voxels", *names, "fragments", "touches_face"])
    faces, scores = {}, {}
    for axis in range(3):
        here, before = np.moveaxis(labels, axis, 0)[1:], np.moveaxis(labels, axis, 0)[:-1]
        touching = (here != before) & (here > 0) & (before > 0)
        for pair in zip(here[touching].tolist(), before[touching].tolist(), strict=True):
            faces[tuple(sorted(pair))] = faces.get(tuple(sorted(pair)), 0) + 1
    if edges is not None:
        segment_of = dict(zip(fragments.ravel().tolist(), labels.ravel().tolist(), strict=True))
        for u, v, score in zip(*(column.tolist() for column in edges), strict=True):
            pair = tuple(sorted((segment_of[u], segment_of[v])))
            scores[pair] = np.fmin(score, scores.get(pair, np.nan))
    pairs = sorted(faces)
    columns = ["segment_a", "segment_b", "faces", "score"]
    touching = pandas.DataFrame([[*pair, faces[pair], scores.get(pair, np.nan)] for pair in pairs], columns=columns)
    return {SEGMENTS: table, NEIGHBORS: touching}


def assert_tables(output, dataset, fragments=None, edges=None):
    """Compare the tables of a segmentation on disk with a count of all voxels."""
    array = open_array(output, dataset)
    expected = expected_tables(read(array), array.voxel_size, array.offset, fragments, edges)
    folder = require_tables(output, dataset)
    for kind, table in expected.items():
        found = pandas.read_parquet(folder / kind)
        assert list(found.columns) == list(table.columns)
        pandas.testing.assert_frame_equal(found, table, check_dtype=False, rtol=1e-12)
    return expected


def random_labels(shape, seed, most=9):
    """Segments in pieces that may lie apart, fragments that each lie in one block of 4 voxels, and scored edges."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, most, [-(-size // 2) for size in shape]).astype(np.uint64)
    labels = np.kron(coarse, np.ones((2, 2, 2), np.uint64))[tuple(map(slice, shape))] * np.uint64(2**40 + 7)
    block = np.ravel_multi_index([index // 4 for index in np.indices(shape)], [-(-size // 4) for size in shape])
    keys = np.stack([labels.ravel(), block.ravel().astype(np.uint64)], axis=1)
    numbers = np.unique(keys, axis=0, return_inverse=True)[1].reshape(shape).astype(np.uint64) + np.uint64(1)
    fragments = np.where(labels > 0, numbers, np.uint64(0))
    ends = np.sort(rng.choice(np.unique(fragments[fragments > 0]), (40, 2)), axis=1)
    scores = np.where(rng.random(40) < 0.2, np.nan, rng.random(40)).astype(np.float32)
    return labels, fragments, (ends[:, 0], ends[:, 1], scores)


def in_blocks(tree, labels, fragments, edges, block=4):
    """Let every block count what it holds, in random order, and some of them twice."""
    segment_of = np.zeros(int(fragments.max()) + 1, np.uint64)
    segment_of[fragments] = labels
    padded = np.pad(labels, [(1, 0)] * 3)
    positions = list(np.ndindex(tree.grid))
    order = np.random.default_rng(0).permutation(len(positions) + 3) % len(positions)
    for position in (positions[n] for n in order):
        begin = [block * at for at in position]
        wide = padded[tuple(slice(b, b + block + 1) for b in begin)]
        own = fragments[tuple(slice(b, b + block) for b in begin)]
        ids = np.unique(own[own > 0])
        if len(ids):
            mine = np.isin(edges[0], ids)
            scored = (segment_of[edges[0][mine]], segment_of[edges[1][mine]], edges[2][mine])
            tree.write_block(position, segments_in(wide, begin, segment_of[ids], scored))


@settings(deadline=None, max_examples=6)
@given(
    shape=st.tuples(*[st.integers(1, 11)] * 3),
    seed=st.integers(0, 2**32 - 1),
    top=st.integers(0, 2),
    group=st.integers(2, 9),
    width=st.sampled_from([2**40, 2**42, 2**60]),
    slab=st.sampled_from([1, 200, 2**24]),
)
def test_blocks_and_memory_give_what_a_count_of_all_voxels_finds(
    tmp_path_factory, shape, seed, top, group, width, slab
):
    path = tmp_path_factory.mktemp("segments") / "a.zarr"
    labels, fragments, edges = random_labels(shape, seed)
    array = write_array(path, DATASET, labels, voxel_size=VOXEL_SIZE, offset=OFFSET)
    tree = SegmentTree(path.with_name("tree"), tuple(-(-size // 4) for size in shape), width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_rows, "GROUP", group)
        patch.setattr(segment_tables, "ROWS_IN_FILE", 2 * group)
        patch.setattr(segment_tables, "RANGES_IN_FOLDER", 2)
        patch.setattr(segments, "SLAB", slab)
        in_blocks(tree, labels, fragments, edges)
        for level in range(1, top + 1):
            for position in np.ndindex(tree.level_grid(level)):
                tree.merge_node(level, position)
        for number, found in enumerate(tree.ranges(top) or [0]):
            write_range(path, DATASET, array, number, tree.merge_range(top, found))
        finish_tables(path, DATASET, array, "a test")
        table = assert_tables(path, DATASET, fragments, edges)[SEGMENTS]
        folder = require_tables(path, DATASET)
        for segment in (0, 1, *table["id"].tolist(), 2**63):
            row = table[table["id"] == segment]
            found = find_segment(folder, segment)
            assert found is None if row.empty else found == pytest.approx(row.iloc[0].to_dict(), rel=1e-12)
        write_tables(path, DATASET, array, "a test", segments_of_volume(labels, fragments))
        assert_tables(path, DATASET, fragments)


def test_a_row_for_every_voxel_of_noise(tmp_path):
    labels = np.random.default_rng(0).permutation(np.arange(1, 16**3 + 1, dtype=np.uint64)).reshape(16, 16, 16)
    array = write_array(tmp_path / "a.zarr", DATASET, labels, voxel_size=VOXEL_SIZE, offset=OFFSET)
    write_tables(tmp_path / "a.zarr", DATASET, array, "a test", segments_of_volume(labels))
    assert len(assert_tables(tmp_path / "a.zarr", DATASET)[NEIGHBORS]) == 3 * 15 * 16 * 16


def test_a_volume_without_segments_has_empty_tables(tmp_path):
    labels = np.zeros((3, 4, 5), np.uint64)
    array = write_array(tmp_path / "a.zarr", DATASET, labels, voxel_size=VOXEL_SIZE, offset=OFFSET)
    parts = SegmentTree(tmp_path / "tree", (1, 1, 2), 9).merge_range(0, 0)
    for found in (segments_of_volume(labels), parts):
        assert write_tables(tmp_path / "a.zarr", DATASET, array, "a test", found) == {SEGMENTS: 0, NEIGHBORS: 0}
        folder = require_tables(tmp_path / "a.zarr", DATASET)
        assert pandas.read_parquet(folder / SEGMENTS).shape == (0, 13)
        assert not list(read_table(folder, NEIGHBORS))


def test_tables_that_are_not_of_the_segmentation_are_refused(tmp_path):
    path = tmp_path / "a.zarr"
    labels = random_labels((6, 6, 6), 0)[0]

    def write():
        made = Record("a test", {}, {}).attributes
        return write_array(path, DATASET, labels, voxel_size=VOXEL_SIZE, offset=OFFSET, attributes=made)

    write_tables(path, DATASET, write(), "a test", segments_of_volume(labels))
    folder = require_tables(path, DATASET)
    write()  # the same voxels, made anew
    with pytest.raises(UserError, match=f"{folder} is of another {DATASET} than the one in .*: make the segmentation"):
        require_tables(path, DATASET)

    write_tables(path, DATASET, open_array(path, DATASET), "a test", segments_of_volume(labels))
    (file,) = (folder / NEIGHBORS).glob("*/*/*.parquet")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        require_tables(path, DATASET)
    file.unlink()
    with pytest.raises(UserError, match="neighbors has 0 rows, and others were written"):
        require_tables(path, DATASET)
    remove_tables(path, DATASET)
    remove_tables(path, DATASET)
    with pytest.raises(UserError, match=f"there are no tables of the segments of {DATASET} in {folder}"):
        require_tables(path, DATASET)
