"""Bodies that a thin neck joins, and changes of caliber."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsdseg.engine.evaluate.shape import Grid, Shape, Widths, radii_in, shapes_of, widths_in

SIZE = (40, 10, 10)


def blobs(shape, seed):
    """Random segments of a few voxels each, with background between some."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array([0, 3, 7, 2**63 + 5], np.uint64), [-(-size // 3) for size in shape])
    return np.kron(coarse, np.ones((3, 3, 3), np.uint64))[tuple(map(slice, shape))]


def in_blocks(segmentation, radii, grid, step, by_section=False):
    """The widths of a volume, block by block."""
    around, radius = np.pad(segmentation, 1), np.pad(radii, 1)
    parts = []
    for begin in itertools.product(
        *(range(0, size, width) for size, width in zip(segmentation.shape, step, strict=True))
    ):
        near = tuple(slice(b, min(b + n, size) + 2) for b, n, size in zip(begin, step, segmentation.shape, strict=True))
        parts.append(widths_in(around[near], radius[near], begin, grid, by_section))
    return Widths(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@pytest.mark.parametrize("by_section", [False, True])
def test_radii_are_those_of_a_loop_and_need_no_more_context_than_the_largest(by_section):
    segmentation = blobs((5, 14, 16), 0)
    radii = radii_in(segmentation, SIZE, 30, by_section)
    places = np.argwhere(np.ones(segmentation.shape))
    for place in places[:: 7 if not by_section else 11]:
        other = segmentation[tuple(places.T)] != segmentation[*place]
        if by_section:
            other &= places[:, 0] == place[0]
        nearest = np.linalg.norm((places[other] - place) * SIZE, axis=1).min(initial=30)
        assert radii[*place] == pytest.approx(nearest if segmentation[*place] else 0)
    part = radii_in(segmentation[:, 3:, :-4], SIZE, 30, by_section)
    assert (part[:, 3:, :-3] == radii[:, 6:, :-7]).all()


@pytest.mark.parametrize("step", [(4, 6, 5), (8, 6, 10), (99, 99, 99)])
@pytest.mark.parametrize("by_section", [False, True])
def test_widths_are_those_of_a_loop_whatever_the_blocks(step, by_section):
    segmentation = blobs((9, 14, 16), 1)
    radii = radii_in(segmentation, SIZE, 60, by_section)
    grid = Grid(segmentation.shape, (1 if by_section else 4, 3, 5))
    counts = [-(-n // width) for n, width in zip(grid.shape, grid.cube, strict=True)]
    expected = {}
    for place in map(tuple, np.argwhere(segmentation)):
        thicker = False
        for direction, back in itertools.product((1, 2) if by_section else (0, 1, 2), (1, -1)):
            there = list(place)
            there[direction] -= back
            if not 0 <= there[direction] < grid.shape[direction] or segmentation[*there] != segmentation[place]:
                continue
            thicker |= radii[*there] > radii[place]
            cubes = [np.ravel_multi_index(np.array(at) // grid.cube, counts) for at in (place, there)]
            if back == 1 and cubes[0] != cubes[1]:
                expected.setdefault((segmentation[place], *cubes), []).append(min(radii[place], radii[*there]))
        if not thicker:
            cube = np.ravel_multi_index(np.array(place) // grid.cube, counts)
            expected.setdefault((segmentation[place], cube, cube), []).append(radii[place])
    widths = in_blocks(segmentation, radii, grid, step, by_section)
    found = dict(zip(zip(*(column.tolist() for column in widths[:3]), strict=True), widths.radii, strict=True))
    assert len(found) == len(widths.radii)
    assert found == {tuple(map(int, key)): max(values) for key, values in expected.items()}
    assert (radii.ravel()[widths.voxels] >= widths.radii).all()
    assert (segmentation.ravel()[widths.voxels] == widths.segments).all()


def dumbbell(radius, neck):
    """Two balls, 44 voxels apart, and a rod between them."""
    z, y, x = np.indices((30, 30, 80))
    inside = np.zeros(z.shape, bool)
    for middle in (18, 62):
        inside |= (z - 15) ** 2 + (y - 15) ** 2 + (x - middle) ** 2 < radius**2
    return (inside | ((z - 15) ** 2 + (y - 15) ** 2 < neck**2) & (x > 18) & (x < 62)).astype(np.uint64)


def shape_of(segmentation, least=50.0):
    grid = Grid(segmentation.shape, (10, 10, 10))
    radii = radii_in(segmentation, (10, 10, 10), 240)
    return shapes_of(in_blocks(segmentation, radii, grid, (99, 99, 99)), grid, (10, 10, 10), least).get(1)


def test_a_neck_is_found_where_it_is():
    shape = shape_of(dumbbell(12, 3.5))
    assert shape.neck == pytest.approx(12 / 3.5, rel=0.15)
    assert shape.place[:2] == (15, 15)
    assert 28 <= shape.place[2] <= 52
    assert shape_of(dumbbell(12, 3.5), least=130).neck == 1  # the balls are too thin to be bodies


def test_one_body_has_no_neck():
    rod = dumbbell(6, 6)[..., 18:62]
    assert shape_of(rod) == Shape(pytest.approx(1, abs=0.2), 1.0, None)
    two = dumbbell(12, 0)  # balls that nothing joins
    assert shape_of(two).neck == 1
    assert shape_of(np.zeros((5, 5, 5), np.uint64)) is None


def test_a_cone_changes_its_caliber_slowly():
    z, y, x = np.indices((30, 30, 120))
    radius = 12 - x / 12  # from 12 to 2 voxels
    cone = ((z - 15) ** 2 + (y - 15) ** 2 < radius**2).astype(np.uint64)
    step = ((z - 15) ** 2 + (y - 15) ** 2 < np.where(x < 60, 12, 3) ** 2).astype(np.uint64)
    assert shape_of(cone).caliber < 2 < 3 < shape_of(step).caliber
    assert shape_of(cone).neck == shape_of(step).neck == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_necks_are_those_of_the_widest_ways_to_a_thicker_place(count, seed):
    """The widest way between two cubes is found here by trying every cube as a stop (Floyd and Warshall)."""
    rng = np.random.default_rng(seed)
    radii = rng.permutation(np.arange(20, 20 + count)).astype(np.float32)
    pairs = np.array([pair for pair in itertools.combinations(range(count), 2) if rng.uniform() < 0.5], int)
    pairs = pairs.reshape(-1, 2)
    passages = rng.permutation(np.arange(1, 1 + len(pairs))).astype(np.float32)
    widest = np.zeros((count, count))
    for (one, other), passage in zip(pairs, passages, strict=True):
        widest[one, other] = widest[other, one] = passage
    for stop in range(count):
        widest = np.maximum(widest, np.minimum(widest[:, stop, None], widest[stop]))
    necks = [1.0]
    for cube in range(count):
        ways = widest[cube][radii > radii[cube]]
        if ways.any() and radii[cube] >= 22:
            necks.append(radii[cube] / ways.max())
    cubes, others = (np.concatenate([np.arange(count), column]) for column in pairs[:, ::-1].T)
    segments, voxels = np.full(len(cubes), 9, np.uint64), np.arange(len(cubes))
    widths = Widths(segments, cubes, others, np.concatenate([radii, passages]), voxels)
    shape = shapes_of(widths, Grid((10, 10, 10), (1, 1, 1)), (1, 1, 1), 22)[9]
    assert shape.neck == pytest.approx(max(necks))
    assert (shape.place is None) == (max(necks) == 1)
