"""The reference is a direct sum in float64 over all voxels of a label in the window, one voxel at a time."""

import multiprocessing
from itertools import combinations

import h5py
import numpy as np
import pytest
from lsd_lite import get_lsds

from lsdseg.engine.training.lsd import local_shape_descriptors


def brute_force(labels, sigma, voxel_size, n=1):
    """Compute descriptors from their definition, axis by axis and voxel by voxel."""
    ndim = labels.ndim
    sigma = np.broadcast_to(np.asarray(sigma, float), ndim)
    step = np.asarray(voxel_size, float) * n
    radius = (3 * sigma / step + 0.5).astype(int)
    total = np.prod(
        [np.exp(-((np.arange(-r, r + 1) * d / s) ** 2) / 2).sum() for r, d, s in zip(radius, step, sigma, strict=True)]
    )
    sampled = labels[(slice(None, None, n),) * ndim]
    pairs = list(combinations(range(ndim), 2))
    result = np.zeros((2 * ndim + len(pairs) + 1, *labels.shape))
    for voxel in np.argwhere(labels):
        offsets = np.argwhere(sampled == labels[tuple(voxel)]) - voxel // n
        offsets = offsets[(abs(offsets) <= radius).all(axis=1)] * step
        weights = np.exp(-((offsets / sigma) ** 2).sum(axis=1) / 2)
        center, covariance = np.zeros(ndim), np.zeros((ndim, ndim))
        if len(offsets) > 0:
            center = np.average(offsets, axis=0, weights=weights)
            covariance = np.einsum("k,ki,kj", weights / weights.sum(), offsets - center, offsets - center)
        variance = np.maximum(np.diag(covariance), 1e-3)
        correlation = [covariance[i, j] / np.sqrt(variance[i] * variance[j]) for i, j in pairs]
        result[(slice(None), *voxel)] = [
            *(center / sigma / 2 + 0.5),
            *(variance / sigma**2),
            *(np.array(correlation) / 2 + 0.5),
            weights.sum() / total,
        ]
    return result.clip(0, 1)


