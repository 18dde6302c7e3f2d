import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pymongo
import pytest

from lsdseg.config.implementations import resolve
from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import sample_name
from lsdseg.errors import UserError
from lsdseg.rag import STORES, MongoStore, ParquetStore, RagStore, open_store
from lsdseg.rag.store import columns_of, voxels_in_block
from tests.mongodb import TEST_URI, free_port, mongodb, own_server

VOXELS = 1000  # in a block
CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mongodb(tmp_path_factory.mktemp("mongodb")) as uri:
        yield uri


@pytest.fixture
def database(server):
    """A URI and the name of a database of this test alone."""
    name = f"lsd_test_{uuid.uuid4().hex[:12]}"
    yield server, name
    with pymongo.MongoClient(server) as client:
        client.drop_database(name)


@pytest.fixture(params=sorted(set(STORES.values())), ids=lambda opening: opening.partition(":open_")[2])
def open_graph(request, tmp_path):
    """A function that opens one graph (per sample) again and again, in each kind of store."""
    uri, name = ("", "unused") if request.param == STORES[""] else request.getfixturevalue("database")

    def opened(mode="r+", sample="sampleA", voxels=VOXELS):
        cfg = load_config(None, ["INS_SEGMENT.BLOCK_SIZE", f"({voxels}, 1, 1)", "DATA.DB_NAME", name])
        return resolve(request.param)(uri, cfg, tmp_path / f"{sample}.zarr", mode)

    return opened


def make_nodes(block, count=20):
    """Ids and centers of a block's fragments."""
    rng = np.random.default_rng(block % 2**32)
    ids = block * VOXELS + 1 + np.sort(rng.permutation(VOXELS)[:count])
    return ids.astype(np.uint64), rng.integers(-(10**12), 10**12, (count, 3))


def make_edges(block, count=30):
    """u, v and scores of a block's edges; some of them never merge."""
    rng = np.random.default_rng(block % 2**32)
    u = block * VOXELS + 1 + np.sort(rng.integers(0, VOXELS, count))
    v = u + 1 + np.arange(count)  # distinct pairs, some in the next block
    scores = rng.random(count, dtype=np.float32)
    scores[::7] = np.nan
    return u.astype(np.uint64), v.astype(np.uint64), scores


def in_order(arrays):
    """The rows of parallel columns, as one table in the order of the first two."""
    order = np.lexsort((arrays[1] if arrays[1].ndim == 1 else arrays[0], arrays[0]))
    return [array[order] for array in arrays]


