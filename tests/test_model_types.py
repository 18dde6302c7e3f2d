"""Every model type, in 3D and in 2D, learns, resumes after SIGKILL, predicts, segments and loads published weights."""

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lsdseg.config.loader import load_config
from lsdseg.config.model_types import MODEL_TYPES, TASKS, ModelType, task_channels
from lsdseg.data_utils.labels import create_labels_mask
from lsdseg.data_utils.layout import PREDICT_CONFIG, data_folder, output_path, volumes_in
from lsdseg.data_utils.phantom import write_phantom
from lsdseg.data_utils.preprocess import export_sections
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.engine.device import Precision
from lsdseg.engine.network import complete_network, first_network_config
from lsdseg.engine.post.whole import segment
from lsdseg.engine.predict.blockwise import predict_blockwise
from lsdseg.engine.predict.predict import predict
from lsdseg.engine.predict.tile_size import tile_voxels
from lsdseg.engine.predict.tiles import TilePredictor, begins
from lsdseg.engine.training.pipeline import training_batches
from lsdseg.engine.training.ranks import Ranks
from lsdseg.engine.training.train import train
from lsdseg.engine.training.trainer import Trainer
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import checkpoint_path, load_checkpoint, save_untrained

SETTINGS = {
    "SYSTEM.NUM_WORKERS": 0,
    "TRAIN.DEVICE": "cpu",
    "TRAIN.THREADS": 1,
    "TRAIN.EPOCHS": 4,
    "TRAIN.SAVE_EVERY": 2,
    "TRAIN.LOG_EVERY": 1,
    "TRAIN.INITIAL_LR": 3e-3,
    "MODEL_ISO.NUM_FMAPS": 4,
    "MODEL_ISO.NUM_FMAPS_OUT": 4,
    "MODEL_ISO.FMAP_INC_FACTOR": 2,
    "MODEL_ISO.DOWNSAMPLE_FACTORS": [[2, 2, 2]],
    "MODEL_ISO.DOWNSAMPLE_FACTORS_2D": [[2, 2]],
    "MODEL_ISO.PAD_CONV": "same",
    "MODEL_ISO.INPUT_SHAPE": (20, 20, 20),
    "MODEL_ISO.INPUT_SHAPE_2D": (40, 40),
    "MODEL_ISO.LSD_SIGMA": 24,
    "INS_SEGMENT.THRESHOLDS": [0.5],
    "INS_SEGMENT.MERGE_FUNCTION": "hist_quant_50",
} | {f"MODEL_ISO.KERNEL_SIZE_{way}{suffix}": None for way in ("DOWN", "UP") for suffix in ("", "_2D")}
every_model_type = pytest.mark.parametrize("model_type", MODEL_TYPES)
in_2d_and_3d = pytest.mark.parametrize("flat", [False, True], ids=["3D", "2D"])


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantom") / "phantom.zarr"
    write_phantom(path, (28, 44, 48), seed=0, voxel_size=(8, 8, 8), offset=(80, 160, 0))
    create_labels_mask(path, "volumes/labels/mito_ids", "volumes/labels/labels_mask_mito")
    return path


@pytest.fixture
def home(tmp_path, volume):
    """A data folder with the phantom, for training and for prediction. 2D runs take their sections from it."""
    for split in ("train", "test"):
        folder = data_folder(config(tmp_path, "MTLSD"), split)
        folder.mkdir(parents=True)
        (folder / "phantom.zarr").symlink_to(volume)
    return tmp_path


def config(home, model_type, flat=False, **overrides):
    settings = SETTINGS | {"DATA.HOME": home, "TRAIN.MODEL_TYPE": model_type, "DATA.DIM_2D": flat}
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(overrides=[str(part) for item in settings.items() for part in item])


def with_first_weights(home, model_type, flat, **overrides):
    """Make a config. An auto-context type gets random weights for its first network."""
    cfg = config(home, model_type, flat, **overrides)
    if MODEL_TYPES[model_type].first:
        path = home / "first" / "model_checkpoint_0"
        torch.manual_seed(1)
        save_untrained(path, build_model(first_network_config(cfg)), first_network_config(cfg))
        cfg = config(home, model_type, flat, TRAIN__CHECKPOINT_AC=path, **overrides)
    return cfg


