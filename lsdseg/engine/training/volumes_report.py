"""One page about a set of labeled volumes: what a network would learn from, and what is probably wrong with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import fastremap
import numpy as np
from funlib.persistence import Array
from numpy.typing import NDArray
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.loader import load_config
from lsdseg.data_utils.checks import check_training_volume
from lsdseg.data_utils.labels import is_labeled, open_labels
from lsdseg.data_utils.layout import volumes_in
from lsdseg.data_utils.placement import offset_nm, voxel_size_nm
from lsdseg.data_utils.volumes import has_array, open_array, read, source_defaults
from lsdseg.engine.statistics import Statistics, differences, sample_statistics
from lsdseg.engine.training.report import statistics_pieces
from lsdseg.engine.training.suspicious import Alignment, alignment_of, set_warnings, shift_warning
from lsdseg.errors import UserError
from lsdseg.html import bullets, chart, section, subsection, table, text, write_page
from lsdseg.pictures import RGBImage, gray_image, overlay_image
from lsdseg.planes import Index, planes

REPORT = "volumes_report.html"
MOST_VOXELS = 2**28  # of labels that are read of a volume, in its middle; connectivity needs 12 bytes for each
MOST_LISTED = 10
BOXES = 24  # that alignment is computed from
CROP = 400  # voxels of the finest axis that are shown, from the middle
DIMMED = 3  # how many times darker raw is where labels are not known


@dataclass(frozen=True)
class Labels:
    """What is in the labels of a volume.

    Attributes:
        ids: uint64 (n,), of the labels but 0, ascending.
        voxels: int (n,), of each.
        islands: what `islands_of` returns.
        known: share of the voxels that are labeled, background included.
        background: share of those that are 0.
        whole: whether all voxels were looked at.
    """

    ids: NDArray[np.uint64]
    voxels: NDArray[np.int64]
    islands: list[tuple[int, int, tuple[int, ...]]]
    known: float
    background: float
    whole: bool


@dataclass(frozen=True)
class Volume:
    """What the page says about a volume. What could not be read is None.

    Attributes:
        path: the file or folder.
        raw: its raw data.
        labels: its labels.
        mask: of the labels, on the same voxels.
        statistics: of the gray values.
        content: of the labels.
        alignment: of raw and labels.
        problem: why it cannot be trained on.
    """

    path: Path
    raw: Array
    labels: Array | None
    mask: Array | None
    statistics: Statistics | None
    content: Labels | None
    alignment: Alignment | None
    problem: str


def report_volumes(words: Sequence[str], config: str | None, to: Path | None) -> None:
    """Write a page about volumes, or about the training volumes of a config, and print where it is.

    Args:
        words: volumes in any format; or, with a config, KEY VALUE ... that override it.
        config: the config file.
        to: the file to write. None: volumes_report.html in the current folder.

    Raises:
        UserError: neither volumes nor a config are given, a volume has no raw data, or the page cannot be written.
    """
    if config is None and not words:
        raise UserError(
            "name volumes or a config: python data_utils/report.py VOLUME ..., or python data_utils/report.py -c CONFIG"
        )
    cfg = load_config(config, words) if config else load_config()
    paths = volumes_in(cfg, "train") if config else [Path(word) for word in words]
    if config is None:
        cfg = _config_for(paths[0], cfg)
    volumes = [_inspect(path, cfg) for path in tqdm(paths, desc="reading volumes", unit="volume", delay=2)]
    path = to or Path(REPORT)
    write_page(path, f"{len(volumes)} volume(s) to train on", _pieces(volumes, cfg))
    print(f"report       {path.resolve()}")


def islands_of(labels: NDArray[np.uint64]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Find the pieces of labels that are neither their largest one nor could go on outside of the box.

    Args:
        labels: (z, y, x), 0 where there is no neuron. Pieces are connected at faces, edges or corners.

    Returns:
        Of each piece the label, the number of voxels and a corner of its bounding box (z, y, x), the largest one first.
    """
    pieces = cc3d.connected_components(fastremap.renumber(labels)[0], connectivity=26)  # which refuses large ids
    found = cc3d.statistics(pieces)
    owner = np.zeros(len(found["voxel_counts"]), np.uint64)
    owner[pieces] = labels
    counts, boxes = found["voxel_counts"], found["bounding_boxes"]
    largest: dict[int, int] = defaultdict(int)
    for piece in range(1, len(counts)):
        largest[int(owner[piece])] = max(largest[int(owner[piece])], int(counts[piece]))
    islands = []
    for piece in range(1, len(counts)):
        label, voxels, box = int(owner[piece]), int(counts[piece]), boxes[piece]
        inside = all(side.start > 0 and side.stop < size for side, size in zip(box, labels.shape, strict=True))
        if label and inside and voxels < largest[label]:
            islands.append((label, voxels, tuple(int(side.start) for side in box)))
    return sorted(islands, key=lambda island: -island[1])