def assert_same(found, expected):
    """The same rows in any order, with the same types."""
    for got, wanted in zip(in_order(found), in_order(expected), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def joined(batches):
    return [np.concatenate(column) for column in zip(*batches, strict=True)]


# Both stores


@pytest.mark.parametrize("block", [0, 7, 2**62 // VOXELS])
def test_rows_come_back_as_they_were_written(open_graph, block):
    open_graph().write_nodes(block, *make_nodes(block))
    open_graph().write_edges("mean", block, *make_edges(block))
    store = open_graph("r")
    assert_same(store.read_nodes(*store.id_range(block)), make_nodes(block))
    assert_same(store.read_edges("mean", *store.id_range(block)), make_edges(block))
    assert all(column.flags.writeable for column in store.read_edges("mean", *store.id_range(block)))


def test_a_block_that_is_written_again_replaces_its_own_rows(open_graph):
    store = open_graph()
    for block in (3, 4, 5):
        store.write_nodes(block, *make_nodes(block))
        store.write_edges("mean", block, *make_edges(block))
    for _ in range(2):
        store.write_nodes(4, *make_nodes(4, count=9))
        store.write_edges("mean", 4, *make_edges(4, count=11))
    everything = 0, 2**63
    assert_same(store.read_nodes(*everything), joined([make_nodes(3), make_nodes(4, count=9), make_nodes(5)]))
    assert_same(store.read_edges("mean", *everything), joined([make_edges(3), make_edges(4, count=11), make_edges(5)]))

    store.write_nodes(4, *make_nodes(4, count=0))
    store.write_edges("mean", 4, *make_edges(4, count=0))
    assert_same(store.read_nodes(*everything), joined([make_nodes(3), make_nodes(5)]))
    assert_same(store.read_edges("mean", *everything), joined([make_edges(3), make_edges(5)]))


def test_ranges_are_inclusive_and_cross_blocks(open_graph):
    store = open_graph()
    ids = np.array([1, 2, 1000, 1001, 2000, 2001, 9000], np.uint64)
    for block in range(9):
        mine = ids[(ids - 1) // VOXELS == block]
        store.write_nodes(block, mine, np.stack([mine] * 3, axis=1).astype(np.int64))
        store.write_edges("mean", block, mine, mine + 5, np.full(len(mine), 0.5, np.float32))
    for first, last in [(0, 0), (1, 1), (2, 1000), (1000, 1001), (1001, 2001), (2002, 8999), (0, 9000), (9001, 10**9)]:
        expected = ids[(ids >= first) & (ids <= last)]
        found, centers = store.read_nodes(first, last)
        assert sorted(found) == expected.tolist()
        assert centers.shape == (len(expected), 3)
        np.testing.assert_array_equal(centers[:, 1], found)
        assert sorted(store.read_edges("mean", first, last)[0]) == expected.tolist()


def test_streams_give_every_row_once(open_graph, monkeypatch):
    monkeypatch.setattr("lsdseg.rag.parquet.BATCH", 50)
    monkeypatch.setattr("lsdseg.rag.mongo.BATCH", 50)
    store = open_graph()
    blocks = [1_000_000, 0, 5, 999, 1000, 1001, 7_654_321]
    for block in blocks:
        store.write_nodes(block, *make_nodes(block))
        store.write_edges("mean", block, *make_edges(block))
    nodes = list(store.node_ids())
    edges = list(store.edges("mean"))
    assert 2 <= len(nodes) <= len(blocks)
    assert 2 <= len(edges) <= len(blocks)
    assert sorted(np.concatenate(nodes)) == sorted(np.concatenate([make_nodes(block)[0] for block in blocks]))
    assert_same(joined(edges), joined([make_edges(block) for block in blocks]))
    assert list(store.edges("hist_quant_50")) == []


def test_merge_functions_are_apart(open_graph):
    store = open_graph()
    store.write_edges("mean", 0, *make_edges(0))
    store.write_edges("hist_quant_50", 0, *make_edges(0, count=4))
    store.write_edges("hist_quant_50_initmax", 0, *make_edges(0, count=0))
    assert store.merge_functions() == ["hist_quant_50", "hist_quant_50_initmax", "mean"]
    store.drop_edges("hist_quant_50")
    assert store.merge_functions() == ["hist_quant_50_initmax", "mean"]
    assert_same(joined(store.edges("mean")), make_edges(0))
    assert len(store.read_edges("hist_quant_50_initmax", 0, VOXELS)[0]) == 0


def test_drop_removes_one_sample(open_graph):
    store, other = open_graph(), open_graph(sample="sampleAB")
    for graph in (store, other):
        graph.write_nodes(1, *make_nodes(1))
        graph.write_edges("mean", 1, *make_edges(1))
    store.drop()
    assert list(store.node_ids()) == []
    assert store.merge_functions() == []
    assert_same(joined(other.edges("mean")), make_edges(1))
    with pytest.raises(UserError, match="run 02_extract_fragments_blockwise"):
        open_graph("r")
    store.write_nodes(1, *make_nodes(1))
    assert_same(open_graph("r").read_nodes(1, 2 * VOXELS), make_nodes(1))


def test_mode_w_starts_over(open_graph):
    with pytest.raises(UserError, match="there is no graph"):
        open_graph("r")
    open_graph("r+").write_nodes(0, *make_nodes(0))
    assert len(open_graph("r+").read_nodes(1, VOXELS)[0]) == 20
    assert len(open_graph("w").read_nodes(1, VOXELS)[0]) == 0


def test_other_blocks_are_refused_but_to_read(open_graph):
    for block in (0, 1):
        open_graph("r+").write_nodes(block, *make_nodes(block))
    with pytest.raises(UserError, match=r"voxels_in_block 1000, now 512.*DROP_DS_MONGOTABLE"):
        open_graph("r+", voxels=512)
    ids, _ = open_graph("r", voxels=512).read_nodes(1001, 2000)
    assert sorted(ids.tolist()) == sorted(make_nodes(1)[0].tolist())
    open_graph("w", voxels=512)
    open_graph("r+", voxels=512)


def test_rows_of_another_block_are_refused(open_graph):
    store = open_graph()
    ids, centers = make_nodes(2)
    with pytest.raises(ValueError, match="block 1 owns the ids 1001 to 2000"):
        store.write_nodes(1, ids, centers)
    u, v, scores = make_edges(2)
    with pytest.raises(ValueError, match="smaller"):
        store.write_edges("mean", 2, v, u, scores)
    assert list(store.node_ids()) == []


def test_rows_that_get_lost_are_noticed(open_graph):
    store = open_graph()
    for block in (0, 1):
        store.write_nodes(block, *make_nodes(block))
        store.write_edges("mean", block, *make_edges(block))
    for _ in range(2):
        store.finish_nodes()
        store.finish_edges("mean")
    store = open_graph()
    assert_same(joined(store.edges("mean")), joined([make_edges(0), make_edges(1)]))
    lost = open_graph()
    lost.write_edges("mean", 1, *make_edges(1, count=0))
    for notice in (lambda: list(store.edges("mean")), lambda: store.finish_edges("mean")):
        with pytest.raises(UserError, match=r"edges_mean of .* has 30 rows where 60 were written: run 03"):
            notice()
    lost.write_nodes(1, *make_nodes(1, count=0))
    with pytest.raises(UserError, match=r"nodes of .* has 20 rows where 40 were written: run 02 and 03"):
        list(store.node_ids())

    store.drop_edges("mean")
    store.write_edges("mean", 0, *make_edges(0))
    store.finish_edges("mean")
    assert_same(joined(open_graph().edges("mean")), make_edges(0))
    store = open_graph("w")
    store.write_nodes(1, *make_nodes(1))
    store.finish_nodes()
    assert len(joined([[ids] for ids in open_graph("r").node_ids()])[0]) == 20


def test_a_graph_that_was_deleted_by_hand_can_be_made_anew(open_graph):
    store = open_graph()
    store.write_nodes(0, *make_nodes(0))
    store.finish_nodes()
    store._drop("nodes")
    store = open_graph("x")
    store.write_nodes(1, *make_nodes(1, count=3))
    store.finish_nodes()
    assert sum(map(len, open_graph("r").node_ids())) == 3


@pytest.mark.parametrize(
    ("table", "row", "reason"),
    [
        ("nodes", (0, 1, 1, 1), "the id 0"),
        ("edges_mean", (5, 5, 0.5), "not smaller"),
        ("edges_mean", (6, 5, 0.5), "not smaller"),
        ("edges_mean", (5, 6, np.inf), "not in 0..1"),
        ("edges_mean", (5, 6, -np.inf), "not in 0..1"),
        ("edges_mean", (5, 6, 2), "not in 0..1"),
    ],
)
def test_values_that_a_graph_cannot_have_are_refused(open_graph, table, row, reason):
    store = open_graph()
    columns = {name: np.array([x], kind) for (name, kind), x in zip(columns_of(table).items(), row, strict=True)}
    with pytest.raises(ValueError, match=reason):
        store._write(table, 0, list(columns.values()))
    store._replace(table, 0, columns)
    with pytest.raises(UserError, match=rf"{table} of .*{reason}.*: run 0"):
        list(store.node_ids() if table == "nodes" else store.edges("mean"))
    if row[0]:  # 0 is in the range of no block
        with pytest.raises(UserError, match=reason):
            store.read_edges("mean", 1, VOXELS)


@pytest.mark.parametrize(
    "record", ["text", [1], 7, {"made_from": 5}, {"made_from": "{"}, {"made_from": "[" * 10**5}, {}]
)
def test_odd_records_are_refused(tmp_path, record):
    store = ParquetStore(tmp_path / "sample.rag", VOXELS, "r+")
    store.write_edges("mean", 0, *make_edges(0))
    (tmp_path / "sample.rag/edges_mean.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        store.edges_record("mean")
    (tmp_path / "sample.rag/rows_edges_mean.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"damaged|30 rows where None were written"):
        list(store.edges("mean"))


def test_flipped_bits_in_a_block_are_noticed(tmp_path):
    store = ParquetStore(tmp_path / "sample.rag", VOXELS, "r+")
    store.write_edges("mean", 0, *make_edges(0))
    file = tmp_path / "sample.rag/edges_mean/0/0/0.parquet"
    content = file.read_bytes()
    scores = pq.read_metadata(file).row_group(0).column(2)
    at = scores.data_page_offset + scores.total_compressed_size - 4  # in the last score
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(UserError, match=r"0\.parquet cannot be read.*02 and 03"):
        store.read_edges("mean", 1, VOXELS)


def test_workers_on_the_same_block_leave_its_rows_once(open_graph):
    open_graph()

    def work():
        store = open_graph()
        for _ in range(5):
            store.write_edges("mean", 1, *make_edges(1))

    with ThreadPoolExecutor() as workers:
        for worker in [workers.submit(work) for _ in range(4)]:
            worker.result()
    assert_same(open_graph().read_edges("mean", 1, 2 * VOXELS), make_edges(1))


def test_a_killed_writer_is_made_good_by_writing_again(request, tmp_path, open_graph):
    """Kill a process that writes a block over and over, somewhere in the middle."""
    store = open_graph()
    if isinstance(store, ParquetStore):
        opening = f"ParquetStore({str(tmp_path / 'sampleA.rag')!r}, {VOXELS}, 'r+')"
    else:
        opening = "MongoStore({!r}, {!r}, 'sampleA', {}, 'r+')".format(*request.getfixturevalue("database"), VOXELS)
    writer = (
        "from lsdseg.rag import MongoStore, ParquetStore; from tests.test_rag import make_edges\n"
        f"store = {opening}\n"
        "while True:\n"
        "    store.write_edges('mean', 1, *make_edges(1, 500)); print('written', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", writer], cwd=CHECKOUT, stdout=subprocess.PIPE)
    for _ in range(3):
        assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if isinstance(store, ParquetStore):
        assert_same(store.read_edges("mean", 1, 2 * VOXELS), make_edges(1, 500))
    store.write_edges("mean", 1, *make_edges(1))
    store.finish_edges("mean")
    assert_same(joined(store.edges("mean")), make_edges(1))
    assert not list(tmp_path.rglob("*.partial"))


# Parquet files


def test_files_open_in_other_tools(tmp_path):
    store = ParquetStore(tmp_path / "sample.rag", VOXELS, "r+")
    for block in (0, 12_345):
        store.write_nodes(block, *make_nodes(block))
        store.write_edges("mean", block, *make_edges(block))
    store.write_nodes(7, *make_nodes(7, count=0))
    files = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.parquet"))
    assert files == [
        "sample.rag/edges_mean/0/0/0.parquet",
        "sample.rag/edges_mean/0/12/12345.parquet",
        "sample.rag/nodes/0/0/0.parquet",
        "sample.rag/nodes/0/12/12345.parquet",
    ]
    nodes = pa.dataset.dataset(tmp_path / "sample.rag" / "nodes", format="parquet").to_table()
    assert nodes.column_names == ["id", "center_z", "center_y", "center_x"]
    assert nodes["id"].type == pa.uint64()
    edges = pa.dataset.dataset(tmp_path / "sample.rag" / "edges_mean", format="parquet").to_table()
    assert edges.column_names == ["u", "v", "merge_score", "agglomerated"]
    assert edges["merge_score"].null_count == 2 * np.isnan(make_edges(0)[2]).sum()
    assert edges["agglomerated"].to_pylist() == [True] * 60


def test_only_the_files_of_a_range_are_opened(tmp_path):
    store = ParquetStore(tmp_path / "sample.rag", VOXELS, "r+")
    for block in (0, 1, 2):
        store.write_edges("mean", block, *make_edges(block))
    for block in (0, 2):
        (tmp_path / f"sample.rag/edges_mean/0/0/{block}.parquet").write_bytes(b"damaged")
    assert_same(store.read_edges("mean", *store.id_range(1)), make_edges(1))
    with pytest.raises(UserError, match=r"0\.parquet cannot be read.*02"):
        store.read_edges("mean", 1, 2 * VOXELS)
    with pytest.raises(UserError, match=r"0\.parquet cannot be read"):
        list(store.edges("mean"))


def test_foreign_and_truncated_files_are_refused(tmp_path):
    store = ParquetStore(tmp_path / "sample.rag", VOXELS, "r+")
    store.write_edges("mean", 0, *make_edges(0))
    file = tmp_path / "sample.rag/edges_mean/0/0/0.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"0\.parquet cannot be read"):
        store.read_edges("mean", 1, VOXELS)
    pq.write_table(pa.table({"u": ["one"], "v": ["two"]}), file)
    with pytest.raises(UserError, match=r"0\.parquet has other columns than u, v, merge_score"):
        store.read_edges("mean", 1, VOXELS)
    (tmp_path / "sample.rag" / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json cannot be read"):
        ParquetStore(tmp_path / "sample.rag", VOXELS)


def test_a_graph_without_a_record_can_only_be_read(tmp_path):
    ParquetStore(tmp_path / "sample.rag", VOXELS, "r+").write_nodes(0, *make_nodes(0))
    (tmp_path / "sample.rag" / "settings.json").unlink()
    assert len(ParquetStore(tmp_path / "sample.rag", VOXELS).read_nodes(1, VOXELS)[0]) == 20
    with pytest.raises(UserError, match="so it is read-only"):
        ParquetStore(tmp_path / "sample.rag", VOXELS, "r+")


def test_a_full_disk_leaves_the_old_rows(small_disk):
    disk = small_disk(400)
    store = ParquetStore(disk / "sample.rag", 10**9, "r+")
    store.write_edges("mean", 0, *make_edges(0))
    rng = np.random.default_rng(0)
    many = np.sort(rng.integers(1, 10**9, 10**5)).astype(np.uint64)
    with pytest.raises(UserError, match=r"cannot write .*0\.parquet: .*No space left on device"):
        store.write_edges("mean", 0, many, many + 1, rng.random(10**5, dtype=np.float32))
    assert_same(store.read_edges("mean", 1, 10**9), make_edges(0))
    assert not list(disk.rglob("*.partial"))


def test_a_read_only_disk_is_named(small_disk):
    disk = small_disk(400)
    ParquetStore(disk / "old.rag", VOXELS, "r+").write_nodes(0, *make_nodes(0))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for attempt in (
        lambda: ParquetStore(disk / "new.rag", VOXELS, "r+"),
        lambda: ParquetStore(disk / "old.rag", VOXELS, "w"),
        lambda: ParquetStore(disk / "old.rag", VOXELS, "r+").write_nodes(0, *make_nodes(0)),
        lambda: ParquetStore(disk / "old.rag", VOXELS, "r+").write_nodes(0, *make_nodes(0, count=0)),
    ):
        with pytest.raises(UserError, match=f"cannot write {disk}.*Read-only file system"):
            attempt()
    assert len(ParquetStore(disk / "old.rag", VOXELS, "r").read_nodes(1, VOXELS)[0]) == 20


def test_files_take_ids_that_need_all_64_bits(tmp_path):
    block = (2**64 - 1) // VOXELS - 1
    store = ParquetStore(tmp_path / "sample.rag", VOXELS, "r+")
    store.write_nodes(block, *make_nodes_at(block))
    assert_same(store.read_nodes(*store.id_range(block)), make_nodes_at(block))


def make_nodes_at(block):
    return np.array([block * VOXELS + 5], np.uint64), np.zeros((1, 3), np.int64)


# MongoDB


def test_ids_that_mongodb_cannot_hold_are_refused(database):
    store = MongoStore(*database, "sampleA", VOXELS, "r+")
    block = 2**63 // VOXELS + 1
    with pytest.raises(UserError, match=r"too large for MongoDB.*DATA\.DB_HOST empty"):
        store.write_nodes(block, *make_nodes_at(block))


def test_documents_have_the_published_layout(database):
    uri, name = database
    store = MongoStore(uri, name, "sampleA", VOXELS, "r+")
    store.write_nodes(0, *make_nodes(0))
    store.write_edges("hist_quant_50", 0, *make_edges(0))
    store.finish_nodes()
    store.finish_edges("hist_quant_50")
    with pymongo.MongoClient(uri) as client:
        assert set(client[name].list_collection_names()) == {
            "sampleA_nodes",
            "sampleA_edges_hist_quant_50",
            "sampleA_meta",
        }
        node = client[name].sampleA_nodes.find_one({}, {"_id": False})
        edges = list(client[name].sampleA_edges_hist_quant_50.find({}, {"_id": False}))
        unique = [index["key"] for index in client[name].sampleA_nodes.list_indexes() if index.get("unique")]
    assert set(node) == {"id", "center_z", "center_y", "center_x"}
    assert all(isinstance(value, int) for value in node.values())
    assert set(edges[0]) == {"u", "v", "merge_score", "agglomerated"}
    assert {edge["agglomerated"] for edge in edges} == {True}
    assert sum(edge["merge_score"] is None for edge in edges) == np.isnan(make_edges(0)[2]).sum()
    assert {"id": 1} in unique


def test_a_graph_of_other_scripts_can_be_read(database):
    uri, name = database
    with pymongo.MongoClient(uri) as client:
        nodes = client[name].crop_nodes
        nodes.create_index("id", name="id", unique=True)
        nodes.insert_many([{"id": i, "center_z": 40.0 * i, "center_y": 7.6, "center_x": 3} for i in (5, 6, 7)])
        client[name].crop_edges_mean.insert_many(
            [
                {"u": 5, "v": 6, "merge_score": 0.25, "agglomerated": True},
                {"u": 6, "v": 7, "merge_score": None, "agglomerated": True},
            ]
        )
        client[name].crop_meta.insert_one({"directed": False, "total_roi_offset": None})
    store = MongoStore(uri, name, "crop", VOXELS, "r")
    assert_same(
        store.read_nodes(6, 7), [np.array([6, 7], np.uint64), np.array([[240, 8, 3], [280, 8, 3]], dtype=np.int64)]
    )
    expected = [np.array([5, 6], np.uint64), np.array([6, 7], np.uint64), np.array([0.25, np.nan], np.float32)]
    assert_same(joined(store.edges("mean")), expected)
    with pytest.raises(UserError, match="written by other scripts, so it is read-only"):
        MongoStore(uri, name, "crop", VOXELS, "r+")
    assert list(MongoStore(uri, name, "crop", VOXELS, "w").node_ids()) == []


def test_foreign_documents_are_refused(database):
    uri, name = database
    with pymongo.MongoClient(uri) as client:
        client[name].crop_nodes.insert_one({"id": 5, "position": "here"})
    with pytest.raises(UserError, match=r"collection crop_nodes .* is not part of a region adjacency graph"):
        MongoStore(uri, name, "crop", VOXELS).read_nodes(1, 10)


@pytest.mark.parametrize("odd", [-5, 2.5, "5", True, None, [5]])
def test_odd_ids_in_documents_are_refused(database, odd):
    uri, name = database
    with pymongo.MongoClient(uri) as client:
        client[name].crop_nodes.insert_one({"id": odd, "center_z": 1, "center_y": 1, "center_x": 1})
    with pytest.raises(UserError, match=r"documents have no numbers id that it can have"):
        list(MongoStore(uri, name, "crop", VOXELS).node_ids())


def test_the_graph_of_another_output_is_refused(database, tmp_path, monkeypatch):
    monkeypatch.setenv("LSD_DB_URI", database[0])
    cfg = load_config(None, ["DATA.DB_NAME", database[1]])
    store = open_store(cfg, tmp_path / "checkpoint_1" / "sample_A.zarr", "r+")
    store.write_nodes(0, *make_nodes(0))
    with pytest.raises(UserError, match=r"output \S*/checkpoint_1/sample_A\.zarr, now \S*/checkpoint_2/sample_A\.zarr"):
        open_store(cfg, tmp_path / "checkpoint_2" / "sample_A.zarr", "r+")


@pytest.mark.skipif(TEST_URI is not None, reason="stops the server")
def test_a_server_that_goes_away_is_waited_for(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lsdseg.rag.mongo.BATCH", 100)
    monkeypatch.setattr("lsdseg.rag.mongo.SELECTION_SECONDS", 0.5)
    count = 20
    begun, back = threading.Event(), threading.Event()
    with own_server(tmp_path) as server, ThreadPoolExecutor() as workers:
        store = MongoStore(server.uri, "graphs", "sampleA", VOXELS, "r+")

        def write_until_it_is_back():
            for number in itertools.count():
                if back.is_set() and number > count:
                    return
                store.write_edges("mean", number % count, *make_edges(number % count))
                begun.set()

        worker = workers.submit(write_until_it_is_back)
        begun.wait(timeout=60)
        away_for_a_while(server)
        back.set()
        worker.result()
        assert f"MongoDB at 127.0.0.1:{server.port} has not answered for" in caplog.text
        expected = joined([make_edges(block) for block in range(count)])
        assert_same(store.read_edges("mean", 0, 2**62), expected)

        batches = store.edges("mean")
        first = next(batches)
        away_for_a_while(server)
        assert_same(joined([first, *batches]), expected)


def test_a_worker_that_starts_while_the_server_is_away_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lsdseg.rag.mongo.SELECTION_SECONDS", 0.5)
    with own_server(tmp_path) as server, ThreadPoolExecutor() as threads:
        MongoStore(server.uri, "graphs", "sampleA", VOXELS, "r+").write_nodes(0, *make_nodes(0))
        server.stop()
        with pytest.raises(UserError, match="no MongoDB server answers"):
            MongoStore(server.uri, "graphs", "sampleA", VOXELS, "r+")
        monkeypatch.setenv("LSD_WORKER", "1")
        worker = threads.submit(MongoStore, server.uri, "graphs", "sampleA", VOXELS, "r+")
        time.sleep(2)
        assert not worker.done()
        server.start()
        assert_same(worker.result(timeout=60).read_nodes(0, 2**62), make_nodes(0))


def away_for_a_while(server):
    server.stop()
    time.sleep(2)
    server.start()


@pytest.mark.skipif(TEST_URI is not None, reason="makes an account on the server")
def test_credentials_work_and_show_nowhere(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("lsdseg.rag.mongo.SELECTION_SECONDS", 1)
    monkeypatch.setattr("lsdseg.rag.mongo.RETRY_SECONDS", 1)
    seen = []

    def refusal(uri, message):
        with pytest.raises(UserError, match=message) as caught:
            MongoStore(uri, "graphs", "sampleA", VOXELS, "r+")
        seen.extend(traceback.format_exception(caught.value))

    with own_server(tmp_path) as server:
        with pymongo.MongoClient(server.uri) as client:
            client.admin.command("createUser", "ann", pwd="tops3cret", roles=["root"])
        server.stop()
        server.start("--auth")
        refusal(server.uri, "does not accept the user name or password")
        refusal(server.uri.replace("//", "//ann:tops3cretly@"), f"127.0.0.1:{server.port} does not accept the user")
        store = MongoStore(server.uri.replace("//", "//ann:tops3cret@"), "graphs", "sampleA", VOXELS, "r+")
        store.write_nodes(0, *make_nodes(0))
        seen.extend([repr(store), str(store), repr(vars(store))])
        server.stop()
        with pytest.raises(UserError, match=f"no MongoDB server answers at 127.0.0.1:{server.port}") as caught:
            store.write_nodes(0, *make_nodes(0))
        seen.extend(traceback.format_exception(caught.value))
    refusal("mongodb://ann:tops3cret/@127.0.0.1:x", "cannot be used: it must be HOST:PORT")
    refusal("mongodb://ann:tops3cret@127.0.0.1/?tlsCAFile=/no/such.pem", "cannot be used: .* tlsCAFile")
    assert f"127.0.0.1:{server.port}" in "".join(seen)
    assert "tops3cret" not in "".join(seen)
    assert "tops3cret" not in caplog.text


@pytest.mark.skipif(TEST_URI is not None, reason="starts a server with TLS")
def test_tls_as_the_uri_gives_it(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
        + ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    options = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    with own_server(tmp_path / "server", *options) as server:
        store = MongoStore(f"{server.uri}/?tls=true&tlsCAFile={certificate}", "graphs", "sampleA", VOXELS, "r+")
        store.write_nodes(0, *make_nodes(0))
        assert len(store.read_nodes(1, VOXELS)[0]) == 20
        monkeypatch.setattr("lsdseg.rag.mongo.SELECTION_SECONDS", 1)
        with pytest.raises(UserError, match="TLS options"):
            MongoStore(f"{server.uri}/?tls=true", "graphs", "sampleA", VOXELS, "r")


def test_no_server_is_said_within_ten_seconds(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(UserError, match=f"no MongoDB server answers at {address}"):
        open_store(load_config(None, ["DATA.DB_HOST", address]), tmp_path / "sample.zarr", "r+")
    assert time.monotonic() - began < 10


# Choice of the store


def test_the_store_follows_the_config(tmp_path, database, monkeypatch):
    monkeypatch.delenv("LSD_DB_URI", raising=False)
    output = tmp_path / "sample_A-padded.zarr"
    block_size = ["INS_SEGMENT.BLOCK_SIZE", "(10, 10, 10)"]
    store = open_store(load_config(None, block_size), output, "r+")
    assert isinstance(store, ParquetStore)
    assert str(store) == str(tmp_path / "sample_A-padded.rag")
    assert json.loads((tmp_path / "sample_A-padded.rag" / "settings.json").read_text()) == {"voxels_in_block": 1000}

    uri, name = database
    cfg = load_config(None, [*block_size, "DATA.DB_HOST", "127.0.0.1:1", "DATA.DB_NAME", name])
    monkeypatch.setenv("LSD_DB_URI", uri)
    store = open_store(cfg, output, "r+")
    assert isinstance(store, MongoStore)
    assert "sampleAPadded" in str(store)
    assert store.id_range(2) == (2001, 3000)


def test_a_uri_with_an_unknown_scheme_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("LSD_DB_URI", raising=False)
    cfg = load_config(None, ["DATA.DB_HOST", "postgres://ann:tops3cret@127.0.0.1/graphs"])
    with pytest.raises(UserError, match=r"postgres://.*use mongodb://, mongodb\+srv:// or HOST:PORT") as caught:
        open_store(cfg, tmp_path / "sample.zarr", "r+")
    assert "\n" not in str(caught.value)
    assert "tops3cret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("uri", ["ann:tops3cret@127.0.0.1:x", "mongodb://127.0.0.1:x", "mongodb+srv://127.0.0.1:x"])
def test_mongodb_opens_its_schemes_and_bare_addresses(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("LSD_DB_URI", uri)
    with pytest.raises(UserError, match=r"the MongoDB URI .* cannot be used"):
        open_store(load_config(), tmp_path / "sample.zarr", "r+")


def test_libraries_of_a_store_are_imported_when_it_is_opened(tmp_path):
    script = (
        "import sys, lsdseg.rag\n"
        "from lsdseg.config.loader import load_config\n"
        "def loaded(): return {'pymongo', 'pyarrow'} & set(sys.modules)\n"
        "assert not loaded(), loaded()\n"
        f"lsdseg.rag.open_store(load_config(), {str(tmp_path / 'sample.zarr')!r}, 'r+')\n"
        "assert loaded() == {'pyarrow'}, loaded()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LSD_DB_URI"}
    subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, env=environment, check=True)


class ToyStore(RagStore):
    """Blocks of tables in memory: all that a store has to implement."""

    saved = {}  # URI -> {table: {block: columns}}, and the records under "records"

    def __init__(self, uri, voxels, mode):
        self._uri = uri
        self._tree = self.saved.setdefault(uri, {})
        super().__init__(mode, voxels)

    def __repr__(self):
        return self._uri

    def _tidy(self):
        pass

    def _count(self, table):
        return sum(len(next(iter(block.values()))) for block in self._tree.get(table, {}).values())

    def _replace(self, table, block, columns):
        self._tree.setdefault(table, {})[block] = columns

    def _read(self, table, first_id, last_id):
        blocks = list(self._tree.get(table, {}).values())
        key, *_ = names = columns_of(table)
        rows = {name: np.concatenate([np.empty(0, names[name]), *(b[name] for b in blocks)]) for name in names}
        inside = (rows[key] >= first_id) & (rows[key] <= last_id)
        return {name: column[inside] for name, column in rows.items()}

    def _stream(self, table, names):
        return ({name: block[name] for name in names} for block in self._tree.get(table, {}).values())

    def _tables(self):
        return [name for name in self._tree if name != "records"]

    def _drop(self, table):
        self._tree.pop(table, None)

    def _read_record(self, name):
        return self._tree.get("records", {}).get(name)

    def _write_record(self, name, record):
        self._tree.setdefault("records", {})[name] = record


def open_toy(uri, cfg, output, mode, fragments):
    return ToyStore(f"{uri}/{sample_name(output)}", voxels_in_block(cfg), mode)


def test_a_store_is_added_with_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(STORES, "toy", f"{__name__}:open_toy")
    monkeypatch.delenv("LSD_DB_URI", raising=False)
    uri = f"toy://{uuid.uuid4().hex}"
    cfg = load_config(None, ["INS_SEGMENT.BLOCK_SIZE", "(10, 10, 10)", "DATA.DB_HOST", uri])
    output = tmp_path / "sample_A.zarr"

    with pytest.raises(UserError, match=f"there is no graph {uri}/sampleA"):
        open_store(cfg, output)
    store = open_store(cfg, output, "r+")
    for block in (1, 2):
        store.write_nodes(block, *make_nodes(block))
        store.write_edges("mean", block, *make_edges(block))
    store.write_edges("mean", 2, *make_edges(2, count=7))
    store.finish_nodes()
    store.finish_edges("mean")

    store = open_store(cfg, output)
    assert str(store) == f"{uri}/sampleA"
    assert store.merge_functions() == ["mean"]
    assert_same(store.read_nodes(*store.id_range(1)), make_nodes(1))
    assert_same(joined(store.edges("mean")), joined([make_edges(1), make_edges(2, count=7)]))
    assert sum(map(len, store.node_ids())) == 40
    assert list(open_store(cfg, output, "w").node_ids()) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("sample_A-padded.zarr", "sampleAPadded"),
        ("/data/cremi.zarr", "cremi"),
        ("Zebra finch_2.zarr", "zebraFinch2"),
        ("cube01.v2.zarr", "cube01V2"),
    ],
)
def test_sample_name(path, name):
    assert sample_name(path) == name


def test_a_uri_without_its_slashes_is_refused(tmp_path):
    cfg = load_config(overrides=["DATA.DB_HOST", "mongodb:/localhost:27017"])
    with pytest.raises(UserError, match="begins with mongodb: but a URI begins with mongodb://"):
        open_store(cfg, tmp_path / "a.zarr", "w")
