"""Time look-up tables in a tree of blocks, on a graph that is made up: python benchmarks/table_tree.py --grid 8

Every block has a cube of fragments (--edge 29: 24 389 of them). Each fragment touches its 26 neighbors, and each such
edge has a random score. Blocks and nodes are done one after the other, as a worker would do them. Prints CPU seconds
and the memory of this process, how much each level leaves, and the time to write and read the same bytes. All of this
is done --repeats times.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsdseg.engine.post.graph import Edges
from lsdseg.engine.post.table_tree import TableTree
from lsdseg.engine.post.tables import save_part
from ratios import Rows, add_options

THRESHOLDS = (0.02, 0.05, 0.1)
HALF = [step for step in product((-1, 0, 1), repeat=3) if step > (0, 0, 0)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=int, default=8, help="blocks along each axis")
    parser.add_argument("--edge", type=int, default=29, help="fragments of a block along each axis")
    add_options(parser, repeats=1)
    args = parser.parse_args()
    rows = Rows(args.json)
    grid, fragments = (args.grid,) * 3, (args.grid * args.edge) ** 3
    print(f"{fragments / 1e6:.1f} million fragments, about {13 * fragments / 1e6:.0f} million edges")
    with tempfile.TemporaryDirectory() as folder:
        settle_blocks(TableTree(Path(folder), (1, 1, 1), THRESHOLDS), 2)  # compiles
    runs = [measure(grid, args.edge) for _ in range(args.repeats)]
    ours, theirs = zip(*runs, strict=True)
    about = f"{len(THRESHOLDS)} thresholds, {args.grid}^3 blocks of {args.edge}^3 fragments"
    rows.add(f"look-up tables in a tree of blocks: {about}", ours, "write and read as many bytes", theirs, goal=3)
    print(
        json.dumps({"fragments": fragments, "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1000})
    )


def measure(grid: tuple[int, ...], edge: int) -> tuple[float, float]:
    """Make all tables. Returns the CPU seconds that it took, and the seconds to write and read as many bytes."""
    fragments = int(np.prod(grid)) * edge**3
    with tempfile.TemporaryDirectory() as folder:
        tree, tables = TableTree(Path(folder, "tree"), grid, THRESHOLDS), Path(folder, "tables")
        made, total = settle_blocks(tree, edge)
        report("blocks", total, fragments, tree.size(0))
        level = 0
        while np.prod(tree.level_grid(level)) > 1:
            level += 1
            began = time.process_time()
            for position in np.ndindex(tree.level_grid(level)):
                tree.settle_node(level, position)
            seconds = time.process_time() - began
            report(f"level {level}", seconds, fragments, tree.size(level))
            total += seconds
        began = time.process_time()
        tree.settle_top(level)
        for lower in range(level, 0, -1):
            for position in np.ndindex(tree.level_grid(lower)):
                tree.tell_node(lower, position)
        for position in np.ndindex(grid):
            for value, lut in (tree.tables_of_block(position) or {}).items():
                save_part(tables / str(value), position, grid, lut)
        seconds = time.process_time() - began
        report("down, and tables", seconds, fragments, 0)
        print(f"making up the graph took {made:.0f} s")
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.npz"))
        plain = stream(Path(folder, "copy"), size)
        print(f"{size / 1e9:.2f} GB of files, written and read again in {plain:.1f} s")
    return total + seconds, plain


def report(what: str, seconds: float, fragments: int, left: int) -> None:
    """Print a row."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    per = f"{1e6 * seconds / fragments:7.2f} us per fragment"
    print(f"{what:>17}: {seconds:7.1f} CPU s, {per}, {left / fragments:8.5f} left, {memory:.2f} GB", flush=True)


def settle_blocks(tree: TableTree, edge: int) -> tuple[float, float]:
    """Join the fragments of all blocks. Returns the CPU seconds that it took to make up the graph, and to do this."""
    made = settled = 0.0
    for position in np.ndindex(tree.grid):
        began = time.process_time()
        ids, own, near, ranges = block_of(position, tree.grid, edge)
        middle = time.process_time()
        tree.settle_block(position, ids, own, near, ranges)
        made, settled = made + middle - began, settled + time.process_time() - middle
    return made, settled


def block_of(
    position: tuple[int, ...], grid: tuple[int, ...], edge: int
) -> tuple[NDArray[np.uint64], Edges, Edges, Any]:
    """Return the fragments of a block, its own edges, those of its neighbors that reach it, and the ids of all."""
    around = list(product(*(range(max(0, at - 1), min(at + 2, size)) for at, size in zip(position, grid, strict=True))))
    numbers = [int(np.ravel_multi_index(place, grid)) for place in around]
    ranges = {number: (number * edge**3 + 1, (number + 1) * edge**3) for number in numbers}
    # All fragments of the block, and one layer around them.
    axes = [np.arange(at * edge - 1, (at + 1) * edge + 1) for at in position]
    at = np.stack(np.meshgrid(*axes, indexing="ij"))
    size = np.array([n * edge for n in grid])[:, None, None, None]
    block = np.ravel_multi_index(tuple(np.clip(at, 0, size - 1) // edge), grid)
    local = np.ravel_multi_index(tuple(np.clip(at, 0, size - 1) % edge), (edge,) * 3)
    ids = np.where(((at >= 0) & (at < size)).all(axis=0), block * edge**3 + local + 1, 0).astype(np.uint64)
    own = int(np.ravel_multi_index(position, grid))
    pairs = []
    for step in HALF:
        here = ids[*(slice(max(0, -d), len(a) - max(0, d)) for d, a in zip(step, axes, strict=True))]
        there = ids[*(slice(max(0, d), len(a) - max(0, -d)) for d, a in zip(step, axes, strict=True))]
        pairs.append(np.stack([here.ravel(), there.ravel()]))
    a, b = np.concatenate(pairs, axis=1)
    a, b = a[keep := (a > 0) & (b > 0)], b[keep]
    u, v = np.minimum(a, b), np.maximum(a, b)
    # The same score wherever an edge is seen.
    mixed = (u * np.uint64(0x9E3779B97F4A7C15)) ^ (v * np.uint64(0xC2B2AE3D27D4EB4F))
    scores = ((mixed * np.uint64(0xFF51AFD7ED558CCD)) >> np.uint64(40)).astype(np.float32) / 2**24
    first, last = ranges[own]
    owned, reached = (u >= first) & (u <= last), (v >= first) & (v <= last) & (u < first)
    return np.arange(first, last + 1, dtype=np.uint64), *((u[s], v[s], scores[s]) for s in (owned, reached)), ranges


def stream(path: Path, size: int) -> float:
    """Return the seconds it takes to write so many bytes to a file and read them again."""
    piece = os.urandom(2**24)
    began = time.monotonic()
    with open(path, "wb") as file:
        for _ in range(-(-size // len(piece))):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    with open(path, "rb") as read, open(os.devnull, "wb") as nowhere:
        shutil.copyfileobj(read, nowhere, 2**24)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