@every_model_type
@in_2d_and_3d
def test_the_loss_falls(home, model_type, flat):
    """On one batch, repeated, the loss of each task falls by a third."""
    fmaps = {"MODEL_ISO__NUM_FMAPS": 8, "MODEL_ISO__NUM_FMAPS_OUT": 8}
    cfg = with_first_weights(home, model_type, flat, TRAIN__AUGMENT=False, **fmaps)
    torch.manual_seed(0)
    trainer = Trainer(cfg, Precision("no", torch.device("cpu")), Ranks())
    trainer.prepare()
    with training_batches(
        cfg, [data_folder(config(home, "MTLSD"), "train") / "phantom.zarr"], trainer.tasks
    ) as batches:
        batch = next(batches)
    losses = [trainer.run_iteration([batch], iteration)[0] for iteration in range(120 if flat else 70)]
    for task in (*MODEL_TYPES[model_type].tasks, "total"):
        assert losses[-1][task] < 0.67 * losses[0][task], task


def train_and_die(cfg):
    """Train until SIGKILL in the middle of the third iteration of the model type's own network."""
    run_iteration = Trainer.run_iteration

    def deadly(self, batches, iteration):
        if iteration == 2 and self.tasks == MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].tasks:
            os.kill(os.getpid(), signal.SIGKILL)
        return run_iteration(self, batches, iteration)

    Trainer.run_iteration = deadly
    train(cfg)


def losses_of(cfg):
    """Return iteration -> loss from the log files of a run, in the order in which they were written."""
    losses = {}
    for file in sorted(Path(cfg.MODEL.LOG_DIR).glob("events*"), key=lambda file: file.stat().st_mtime_ns):
        log = EventAccumulator(str(file))
        log.Reload()
        if "loss/total" in log.Tags()["scalars"]:
            losses |= {event.step: event.value for event in log.Scalars("loss/total")}
    return losses


