"""Fragments and edges of blocks, and small volumes block by block against the same volumes in memory."""

import itertools

import cc3d
import h5py
import numpy as np
import pytest
from scipy import ndimage
from test_post import affinities_of, with_boundaries

from lsdseg.data_utils.phantom import make_phantom
from lsdseg.engine.evaluate.metrics import count_overlaps, scores
from lsdseg.engine.post.agglomerate import agglomerate
from lsdseg.engine.post.contacts import Contacts, find_contacts, settle, simplified
from lsdseg.engine.post.fragments import extract_fragments
from lsdseg.engine.post.graph import fragments_of_block, score_edges
from lsdseg.engine.post.tables import connected_segments, relabel
from lsdseg.errors import UserError

SIZE = 32  # voxels of a block along each axis
VOXELS_IN_BLOCK = SIZE**3


def voi(a, b):
    return scores(*count_overlaps([(a, b)]))["voi_sum"]


def imaged(labels):
    """Neurites in connected pieces with boundaries between them, and their affinities, blurred and noisy."""
    neurites = cc3d.connected_components(with_boundaries(labels), connectivity=6).astype(np.uint64)
    affinities = np.stack([ndimage.gaussian_filter(channel, 0.7) for channel in affinities_of(neurites)])
    return neurites, np.clip(affinities + np.random.default_rng(0).normal(scale=0.15, size=affinities.shape), 0, 1)


@pytest.fixture(scope="module")
def phantom():
    """Ground truth and affinities of 96 voxels a side: 3 blocks along each axis."""
    return imaged(make_phantom((96, 96, 96), seed=0)[1])


@pytest.fixture(scope="module")
def fib25(data_dir):
    with h5py.File(data_dir / "fib25_train.hdf") as file:
        return imaged(file["volumes/labels/neuron_ids"][40:136, 80:176, 80:176])


@pytest.fixture(scope="module")
def noisy(phantom):
    """Affinities (float32) and fragments of a corner, so noisy that many fragments merge, at many scores."""
    affinities = phantom[1][:, :48, :64, :64]
    affinities = affinities + np.random.default_rng(1).normal(scale=0.2, size=affinities.shape)
    affinities = ((affinities - affinities.min()) / np.ptp(affinities)).astype(np.float32)
    return affinities, extract_fragments(affinities)


def layout(shape, context):
    """For every block its number, its slices, those with context, and the context before and after."""
    corners = itertools.product(*(range(0, n, SIZE) for n in shape))
    for number, corner in enumerate(corners):
        inner = tuple(slice(a, a + SIZE) for a in corner)
        outer = tuple(
            slice(max(0, a - context), min(n, a + SIZE + context)) for a, n in zip(corner, shape, strict=True)
        )
        yield number, inner, outer, [(i.start - o.start, o.stop - i.stop) for i, o in zip(inner, outer, strict=True)]


def run_blocks(affinities, context, *, order=1):
    """Fragments (z, y, x) and contacts of a volume, block by block, in this or (-1) reverse order."""
    shape = affinities.shape[1:]
    fragments, contacts = np.zeros(shape, np.uint64), []
    for block, inner, outer, widths in list(layout(shape, context))[::order]:
        fragments[inner], _, _ = fragments_of_block(
            affinities[:, *outer], context=widths, block=block, voxels_in_block=VOXELS_IN_BLOCK
        )
    for block, _, outer, _ in list(layout(shape, 1))[::order]:
        first, last = block * VOXELS_IN_BLOCK + 1, (block + 1) * VOXELS_IN_BLOCK
        contacts.append(find_contacts(affinities[:, *outer], fragments[outer], first, last))
    return fragments, contacts


