"""Agglomeration of fragments with waterz: every threshold from one hierarchical merge."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import waterz
from numpy.typing import ArrayLike, NDArray

from lsdseg.config.implementations import MERGE_FUNCTIONS
from lsdseg.engine.post.affinities import float_affinities
from lsdseg.errors import UserError

QUEUE_BINS = 256  # histograms have as many bins, so a finer queue would order nothing better


def scoring_function(merge_function: str) -> str:
    """The waterz scoring function (a C++ type) of a merge function.

    A score is one minus an affinity: a threshold of 0.6 merges affinities of 0.4 and above. ``hist_quant_Q`` scores
    with the Q-th percentile of the affinities on the border of two fragments, ``mean`` with their mean; ``_initmax``
    starts each histogram from the largest affinity on the border only.

    Raises:
        UserError: there is no merge function of that name.
    """
    if merge_function not in MERGE_FUNCTIONS:
        raise UserError(
            f"no merge function {merge_function!r}: INS_SEGMENT.MERGE_FUNCTION can be {', '.join(MERGE_FUNCTIONS)}"
        )
    return MERGE_FUNCTIONS[merge_function]


def default_merge_function(thresholds: Sequence[float], epsilon_agglomerate: float) -> str:
    """``hist_quant_35`` if 0.35 is the first of the thresholds above ``epsilon_agglomerate``, and so on.

    Raises:
        UserError: no threshold is above, or there is no such merge function.
    """
    above = [t for t in thresholds if t > epsilon_agglomerate]
    if not above:
        raise UserError(
            f"no INS_SEGMENT.THRESHOLDS is above EPSILON_AGGLOMERATE {epsilon_agglomerate}; "
            "lower that, or name an INS_SEGMENT.MERGE_FUNCTION"
        )
    name = f"hist_quant_{round(above[0] * 100)}"
    scoring_function(name)
    return name


def agglomerate(
    affinities: ArrayLike, fragments: ArrayLike, thresholds: Sequence[float], merge_function: str
) -> Iterator[tuple[float, NDArray[np.uint64]]]:
    """Merge fragments up to every threshold; Funke et al., TPAMI 2019.

    Args:
        affinities: (3, z, y, x), channels z, y, x; uint8 in 0..255 or floating point in 0..1.
        fragments: (z, y, x), unsigned ids, 0 is background. waterz keeps a table as long as the largest id: number
            them 1..n.
        thresholds: scores up to which to merge, each in 0..1.
        merge_function: a name that `scoring_function` knows.

    Yields:
        (threshold, segmentation) in ascending order of the thresholds; the segmentation is uint64 (z, y, x), an array
        of its own. One merge goes through all thresholds, so only one segmentation is in memory if the caller keeps
        none.

    Raises:
        UserError: the merge function is unknown.
        ValueError: the affinities have another shape, type or range.
    """
    ascending = sorted(thresholds)
    copied = np.array(fragments, dtype=np.uint64, order="C")  # waterz merges in place
    stages = merge_stages(affinities, copied, ascending, merge_function)
    for threshold, segmentation in zip(ascending, stages, strict=True):
        yield threshold, np.array(segmentation)


def merge_stages(
    affinities: ArrayLike,
    fragments: NDArray[np.uint64],
    thresholds: Sequence[float],
    merge_function: str,
    **options: Any,
) -> Iterator[Any]:
    """Run waterz: what it yields when it has merged up to each of the ascending thresholds.

    Args:
        affinities: as for `agglomerate`.
        fragments: (z, y, x), C-contiguous, ids 1..n; changed in place.
        thresholds: ascending.
        merge_function: a name that `scoring_function` knows.
        options: further arguments of `waterz.agglomerate`.

    Raises:
        UserError: the merge function is unknown, or waterz does not ship it compiled and there is no compiler.
        ValueError: the affinities have another shape, type or range.
    """
    function = scoring_function(merge_function)
    try:
        stages = waterz.agglomerate(
            float_affinities(affinities),
            thresholds,
            fragments=fragments,
            scoring_function=function,
            discretize_queue=QUEUE_BINS,
            **options,
        )
        for _ in thresholds:
            with _silence():
                stage = next(stages)
            yield stage
    except Exception as error:
        if type(error).__name__ != "CompileError":  # a class of setuptools, under a name that changes with its version
            raise
        raise UserError(
            f"waterz does not ship the merge function {merge_function!r} compiled, and compiling it failed: correct "
            "its type in MERGE_FUNCTIONS, install a C++ compiler and the headers of Boost (Debian: g++, libboost-dev), "
            "or choose another merge function"
        ) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what waterz and its C++ print at every step out of the terminal and its progress bar."""
    stdout = os.dup(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
