"""Local shape descriptors (LSDs) of a label volume, the training target that tells a network about shape.

A Gaussian window is separable, but a window that sees only one label is separable only label by label. Published
implementations therefore filter the whole volume once per label, which makes them slow. Here, a label is represented by
its runs along x, and all work stays close to them. The moments of the window are summed along x from the ends of the
runs, then along z, and along y only where the label is. They are relative to the center of the window, so that large
coordinates cost no digits.

The code runs on one thread, without OpenMP. Training calls it in forked worker processes, where a thread pool would
hang.
"""

from collections.abc import Sequence
from typing import Any

import fastremap
import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

# Moments of LANES neighboring voxels along x (a strip) are stored together, so that the compiler fills SIMD registers.
LANES = 16
# Rows of moments are added four at a time. Taps and rows end in SPARE zeros, so that there is never a remainder. A zero
# tap may meet a row that is left from another label. Rows must therefore never contain uninitialized memory: NaN times
# 0 is NaN.
SPARE = 3
CHANNELS_2D = [1, 2, 4, 5, 8, 9]  # the ten channels without those of z

Floats = NDArray[np.float32]
Integers = NDArray[np.signedinteger[Any]]

_jit = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})


def local_shape_descriptors(
    labels: ArrayLike,
    sigma: float | Sequence[float],
    voxel_size: Sequence[float] | None = None,
    downsample: int = 1,
) -> NDArray[np.float32]:
    """Describe, at every voxel, the part of its label that a Gaussian window around it sees.

    Sheridan et al., "Local shape descriptors for neuron segmentation", Nature Methods 2023. The channels are those of
    the packages `lsds` and `lsd-lite`. With the mass m, center of mass c and covariance S of the label in the window:

    ======  ======  ===========================================================
    3D      2D      value, clipped to 0..1
    ======  ======  ===========================================================
    0 to 2  0 to 1  (c - center of the window) / sigma / 2 + 1/2 along z, y, x
    3 to 5  2 to 3  variances S_zz, S_yy, S_xx, each at least 1e-3, / sigma^2
    6 to 8  4       correlations of zy, zx and yx (2D: of yx), / 2 + 1/2
    9       5       m, the share of the window that the label fills
    ======  ======  ===========================================================

    The window ends at three sigma. There are no labels outside the array, so provide three sigma of context.

    Args:
        labels: integers of any width, (z, y, x) or (y, x); 0 is background.
        sigma: standard deviation of the window in world units (nm), one number or one per axis.
        voxel_size: in the same unit, one number per axis; 1 by default.
        downsample: use only every n-th voxel along each axis. The n voxels from there on share the window around it,
            but each is described by its own label. A label without any n-th voxel in the window gets mass 0, offsets
            and correlations 1/2, and the minimum variance.

    Returns:
        float32 (10, z, y, x) or (6, y, x); all channels are 0 where the label is 0. The computation needs about 24
        bytes per n-th voxel in the largest bounding box of a label.

    Raises:
        ValueError: labels that are not integers, or neither 2D nor 3D; another argument that is not above 0 or has the
            wrong length.
    """
    volume = np.asarray(labels)
    dims = volume.ndim
    _check(volume, downsample)
    sigmas = _per_axis("sigma", sigma, dims)
    voxel_sizes = _per_axis("voxel_size", 1 if voxel_size is None else voxel_size, dims)
    if dims == 3:
        return _describe_volume(volume, sigmas, voxel_sizes, int(downsample))
    # Treat the section as a volume, with the next section ten sigma away.
    descriptors = _describe_volume(
        volume[None], np.insert(sigmas, 0, 1), np.insert(voxel_sizes, 0, 10), int(downsample)
    )
    return descriptors[CHANNELS_2D, 0]


def _check(labels: NDArray[Any], downsample: float) -> None:
    """Raise ValueError if the labels or the down-sampling cannot be used."""
    if labels.ndim not in (2, 3):
        raise ValueError(f"labels have shape {labels.shape}; give a volume (z, y, x) or a section (y, x)")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}; give integers, for example labels.astype('uint64')")
    if downsample < 1 or downsample != int(downsample):
        raise ValueError(f"downsample is {downsample}; give a whole number above 0")


def _per_axis(name: str, value: float | Sequence[float], dims: int) -> NDArray[np.float64]:
    values = np.asarray(value, np.float64)
    if values.shape not in ((), (dims,)) or not np.all((values > 0) & (values < np.inf)):
        raise ValueError(f"{name} is {value}; give one number above 0 for each of the {dims} axes")
    return np.broadcast_to(values, dims)


