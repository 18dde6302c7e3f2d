"""What a tree of blocks leaves of a graph, level by level: python benchmarks/tree.py SAMPLE.zarr --block 48

Takes predicted affinities, or, without SAMPLE.zarr, those of a phantom of 4 x 4 x 4 blocks. Makes fragments block by
block, and agglomerates the graph of their contacts in a tree and at once, --repeats times. Prints what each level of
the tree leaves, CPU seconds, and whether both give the same edges.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lsdseg.data_utils.volumes import open_array, read
from lsdseg.engine.offsets import offsets_of
from lsdseg.engine.post.affinities import direct_neighbors
from lsdseg.engine.post.contacts import NO_LIMIT, Contacts, find_contacts, settle, simplified
from lsdseg.engine.post.graph import Edges, fragments_of_block
from lsdseg.engine.post.tree import Tree
from lsdseg.engine.sample import AFFINITIES
from made_up import phantom_with_affinities
from ratios import Rows, add_options, cpu_seconds, in_turns

CONTEXT = 16


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sample", type=Path, nargs="?")
    parser.add_argument("--block", type=int, default=48, help="voxels along each axis; what is left over is cut off")
    parser.add_argument("--merge-function", default="hist_quant_75")
    add_options(parser, repeats=1)
    args = parser.parse_args()
    rows = Rows(args.json)
    affinities = affinities_of(args.sample, args.block)
    grid = tuple(n // args.block for n in affinities.shape[1:])
    affinities = affinities[:, *(slice(n * args.block) for n in grid)]
    parts = contacts_of_blocks(affinities, grid, args.block)

    settle(simplified(parts[0, 0, 0], args.merge_function), args.merge_function)  # compiles
    count = sum(len(part.u) for part in parts.values())
    print(f"{len(parts)} blocks of {args.block}^3 voxels, {count} contacts")
    scores = {}

    def in_a_tree() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tree = Tree(Path(folder), grid, args.merge_function, NO_LIMIT)
            u, v, found = merge_in_a_tree(tree, parts, args.block)
        scores["in a tree"] = found[np.lexsort((v, u))]

    def at_once() -> None:
        whole, _ = Contacts.of_all([simplified(part, args.merge_function) for part in parts.values()])
        scores["at once"] = settle(whole, args.merge_function).scores

    costs = in_turns(args.repeats, *(partial(cpu_seconds, run) for run in (in_a_tree, at_once)))
    tree, once = ([1e6 * cost / count for cost in side] for side in costs)
    about = f"{len(parts)} blocks of {args.block}^3 voxels, {args.merge_function}"
    row = rows.add(
        f"agglomerate a graph in a tree, with all files: {about}", tree, "at once", once, unit="us per contact"
    )
    print(f"in a tree: {row['cost']:.1f} CPU us for each contact, with all files")
    print(f"at once: {row['other_cost']:.1f} CPU us for each contact")
    same = np.array_equal(*scores.values(), equal_nan=True)
    print(f"the edges are {'the same' if same else 'not the same'}")


def affinities_of(sample: Path | None, block: int) -> np.ndarray:
    """Return the affinities (3, z, y, x) of a sample, or of a phantom."""
    if sample is None:
        return phantom_with_affinities(4 * block)[1]
    array = open_array(sample, AFFINITIES)
    return direct_neighbors(read(array), offsets_of(array))


def merge_in_a_tree(tree: Tree, parts: dict[tuple[int, ...], Contacts], size: int) -> Edges:
    """Agglomerate {position: contacts} with as many levels as the grid has, and print what each of them leaves."""
    for number, (position, part) in enumerate(parts.items()):
        tree.settle_block(position, number, part)
    print(f"{'voxels':>7} {'nodes':>6} {'left':>8} {'share':>6}")
    level, left = 0, tree.size(0)
    count = sum(len(part.u) for part in parts.values())
    while True:
        nodes = tree.level_grid(level)
        print(f"{size * 2**level:7} {np.prod(nodes):6} {left:8} {left / count:6.2f}", flush=True)
        if max(nodes) <= 2:
            break
        level += 1
        for position in np.ndindex(tree.level_grid(level)):
            tree.settle_node(level, position)
        left = tree.size(level)
    tree.settle_top(level)
    for lower in range(level, 0, -1):
        for position in np.ndindex(tree.level_grid(lower)):
            tree.tell_node(lower, position)
    edges = [found[1] for position in parts if (found := tree.edges_of_block(position))]
    u, v, scores = (np.concatenate(columns) for columns in zip(*edges, strict=True))
    return u, v, scores


def contacts_of_blocks(affinities: np.ndarray, grid: tuple[int, ...], size: int) -> dict[tuple[int, ...], Contacts]:
    """Make the fragments of each block, and find what they touch: {position: contacts}."""
    shape = affinities.shape[1:]
    fragments, boxes = np.zeros(shape, np.uint64), {}
    for number, position in enumerate(tqdm(list(np.ndindex(grid)), desc="fragments", delay=10)):
        box = tuple(slice(at * size, (at + 1) * size) for at in position)
        around = tuple(
            slice(max(0, s.start - CONTEXT), min(n, s.stop + CONTEXT)) for s, n in zip(box, shape, strict=True)
        )
        context = [(s.start - a.start, a.stop - s.stop) for s, a in zip(box, around, strict=True)]
        found = fragments_of_block(affinities[:, *around], context=context, block=number, voxels_in_block=size**3)
        fragments[box], boxes[position] = found[0], box
    parts = {}
    for number, (position, box) in enumerate(boxes.items()):
        around = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)
        ids = number * size**3 + 1, (number + 1) * size**3
        parts[position] = find_contacts(affinities[:, *around], fragments[around], *ids)
    return parts


if __name__ == "__main__":
    main()
