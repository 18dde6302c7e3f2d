import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_formats
import torch

import segment
from lsdseg.cli import call_script
from lsdseg.config.loader import load_config
from lsdseg.data_utils.placement import offset_nm, voxel_size_nm
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.engine import chain, memory
from lsdseg.engine.blocks.markers import record_files, records_in
from lsdseg.engine.blocks.status import statuses
from lsdseg.engine.chain import Chain, bytes_in_memory, fits_in_memory
from lsdseg.engine.estimate import estimates, require_memory
from lsdseg.engine.memory import available_memory
from lsdseg.engine.predict.check import check_before_segmenting
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import load_checkpoint, network_settings, save_checkpoint
from lsdseg.rag.parquet import ParquetStore
from pretrained.export import export

CHECKOUT = Path(segment.__file__).parent
SHAPE = (30, 26, 34)
OFFSET = (160, -80, 32)
NINE = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-3, 0, 0], [0, -3, 0], [0, 0, -3], [-9, 0, 0], [0, -9, 0], [0, 0, -9]]
CONFIG = f"""
from yacs.config import CfgNode
cfg = CfgNode()
cfg.TRAIN = CfgNode(dict(CHECKPOINT="HERE/run/model_checkpoint_7", NEIGHBORHOOD={NINE}, DEVICE="cpu", THREADS=1))
cfg.MODEL_ISO = CfgNode(dict(
    VOXEL_SIZE=(10, 10, 10), NUM_FMAPS=2, NUM_FMAPS_OUT=2, FMAP_INC_FACTOR=2, DOWNSAMPLE_FACTORS=[[2, 2, 2]],
    KERNEL_SIZE_DOWN=None, KERNEL_SIZE_UP=None, PAD_CONV="same", INPUT_SHAPE=(32, 32, 32), GROW_INPUT=(0, 0, 0),
))
cfg.INS_SEGMENT = CfgNode(dict(THRESHOLDS=[0.5], MERGE_FUNCTION="mean"))
"""


@pytest.fixture
def config(tmp_path):
    """The config file of a tiny network with random weights and nine affinities, for voxels of 10 nm."""
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.replace("HERE", str(tmp_path)))
    cfg = load_config(path)
    torch.manual_seed(0)
    model = build_model(cfg)
    checkpoint = Path(cfg.TRAIN.CHECKPOINT)
    checkpoint.parent.mkdir()
    optimizer = torch.optim.Adam(model.parameters())
    sum(weight.sum() for weight in model.parameters()).backward()
    optimizer.step()  # gives the optimizer a state, which the export leaves out
    save_checkpoint(checkpoint, model, optimizer, 7, network_settings(cfg))
    return path


def write_volume(path, voxel_size=(8, 8, 8), raw=None, dataset="volumes/raw"):
    if raw is None:
        raw = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    write_array(path, dataset, raw, voxel_size=voxel_size, offset=OFFSET[: len(voxel_size)])
    return path


def run(raw, config, *overrides, out=None, blockwise=False, resolution=None, dry_run=False):
    arguments = {"raw": str(raw), "out": out, "config": str(config), "overrides": list(map(str, overrides))}
    segment.main(
        None,
        argparse.Namespace(**arguments, blockwise=blockwise, resolution=resolution, dry_run=dry_run, skip_failed=False),
    )


def commands(capfd):
    """The scripts that were run."""
    return [line.split()[2] for line in capfd.readouterr().out.splitlines() if line.startswith("$ python")]


