"""Affinities by their offsets, mutex watershed in memory and block by block, and sections linked into objects."""

import itertools

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import data_folder, output_path
from lsdseg.data_utils.phantom import make_phantom
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.engine.evaluate.metrics import count_overlaps, scores
from lsdseg.engine.offsets import DIRECT_NEIGHBORS
from lsdseg.engine.post.affinities import direct_neighbors, voxel_pairs
from lsdseg.engine.post.contacts import UNIT
from lsdseg.engine.post.fragments import extract_fragments
from lsdseg.engine.post.link import link_sections
from lsdseg.engine.post.mutex import edge_biases, mutex_watershed
from lsdseg.engine.post.signed import find_signed_contacts
from lsdseg.engine.post.steps.edges import agglomerate_blockwise
from lsdseg.engine.post.steps.fragments import extract_fragments_blockwise
from lsdseg.engine.post.steps.relabel import extract_segmentation
from lsdseg.engine.post.steps.tables import find_segments
from lsdseg.engine.post.whole import segment
from lsdseg.errors import UserError
from lsdseg.rag import open_store

PLACE = {"voxel_size": (10, 10, 10), "offset": (0, 20, 40)}
LONG_RANGE = [(-4, 0, 0), (0, -4, 0), (0, 0, -4)]
OFFSETS = DIRECT_NEIGHBORS + LONG_RANGE
IN_SECTION = [(0, 0, -1), (0, -1, 0), (0, 0, -4), (0, -4, 0)]
SHAPE = (48, 56, 60)
SETTINGS = {
    "DATA.DATA_DIR_PATH": "data",
    "SYSTEM.NUM_WORKERS": 2,
    "INS_SEGMENT.METHOD": "mutex",
    "INS_SEGMENT.BLOCK_SIZE": (24, 28, 30),
    "INS_SEGMENT.CONTEXT": (8, 8, 8),
    "INS_SEGMENT.EPSILON_AGGLOMERATE": 0.0,
    "INS_SEGMENT.THRESHOLDS": [0.5],
}


def voi(truth, segmentation):
    return scores(*count_overlaps([(segmentation, truth)]))["voi_sum"]


