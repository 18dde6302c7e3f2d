"""Sections of arrays as pictures, for figures, reports and TensorBoard.

The pictures work for color-blind readers too: labels have black outlines and colors that most eyes can tell apart, and
everything else is shown by lightness.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

TINT = 0.35  # share of the color of a label on raw

RGBImage = NDArray[np.uint8]  # RGB, (y, x, 3)


def label_palette() -> NDArray[np.float64]:
    """Return RGB colors for labels, (14, 3) in 0..1: seven hues for color-blind eyes, each plain and lighter.

    The hues are those of Okabe and Ito, Color Universal Design, 2008 (https://jfly.uni-koeln.de/color/).
    """
    hues = np.array([to_rgb(hue) for hue in OKABE_ITO])
    # If they were any lighter, two of them would look alike to red-blind or green-blind eyes.
    return np.concatenate([hues, hues + 0.3 * (1 - hues)])


def label_image(labels: NDArray[Any], width: int) -> RGBImage:
    """Color a section of labels (y, x), enlarged to at most `width` pixels, so that its black outlines are thin."""
    labels = enlarged(labels, width)
    image = _label_colors(labels)
    image[labels == 0] = 0.9
    image[find_boundaries(labels, mode="inner")] = 0
    return (255 * image).astype(np.uint8)


def overlay_image(gray: RGBImage, labels: NDArray[Any]) -> RGBImage:
    """Tint a picture (y, x, 3) with the colors of labels (y, x), and outline each label in its color. 0 has none."""
    strength = np.where(find_boundaries(labels, mode="inner"), 1, TINT) * (labels > 0)
    return blended(gray, 255 * _label_colors(labels), strength)


def blended(image: RGBImage, color: NDArray[Any], strength: NDArray[Any]) -> RGBImage:
    """Mix a picture (y, x, 3) with a color, or one per pixel, in 0..255, by a strength (y, x) in 0..1."""
    where, mixed = strength > 0, image.copy()
    colors = color[where] if color.ndim == 3 else color
    share = strength[where][:, None]
    mixed[where] = ((1 - share) * image[where] + share * colors).astype(np.uint8)
    return mixed


def _label_colors(labels: NDArray[Any]) -> NDArray[np.float64]:
    """Return a color (y, x, 3) in 0..1 for each label, shuffled, because neighbors often have consecutive ids."""
    palette = label_palette()
    colors: NDArray[np.float64] = palette[np.random.default_rng(0).permutation(len(palette))][labels % len(palette)]
    return colors


def intensity_image(section: NDArray[Any], colormap: str) -> RGBImage:
    """Color a section (y, x) of values in 0..1 with a color map."""
    return colormaps[colormap](section, bytes=True)[..., :3]


def gray_image(section: NDArray[Any]) -> RGBImage:
    """Show a section (y, x) of raw, of any number type, in gray and with full contrast."""
    return intensity_image(_stretch_contrast(section), "gray")


def enlarged(section: NDArray[Any], width: int) -> NDArray[Any]:
    """Repeat the voxels of a section (y, x, ...) as often as fits into `width` pixels along either axis."""
    zoom = max(1, width // max(section.shape[:2]))
    return section.repeat(zoom, axis=0).repeat(zoom, axis=1)


def round_length(longest: float) -> float:
    """Return the largest of ... 0.1, 0.2, 0.5, 1, 2, 5, 10 ... that is not longer, for scale bars."""
    power: float = 10.0 ** math.floor(math.log10(longest))
    return max(n * power for n in (1, 2, 5) if n * power <= longest * (1 + 1e-9))


def _stretch_contrast(section: NDArray[Any]) -> NDArray[np.floating[Any]]:
    """Spread the gray values of a raw section over 0..1, clipping the outermost 0.5 % at either end."""
    low, high = np.percentile(section, (0.5, 99.5))
    return np.clip((section - low) / max(high - low, 1e-6), 0, 1)