def shared_ids(volumes: Sequence[Volume]) -> list[tuple[str, str, int]]:
    """Return the pairs of volumes that share ids of labels, and how many."""
    known = [(volume.path.name, volume.content.ids) for volume in volumes if volume.content]
    pairs = []
    for number, (name, ids) in enumerate(known):
        for other, other_ids in known[number + 1 :]:
            if count := len(np.intersect1d(ids, other_ids, assume_unique=True)):
                pairs.append((name, other, count))
    return pairs


def _config_for(path: Path, cfg: CfgNode) -> CfgNode:
    """Return a config that volumes of any size fit, with the voxel size of the first one."""
    raw = open_array(path, cfg.DATA.RAW, **source_defaults(cfg))
    settings: dict[str, Any] = {
        "VOXEL_SIZE": voxel_size_nm(raw),
        "PAD_CONV": "same",
        "DOWNSAMPLE_FACTORS": [[1, 1, 1]],
        "KERNEL_SIZE_DOWN": None,
        "KERNEL_SIZE_UP": None,
        "INPUT_SHAPE": (2, 2, 2),
        "OUTPUT_SHAPE": None,
        "GROW_INPUT": None,
    }
    return load_config(None, [part for name, value in settings.items() for part in (f"MODEL_ISO.{name}", value)])


def _inspect(path: Path, cfg: CfgNode) -> Volume:
    """Read what the page says about a volume."""
    defaults, problem = source_defaults(cfg), ""
    raw = open_array(path, cfg.DATA.RAW, **defaults)
    try:
        check_training_volume(path, cfg)
    except UserError as error:
        problem = str(error)
    labels, mask = (
        opened(path, name, **defaults) if has_array(path, name) else None
        for opened, name in ((open_labels, cfg.DATA.NEURON_LABELS), (open_array, cfg.DATA.NEURON_LABELS_MASK))
    )
    readable = labels is not None and not problem
    return Volume(
        path,
        raw,
        labels,
        mask,
        sample_statistics(raw, cfg, labels if readable else None) if raw.dims == 3 else None,
        _content(labels, mask) if readable and labels is not None else None,
        alignment_of(raw, labels, BOXES) if readable and labels is not None else None,
        problem,
    )