def cells(shape, count, seed=0):
    """Make Voronoi cells, a background seam, a label of one voxel, a label one voxel thin and a label in two pieces."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, shape, (count, len(shape)))
    grid = np.moveaxis(np.indices(shape), 0, -1)
    labels = np.argmin(np.linalg.norm(grid[..., None, :] - seeds, axis=-1), axis=-1).astype(np.uint64) + 1
    labels[..., shape[-1] // 2] = 0
    labels[..., 1, :] = count + 1
    labels[..., 3, 3] = count + 2
    labels[..., -2:, -2:] = labels[..., :1, :1] = count + 3
    return labels


@pytest.mark.parametrize(
    ("shape", "count", "sigma", "voxel_size", "downsample"),
    [
        pytest.param((12, 13, 14), 9, 3, (1, 1, 1), 1, id="isotropic"),
        pytest.param((6, 14, 37), 12, (80, 20, 16), (40, 4, 4), 1, id="anisotropic"),
        pytest.param((5, 7, 9), 3, 40, (1, 1, 1), 1, id="window larger than the volume"),
        pytest.param((5, 7, 9), 3, 1, (10, 10, 10), 1, id="window of one voxel"),
        pytest.param((12, 14, 16), 6, 30, (10, 10, 10), 2, id="downsample 2"),
        pytest.param((11, 13, 17), 6, (60, 40, 40), (20, 10, 10), 3, id="downsample 3, does not divide the shape"),
        pytest.param((14, 14, 21), 40, 60, (10, 10, 10), 2, id="downsample 2, labels sampled in few places"),
        pytest.param((30, 41), 12, 5, (1, 1), 1, id="2D"),
        pytest.param((31, 40), 12, (40, 24), (8, 4), 2, id="2D, downsample 2"),
    ],
)
def test_equals_the_definition(shape, count, sigma, voxel_size, downsample):
    labels = cells(shape, count)
    result = local_shape_descriptors(labels, sigma, voxel_size, downsample)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, brute_force(labels, sigma, voxel_size, downsample), atol=1e-4, rtol=0)


def test_equals_the_definition_on_thin_neurites(data_dir):
    labels = np.load(data_dir / "cremi_labels.npz")["labels"][10:18, 60:76, 60:92]
    result = local_shape_descriptors(labels, 80, (40, 4, 4))
    np.testing.assert_allclose(result, brute_force(labels, 80, (40, 4, 4)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("downsample", [1, 2])
def test_equals_lsd_lite(data_dir, downsample):
    with h5py.File(data_dir / "fib25_train.hdf") as file:
        labels = file["volumes/labels/neuron_ids"][20:52, 100:132, 100:148]
    result = local_shape_descriptors(labels, 80, (10, 10, 10), downsample)
    expected = get_lsds(labels, 80.0, (10, 10, 10), downsample=downsample)
    # lsd-lite puts a label without any sampled voxel at the origin of the volume. If a label is flat and sampled far
    # from the voxel, its correlations are rounding errors. Both concern a few voxels in ten thousand.
    assert np.mean(np.abs(result - expected).max(axis=0) > 2e-3) < 5e-4


def test_equals_lsd_lite_in_2d():
    labels = cells((40, 60), 8)
    expected = get_lsds(labels, (5.0, 8.0), (1, 2))
    np.testing.assert_allclose(local_shape_descriptors(labels, (5, 8), (1, 2)), expected, atol=2e-3, rtol=0)


def test_correlations_are_zy_zx_yx():
    z, y, x = np.indices((21, 21, 21))
    for channel, (a, b) in {6: (z, y), 7: (z, x), 8: (y, x)}.items():
        rod = (abs(a - b) <= 1) & (abs(z + y + x - a - b - 10) <= 1)
        correlations = local_shape_descriptors(rod.astype(int), 3)[6:9, 10, 10, 10]
        assert correlations[channel - 6] > 0.9
        np.testing.assert_allclose(np.delete(correlations, channel - 6), 0.5, atol=1e-4)


def test_context_of_three_sigma_is_enough():
    labels = cells((24, 30, 40), 20)
    whole = local_shape_descriptors(labels, 20, (10, 10, 10), 2)
    crop = local_shape_descriptors(labels[2:22, 4:28, 6:38], 20, (10, 10, 10), 2)
    inner = (slice(None), *[slice(6, -6)] * 3)
    np.testing.assert_allclose(crop[inner], whole[:, 8:16, 10:22, 12:32], atol=1e-5, rtol=0)


def test_one_label_everywhere_fills_the_window():
    inner = local_shape_descriptors(np.full((20, 22, 24), 7), 2)[:, 6:-6, 6:-6, 6:-6].reshape(10, -1)
    offsets, variances, correlations, mass = np.split(inner, [3, 6, 9])
    np.testing.assert_allclose(offsets, 0.5, atol=1e-6)
    assert np.all((variances > 0.9) & (variances < 1))
    np.testing.assert_allclose(correlations, 0.5, atol=1e-6)
    np.testing.assert_allclose(mass, 1, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 6), (4, 5, 0), (0, 0), (3, 4, 5), (3, 4)])
def test_no_labels_no_descriptors(shape):
    result = local_shape_descriptors(np.zeros(shape, np.uint64), 2.0, downsample=2)
    assert result.shape == (10 if len(shape) == 3 else 6, *shape)
    assert not result.any()


def test_only_which_voxels_share_a_label_matters():
    labels = cells((8, 9, 20), 4)
    expected = local_shape_descriptors(labels, 2.5)
    huge = np.array([0, 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 3, 4], np.uint64)[labels]
    memory_order = np.asfortranarray(labels)
    strided = np.repeat(labels, 2, axis=2)[:, :, ::2]
    read_only = labels.copy()
    read_only.flags.writeable = False
    for same in (
        huge,
        memory_order,
        strided,
        read_only,
        labels.astype(">i4"),
        labels.astype(np.uint8),
        -labels.astype(np.int64),
    ):
        before = same.copy()
        np.testing.assert_array_equal(local_shape_descriptors(same, 2.5), expected)
        np.testing.assert_array_equal(same, before)


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (np.ones((4, 4, 4), np.float32), {}, "labels are float32; give integers"),
        (np.ones((4, 4, 4), bool), {}, "labels are bool; give integers"),
        (np.ones(4, int), {}, r"labels have shape \(4,\)"),
        (np.ones((1, 4, 4, 4), int), {}, r"labels have shape \(1, 4, 4, 4\)"),
        (np.ones((4, 4, 4), int), {"sigma": (1, 2)}, r"sigma is \(1, 2\); give one number above 0"),
        (np.ones((4, 4, 4), int), {"sigma": 0}, "sigma is 0; give one number above 0"),
        (np.ones((4, 4, 4), int), {"sigma": np.nan}, "sigma is nan"),
        (np.ones((4, 4), int), {"voxel_size": (1, 1, 1)}, "for each of the 2 axes"),
        (np.ones((4, 4), int), {"downsample": 0}, "downsample is 0; give a whole number"),
        (np.ones((4, 4), int), {"downsample": 1.5}, "downsample is 1.5"),
    ],
)
def test_refuses_what_it_cannot_describe(labels, arguments, message):
    with pytest.raises(ValueError, match=message):
        local_shape_descriptors(labels, **({"sigma": 2.0} | arguments))


def test_runs_in_a_forked_worker():
    labels = cells((8, 9, 20), 4)
    expected = local_shape_descriptors(labels, 2.5)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result = pool.apply_async(local_shape_descriptors, (labels, 2.5)).get(timeout=60)
    np.testing.assert_array_equal(result, expected)