@every_model_type
@in_2d_and_3d
def test_training_resumes_after_sigkill_then_predicts_and_segments(home, model_type, flat):
    folders = {f"MODEL_ISO__{name}": home / "whole" / name for name in ("CKPT_FOLDER", "LOG_DIR", "OUTPUT_DIR")}
    whole = config(home, model_type, flat, **folders)
    train(whole)

    cfg = config(home, model_type, flat)
    process = multiprocessing.get_context("fork").Process(target=train_and_die, args=(cfg,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train(cfg)
    resumed, expected = losses_of(cfg), losses_of(whole)
    assert [resumed[3], resumed[4]] == [expected[3], expected[4]]

    predict_cfg = load_config(Path(cfg.MODEL.CKPT_FOLDER) / PREDICT_CONFIG)
    predict(predict_cfg)
    sample = data_folder(config(home, "MTLSD"), "test") / "phantom.zarr"
    output, raw = output_path(predict_cfg, sample), open_array(sample, "volumes/raw")
    assert list_arrays(output) == sorted(f"volumes/pred_{task}" for task in MODEL_TYPES[model_type].tasks)
    for task, channels in task_channels(cfg).items():
        predicted = open_array(output, f"volumes/pred_{task}")
        assert predicted.roi == raw.roi
        assert predicted.shape == (channels, *raw.shape)
        assert read(predicted).any()
    if "affs" not in MODEL_TYPES[model_type].tasks:
        with pytest.raises(UserError, match="pred_affs"):
            segment(predict_cfg)
        return
    segment(predict_cfg)
    segmentation = read(open_array(output, "volumes/segmentation_050"))
    assert segmentation.shape == raw.shape
    if flat:
        labels = [set(np.unique(section)) - {0} for section in segmentation]
        assert sum(map(len, labels)) == len(set.union(*labels))


@every_model_type
@in_2d_and_3d
def test_a_published_checkpoint_loads(home, model_type, flat):
    """Weights have the names and shapes of the published networks, with 12 feature maps and factor 5."""
    cfg = load_config(overrides=["TRAIN.MODEL_TYPE", model_type, "DATA.DIM_2D", str(flat)])
    dims = 2 if flat else 3
    lsds = 6 if flat else 10
    inputs = {"ACLSD": lsds, "ACRLSD": 1 + lsds}.get(model_type, 1)
    heads = {
        "MTLSD": ("lsd", "aff"),
        "LSD": ("lsd",),
        "MTLSDMITO": ("lsd", "aff", "mito"),
    }.get(model_type, ("aff",))
    channels = {"lsd": lsds, "aff": dims, "mito": 1}
    shapes = {}

    def conv_pass(name, before, fmaps, width, layers):
        for layer in layers:
            shapes[f"{name}.conv_pass.{layer}.weight"] = (fmaps, before if layer == 0 else fmaps, *(width,) * dims)
            shapes[f"{name}.conv_pass.{layer}.bias"] = (fmaps,)

    fmaps = [12, 60, 300, 1500]
    for level, before in enumerate([inputs, *fmaps[:-1]]):
        conv_pass(f"unet.l_conv.{level}", before, fmaps[level], 3, (0, 2))
    for level, factor in enumerate([2, 2, 3]):
        below = fmaps[level + 1]
        shapes[f"unet.r_up.0.{level}.up.weight"] = (below, below, *(factor,) * dims)
        shapes[f"unet.r_up.0.{level}.up.bias"] = (below,)
        conv_pass(f"unet.r_conv.0.{level}", fmaps[level] + below, fmaps[level], 3, (0, 2))
    for head in heads:
        conv_pass(f"{head}_head", 12, channels[head], 1, (0,))

    with torch.device("meta"):
        model = build_model(cfg)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


def test_a_published_checkpoint_of_a_small_network_keeps_its_numbers(home):
    cfg = config(home, "ACRLSD")
    torch.manual_seed(3)
    weights = {name: torch.randn_like(tensor) for name, tensor in build_model(cfg).state_dict().items()}
    path = home / "model_checkpoint_100000"
    torch.save({"model_state_dict": weights, "optimizer_state_dict": {}}, path)
    model = build_model(cfg)
    assert load_checkpoint(path, model, cfg) == 100000
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_auto_context_shapes_are_the_published_ones():
    """328 voxels of raw give 204 voxels of LSDs, which are cropped to 196 and give 72 voxels of affinities."""
    cfg = load_config(overrides=["TRAIN.MODEL_TYPE", "ACRLSD", "TRAIN.CHECKPOINT_AC", "x"])
    assert cfg.MODEL.RAW_SHAPE == (328,) * 3
    assert cfg.MODEL.INPUT_SHAPE == (196,) * 3
    assert cfg.MODEL.OUTPUT_SHAPE == (72,) * 3
    assert cfg.MODEL.CONTEXT == (128,) * 3
    assert first_network_config(cfg).MODEL.RAW_SHAPE == (196,) * 3


@pytest.mark.parametrize("case", ["valid", "same", "odd"])
@pytest.mark.parametrize("model_type", ["ACLSD", "ACRLSD"])
@in_2d_and_3d
def test_auto_context_tiles_fit_together(home, model_type, flat, case):
    """Tiles through both networks in one pass give the same as the whole volume through one after the other."""
    dims = 3 - flat
    settings = {
        "valid": {"PAD_CONV": "valid", "INPUT_SHAPE": (28,) * dims},
        "same": {"INPUT_SHAPE": (12,) * dims},
        # The output of the first network is an odd number of voxels larger than the input of the second one.
        "odd": {
            "PAD_CONV": "valid",
            "INPUT_SHAPE": (26,) * dims,
            "DOWNSAMPLE_FACTORS": [(3,) * dims],
            "KERNEL_SIZE_DOWN": [[(3,) * dims], [(3,) * dims] * 2],
        },
    }[case]
    overrides = {f"MODEL_ISO__{name}{'_2D' * flat}": value for name, value in settings.items()}
    cfg = with_first_weights(home, model_type, flat, **overrides)
    torch.manual_seed(2)
    second = build_model(cfg)
    predictor = TilePredictor(cfg, complete_network(cfg, second), Precision("no", torch.device("cpu")))
    sample = data_folder(config(home, "MTLSD"), "test") / "phantom.zarr"
    raw = open_array(sample, "volumes/raw")

    tiled = np.zeros((3 - flat, *raw.shape), np.float32)
    shape = tile_voxels(cfg, raw.shape)
    for begin in begins(shape, raw.shape):
        where = tuple(slice(b, b + s) for b, s in zip(begin, shape, strict=True))
        target = tiled[:, *where]
        target[:] = predictor(raw, begin, shape)["affs"][:, *map(slice, target.shape[1:])]

    first = build_model(first_network_config(cfg))
    load_checkpoint(cfg.TRAIN.CHECKPOINT_AC, first, first_network_config(cfg))
    # Pad by 40 voxels, and at the end by what a factor of 3 needs.
    wide = [(40, 40 + (-size - 78) % 3 * (case == "odd")) for size in raw.shape]
    padded = np.pad(read(raw), [(0, 0)] * flat + wide[-dims:], mode="reflect").astype(np.float32) / 255 * 2 - 1
    x = torch.from_numpy(padded)[:, None] if flat else torch.from_numpy(padded)[None, None]

    def without(y, rim):
        return y[(..., *[slice(rim, -rim or None)] * dims)]

    with torch.inference_mode():
        lsds = first.eval()(x).lsds
        rim = (x.shape[-1] - lsds.shape[-1]) // 2
        seen = torch.cat([without(x, rim), lsds], dim=1) if model_type == "ACRLSD" else lsds
        affs = second.eval()(without(seen, 2 if case == "odd" else 0)).affs
    begin = 40 - (x.shape[-1] - affs.shape[-1]) // 2
    expected = affs[(..., *(slice(begin, begin + size) for size in raw.shape[-dims:]))]
    expected = expected.transpose(0, 1) if flat else expected[0]
    np.testing.assert_allclose(tiled, expected.numpy(), atol=1e-4)
    assert tiled.std() > 1e-3


@in_2d_and_3d
@pytest.mark.parametrize("suffix", ["", "_2D"])
def test_the_first_network_has_its_own_folders(home, flat, suffix):
    names = ("CKPT_FOLDER", "LOG_DIR", "OUTPUT_DIR")
    cfg = config(home, "ACLSD", flat, **{f"MODEL_ISO__{name}{suffix}": f"{home}/{name}" for name in names})
    first = first_network_config(cfg)
    for name in names:
        assert first.MODEL[name] == f"{cfg.MODEL[name]}/first"
        assert (cfg.MODEL[name] == f"{home}/{name}") == (flat or not suffix)


def test_a_given_first_network_is_not_trained(home, capsys):
    cfg = with_first_weights(home, "ACLSD", True, TRAIN__EPOCHS=2)
    train(cfg)
    assert not (Path(cfg.MODEL.CKPT_FOLDER) / "first").exists()
    assert checkpoint_path(cfg.MODEL.CKPT_FOLDER, 2).is_file()
    predict_cfg = load_config(Path(cfg.MODEL.CKPT_FOLDER) / PREDICT_CONFIG)
    assert predict_cfg.TRAIN.CHECKPOINT_AC == cfg.TRAIN.CHECKPOINT_AC


def test_bad_first_weights_are_refused_before_anything_is_written(home):
    before = sorted(home.rglob("*"))
    with pytest.raises(UserError, match=r"TRAIN.CHECKPOINT_AC"):
        train(config(home, "ACLSD", TRAIN__CHECKPOINT_AC=home / "nothing"))
    assert sorted(home.rglob("*")) == before
    other = config(home, "MTLSD")
    save_untrained(home / "other", build_model(other), other)
    with pytest.raises(UserError, match=r"is LSD but .*other was trained with MTLSD: name another .*CHECKPOINT_AC"):
        train(config(home, "ACLSD", TRAIN__CHECKPOINT_AC=home / "other"))
    cfg = config(home, "ACLSD", TRAIN__CHECKPOINT=home / "model_checkpoint_1")
    torch.save({"model_state_dict": build_model(cfg).state_dict()}, home / "model_checkpoint_1")
    with pytest.raises(UserError, match=r"TRAIN.CHECKPOINT_AC is empty"):
        predict(cfg)


def test_mitochondria_need_labels(home):
    with pytest.raises(UserError, match=r"volumes/labels/mito"):
        train(config(home, "MTLSDMITO", DATA__MITO_LABELS="volumes/labels/mito"))


def relabeled(volume, path, **arrays):
    """Copy a volume, with other arrays in volumes/labels that start at its first voxel."""
    shutil.copytree(volume, path)
    for name, data in arrays.items():
        write_array(path, f"volumes/labels/{name}", data, voxel_size=(8, 8, 8), offset=(80, 160, 0))
    return path


def known_in(cfg, volume, count):
    """Return where the targets are known, by task, in the first patches of a volume."""
    with training_batches(cfg, [volume], tuple(task_channels(cfg))) as batches:
        return [next(batches).known for _ in range(count)]


def test_masks_may_contain_any_number(home, volume):
    mask = np.full(open_array(volume, "volumes/raw").shape, 1000, np.uint64)
    other = relabeled(volume, home / "other.zarr", labels_mask=mask, labels_mask_mito=mask)
    cfg = config(home, "MTLSDMITO")
    [expected], [known] = known_in(cfg, volume, 1), known_in(cfg, other, 1)
    for task in known:
        np.testing.assert_array_equal(known[task], expected[task])


@in_2d_and_3d
def test_mitochondria_may_be_labeled_in_a_part_of_the_volume(home, volume, flat):
    """Patches come from wherever there are neurons. Mitochondria are known where these are labeled."""
    labels = read(open_array(volume, "volumes/labels/mito_ids"))[:10]
    mask = np.ones(labels.shape, np.uint8)
    other = relabeled(volume, home / "other.zarr", mito_ids=labels, labels_mask_mito=mask)
    cfg = config(home, "MTLSDMITO", flat, TRAIN__AUGMENT=False, MODEL_ISO__INPUT_SHAPE=(8, 8, 8))
    expected, known = known_in(cfg, volume, 12), known_in(cfg, other, 12)
    for patch, partly in zip(expected, known, strict=True):
        np.testing.assert_array_equal(partly["affs"], patch["affs"])
    assert {patch["mito"].any() for patch in known} == {True, False}


@pytest.mark.parametrize(("model_type", "flat"), [("ACRLSD", False), ("MTLSDMITO", True)], ids=["ACRLSD-3D", "MITO-2D"])
def test_blockwise_prediction_equals_prediction_in_one_process(home, monkeypatch, capsys, model_type, flat):
    monkeypatch.chdir(home)
    path = home / "run" / "model_checkpoint_0"
    cfg = with_first_weights(home, model_type, flat, TRAIN__CHECKPOINT=path, SYSTEM__NUM_WORKERS=1)
    torch.manual_seed(4)
    save_untrained(path, build_model(cfg), cfg)
    predict(cfg)
    output = output_path(cfg, data_folder(config(home, "MTLSD"), "test") / "phantom.zarr")
    names = [f"volumes/pred_{task}" for task in MODEL_TYPES[model_type].tasks]
    expected = {name: read(open_array(output, name)) for name in names}
    predict_blockwise(cfg)
    assert "is predicted already" in capsys.readouterr().out
    shutil.rmtree(output)
    predict_blockwise(cfg)
    for name in names:
        # The last bit may differ, because the thread pool of a worker sums in another order.
        np.testing.assert_allclose(read(open_array(output, name)), expected[name], atol=1)
        assert expected[name].std() > 0


def test_sections_on_disk_equal_sections_of_a_volume(home):
    """Exported sections, volumes/raw/0 ... n, give the same batches and the same predictions."""
    path = home / "run" / "model_checkpoint_0"
    cfg = config(home, "MTLSD", True, TRAIN__CHECKPOINT=path, DATA__DROP_DS_MONGOTABLE=True)
    torch.manual_seed(4)
    save_untrained(path, build_model(cfg), cfg)

    def results():
        volume = volumes_in(cfg, "train")[0]
        with training_batches(cfg, [volume], ("lsds", "affs")) as batches:
            batch = next(batches)
        predict(cfg)
        return volume, batch, read(open_array(output_path(cfg, volume), "volumes/pred_affs"))

    volume, batch, affinities = results()
    assert volume.parents[1].name == "data_3d"
    export_sections(cfg)
    flat_volume, flat_batch, flat_affinities = results()
    assert flat_volume.parents[1].name == "data_2d"
    assert "volumes/raw/27" in list_arrays(flat_volume)
    np.testing.assert_array_equal(batch.raw, flat_batch.raw)
    np.testing.assert_array_equal(batch.targets["lsds"], flat_batch.targets["lsds"])
    np.testing.assert_array_equal(affinities, flat_affinities)


def test_entries_of_the_tables_name_what_exists():
    with pytest.raises(ValueError, match=r"'rim'.* not in TASKS: lsds, affs, placement, mito"):
        ModelType(("affs", "rim"))
    with pytest.raises(ValueError, match=r"'MITOS' .* not in LABELS: NEURON_LABELS"):
        replace(TASKS["mito"], labels="MITOS")