def _describe_volume(
    labels: NDArray[Any], sigma: NDArray[np.float64], voxel_size: NDArray[np.float64], downsample: int
) -> Floats:
    """Return the ten descriptors of labels (z, y, x); sigma and voxel size have one value per axis."""
    labels = np.ascontiguousarray(labels, dtype=np.uint64)
    descriptors = np.zeros((10, *labels.shape), np.float32)
    run_labels, runs = _find_runs(labels, downsample)
    if len(runs) == 0:
        return descriptors
    run_labels, _ = fastremap.renumber(run_labels)
    order = np.argsort(run_labels, kind="stable")
    runs = runs[order]
    begins = np.flatnonzero(np.diff(run_labels[order], prepend=0))
    corners = np.minimum.reduceat(runs[:, :3], begins) // downsample
    opposite = (np.maximum.reduceat(runs[:, [0, 1, 3]], begins) - [0, 0, 1]) // downsample
    boxes = (opposite - corners + 1 + [0, SPARE, LANES - 1]) // [1, 1, LANES]
    taps_z, taps_y, taps_x = (_taps(s) for s in sigma / (voxel_size * downsample))
    _describe_labels(
        runs,
        np.append(begins, len(runs)),
        corners,
        boxes,
        np.zeros(boxes.prod(axis=1).max() * 6 * LANES, np.float32),
        np.pad(taps_z, ((0, 0), (0, SPARE))).astype(np.float32),
        np.pad(taps_y, ((0, 0), (0, SPARE))).astype(np.float32),
        np.pad(taps_x.cumsum(axis=1), ((0, 0), (1, 0))),
        (1e-3 / sigma**2).astype(np.float32),
        downsample,
        descriptors,
    )
    return descriptors


def _taps(sigma: float) -> NDArray[np.float64]:
    """Return the Gaussian g, g * d and g * d^2 at distances d in sigmas, (3, 2 * radius + 1).

    Args:
        sigma: in voxels.
    """
    radius = int(3 * sigma + 0.5)  # as scipy.ndimage.gaussian_filter with truncate=3
    d = np.arange(-radius, radius + 1) / sigma
    gaussian = np.exp(-(d**2) / 2)
    taps: NDArray[np.float64] = gaussian / gaussian.sum() * d ** np.arange(3)[:, None]
    return taps


