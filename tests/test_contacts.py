"""Agglomeration of a graph from the contacts that blocks found."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blockwise_numerics import fib25, noisy, phantom, voi  # noqa: F401

from lsdseg.config.implementations import MERGE_FUNCTIONS
from lsdseg.engine.offsets import DIRECT_NEIGHBORS
from lsdseg.engine.post import agglomerate as waterz_settings
from lsdseg.engine.post.agglomerate import agglomerate
from lsdseg.engine.post.contacts import BINS, NO_LIMIT, UNIT, Contacts, Limit, find_contacts, settle, simplified
from lsdseg.engine.post.fragments import extract_fragments
from lsdseg.engine.post.limited import agglomerate_limited
from lsdseg.engine.post.signed import find_signed_contacts
from lsdseg.engine.post.tables import connected_segments, relabel
from lsdseg.engine.post.tree import Tree
from lsdseg.errors import UserError

THRESHOLDS = [n / 10 for n in range(1, 10)]
LAST = 2**63 - 1


def merge_contacts(contacts, merge_function, limit=NO_LIMIT):
    """The edges of a graph that nobody cut into parts."""
    whole, _ = Contacts.of_all([simplified(contacts, merge_function)])
    return contacts.u, contacts.v, settle(whole, merge_function, limit).scores


def merge_in_a_tree(folder, grid, parts, merge_function, levels, limit=NO_LIMIT):
    """The edges of a graph from its parts, {position: contacts}, and what each level of a tree left."""
    tree = Tree(folder, grid, merge_function, limit)
    for number, (position, part) in enumerate(parts.items()):
        tree.settle_block(position, number, part)
    left = [tree.size(0)]
    for level in range(1, levels + 1):
        for position in np.ndindex(tree.level_grid(level)):
            tree.settle_node(level, position)
        left.append(tree.size(level))
    tree.settle_top(levels)
    for level in range(levels, 0, -1):
        for position in np.ndindex(tree.level_grid(level)):
            tree.tell_node(level, position)
    edges = [tree.edges_of_block(position)[1] for position in parts]
    u, v, scores = (np.concatenate(columns) for columns in zip(*edges, strict=True))
    order = np.lexsort((v, u))
    return (u[order], v[order], scores[order]), left


def numbered_by_blocks(fragments, size, reach=1):
    """Cut fragments at the faces of blocks, and number them block by block.

    Returns their ids; of each block its slices with `reach` voxels around it, and its first and last id.
    """
    numbers, ranges, first = np.zeros_like(fragments), [], 1
    for corner in itertools.product(*(range(0, n, size) for n in fragments.shape)):
        box = tuple(slice(a, a + size) for a in corner)
        found, inverse = np.unique(fragments[box], return_inverse=True)
        ids = np.where(found > 0, np.arange(first, first + len(found)), 0).astype(np.uint64)
        numbers[box] = ids[inverse].reshape(fragments[box].shape)
        around = tuple(slice(max(0, s.start - reach), s.stop + reach) for s in box)
        ranges.append((around, first, first + len(found) - 1))
        first += len(found)
    return numbers, ranges


def brute_force(contacts, merge_function, limit=NO_LIMIT):
    """Merge the closest pair again and again, with every histogram written out: {pair of fragments: score}."""
    quantile = int(merge_function.split("_")[2]) if merge_function != "mean" else None
    region = {i: i for i in {*contacts.u.tolist(), *contacts.v.tolist()}}
    sizes = dict(zip(contacts.sized_ids.tolist(), contacts.sizes.tolist(), strict=True))
    borders = {}
    for n, pair in enumerate(zip(contacts.u.tolist(), contacts.v.tolist(), strict=True)):
        part = slice(*contacts.starts[n : n + 2])
        bins = np.repeat(contacts.bins[part].astype(int), contacts.counts[part]).tolist()
        if merge_function.endswith("initmax"):
            bins = [b for b in bins if b == max(bins)]
        borders[pair] = (bins, contacts.sums[n].item(), contacts.counts[part].sum().item(), pair)

    def score(border):
        bins, total, faces, _ = border
        if quantile is None:
            return 1 - total / (faces * UNIT)
        return 1 - (sorted(bins)[quantile * len(bins) // 100] + 0.5) / BINS

    def kept_apart(pair):
        return min(sizes[region] for region in pair) >= limit.voxels and score(borders[pair]) > limit.score

    found = {}
    while free := [pair for pair in borders if score(borders[pair]) < 1 and not kept_apart(pair)]:
        best = min(free, key=lambda pair: (score(borders[pair]), borders[pair][3]))
        value = score(borders[best])
        a, b = best
        del borders[best]
        sizes[a] += sizes[b]
        for u, v in zip(contacts.u.tolist(), contacts.v.tolist(), strict=True):
            if {region[u], region[v]} == {a, b}:
                found[u, v] = value
        region = {i: a if r == b else r for i, r in region.items()}
        moved = {pair: borders.pop(pair) for pair in list(borders) if b in pair}
        for pair, border in moved.items():
            (other,) = set(pair) - {b}
            key = (min(a, other), max(a, other))
            before = borders.get(key, ([], 0, 0, (0, 0)))
            joined = [before[i] + border[i] for i in range(3)]
            borders[key] = (*joined, max(before[3], border[3]))
    return found


@st.composite
def graphs(draw):
    """Contacts of a random graph, with few different affinities and sizes, so that many scores are the same."""
    pairs = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=30))
    pairs = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
    u, v, sums, starts, bins, counts = [], [], [], [0], [], []
    for a, b in pairs:
        histogram = draw(st.dictionaries(st.sampled_from([0, 50, 100, 101, 255]), st.integers(1, 3), min_size=1))
        u.append(a)
        v.append(b)
        bins += sorted(histogram)
        counts += [histogram[k] for k in sorted(histogram)]
        sums.append(sum(k * n * UNIT // BINS for k, n in histogram.items()))
        starts.append(len(bins))
    sizes = draw(st.lists(st.integers(1, 3), min_size=12, max_size=12))
    return of_columns(u, v, sums, starts, bins, counts, sized_ids=range(1, 13), sizes=sizes)


limits = st.sampled_from([NO_LIMIT, Limit(2, 0.4), Limit(4, 0.7), Limit(1, 0.7)])


def of_columns(u, v, sums, starts, bins, counts, open_ids=(), open_sides=(), sized_ids=(), sizes=()):
    types = (
        np.uint64,
        np.uint64,
        np.int64,
        np.int64,
        np.uint8,
        np.int64,
        *[np.uint64] * 3,
        np.uint8,
        np.uint64,
        np.int64,
    )
    columns = (u, v, sums, starts, bins, counts, u, v, open_ids, open_sides, sized_ids, sizes)
    return Contacts(*(np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)))


def part_of(contacts, rows, open_ids=(), open_sides=(), first=1, last=12):
    """Some contacts, what is open, and the sizes of first..last."""
    ranges = [range(*contacts.starts[row : row + 2]) for row in rows]
    take = np.array([at for of_row in ranges for at in of_row], int)
    starts = np.append(0, np.cumsum([len(of_row) for of_row in ranges])).astype(int)
    columns = (contacts.u[rows], contacts.v[rows], contacts.sums[rows])
    histograms = contacts.bins[take], contacts.counts[take]
    sized = range(first, last + 1)
    return of_columns(*columns, starts, *histograms, open_ids, open_sides, sized, contacts.sizes[first - 1 : last])


@settings(max_examples=150, deadline=None)
@given(
    graphs(),
    st.sampled_from(["mean", "hist_quant_25", "hist_quant_50", "hist_quant_85", "hist_quant_50_initmax"]),
    limits,
)
def test_the_closest_pair_merges_first(contacts, merge_function, limit):
    u, v, found = merge_contacts(contacts, merge_function, limit)
    expected = brute_force(contacts, merge_function, limit)
    rows = zip(u.tolist(), v.tolist(), found.tolist(), strict=True)
    assert {(a, b): score for a, b, score in rows if not np.isnan(score)} == pytest.approx(expected, abs=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    graphs(),
    st.sampled_from(["mean", "hist_quant_25", "hist_quant_85", "hist_quant_50_initmax"]),
    st.integers(0, 3),
    limits,
)
def test_a_tree_over_a_random_graph_changes_nothing(contacts, merge_function, levels, limit):
    check_tree(contacts, merge_function, levels, limit)


def check_tree(contacts, merge_function, levels, limit):
    """Compare a tree with the whole graph.

    Nodes 1 to 12 lie in a row of six blocks; those of blocks that do not touch have no contact.
    """
    block_u, block_v = (contacts.u.astype(int) - 1) // 2, (contacts.v.astype(int) - 1) // 2
    near = np.flatnonzero(block_v - block_u <= 1)
    parts = {}
    for block in range(6):
        own, beyond = near[block_u[near] == block], near[(block_u[near] < block) & (block_v[near] == block)]
        sides = dict.fromkeys(contacts.v[beyond].tolist(), 1)
        for u in contacts.u[own[block_v[own] > block]].tolist():
            sides[u] = sides.get(u, 0) | 2
        parts[block, 0, 0] = part_of(contacts, own, list(sides), list(sides.values()), 2 * block + 1, 2 * block + 2)
    with tempfile.TemporaryDirectory() as folder:
        edges, _ = merge_in_a_tree(Path(folder), (6, 1, 1), parts, merge_function, levels, limit)
    for found, expected in zip(edges, merge_contacts(part_of(contacts, near), merge_function, limit), strict=True):
        np.testing.assert_array_equal(found, expected)


@st.composite
def signed_graphs(draw):
    """Contacts of a random graph that attract or repel, with few different weights."""
    contacts = draw(graphs())
    count = len(contacts.u)
    weights = st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75])
    sums = np.multiply(draw(st.lists(weights, min_size=count, max_size=count)), UNIT)
    columns = (contacts.u, contacts.v, sums, range(count + 1), [0] * count, [1] * count)
    return of_columns(*columns, sized_ids=contacts.sized_ids, sizes=contacts.sizes)


@settings(max_examples=150, deadline=None)
@given(signed_graphs())
def test_the_surest_pair_is_heard_first_and_what_repels_keeps_apart_for_good(contacts):
    u, v, found = merge_contacts(contacts, "mutex")
    region, apart = {n: n for n in range(1, 13)}, set()
    weights = (contacts.sums / UNIT).tolist()
    for weight, a, b in sorted(zip(weights, u.tolist(), v.tolist(), strict=True), key=lambda e: (-abs(e[0]), e[1:])):
        pair = frozenset((region[a], region[b]))
        if weight < 0 and len(pair) == 2:
            apart.add(pair)
        elif weight > 0 and len(pair) == 2 and pair not in apart:
            gone, kept = pair
            region = {n: kept if r == gone else r for n, r in region.items()}
            apart = {frozenset(kept if r == gone else r for r in one) for one in apart}
    together = [region[a] == region[b] for a, b in zip(u.tolist(), v.tolist(), strict=True)]
    assert (~np.isnan(found)).tolist() == together
    assert (found[together] < 0.5).all()


@settings(max_examples=200, deadline=None)
@given(signed_graphs(), st.integers(0, 3))
def test_a_tree_over_a_random_graph_of_exclusions_changes_nothing(contacts, levels):
    check_tree(contacts, "mutex", levels, NO_LIMIT)


@pytest.mark.parametrize(("size", "levels"), [(20, 0), (20, 1), (20, 2), (12, 3)])
def test_exclusions_hold_across_blocks_and_a_tree_of_them(noisy, size, levels, tmp_path):  # noqa: F811
    fragments = noisy[1]
    offsets = [*DIRECT_NEIGHBORS, (-4, 0, 0), (0, -9, 0), (0, 0, 4), (-3, 5, -2)]
    biases = [-0.3, -0.3, -0.3, -0.5, -0.6, -0.5, -0.5]
    affinities = np.random.default_rng(0).random((len(offsets), *fragments.shape), np.float32)
    numbers, ranges = numbered_by_blocks(fragments, size, reach=9)
    grid = tuple(-(-n // size) for n in fragments.shape)
    boxes = zip(np.ndindex(grid), ranges, strict=True)
    parts = {
        at: find_signed_contacts(affinities[:, *around], numbers[around], offsets, biases, *ids)
        for at, (around, *ids) in boxes
    }
    whole = find_signed_contacts(affinities, numbers, offsets, biases, 1, LAST)
    edges, _ = merge_in_a_tree(tmp_path, grid, parts, "mutex", levels)
    touching = whole.counts > 0
    expected = [column[touching] for column in merge_contacts(whole, "mutex")]
    for found, wanted in zip(edges, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert 0 < np.isnan(expected[2]).mean() < 1
    assert (~touching).any()


@pytest.mark.parametrize("merge_function", ["mean", "hist_quant_50", "hist_quant_90_initmax"])
@pytest.mark.parametrize(("size", "limit"), [(32, NO_LIMIT), (20, NO_LIMIT), (20, Limit(500, 0.3))])
def test_neither_blocks_nor_a_tree_change_the_scores(noisy, merge_function, size, limit, tmp_path):  # noqa: F811
    affinities, fragments = noisy
    numbers, ranges = numbered_by_blocks(fragments, size)
    whole = find_contacts(affinities, numbers, 1, LAST)
    grid = tuple(-(-n // size) for n in fragments.shape)
    boxes = zip(np.ndindex(grid), ranges, strict=True)
    parts = {at: find_contacts(affinities[:, *around], numbers[around], *ids) for at, (around, *ids) in boxes}
    together, _ = Contacts.of_all(list(parts.values())[::-1])
    for name, values in vars(whole).items():
        np.testing.assert_array_equal(vars(together)[name], values)
    for levels in (0, 1, 2):
        edges, left = merge_in_a_tree(tmp_path / str(levels), grid, parts, merge_function, levels, limit)
        for found, expected in zip(edges, merge_contacts(whole, merge_function, limit), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert left == sorted(left, reverse=True)
        assert levels == 0 or left[-1] < 0.95 * left[0]


@pytest.mark.parametrize("merge_function", ["mean", "hist_quant_25", "hist_quant_50", "hist_quant_75"])
@pytest.mark.parametrize("volume", ["phantom", "fib25"])
def test_the_regions_are_those_of_waterz(volume, merge_function, request, monkeypatch):
    """Where many scores are the same, waterz' regions depend on how fragments are numbered: there, any is as good.

    For the mean, it is told to keep the exact order: in bins, it merges first come, first served.
    """
    affinities = request.getfixturevalue(volume)[1][:, :64].astype(np.float32)
    fragments = extract_fragments(affinities)
    edges = merge_contacts(find_contacts(affinities, fragments, 1, LAST), merge_function)
    ids = np.unique(fragments[fragments > 0])
    monkeypatch.setattr(waterz_settings, "QUEUE_BINS", 0 if merge_function == "mean" else BINS)
    by_waterz = dict(agglomerate(affinities, fragments, THRESHOLDS, merge_function))
    certain = set(THRESHOLDS)
    for seed in range(4):
        shuffled = np.append(0, np.random.default_rng(seed).permutation(ids)).astype(np.uint64)[fragments]
        for threshold, otherwise in agglomerate(affinities, shuffled, THRESHOLDS, merge_function):
            certain -= {threshold} if voi(by_waterz[threshold], otherwise) > 0.001 else set()
    luts = connected_segments(ids, [edges], THRESHOLDS)
    assert len(certain) >= 5
    most = 1e-9 if merge_function == "mean" else 0.01
    for threshold in certain:
        assert voi(relabel(fragments, luts[threshold]), by_waterz[threshold]) < most, threshold
    assert len({len(np.unique(luts[threshold][1])) for threshold in certain}) >= 3


def test_a_limit_keeps_large_regions_apart(noisy):  # noqa: F811
    affinities, fragments = noisy
    arguments = (affinities, fragments, [0.3, 0.8], "hist_quant_50")
    (_, low), (_, freely) = agglomerate_limited(*arguments, NO_LIMIT)
    (_, low_limited), (_, limited) = agglomerate_limited(*arguments, Limit(500, 0.3))
    np.testing.assert_array_equal(low, low_limited)
    largest = [np.sort(np.bincount(labels.ravel().astype(np.int64))[1:])[::-1] for labels in (freely, limited)]
    assert largest[1][0] < largest[0][0]
    assert np.count_nonzero(largest[1]) > np.count_nonzero(largest[0])
    # Nothing that the limit lets merge is left.
    contacts = find_contacts(affinities, fragments, 1, LAST)
    scores = settle(contacts, "hist_quant_50", Limit(500, 0.3)).rest
    sizes = dict(zip(scores.sized_ids.tolist(), scores.sizes.tolist(), strict=True))
    assert all(min(sizes[u], sizes[v]) >= 500 for u, v in zip(scores.u.tolist(), scores.v.tolist(), strict=True))


def test_contacts_are_counted_face_by_face():
    fragments = np.array([[[3, 3, 7], [3, 0, 7]]], np.uint64)
    affinities = np.zeros((3, 1, 2, 3), np.uint8)
    affinities[2, 0, 0, 2] = 51
    contacts = find_contacts(affinities, fragments, 1, 10)
    assert (contacts.u.tolist(), contacts.v.tolist(), contacts.counts.tolist()) == ([3], [7], [1])
    assert contacts.bins.tolist() == [51]
    assert contacts.sums[0] / UNIT == pytest.approx(0.2, abs=1e-6)
    assert len(find_contacts(affinities, fragments, 4, 10).u) == 0


def test_every_merge_function_is_offered(noisy):  # noqa: F811
    affinities, fragments = noisy
    contacts = find_contacts(affinities, fragments, 1, LAST)
    for name in MERGE_FUNCTIONS:
        found = merge_contacts(contacts, name)[2]
        assert np.nanmin(found) >= 0
        assert np.nanmax(found) <= 1


def test_what_cannot_be_used_is_refused(noisy, tmp_path):  # noqa: F811
    affinities, fragments = noisy
    contacts = find_contacts(affinities, fragments, 1, LAST)
    with pytest.raises(ValueError, match="the same pair"):
        Contacts.of_all([contacts, contacts])
    tree = Tree(tmp_path, (1, 1, 1), "mean", NO_LIMIT)
    tree.settle_block((0, 0, 0), 0, contacts)
    tree.settle_top(0)
    assert tree.edges_of_block((0, 0, 0)) is not None
    (file,) = (tmp_path / "0" / "settled").glob("*/*")
    file.write_bytes(b"PK")
    with pytest.raises(UserError, match=rf"{file} is missing or damaged: run 03"):
        tree.edges_of_block((0, 0, 0))
    empty = find_contacts(np.zeros((3, 2, 2, 2), np.uint8), np.zeros((2, 2, 2), np.uint64), 1, LAST)
    assert len(merge_contacts(empty, "mean")[0]) == 0