def partition(labels):
    """Labels numbered in the order in which they occur."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def neighbors(fragments):
    """All pairs of fragments that share a face of a voxel, by brute force."""
    pairs = []
    for axis in range(3):
        a, b = np.moveaxis(fragments, axis, 0)[:-1], np.moveaxis(fragments, axis, 0)[1:]
        touching = (a != b) & (a > 0) & (b > 0)
        pairs.append(np.stack([np.minimum(a, b)[touching], np.maximum(a, b)[touching]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


@pytest.mark.parametrize("merge_function", ["hist_quant_25", "hist_quant_50", "hist_quant_75_initmax", "mean"])
def test_edges_up_to_a_threshold_give_the_partition_of_agglomerate(noisy, merge_function):
    affinities, fragments = noisy
    far = np.where(fragments > 0, fragments * np.uint64(2**50) + np.uint64(2**60), 0)
    u, v, scores = score_edges(affinities, far, merge_function)
    assert u.dtype == v.dtype == np.uint64
    assert scores.dtype == np.float32
    assert (np.stack([u, v], axis=1) == neighbors(far)).all()

    thresholds = [bins / 256 for bins in (1, 2, 8, 24, 64, 96, 128, 160)]
    if merge_function != "mean":
        thresholds += [0.35, 0.45]
    ids = np.unique(far[far > 0])
    luts = connected_segments(ids, [(u, v, scores)], thresholds)
    sizes = set()
    for threshold, expected in agglomerate(affinities, fragments, thresholds, merge_function):
        segments = relabel(far, luts[threshold])
        assert (partition(segments) == partition(expected)).all(), threshold
        sizes.add(len(np.unique(segments)))
    assert len(sizes) >= 4

    finest = np.unique(scores)
    for threshold, (_, segments) in connected_segments(ids, [(u, v, scores)], finest).items():
        joined = segments[np.searchsorted(ids, u)] == segments[np.searchsorted(ids, v)]
        assert (joined == (scores <= threshold)).all()  # a hierarchy: no edge of a higher score lies within a segment


def test_score_is_that_of_the_merge_of_regions():
    fragments = np.zeros((1, 2, 6), np.uint64)
    fragments[0, 0, :3], fragments[0, 0, 3:], fragments[0, 1] = 5, 7, 9
    affinities = np.ones((3, 1, 2, 6), np.float32)
    affinities[2, 0, 0, 3] = 0.8  # between 5 and 7
    affinities[1, 0, 1, :3], affinities[1, 0, 1, 3:] = 0.3, 0.5  # between 9 and both
    u, v, scores = score_edges(affinities, fragments, "mean")
    assert u.tolist() == [5, 5, 7]
    assert v.tolist() == [7, 9, 9]
    assert scores == pytest.approx([0.2, 0.6, 0.6])  # 5 and 7 are one region before the mean of their border counts

    # waterz merges scores in the same 256th first come, first served: 9 joins the others later, at a lower score
    affinities[2, 0, 0, 3], affinities[1, 0, 1] = 0.497, 0.499
    scores = score_edges(affinities, fragments, "mean")[2]
    assert scores == pytest.approx([0.503, 0.503, 0.503])

    affinities[1, 0, 1] = 0
    scores = score_edges(affinities, fragments, "mean")[2]
    assert scores[0] == pytest.approx(0.503)
    assert np.isnan(scores[1:]).all()


def test_edges_of_odd_inputs(noisy):
    affinities, fragments = noisy
    given = fragments.copy()
    as_bytes = np.rint(affinities * 255).astype(np.uint8)
    as_floats = as_bytes * np.float32(1 / 255)
    for a, b in zip(score_edges(as_bytes, fragments, "mean"), score_edges(as_floats, fragments, "mean"), strict=True):
        assert (a == b).all()
    assert (fragments == given).all()
    for alone in (np.zeros_like(fragments), np.full_like(fragments, 2**40)):
        assert [len(column) for column in score_edges(affinities, alone, "hist_quant_50")] == [0, 0, 0]
    with pytest.raises(UserError, match="hist_quant_33"):
        score_edges(affinities, fragments, "hist_quant_33")
    with pytest.raises(ValueError, match="shape"):
        score_edges(affinities, fragments[1:], "mean")
    affinities = affinities.copy()
    affinities[0, 5, 5, 5] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        score_edges(affinities, fragments, "mean")


def test_fragments_of_a_block(phantom):
    affinities = phantom[1][:, :48, :56, :56]
    context = (8, 12, (12, 12))
    fragments, ids, centers = fragments_of_block(affinities, context=context, block=7, voxels_in_block=VOXELS_IN_BLOCK)
    assert fragments.shape == (32, 32, 32)
    assert fragments.dtype == ids.dtype == np.uint64
    assert ids[0] == 7 * VOXELS_IN_BLOCK + 1
    assert (np.diff(ids) == 1).all()
    assert (np.unique(fragments[fragments > 0]) == ids).all()
    assert centers == pytest.approx(np.array(ndimage.center_of_mass(fragments, fragments, ids)))
    assert cc3d.connected_components(fragments, connectivity=6).max() == len(ids)

    whole = extract_fragments(affinities)[8:40, 12:44, 12:44]
    assert ((fragments > 0) == (whole > 0)).all()
    pairs = np.unique(np.stack([whole, fragments]).reshape(2, -1), axis=1)
    assert len(np.unique(pairs[1])) == pairs.shape[1]  # no fragment has parts of two
    again = fragments_of_block(affinities, context=context, block=7, voxels_in_block=VOXELS_IN_BLOCK)
    assert all((a == b).all() for a, b in zip((fragments, ids, centers), again, strict=True))


def test_pieces_that_meet_only_in_the_context_are_two_fragments():
    labels = np.zeros((16, 16, 40), np.uint64)
    labels[4:12, 4:12, 4:12] = labels[4:12, 4:12, 28:36] = 1
    labels[4:12, 4:12, 12:28][:4] = 1  # the bridge, in z 4..8
    settings = {"background_mask": True, "epsilon_agglomerate": 0.5}
    assert extract_fragments(affinities_of(labels), **settings).max() == 1
    fragments, ids, _ = fragments_of_block(
        affinities_of(labels), context=((9, 0), 0, 0), block=0, voxels_in_block=10**6, **settings
    )
    assert len(ids) == 2
    assert set(np.unique(fragments[:, :, :20])) == {0, ids[0]}
    assert set(np.unique(fragments[:, :, 20:])) == {0, ids[1]}


def test_background_gives_nothing():
    background = np.zeros((3, 20, 20, 20), np.uint8)
    masked = np.full((3, 20, 20, 20), 255, np.uint8)
    for affinities, mask in ((background, None), (masked, np.zeros((20, 20, 20), np.uint8))):
        fragments, ids, centers = fragments_of_block(
            affinities, context=(2, 2, 2), block=3, voxels_in_block=16**3, mask=mask, epsilon_agglomerate=0.25
        )
        assert fragments.shape == (16, 16, 16)
        assert not fragments.any()
        assert ids.shape == (0,)
        assert centers.shape == (0, 3)


def test_blocks_without_room_are_refused():
    affinities = np.full((3, 20, 20, 20), 255, np.uint8)
    arguments = {"context": (2, 2, 2), "voxels_in_block": 16**3}
    last = (2**63 - 1) // 16**3 - 1
    _, ids, _ = fragments_of_block(affinities, block=last, **arguments)
    assert ids.tolist() == [last * 16**3 + 1]
    with pytest.raises(ValueError, match="63 bits"):
        fragments_of_block(affinities, block=last + 1, **arguments)
    with pytest.raises(ValueError, match="leaves 4096"):
        fragments_of_block(affinities, context=(2, 2, 2), block=0, voxels_in_block=16**3 - 1)
    with pytest.raises(ValueError, match="leaves 0"):
        fragments_of_block(affinities, context=(2, 2, 10), block=0, voxels_in_block=16**3)


def test_every_pair_of_neighbors_is_a_contact_of_one_block(phantom):
    fragments, contacts = run_blocks(phantom[1][:, :64, :64, :64], 12)
    pairs = np.concatenate([np.stack([part.u, part.v], axis=1) for part in contacts])
    expected = neighbors(fragments)
    assert len(pairs) == len(expected) > 300
    assert (np.unique(pairs, axis=0) == expected).all()
    of_block = (expected - 1) // VOXELS_IN_BLOCK
    assert np.count_nonzero(of_block[:, 0] != of_block[:, 1]) > 100


@pytest.mark.parametrize("volume", ["phantom", "fib25"])
def test_block_by_block_is_as_in_memory(volume, request):
    truth, affinities = request.getfixturevalue(volume)
    thresholds, merge_function = [0.5, 0.7], "hist_quant_75"
    in_memory = dict(agglomerate(affinities, extract_fragments(affinities), thresholds, merge_function))

    runs = []
    for order in (1, -1):
        fragments, parts = run_blocks(affinities, 16, order=order)
        contacts, _ = Contacts.of_all([simplified(part, merge_function) for part in parts])
        edges = contacts.u, contacts.v, settle(contacts, merge_function).scores
        luts = connected_segments(np.unique(fragments[fragments > 0]), [edges], thresholds)
        runs.append([fragments, *(relabel(fragments, lut) for lut in luts.values())])
    for a, b in zip(*runs, strict=True):
        assert (a == b).all()

    fragments, *segmentations = runs[0]
    for threshold, segmentation in zip(thresholds, segmentations, strict=True):
        difference = voi(segmentation, in_memory[threshold])
        print(f"{volume}, threshold {threshold}: VOI {difference:.4f}; {voi(segmentation, truth):.3f} to the truth")
        assert difference < 0.05
        assert voi(segmentation, truth) < 0.3
        assert voi(fragments, truth) > 2
