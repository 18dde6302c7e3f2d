"""Time fragments and agglomeration of a block against the libraries that the published scripts call for them.

    python benchmarks/segmentation.py --edge 128

The block is a phantom's affinities with blur and noise. Fragments are compared with the distance transform and maximum
filter of scipy and the watershed of mahotas; without mahotas, there is no such row. Agglomeration as 03 does it,
contacts first and then the scores of all edges, is compared with waterz alone, which gives segments but no scores. So
is waterz with the scores that `score_edges` computes from its merges. Times are CPU seconds, taken in turns.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lsdseg.engine.post.affinities import float_affinities
from lsdseg.engine.post.agglomerate import agglomerate
from lsdseg.engine.post.contacts import find_contacts, settle, simplified
from lsdseg.engine.post.fragments import BOUNDARY, SEED_DISTANCE, extract_fragments
from lsdseg.engine.post.graph import score_edges
from made_up import phantom_with_affinities
from ratios import Rows, add_options, cpu_seconds, in_turns

MERGE_FUNCTION = "hist_quant_75"


def main() -> None:
    """Print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--edge", type=int, default=128, help="voxels of the block along each axis (default %(default)s)"
    )
    add_options(parser, repeats=5)
    args = parser.parse_args()
    rows, block = Rows(args.json), f"{args.edge}^3 voxels"
    affinities = float_affinities(phantom_with_affinities(args.edge)[1])
    fragments = extract_fragments(affinities)
    print(f"a block of {block}, {fragments.max()} fragments")

    if published := published_fragments():
        costs = in_turns_on(args.repeats, affinities, extract_fragments, published)
        rows.print(f"fragments of {block}", costs[0], "scipy and mahotas", costs[1], goal=0.17)
    else:
        print("mahotas is not installed, so fragments are not compared: pip install mahotas")

    def by_waterz(affinities: NDArray[np.float32]) -> None:
        list(agglomerate(affinities, fragments, [1], MERGE_FUNCTION))

    def by_contacts(affinities: NDArray[np.float32]) -> None:
        contacts = find_contacts(affinities, fragments, 1, int(fragments.max()))
        settle(simplified(contacts, MERGE_FUNCTION), MERGE_FUNCTION)

    def by_waterz_with_scores(affinities: NDArray[np.float32]) -> None:
        score_edges(affinities, fragments, MERGE_FUNCTION)

    costs = in_turns_on(args.repeats, affinities, by_contacts, by_waterz_with_scores, by_waterz)
    for name, cost in zip(("contacts, agglomerated with scores", "waterz with scores"), costs[:-1], strict=True):
        rows.print(f"{name}: {block}, {MERGE_FUNCTION}", cost, "waterz alone", costs[-1], goal=1.15)


def in_turns_on(
    repeats: int, affinities: NDArray[np.float32], *functions: Callable[[NDArray[np.float32]], object]
) -> list[list[float]]:
    """Return the CPU seconds of functions of the affinities, after a call of each that compiles or loads code."""
    for function in functions:
        function(affinities)
    return in_turns(repeats, *(partial(cpu_seconds, function, affinities) for function in functions))


def published_fragments() -> Callable[[NDArray[np.float32]], object] | None:
    """Return a function that makes fragments as the published scripts do; None without mahotas."""
    try:
        import mahotas
    except ImportError:
        return None

    def make(affinities: NDArray[np.float32]) -> None:
        distances = ndimage.distance_transform_edt(affinities.mean(axis=0) > BOUNDARY)
        maxima = ndimage.maximum_filter(distances, SEED_DISTANCE) == distances
        seeds, _ = ndimage.label(maxima)
        mahotas.cwatershed(distances.max() - distances, seeds)

    return make


if __name__ == "__main__":
    main()