def _content(labels: Array, mask: Array | None) -> Labels:
    """Read labels and their mask, or their middle sections if there are too many."""
    sections = max(1, min(labels.shape[0], MOST_VOXELS // int(np.prod(labels.shape[1:]))))
    begin = (labels.shape[0] - sections) // 2
    ids, known = _read_known(labels, mask, slice(begin, begin + sections))
    ids[~known] = 0
    found, counts = fastremap.unique(ids, return_counts=True)
    return Labels(
        ids=found[found > 0],
        voxels=counts[found > 0].astype(np.int64),
        islands=islands_of(ids),
        known=float(known.mean()),
        background=float((ids[known] == 0).mean()) if known.any() else 0.0,
        whole=sections == labels.shape[0],
    )


def _read_known(labels: Array, mask: Array | None, where: Any) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return labels, and where they are known: neither the mask is 0 nor the id is that of unlabeled voxels."""
    ids = read(labels, where).astype(np.uint64)
    known = is_labeled(ids)
    return ids, known if mask is None else known & (read(mask, where) > 0)


def _pieces(volumes: Sequence[Volume], cfg: CfgNode) -> list[str]:
    """Return the pieces of the page."""
    suspicious = _suspicious(volumes, cfg)
    found = {volume.path.name: volume.statistics for volume in volumes if volume.statistics}
    sizes = {volume.path.name: _size_histogram(volume.content) for volume in volumes if volume.content}
    return [
        section("What to look at", bullets(suspicious, "bad") if suspicious else text("Nothing was found.", "faint")),
        section("Volumes", _overview(volumes)),
        section("Gray values", *statistics_pieces(found)),
        section("Labels", chart("Labels by size", sizes, "log10 of voxels", from_zero=True), _label_table(volumes)),
        *(section(volume.path.name, *_volume_pieces(volume)) for volume in volumes),
    ]


def _suspicious(volumes: Sequence[Volume], cfg: CfgNode) -> list[str]:
    """List what is wrong with volumes and what may be."""
    lines = [volume.problem for volume in volumes if volume.problem]
    usable = [volume for volume in volumes if volume.content]
    statistics = [volume.statistics for volume in volumes if volume.statistics]
    lines += set_warnings([volume.path for volume in usable], statistics, cfg)
    for volume in usable:
        where = f"{cfg.DATA.NEURON_LABELS} in {volume.path}"
        if volume.alignment and volume.alignment.is_shifted:
            lines.append(shift_warning(where, volume.alignment))
        if volume.content and volume.content.islands:
            count = len({label for label, _, _ in volume.content.islands})
            lines.append(f"{where}: {count} label(s) are not connected; their pieces are listed below")
        others = [other.statistics for other in volumes if other is not volume and other.statistics]
        if volume.statistics and others and (reasons := differences(volume.statistics, others)):
            lines.append(f"{volume.path} is unlike the other volumes: {'; '.join(reasons)}")
    lines += [f"{one} and {other} share {count} id(s) of labels" for one, other, count in shared_ids(volumes)]
    return lines


def _overview(volumes: Sequence[Volume]) -> str:
    def place(array: Array | None) -> tuple[Any, ...]:
        if array is None:
            return ("none", "", "", "")
        columns = array.shape, voxel_size_nm(array), offset_nm(array)
        return (str(array.dtype), *(" x ".join(map(str, column)) for column in columns))

    columns = ("type", "voxels (z y x)", "voxel size (nm)", "offset (nm)")
    head = ("volume", *(f"{array}: {column}" for array in ("raw", "labels") for column in columns))
    return table(head, [(volume.path.name, *place(volume.raw), *place(volume.labels)) for volume in volumes])


def _label_table(volumes: Sequence[Volume]) -> str:
    rows = [
        (
            volume.path.name,
            len(content.ids),
            int(np.median(content.voxels)) if len(content.ids) else 0,
            int(content.voxels.min(initial=content.voxels.max(initial=0))),
            f"{content.known:.1%}",
            f"{content.background:.1%}",
            len(content.islands),
            "all" if content.whole else "the middle sections",
        )
        for volume in volumes
        if (content := volume.content)
    ]
    head = (
        "volume",
        "labels",
        "median voxels",
        "smallest",
        "known",
        "background of that",
        "separate pieces",
        "looked at",
    )
    return table(head, rows)


def _size_histogram(content: Labels) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return sizes (log10 of voxels) and the number of labels of each."""
    counts, ends = np.histogram(np.log10(content.voxels), bins=np.arange(0, 9.25, 0.25))
    last = np.flatnonzero(counts).max(initial=0) + 2
    return ((ends[1:] + ends[:-1]) / 2)[:last], counts[:last]


def _volume_pieces(volume: Volume) -> list[str]:
    """Show a volume, how well its labels fit, and which of them are not connected."""
    pieces = _pictures(volume)
    if volume.alignment:
        middle, values = volume.alignment.middle, volume.alignment.correlation
        lines = {}
        for axis, name in enumerate("zyx"):
            along = values[tuple(slice(None) if other == axis else m for other, m in enumerate(middle))]
            lines[name] = (np.arange(len(along)) - middle[axis], along)
        title = "Correlation of raw with boundaries of labels (extreme at 0 if they fit)"
        pieces.append(chart(title, lines, "shift (voxels)"))
    if volume.content and volume.content.islands:
        rows = [
            (label, voxels, " ".join(map(str, corner)))
            for label, voxels, corner in volume.content.islands[:MOST_LISTED]
        ]
        more = len(volume.content.islands) - len(rows)
        pieces += [table(("label", "voxels of the piece", "near voxel (z y x)"), rows)]
        pieces += [text(f"and {more} more pieces", "faint")] * (more > 0)
    return pieces


def _pictures(volume: Volume) -> list[str]:
    """Show planes through the middle of the labels, or of raw if there are none that can be shown."""
    if volume.raw.dims != 3:
        return [text(f"raw has shape {volume.raw.shape}, which cannot be shown", "faint")]
    raw, labels = volume.raw, volume.labels if volume.content else None
    shown = raw if labels is None else labels
    sizes = [
        min(int(size), max(1, round(CROP * min(raw.voxel_size) / v)))
        for size, v in zip(shown.shape, raw.voxel_size, strict=True)
    ]
    box = [slice((n - size) // 2, (n - size) // 2 + size) for n, size in zip(shown.shape, sizes, strict=True)]
    middle = [int(n) // 2 for n in shown.shape]
    shift = (shown.offset - raw.offset) / raw.voxel_size

    def raw_section(index: Index) -> NDArray[Any]:
        moved = (
            slice(i.start + s, i.stop + s) if isinstance(i, slice) else i + s for i, s in zip(index, shift, strict=True)
        )
        return read(raw, tuple(moved))

    def with_labels(index: Index) -> tuple[NDArray[Any], ...]:
        assert labels is not None
        return raw_section(index), *_read_known(labels, volume.mask, index)

    place = (box, middle, voxel_size_nm(raw), offset_nm(shown))
    pieces = [subsection("Raw", planes(lambda index: (raw_section(index),), gray_image, *place))]
    if labels is not None:
        pieces.append(
            subsection("Labels on raw, which is dark where they are not known", planes(with_labels, _overlay, *place))
        )
    return pieces


def _overlay(raw: NDArray[Any], labels: NDArray[np.uint64], known: NDArray[np.bool_]) -> RGBImage:
    """Tint a section of raw with its labels (all (y, x)), and darken it where they are not known."""
    gray = gray_image(raw)
    return overlay_image(np.where(known[..., None], gray, gray // DIMMED), np.where(known, labels, 0))
