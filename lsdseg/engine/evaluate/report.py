"""The report that a lab sends round: one HTML file that holds everything it shows and loads nothing.

Ground truth is orange in pictures and the segmentation blue, which color-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from lsdseg.data_utils.layout import SEGMENTATIONS
from lsdseg.data_utils.placement import nanometers, voxel_size_nm
from lsdseg.engine.evaluate.figure import match_labels
from lsdseg.engine.evaluate.metrics import Mistake, place_of
from lsdseg.html import chart, grid, page, section, subsection, table, text
from lsdseg.pictures import OKABE_ITO, TINT, RGBImage, blended, gray_image, overlay_image
from lsdseg.planes import Index, planes

WORST_NEURONS = 50  # rows of the table of neurons
RADIUS = 60  # voxels of the finest axis that a picture shows to either side of an error
SHOWN = 200  # the same, of the middle of the best segmentation
TRUTH_COLOR, SEGMENT_COLOR = (255 * np.array(to_rgb(color)) for color in OKABE_ITO[:2])
BOTH_COLOR = np.array((255, 255, 255))
SCORES = {"voi_split": "VOI split", "voi_merge": "merge", "voi_sum": "sum", "adapted_rand_error": "Rand error"}
# Variants of the ground truth -> what stands before their scores in the head of a table.
VARIANTS = {"_without_boundary": "without boundary: ", "_connected": "connected: "}


def render(
    report: Mapping[str, Any],
    neurons: Sequence[Mapping[str, Any]],
    pictures: Sequence[str],
    mistakes: Mapping[str, str],
    notes: Sequence[str] = (),
) -> str:
    """Return the HTML of a report.

    Args:
        report: what `evaluate.score_sample` returns.
        neurons: all neurons, the worst first, as `metrics.list_neurons` returns them.
        pictures: HTML that shows the best segmentation.
        mistakes: caption -> HTML that shows an error, the worst first.
        notes: lines that say what is missing and why.

    Returns:
        A page without references to anything outside of it.
    """
    scored = f"{report['objects']} objects, {report['voxels'] / 1e6:.2f} million voxels"
    pieces = [
        text(f"Against {report['ground_truth']} in {report['sample']}: {scored}. Best: {report['best']}."),
        *(text(note, "faint") for note in notes),
        section("Scores", *_scores(report)),
        section(f"Segmentation: {report['best']}", *pictures),
        section("Worst neurons", *_neurons(neurons, report["best"])),
        section("Run lengths", *_run_lengths(report["skeletons"])),
    ]
    if mistakes:
        remark = (
            "The neuron is tinted orange, the segment blue. Outlines of all neurons are orange, of all segments blue, "
            "and white where both coincide. The cross marks the position."
        )
        shown = (subsection(caption, drawn) for caption, drawn in mistakes.items())
        pieces.append(section("Worst errors", text(remark, "faint"), *shown))
    return page(f"Segmentation of {Path(report['sample']).name}", pieces)


def _scores(report: Mapping[str, Any]) -> list[str]:
    """Return tables and charts of the scores of all segmentations."""
    rows = report["scores"]
    best = [n for n, row in enumerate(rows) if row["dataset"] == report["best"]]
    names = [row["dataset"].removeprefix("volumes/") + " (not written)" * (not row["written"]) for row in rows]
    columns: dict[str, list[Any]] = {
        "segmentation": names,
        "method": [" ".join(str(row[key]) for key in ("method", "merge_function") if row[key]) for row in rows],
        "threshold": [None if row["threshold"] is None else f"{row['threshold']:g}" for row in rows],
        "segments": [row["segments"] for row in rows],
        **{name: [row[key] for row in rows] for key, name in SCORES.items()},
        "ERL (µm)": [None if row["erl_nm"] is None else row["erl_nm"] / 1000 for row in rows],
        "normalized ERL": [row["normalized_erl"] for row in rows],
        "splits needed": [row["splits_needed"] for row in rows],
        "merges needed": [row["merges_needed"] for row in rows],
    }
    variants = {"segmentation": names} | {
        f"{words}{name}": [row[f"{key}{suffix}"] for row in rows]
        for suffix, words in VARIANTS.items()
        for key, name in SCORES.items()
    }
    pieces = [text("VOI is in bits. Of VOI and Rand error, lower is better.", "faint"), _columns(columns, best)]
    pieces.append(grid(*_charts(rows)))
    if any(value is not None for name in list(variants)[1:] for value in variants[name]):
        remark = (
            "Without boundary: voxels where neurons touch are left out. Connected: neurons are cut into the parts that "
            "hang together in this volume."
        )
        pieces += [text(remark, "faint"), _columns(variants, best)]
    return pieces


def _columns(columns: Mapping[str, Sequence[Any]], marked: Sequence[int]) -> str:
    """Return a table of columns, without those that are empty."""
    filled = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    return table(list(filled), list(zip(*filled.values(), strict=True)), decimals=3, marked=marked)


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draw the VOI over the threshold, and merges over splits, with a line for each method; fragments are left out."""
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if not SEGMENTATIONS.fullmatch(row["dataset"]):
            continue
        words = [str(row[key]) for key in ("method", "merge_function") if row[key]]
        if row["threshold"] is None or not words:
            words = [row["dataset"].removeprefix("volumes/")]
        series.setdefault(" ".join(words), []).append(row)
    for members in series.values():
        members.sort(key=lambda row: row["threshold"] or 0)

    def lines(x: str, y: str) -> dict[str, tuple[list[float], list[float]]]:
        values = {name: [[row[key] for row in members] for key in (x, y)] for name, members in series.items()}
        return {name: (xs, ys) for name, (xs, ys) in values.items() if None not in xs}

    thresholds = {
        name: [f"{row['threshold']:g}" for row in members if row["threshold"] is not None]
        for name, members in series.items()
    }
    return [
        chart("VOI sum (bits)", lines("threshold", "voi_sum"), "threshold"),
        chart(
            "VOI merge (bits), at thresholds",
            lines("voi_split", "voi_merge"),
            "VOI split (bits)",
            notes=thresholds,
        ),
    ]


