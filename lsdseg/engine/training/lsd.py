"""Local shape descriptors (LSDs) of a label volume: the training target that tells a network about shape.

A Gaussian window is separable, but one that sees a single label is so only label by label, and filtering the whole
volume once per label is what makes published implementations slow. Here a label is its runs along x, and all work
stays near them: moments of the window, relative to its center so that large coordinates cost no digits, are summed
along x from the ends of the runs, then along z, and along y only where the label is.

One thread and no OpenMP: training calls this in forked worker processes, where a pool of threads would hang.
"""

from collections.abc import Sequence

import fastremap
import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

# Moments are kept for LANES neighboring voxels along x together (a block), so that the compiler fills SIMD registers.
LANES = 16
# Rows of moments are added four at a time. Taps and rows end in SPARE zeros, so there is never a remainder; a zero tap
# may fall on a row left from another label, so that no row may ever hold what was in memory before (NaN times 0).
SPARE = 3
CHANNELS_2D = [1, 2, 4, 5, 8, 9]  # the ten channels without those of z

_jit = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})


def local_shape_descriptors(
    labels: ArrayLike,
    sigma: float | Sequence[float],
    voxel_size: Sequence[float] | None = None,
    downsample: int = 1,
) -> NDArray[np.float32]:
    """Describe, at every voxel, the part of its label that a Gaussian window around it sees.

    Sheridan et al., "Local shape descriptors for neuron segmentation", Nature Methods 2023. Channels are those of the
    packages `lsds` and `lsd-lite`; with the mass m, center of mass c and covariance S of the label in the window:

    ======  ======  ===========================================================
    3D      2D      value, clipped to 0..1
    ======  ======  ===========================================================
    0 to 2  0 to 1  (c - center of the window) / sigma / 2 + 1/2 along z, y, x
    3 to 5  2 to 3  variances S_zz, S_yy, S_xx, each at least 1e-3, / sigma^2
    6 to 8  4       correlations of zy, zx and yx (2D: of yx), / 2 + 1/2
    9       5       m, the share of the window that the label fills
    ======  ======  ===========================================================

    The window ends at three sigma. Outside the array there are no labels: give three sigma of context.

    Args:
        labels: integers of any width, (z, y, x) or (y, x); 0 is background.
        sigma: standard deviation of the window in world units (nm), one number or one per axis.
        voxel_size: in the same unit, one number per axis; 1 if not given.
        downsample: use only every n-th voxel along each axis, and give the window around it to the n voxels from
            there on. They are still described by their own label; one that has no n-th voxel in the window gets
            mass 0, offsets and correlations 1/2 and the least variance.

    Returns:
        float32 (10, z, y, x) or (6, y, x); all channels are 0 where the label is 0. The work needs about 24 bytes
        more per n-th voxel in the largest bounding box of a label.

    Raises:
        ValueError: labels that are not integers or neither 2D nor 3D; another argument that is not above 0 or has
            the wrong length.
    """
    labels = np.asarray(labels)
    if labels.ndim not in (2, 3):
        raise ValueError(f"labels have shape {labels.shape}; give a volume (z, y, x) or a section (y, x)")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}; give integers, for example labels.astype('uint64')")
    if downsample < 1 or downsample != int(downsample):
        raise ValueError(f"downsample is {downsample}; give a whole number above 0")
    downsample = int(downsample)
    sigma = _per_axis("sigma", sigma, labels.ndim)
    voxel_size = _per_axis("voxel_size", 1 if voxel_size is None else voxel_size, labels.ndim)

    volume = np.ascontiguousarray(labels, dtype=np.uint64)
    if labels.ndim == 2:  # one section of a volume, the next one ten sigma away
        volume, sigma, voxel_size = volume[None], np.insert(sigma, 0, 1), np.insert(voxel_size, 0, 10)
    descriptors = np.zeros((10, *volume.shape), np.float32)

    run_labels, runs = _find_runs(volume, downsample)
    if len(runs) > 0:
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
    return descriptors if labels.ndim == 3 else descriptors[CHANNELS_2D, 0]


