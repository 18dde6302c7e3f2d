"""Damaged and odd graphs and look-up tables, drawn at random: what is read is what was written, or is refused."""

import json
import tempfile
from pathlib import Path

import bson
import numpy as np
import pymongo
import pytest
from fuzz import damage, ends_well_or_in_one_line, fuzz, json_values
from hypothesis import given
from hypothesis import strategies as st

from lsdseg.engine.post.tables import KEY, check_lut, connected_segments, load_lut, save_lut
from lsdseg.rag import MongoStore, ParquetStore
from tests.mongodb import mongodb
from tests.test_rag import VOXELS, assert_same, joined, make_edges, make_nodes

BLOCKS = (0, 1)
EDGES = joined([make_edges(block) for block in BLOCKS])
NODES = np.arange(1, 3 * VOXELS, dtype=np.uint64)
LUT = connected_segments(NODES, [EDGES], [0.5])[0.5]
FILES = ["edges_mean/0/0/1.parquet", "settings.json", "edges_mean.json", "rows_edges_mean.json", "rows_nodes.json"]


def make_graph(store):
    for block in BLOCKS:
        store.write_nodes(block, *make_nodes(block))
        store.write_edges("mean", block, *make_edges(block))
    store.write_edges_record("mean", {"step": "03", "settings": {"MERGE_FUNCTION": "mean"}})
    store.finish_nodes()
    store.finish_edges("mean")


def use(store):
    """Everything that is read of a graph; returns its edges."""
    store.edges_record("mean")
    list(store.node_ids())
    store.read_nodes(*store.id_range(1))
    store.read_edges("mean", *store.id_range(1))
    edges = joined(store.edges("mean"))
    connected_segments(NODES, [edges], [0.5])
    return edges


@fuzz
@given(file=st.sampled_from(FILES[:1] * 4 + FILES), apply=damage())
def test_damaged_files_of_a_graph(file, apply):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sample.rag")
        make_graph(ParquetStore(path, VOXELS, "w"))
        (path / file).write_bytes(apply((path / file).read_bytes()))
        with ends_well_or_in_one_line():
            assert_same(use(ParquetStore(path, VOXELS)), EDGES)


@fuzz
@given(file=st.sampled_from(FILES[1:]), content=json_values)
def test_odd_records_of_a_graph(file, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sample.rag")
        make_graph(ParquetStore(path, VOXELS, "w"))
        (path / file).write_text(json.dumps(content))
        with ends_well_or_in_one_line():
            assert_same(use(ParquetStore(path, VOXELS)), EDGES)


@fuzz
@given(apply=damage(), compressed=st.booleans())
def test_damaged_look_up_tables(apply, compressed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seg.npz")
        if compressed:
            np.savez_compressed(path, **{KEY: LUT})
        else:
            save_lut(path, LUT)
        path.write_bytes(apply(path.read_bytes()))
        with ends_well_or_in_one_line():
            lut = load_lut(path)
            check_lut(path, lut)
            np.testing.assert_array_equal(lut, LUT)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mongodb(tmp_path_factory.mktemp("mongodb")) as uri, pymongo.MongoClient(uri) as client:
        yield uri, client.lsd_fuzz
        client.drop_database("lsd_fuzz")


integers = st.integers(-(2**63), 2**63 - 1)
values = st.recursive(
    st.none()
    | st.booleans()
    | integers
    | st.integers(-3, 9)
    | st.floats()
    | st.text(st.characters(codec="utf-8"))
    # Kinds of values that only databases have.
    | st.sampled_from([bson.Int64(7), bson.ObjectId(), bson.Decimal128("1.5"), bson.MinKey(), bson.Regex("a"), b"a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)
documents = st.fixed_dictionaries({}, optional=dict.fromkeys(["u", "v", "id", "merge_score", "center_z", "x"], values))


@fuzz
@given(table=st.sampled_from(["nodes", "edges_mean", "meta"]), document=documents, damaged=st.booleans())
def test_odd_documents(server, table, document, damaged):
    uri, database = server
    store = MongoStore(uri, database.name, "sample", VOXELS, "w")
    make_graph(store)
    collection = database[f"sample_{table}"]
    if damaged:  # a document loses its values or gets others
        collection.update_one({}, {"$set": document} if document else {"$unset": {"u": "", "id": "", "rows": ""}})
    else:
        collection.insert_one(dict(document))
    with ends_well_or_in_one_line():
        u, v, scores = use(MongoStore(uri, database.name, "sample", VOXELS))
        assert len(u) == len(EDGES[0])
        assert (u > 0).all()
        assert (u < v).all()
        assert not (np.abs(scores - 0.5) > 0.51).any()
