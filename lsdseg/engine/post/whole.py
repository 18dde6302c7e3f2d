"""Segmentation of whole volumes in memory: affinities from disk, segments by one of the methods, back to disk.

With waterz one merge goes through all thresholds, so a segmentation for each costs hardly more than one.
"""

import time
from collections.abc import Iterator, Sequence

from numpy.typing import ArrayLike
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.rules import SEGMENTATION, settings_of
from lsdseg.data_utils.layout import FRAGMENTS
from lsdseg.data_utils.masks import open_mask, read_mask
from lsdseg.data_utils.placement import offset_nm, voxel_size_nm
from lsdseg.data_utils.records import Record, is_made, record_of
from lsdseg.data_utils.segment_tables import write_tables
from lsdseg.data_utils.volumes import list_arrays, open_array, read, rename_array, write_array
from lsdseg.engine.blocks.lock import working_on
from lsdseg.engine.offsets import Offset, spans_sections
from lsdseg.engine.post.affinities import float_affinities
from lsdseg.engine.post.inputs import IN_MEMORY, inputs_of
from lsdseg.engine.post.link import link_sections
from lsdseg.engine.post.methods import Segmentation, method_of
from lsdseg.engine.post.placement import open_placement, read_placement
from lsdseg.engine.post.segments import segments_of_volume
from lsdseg.engine.sample import AFFINITIES, Sample, samples_of
from lsdseg.errors import UserError
from lsdseg.files import PARTIAL


def segment(cfg: CfgNode) -> None:
    """Segment the predicted affinities of every volume in the test folder.

    Raises:
        UserError: before anything is written, if affinities are missing or a setting cannot be used.
    """
    samples = samples_of(cfg)
    for sample in samples:
        check_settings(cfg.INS_SEGMENT, sample.offsets)
    for number, sample in enumerate(samples_of(cfg), start=1):  # anew, for arrays that are opened under their lock
        print(f"[{number}/{len(samples)}] {sample.output.name}", flush=True)
        began = time.monotonic()
        names = segment_sample(sample)
        print(f"{', '.join(names)} in {sample.output} ({time.monotonic() - began:.0f} s)")


def segment_sample(sample: Sample) -> list[str]:
    """Segment `volumes/pred_affs` of one sample, in memory, by INS_SEGMENT.METHOD.

    Writes the datasets of the method's `segmentations` (uint64, 0 is background); what the attributes of each say of
    how it was made is `method` and, for waterz, `merge_function` and `threshold`, for mutex `biases`.
    INS_SEGMENT.LINK_SECTIONS links segments, but not fragments, across sections. Each dataset gets its name only when
    it is complete; those of other methods stay. Tables of the segments are written beside the output, see
    `lsdseg.data_utils.segment_tables`.

    Returns:
        The names of the datasets.

    Raises:
        UserError: before anything is written, if the affinities or a setting cannot be used.
    """
    with working_on(sample.output, "fragments", reads=["predict"]):
        return _segment_sample(sample)


def _segment_sample(sample: Sample) -> list[str]:
    settings, array = sample.cfg.INS_SEGMENT, sample.affinities
    check_settings(settings, sample.offsets)
    mask = read_mask(sample.mask, array.roi, array)
    placement = read_placement(open_placement(sample))
    channels = method_of(settings).channels(read(array), sample.offsets)
    try:
        affinities = float_affinities(channels, len(channels))
    except ValueError as error:
        raise UserError(f"{AFFINITIES} in {sample.output}: {error}; run predicter.py again") from error

    record = _record(sample)
    names: list[str] = []
    fragments = None
    total = len(method_of(settings).segmentation_names(settings))
    with tqdm(total=total, desc=settings.METHOD, unit="segmentation") as bar:
        for name, labels, attributes in segmentations(affinities, sample.offsets, settings, mask, placement):
            # Fragments that were made block by block stay: the region adjacency graph speaks of them.
            if name != FRAGMENTS or not _in_blocks(sample):
                place = {"voxel_size": voxel_size_nm(array), "offset": offset_nm(array)}
                written = write_array(
                    sample.output, f"{name}{PARTIAL}", labels, **place, attributes=attributes | record.attributes
                )
                if name != FRAGMENTS:
                    write_tables(sample.output, name, written, IN_MEMORY, segments_of_volume(labels, fragments))
                rename_array(sample.output, f"{name}{PARTIAL}", name)
            fragments = labels if name == FRAGMENTS else fragments
            names.append(name)
            bar.set_description(name)
            bar.update(name != FRAGMENTS)
    return names