def _neurons(neurons: Sequence[Mapping[str, Any]], best: str) -> list[str]:
    """Return a table of the neurons that have the largest share of the VOI."""
    shown = [neuron for neuron in neurons[:WORST_NEURONS] if neuron["share"] > 0]
    if not shown:
        return [text(f"None of {len(neurons)} neurons is split or merged.")]
    remark = (
        f"The {len(shown)} worst of {len(neurons)} neurons in {best}, by their share of VOI. Parts below 1 % of a "
        "neuron are not counted. All neurons are in the file that ends in _scores_neurons.csv."
    )
    head = ["neuron", "voxels", "segments", "of VOI split", "of VOI merge", "of VOI", "merged with"]
    rows = []
    for neuron in shown:
        others = ", ".join(map(str, neuron["merged_with"]))
        more = neuron["merged"] - len(neuron["merged_with"])
        shares = (f"{100 * neuron[key]:.1f} %" for key in ("split_share", "merge_share", "share"))
        words = others + f" and {more} more" * (more > 0)
        rows.append((neuron["neuron"], neuron["voxels"], neuron["segments"], *shares, words))
    return [text(remark, "faint"), table(head, rows)]


def _run_lengths(skeletons: Mapping[str, Any] | None) -> list[str]:
    """Return a table of the skeletons that lost most of their length."""
    if skeletons is None:
        return [text("There are no skeletons for an expected run length (ERL) here.", "faint")]
    neurons = sorted(skeletons["neurons"], key=lambda one: one["erl"] - one["length"])
    worst = [one for one in neurons[:WORST_NEURONS] if one["erl"] < one["length"]]
    erl, best = (skeletons[key] / 1000 for key in ("erl", "erl_best"))
    words = (
        f"Expected run length (ERL) {erl:.3g} µm of {best:.3g} µm without errors, normalized "
        f"{skeletons['normalized_erl']:.3f}."
    )
    if not worst:
        return [text(f"{words} Errors shorten none of {len(neurons)} skeletons.")]
    words += f" The {len(worst)} skeletons that lost most, of {len(neurons)}. All are in the file that ends in .json."
    head = ["skeleton", "length (µm)", "run length (µm)", "splits", "mergers", "merged with"]
    rows = [
        (
            one["name"],
            one["length"] / 1000,
            one["erl"] / 1000,
            one["splits"],
            len(one["merged_with"]),
            ", ".join(one["merged_with"][:10]),
        )
        for one in worst
    ]
    return [text(words), table(head, rows, decimals=3)]