def _per_axis(name: str, value: float | Sequence[float], ndim: int) -> NDArray[np.float64]:
    values = np.asarray(value, np.float64)
    if values.shape not in ((), (ndim,)) or not np.all((values > 0) & (values < np.inf)):
        raise ValueError(f"{name} is {value}; give one number above 0 for each of the {ndim} axes")
    return np.broadcast_to(values, ndim)


def _taps(sigma: float) -> NDArray[np.float64]:
    """Gaussian g, g * d and g * d^2 at distances d (in sigmas), (3, 2 * radius + 1); `sigma` is in voxels."""
    radius = int(3 * sigma + 0.5)  # the radius of scipy.ndimage.gaussian_filter with truncate=3
    d = np.arange(-radius, radius + 1) / sigma
    gaussian = np.exp(-(d**2) / 2)
    return gaussian / gaussian.sum() * d ** np.arange(3)[:, None]


@_jit
def _find_runs(labels, n):
    """Labels and (z, y, start, stop) of all runs along x; rows that down-sampling makes one follow each other."""
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
    for z0 in range(0, depth, n):
        for y0 in range(0, height, n):
            for z in range(z0, min(z0 + n, depth)):
                for y in range(y0, min(y0 + n, height)):
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
def _describe_labels(runs, bounds, corners, boxes, scratch, taps_z, taps_y, summed_x, least_variance, n, descriptors):
    """Write the descriptors of every label: its runs lie between two `bounds`, its box begins at its corner."""
    for i in range(len(boxes)):
        depth, rows, blocks = boxes[i]
        moments = scratch[: depth * rows * blocks * 6 * LANES].reshape(blocks, depth, rows, 6 * LANES)
        label_runs = runs[bounds[i] : bounds[i + 1]]
        radius_y = (taps_y.shape[1] - SPARE) // 2
        _filter_label(label_runs, corners[i], taps_z, radius_y, summed_x, n, moments)
        _write_label(label_runs, corners[i], moments, taps_y, least_variance, n, descriptors)


# Below, positions count down-sampled voxels from the corner of the label's box, except those in `runs`.


@_jit
def _filter_label(runs, corner, taps_z, radius_y, summed_x, n, moments):
    """Filter a label along x and z, in the rows that are within the radius of its voxels along y."""
    blocks, depth, rows, _ = moments.shape
    radius = (taps_z.shape[1] - SPARE) // 2
    sources = np.empty((rows, depth), np.int64)
    counts = np.empty(rows, np.int64)
    along_x = np.empty((rows, depth + SPARE, 3 * LANES), np.float32)
    y_first = np.empty(depth, np.int64)
    y_last = np.empty(depth, np.int64)
    window = np.empty((3, taps_z.shape[1]), np.float32)
    for block in range(blocks):
        _filter_x(runs, corner, block, summed_x, n, sources, counts, along_x)
        _find_rows(runs, corner, block, n, y_first, y_last)
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
                    _filter_z(along_x[y, begin:], window, end - begin, moments[block, z, y])


