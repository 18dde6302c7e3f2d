"""Draw one picture that shows how far a segmentation got: every step of the pipeline on the same section.

The picture works for color-blind readers too. Labels have black outlines and colors that most eyes can tell apart, and
a neuron has the same color in segmentation and ground truth. Everything else is shown by lightness.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array

from lsdseg.data_utils.layout import FRAGMENTS, prediction_name
from lsdseg.data_utils.placement import nanometers, voxel_size_nm
from lsdseg.data_utils.records import record_of
from lsdseg.data_utils.volumes import has_array, open_array
from lsdseg.engine.offsets import DIRECT_NEIGHBORS
from lsdseg.engine.sample import Sample
from lsdseg.pictures import RGBImage, gray_image, intensity_image, label_image, round_length

WIDTH = 1200  # pixels, the width of a README
TITLE_LETTERS = 115  # per line
MAX_CROP = 512  # voxels; in wider sections, neurites would be too small to see


def draw_segmentation_figure(
    path_png: Path | str,
    *,
    raw: NDArray[Any],
    affinities: NDArray[Any],
    lsds: NDArray[Any] | None,
    fragments: NDArray[Any] | None,
    segmentation: NDArray[Any],
    ground_truth: NDArray[Any] | None = None,
    section: int | None = None,
    title: str | None = None,
    voxel_size: Sequence[float] | None = None,
) -> None:
    """Write a PNG, 1200 pixels wide, with one section of each array side by side in two rows.

    Args:
        path_png: the file to write.
        raw: (z, y, x) of any number type.
        affinities: (channels, z, y, x), uint8 (0..255) or float (0..1). Their mean is shown.
        lsds: (10 or 6, z, y, x), uint8 (0..255) or float (0..1). The distance to the local center of mass is shown.
        fragments: labels (z, y, x); 0 is background here and below.
        segmentation: labels (z, y, x).
        ground_truth: labels (z, y, x).
        section: its z index. By default, the middle section.
        title: text above the panels. Lines that are too long are broken.
        voxel_size: (z, y, x) in nm. A scale bar is drawn on raw if it is given.
    """
    z = raw.shape[0] // 2 if section is None else section
    labels, truth = segmentation[z], None
    if ground_truth is not None:
        labels, truth = match_labels(segmentation[z], ground_truth[z])
    panels = {
        "raw": gray_image(raw[z]),
        "affinities (mean)": intensity_image(_to_unit_range(affinities[:, z]).mean(axis=0), "gray"),
    }
    if lsds is not None:
        offsets = 2 * _to_unit_range(lsds[: 3 if len(lsds) == 10 else 2, z]) - 1
        panels["LSDs (distance to local center)"] = intensity_image(np.linalg.norm(offsets, axis=0), "cividis")
    if fragments is not None:
        panels["fragments"] = label_image(fragments[z], WIDTH // 2)
    panels["segmentation"] = label_image(labels, WIDTH // 2)
    if truth is not None:
        panels["ground truth"] = label_image(truth, WIDTH // 2)
    _write_panels(path_png, panels, title, None if voxel_size is None else voxel_size[2])


def draw_sample(sample: Sample, segmentation_dataset: str, png: Path | str) -> None:
    """Draw the middle section of a segmented sample, or the central 512 voxels of a wide section.

    Only this section is read: of raw, affinities and segmentation, and of LSDs, fragments and ground truth if they
    exist.

    Args:
        sample: the sample.
        segmentation_dataset: the segmentation in the sample's output.
        png: the file to write.

    Raises:
        UserError: raw, affinities or segmentation are missing.
    """
    output = sample.output
    segmentation = open_array(output, segmentation_dataset)
    voxel_size, voxels = segmentation.voxel_size, Coordinate(segmentation.shape)
    record = record_of(segmentation)
    shape = Coordinate(1, *(min(n, MAX_CROP) for n in voxels[1:]))
    roi = Roi(segmentation.roi.offset + (voxels // 2 - shape // 2) * voxel_size, shape * voxel_size)

    place = f"section {voxels[0] // 2} at z {nanometers(roi.begin, segmentation)[0] / 1000:g} µm"

    # Long-range affinities are low far from membranes too, and would make membranes look thick.
    direct = [offset in DIRECT_NEIGHBORS for offset in sample.offsets]

    def section(array: Array) -> NDArray[Any]:
        voxels: NDArray[Any] = array.to_ndarray(roi, fill_value=0)
        return voxels

    def section_if_present(dataset: str) -> NDArray[Any] | None:
        return section(open_array(output, dataset)) if has_array(output, dataset) else None

    draw_segmentation_figure(
        png,
        raw=section(sample.raw),
        affinities=section(sample.affinities)[direct],
        lsds=section_if_present(prediction_name("lsds")),
        fragments=section_if_present(FRAGMENTS),
        segmentation=section(segmentation),
        ground_truth=None if sample.ground_truth is None else section(sample.ground_truth),
        title="\n".join([f"{output.stem}: {segmentation_dataset}, {place}", *([str(record)] if record else [])]),
        voxel_size=voxel_size_nm(segmentation),
    )


def match_labels(segmentation: NDArray[Any], ground_truth: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Renumber two label arrays of the same shape so that a segment and its neuron have the same number.

    Pairs are one to one, and share as many voxels as possible in total. The other pieces of a neuron get numbers that
    no neuron has, so splits are visible. 0 stays 0.

    Returns:
        segmentation: int64, in the shape of the input.
        ground_truth: the same.
    """
    segments, segment_of = np.unique(np.append(0, segmentation), return_inverse=True)
    neurons, neuron_of = np.unique(np.append(0, ground_truth), return_inverse=True)
    segment_of, neuron_of = segment_of[1:], neuron_of[1:]
    ones = np.ones(len(segment_of), np.int64)
    overlap = coo_array((ones, (segment_of, neuron_of)), shape=(len(segments), len(neurons))).toarray()
    number = len(neurons) + np.arange(len(segments))
    rows, columns = linear_sum_assignment(overlap[1:, 1:], maximize=True)
    touching = overlap[1:, 1:][rows, columns] > 0
    number[1:][rows[touching]] = columns[touching] + 1
    number[0] = 0
    return number[segment_of].reshape(np.shape(segmentation)), neuron_of.reshape(np.shape(ground_truth))