@_jit
def _find_runs(labels: NDArray[np.uint64], downsample: int) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Return the labels and (z, y, start, stop) of all runs along x. Rows that down-sampling unites are consecutive."""
    depth, height, width = labels.shape
    count = 0
    for z in range(depth):
        for y in range(height):
            previous = np.uint64(0)
            for x in range(width):
                label = labels[z, y, x]
                count += label != previous and label != 0
                previous = label
    run_labels = np.empty(count, np.uint64)
    runs = np.empty((count, 4), np.int32)
    i = 0
    for z0 in range(0, depth, downsample):
        for y0 in range(0, height, downsample):
            for z in range(z0, min(z0 + downsample, depth)):
                for y in range(y0, min(y0 + downsample, height)):
                    stop = 0
                    while stop < width:
                        start = stop
                        label = labels[z, y, start]
                        while stop < width and labels[z, y, stop] == label:
                            stop += 1
                        if label != 0:
                            run_labels[i] = label
                            runs[i] = z, y, start, stop
                            i += 1
    return run_labels, runs


@_jit
def _describe_labels(
    runs: Integers,
    bounds: Integers,
    corners: Integers,
    boxes: Integers,
    scratch: Floats,
    taps_z: Floats,
    taps_y: Floats,
    summed_x: NDArray[np.float64],
    min_variance: Floats,
    downsample: int,
    descriptors: Floats,
) -> None:
    """Write the descriptors of every label. Its runs lie between two `bounds`; its box begins at its corner."""
    for i in range(len(boxes)):
        depth, rows, strips = boxes[i]
        moments = scratch[: depth * rows * strips * 6 * LANES].reshape(strips, depth, rows, 6 * LANES)
        label_runs = runs[bounds[i] : bounds[i + 1]]
        radius_y = (taps_y.shape[1] - SPARE) // 2
        _filter_label(label_runs, corners[i], taps_z, radius_y, summed_x, downsample, moments)
        _write_label(label_runs, corners[i], moments, taps_y, min_variance, downsample, descriptors)


# Below, positions are in down-sampled voxels from the corner of the label's box, except in `runs`.


@_jit
def _filter_label(
    runs: Integers,
    corner: Integers,
    taps_z: Floats,
    radius_y: int,
    summed_x: NDArray[np.float64],
    downsample: int,
    moments: Floats,
) -> None:
    """Filter a label along x and z, in the rows that are at most the radius away from its voxels along y."""
    strips, depth, rows, _ = moments.shape
    radius = (taps_z.shape[1] - SPARE) // 2
    sources = np.empty((rows, depth), np.int64)
    counts = np.empty(rows, np.int64)
    along_x = np.empty((rows, depth + SPARE, 3 * LANES), np.float32)
    y_first = np.empty(depth, np.int64)
    y_last = np.empty(depth, np.int64)
    window = np.empty((3, taps_z.shape[1]), np.float32)
    for strip in range(strips):
        _filter_x(runs, corner, strip, summed_x, downsample, sources, counts, along_x)
        _find_rows(runs, corner, strip, downsample, y_first, y_last)
        for y in range(rows):
            begin = end = 0
            for z in range(depth):
                if y_first[z] - radius_y <= y <= y_last[z] + radius_y:
                    while begin < counts[y] and sources[y, begin] < z - radius:
                        begin += 1
                    while end < counts[y] and sources[y, end] <= z + radius:
                        end += 1
                    for moment in range(3):
                        for i in range(begin, end):
                            window[moment, i - begin] = taps_z[moment, sources[y, i] - z + radius]
                        window[moment, end - begin : end - begin + SPARE] = 0
                    _filter_z(along_x[y, begin:], window, end - begin, moments[strip, z, y])


@_jit
def _write_label(
    runs: Integers,
    corner: Integers,
    moments: Floats,
    taps_y: Floats,
    min_variance: Floats,
    downsample: int,
    descriptors: Floats,
) -> None:
    """Filter a label along y at its own voxels, and write its descriptors there."""
    strips, _, rows, _ = moments.shape
    height = rows - SPARE
    radius = (taps_y.shape[1] - SPARE) // 2
    left = corner[2] * downsample
    row_of_strip = np.full(strips, -1, np.int64)
    values = np.empty(10 * LANES, np.float32)
    full_row = np.empty((10, strips * LANES * downsample), np.float32)
    for i in range(len(runs)):
        run_z, run_y, start, stop = runs[i]
        z, y = run_z // downsample - corner[0], run_y // downsample - corner[1]
        first_strip = (start // downsample - corner[2]) // LANES
        last_strip = ((stop - 1) // downsample - corner[2]) // LANES
        for strip in range(first_strip, last_strip + 1):
            if row_of_strip[strip] != z * height + y:
                row_of_strip[strip] = z * height + y
                begin, end = max(y - radius, 0), min(y + radius + 1, height)
                _filter_y(moments[strip, z, begin:], taps_y[:, begin - y + radius :], end - begin, values)
                _normalize(values, min_variance)
                for channel in range(10):
                    for x in range(LANES):
                        for repeat in range(downsample):
                            position = (strip * LANES + x) * downsample + repeat
                            full_row[channel, position] = values[channel * LANES + x]
        for channel in range(10):
            for x in range(start, stop):
                descriptors[channel, run_z, run_y, x] = full_row[channel, x - left]


@_jit
def _filter_x(
    runs: Integers,
    corner: Integers,
    strip: int,
    summed_x: NDArray[np.float64],
    downsample: int,
    sources: Integers,
    counts: Integers,
    along_x: Floats,
) -> None:
    """Compute the moments x, 1, xx of a strip's rows that see the label along x.

    Args:
        runs: the runs of the label.
        corner: the first voxel of its box.
        strip: the number of the strip.
        summed_x: cumulative taps along x.
        downsample: as everywhere.
        sources: gets, for each y, the values of z that have moments.
        counts: gets, for each y, how many there are.
        along_x: gets the moments of each y, in the order of `sources`.
    """
    radius = summed_x.shape[1] // 2 - 1
    left = corner[2] + strip * LANES
    counts[:] = 0
    for i in range(len(runs)):
        z, y, start, stop = runs[i]
        if z % downsample != 0 or y % downsample != 0:
            continue
        start, stop = (start + downsample - 1) // downsample - left, (stop + downsample - 1) // downsample - left
        x_first, x_end = max(start - radius, 0), min(stop + radius, LANES)
        if start >= stop or x_first >= x_end:
            continue
        z, y = z // downsample - corner[0], y // downsample - corner[1]
        if counts[y] == 0 or sources[y, counts[y] - 1] != z:
            sources[y, counts[y]] = z
            along_x[y, counts[y]] = 0
            counts[y] += 1
        row = along_x[y, counts[y] - 1]
        for x in range(x_first, x_end):
            low, high = max(start - x + radius, 0), min(stop - x + radius, 2 * radius + 1)
            row[x] += summed_x[1, high] - summed_x[1, low]
            row[LANES + x] += summed_x[0, high] - summed_x[0, low]
            row[2 * LANES + x] += summed_x[2, high] - summed_x[2, low]
    for y in range(len(counts)):
        along_x[y, counts[y] : counts[y] + SPARE] = 0


@_jit
def _find_rows(
    runs: Integers, corner: Integers, strip: int, downsample: int, y_first: Integers, y_last: Integers
) -> None:
    """Find, for each z, the first and the last y at which the label has voxels in the strip."""
    left = (corner[2] + strip * LANES) * downsample
    y_first[:] = 1 << 32
    y_last[:] = -(1 << 32)
    for i in range(len(runs)):
        run_z, run_y, start, stop = runs[i]
        if start < left + LANES * downsample and stop > left:
            z, y = run_z // downsample - corner[0], run_y // downsample - corner[1]
            y_first[z] = min(y_first[z], y)
            y_last[z] = max(y_last[z], y)


@_jit
def _filter_z(rows: Floats, window: Floats, length: int, target: Floats) -> None:
    """Turn the moments x, 1, xx into zx, z, x, 1, xx, zz."""
    target[:] = 0
    for i in range(0, length, 4):
        _add_rows(rows, i, 0, 3, window[0], target, 2)
        _add_rows(rows, i, 0, 2, window[1], target, 0)
        _add_rows(rows, i, 1, 1, window[2], target, 5)


@_jit
def _filter_y(rows: Floats, window: Floats, length: int, target: Floats) -> None:
    """Turn the moments zx, z, x, 1, xx, zz into zx, z, x, 1, xx, zz, yz, yx, y, yy."""
    target[:] = 0
    for i in range(0, length, 4):
        _add_rows(rows, i, 0, 6, window[0], target, 0)
        _add_rows(rows, i, 1, 3, window[1], target, 6)
        _add_rows(rows, i, 3, 1, window[2], target, 9)


@njit(inline="always")
def _add_rows(rows: Floats, i: int, first: int, moments: int, taps: Floats, target: Floats, target_first: int) -> None:
    """Add rows i to i + 3, each times its tap: `moments` moments from `first` on, to those from `target_first` on."""
    row0, row1, row2, row3 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
    tap0, tap1, tap2, tap3 = taps[i], taps[i + 1], taps[i + 2], taps[i + 3]
    for x in range(moments * LANES):
        source = first * LANES + x
        added = tap0 * row0[source] + tap1 * row1[source] + tap2 * row2[source] + tap3 * row3[source]
        target[target_first * LANES + x] += added


@_jit
def _normalize(values: Floats, min_variance: Floats) -> None:
    """Turn the moments zx, z, x, 1, xx, zz, yz, yx, y, yy, with lengths in sigmas, into the ten channels, in place."""
    zero, half, one = np.float32(0), np.float32(0.5), np.float32(1)
    for i in range(LANES):
        mass = values[3 * LANES + i]
        scale = one / mass if mass > 0 else one
        z = values[LANES + i] * scale
        y = values[8 * LANES + i] * scale
        x = values[2 * LANES + i] * scale
        zz = _variance(values[5 * LANES + i] * scale, z)
        yy = _variance(values[9 * LANES + i] * scale, y)
        xx = _variance(values[4 * LANES + i] * scale, x)
        zy = values[6 * LANES + i] * scale - z * y if zz > 0 and yy > 0 else zero
        zx = values[i] * scale - z * x if zz > 0 and xx > 0 else zero
        yx = values[7 * LANES + i] * scale - y * x if yy > 0 and xx > 0 else zero
        zz = max(zz, min_variance[0])
        yy = max(yy, min_variance[1])
        xx = max(xx, min_variance[2])
        values[i] = half + half * z
        values[LANES + i] = half + half * y
        values[2 * LANES + i] = half + half * x
        values[3 * LANES + i] = zz
        values[4 * LANES + i] = yy
        values[5 * LANES + i] = xx
        values[6 * LANES + i] = half + half * zy / np.sqrt(zz * yy)
        values[7 * LANES + i] = half + half * zx / np.sqrt(zz * xx)
        values[8 * LANES + i] = half + half * yx / np.sqrt(yy * xx)
        values[9 * LANES + i] = mass
    for i in range(len(values)):
        values[i] = min(max(values[i], zero), one)


@njit(inline="always")
def _variance(mean_square: np.float32, mean: np.float32) -> np.float32:
    """Return the variance, or 0 if it is within the rounding error of float32, because the label is flat there."""
    variance = mean_square - mean * mean
    return variance if variance > np.float32(2e-6) * mean_square else np.float32(0)