@_jit
def _write_label(runs, corner, moments, taps_y, least_variance, n, descriptors):
    """Filter along y where the label is, and write its descriptors there."""
    blocks, _, rows, _ = moments.shape
    height = rows - SPARE
    radius = (taps_y.shape[1] - SPARE) // 2
    left = corner[2] * n
    row_of_block = np.full(blocks, -1, np.int64)
    values = np.empty(10 * LANES, np.float32)
    full_row = np.empty((10, blocks * LANES * n), np.float32)
    for i in range(len(runs)):
        run_z, run_y, start, stop = runs[i]
        z, y = run_z // n - corner[0], run_y // n - corner[1]
        for block in range((start // n - corner[2]) // LANES, ((stop - 1) // n - corner[2]) // LANES + 1):
            if row_of_block[block] != z * height + y:
                row_of_block[block] = z * height + y
                begin, end = max(y - radius, 0), min(y + radius + 1, height)
                _filter_y(moments[block, z, begin:], taps_y[:, begin - y + radius :], end - begin, values)
                _normalize(values, least_variance)
                for channel in range(10):
                    for x in range(LANES):
                        for repeat in range(n):
                            full_row[channel, (block * LANES + x) * n + repeat] = values[channel * LANES + x]
        for channel in range(10):
            for x in range(start, stop):
                descriptors[channel, run_z, run_y, x] = full_row[channel, x - left]


@_jit
def _filter_x(runs, corner, block, summed_x, n, sources, counts, along_x):
    """Moments x, 1, xx of a block's rows that see the label along x, and at which z (`sources`) each y has them."""
    radius = summed_x.shape[1] // 2 - 1
    left = corner[2] + block * LANES
    counts[:] = 0
    for i in range(len(runs)):
        z, y, start, stop = runs[i]
        if z % n != 0 or y % n != 0:
            continue
        start, stop = (start + n - 1) // n - left, (stop + n - 1) // n - left
        x_first, x_end = max(start - radius, 0), min(stop + radius, LANES)
        if start >= stop or x_first >= x_end:
            continue
        z, y = z // n - corner[0], y // n - corner[1]
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
def _find_rows(runs, corner, block, n, y_first, y_last):
    """Per z, the first and the last y at which the label has voxels in the block."""
    left = (corner[2] + block * LANES) * n
    y_first[:] = 1 << 32
    y_last[:] = -(1 << 32)
    for i in range(len(runs)):
        run_z, run_y, start, stop = runs[i]
        if start < left + LANES * n and stop > left:
            z, y = run_z // n - corner[0], run_y // n - corner[1]
            y_first[z] = min(y_first[z], y)
            y_last[z] = max(y_last[z], y)


@_jit
def _filter_z(rows, window, length, target):
    """From x, 1, xx to zx, z, x, 1, xx, zz."""
    target[:] = 0
    for i in range(0, length, 4):
        _add_rows(rows, i, 0, 3, window[0], target, 2)
        _add_rows(rows, i, 0, 2, window[1], target, 0)
        _add_rows(rows, i, 1, 1, window[2], target, 5)


@_jit
def _filter_y(rows, window, length, target):
    """From zx, z, x, 1, xx, zz to zx, z, x, 1, xx, zz, yz, yx, y, yy."""
    target[:] = 0
    for i in range(0, length, 4):
        _add_rows(rows, i, 0, 6, window[0], target, 0)
        _add_rows(rows, i, 1, 3, window[1], target, 6)
        _add_rows(rows, i, 3, 1, window[2], target, 9)


@njit(inline="always")
def _add_rows(rows, i, first, moments, taps, target, to):
    """Add `moments` moments, from `first` on, of rows i to i + 3, times their taps, to those from `to` on."""
    row0, row1, row2, row3 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
    tap0, tap1, tap2, tap3 = taps[i], taps[i + 1], taps[i + 2], taps[i + 3]
    for x in range(moments * LANES):
        source = first * LANES + x
        target[to * LANES + x] += tap0 * row0[source] + tap1 * row1[source] + tap2 * row2[source] + tap3 * row3[source]


@_jit
def _normalize(values, least_variance):
    """Turn moments zx, z, x, 1, xx, zz, yz, yx, y, yy (lengths in sigmas) into the ten channels, in place."""
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
        zz = max(zz, least_variance[0])
        yy = max(yy, least_variance[1])
        xx = max(xx, least_variance[2])
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
def _variance(mean_square, mean):
    """Variance, and 0 where the difference is within the rounding errors of float32: the label is flat there."""
    variance = mean_square - mean * mean
    return variance if variance > np.float32(2e-6) * mean_square else np.float32(0)
