"""How large the blocks of segmentation are where the config does not say, and that all steps take the same."""

import json
from pathlib import Path

import numpy as np
import pytest

from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import FRAGMENTS, data_folder, output_path
from lsdseg.data_utils.records import Record, record_of
from lsdseg.data_utils.volumes import open_array, write_array
from lsdseg.engine import block_size, memory
from lsdseg.engine.block_size import NARROWEST, SHARE, block_bytes, choose_block
from lsdseg.engine.post.steps.edges import agglomerate_blockwise
from lsdseg.engine.post.steps.fragments import extract_fragments_blockwise
from lsdseg.engine.post.steps.relabel import extract_segmentation
from lsdseg.engine.post.steps.tables import find_segments
from lsdseg.engine.sample import Sample
from lsdseg.errors import UserError

GB = 10**9
SHAPE = (20, 40, 70)
MERGE_FUNCTION = "hist_quant_50"


@pytest.fixture
def free(monkeypatch):
    """Say how much memory is free."""
    return lambda size: monkeypatch.setattr(memory, "available_memory", lambda: size)


def config(*overrides):
    return load_config("config_fib25.py", [*map(str, overrides)])


def test_the_blocks_of_a_volume_are_equally_large(free):
    free(1000 * GB)
    assert choose_block(config(), (120, 300, 1000))[0] == (128, 160, 256)
    block, line = choose_block(config(), (256, 257, 520))
    assert block == (256, 144, 176)
    assert line.startswith("blocks: 6 of 256 x 144 x 176 voxels: ")


@pytest.mark.parametrize("method", ["waterz", "mutex"])
@pytest.mark.parametrize(("size", "workers"), [(8, 1), (16, 8), (64, 8)])
def test_blocks_take_what_memory_allows_and_no_more(free, method, size, workers):
    free(size * GB)
    cfg, shape = config("INS_SEGMENT.METHOD", method, "SYSTEM.NUM_WORKERS", workers), (2000, 1000, 3000)
    block, line = choose_block(cfg, shape)
    taken, fits = block_bytes(cfg, block, shape) * workers, SHARE * size * GB
    narrowest = all(width <= NARROWEST * context for width, context in zip(block, cfg.INS_SEGMENT.CONTEXT, strict=True))
    assert taken <= fits or narrowest
    assert ("mostly context" in line) == (taken > fits)
    wider = [width + 64 for width in block]
    assert max(block) == 256 or block_bytes(cfg, wider, shape) * workers > fits
    assert max(block) - min(block) <= 64


def test_a_job_has_the_memory_that_it_asks_for(free):
    free(1)
    shape = (3000, 3000, 3000)
    job = ("CLUSTER.TYPE", "slurm", "SYSTEM.NUM_WORKERS", 1000, "CLUSTER.MEMORY")
    assert choose_block(config(*job, "16G"), shape)[0] == (256, 256, 256)
    assert max(choose_block(config(*job, "1G"), shape)[0]) < 256
    assert choose_block(config(*job[:-1]), shape)[0] == (256, 256, 256)


def test_no_block_is_narrower_than_its_context(free):
    free(1)
    for shape in [(5, 500, 500), (1, 1, 1)]:
        cfg = config("INS_SEGMENT.CONTEXT", "(24, 40, 40)")
        assert all(b >= c for b, c in zip(choose_block(cfg, shape)[0], cfg.INS_SEGMENT.CONTEXT, strict=True))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The config of a home with affinities to segment, with further settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(block_size, "LARGEST", 32)  # the volume is small, and workers must not choose themselves

    def cfg(*overrides):
        settings = ["DATA.HOME", tmp_path, "TRAIN.CHECKPOINT", tmp_path / "run" / "model_checkpoint_1"]
        settings += ["INS_SEGMENT.CONTEXT", "(4, 4, 4)", "INS_SEGMENT.MERGE_FUNCTION", MERGE_FUNCTION]
        return load_config(None, [*map(str, settings), "SYSTEM.NUM_WORKERS", "1", *map(str, overrides)])

    place = {"voxel_size": (8, 8, 8), "offset": (80, 0, 160)}
    sample = data_folder(cfg(), "test") / "sample_A.zarr"
    write_array(sample, "volumes/raw", np.zeros(SHAPE, np.uint8), **place)
    coarse = np.random.default_rng(0).integers(60, 255, (3, 5, 10, 18))
    affinities = coarse.repeat(4, 1).repeat(4, 2).repeat(4, 3)[:, :, :, : SHAPE[2]].astype(np.uint8)
    write_array(output_path(cfg(), sample), "volumes/pred_affs", affinities, **place)
    return cfg