class Shown:
    """Raw, ground truth and segmentation where they meet, to be looked at."""

    def __init__(
        self, raw: Array, labels: NDArray[Any], truth: NDArray[Any], begin: Coordinate, segmentation: Array
    ) -> None:
        """Take what the pictures show.

        Args:
            raw: on voxels of the size that labels have.
            labels: the segmentation (z, y, x).
            truth: labels of the same shape.
            begin: of both, in the unit of the segmentation.
            segmentation: the array that they were read from.
        """
        self._raw, self._labels, self._truth, self._begin = raw, labels, truth, begin
        self._nm, self._voxel_size = nanometers(begin, segmentation), voxel_size_nm(segmentation)
        self._in_segmentation = (begin - segmentation.offset) / segmentation.voxel_size

    def overview(self) -> list[str]:
        """Return planes through the middle: the segmentation, then the ground truth. A pair has one color."""
        middle = [n // 2 for n in self._labels.shape]
        pieces = []
        for number, title in enumerate(("segmentation", "ground truth")):

            def paint(raw: NDArray[Any], *pair: NDArray[Any], number: int = number) -> RGBImage:
                return overlay_image(gray_image(raw), pair[number])

            def sections(index: Index) -> tuple[NDArray[Any], ...]:
                return self._raw_section(index), *match_labels(self._labels[index], self._truth[index])

            drawn = planes(sections, paint, self._box(middle, SHOWN), middle, self._voxel_size, self._nm)
            pieces.append(subsection(f"Raw with {title}", drawn))
        return pieces

    def mistake(self, mistake: Mistake, number: int) -> tuple[str, str]:
        """Return the caption of a mistake, and planes through it."""
        place = place_of(mistake, self._labels, self._truth)

        def paint(*arrays: NDArray[Any]) -> RGBImage:
            return _mistake_image(mistake, *arrays)

        def sections(index: Index) -> tuple[NDArray[Any], ...]:
            return self._raw_section(index), self._truth[index], self._labels[index]

        box = self._box(place, RADIUS)
        drawn = planes(sections, paint, box, place, self._voxel_size, self._nm, cross=True)
        position = [b + i * v for b, i, v in zip(self._nm, place, self._voxel_size, strict=True)]
        return _caption(mistake, position, self._in_segmentation + Coordinate(place), number), drawn

    def _box(self, point: Sequence[int], radius: int) -> tuple[slice, ...]:
        """Return the voxels around a point, to so many voxels of the finest axis."""
        finest = min(self._voxel_size)
        radii = [max(1, round(radius * finest / size)) for size in self._voxel_size]
        sides = zip(point, radii, self._labels.shape, strict=True)
        return tuple(slice(max(i - r, 0), min(i + r + 1, n)) for i, r, n in sides)

    def _raw_section(self, index: Index) -> NDArray[Any]:
        """Read raw at an index of the labels; 0 where there is none."""
        sides = [side if isinstance(side, slice) else slice(side, side + 1) for side in index]
        begin, shape = Coordinate(s.start for s in sides), Coordinate(s.stop - s.start for s in sides)
        roi = Roi(self._begin + begin * self._raw.voxel_size, shape * self._raw.voxel_size)
        raw: NDArray[Any] = self._raw.to_ndarray(roi, fill_value=0)
        return raw[tuple(slice(None) if isinstance(side, slice) else 0 for side in index)]


def _mistake_image(mistake: Mistake, raw: NDArray[Any], truth: NDArray[Any], labels: NDArray[Any]) -> RGBImage:
    """Draw an error on a section of raw: its neuron and its segment tinted, and outlines of all of them.

    Args:
        mistake: the error.
        raw: (y, x) of any number type.
        truth: labels of the same shape.
        labels: the segmentation, the same shape.
    """
    image = gray_image(raw)
    of_truth, of_labels = (find_boundaries(array, mode="inner") for array in (truth, labels))
    for where, color, strength in (
        (truth == mistake.neuron, TRUTH_COLOR, TINT),
        (labels == mistake.segment, SEGMENT_COLOR, TINT),
        (of_truth, TRUTH_COLOR, 1),
        (of_labels, SEGMENT_COLOR, 1),
        (of_truth & of_labels, BOTH_COLOR, 1),
    ):
        image = blended(image, color, strength * where)
    return image


def _caption(mistake: Mistake, position: Sequence[float], voxel: Sequence[int], number: int) -> str:
    """Describe an error in one line, with its position (z, y, x) in nm, and its voxel in the segmentation."""
    place = ", ".join(f"{value / 1000:.6g}" for value in position)
    what = "is cut off from the rest of it" if mistake.kind == "split" else "hangs on another neuron"
    return (
        f"{number}. {mistake.kind}: the part of neuron {mistake.neuron} in segment {mistake.segment} {what}; "
        f"{mistake.voxels} voxels, {mistake.bits:.4f} bits of VOI; at {place} µm (z, y, x), voxel "
        f"{', '.join(map(str, voxel))}"
    )
