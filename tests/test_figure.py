import itertools

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2xyz, xyz2lab

from lsdseg.config.loader import load_config
from lsdseg.data_utils.phantom import make_phantom
from lsdseg.data_utils.volumes import write_array
from lsdseg.engine.evaluate.figure import draw_sample, draw_segmentation_figure, match_labels
from lsdseg.engine.sample import Sample
from lsdseg.errors import UserError
from lsdseg.pictures import label_palette

CFG = load_config()


@pytest.fixture(scope="module")
def sample():
    """A phantom, and what a perfect network would predict for it."""
    raw, labels, _ = make_phantom((8, 96, 96), seed=2)
    inside = np.stack([np.roll(labels, 1, axis) == labels for axis in range(3)])
    lsds = np.random.default_rng(0).random((10, *raw.shape), np.float32)
    return {
        "raw": raw,
        "affinities": (255 * inside).astype(np.uint8),
        "lsds": lsds,
        "fragments": labels,
        "segmentation": labels[::-1].copy(),
        "ground_truth": labels,
    }


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_figure_is_a_small_png_of_readme_width(sample, tmp_path):
    path = tmp_path / "segmentation.png"
    draw_segmentation_figure(path, **sample, title="phantom")
    height, width, _ = pixels(path).shape
    assert width == 1200
    assert 800 < height < 1000  # two rows of three square panels
    assert path.stat().st_size < 500_000


def test_large_sections_stay_below_500_kb(tmp_path):
    raw, labels, _ = make_phantom((1, 512, 512), seed=0)
    affinities = np.random.default_rng(0).normal(0.8, 0.05, (3, *raw.shape)).clip(0, 1)
    lsds = np.random.default_rng(0).normal(0.5, 0.02, (10, *raw.shape)).clip(0, 1)
    draw_segmentation_figure(
        tmp_path / "large.png",
        raw=raw,
        affinities=affinities,
        lsds=lsds,
        fragments=labels,
        segmentation=labels,
        ground_truth=labels,
    )
    assert (tmp_path / "large.png").stat().st_size < 500_000