def kept(cfg):
    """The size that is kept with the fragments."""
    return record_of(open_array(output_path(cfg, "sample_A.zarr"), FRAGMENTS)).settings["INS_SEGMENT.BLOCK_SIZE"]


def test_all_steps_take_the_blocks_of_the_first_whatever_has_changed_since(run, capfd, free):
    free(100 * GB)
    extract_fragments_blockwise(run())
    assert "blocks: 6 of 32 x 32 x 32 voxels" in capfd.readouterr().out
    assert kept(run()) == [32, 32, 32]
    logs = Path("daisy_logs")
    # Other volumes of the folder have other blocks.
    assert load_config(logs / "sampleA_fragments" / "config_0.yaml").INS_SEGMENT.BLOCK_SIZE is None

    free(1)
    block_size.LARGEST = 64
    cfg = run("SYSTEM.NUM_WORKERS", 2)
    for same in (cfg, run("INS_SEGMENT.BLOCK_SIZE", "(32, 32, 32)")):
        extract_fragments_blockwise(same)
        assert "nothing to do, all 6 blocks are done" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"BLOCK_SIZE was \[32, 32, 32\], is \[16, 32, 32\]"):
        extract_fragments_blockwise(run("INS_SEGMENT.BLOCK_SIZE", "(16, 32, 32)"))
    agglomerate_blockwise(cfg)
    find_segments(cfg, MERGE_FUNCTION, 0.5)
    extract_segmentation(cfg, MERGE_FUNCTION, 0.5)
    for step in (f"agglomerate_{MERGE_FUNCTION}", f"segmentation_{MERGE_FUNCTION}_050"):
        assert json.loads((logs / f"sampleA_{step}" / "step.json").read_text())["grid"] == [1, 2, 3]

    free(100 * GB)
    extract_fragments_blockwise(run("DATA.DROP_DS_MONGOTABLE", True))
    assert "blocks: 2 of 32 x 48 x 48 voxels" in capfd.readouterr().out
    assert kept(run()) == [32, 48, 48]


def test_fragments_say_in_which_blocks_they_were_made(run):
    sample = data_folder(run(), "test") / "sample_A.zarr"

    def block_of(attributes, cfg=None):
        place = {"voxel_size": (8, 8, 8), "offset": (80, 0, 160), "attributes": attributes}
        write_array(output_path(run(), sample), FRAGMENTS, np.ones(SHAPE, np.uint64), **place)
        return Sample(cfg or run(), sample).cfg.INS_SEGMENT.BLOCK_SIZE

    assert Sample(run(), sample).cfg.INS_SEGMENT.BLOCK_SIZE is None
    blocks = Record("02", {}, {"INS_SEGMENT.BLOCK_SIZE": [16, 32, 48]}).attributes
    assert block_of(blocks) == (16, 32, 48)
    assert block_of(blocks, run("INS_SEGMENT.BLOCK_SIZE", "(16, 16, 16)")) == (16, 16, 16)
    assert block_of({}) == (256, 256, 256)  # of published scripts
    assert block_of(Record("instance_segmenter.py", {}, {}).attributes) is None
    (output_path(run(), sample) / FRAGMENTS / ".zarray").write_text("{")
    assert Sample(run(), sample).cfg.INS_SEGMENT.BLOCK_SIZE is None
