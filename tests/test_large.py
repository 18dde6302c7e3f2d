"""Block by block, on workers, with anything killed: always the partition that one process finds in memory."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from funlib.geometry import Roi
from scipy.ndimage import gaussian_filter
from skimage.metrics import variation_of_information
from skimage.segmentation import find_boundaries
from test_segments import assert_tables

from lsdseg.config.loader import CHECKOUT, load_config
from lsdseg.data_utils.layout import data_folder, edits_path, lut_path, output_path, rag_folder, scores_path
from lsdseg.data_utils.phantom import make_phantom
from lsdseg.data_utils.records import record_of
from lsdseg.data_utils.segment_tables import SEGMENTS, read_table, require_tables
from lsdseg.data_utils.stored import read_header
from lsdseg.data_utils.volumes import list_arrays, open_array, read, seal_array, voxels_of, write_array
from lsdseg.engine.post.fragments import extract_fragments
from lsdseg.engine.post.steps import segments as counts
from lsdseg.engine.post.steps.edges import agglomerate_blockwise
from lsdseg.engine.post.steps.fragments import extract_fragments_blockwise
from lsdseg.engine.post.steps.relabel import extract_segmentation, is_extracted
from lsdseg.engine.post.steps.tables import find_segments, tables_left
from lsdseg.engine.post.tables import load_lut, save_lut
from lsdseg.engine.post.whole import segment
from lsdseg.engine.predict import tile_size
from lsdseg.engine.predict.blockwise import predict_blockwise
from lsdseg.engine.predict.predict import predict
from lsdseg.engine.predict.tile_size import tile_voxels
from lsdseg.engine.sample import samples_of
from lsdseg.engine.scoring import score
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import save_untrained
from lsdseg.rag import open_store
from lsdseg.rag.edits import EditLog
from tests import slurm
from tests.mongodb import TEST_URI, mongodb, own_server

SHAPE, OFFSET = (48, 56, 60), (80, 0, 160)
MERGE_FUNCTION, THRESHOLD = "hist_quant_75", 0.5
FINAL = "volumes/final_segmentation_hist_quant_75_050"
SETTINGS = {
    "SYSTEM.NUM_WORKERS": 2,
    "TRAIN.DEVICE": "cpu",
    "TRAIN.THREADS": 1,
    "MODEL_ISO.NUM_FMAPS": 2,
    "MODEL_ISO.NUM_FMAPS_OUT": 2,
    "MODEL_ISO.FMAP_INC_FACTOR": 2,
    "MODEL_ISO.DOWNSAMPLE_FACTORS": [[2, 2, 2]],
    "MODEL_ISO.KERNEL_SIZE_DOWN": None,
    "MODEL_ISO.KERNEL_SIZE_UP": None,
    "MODEL_ISO.INPUT_SHAPE": (36, 36, 36),
    "MODEL_ISO.GROW_INPUT": (0, 0, 0),
    "INS_SEGMENT.BLOCK_SIZE": (12, 16, 16),
    "INS_SEGMENT.CONTEXT": (8, 8, 8),
    "INS_SEGMENT.EPSILON_AGGLOMERATE": 0.0,
    "INS_SEGMENT.MERGE_FUNCTION": MERGE_FUNCTION,
    "INS_SEGMENT.THRESHOLDS": [THRESHOLD],
}


@pytest.fixture(scope="module")
def labels():
    """Neurites, and their affinities with blur and noise (uint8)."""
    _, neurites, _ = make_phantom(SHAPE, seed=0, voxel_size=(8, 8, 8))
    inside = np.where(find_boundaries(neurites, mode="thick"), 0, neurites)
    affinities = np.ones((3, *SHAPE))
    for axis in range(3):
        here, before = np.moveaxis(inside, axis, 0)[1:], np.moveaxis(inside, axis, 0)[:-1]
        np.moveaxis(affinities[axis], axis, 0)[1:] = (here == before) & (here > 0)
    noise = np.random.default_rng(0).normal(0, 0.1, affinities.shape)
    blurred = np.stack([gaussian_filter(channel, 0.7) for channel in affinities]) + noise
    return neurites, np.rint(255 * blurred.clip(0, 1)).astype(np.uint8)


@pytest.fixture
def home(tmp_path, labels, monkeypatch):
    """A home with affinities to segment; the current directory, since logs go there."""
    monkeypatch.chdir(tmp_path)
    cfg = config(tmp_path)
    sample = data_folder(cfg, "test") / "sample_A.zarr"
    place = {"voxel_size": (8, 8, 8), "offset": OFFSET}
    write_array(sample, "volumes/raw", labels[1][0], **place)
    write_array(output_path(cfg, sample), "volumes/pred_affs", labels[1], **place)
    return tmp_path


def pairs(home, **overrides):
    paths = {"DATA.HOME": home, "TRAIN.CHECKPOINT": Path(home) / "run" / "model_checkpoint_1"}
    settings = SETTINGS | paths | {key.replace("__", "."): value for key, value in overrides.items()}
    return [str(part) for item in settings.items() for part in item]


def config(home, **overrides):
    return load_config(overrides=pairs(home, **overrides))


def output(home):
    return output_path(config(home), "sample_A.zarr")


def whole_way(cfg):
    """02 to 05; the final segmentation."""
    extract_fragments_blockwise(cfg)
    agglomerate_blockwise(cfg)
    find_segments(cfg, MERGE_FUNCTION, THRESHOLD)
    extract_segmentation(cfg, MERGE_FUNCTION, THRESHOLD)
    return read(open_array(output(cfg.DATA.HOME), FINAL))


def test_placement_is_used_in_blocks_as_in_memory(home, labels):
    """A single block that holds the whole volume gives the fragments that are made without blocks."""
    neurites, affinities = labels
    placement = np.ones((3, *SHAPE), np.uint8)
    for axis in range(3):
        here, before = np.moveaxis(neurites, axis, 0)[1:], np.moveaxis(neurites, axis, 0)[:-1]
        np.moveaxis(placement[axis], axis, 0)[1:] = here == before
    place = {"voxel_size": (8, 8, 8), "offset": OFFSET}
    write_array(output(home), "volumes/pred_placement", placement * 255, **place)
    one_block = {"INS_SEGMENT__BLOCK_SIZE": SHAPE, "SYSTEM__NUM_WORKERS": 1}
    extract_fragments_blockwise(config(home, **one_block))
    found = read(open_array(output(home), "volumes/fragments"))
    placed, without = extract_fragments(affinities, placement=placement * 255), extract_fragments(affinities)
    assert (placed != without).any()
    # Fragments have other numbers, but the same voxels.
    pairs_found = np.unique(np.stack([found, placed]).reshape(2, -1), axis=1)
    assert pairs_found.shape[1] == len(np.unique(found)) == len(np.unique(placed))
    with pytest.raises(UserError, match="volumes/pred_placement is not used now"):
        extract_fragments_blockwise(config(home, **one_block, INS_SEGMENT__PLACEMENT=False))


def test_large_segments_are_kept_apart_in_blocks_as_in_memory(home):
    one_block = {"INS_SEGMENT__BLOCK_SIZE": SHAPE, "SYSTEM__NUM_WORKERS": 1}
    freely = whole_way(config(home, **one_block))
    limited = {"INS_SEGMENT__LARGE_SEGMENT": 1000, "INS_SEGMENT__LARGE_MERGE_THRESHOLD": 0.05}
    with pytest.raises(UserError, match=r"INS_SEGMENT\.LARGE_SEGMENT was 0, is 1000"):
        find_segments(config(home, **one_block, **limited), MERGE_FUNCTION, THRESHOLD)
    fragments = read(open_array(output(home), "volumes/fragments"))
    cfg = config(home, **one_block, **limited, DATA__DROP_DS_MONGOTABLE=True)
    agglomerate_blockwise(cfg)
    np.testing.assert_array_equal(read(open_array(output(home), "volumes/fragments")), fragments)
    find_segments(cfg, MERGE_FUNCTION, THRESHOLD)
    extract_segmentation(cfg, MERGE_FUNCTION, THRESHOLD)
    found = read(open_array(output(home), FINAL))
    segment(cfg)
    in_memory = read(open_array(output(home), "volumes/segmentation_050"))
    assert sum(variation_of_information(found, in_memory)) < 1e-9
    assert len(np.unique(found)) > len(np.unique(freely))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, labels):
    """Fragments, segmentation and edges of a run with one worker that nothing disturbed."""
    home = tmp_path_factory.mktemp("undisturbed")
    before = Path.cwd()
    os.chdir(home)
    try:
        cfg = config(home, SYSTEM__NUM_WORKERS=1)
        sample = data_folder(cfg, "test") / "sample_A.zarr"
        place = {"voxel_size": (8, 8, 8), "offset": OFFSET}
        write_array(sample, "volumes/raw", labels[1][0], **place)
        write_array(output(home), "volumes/pred_affs", labels[1], **place)
        return whole_way(cfg), read(open_array(output(home), "volumes/fragments")), edges_in(cfg)
    finally:
        os.chdir(before)


def edges_in(cfg):
    """All edges, sorted; fails if one is there twice."""
    u, v, scores = (
        np.concatenate(c) for c in zip(*open_store(cfg, output(cfg.DATA.HOME)).edges(MERGE_FUNCTION), strict=True)
    )
    order = np.lexsort((v, u))
    u, v, scores = u[order], v[order], scores[order]
    assert ((np.diff(u) > 0) | (np.diff(v) != 0)).all()
    return u, v, scores


def assert_as_undisturbed(cfg, segmentation, undisturbed):
    expected, fragments, edges = undisturbed
    np.testing.assert_array_equal(segmentation, expected)
    np.testing.assert_array_equal(read(open_array(output(cfg.DATA.HOME), "volumes/fragments")), fragments)
    for ours, theirs in zip(edges_in(cfg), edges, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_tables(output(cfg.DATA.HOME), FINAL, fragments, edges)


def test_blocks_give_what_one_process_gives(home, undisturbed, labels):
    cfg = config(home)
    segment(cfg)
    in_memory = read(open_array(output(home), "volumes/segmentation_050"))
    assert 5 < len(np.unique(in_memory))
    assert sum(variation_of_information(in_memory, undisturbed[0])) < 0.05
    assert sum(variation_of_information(labels[0], undisturbed[0])) < 0.5
    assert_tables(output(home), "volumes/segmentation_050", read(open_array(output(home), "volumes/fragments")))


def test_four_workers_and_a_second_run_give_the_same(home, undisturbed, capsys, monkeypatch):
    monkeypatch.setattr(counts, "MOST_NODES", 8)
    monkeypatch.setattr(counts, "BLOCKS_IN_RANGE", 8)
    cfg = config(home, SYSTEM__NUM_WORKERS=4, INS_SEGMENT__CONTACTS_IN_MEMORY=900)
    assert_as_undisturbed(cfg, whole_way(cfg), undisturbed)
    array = open_array(output(home), FINAL)
    assert (tuple(array.offset), array.attrs["threshold"]) == (OFFSET, THRESHOLD)
    shown = capsys.readouterr().out
    assert "agglomerate_hist_quant_75_up_1 of" in shown
    assert "segmentation_hist_quant_75_050_up_1 of" in shown
    assert "segmentation_hist_quant_75_050_ranges of" in shown
    whole_way(cfg)
    assert capsys.readouterr().out.count("nothing to do") == 3


def test_tables_of_segments_are_those_of_the_segmentation_that_is_there(home, undisturbed, capsys, monkeypatch):
    cfg, path, fragments, edges = config(home, SYSTEM__NUM_WORKERS=1), output(home), *undisturbed[1:]
    with monkeypatch.context() as patch:
        patch.setattr(counts, "finish_tables", interrupted)
        with pytest.raises(KeyboardInterrupt):
            whole_way(cfg)
    (sample,) = samples_of(cfg)
    assert not is_extracted(sample, MERGE_FUNCTION, THRESHOLD)
    with pytest.raises(UserError, match="there are no tables of the segments of volumes/final_segmentation"):
        require_tables(path, FINAL)
    capsys.readouterr()
    extract_segmentation(cfg, MERGE_FUNCTION, THRESHOLD)
    assert "nothing to do, all 64 blocks are done" in capsys.readouterr().out
    assert is_extracted(sample, MERGE_FUNCTION, THRESHOLD)
    assert_tables(path, FINAL, fragments, edges)

    # A segmentation of an earlier version, whose blocks were not counted, is left as it is.
    shutil.rmtree(path.with_suffix(".segments"))
    extract_segmentation(cfg, MERGE_FUNCTION, THRESHOLD)
    assert "no tables of the segments of volumes/final_segmentation_hist_quant_75_050" in capsys.readouterr().out
    assert is_extracted(sample, MERGE_FUNCTION, THRESHOLD)

    # Without the edges that the look-up table was made from, nobody knows the scores.
    agglomerate_blockwise(config(home, SYSTEM__NUM_WORKERS=1, DATA__DROP_DS_MONGOTABLE=True))
    anew = config(home, SYSTEM__NUM_WORKERS=2, DATA__DROP_DS_MONGOTABLE=True)
    extract_segmentation(anew, MERGE_FUNCTION, THRESHOLD)
    assert "(without scores: the graph that the look-up table was made from is gone)" in capsys.readouterr().out
    assert_tables(path, FINAL, fragments)


def interrupted(*_):
    raise KeyboardInterrupt


def test_tables_in_parts_give_the_same(home, undisturbed, capsys):
    cfg = config(home, INS_SEGMENT__FRAGMENTS_IN_MEMORY=30)
    assert_as_undisturbed(cfg, whole_way(cfg), undisturbed)
    shown = capsys.readouterr().out
    assert "tables_hist_quant_75_up_1 of" in shown
    folder = lut_path(output(home), MERGE_FUNCTION, THRESHOLD).with_suffix("")
    assert f"segments at {THRESHOLD:g}, in parts for each block, in {folder}" in shown
    assert tables_left(samples_of(cfg)[0], MERGE_FUNCTION, [THRESHOLD, 0.1]) == [0.1]

    part = next(folder.glob("*/*.npz"))
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(UserError, match=f"{part} is not a look-up table; run 04_find_segments_full.py again"):
        extract_segmentation(config(home, DATA__DROP_DS_MONGOTABLE=True), MERGE_FUNCTION, THRESHOLD)

    find_segments(config(home), MERGE_FUNCTION, THRESHOLD)
    assert not folder.exists()
    extract_segmentation(config(home, DATA__DROP_DS_MONGOTABLE=True), MERGE_FUNCTION, THRESHOLD)
    EditLog(edits_path(output(home)), record_of(open_array(output(home), "volumes/fragments")).id).merge(1, 2)
    with pytest.raises(UserError, match="holds edits, which need the whole graph in memory: raise INS_SEGMENT"):
        find_segments(cfg, MERGE_FUNCTION, THRESHOLD)


@pytest.mark.parametrize("in_parts", [False, True])
def test_tables_are_scored_as_the_segmentations_that_they_stand_for(home, labels, capsys, in_parts):
    cfg = config(home, SYSTEM__NUM_WORKERS=1, **({"INS_SEGMENT__FRAGMENTS_IN_MEMORY": 20} if in_parts else {}))
    place = {"voxel_size": (8, 8, 8), "offset": OFFSET}
    write_array(data_folder(cfg, "test") / "sample_A.zarr", "volumes/labels/neuron_ids", labels[0], **place)
    extract_fragments_blockwise(cfg)
    agglomerate_blockwise(cfg)
    find_segments(cfg, MERGE_FUNCTION, 0.204)
    find_segments(cfg, MERGE_FUNCTION, THRESHOLD)
    score(cfg)
    before = json.loads(scores_path(output(home)).read_text())
    assert f"-mf {MERGE_FUNCTION} -th" in capsys.readouterr().out
    assert [row["written"] for row in before["scores"]] == [True, False, False]
    assert {row["threshold"] for row in before["scores"]} == {None, 0.204, THRESHOLD}

    extract_segmentation(cfg, MERGE_FUNCTION, THRESHOLD)
    score(cfg)
    assert len(json.loads(scores_path(output(home)).read_text())["scores"]) == 2
    score(cfg, tables=True)
    after = json.loads(scores_path(output(home)).read_text())
    rows = [{row["dataset"]: row | {"written": None} for row in report["scores"]} for report in (before, after)]
    assert rows[0] == rows[1]
    edits = [rows[0][name] for name in rows[0] if "final" in name]
    assert all((row["splits_needed"] is None) == in_parts for row in edits)
    assert after["best"] == before["best"]

    EditLog(edits_path(output(home)), record_of(open_array(output(home), "volumes/fragments")).id).merge(1, 2)
    score(cfg, tables=True)
    assert "a table is left out" in capsys.readouterr().out


def test_mongodb_gives_the_same(home, undisturbed, tmp_path):
    with mongodb(tmp_path / "mongodb") as uri:
        cfg = config(home, DATA__DB_HOST=uri)
        assert_as_undisturbed(cfg, whole_way(cfg), undisturbed)


def test_mongodb_may_go_away_for_some_seconds_in_the_middle_of_03(home, undisturbed, tmp_path):
    if TEST_URI:
        pytest.skip("LSD_TEST_MONGODB_URI names a server that is not ours to stop")
    with own_server(tmp_path / "mongodb") as server:
        cfg = config(home, DATA__DB_HOST=server.uri)
        extract_fragments_blockwise(cfg)
        command = [
            sys.executable,
            str(CHECKOUT / "03_agglomerate_blockwise.py"),
            *pairs(home, DATA__DB_HOST=server.uri),
        ]
        master = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log = Path(home) / "daisy_logs" / f"sampleA_agglomerate_{MERGE_FUNCTION}" / "worker_0.log"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.is_file() and "block " in log.read_text()):
            time.sleep(0.05)
        server.stop()
        time.sleep(3)
        server.start()
        printed, _ = master.communicate(timeout=150)
        assert master.returncode == 0, printed
        find_segments(cfg, MERGE_FUNCTION, THRESHOLD)
        extract_segmentation(cfg, MERGE_FUNCTION, THRESHOLD)
        assert_as_undisturbed(cfg, read(open_array(output(home), FINAL)), undisturbed)


@pytest.mark.slurm
def test_slurm_jobs_give_the_same(home, undisturbed, tmp_path, monkeypatch):
    if slurm.missing():
        pytest.skip(f"Slurm cannot be started: {slurm.missing()}")
    with slurm.one_machine_slurm() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        jobs = {"CLUSTER__TYPE": "slurm", "CLUSTER__CPUS_PER_WORKER": 1, "CLUSTER__GPUS_PER_WORKER": 0}
        cfg = config(home, **jobs)
        assert_as_undisturbed(cfg, whole_way(cfg), undisturbed)

        torch.manual_seed(0)
        save_untrained(cfg.TRAIN.CHECKPOINT, build_model(cfg), cfg)
        predict_blockwise(config(home, **jobs, DATA__DROP_DS_MONGOTABLE=True))
        by_jobs = read(open_array(output(home), "volumes/pred_affs"))
        predict(cfg)
        np.testing.assert_array_equal(read(open_array(output(home), "volumes/pred_affs")), by_jobs)
        assert not slurm.job_ids(environment)


def test_kill_9_of_workers_and_master_changes_nothing(home, undisturbed):
    chance = random.Random(0)
    cfg = config(home)
    torch.manual_seed(0)
    save_untrained(cfg.TRAIN.CHECKPOINT, build_model(cfg), cfg)
    affinities = read(open_array(output(home), "volumes/pred_affs"))
    for script, options in [
        ("super_predicter_daisy.py", ["DATA.DROP_DS_MONGOTABLE", "False"]),
        ("02_extract_fragments_blockwise.py", []),
        ("03_agglomerate_blockwise.py", []),
        ("04_find_segments_full.py", ["-mf", MERGE_FUNCTION]),
        ("05_extract_segmentation_from_lut.py", ["-mf", MERGE_FUNCTION, "-th", str(THRESHOLD)]),
    ]:
        command = [sys.executable, str(CHECKOUT / script), *options, *pairs(home)]
        master = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 5
        while master.poll() is None and time.monotonic() < deadline:
            time.sleep(1)
            with contextlib.suppress(psutil.NoSuchProcess):  # some end by themselves, some are dead already
                below = psutil.Process(master.pid).children(recursive=True)
                workers = [
                    p for p in below if "lsdseg.engine.blocks.worker" in p.as_dict(["cmdline"], ad_value=())["cmdline"]
                ]
                if workers:
                    chance.choice(workers).kill()
        master.kill()
        master.wait()
        assert subprocess.run(command, capture_output=True).returncode == 0
        if script == "super_predicter_daisy.py":
            predicted = read(open_array(output(home), "volumes/pred_affs"))
            predict(cfg)
            np.testing.assert_array_equal(read(open_array(output(home), "volumes/pred_affs")), predicted)
            write_array(output(home), "volumes/pred_affs", affinities, voxel_size=(8, 8, 8), offset=OFFSET)
    assert_as_undisturbed(config(home), read(open_array(output(home), FINAL)), undisturbed)


def test_a_disk_that_fills_up_during_02_leaves_nothing_wrong(home, undisturbed, small_disk):
    disk = small_disk(3000)
    shutil.copytree(Path(home) / "lsd_outputs", disk / "lsd_outputs")
    cfg = config(home, DATA__OUTFILE=disk / "lsd_outputs")
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    filler.write_bytes(bytes(filler.stat().st_size - 250 * 1024))
    with pytest.raises(UserError, match=r"No space left on device|no room"):
        extract_fragments_blockwise(cfg)
    filler.unlink()
    extract_fragments_blockwise(cfg)
    fragments = open_array(output_path(cfg, "sample_A.zarr"), "volumes/fragments")
    np.testing.assert_array_equal(read(fragments), undisturbed[1])


def test_scripts_out_of_order_say_what_comes_first(home):
    cfg = config(home)
    with pytest.raises(UserError, match=r"run 02_extract_fragments_blockwise.py"):
        agglomerate_blockwise(cfg)
    extract_fragments_blockwise(cfg)
    with pytest.raises(UserError, match=r"no edges of 'mean', only of none: run 03_agglomerate"):
        find_segments(cfg, "mean", None)
    agglomerate_blockwise(cfg)
    with pytest.raises(UserError, match=r"no edges of 'mean', only of hist_quant_75"):
        find_segments(cfg, "mean", None)
    with pytest.raises(UserError, match=r"run 04_find_segments_full.py first"):
        extract_segmentation(cfg, MERGE_FUNCTION, THRESHOLD)

    changed = {"INS_SEGMENT__FILTER_FRAGMENTS": 0.1}
    with pytest.raises(UserError, match=r"FILTER_FRAGMENTS was 0.0, is 0.1: set DATA.DROP_DS_MONGOTABLE True"):
        extract_fragments_blockwise(config(home, **changed))
    extract_fragments_blockwise(config(home, **changed, DATA__DROP_DS_MONGOTABLE=True))

    find_segments_of_others = lut_path(output(home), MERGE_FUNCTION, THRESHOLD)
    find_segments_of_others.parent.mkdir()
    save_lut(find_segments_of_others, np.array([[1, 2], [1, 1]], np.uint64))
    assert load_lut(find_segments_of_others).shape == (2, 2)
    with pytest.raises(UserError, match=r"made from other fragments"):
        extract_segmentation(config(home, **changed), MERGE_FUNCTION, THRESHOLD)

    shutil.rmtree(output(home) / "volumes/fragments")
    with pytest.raises(UserError, match=r"no volumes/fragments in .*: run 02"):
        extract_segmentation(config(home, **changed), MERGE_FUNCTION, THRESHOLD)


def test_nothing_is_built_on_something_else_than_it_says(home):
    """Whatever a step was made from is replaced behind its back, and every later step refuses to go on."""
    cfg, threshold = config(home, INS_SEGMENT__BLOCK_SIZE=(24, 32, 32)), THRESHOLD
    anew = config(home, INS_SEGMENT__BLOCK_SIZE=(24, 32, 32), DATA__DROP_DS_MONGOTABLE=True)
    whole_way(cfg)
    first = record_of(open_array(output(home), FINAL))
    assert first.inputs["volumes/fragments"] == record_of(open_array(output(home), "volumes/fragments")).id

    # 02 anew with the same settings: its fragments have the same voxels, and another id.
    extract_fragments_blockwise(anew)
    with pytest.raises(UserError, match=r"no edges of .hist_quant_75"):
        find_segments(cfg, MERGE_FUNCTION, threshold)
    for settings in (cfg, anew):  # not even when it may drop the segmentation: the table is that of others
        with pytest.raises(UserError, match=r"was made from other fragments: run 03_agglomerate_blockwise.py and 04"):
            extract_segmentation(settings, MERGE_FUNCTION, threshold)
    agglomerate_blockwise(cfg)
    find_segments(cfg, MERGE_FUNCTION, threshold)
    with pytest.raises(
        UserError, match=rf"{FINAL} in .* was made from something else: .*volumes/fragments was replaced"
    ):
        extract_segmentation(cfg, MERGE_FUNCTION, threshold)
    assert record_of(open_array(output(home), FINAL)).id == first.id
    extract_segmentation(anew, MERGE_FUNCTION, threshold)
    assert record_of(open_array(output(home), FINAL)).id != first.id

    # Another prediction takes the place of the affinities.
    affinities = open_array(output(home), "volumes/pred_affs")
    replaced = read(affinities)
    replaced[:, :4] = 255 - replaced[:, :4]
    write_array(output(home), "volumes/pred_affs", replaced, voxel_size=(8, 8, 8), offset=OFFSET)
    for step in (
        extract_fragments_blockwise,
        agglomerate_blockwise,
        lambda cfg: find_segments(cfg, MERGE_FUNCTION, threshold),
        lambda cfg: extract_segmentation(cfg, MERGE_FUNCTION, threshold),
    ):
        with pytest.raises(UserError, match=r"volumes/pred_affs was replaced: set DATA.DROP_DS_MONGOTABLE True"):
            step(cfg)


def test_edits_are_made_in_the_final_segmentation(home):
    cfg, anew = config(home, SYSTEM__NUM_WORKERS=1), config(home, SYSTEM__NUM_WORKERS=1, DATA__DROP_DS_MONGOTABLE=True)
    before = whole_way(cfg)
    fragments = read(open_array(output(home), "volumes/fragments"))
    log = EditLog(edits_path(output(home)), record_of(open_array(output(home), "volumes/fragments")).id)

    def edited():
        find_segments(anew, MERGE_FUNCTION, THRESHOLD)
        extract_segmentation(anew, MERGE_FUNCTION, THRESHOLD)
        return read(open_array(output(home), FINAL))

    # Two segments become one, and one of several fragments becomes two.
    pieces = np.unique(np.stack([before, fragments]).reshape(2, -1), axis=1)
    segments, counts = np.unique(pieces[0], return_counts=True)
    large = segments[counts.argmax()]
    first, second = (pieces[1][pieces[0] == segment][0] for segment in segments[segments != large][:2])
    ends = pieces[1][pieces[0] == large][[0, -1]]
    log.merge(first, second)
    find_segments(cfg, MERGE_FUNCTION, THRESHOLD)
    with pytest.raises(UserError, match=r"the look-up table was replaced"):
        extract_segmentation(cfg, MERGE_FUNCTION, THRESHOLD)
    log.split(*ends)
    with pytest.raises(UserError, match=r"was made before the last edit in .*\.edits: run 04"):
        extract_segmentation(anew, MERGE_FUNCTION, THRESHOLD)
    after = edited()
    merged = np.isin(before, before[np.isin(fragments, [first, second])])
    assert len(np.unique(after[merged])) == 1
    parts = [after[fragments == end] for end in ends]
    assert {len(np.unique(part)) for part in parts} == {1}
    assert parts[0][0] != parts[1][0]
    untouched = ~merged & (before != large)
    np.testing.assert_array_equal(after[untouched], before[untouched])

    log.undo()
    log.undo()
    np.testing.assert_array_equal(edited(), before)
    EditLog(log.path, log.fragments).merge(first, 2**50)
    with pytest.raises(UserError, match=rf"edit 5 names fragment {2**50}, which is no longer there"):
        find_segments(cfg, MERGE_FUNCTION, THRESHOLD)


def test_lost_chunks_and_rows_are_counted(home):
    """Voxels of a chunk that is missing read as 0, and a file of edges that is missing joins nothing."""
    cfg, path = config(home), output(home)
    seal_array(path, "volumes/pred_affs")
    whole_way(cfg)
    steps = {
        "volumes/pred_affs": [extract_fragments_blockwise, agglomerate_blockwise],
        "volumes/fragments": [agglomerate_blockwise, extract_fragments_blockwise],
        FINAL: [lambda cfg: extract_segmentation(cfg, MERGE_FUNCTION, THRESHOLD)],
    }
    for dataset, functions in steps.items():
        chunk = read_header(path / dataset).chunk_file((0,) * len(open_array(path, dataset).shape))
        chunk.rename(home / "away")
        for function in functions:
            with pytest.raises(UserError, match=rf"^1 of \d+ chunks of {dataset} in {path} are missing"):
                function(cfg)
        (home / "away").rename(chunk)
        for function in functions:
            function(cfg)

    (lut,) = find_segments(cfg, MERGE_FUNCTION, THRESHOLD)
    expected = np.array(load_lut(lut))
    for table in ("nodes", f"edges_{MERGE_FUNCTION}"):
        file = next((rag_folder(path) / table).rglob("*.parquet"))
        file.rename(home / "away")
        with pytest.raises(UserError, match=rf"^{table} of the graph .* has \d+ rows where \d+ were written: run 0"):
            find_segments(cfg, MERGE_FUNCTION, THRESHOLD)
        (home / "away").rename(file)
    file.unlink()
    with pytest.raises(UserError, match=r"rows where .* were written: run 03_agglomerate.*DROP_DS_MONGOTABLE True"):
        agglomerate_blockwise(cfg)
    agglomerate_blockwise(config(home, DATA__DROP_DS_MONGOTABLE=True))
    find_segments(cfg, MERGE_FUNCTION, THRESHOLD)
    np.testing.assert_array_equal(load_lut(lut), expected)


def test_the_steps_go_on_without_blocks_that_cannot_be_read_if_they_may(home, capfd):
    path, cfg = output(home), config(home, CLUSTER__SAME_ERRORS=100)
    extract_fragments_blockwise(cfg)
    chunk = read_header(path / "volumes/fragments").chunk_file((1, 1, 1))
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(UserError, match=r"blocks are not done.* set CLUSTER\.SKIP_FAILED True"):
        agglomerate_blockwise(cfg)
    assert f"{chunk} is damaged" in capfd.readouterr().err
    segmentation = whole_way(config(home, CLUSTER__SAME_ERRORS=100, CLUSTER__SKIP_FAILED=True))
    final = open_array(path, FINAL)
    ((begin, shape),) = final.attrs["missing_blocks"]
    assert "of sampleA: goes on without 27 blocks" in capfd.readouterr().out
    missing = np.zeros(final.shape, bool)
    missing[voxels_of(final, Roi(begin, shape))] = True
    np.testing.assert_array_equal(segmentation == 0, missing | (segmentation == 0))
    assert not segmentation[missing].any()
    assert segmentation[~missing].any()
    found = read_table(require_tables(path, FINAL), SEGMENTS, ["voxels"])
    assert sum(batch["voxels"].sum() for batch in found) == np.count_nonzero(segmentation)


def test_a_run_that_starts_over_goes_on_after_an_interruption(home, capsys):
    path, cfg = output(home), config(home)
    before = whole_way(cfg)
    chunk = read_header(path / "volumes/fragments").chunk_file((1, 1, 1))
    whole, anew = chunk.read_bytes(), config(home, DATA__DROP_DS_MONGOTABLE=True, CLUSTER__SAME_ERRORS=100)

    def done_before(step):
        step()
        return [int(n) for n in re.findall(r"64 blocks, (\d+) of them done before", capsys.readouterr().out)]

    for step, reads_the_chunk in [
        (lambda: agglomerate_blockwise(anew), 27),
        (lambda: find_segments(anew, MERGE_FUNCTION, THRESHOLD), 0),
        (lambda: extract_segmentation(anew, MERGE_FUNCTION, THRESHOLD), 4),
    ]:
        if reads_the_chunk:
            chunk.write_bytes(whole[:40])
            with pytest.raises(UserError, match=f"{reads_the_chunk} of 64 blocks are not done"):
                step()
            capsys.readouterr()
            chunk.write_bytes(whole)
            assert done_before(step) == [64 - reads_the_chunk]
            assert done_before(step) == [0]
        step()
    np.testing.assert_array_equal(read(open_array(path, FINAL)), before)


def test_a_graph_of_others_is_never_dropped_unasked(home):
    """Published scripts, and another checkpoint of the sample in MongoDB, leave nodes where 02 finds no fragments."""
    store = open_store(config(home), output(home), "r+")
    store.write_nodes(0, np.array([1], np.uint64), np.zeros((1, 3)))
    with pytest.raises(UserError, match=r"there is a graph .* already.*DATA.DB_NAME .*DATA.DROP_DS_MONGOTABLE True"):
        extract_fragments_blockwise(config(home))
    assert [len(ids) for ids in open_store(config(home), output(home), "r").node_ids()] == [1]
    assert "volumes/fragments" not in list_arrays(output(home))
    extract_fragments_blockwise(config(home, DATA__DROP_DS_MONGOTABLE=True))


def test_thresholds_that_differ_have_tables_of_their_own(home):
    cfg = config(home)
    extract_fragments_blockwise(cfg)
    agglomerate_blockwise(cfg)
    paths = [path for value in (0.501, 0.504) for path in find_segments(cfg, MERGE_FUNCTION, value)]
    assert [path.name[-8:] for path in paths] == ["50_1.npz", "50_4.npz"]


def test_samples_whose_names_meet_are_refused(home):
    folder = data_folder(config(home), "test")
    shutil.copytree(folder / "sample_A.zarr", folder / "sample-A.zarr")
    with pytest.raises(UserError, match=r"sample-A.zarr and sample_A.zarr .* both are named sampleA there: rename one"):
        extract_fragments_blockwise(config(home))


def test_the_config_of_another_home_is_kept_beside_that_of_a_sample_with_the_same_name(home, capsys):
    other = config(home / "other")
    shutil.copytree(data_folder(config(home), "test"), data_folder(other, "test"))
    shutil.copytree(output(home), output_path(other, "sample_A.zarr"))
    extract_fragments_blockwise(config(home))
    extract_fragments_blockwise(other)
    folder = home / "daisy_logs" / "sampleA_fragments"
    assert f"are now in {folder / 'earlier_1'}" in capsys.readouterr().out
    assert load_config(folder / "earlier_1" / "config_0.yaml").DATA.HOME == str(home)
    assert load_config(folder / "config_0.yaml").DATA.HOME == str(home / "other")
    assert (folder / "earlier_1" / "worker_0.log").is_file()


def test_bad_input_is_refused(home):
    with pytest.raises(UserError, match=r"CONTEXT \(8, 20, 8\) is larger than BLOCK_SIZE .* along y"):
        extract_fragments_blockwise(config(home, INS_SEGMENT__CONTEXT=(8, 20, 8)))
    with pytest.raises(UserError, match=r"BLOCK_SIZE"):
        config(home, INS_SEGMENT__BLOCK_SIZE=(12.5, 16, 16))
    affinities = np.full((3, *SHAPE), 0.5, np.float32)
    affinities[1, 30, 30, 30] = np.nan
    write_array(output(home), "volumes/pred_affs", affinities, voxel_size=(8, 8, 8), offset=OFFSET)
    with pytest.raises(UserError, match=r"0\.\.1, without NaN"):
        extract_fragments_blockwise(config(home))


def test_blockwise_prediction_is_the_prediction_and_skips_what_is_empty(home, tmp_path, labels, monkeypatch):
    cfg = config(home, MODEL_ISO__GROW_INPUT=None)
    torch.manual_seed(0)
    save_untrained(cfg.TRAIN.CHECKPOINT, build_model(cfg), cfg)
    predict(cfg)
    names = ("volumes/pred_affs", "volumes/pred_lsds")
    expected = [read(open_array(output(home), name)) for name in names]
    shutil.rmtree(output(home))
    predict_blockwise(cfg)
    for name, values in zip(names, expected, strict=True):
        np.testing.assert_array_equal(read(open_array(output(home), name)), values)
    assert not [name for name in list_arrays(output(home)) if name.endswith(".partial")]
    for records in (output(home).with_suffix(".blocks") / "predict" / "done").iterdir():
        records.write_bytes(b"")  # lost: all blocks are done again, in place
    before = tile_voxels(cfg, labels[0].shape, workers=2)
    monkeypatch.setattr(tile_size, "SHARE", 0.0)  # and as large as they were
    assert tile_voxels(cfg, labels[0].shape, workers=2) < before
    predict_blockwise(cfg)
    np.testing.assert_array_equal(read(open_array(output(home), names[0])), expected[0])

    mask = np.ones(SHAPE, np.uint8)
    mask[:, :, 40:] = 0
    write_array(tmp_path / "mask.zarr", "mask", mask, voxel_size=(8, 8, 8), offset=OFFSET)
    masked = config(
        home,
        DATA__DROP_DS_MONGOTABLE=True,
        INS_SEGMENT__MASK_FILE=tmp_path / "mask.zarr",
        INS_SEGMENT__MASK_DATASET="mask",
    )
    predict_blockwise(masked, skip_empty=True)
    affinities = read(open_array(output(home), names[0]))
    np.testing.assert_array_equal(affinities[..., :40], expected[0][..., :40])
    assert not affinities[..., 40:].any()


def test_sigterm_ends_everything_and_what_is_done_stays_done(home):
    command = [sys.executable, str(CHECKOUT / "02_extract_fragments_blockwise.py"), *pairs(home)]
    master = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(Path(home).glob("daisy_logs/*/worker_0.log")):
        time.sleep(0.1)
    children = psutil.Process(master.pid).children(recursive=True)
    master.send_signal(signal.SIGTERM)
    printed, _ = master.communicate(timeout=60)
    assert master.returncode == 143, printed
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive
