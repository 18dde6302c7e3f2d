"""A synthetic electron-microscopy volume with perfect ground truth, for the demo and the tests.

The tissue is a model in nanometers that voxels only sample. Neurites are branching curves. A point x in space belongs
to the curve whose point p, with radius r, has the smallest power distance |x - p|^2 - r^2. So every voxel belongs to a
neurite, a seed gives the same tissue at every voxel size, and labels meet at membranes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cc3d
import edt
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.spatial import cKDTree
from skimage.segmentation import watershed
from tqdm import tqdm

from lsdseg.data_utils.replace import write_zarr
from lsdseg.data_utils.volumes import write_array
from lsdseg.errors import UserError

# Positions of voxel centers along z, y, x in nm.
Grid = Sequence[NDArray[np.floating[Any]]]

# Lengths are in nanometers, intensities in gray values of 0..255.
STEP = 20.0  # between the points of a curve
MARGIN = 400.0  # neurites also grow this far outside the volume, so that its rim looks like its center
MEDIAN_RADIUS, MIN_RADIUS, MAX_RADIUS = 95.0, 50.0, 280.0
MIN_HALF_WIDTH = 22.0  # neurites have no thinner parts, which would be invisible between two membranes
MIN_VOLUME = 80.0**3  # of a neurite's core, and of a mitochondrion; smaller ones are left out
MAX_SECTION = 15.0  # thicker sections are the mean of thinner ones, so that oblique membranes blur
MEMBRANE_WIDTH = 17.0
MITO_RADIUS, MITO_GAP = 110.0, 28.0  # largest radius; smallest distance to the membrane of the neurite
BLUR, NOISE = 7.0, 7.0


def make_phantom(
    shape: Sequence[int], *, seed: int, voxel_size: Sequence[float] = (10, 10, 10)
) -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.uint64]]:
    """Draw tissue of densely packed, branching neurites as an electron microscope shows it.

    If voxels are longer in z, they are cut sections: the image is the mean over the thickness of a section, labels are
    those at its center, and the brightness varies from section to section.

    Args:
        shape: (z, y, x) in voxels.
        seed: the same seed gives identical arrays, whatever the number of threads.
        voxel_size: (z, y, x) in nm.

    Returns:
        Raw, labels and mitochondria ids, all (z, y, x). Raw is uint8. Labels are uint64, dense from 1, and every
        neurite is one 6-connected piece. Mitochondria ids are uint64, dense from 1, 0 outside mitochondria, and each
        mitochondrion lies inside one neurite.

    Raises:
        UserError: shape or voxel size is not three positive numbers.
    """
    given: tuple[tuple[str, Sequence[float]], ...] = ("shape", shape), ("voxel size", voxel_size)
    for name, values in given:
        if len(values) != 3 or min(values) <= 0:
            raise UserError(f"phantom {name} {tuple(values)}: give three positive numbers, z y x")
    # An odd number of thin sections per section, because labels are taken from the middle one.
    thin = 2 * int(np.ceil(max(voxel_size[0] / MAX_SECTION - 1, 0) / 2)) + 1
    thin_size = [voxel_size[0] / thin, *map(float, voxel_size[1:])]
    thin_shape = (shape[0] * thin, *shape[1:])
    grid = [(np.arange(n) + 0.5) * size for n, size in zip(thin_shape, thin_size, strict=True)]
    tissue_rng, image_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))

    nearest, nearest_mitos = _sample_tissue(tissue_rng, grid)
    neurites = _make_connected(nearest, thin_size, MIN_HALF_WIDTH)
    to_membrane = edt.edt(neurites, anisotropy=tuple(thin_size))
    mitos = _number_pieces(nearest_mitos * (to_membrane > MITO_GAP), thin_size)
    image = _draw_image(image_rng, grid, thin_size, neurites, mitos, to_membrane)

    image = image.reshape(shape[0], thin, *shape[1:]).mean(axis=1)
    if voxel_size[0] > 2 * voxel_size[1]:
        image += image_rng.normal(0, 5, (shape[0], 1, 1))
    image += image_rng.normal(0, NOISE, shape)
    labels = neurites if thin == 1 else _make_connected(neurites[thin // 2 :: thin], voxel_size)
    mito_ids = _number_pieces(mitos[thin // 2 :: thin], voxel_size)
    return np.clip(image.round(), 0, 255).astype(np.uint8), labels, mito_ids


def write_phantom(
    path: Path | str,
    shape: Sequence[int],
    *,
    seed: int,
    voxel_size: Sequence[int] = (10, 10, 10),
    offset: Sequence[int] = (0, 0, 0),
) -> None:
    """Write the volume of `make_phantom` to a zarr: raw, neuron ids, their mask, mitochondria ids.

    Args:
        path: the zarr. An existing one is replaced.
        shape: (z, y, x) in voxels.
        seed: as for `make_phantom`.
        voxel_size: (z, y, x) in nm.
        offset: (z, y, x) in nm.

    Raises:
        UserError: as for `make_phantom`, or `path` does not end in .zarr.
    """
    if Path(path).suffix != ".zarr":
        raise UserError(f"{path}: the name of a phantom must end in .zarr")
    raw, labels, mito_ids = make_phantom(shape, seed=seed, voxel_size=voxel_size)
    arrays: dict[str, NDArray[Any]] = {
        "volumes/raw": raw,
        "volumes/labels/neuron_ids": labels,
        "volumes/labels/labels_mask": np.ones(shape, np.uint8),
        "volumes/labels/mito_ids": mito_ids,
    }
    with write_zarr(path) as zarr:
        for dataset, data in arrays.items():
            write_array(zarr, dataset, data, voxel_size=voxel_size, offset=offset)


def _sample_tissue(rng: Generator, grid: Grid) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the neurite number and the mitochondrion number (0: none) of every point of a grid."""
    extent = np.array([axis[-1] + axis[0] for axis in grid])
    points, radii, neurite_of, mito_of, mito_radii = _grow_neurites(rng, extent)
    # sqrt(R^2 - r^2) as a fourth coordinate makes the power distance an ordinary Euclidean one.
    lift = np.sqrt(radii.max() ** 2 - radii**2)
    tree = cKDTree(np.column_stack([points, lift]), leafsize=40)
    # Space is bent at two scales, so that membranes are neither flat nor smooth.
    bends = [
        np.add(*(size * _smooth_field(rng, grid, spacing) for size, spacing in ((28, 260), (10, 90)))) for _ in range(3)
    ]

    shape = tuple(map(len, grid))
    neurites, mitos = np.empty(shape, np.uint32), np.empty(shape, np.uint32)
    for z in tqdm(range(shape[0]), "phantom", unit="section", leave=False, disable=None):
        position = np.zeros((*shape[1:], 4))
        position[..., 0] = grid[0][z]
        position[..., 1] = grid[1][:, None]
        position[..., 2] = grid[2]
        for axis in range(3):
            position[..., axis] += bends[axis][z]
        distance, nearest = tree.query(position, workers=-1)
        neurites[z] = neurite_of[nearest]
        in_mito = distance**2 - lift[nearest] ** 2 < mito_radii[nearest] ** 2
        mitos[z] = np.where(in_mito, mito_of[nearest], 0)
    return neurites, mitos


def _grow_neurites(rng: Generator, extent: NDArray[np.float64]) -> list[NDArray[Any]]:
    """Grow neurites until their volumes add up to that of the padded box.

    Returns:
        Points (n, 3) in nm. For each point, its radius in nm, its neurite, its mitochondrion, and the radius in nm of
        the mitochondrion (0: it does not reach this point).
    """
    low, high = -MARGIN * np.ones(3), extent + MARGIN
    branches = []
    neurite, mito, missing = 0, 0, np.prod(high - low)
    while missing > 0:
        neurite += 1
        radius = MEDIAN_RADIUS * rng.lognormal(0, 0.45)
        buds = [(rng.uniform(low, high), rng.normal(size=3), radius, 1 + int(rng.exponential(3000) / STEP))]
        while buds:
            start, direction, radius, length = buds.pop()
            points, radii = _grow_branch(rng, start, direction, radius, length)
            mito_radii = _place_mito(rng, radii)
            mito += 1
            inside = ((points >= low) & (points < high)).all(axis=1)
            missing -= np.pi * STEP * np.sum(radii[inside] ** 2)
            ids = np.ones(inside.sum(), np.uint32)
            branches.append((points[inside], radii[inside], neurite * ids, mito * ids, mito_radii[inside]))
            for at in rng.integers(len(points), size=rng.poisson(len(points) * STEP / 1200)):
                buds.append((points[at], rng.normal(size=3), 0.75 * radii[at], 1 + length // 2))
    return [np.concatenate(column) for column in zip(*branches, strict=True)]


def _grow_branch(
    rng: Generator, start: NDArray[np.float64], direction: NDArray[np.float64], radius: float, length: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the points of a smooth random walk of `length` steps, and a radius that varies along it."""
    turns = np.cumsum(rng.normal(0, 0.12, (length, 3)), axis=0)
    steps = direction / np.linalg.norm(direction) + turns
    steps *= STEP / np.linalg.norm(steps, axis=1, keepdims=True)
    swelling = np.exp(2.2 * gaussian_filter1d(rng.normal(size=length), 8))
    return start + np.cumsum(steps, axis=0), np.clip(radius * swelling, MIN_RADIUS, MAX_RADIUS)


def _place_mito(rng: Generator, radii: NDArray[np.float64]) -> NDArray[np.float64]:
    """Place one elongated mitochondrion, and return its radius at each point of a branch: 0 beyond its ends."""
    half_length = rng.uniform(200, 600) / STEP
    along = (np.arange(len(radii)) - rng.integers(len(radii))) / half_length
    largest: NDArray[np.float64] = np.minimum(0.75 * radii, MITO_RADIUS) * (radii > 90)
    return largest * np.sqrt(np.clip(1 - along**2, 0, None))


def _draw_image(
    rng: Generator,
    grid: Grid,
    voxel_size: Sequence[float],
    neurites: NDArray[np.uint64],
    mitos: NDArray[np.uint64],
    to_membrane: NDArray[np.float32],
) -> NDArray[Any]:
    """Return the image of thin sections without noise, as floats."""

    def field(spacing: float) -> NDArray[np.float32]:
        return _smooth_field(rng, grid, spacing)

    count = int(neurites.max()) + 1
    brightness = np.where(rng.random(count) < 0.1, rng.normal(122, 7, count), rng.normal(152, 13, count))
    grain = rng.uniform(4, 9, count)
    texture = field(22.0)
    image = brightness.astype(np.float32)[neurites]
    image += grain.astype(np.float32)[neurites] * (texture + field(70.0))
    image -= 30 * np.clip(field(32.0) + field(180.0) - 1.7, 0, 1)  # vesicles, in clouds

    rim = edt.edt(mitos, anisotropy=tuple(voxel_size)) < 15
    image = np.where(mitos > 0, np.where(rim, 82, 94) + 5 * texture, image)

    membrane_distance = np.maximum(to_membrane - np.min(voxel_size) / 2, 0)
    width = MEMBRANE_WIDTH * np.exp(0.2 * field(200.0))
    contrast = np.clip(0.9 + 0.15 * field(120.0), 0.65, 1.1)
    image += (74 - image) * contrast * np.exp(-((membrane_distance / width) ** 2))
    return np.asarray(gaussian_filter(image, [BLUR / size for size in voxel_size]))


def _smooth_field(rng: Generator, grid: Grid, spacing: float) -> NDArray[np.float32]:
    """Return a random field over a grid, about standard normal: a spline through values `spacing` nm apart."""
    lattice_axes = [np.arange(-2, np.ceil(axis[-1] / spacing) + 3) * spacing for axis in grid]
    field = rng.normal(0, 1.6, [len(axis) for axis in lattice_axes]).astype(np.float32)
    for axis, (knots, positions) in enumerate(zip(lattice_axes, grid, strict=True)):
        field = make_interp_spline(knots, field, axis=axis)(positions).astype(np.float32)
    return field


def _make_connected(
    labels: NDArray[Any], voxel_size: Sequence[float], min_half_width: float = 0.0
) -> NDArray[np.uint64]:
    """Cut labels where they are thinner than 2 * min_half_width nm, and number the 6-connected pieces from 1.

    What is cut off or too small goes to the pieces around it.
    """
    depth = edt.edt(labels, anisotropy=tuple(voxel_size))
    cores = _number_pieces(labels * (depth > min_half_width), voxel_size)
    if not cores.any():
        return np.ones(labels.shape, np.uint64)
    # Flooding by distance gives every gap to the nearest piece that it can reach, so pieces stay whole.
    return np.asarray(watershed(edt.edt(cores == 0, anisotropy=tuple(voxel_size)), cores), np.uint64)


def _number_pieces(labels: NDArray[Any], voxel_size: Sequence[float]) -> NDArray[np.uint64]:
    """Number the 6-connected pieces of at least MIN_VOLUME from 1. Smaller ones become 0."""
    pieces = cc3d.connected_components(labels, connectivity=6)
    large = np.bincount(pieces.ravel()) * np.prod(voxel_size) >= MIN_VOLUME
    large[0] = False
    numbers: NDArray[np.uint64] = (np.cumsum(large) * large).astype(np.uint64)
    return numbers[pieces]
