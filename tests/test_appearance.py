import numpy as np
import pytest

from lsdseg.config.loader import load_config
from lsdseg.engine.training.appearance import CHANGES, changed


def membranes(shape=(12, 24, 24), seed=0):
    """Raw with a dark sheet every eight voxels along x, and little noise."""
    raw = np.full(shape, 0.6, np.float32)
    raw[:, :, ::8] = 0.2
    return raw + np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def contrast(raw):
    return raw[:, :, 4::8].mean() - raw[:, :, ::8].mean()


def probabilities(*on):
    model = load_config(overrides=[part for name in on for part in (f"MODEL_ISO.PROB_{name}", "1")]).MODEL
    return [(change.function, model[f"PROB_{change.name}"], model[f"AMOUNT_{change.name}"]) for change in CHANGES]


def test_by_default_nothing_changes():
    raw = membranes()
    np.testing.assert_array_equal(changed(raw, np.random.default_rng(0), probabilities()), raw)


@pytest.mark.parametrize("name", [change.name for change in CHANGES])
@pytest.mark.parametrize("shape", [(12, 24, 24), (1, 24, 24)], ids=["volume", "section"])
def test_every_change_changes_gray_values_only_and_by_its_seed(name, shape):
    raw = membranes(shape)
    first, again, other = (changed(raw, np.random.default_rng(seed), probabilities(name)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, raw)
    assert first.shape == shape
    assert first.dtype == np.float32
    assert first.min() >= 0
    assert first.max() <= 1
    np.testing.assert_array_equal(raw, membranes(shape))  # what was passed in is as before


def test_contrast_fades_in_a_box_and_nowhere_else():
    raw = membranes((32, 32, 32))
    faded = changed(raw, np.random.default_rng(3), probabilities("FADE"))
    difference = np.abs(faded - raw)
    assert difference.max() > 0.05
    assert np.median(difference) < 0.01
    assert contrast(faded) < contrast(raw)


def test_a_bad_section_is_one_section():
    raw = membranes()
    spoiled = changed(raw, np.random.default_rng(0), probabilities("SECTION"))
    assert sum(not np.array_equal(before, after) for before, after in zip(raw, spoiled, strict=True)) == 1


def test_noise_and_blur_are_as_strong_as_they_say():
    flat = np.full((24, 24, 24), 0.5, np.float32)
    model = load_config(overrides=["MODEL_ISO.AMOUNT_NOISE", "(0.05, 0.05)", "MODEL_ISO.AMOUNT_BLUR", "(2, 2)"]).MODEL
    by_name = {change.name: (change.function, 1.0, model[f"AMOUNT_{change.name}"]) for change in CHANGES}
    assert changed(flat, np.random.default_rng(0), [by_name["NOISE"]]).std() == pytest.approx(0.05, rel=0.05)
    point = np.zeros((17, 17, 17), np.float32)
    point[8, 8, 8] = 1
    blurred = changed(point, np.random.default_rng(0), [by_name["BLUR"]])
    distance = np.arange(17) - 8
    assert np.sqrt((blurred.sum((1, 2)) * distance**2).sum() / blurred.sum()) == pytest.approx(2, rel=0.05)