def is_segmented(sample: Sample) -> bool:
    """Return whether a sample has all segmentations that `segment_sample` would write now, made from the same.

    Raises:
        UserError: the affinities or a setting cannot be used.
    """
    settings = settings_in_memory(sample.cfg.INS_SEGMENT)
    record, method = _record(sample), method_of(settings)
    merge_function = method.merge_function(settings)
    for name in method.segmentation_names(settings).values():
        if not is_made(sample.output, name, record):
            return False
        if open_array(sample.output, name).attrs.get("merge_function", merge_function) != merge_function:
            return False
    return True


def _record(sample: Sample) -> Record:
    """What the segmentations of a sample are made from. Their attributes say the rest: merge function and threshold."""
    settings = settings_of(sample.cfg, SEGMENTATION)
    settings["INS_SEGMENT.EPSILON_AGGLOMERATE"] = settings_in_memory(sample.cfg.INS_SEGMENT).EPSILON_AGGLOMERATE
    return Record(IN_MEMORY, inputs_of(sample), settings)


def settings_in_memory(settings: CfgNode) -> CfgNode:
    """Return a section INS_SEGMENT with what counts in memory if it names no MERGE_FUNCTION: the mean, without a merge
    in advance.

    Published configs name none, and that is what the published script did with them; the published blockwise scripts
    took a quantile.
    """
    if settings.MERGE_FUNCTION is not None or settings.METHOD != "waterz":
        return settings
    changed = settings.clone()
    changed.defrost()
    changed.MERGE_FUNCTION, changed.EPSILON_AGGLOMERATE = "mean", 0.0
    return changed


def _in_blocks(sample: Sample) -> bool:
    """Return whether fragments exist that were not made in memory, by 02 or by others."""
    if FRAGMENTS not in list_arrays(sample.output):
        return False
    record = record_of(open_array(sample.output, FRAGMENTS))
    return record is None or record.step != IN_MEMORY


def check_settings(settings: CfgNode, offsets: Sequence[Offset]) -> None:
    """Check that a section INS_SEGMENT can be used, and for affinities with these offsets.

    Raises:
        UserError: it cannot.
    """
    method, settings = method_of(settings), settings_in_memory(settings)
    method.check(settings, offsets)
    method.merge_function(settings)
    method.segmentation_names(settings)
    open_mask(settings)
    if settings.LINK_SECTIONS is not None and spans_sections(offsets):
        raise UserError(
            f"INS_SEGMENT.LINK_SECTIONS is {settings.LINK_SECTIONS}, but the affinities have offsets along z, which "
            "join sections already: leave it None"
        )
    if settings.LINK_SECTIONS is not None and max(settings.THRESHOLDS) == 1:
        raise UserError("INS_SEGMENT.THRESHOLDS has 1, which merges everything: drop it, to have sections to link")


def segmentations(
    affinities: ArrayLike,
    offsets: Sequence[Offset],
    settings: CfgNode,
    mask: ArrayLike | None = None,
    placement: ArrayLike | None = None,
) -> Iterator[Segmentation]:
    """Segment a volume in memory by a section INS_SEGMENT.

    Args:
        affinities: float32 (c, z, y, x) in 0..1, the method's `channels`.
        offsets: (z, y, x) of each channel of the prediction that they come from.
        settings: the section INS_SEGMENT.
        mask: (z, y, x); segments are made where it is not 0.
        placement: (3, z, y, x), as `extract_fragments` takes it.

    Yields:
        Name, labels (uint64, z, y, x) and attributes of every dataset that `segment_sample` writes.
    """
    method, settings = method_of(settings), settings_in_memory(settings)
    for name, labels, attributes in method.segmentations(affinities, settings, offsets, mask, placement):
        if name != FRAGMENTS:
            attributes["method"] = settings.METHOD
            if settings.LINK_SECTIONS is not None:
                labels = link_sections(labels, settings.LINK_SECTIONS)
                attributes["link_sections"] = settings.LINK_SECTIONS
        yield name, labels, attributes
