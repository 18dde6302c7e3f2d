"""Agglomeration that keeps large segments apart, INS_SEGMENT.LARGE_SEGMENT. waterz knows no sizes."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from yacs.config import CfgNode

from lsdseg.engine.post.contacts import NO_LIMIT, Limit, find_contacts, settle, simplified
from lsdseg.engine.post.graph import LARGEST_ID
from lsdseg.engine.post.tables import connected_segments, relabel


def limit_of(settings: CfgNode) -> Limit:
    """The limit that a section INS_SEGMENT sets."""
    return Limit(settings.LARGE_SEGMENT, settings.LARGE_MERGE_THRESHOLD) if settings.LARGE_SEGMENT else NO_LIMIT


def agglomerate_limited(
    affinities: ArrayLike,
    fragments: NDArray[np.uint64],
    thresholds: Sequence[float],
    merge_function: str,
    limit: Limit,
) -> Iterator[tuple[float, NDArray[np.uint64]]]:
    """Merge fragments up to every threshold, but not two large regions above the limit.

    Takes, yields and raises what `agglomerate` does; segments have the smallest id of their fragments.
    """
    contacts = find_contacts(affinities, fragments, 1, LARGEST_ID)
    scores = settle(simplified(contacts, merge_function), merge_function, limit).scores
    ascending = sorted(thresholds)
    luts = connected_segments(contacts.sized_ids, [(contacts.u, contacts.v, scores)], ascending)
    for threshold in ascending:
        yield threshold, relabel(fragments, luts[threshold])