@pytest.mark.parametrize(
    ("voxel_size", "method", "name"), [(8, "waterz", "segmentation_050"), (16, "mutex", "segmentation_mutex")]
)
def test_the_segmentation_has_the_voxels_of_the_volume(tmp_path, config, capfd, voxel_size, method, name):
    raw = write_volume(tmp_path / "fly.zarr", (voxel_size,) * 3, dataset="em/s0")
    overrides = ["DATA.RAW", "em/s0", "INS_SEGMENT.METHOD", method, "INS_SEGMENT.MUTEX_BIAS", "(0.0, -0.5)"]
    run(raw, config, *overrides)

    out = tmp_path / "fly_segmentation.zarr"
    assert list_arrays(out) == [f"volumes/{name}"]
    segmentation, volume = open_array(out, f"volumes/{name}"), open_array(raw, "em/s0")
    assert (segmentation.roi, segmentation.voxel_size) == (volume.roi, volume.voxel_size)
    assert segmentation.dtype == np.uint64
    assert read(segmentation).any()
    assert (tmp_path / f"fly_{name}.png").is_file()
    assert f"{out}/volumes/{name}" in capfd.readouterr().out

    # Input and output of the network have its own voxels, at the same place. Each voxel gets the label at its center.
    at_10_nm = next((tmp_path / "fly_segmentation_work" / "lsd_outputs").rglob("fly_segmentation.zarr"))
    labels = open_array(at_10_nm, f"volumes/{name}")
    assert tuple(labels.voxel_size) == (10, 10, 10)
    assert labels.roi.contains(volume.roi)
    assert open_array(at_10_nm, "volumes/pred_affs").shape[0] == 9
    indices = [((np.arange(size) + 0.5) * voxel_size / 10).astype(int) for size in SHAPE]
    np.testing.assert_array_equal(read(segmentation), read(labels)[np.ix_(*indices)])


def test_other_thresholds_are_added_without_predicting_again(tmp_path, config, capfd):
    raw = write_volume(tmp_path / "fly.zarr", dataset="em/s0")

    def run_at(*thresholds):
        run(raw, config, "DATA.RAW", "em/s0", "INS_SEGMENT.THRESHOLDS", list(thresholds))
        return commands(capfd)

    out = tmp_path / "fly_segmentation.zarr"
    assert run_at(0.5) == ["data_utils/rescale.py", "predicter.py", "instance_segmenter.py", "data_utils/rescale.py"]
    before = read(open_array(out, "volumes/segmentation_050"))
    assert run_at(0.4, 0.604) == ["instance_segmenter.py", "data_utils/rescale.py", "data_utils/rescale.py"]
    assert list_arrays(out) == [f"volumes/segmentation_{name}" for name in ("040", "050", "060_4")]
    np.testing.assert_array_equal(read(open_array(out, "volumes/segmentation_050")), before)
    assert run_at(0.4) == []
    shutil.rmtree(out / "volumes" / "segmentation_040")
    assert run_at(0.4, 0.5) == ["data_utils/rescale.py"]


BLOCKS = ["02_extract_fragments_blockwise.py", "03_agglomerate_blockwise.py", "04_find_segments_full.py"]
LAST = ["05_extract_segmentation_from_lut.py", "data_utils/rescale.py"]


