"""How large the tiles of a prediction are."""

import math

import pytest

from lsdseg.config.loader import load_config
from lsdseg.engine.predict import tile_size
from lsdseg.engine.predict.tile_size import LARGEST, SHARE, count_tiles, tile_bytes, tile_voxels

GB = 10**9


@pytest.fixture
def memory(monkeypatch):
    """Say how much memory is free."""
    return lambda size: monkeypatch.setattr(tile_size, "available_memory", lambda: size)


def config(*overrides):
    return load_config("config_fib25.py", ["TRAIN.DEVICE", "cpu", *overrides])


@pytest.mark.parametrize("free", [8, 12, 100])
@pytest.mark.parametrize("workers", [1, 4])
def test_tiles_take_what_memory_allows_and_no_more(memory, free, workers):
    memory(free * GB)
    cfg = config()
    tile = tile_voxels(cfg, (2000, 2000, 2000), workers)
    wider = [size + 16 for size in tile]
    assert tile_bytes(cfg, tile) <= SHARE * free * GB / workers
    assert max(tile) == LARGEST or tile_bytes(cfg, wider) > SHARE * free * GB / workers


def test_the_tiles_of_a_volume_are_equally_large(memory):
    memory(1000 * GB)
    assert tile_voxels(config(), (120, 224, 250)) == (120, 224, 128)
    assert tile_voxels(config("MODEL_ISO.GROW_INPUT", (40, 40, 40)), (120, 104, 250)) == (64, 104, 88)


@pytest.mark.parametrize("workers", [2, 16, 64])
def test_no_worker_is_without_a_tile(memory, workers):
    memory(1000 * GB)
    shape = (400, 400, 400)
    tile = tile_voxels(config(), shape, workers)
    assert count_tiles(tile, shape) >= 2 * workers
    assert count_tiles((64, 64, 64), shape) > count_tiles(tile, shape)


def test_thick_sections_grow_where_their_context_is_widest(memory):
    memory(12 * GB)
    cfg = load_config("config_snemi.py", ["TRAIN.DEVICE", "cpu"])
    tile = tile_voxels(cfg, (2000, 2000, 2000))
    assert tile_bytes(cfg, tile) <= SHARE * 12 * GB
    assert all(size >= least for size, least in zip(tile, cfg.MODEL.OUTPUT_SHAPE, strict=True))
    assert math.prod(tile) > math.prod(cfg.MODEL.OUTPUT_SHAPE)


def test_sections_are_not_put_together(memory):
    memory(1000 * GB)
    cfg = config("DATA.DIM_2D", True, "DATA.FIB", True)
    sections, height, width = tile_voxels(cfg, (100, 1000, 1000))
    assert sections == 8
    assert height == width
    assert cfg.MODEL.OUTPUT_SHAPE[0] < height <= LARGEST


def test_memory_of_other_machines_is_not_that_of_this_one(memory):
    memory(10**6)
    assert tile_voxels(config("CLUSTER.TYPE", "slurm"), (2000,) * 3) > tile_voxels(config(), (2000,) * 3)
