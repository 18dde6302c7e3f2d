"""Measure how many edges per second the graph stores write and read, block by block and as one stream.

    python benchmarks/rag_stores.py
    python benchmarks/rag_stores.py --uri mongodb://localhost --edges 200000

Without --uri, the store is Parquet files in a temporary folder; --folder chooses the disk. Each pass runs three times,
and the median counts. In between, numpy writes the same columns as files of its own, and reads them; --json keeps the
ratios. The first write is shown separately, because writing again replaces the edges, as a block that is processed
twice does. The benchmark is one process, like a worker.
"""

import argparse
import os
import tempfile
import uuid
from functools import partial
from pathlib import Path

import numpy as np
import pymongo
from numpy.typing import NDArray

from lsdseg.rag import MongoStore, ParquetStore
from ratios import Rows, add_options, in_turns, wall_seconds

VOXELS_IN_BLOCK = 256**3
ROW = "{:<26}{:>14}{:>12}"

# u, v, scores.
Edges = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float32]]


def make_block(block: int, count: int) -> Edges:
    """Return u, v and scores of a block. Like fragments that touch, u and v have similar ids."""
    rng = np.random.default_rng(block)
    u = block * VOXELS_IN_BLOCK + 1 + np.sort(rng.integers(0, count // 5, count))
    v = u + np.arange(1, count + 1) % 5000 + 1
    return u.astype(np.uint64), v.astype(np.uint64), rng.random(count, dtype=np.float32)


def measure(store: MongoStore | ParquetStore, blocks: list[Edges], folder: Path, rows: Rows) -> None:
    """Write and read blocks, print the speed, and add rows that compare it with files of numpy in an empty folder."""
    edges = sum(len(u) for u, _, _ in blocks)

    def write() -> None:
        for block, arrays in enumerate(blocks):
            store.write_edges("mean", block, *arrays)

    def read_blocks() -> None:
        for block in range(len(blocks)):
            store.read_edges("mean", *store.id_range(block))

    def stream() -> None:
        assert sum(len(u) for u, _, _ in store.edges("mean")) == edges

    def save() -> None:
        for block, arrays in enumerate(blocks):
            np.savez(folder / f"{block}.npz", *arrays)

    def load() -> None:
        for block in range(len(blocks)):
            with np.load(folder / f"{block}.npz") as file:
                assert len(file["arr_0"]) + len(file["arr_1"]) + len(file["arr_2"])

    about = f"{type(store).__name__}, {len(blocks)} blocks of {edges // len(blocks)} edges"
    for name, action, by_numpy, repeats in [
        ("write, first time", write, save, 1),
        ("write again", write, save, 3),
        ("read block by block", read_blocks, load, 3),
        ("read as a stream", stream, load, 3),
    ]:
        seconds, numpy_seconds = in_turns(repeats, partial(wall_seconds, action), partial(wall_seconds, by_numpy))
        if repeats > 1:
            rows.add(f"{name}: {about}", seconds, "files of numpy", numpy_seconds)
        median = np.median(seconds)
        print(ROW.format(name, f"{edges / median / 1e6:.3f}", f"{1e3 * median / len(blocks):.2f}"), flush=True)


def main() -> None:
    """Measure one store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=5_000_000, help="number of edges (default %(default)s)")
    parser.add_argument("--edges-per-block", type=int, default=50_000, help="(default %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write files (default: the system's temporary folder)")
    parser.add_argument("--uri", help="measure this MongoDB server; the database is dropped afterwards")
    add_options(parser)
    args = parser.parse_args()
    rows = Rows(args.json)
    blocks = [make_block(b, args.edges_per_block) for b in range(max(args.edges // args.edges_per_block, 1))]
    print(f"{len(blocks)} blocks of {args.edges_per_block} edges; {os.cpu_count()} cores")
    print(ROW.format("", "M edges/s", "ms/block"))
    if args.uri:
        database = f"lsd_benchmark_{uuid.uuid4().hex[:12]}"
        try:
            with tempfile.TemporaryDirectory(dir=args.folder) as plain:
                measure(MongoStore(args.uri, database, "sample", VOXELS_IN_BLOCK, "r+"), blocks, Path(plain), rows)
        finally:
            pymongo.MongoClient(args.uri).drop_database(database)
    else:
        with (
            tempfile.TemporaryDirectory(dir=args.folder) as folder,
            tempfile.TemporaryDirectory(dir=args.folder) as plain,
        ):
            measure(ParquetStore(folder, VOXELS_IN_BLOCK, "r+"), blocks, Path(plain), rows)
            size = sum(file.stat().st_size for file in Path(folder).rglob("*.parquet"))
        print(f"{size / len(blocks) / args.edges_per_block:.1f} bytes per edge")


if __name__ == "__main__":
    main()
