"""Segmentation of whole volumes in memory: affinities from disk, segments by one of two methods, back to disk.

With waterz one merge goes through all thresholds, so a segmentation for each costs hardly more than one. Mutex
watershed has no threshold, and gives one segmentation.
"""

import time
from functools import partial

from tqdm import tqdm

from lsdseg.data_utils.layout import (
    FRAGMENTS,
    MUTEX_SEGMENTATION,
    block_markers,
    output_path,
    segmentation_name,
    volumes_in,
)
from lsdseg.data_utils.masks import open_mask, read_mask
from lsdseg.data_utils.volumes import rename_array, write_array
from lsdseg.engine.post.affinities import (
    AFFINITIES,
    MUTEX,
    NEIGHBORS,
    offsets_of,
    open_affinities,
    read_channels,
    spans_sections,
)
from lsdseg.engine.post.agglomerate import agglomerate, default_merge_function, float_affinities, scoring_function
from lsdseg.engine.post.fragments import extract_fragments
from lsdseg.engine.post.link import link_sections
from lsdseg.engine.post.mutex import edge_biases, mutex_watershed
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk


def segment(cfg):
    """Segment the predicted affinities of every volume in the test folder.

    Raises:
        UserError: before anything is written, if affinities are missing or a setting cannot be used.
    """
    outputs = [output_path(cfg, sample) for sample in volumes_in(cfg, "test")]
    for output in outputs:
        check_settings(cfg.INS_SEGMENT, offsets_of(open_affinities(output)))
    for number, output in enumerate(outputs, start=1):
        print(f"[{number}/{len(outputs)}] {output.name}", flush=True)
        began = time.monotonic()
        names = segment_volume(output, cfg)
        print(f"{', '.join(names)} in {output} ({time.monotonic() - began:.0f} s)")


def segment_volume(path, cfg):
    """Segment `volumes/pred_affs` of one zarr, in memory, by INS_SEGMENT.METHOD.

    waterz writes `volumes/fragments` and one `volumes/segmentation_055` per INS_SEGMENT.THRESHOLDS, with the attributes
    method, merge_function and threshold; mutex writes `volumes/segmentation_mutex`, with method and biases. All are
    uint64, 0 is background. INS_SEGMENT.LINK_SECTIONS links segments, but not fragments, across sections. Each dataset
    gets its name only when it is complete; those of the other method stay.

    Returns:
        The names of the datasets.

    Raises:
        UserError: before anything is written, if the affinities or a setting cannot be used.
    """
    settings = cfg.INS_SEGMENT
    array = open_affinities(path)
    check_settings(settings, offsets_of(array))
    mask = read_mask(open_mask(settings), array.roi, array.voxel_size)
    affinities = read_channels(array, settings.METHOD)
    try:
        affinities = float_affinities(affinities, len(affinities))
    except ValueError as error:
        raise UserError(f"{AFFINITIES} in {path}: {error}; run predicter.py again") from error

    names = []
    steps = 1 if settings.METHOD == MUTEX else 1 + len(settings.THRESHOLDS)
    with room_on_disk(path), tqdm(total=steps, desc=settings.METHOD, unit="step") as bar:
        for name, labels, attributes in segmentations(affinities, offsets_of(array), settings, mask):
            # Fragments that were made block by block stay: the region adjacency graph speaks of them.
            if name != FRAGMENTS or not block_markers(path, "fragments").is_dir():
                place = {"voxel_size": array.voxel_size, "offset": array.offset}
                write_array(path, f"{name}.partial", labels, **place, attributes=attributes)
                rename_array(path, f"{name}.partial", name)
            names.append(name)
            bar.set_description(name)
            bar.update()
    return names


def check_settings(settings, offsets):
    """Raise UserError if a section INS_SEGMENT cannot be used, or not for affinities with these offsets."""
    fragments_by(settings, offsets)
    configured_merge_function(settings)
    segment_names(settings)
    open_mask(settings)
    if settings.LINK_SECTIONS is not None and spans_sections(offsets):
        raise UserError(
            f"INS_SEGMENT.LINK_SECTIONS is {settings.LINK_SECTIONS}, but the affinities have offsets along z, which "
            "join sections already: leave it None"
        )
    if settings.LINK_SECTIONS is not None and max(settings.THRESHOLDS) == 1:
        raise UserError("INS_SEGMENT.THRESHOLDS has 1, which merges everything: drop it, to have sections to link")


def segmentations(affinities, offsets, settings, mask=None):
    """Segment a volume in memory by a section INS_SEGMENT.

    Args:
        affinities: float32 (c, z, y, x) in 0..1, the `channels_for` METHOD.
        offsets: (z, y, x) of each channel of the prediction that they come from.
        mask: (z, y, x); segments are made where it is not 0.

    Yields:
        Name, labels (uint64, z, y, x) and attributes of every dataset that `segment_volume` writes.
    """

    def finished(labels, **attributes):
        attributes["method"] = settings.METHOD
        if settings.LINK_SECTIONS is None:
            return labels, attributes
        return link_sections(labels, settings.LINK_SECTIONS), attributes | {"link_sections": settings.LINK_SECTIONS}

    names = segment_names(settings)
    fragments = fragments_by(settings, offsets)(affinities, mask=mask)
    if settings.METHOD == MUTEX:
        yield names[None], *finished(fragments, biases=edge_biases(offsets, settings.MUTEX_BIAS))
        return
    yield FRAGMENTS, fragments, {}
    merge_function = configured_merge_function(settings)
    for threshold, segmentation in agglomerate(affinities, fragments, list(names), merge_function):
        yield names[threshold], *finished(segmentation, threshold=threshold, merge_function=merge_function)


def fragments_by(settings, offsets):
    """What makes fragments of affinities by a section INS_SEGMENT: a function of the affinities and a ``mask``.

    Raises:
        UserError: METHOD mutex cannot be used with these offsets or MUTEX_BIAS.
    """
    common = {"background_mask": settings.BACKGROUND_MASK, "filter_fragments": settings.FILTER_FRAGMENTS}
    if settings.METHOD == MUTEX:
        return partial(mutex_watershed, offsets=offsets, biases=edge_biases(offsets, settings.MUTEX_BIAS), **common)
    return partial(
        extract_fragments,
        fragments_in_xy=settings.FRAGMENTS_IN_XY or NEIGHBORS[0] not in offsets,
        epsilon_agglomerate=settings.EPSILON_AGGLOMERATE,
        **common,
    )


def segment_names(settings):
    """The segmentations that a section INS_SEGMENT makes: {0.55: "volumes/segmentation_055"}, one for each threshold.

    METHOD mutex has none, and makes {None: "volumes/segmentation_mutex"}.

    Raises:
        UserError: two thresholds are equal when rounded to hundredths.
    """
    if settings.METHOD == MUTEX:
        return {None: MUTEX_SEGMENTATION}
    thresholds = settings.THRESHOLDS
    names = {threshold: segmentation_name(threshold) for threshold in thresholds}
    if len(set(names.values())) < len(thresholds):
        raise UserError(f"INS_SEGMENT.THRESHOLDS {list(thresholds)}: two are the same in hundredths; drop one")
    return names


def configured_merge_function(settings):
    """MERGE_FUNCTION of a section INS_SEGMENT, or what `default_merge_function` gives if that is None; METHOD mutex has
    one of its own.

    Raises:
        UserError: a merge function that waterz does not ship compiled.
    """
    if settings.METHOD == MUTEX:
        return MUTEX
    name = settings.MERGE_FUNCTION or default_merge_function(settings.THRESHOLDS, settings.EPSILON_AGGLOMERATE)
    scoring_function(name)
    return name
