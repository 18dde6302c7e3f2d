"""One picture that shows how far a segmentation got: every step of the pipeline on the same section.

It is made for colour-blind readers too: labels have black outlines and colours that most eyes tell apart,
the same colour for the same neuron in segmentation and ground truth; all else is shown by lightness.
"""

from pathlib import Path

import numpy as np
from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from skimage.segmentation import find_boundaries

from lsdseg.data_utils.layout import FRAGMENTS, prediction_name
from lsdseg.data_utils.volumes import has_array, open_array
from lsdseg.engine.offsets import DIRECT_NEIGHBORS
from lsdseg.engine.sample import Sample

OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
WIDTH = 1200  # pixels, the width of a README
WIDEST_CROP = 512  # voxels; in wider sections neurites would be too small to see


def draw_segmentation_figure(
    path_png: Path | str,
    *,
    raw: np.ndarray,
    affinities: np.ndarray,
    lsds: np.ndarray | None,
    fragments: np.ndarray | None,
    segmentation: np.ndarray,
    ground_truth: np.ndarray | None = None,
    section: int | None = None,
    title: str | None = None,
) -> None:
    """Write a PNG, 1200 pixels wide, with one section of each array side by side in two rows.

    Args:
        path_png: where to write.
        raw: (z, y, x), any number type.
        affinities: (channels, z, y, x), uint8 (0..255) or float (0..1); shown is their mean.
        lsds: (10 or 6, z, y, x), as affinities, or None; shown is how far the local centre of mass is.
        fragments: labels (z, y, x) or None; 0 is background here and below.
        segmentation: labels (z, y, x).
        ground_truth: labels (z, y, x) or None.
        section: z index; the middle one if None.
        title: text above the panels.
    """
    z = raw.shape[0] // 2 if section is None else section
    labels, truth = segmentation[z], None
    if ground_truth is not None:
        labels, truth = match_labels(segmentation[z], ground_truth[z])
    panels = {
        "raw": _shade(_stretch(raw[z]), "gray"),
        "affinities (mean)": _shade(_unit(affinities[:, z]).mean(axis=0), "gray"),
    }
    if lsds is not None:
        offsets = 2 * _unit(lsds[: 3 if len(lsds) == 10 else 2, z]) - 1
        panels["LSDs (distance to local centre)"] = _shade(np.linalg.norm(offsets, axis=0), "cividis")
    if fragments is not None:
        panels["fragments"] = _paint(fragments[z])
    panels["segmentation"] = _paint(labels)
    if truth is not None:
        panels["ground truth"] = _paint(truth)
    _write_panels(path_png, panels, title)


def draw_sample(sample: Sample, segmentation_dataset: str, png: Path | str) -> None:
    """Draw the middle section of one segmented sample; of wide sections the central 512 voxels.

    Only that section is read: raw, affinities, the segmentation and, if they are there, LSDs, fragments and ground
    truth.

    Args:
        sample: what to draw.
        segmentation_dataset: name of the segmentation in the sample's output.
        png: where to write.

    Raises:
        UserError: raw, affinities or segmentation are missing.
    """
    output = sample.output
    segmentation = open_array(output, segmentation_dataset)
    voxel_size, voxels = segmentation.voxel_size, Coordinate(segmentation.shape)
    shape = Coordinate(1, *(min(n, WIDEST_CROP) for n in voxels[1:]))
    roi = Roi(segmentation.roi.offset + (voxels // 2 - shape // 2) * voxel_size, shape * voxel_size)

    # Long-range affinities are low far from membranes, and would make these look thick.
    direct = [offset in DIRECT_NEIGHBORS for offset in sample.offsets]

    def section(array: Array | None) -> np.ndarray | None:
        return None if array is None else array.to_ndarray(roi, fill_value=0)

    def optional(dataset: str) -> Array | None:
        return open_array(output, dataset) if has_array(output, dataset) else None

    draw_segmentation_figure(
        png,
        raw=section(sample.raw),
        affinities=section(sample.affinities)[direct],
        lsds=section(optional(prediction_name("lsds"))),
        fragments=section(optional(FRAGMENTS)),
        segmentation=section(segmentation),
        ground_truth=section(sample.ground_truth),
        title=f"{output.stem}: {segmentation_dataset}",
    )


def match_labels(segmentation: np.ndarray, ground_truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumber two label arrays of one shape so that a segment and its neuron have the same number.

    Pairs are one to one and share as many voxels as possible in all; a neuron's other pieces get numbers that
    no neuron has, so a split shows. 0 stays 0.

    Returns:
        segmentation, ground_truth: int64, shaped as given.
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


def label_palette() -> np.ndarray:
    """RGB colours of labels, (14, 3) in 0..1: seven hues for colour-blind eyes, each plain and lighter.

    The hues are those of Okabe and Ito, Color Universal Design, 2008 (https://jfly.uni-koeln.de/color/).
    """
    hues = np.array([to_rgb(hue) for hue in OKABE_ITO])
    # Any lighter, and two of them look alike to red-blind or green-blind eyes.
    return np.concatenate([hues, hues + 0.3 * (1 - hues)])


def _paint(labels):
    """RGB uint8 image (y, x, 3) of a label section (y, x), enlarged so that its black outlines are thin."""
    zoom = max(1, WIDTH // 2 // max(labels.shape))
    labels = labels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    palette = label_palette()
    image = palette[np.random.default_rng(0).permutation(len(palette))][labels % len(palette)]
    image[labels == 0] = 0.9
    image[find_boundaries(labels, mode="inner")] = 0
    return (255 * image).astype(np.uint8)


def _shade(section, colormap):
    """RGB uint8 image (y, x, 3) of a section (y, x) of values in 0..1."""
    return colormaps[colormap](section, bytes=True)[..., :3]


def _stretch(section):
    """A raw section with its grey values spread over 0..1; the outermost 0.5 % at either end are clipped."""
    low, high = np.percentile(section, (0.5, 99.5))
    return np.clip((section - low) / max(high - low, 1e-6), 0, 1)


def _unit(values):
    """Network output as floats in 0..1."""
    return values / np.float32(255) if values.dtype == np.uint8 else values


def _write_panels(path_png, panels, title):
    """Write images (y, x, 3), given by their titles, in two rows."""
    columns = (len(panels) + 1) // 2
    height, width = panels["raw"].shape[:2]
    panel_width = WIDTH / columns
    panel_height = panel_width * min(max(height / width, 0.3), 2) + 26
    figure = Figure((WIDTH / 100, (2 * panel_height + 40) / 100), dpi=100, layout="constrained")
    for axes, (name, image) in zip(figure.subplots(2, columns).flat, panels.items(), strict=False):
        axes.imshow(image, interpolation="nearest" if len(image) < panel_height else "antialiased", aspect="auto")
        axes.set_title(name, fontsize=12)
    for axes in figure.axes:
        axes.set_axis_off()
    figure.suptitle(title or "", fontsize=13)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # 256 colours: a third of the size, and no difference that can be seen.
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256).save(path_png, "PNG")