def test_block_by_block_each_change_costs_the_steps_that_depend_on_it(tmp_path, config, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = write_volume(tmp_path / "fly.zarr")
    out = tmp_path / "fly_segmentation.zarr"
    blocks = ("INS_SEGMENT.BLOCK_SIZE", "(16, 16, 16)", "INS_SEGMENT.CONTEXT", "(8, 8, 8)", "SYSTEM.NUM_WORKERS", 2)

    def run_with(*overrides):
        run(raw, config, *blocks, *overrides, blockwise=True)
        return commands(capfd)

    everything = ["data_utils/rescale.py", "super_predicter_daisy.py", *BLOCKS, *LAST]
    assert run_with() == everything
    segmentation = read(open_array(out, "volumes/segmentation_050"))
    assert segmentation.any()
    check_estimates(tmp_path, config, raw, blocks)
    assert run_with() == []
    assert run_with("INS_SEGMENT.THRESHOLDS", [0.3]) == [BLOCKS[2], *LAST]
    assert run_with("INS_SEGMENT.MERGE_FUNCTION", "hist_quant_50") == [*BLOCKS[1:], *LAST]
    assert run_with("INS_SEGMENT.FILTER_FRAGMENTS", 0.2) == [*BLOCKS, *LAST]
    assert run_with("DATA.AFFS_DTYPE", "float32", "INS_SEGMENT.FILTER_FRAGMENTS", 0.2) == [*everything[1:]]
    assert not (tmp_path / "daisy_logs").exists()
    assert {status.step for status in statuses(tmp_path / "fly_segmentation_work")} >= {"flySegmentation_predict"}

    write_volume(raw, raw=255 - read(open_array(raw, "volumes/raw")))
    assert run_with() == everything
    with pytest.raises(UserError, match=r"belongs to the segmentation of .*fly.zarr: delete it"):
        run(write_volume(tmp_path / "other.zarr"), config, out=out)


def check_estimates(folder, config, raw, blocks):
    """Estimates after a run are what its blocks took, for this volume and for others beside it."""
    steps = {"prediction": "predict", "fragments": "fragments", "agglomeration": "agglomerate_mean"}
    for out in ("fly_segmentation", "bee_segmentation"):
        home = ("DATA.HOME", str(folder / f"{out}_work"))
        chain = Chain(load_config(config, [*map(str, blocks), *home]), raw, folder / f"{out}.zarr", (), blockwise=True)
        if out.startswith("fly"):
            samples = {step: records_in(record_files(chain.sample.markers(name))) for step, name in steps.items()}
        for step in estimates(chain):
            assert step.source.startswith("runs on this machine: "), step
            took = samples.get(step.step)
            if took is not None:
                took = took[took["computed"] > 0]
                per_voxel = took["seconds"] / took["computed"]
                assert per_voxel.min() * 0.999 <= step.seconds / step.computed <= per_voxel.max() * 1.001
                assert step.computed >= took["computed"].sum()
                assert step.memory == pytest.approx(took["megabytes"].max() * 1e6, rel=0.5)


@pytest.mark.parametrize("name", ["imagej.tif", "sharded"])
def test_a_volume_in_another_format_has_the_same_segmentation(tmp_path, config, capfd, name):
    raw = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    size = {"voxel_size": (10, 10, 10)}
    run(write_volume(tmp_path / "fly.zarr", raw=raw, **size), config)
    expected = read(open_array(tmp_path / "fly_segmentation.zarr", "volumes/segmentation_050"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(test_formats, "VOXEL_SIZE", (10, 10, 10))
        test_formats.WRITERS[name](tmp_path / name, raw)
    capfd.readouterr()
    for scripts in (3, 0):
        run(tmp_path / name, config, out=tmp_path / "out.zarr", resolution=["10"] * 3)
        assert len(commands(capfd)) == scripts
    np.testing.assert_array_equal(read(open_array(tmp_path / "out.zarr", "volumes/segmentation_050")), expected)


@pytest.mark.parametrize("blockwise", [False, True])
def test_voxels_need_not_be_whole_nanometers(tmp_path, config, capfd, monkeypatch, blockwise):
    monkeypatch.chdir(tmp_path)
    raw = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    blocks = ("INS_SEGMENT.BLOCK_SIZE", "(16, 16, 16)", "INS_SEGMENT.CONTEXT", "(8, 8, 8)", "SYSTEM.NUM_WORKERS", 2)
    found = {}
    for name, size in (("whole", 10), ("half", 7.5)):
        volume = write_volume(tmp_path / f"{name}.zarr", (size,) * 3, raw)
        overrides = (*blocks, "MODEL_ISO.VOXEL_SIZE", (size,) * 3)
        for scripts in (True, False):
            capfd.readouterr()
            run(volume, config, *overrides, blockwise=blockwise)
            assert bool(commands(capfd)) == scripts
        found[name] = open_array(tmp_path / f"{name}_segmentation.zarr", "volumes/segmentation_050")
    np.testing.assert_array_equal(read(found["half"]), read(found["whole"]))
    assert (voxel_size_nm(found["half"]), offset_nm(found["half"])) == ((7.5,) * 3, OFFSET)
    if blockwise:
        work = tmp_path / "half_segmentation_work"
        block = next(status for status in statuses(work) if status.step.endswith("_predict")).slowest[0][0]
        assert not (np.subtract(block.begin, OFFSET) % 7.5).any()
        assert max(block.shape) <= 7.5 * max(SHAPE)
        centers = ParquetStore(next(work.rglob("*.rag")), 16**3).read_nodes(1, 2**60)[1]
        assert ((centers > OFFSET) & (centers < np.add(OFFSET, np.multiply(SHAPE, 7.5)))).all()
        assert np.ptp(centers, axis=0).min() > 7.5 * 16  # they are nanometers, all over the volume


def test_a_volume_that_does_not_fit_into_memory_is_segmented_block_by_block(tmp_path, config, capsys, monkeypatch):
    raw = write_volume(tmp_path / "fly.zarr")
    cfg = load_config(config)
    needed = bytes_in_memory(cfg, raw)
    assert needed == pytest.approx(np.prod(SHAPE) * 0.8**3 * 72, rel=0.01)
    for free, fits in [(2 * needed, True), (needed, False)]:
        monkeypatch.setattr(chain, "available_memory", lambda free=free: free)
        assert fits_in_memory(cfg, raw) == fits
        assert ("in memory" if fits else "block by block") in capsys.readouterr().out
    assert 1e6 < available_memory() < 1e15


def test_a_dry_run_says_what_it_would_cost_and_does_nothing(tmp_path, config, capsys, small_disk):
    raw = write_volume(tmp_path / "fly.zarr")
    blocks = ("INS_SEGMENT.BLOCK_SIZE", "(16, 16, 16)", "SYSTEM.NUM_WORKERS", 4)
    run(raw, config, *blocks, blockwise=True, dry_run=True)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert {"prediction", "fragments", "agglomeration", "tables", "relabeling"} <= lines.keys()
    assert lines["fragments"][1] == "8"  # 24 x 21 x 28 voxels of 10 nm
    assert "4 worker(s)" in " ".join(lines["in"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fly.zarr", "run", "tiny.py"]

    cfg = load_config(config, ["DATA.HOME", str(tmp_path)])
    found = estimates(Chain(cfg, raw, tmp_path / "out.zarr", (), blockwise=False))
    timed, shipped = "timed now: 3 small boxes", "shipped constants"
    assert [step.source for step in found] == [timed] * 3 + [shipped] * 3
    assert all(step.seconds > 0 and step.memory > 1e8 for step in found)
    with pytest.raises(UserError, match="no room on disk"):
        estimates(Chain(cfg, raw, small_disk(64) / "out.zarr", (), blockwise=True))


def test_a_block_that_does_not_fit_into_memory_is_refused_with_a_size_that_does(tmp_path, config, capsys, monkeypatch):
    raw = write_volume(tmp_path / "fly.zarr", (10, 10, 10), np.zeros((100, 100, 100), np.uint8))
    blocks = ("INS_SEGMENT.BLOCK_SIZE", "(64, 64, 64)", "INS_SEGMENT.CONTEXT", "(8, 8, 8)")

    def check(free, *overrides):
        monkeypatch.setattr(memory, "available_memory", lambda: free)
        cfg = load_config(config, [*blocks, *map(str, overrides), "DATA.HOME", str(tmp_path)])
        require_memory(Chain(cfg, raw, tmp_path / "out.zarr", (), blockwise=True))
        return capsys.readouterr().err

    needed = 3 * 10**8 + 72 * 80**3
    assert check(8 * needed, "SYSTEM.NUM_WORKERS", 8) == ""
    assert "use SYSTEM.NUM_WORKERS 3" in check(int(3.5 * needed), "SYSTEM.NUM_WORKERS", 8)
    assert check(needed, "SYSTEM.NUM_WORKERS", 1) == ""
    with pytest.raises(
        UserError, match=r"takes about 336.9 MB, and a worker has .*: use INS_SEGMENT.BLOCK_SIZE \(32, 64, 64\)"
    ):
        check(needed - 1)
    with pytest.raises(UserError, match=r"a worker has 1.0 MB: use a machine or a job with more"):
        check(10**6)
    slurm = ("CLUSTER.TYPE", "slurm", "CLUSTER.MEMORY")
    assert check(1, *slurm, "1G") == ""
    with pytest.raises(UserError, match=r"a worker has 209.7 MB"):
        check(1, *slurm, "200")


def test_a_volume_may_be_the_first_word(tmp_path, config):
    command = [sys.executable, CHECKOUT / "segment.py", tmp_path / "none.zarr", "-c", config, "DATA.RAW", "em"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith(f"error: {tmp_path}/none.zarr does not exist")
    refused = subprocess.run([sys.executable, CHECKOUT / "segment.py"], capture_output=True, text=True)
    assert refused.stderr == "error: no volume: python segment.py volume.zarr\n"


def test_a_failing_command_ends_the_script_with_its_status(tmp_path):
    with pytest.raises(SystemExit) as ended:
        call_script("data_utils/rescale.py", tmp_path / "none.zarr", tmp_path / "out.zarr", "--voxel-size", 8, 8, 8)
    assert ended.value.code == 2


def test_a_command_that_a_signal_ends_is_named(tmp_path, capfd):
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(SystemExit) as ended:
        call_script(str(tmp_path / "killed.py"))
    assert ended.value.code == 128 + 9
    assert re.fullmatch(r"error: .*killed.py was ended by SIGKILL, perhaps because .*\n", capfd.readouterr().err)


def test_bad_input_is_refused_before_anything_is_written(tmp_path, config):
    good = write_volume(tmp_path / "good.zarr")
    no_size = write_volume(tmp_path / "no_size.zarr")
    (no_size / "volumes/raw/.zattrs").unlink()
    with_nan = np.full(SHAPE, np.nan, np.float32)
    out = tmp_path / "results" / "out.zarr"
    for path, overrides, message in [
        (tmp_path / "none.zarr", (), "none.zarr does not exist or is not a zarr folder"),
        (good, ("DATA.RAW", "volumes/em"), "no dataset volumes/em in .*good.zarr; it holds volumes/raw"),
        (no_size, (), "has no voxel size: set its attributes resolution and offset"),
        (write_volume(tmp_path / "a.zarr", (40, 4, 4)), (), r"\(40, 4, 4\) nm.* isotropic .*rescale.py .*trainer.py"),
        (write_volume(tmp_path / "b.zarr", (8, 8), np.ones((9, 9), np.uint8)), (), r"\(8, 8\) nm.* isotropic"),
        (write_volume(tmp_path / "c.zarr", raw=np.ones(SHAPE, np.uint64)), (), "is uint64, as labels are"),
        (write_volume(tmp_path / "d.zarr", raw=with_nan), (), "NaN"),
        (good, ("TRAIN.CHECKPOINT", "none/model_checkpoint_7"), "no checkpoint at"),
        (good, ("MODEL_ISO.NUM_FMAPS", "3"), "NUM_FMAPS is 3"),
    ]:
        with pytest.raises(UserError, match=message):
            check_before_segmenting(path, out, load_config(config, overrides))
    with pytest.raises(UserError, match="exists: delete it"):
        check_before_segmenting(good, good, load_config(config))
    assert not out.parent.exists()


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, config, small_disk):
    disk = small_disk(64)
    with pytest.raises(UserError, match=r"no room on disk for .*out\.zarr"):
        check_before_segmenting(write_volume(tmp_path / "fly.zarr"), disk / "out.zarr", load_config(config))
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(("voxel_size", "warned"), [(4, True), (5, False), (20, False), (24, True)])
def test_voxels_of_a_very_different_size_bring_a_warning(tmp_path, config, capsys, voxel_size, warned):
    raw = write_volume(tmp_path / "fly.zarr", (voxel_size,) * 3)
    check_before_segmenting(raw, tmp_path / "out.zarr", load_config(config))
    assert ("beyond a factor of 2" in capsys.readouterr().err) == warned


def test_the_script_reports_a_mistake_in_one_line(tmp_path, config):
    command = [sys.executable, CHECKOUT / "segment.py", "-c", config, "--raw", tmp_path / "none.zarr"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith(f"error: {tmp_path}/none.zarr does not exist")


def test_exported_weights_are_the_same_network_without_the_optimizer(tmp_path, config):
    cfg = load_config(config)
    written = export(cfg, tmp_path / "pretrained" / "tiny")
    assert written == tmp_path / "pretrained" / "tiny" / "model_checkpoint_7"
    state = torch.load(written, weights_only=True)
    assert sorted(state) == ["iteration", "model_state_dict", "network_settings"]
    trained, exported = build_model(cfg), build_model(cfg)
    load_checkpoint(cfg.TRAIN.CHECKPOINT, trained, cfg)
    assert load_checkpoint(written, exported, cfg) == 7
    for name, weights in trained.state_dict().items():
        assert torch.equal(weights, exported.state_dict()[name])
    with pytest.raises(UserError, match="NUM_FMAPS"):
        load_checkpoint(written, build_model(cfg), load_config(config, ["MODEL_ISO.NUM_FMAPS", "3"]))
    with pytest.raises(UserError, match="is the checkpoint itself"):
        export(cfg, Path(cfg.TRAIN.CHECKPOINT).parent)


def test_the_shipped_weights_match_their_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths must not depend on the current directory
    cfg = load_config("pretrained/config_fib25.py")
    weights = Path(cfg.TRAIN.CHECKPOINT)
    load_checkpoint(weights, build_model(cfg), cfg)
    assert weights.stat().st_size <= 10e6
    assert "optimizer_state_dict" not in torch.load(weights, weights_only=True)