def test_equal_labels_give_equal_panels(sample, tmp_path):
    """Segmentation and ground truth look the same if and only if they agree, whatever their ids are."""
    permuted = (np.random.default_rng(0).permutation(1000) + 5000)[sample["ground_truth"]].astype(np.uint64)
    difference = {}
    for name, segmentation in (("same", permuted), ("other", sample["segmentation"])):
        draw_segmentation_figure(tmp_path / "f.png", **{**sample, "segmentation": segmentation}, section=1)
        image = pixels(tmp_path / "f.png")
        lower = image[image.shape[0] // 2 + 40 : -20]
        middle, right = lower[:, 420:780], lower[:, 820:1180]
        difference[name] = np.abs(middle - right).mean()
    assert difference["same"] < 5
    assert difference["other"] > 15


def test_section_chooses_what_is_drawn(sample, tmp_path):
    images = []
    for section in (None, 4, 1):
        draw_segmentation_figure(tmp_path / "f.png", **sample, section=section)
        images.append(pixels(tmp_path / "f.png"))
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_scale_bar_is_as_long_as_it_says(sample, tmp_path):
    images = []
    for voxel_size in (None, (40, 10, 10)):
        draw_segmentation_figure(tmp_path / "f.png", **sample, voxel_size=voxel_size)
        images.append(pixels(tmp_path / "f.png"))
    _, columns = np.nonzero((np.abs(images[1] - images[0]).max(axis=2) > 60)[:450])
    panel = 1200 / 3 - 8
    assert np.ptp(columns) + 1 == pytest.approx(panel * 20 / 96, abs=3)  # 0.2 µm of 0.96 µm


def test_long_title_is_broken(sample, tmp_path):
    draw_segmentation_figure(tmp_path / "f.png", **sample, title="a_long_name" * 30)
    image = pixels(tmp_path / "f.png")
    assert (image[:60, [0, 1, 2, -3, -2, -1]] == 255).all()
    assert (image[:60] < 128).any()


def test_match_labels_gives_a_neuron_and_its_largest_piece_one_number():
    truth = np.array([[7, 7, 7, 7, 9, 9, 9, 0]])
    segmentation = np.array([[30, 30, 30, 20, 20, 20, 20, 5]])
    numbers, neurons = match_labels(segmentation, truth)
    assert neurons.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert numbers[0, :3].tolist() == [1, 1, 1]
    assert numbers[0, 3:7].tolist() == [2, 2, 2, 2]
    assert numbers[0, 7] > 2  # on background only, so no neuron's number


def test_match_labels_shows_splits_and_merges():
    split, _ = match_labels(np.array([4, 4, 4, 6, 6]), np.ones(5, np.uint64))
    assert split[0] == 1
    assert split[4] not in (0, 1)
    merged, neurons = match_labels(np.full(5, 8), np.array([2, 2, 3, 3, 3]))
    assert (merged == neurons[4]).all()
    assert neurons[0] != neurons[4]


def test_match_labels_keeps_background_and_large_ids():
    numbers, neurons = match_labels(np.array([0, 2**63, 2**63], np.uint64), np.array([2**62, 2**62, 0], np.uint64))
    assert numbers.tolist() == [0, 1, 1]
    assert neurons.tolist() == [1, 1, 0]
    numbers, neurons = match_labels(np.zeros(4, np.uint64), np.zeros(4, np.uint64))
    assert not numbers.any()
    assert not neurons.any()


def test_palette_stays_distinct_for_red_and_green_blind_eyes():
    """Color blindness follows Machado et al. 2009 (matrices on linear RGB). 2.3 in CIELAB is just noticeable."""
    normal = np.eye(3)
    protan = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    palette = label_palette()
    assert palette.shape == (14, 3)
    linear = np.where(palette <= 0.04045, palette / 12.92, ((palette + 0.055) / 1.055) ** 2.4)
    rgb_to_xyz = rgb2xyz(np.eye(3)[None])[0].T  # of the primaries at full strength, which gamma does not change
    for sight in (normal, protan, deutan):
        seen = xyz2lab(np.clip(linear @ sight.T, 0, 1) @ rgb_to_xyz.T)
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 8


def write_sample(folder, sample):
    place = {"voxel_size": (10, 10, 10), "offset": (100, 100, 100)}
    raw_zarr, output_zarr = folder / "raw.zarr", folder / "out.zarr"
    write_array(raw_zarr, "volumes/raw", sample["raw"], **place)
    write_array(raw_zarr, "volumes/labels/neuron_ids", sample["ground_truth"], **place)
    for dataset, name in (
        ("pred_affs", "affinities"),
        ("pred_lsds", "lsds"),
        ("fragments", "fragments"),
        ("segmentation_055", "segmentation"),
    ):
        write_array(output_zarr, f"volumes/{dataset}", sample[name], **place)
    return Sample(CFG, raw_zarr, output_zarr)


def test_draw_sample_equals_drawing_the_arrays(sample, tmp_path):
    written = write_sample(tmp_path, sample)
    draw_sample(written, "volumes/segmentation_055", tmp_path / "from_zarr.png")
    title = "out: volumes/segmentation_055, section 4 at z 0.14 µm"
    draw_segmentation_figure(tmp_path / "from_arrays.png", **sample, title=title, voxel_size=(10, 10, 10))
    assert np.array_equal(pixels(tmp_path / "from_zarr.png"), pixels(tmp_path / "from_arrays.png"))


def test_draw_sample_crops_wide_sections_and_needs_no_lsds_or_ground_truth(tmp_path):
    place = {"voxel_size": (40, 4, 4), "offset": (0, 0, 0)}
    wide = np.arange(3 * 520 * 600).reshape(3, 520, 600)
    write_array(tmp_path / "raw.zarr", "volumes/raw", (wide % 251).astype(np.uint8), **place)
    affinities = np.broadcast_to(wide % 251, (3, *wide.shape)).astype(np.uint8)
    write_array(tmp_path / "out.zarr", "volumes/pred_affs", affinities, **place)
    write_array(tmp_path / "out.zarr", "volumes/seg", (wide // 5000).astype(np.uint64), **place)
    draw_sample(Sample(CFG, tmp_path / "raw.zarr", tmp_path / "out.zarr"), "volumes/seg", tmp_path / "f.png")
    height, width, _ = pixels(tmp_path / "f.png").shape
    assert width == 1200
    assert 1150 < height < 1400  # two rows of two square panels: the crop is square


def test_draw_sample_names_what_is_missing(sample, tmp_path):
    written = write_sample(tmp_path, sample)
    with pytest.raises(UserError, match="segmentation_099"):
        draw_sample(written, "volumes/segmentation_099", tmp_path / "f.png")
    assert not (tmp_path / "f.png").exists()