def affinities_of(labels, offsets):
    """Affinities of labels with a membrane around each, blurred and noisy (uint8)."""
    inside = labels.copy()
    for offset in DIRECT_NEIGHBORS:
        here, there = voxel_pairs(labels.shape, offset)
        inside[here][labels[here] != labels[there]] = 0
    affinities = np.ones((len(offsets), *labels.shape))
    for channel, offset in zip(affinities, offsets, strict=True):
        here, there = voxel_pairs(labels.shape, offset)
        channel[here] = (inside[here] == inside[there]) & (inside[here] > 0)
    noise = np.random.default_rng(0).normal(0, 0.1, affinities.shape)
    blurred = np.stack([gaussian_filter(channel, 0.7) for channel in affinities])
    return np.rint(255 * (blurred + noise).clip(0, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def neurites():
    """Neurites, and their affinities."""
    labels = make_phantom(SHAPE, seed=0)[1]
    return labels, affinities_of(labels, OFFSETS)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A function that puts affinities into a fresh home, where `config` finds them."""
    monkeypatch.chdir(tmp_path)

    def write(affinities, offsets):
        sample = data_folder(config(tmp_path), "test") / "sample.zarr"
        write_array(sample, "volumes/raw", np.zeros(affinities.shape[1:], np.uint8), **PLACE)
        attributes = {"offsets": [list(offset) for offset in offsets]}
        write_array(output(tmp_path), "volumes/pred_affs", affinities, **PLACE, attributes=attributes)
        return tmp_path

    return write


def config(home, **overrides):
    paths = {"DATA.HOME": home, "TRAIN.CHECKPOINT": home / "run" / "model_checkpoint_1"}
    settings = SETTINGS | paths | {f"INS_SEGMENT.{key}": value for key, value in overrides.items()}
    return load_config(overrides=[str(part) for item in settings.items() for part in item])


def output(home):
    return output_path(config(home), "sample.zarr")


def stored(home, name):
    return read(open_array(output(home), f"volumes/{name}"))


def faint_membrane():
    """Affinities (0..1) of two bodies that meet at x = 12, which only the long-range ones along x can tell."""
    affinities = np.ones((6, 12, 12, 24))
    affinities[2, :, :, 12] = 0.6
    affinities[5, :, :, 12:16] = 0
    return affinities


def mutex(affinities, biases=None, **settings):
    return mutex_watershed(affinities, offsets=OFFSETS, biases=edge_biases(OFFSETS, biases), **settings)


def test_long_range_affinities_keep_apart_what_touches():
    affinities = faint_membrane()
    segments = mutex(affinities)
    assert segments.dtype == np.uint64
    assert (segments[..., :12] == 1).all()
    assert (segments[..., 12:] == 2).all()
    contacts = find_signed_contacts(affinities, segments, OFFSETS, edge_biases(OFFSETS), 1, 2)
    assert (contacts.u, contacts.v, contacts.sums / UNIT) == (1, 2, pytest.approx(-0.5 / 0.6))

    blind = affinities.copy()
    blind[3:] = 1
    assert (mutex(blind) == 1).all()


def test_biases_decide_what_attracts_and_what_repels():
    affinities = faint_membrane()
    assert mutex(affinities, (-0.5, 0.1)).max() == 1  # nothing repels
    assert mutex(affinities, (-0.5, -0.5, -0.5, -0.5, -0.5, 0.1)).max() == 1  # nothing does along x
    assert mutex(affinities, (-0.5, -0.5, -0.5, 0.1, 0.1, -0.5)).max() == 2
    affinities[3:] = 1
    assert mutex(affinities).max() == 1
    assert mutex(affinities, (-0.7, 0)).max() == 1  # long range is surer
    assert mutex(affinities, (-0.7, -1)).max() == 2
    assert edge_biases(OFFSETS, (-0.2, -0.6)) == [-0.2] * 3 + [-0.6] * 3
    assert edge_biases(OFFSETS) == [-0.4] * 3 + [-0.5] * 3


def test_mask_background_and_filter():
    affinities = faint_membrane()
    affinities[:, :, :, :3] *= 0.3  # a margin that counts as boundary
    mask = np.ones(affinities.shape[1:], bool)
    mask[:3] = False
    filled = mutex(affinities, mask=mask)
    assert ((filled > 0) == mask).all()
    assert filled.max() == 2
    foreground = mutex(affinities, mask=mask, background_mask=True)
    assert not foreground[..., :3].any()
    assert foreground[3:, :, 3:].all()
    affinities[:3, :, :, 13:] = 0.6
    kept = mutex(affinities, filter_fragments=0.65)
    assert kept[..., 5].all()
    assert not kept[..., 15:].any()


def test_specks_go_to_the_fragment_around_them():
    affinities = np.ones((6, 12, 12, 12))
    for offset, channel in zip(OFFSETS, affinities, strict=True):
        here, there = voxel_pairs(channel.shape, offset)
        speck = np.zeros(channel.shape, bool)
        speck[6, 6, 6:8] = True
        channel[here][speck[here] != speck[there]] = 0.35
    assert (mutex(affinities) == 1).all()


def test_order_of_offsets_does_not_matter(neurites):
    order = [4, 2, 0, 5, 1, 3]
    offsets, shuffled = [OFFSETS[i] for i in order], neurites[1][order]
    np.testing.assert_array_equal(direct_neighbors(shuffled, offsets), neurites[1][:3])
    expected = mutex(neurites[1])
    given = mutex_watershed(shuffled, offsets=offsets, biases=edge_biases(offsets))
    np.testing.assert_array_equal(given, expected)
    found = [
        find_signed_contacts(values, expected, along, edge_biases(along), 1, 2**63 - 1)
        for values, along in ((shuffled, offsets), (neurites[1], OFFSETS))
    ]
    for ours, theirs in zip(*(vars(contacts).values() for contacts in found), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_mutex_watershed_finds_the_neurites(neurites):
    labels, affinities = neurites
    assert voi(labels, mutex(affinities)) < 0.8 < voi(labels, np.ones_like(labels)) / 2


def test_weights_are_means_over_all_pairs_of_voxels():
    random = np.random.default_rng(0)
    affinities, biases = random.random((6, 5, 6, 7)), [-0.4, -0.3, -0.4, -0.5, -0.6, -0.5]
    fragments = random.choice([0, 3, 5, 2**62], (5, 6, 7)).astype(np.uint64)
    fragments[:, :, 3:] = np.where(fragments[:, :, 3:] == 3, 9, fragments[:, :, 3:])
    fragments[:, :, :2] = np.where(fragments[:, :, :2] == 3, 2, 0)  # which touches only some
    evidence = {}
    for channel, offset, bias in zip(affinities, OFFSETS, biases, strict=True):
        for voxel in itertools.product(*map(range, fragments.shape)):
            partner = tuple(np.add(voxel, offset))
            pair = tuple(sorted((int(fragments[voxel]), int(fragments[partner])))) if min(partner) >= 0 else (0, 0)
            if pair[0] not in (0, pair[1]):
                evidence.setdefault(pair, ([], []))[offset not in DIRECT_NEIGHBORS].append(channel[voxel] + bias)
    expected = {}
    for pair, (direct, far) in sorted(evidence.items()):
        weight = max((np.mean(part) for part in (direct, far) if part), key=abs)
        if direct or weight < 0:
            expected[pair] = (len(direct), pytest.approx(weight / 0.7, abs=1e-6))
    contacts = find_signed_contacts(affinities, fragments, OFFSETS, biases, 1, 2**63 - 1)
    rows = (contacts.u.tolist(), contacts.v.tolist(), contacts.counts.tolist(), (contacts.sums / UNIT).tolist())
    assert {(u, v): (faces, weight) for u, v, faces, weight in zip(*rows, strict=True)} == expected
    assert any(faces == 0 for faces, _ in expected.values())
    own = find_signed_contacts(affinities, fragments, OFFSETS, biases, 4, 9)
    assert set(own.u.tolist()) == {5, 9}
    assert not set(own.sized_ids.tolist()) - {5, 9}


def test_every_offset_pairs_voxels_inside_the_volume():
    for offset in (-9, -4, -1, 0, 1, 4, 9):
        numbers = np.arange(5)
        here, there = voxel_pairs((5,), (offset,))
        assert (numbers[there] - numbers[here] == offset).all()
        assert len(numbers[here]) == max(0, 5 - abs(offset))


def graph(cfg):
    """02 and 03; fragments and edges."""
    extract_fragments_blockwise(cfg)
    agglomerate_blockwise(cfg)
    path = output_path(cfg, "sample.zarr")
    edges = zip(*open_store(cfg, path).edges("mutex"), strict=True)
    return [read(open_array(path, "volumes/fragments")), *map(np.concatenate, edges)]


def test_blocks_give_nearly_what_one_process_gives_and_workers_change_nothing(home, neurites):
    labels, affinities = neurites
    folder = home(affinities, OFFSETS)
    write_array(output(folder), "volumes/segmentation_040", labels, **PLACE)
    segment(config(folder))
    in_memory = stored(folder, "segmentation_mutex")
    np.testing.assert_array_equal(in_memory, mutex(affinities))
    assert list_arrays(output(folder)) == [
        "volumes/" + n for n in ("pred_affs", "segmentation_040", "segmentation_mutex")
    ]
    attributes = open_array(output(folder), "volumes/segmentation_mutex").attrs
    assert (attributes["method"], attributes["biases"]) == ("mutex", [-0.4] * 3 + [-0.5] * 3)

    two = graph(config(folder))
    find_segments(config(folder), "mutex", 0.5)
    extract_segmentation(config(folder), "mutex", 0.5)
    final = stored(folder, "final_segmentation_mutex_050")
    assert voi(in_memory, final) < 0.1 < voi(in_memory, two[0])
    with pytest.raises(UserError, match=r"MUTEX_BIAS was"):
        extract_fragments_blockwise(config(folder, MUTEX_BIAS=(-0.4, -0.6)))

    one = config(folder).clone()
    one.defrost()
    one.SYSTEM.NUM_WORKERS = 1
    one.DATA.OUTFILE = str(folder / "one")
    attributes = {"offsets": [list(offset) for offset in OFFSETS]}
    write_array(output_path(one, "sample.zarr"), "volumes/pred_affs", affinities, **PLACE, attributes=attributes)
    for ours, theirs in zip(graph(one), two, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def stack(neurites):
    """Labels of some sections, every body in a section numbered by itself, and their affinities, x before y."""
    labels = neurites[0][::4]
    return labels, np.stack([affinities_of(section[None], IN_SECTION)[:, 0] for section in labels], axis=1)


def sections_apart(segments):
    ids = [set(np.unique(section)) - {0} for section in segments]
    return all(ids) and len(set().union(*ids)) == sum(map(len, ids))


def test_stacks_without_z_are_segmented_section_by_section(home, stack):
    labels, affinities = stack
    folder = home(affinities, IN_SECTION)
    segment(config(folder))
    segment(config(folder, METHOD="waterz", MERGE_FUNCTION="hist_quant_75"))
    for name in ("fragments", "segmentation_050", "segmentation_mutex"):
        segments = stored(folder, name)
        assert sections_apart(segments)
        numbered = labels + (np.arange(len(labels), dtype=np.uint64) * np.uint64(1000))[:, None, None]
        assert name == "fragments" or voi(numbered, segments) < 0.8
    neighbors = np.stack([np.zeros_like(affinities[0]), affinities[1], affinities[0]])
    np.testing.assert_array_equal(stored(folder, "fragments"), extract_fragments(neighbors, fragments_in_xy=True))

    extract_fragments_blockwise(config(folder, METHOD="waterz", BLOCK_SIZE=(12, 28, 60)))
    assert sections_apart(stored(folder, "fragments"))


def test_links_follow_mutual_largest_overlap():
    stack = np.zeros((3, 10, 12), np.uint64)
    stack[0, :, :5], stack[1, :, 1:6], stack[2, :, 1:6] = 11, 21, 31  # one neurite, moving
    stack[0, :, 7:], stack[1, :6, 7:], stack[1, 6:, 7:] = 12, 22, 23  # a fork
    stack[2, 8:, 7:9] = 34  # less of it lies over 23 than is asked for below
    stack[2, 8:, 6] = 34
    linked = link_sections(stack, 0.5)
    assert linked.dtype == np.uint64
    ids = {old: set(linked[stack == old].tolist()) for old in np.unique(stack).tolist()}
    assert ids == {0: {0}, 11: {1}, 21: {1}, 31: {1}, 12: {2}, 22: {2}, 23: {3}, 34: {3}}
    assert link_sections(stack, 0.7)[2, 9, 7] not in ids[23]
    assert link_sections(stack, 1).max() == 7 - 2  # 21 and 31, 12 and 22
    assert not link_sections(np.zeros((2, 3, 3), np.uint64), 0).any()
    with pytest.raises(ValueError, match="several sections"):
        link_sections(np.ones((2, 3, 3), np.uint64), 0.5)


def test_linked_sections_are_neurites(home, stack):
    labels, affinities = stack
    folder = home(affinities, IN_SECTION)
    segment(config(folder))
    apart = stored(folder, "segmentation_mutex")
    segment(config(folder, LINK_SECTIONS=0.5))
    segment(config(folder, LINK_SECTIONS=0.5, METHOD="waterz", MERGE_FUNCTION="hist_quant_75"))
    for name in ("segmentation_mutex", "segmentation_050"):
        assert open_array(output(folder), f"volumes/{name}").attrs["link_sections"] == 0.5
        assert voi(labels, stored(folder, name)) < 1.3 < voi(labels, apart) / 2
    assert sections_apart(stored(folder, "fragments"))


@pytest.mark.parametrize(
    ("offsets", "overrides", "message"),
    [
        (DIRECT_NEIGHBORS, {}, r"TRAIN\.NEIGHBORHOOD.*TRAIN\.LR_NEIGHBORHOOD"),
        (OFFSETS, {"MUTEX_BIAS": [-0.1, -0.2, -0.3]}, r"3 numbers: give one for each of the 6 offsets"),
        (OFFSETS[:4], {"METHOD": "waterz"}, r"4 offsets|offsets .* shape"),
        ([(-1, 0, 0), (0, 0, -1), *LONG_RANGE, (0, -2, 0)], {}, r"\[0, -1, 0\]"),
        (OFFSETS, {"LINK_SECTIONS": 0.5}, r"LINK_SECTIONS"),
        (IN_SECTION, {"LINK_SECTIONS": 0.5, "METHOD": "waterz", "THRESHOLDS": [0.5, 1.0]}, r"THRESHOLDS"),
        (OFFSETS, {"MASK_FILE": "/mask.zarr"}, r"INS_SEGMENT\.MASK_FILE is /mask\.zarr: name .*MASK_DATASET"),
        (OFFSETS, {"MASK_FILE": "/mask.zarr", "MASK_DATASET": "mask"}, r"/mask\.zarr does not exist"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(home, offsets, overrides, message):
    channels = 6 if offsets == OFFSETS[:4] else len(offsets)
    folder = home(np.zeros((channels, 8, 8, 8), np.uint8), offsets)
    cfg = config(folder, **overrides)
    with pytest.raises(UserError, match=message):
        segment(cfg)
    with pytest.raises(UserError, match=r"LINK_SECTIONS" if "LINK_SECTIONS" in overrides else message):
        extract_fragments_blockwise(cfg)
    assert list_arrays(output(folder)) == ["volumes/pred_affs"]


def test_context_has_to_reach_as_far_as_the_affinities(home):
    folder = home(np.zeros((6, 8, 8, 8), np.uint8), OFFSETS)
    with pytest.raises(UserError, match=r"CONTEXT is \(8, 3, 8\): it has to be 4 or more along y"):
        extract_fragments_blockwise(config(folder, CONTEXT=(8, 3, 8)))
    for key, value in (("METHOD", "watershed"), ("MUTEX_BIAS", [-2, 0]), ("LINK_SECTIONS", 1.5)):
        with pytest.raises(UserError, match=key):
            config(folder, **{key: value})
