"""Agglomeration of fragments with waterz: every threshold from one hierarchical merge.

waterz compiles a merge function when it first meets it. Only those that it ships compiled are offered here,
so that no compiler is needed where the segmentation runs.
"""

import os
from contextlib import contextmanager, redirect_stdout

import numpy as np
import waterz

from lsdseg.errors import UserError

QUANTILES = range(10, 100, 5)
MERGE_FUNCTIONS = {"mean": "OneMinus<MeanAffinity<RegionGraphType, ScoreValue>>"} | {
    f"hist_quant_{q}{suffix}": (f"OneMinus<HistogramQuantileAffinity<RegionGraphType, {q}, ScoreValue, 256, {init}>>")
    for q in QUANTILES
    for suffix, init in (("", "false"), ("_initmax", "true"))
}
QUEUE_BINS = 256  # histograms have as many bins, so a finer queue would order nothing better


def scoring_function(merge_function):
    """The waterz scoring function (a C++ type) of a merge function.

    A score is one minus an affinity, so 0 merges first and a threshold of 0.6 merges affinities of 0.4 and
    above. ``hist_quant_Q`` scores with the Q-th percentile of the affinities on the border of two fragments,
    ``mean`` with their mean; ``_initmax`` starts each histogram from the largest affinity on the border only.

    Raises:
        UserError: a name that waterz does not ship compiled.
    """
    if merge_function not in MERGE_FUNCTIONS:
        raise UserError(
            f"no merge function {merge_function!r}; INS_SEGMENT.MERGE_FUNCTION can be mean, hist_quant_Q or "
            f"hist_quant_Q_initmax, with Q one of {', '.join(map(str, QUANTILES))}"
        )
    return MERGE_FUNCTIONS[merge_function]


def default_merge_function(thresholds, epsilon_agglomerate):
    """``hist_quant_35`` if 0.35 is the first of the thresholds above ``epsilon_agglomerate``, and so on.

    Raises:
        UserError: no threshold is above, or waterz ships no such quantile.
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


def float_affinities(affinities, channels=3):
    """Affinities as C-contiguous float32 in 0..1; uint8 is divided by 255.

    Raises:
        ValueError: another shape than (channels, z, y, x), another type, NaN, or values outside 0..1.
    """
    affinities = np.asarray(affinities)
    if affinities.ndim != 4 or affinities.shape[0] != channels:
        raise ValueError(f"affinities must have the shape ({channels}, z, y, x), not {affinities.shape}")
    if affinities.dtype == np.uint8:
        return affinities * np.float32(1 / 255)
    if affinities.dtype.kind != "f":
        raise ValueError(f"affinities must be uint8 or floating point, not {affinities.dtype}")
    if affinities.size and not (affinities.min() >= 0 and affinities.max() <= 1):
        raise ValueError("floating point affinities must lie in 0..1, without NaN")
    return np.ascontiguousarray(affinities, dtype=np.float32)


def agglomerate(affinities, fragments, thresholds, merge_function):
    """Merge fragments up to every threshold; Funke et al., TPAMI 2019.

    Args:
        affinities: (3, z, y, x), channels z, y, x; uint8 in 0..255 or floating point in 0..1. fragments: (z,
        y, x), 0 is background. waterz keeps a table as long as the largest id: number them 1..n. thresholds:
        scores up to which to merge, each in 0..1. merge_function: a name that `scoring_function` knows.

    Yields:
        (threshold, segmentation) in ascending order of the thresholds; uint64 (z, y, x), an array of its own.
        One merge goes through all thresholds, and only one segmentation is in memory if the caller keeps
        none.

    Raises:
        UserError: unknown merge function.
        ValueError: affinities of another type or range.
    """
    thresholds = sorted(thresholds)
    segmentations = waterz.agglomerate(
        float_affinities(affinities),
        thresholds,
        fragments=np.array(fragments, dtype=np.uint64, order="C"),  # a copy: waterz merges in place
        scoring_function=scoring_function(merge_function),
        discretize_queue=QUEUE_BINS,
    )
    for threshold in thresholds:
        with silence():
            segmentation = next(segmentations)
        yield threshold, segmentation.copy()


@contextmanager
def silence():
    """Keep what waterz and its C++ print at every step out of the terminal and its progress bar."""
    stdout = os.dup(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
