"""Three planes through a point of a volume, side by side on a page, on one scale and with axes in micrometers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsdseg.html import grid, image_address
from lsdseg.pictures import RGBImage, round_length

AXES = "zyx"
PLANES = {"xy": (1, 2), "xz": (0, 2), "yz": (1, 0)}  # the axes that run down and across
# Of a plane, in units that are about one pixel on a narrow screen as on a wide one.
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 380, 52, 14, 30, 42
TICK_SPACE, LABEL_SPACE = 60, 24  # between two ticks; from a tick to the edge of the plane
SHARPNESS = 2  # pixels of a picture per unit, for screens with small pixels
CROSS = 14, 5  # from the marked point to the outer and inner ends of its cross

Index = tuple[Any, ...]  # a number along one axis, slices along the others
Sections = Callable[[Index], Sequence[NDArray[Any]]]


def planes(
    sections: Sections,
    paint: Callable[..., RGBImage],
    box: Sequence[slice],
    point: Sequence[int],
    voxel_size: Sequence[float],
    offset: Sequence[float],
    cross: bool = False,
) -> str:
    """Show the planes xy, xz and yz through a voxel.

    Args:
        sections: returns the arrays (rows, columns) that a plane shows, of the voxels at an index of the volume.
        paint: makes a picture of them; they are enlarged before, so outlines are thin.
        box: what is shown, as slices of voxels (z, y, x).
        point: the voxel (z, y, x).
        voxel_size: (z, y, x) in nm.
        offset: of the volume, (z, y, x) in nm.
        cross: mark the point.

    Returns:
        HTML. Planes that are one voxel wide show nothing and are left out, but for xy.
    """
    micrometers = [size / 1000 for size in voxel_size]
    extents = [(side.stop - side.start) * size for side, size in zip(box, micrometers, strict=True)]
    scale = (WIDTH - LEFT - RIGHT) / max(extents)
    shown = []
    for name, (down, across) in PLANES.items():
        if name != "xy" and 1 in (box[down].stop - box[down].start, box[across].stop - box[across].start):
            continue
        normal = 3 - down - across
        index = tuple(point[axis] if axis == normal else side for axis, side in enumerate(box))
        arrays = [np.asarray(array) for array in sections(index)]
        if down > across:
            arrays = [array.T for array in arrays]
        size = extents[down] * scale, extents[across] * scale
        for axis, length in enumerate(size):
            times = max(1, round(SHARPNESS * length / arrays[0].shape[axis]))
            arrays = [array.repeat(times, axis=axis) for array in arrays]
        begin = [(offset[axis] / 1000 + box[axis].start * micrometers[axis]) for axis in (down, across)]
        parts = [
            f'<image x="{LEFT}" y="{TOP}" width="{size[1]:.1f}" height="{size[0]:.1f}" preserveAspectRatio="none" '
            f'href="{image_address(paint(*arrays))}"/>',
            _ruler((AXES[down], AXES[across]), begin, size, scale),
            _bar(TOP + size[0] + BOTTOM - 10, scale),
        ]
        if cross:
            at = [(point[axis] + 0.5 - box[axis].start) * micrometers[axis] * scale for axis in (down, across)]
            parts.append(_cross(at[1] + LEFT, at[0] + TOP))
        depth = (offset[normal] + point[normal] * voxel_size[normal]) / 1000
        title = f"{name} at {AXES[normal]} {depth:.6g} µm, section {point[normal]}"
        svg = f'<svg viewBox="0 0 {WIDTH} {TOP + size[0] + BOTTOM:.0f}" role="img" aria-label="{escape(title)}">'
        shown.append(f"<figure><strong>{escape(title)}</strong>{svg}{''.join(parts)}</svg></figure>")
    return grid(*shown)


def _ruler(names: tuple[str, str], begin: Sequence[float], size: Sequence[float], scale: float) -> str:
    """Draw names and ticks (micrometers) of the axes that run down and across, at the left and below."""
    step, bottom = 1 / round_length(scale / TICK_SPACE), TOP + size[0]
    parts = [
        f'<text x="{LEFT - 8}" y="{TOP - 15}" text-anchor="end">{names[0]} (µm)</text>',
        f'<text x="{LEFT}" y="{bottom + BOTTOM - 6:.1f}">{names[1]} (µm)</text>',
    ]
    for axis, (low, length) in enumerate(zip(begin, size, strict=True)):
        first, last = math.ceil(low / step - 1e-6), math.floor((low + length / scale) / step + 1e-6)
        for value in (step * number for number in range(first, last + 1)):
            at = (value - low) * scale
            if axis == 0:
                line = f'x1="{LEFT - 5}" x2="{LEFT}" y1="{TOP + at:.1f}" y2="{TOP + at:.1f}"'
                text = f'x="{LEFT - 8}" y="{TOP + at + 4:.1f}" text-anchor="end"'
            else:
                line = f'x1="{LEFT + at:.1f}" x2="{LEFT + at:.1f}" y1="{bottom:.1f}" y2="{bottom + 5:.1f}"'
                near = LEFT + at + LABEL_SPACE > WIDTH
                end = f'x="{WIDTH}" text-anchor="end"' if near else f'x="{LEFT + at:.1f}" text-anchor="middle"'
                text = f'{end} y="{bottom + 18:.1f}"'
            parts.append(f'<line class="tick" {line}/><text {text}>{value:.6g}</text>')
    return "".join(parts)


def _bar(height: float, scale: float) -> str:
    """Draw a scale bar of a round length, at most a quarter of the plane, at a height."""
    length = round_length((WIDTH - LEFT - RIGHT) / 4 / scale)
    end = WIDTH - RIGHT
    return (
        f'<line class="bar" x1="{end - length * scale:.1f}" x2="{end}" y1="{height:.1f}" y2="{height:.1f}"/>'
        f'<text x="{end - length * scale - 8:.1f}" y="{height + 4:.1f}" text-anchor="end">{length:g} µm</text>'
    )


def _cross(x: float, y: float) -> str:
    """Draw a cross around a point, open in the middle and visible on dark and light."""
    outer, inner = CROSS
    arms = f"M{x - outer:.1f} {y:.1f}h{outer - inner}m{2 * inner} 0h{outer - inner}"
    arms += f"M{x:.1f} {y - outer:.1f}v{outer - inner}m0 {2 * inner}v{outer - inner}"
    return f'<path class="halo" d="{arms}"/><path class="cross" d="{arms}"/>'