def _to_unit_range(values: NDArray[Any]) -> NDArray[np.floating[Any]]:
    """Convert network output to floats in 0..1."""
    return values / np.float32(255) if values.dtype == np.uint8 else values


def _draw_bar(axes: Axes, shape: tuple[int, ...], pixel_nm: float) -> None:
    """Draw a white bar with a black edge and its length, a quarter of the width or less, in the lower left corner."""
    length = round_length(shape[1] * pixel_nm / 4000)
    left, bottom = 0.04 * shape[1], 0.95 * shape[0]
    for width, color in ((7, "black"), (4, "white")):
        ends = [left, left + length * 1000 / pixel_nm]
        axes.plot(
            ends, [bottom, bottom], color=color, linewidth=width, solid_capstyle="butt", scalex=False, scaley=False
        )
    words = axes.annotate(
        f"{length:g} µm", (left, bottom), (0, 5), textcoords="offset points", color="white", fontsize=11
    )
    words.set_path_effects([withStroke(linewidth=3, foreground="black")])


def _write_panels(path_png: Path | str, panels: dict[str, RGBImage], title: str | None, pixel_nm: float | None) -> None:
    """Write images in two rows, each with its title, and a scale bar on the first one if its pixel size is given."""
    columns = (len(panels) + 1) // 2
    height, width = panels["raw"].shape[:2]
    panel_width = WIDTH / columns
    panel_height = panel_width * min(max(height / width, 0.3), 2) + 26
    figure = Figure((WIDTH / 100, (2 * panel_height + 40) / 100), dpi=100, layout="constrained")
    for axes, (name, image) in zip(figure.subplots(2, columns).flat, panels.items(), strict=False):
        axes.imshow(image, interpolation="nearest" if len(image) < panel_height else "antialiased", aspect="auto")
        axes.set_title(name, fontsize=12)
        if name == "raw" and pixel_nm is not None:
            _draw_bar(axes, image.shape, pixel_nm)
    for axes in figure.axes:
        axes.set_axis_off()
    lines = [part for line in (title or "").splitlines() for part in wrap(line, TITLE_LETTERS)]
    figure.suptitle("\n".join(lines), fontsize=12)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # With 256 colors, the file has a third of the size and looks the same.
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256).save(path_png, "PNG")
