"""Time look-up tables: make segments at all default thresholds from 10 million edges, and relabel a block with them.

    python benchmarks/luts.py

Edges arrive block by block, as a store provides them; "shuffled" is the worst case for the caches. Times are CPU
seconds on one core, without compilation. Memory is the peak of the whole process, including all edges. Relabeling is
the median of five runs on a block of 256^3 voxels, with the look-up table mapped from disk. In between, numpy copies
the block. Ids are in cubes of 8^3 voxels; "noise" has a different id at every voxel.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsdseg.config.defaults import get_cfg_defaults
from lsdseg.engine.post.tables import connected_segments, load_lut, relabel, save_lut
from ratios import Rows, add_options, cpu_seconds, in_turns

VOXELS_IN_BLOCK = 256**3
FRAGMENTS_IN_BLOCK = 20_000
EDGES_OF_FRAGMENT = 5

# u, v, scores.
Edges = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float32]]


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Return the CPU seconds that a call takes, and its result."""
    begin = time.process_time()
    result = function(*args)
    return time.process_time() - begin, result


def make_graph(edge_count: int, random: np.random.Generator) -> tuple[NDArray[np.uint64], Edges]:
    """Return the ids of all fragments, and edges between fragments with nearby numbers."""
    numbers = np.arange(edge_count // EDGES_OF_FRAGMENT)
    blocks, local = np.divmod(numbers, FRAGMENTS_IN_BLOCK)
    ids = (blocks * VOXELS_IN_BLOCK + local + 1).astype(np.uint64)
    u = np.repeat(numbers, EDGES_OF_FRAGMENT)
    v = np.minimum(u + random.integers(1, FRAGMENTS_IN_BLOCK, len(u), dtype=np.int64), numbers[-1])
    return ids, (ids[u], ids[v], random.random(len(u), dtype=np.float32))


def batches(edges: Edges, size: int = EDGES_OF_FRAGMENT * FRAGMENTS_IN_BLOCK) -> Iterator[Edges]:
    """Yield the edges block by block."""
    for begin in range(0, len(edges[0]), size):
        u, v, scores = edges
        part = slice(begin, begin + size)
        yield u[part], v[part], scores[part]


def main() -> None:
    """Measure, and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=10_000_000, help="number of edges (default %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    rows = Rows(args.json)

    random = np.random.default_rng(0)
    thresholds = get_cfg_defaults().INS_SEGMENT.THRESHOLDS
    ids, edges = make_graph(100 * EDGES_OF_FRAGMENT, random)
    relabel(ids, connected_segments(ids, [edges], thresholds)[thresholds[0]])  # compiles the code

    ids, edges = make_graph(args.edges, random)
    print(f"{len(edges[0]):,} edges, {len(ids):,} fragments, {len(thresholds)} thresholds")
    in_order, luts = timed(connected_segments, ids, batches(edges), thresholds)
    print(f"look-up tables, block by block  {in_order:8.2f} s")
    lut = luts.pop(thresholds[0])
    del luts
    order = random.permutation(len(edges[0]))
    for column in edges:
        column[:] = column[order]
    del order
    print(f"look-up tables, edges shuffled  {timed(connected_segments, ids, batches(edges), thresholds)[0]:8.2f} s")
    print(f"peak memory of the process      {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:8.2f} GB")

    block = len(ids) // FRAGMENTS_IN_BLOCK // 2
    first = block * VOXELS_IN_BLOCK  # this id belongs to the background
    cubes = random.integers(0, FRAGMENTS_IN_BLOCK + 1, (32, 32, 32), dtype=np.uint64)
    cubes = cubes.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    noise = random.integers(1, FRAGMENTS_IN_BLOCK + 1, (256, 256, 256), dtype=np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        save_lut(Path(folder) / "lut.npz", lut)
        mapped = load_lut(Path(folder) / "lut.npz")
        for name, local in (("cubes", cubes), ("noise", noise)):
            fragments = np.where(local > 0, local + np.uint64(first), 0)
            ours, copies = in_turns(
                5, partial(cpu_seconds, relabel, fragments, mapped), partial(cpu_seconds, fragments.copy)
            )
            row = rows.add(
                f"relabel a block of 256^3 voxels, {name}", ours, "copy of the block by numpy", copies, goal=2
            )
            print(f"relabeling a block of {name}     {fragments.size / row['cost'] / 1e6:8.0f} Mvoxel/s")


if __name__ == "__main__":
    main()
