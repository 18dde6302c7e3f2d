"""The segmentation methods, INS_SEGMENT.METHOD: one class each, with everything in which they differ.

`config.implementations.METHODS` lists them. Methods hold no state: every call gets the section INS_SEGMENT as
``settings``, and the offsets of the predicted affinities.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from yacs.config import CfgNode

from lsdseg.config.implementations import MERGE_FUNCTIONS, METHODS, resolve
from lsdseg.data_utils.layout import FRAGMENTS, MUTEX_SEGMENTATION, segmentation_name
from lsdseg.engine.offsets import DIRECT_NEIGHBORS, Offset
from lsdseg.engine.post.affinities import direct_neighbors
from lsdseg.engine.post.agglomerate import agglomerate, default_merge_function, scoring_function
from lsdseg.engine.post.contacts import NO_LIMIT, Contacts, Limit, find_contacts
from lsdseg.engine.post.fragments import extract_fragments
from lsdseg.engine.post.limited import agglomerate_limited, limit_of
from lsdseg.engine.post.mutex import edge_biases, mutex_watershed
from lsdseg.engine.post.signed import find_signed_contacts
from lsdseg.errors import UserError

# The name of a dataset, its labels (uint64, z, y, x), and the attributes that say how they were made.
Segmentation = tuple[str, NDArray[np.uint64], dict[str, Any]]


class Method(ABC):
    """How affinities become fragments, edges between them, and segments.

    Attributes:
        name: the method's INS_SEGMENT.METHOD.
        merge_functions: names of the edges that it scores.
        takes_placement: whether its fragments use a placement, where one was predicted.
    """

    name: str
    merge_functions: Sequence[str]
    takes_placement: bool

    @abstractmethod
    def check(self, settings: CfgNode, offsets: Sequence[Offset]) -> None:
        """Raise UserError if fragments cannot be made by the settings, or not of affinities with these offsets."""

    @abstractmethod
    def channels(self, affinities: NDArray[Any], offsets: Sequence[Offset]) -> NDArray[Any]:
        """The channels (c, z, y, x) that the method takes, of all that were predicted."""

    @abstractmethod
    def reach(self, offsets: Sequence[Offset]) -> tuple[int, ...]:
        """Voxels along z, y, x by which a block must see beyond its faces to score its edges."""

    @abstractmethod
    def fragments(
        self,
        affinities: ArrayLike,
        settings: CfgNode,
        offsets: Sequence[Offset],
        mask: ArrayLike | None = None,
        placement: ArrayLike | None = None,
    ) -> NDArray[np.uint64]:
        """Fragments, uint64 (z, y, x), of the `channels`, where the mask is not 0; ids 1..n.

        The placement is what `extract_fragments` takes; methods that do not take one ignore it.
        """

    @abstractmethod
    def merge_function(self, settings: CfgNode) -> str:
        """The merge function that the settings choose, one of `merge_functions`; UserError if there is no such."""

    @abstractmethod
    def contacts(
        self,
        affinities: ArrayLike,
        fragments: ArrayLike,
        settings: CfgNode,
        offsets: Sequence[Offset],
        id_range: tuple[int, int],
    ) -> Contacts:
        """What a block says of its fragments, those with ids in a range, given the `channels` as far as they reach."""

    @abstractmethod
    def limit(self, settings: CfgNode) -> Limit:
        """What keeps large regions apart when the graph is agglomerated."""

    @abstractmethod
    def segmentation_names(self, settings: CfgNode) -> dict[float | None, str]:
        """Dataset of the segmentation at each threshold; under None if the method has no threshold."""

    @abstractmethod
    def segmentations(
        self,
        affinities: ArrayLike,
        settings: CfgNode,
        offsets: Sequence[Offset],
        mask: ArrayLike | None = None,
        placement: ArrayLike | None = None,
    ) -> Iterator[Segmentation]:
        """Segment a volume in memory, given the `channels`; fragments come first if the method keeps them.

        The mask and the placement are for `fragments`.
        """


class Waterz(Method):
    """Watershed, then hierarchical agglomeration with a merge function: one segmentation for each threshold."""

    name = "waterz"
    merge_functions = tuple(MERGE_FUNCTIONS)
    takes_placement = True

    def check(self, settings: CfgNode, offsets: Sequence[Offset]) -> None:
        """Any will do."""

    def channels(self, affinities: NDArray[Any], offsets: Sequence[Offset]) -> NDArray[Any]:
        return direct_neighbors(affinities, offsets)

    def reach(self, offsets: Sequence[Offset]) -> tuple[int, ...]:
        return (1, 1, 1)

    def fragments(
        self,
        affinities: ArrayLike,
        settings: CfgNode,
        offsets: Sequence[Offset],
        mask: ArrayLike | None = None,
        placement: ArrayLike | None = None,
    ) -> NDArray[np.uint64]:
        return extract_fragments(
            affinities,
            fragments_in_xy=settings.FRAGMENTS_IN_XY or DIRECT_NEIGHBORS[0] not in offsets,
            background_mask=settings.BACKGROUND_MASK,
            mask=mask,
            filter_fragments=settings.FILTER_FRAGMENTS,
            epsilon_agglomerate=settings.EPSILON_AGGLOMERATE,
            placement=placement,
        )

    def contacts(
        self,
        affinities: ArrayLike,
        fragments: ArrayLike,
        settings: CfgNode,
        offsets: Sequence[Offset],
        id_range: tuple[int, int],
    ) -> Contacts:
        return find_contacts(affinities, fragments, *id_range)

    def limit(self, settings: CfgNode) -> Limit:
        return limit_of(settings)

    def merge_function(self, settings: CfgNode) -> str:
        name = settings.MERGE_FUNCTION or default_merge_function(settings.THRESHOLDS, settings.EPSILON_AGGLOMERATE)
        scoring_function(name)
        return str(name)

    def segmentation_names(self, settings: CfgNode) -> dict[float | None, str]:
        """{0.55: "volumes/segmentation_055"}, one for each threshold.

        Raises:
            UserError: two thresholds are the same.
        """
        thresholds = settings.THRESHOLDS
        names: dict[float | None, str] = {threshold: segmentation_name(threshold) for threshold in thresholds}
        if len(set(names.values())) < len(thresholds):
            raise UserError(f"INS_SEGMENT.THRESHOLDS {list(thresholds)}: two are the same: drop one")
        return names

    def segmentations(
        self,
        affinities: ArrayLike,
        settings: CfgNode,
        offsets: Sequence[Offset],
        mask: ArrayLike | None = None,
        placement: ArrayLike | None = None,
    ) -> Iterator[Segmentation]:
        fragments = self.fragments(affinities, settings, offsets, mask, placement)
        yield FRAGMENTS, fragments, {}
        names, merge_function = self.segmentation_names(settings), self.merge_function(settings)
        arguments, limit = (affinities, fragments, settings.THRESHOLDS, merge_function), limit_of(settings)
        merged = agglomerate(*arguments) if limit == NO_LIMIT else agglomerate_limited(*arguments, limit)
        for threshold, labels in merged:
            yield names[threshold], labels, {"threshold": threshold, "merge_function": merge_function}


class Mutex(Method):
    """Mutex watershed on long-range affinities: no threshold, and one segmentation.

    In blocks its segments are the fragments, and the graph of the whole volume is segmented in the same way.
    """

    name = "mutex"
    merge_functions = ("mutex",)
    takes_placement = False

    def check(self, settings: CfgNode, offsets: Sequence[Offset]) -> None:
        edge_biases(offsets, settings.MUTEX_BIAS)

    def channels(self, affinities: NDArray[Any], offsets: Sequence[Offset]) -> NDArray[Any]:
        return affinities

    def reach(self, offsets: Sequence[Offset]) -> tuple[int, ...]:
        return tuple(int(n) for n in np.abs(offsets).max(axis=0).clip(1))

    def fragments(
        self,
        affinities: ArrayLike,
        settings: CfgNode,
        offsets: Sequence[Offset],
        mask: ArrayLike | None = None,
        placement: ArrayLike | None = None,
    ) -> NDArray[np.uint64]:
        return mutex_watershed(
            affinities,
            offsets=offsets,
            biases=settings.MUTEX_BIAS,
            background_mask=settings.BACKGROUND_MASK,
            mask=mask,
            filter_fragments=settings.FILTER_FRAGMENTS,
        )

    def merge_function(self, settings: CfgNode) -> str:
        return self.name

    def contacts(
        self,
        affinities: ArrayLike,
        fragments: ArrayLike,
        settings: CfgNode,
        offsets: Sequence[Offset],
        id_range: tuple[int, int],
    ) -> Contacts:
        biases = edge_biases(offsets, settings.MUTEX_BIAS)
        return find_signed_contacts(affinities, fragments, offsets, biases, *id_range)

    def limit(self, settings: CfgNode) -> Limit:
        return NO_LIMIT

    def segmentation_names(self, settings: CfgNode) -> dict[float | None, str]:
        return {None: MUTEX_SEGMENTATION}

    def segmentations(
        self,
        affinities: ArrayLike,
        settings: CfgNode,
        offsets: Sequence[Offset],
        mask: ArrayLike | None = None,
        placement: ArrayLike | None = None,
    ) -> Iterator[Segmentation]:
        labels = self.fragments(affinities, settings, offsets, mask)
        yield MUTEX_SEGMENTATION, labels, {"biases": edge_biases(offsets, settings.MUTEX_BIAS)}


def method_of(settings: CfgNode) -> Method:
    """The method that a section INS_SEGMENT chooses."""
    return _method(settings.METHOD)


def method_that_scores(merge_function: str) -> Method:
    """The method whose edges are scored by a merge function.

    Raises:
        UserError: there is no such merge function.
    """
    for method in map(_method, METHODS):
        if merge_function in method.merge_functions:
            return method
    known = [name for method in map(_method, METHODS) for name in method.merge_functions]
    raise UserError(f"no merge function {merge_function!r}: it can be {', '.join(known)}")


def _method(name: str) -> Method:
    method: Method = resolve(METHODS[name])()
    return method
