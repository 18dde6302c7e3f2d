import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import data_folder
from lsdseg.data_utils.phantom import write_phantom
from lsdseg.engine.device import Precision
from lsdseg.engine.training.channels import ChannelWatch, dead_channels
from lsdseg.engine.training.pipeline import training_batches
from lsdseg.engine.training.ranks import Ranks
from lsdseg.engine.training.train import seed_everything, train
from lsdseg.engine.training.trainer import Trainer, parameter_groups
from lsdseg.models import AutoContext, build_model

SETTINGS = {
    "SYSTEM.NUM_WORKERS": 0,
    "TRAIN.DEVICE": "cpu",
    "TRAIN.EPOCHS": 200,
    "TRAIN.BATCH_SIZE": 2,
    "TRAIN.INITIAL_LR": 1e-3,
    "TRAIN.WARMUP": 50,
    "MODEL_ISO.NUM_FMAPS": 8,
    "MODEL_ISO.NUM_FMAPS_OUT": 8,
    "MODEL_ISO.FMAP_INC_FACTOR": 3,
    "MODEL_ISO.DOWNSAMPLE_FACTORS": [[2, 2, 2], [2, 2, 2]],
    "MODEL_ISO.KERNEL_SIZE_DOWN": None,
    "MODEL_ISO.KERNEL_SIZE_UP": None,
    "MODEL_ISO.PAD_CONV": "same",
    "MODEL_ISO.INPUT_SHAPE": (16, 16, 16),
    "MODEL_ISO.GROW_INPUT": (0, 0, 0),
    "MODEL_ISO.LSD_SIGMA": 40,
    "MODEL_ISO.PROB_ELASTIC": 0.0,
}
CHANNELS = 2 * (8 + 24 + 72 + 24 + 8)


def config(home, **overrides):
    settings = SETTINGS | {"DATA.HOME": home} | {key.replace("__", "."): v for key, v in overrides.items()}
    return load_config(overrides=[str(part) for item in settings.items() for part in item])


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """A few training batches of a phantom, to go round in."""
    cfg = config(tmp_path_factory.mktemp("home"))
    volume = data_folder(cfg, "train") / "phantom.zarr"
    volume.parent.mkdir(parents=True)
    write_phantom(volume, (64, 64, 64), seed=0, voxel_size=(8, 8, 8))
    with training_batches(cfg, [volume], ("lsds", "affs")) as made:
        return [next(made) for _ in range(25)]


def dead_after_training(cfg, batches, iterations):
    seed_everything(0)
    trainer = Trainer(cfg, Precision("no", torch.device("cpu")), Ranks())
    trainer.prepare()
    for iteration in range(iterations):
        losses, _ = trainer.run_iteration([batches[iteration % len(batches)]], iteration)
    assert losses["affs"] < 0.15  # it has learned something
    return sum(dead_channels(trainer.network, torch.cat([torch.from_numpy(b.raw) for b in batches[:8]])).values())


def test_channels_live_where_steps_are_smaller_in_wide_layers(tmp_path, batches):
    """The same network with the same steps in all layers loses some for good."""
    assert dead_after_training(config(tmp_path, TRAIN__LR_FAN_IN=108), batches, 200) == 0
    assert dead_after_training(config(tmp_path), batches, 200) > 0.02 * CHANNELS


def kill(network, conv, channels):
    """Make channels of a convolution 0 for every input."""
    with torch.no_grad():
        conv.weight[channels] = 0
        conv.bias[channels] = -1


def test_dead_channels_are_counted_per_level(tmp_path):
    network, raw = build_model(config(tmp_path)), torch.rand(2, 1, 16, 16, 16)
    levels = {"l_conv.0": 0, "l_conv.1": 0, "l_conv.2": 0, "r_conv.0.1": 0, "r_conv.0.0": 0}
    before = dead_channels(network, raw)
    assert before.keys() == levels.keys()
    assert sum(before.values()) < 10  # some find nothing in noise
    kill(network, network.unet.l_conv[2].conv_pass[2], slice(None))
    kill(network, network.unet.r_conv[0][1].conv_pass[0], slice(20))
    after = dead_channels(network, raw)
    assert after["l_conv.2"] >= 72
    assert after["r_conv.0.1"] >= 20
    assert after["l_conv.0"] == before["l_conv.0"]
    assert not network.unet.l_conv[0].conv_pass[1]._forward_hooks


def test_a_leaky_channel_that_died_comes_back(tmp_path, batches):
    """Gradients reach it. Behind a ReLU there are none."""
    moved = {}
    for activation in ("relu", "leaky_relu"):
        seed_everything(0)
        cfg = config(tmp_path, MODEL_ISO__ACTIVATION=activation)
        trainer = Trainer(cfg, Precision("no", torch.device("cpu")), Ranks())
        conv = trainer.network.unet.l_conv[2].conv_pass[2]
        kill(trainer.network, conv, slice(10))
        assert dead_channels(trainer.network, torch.from_numpy(batches[0].raw))["l_conv.2"] >= 10
        trainer.prepare()
        trainer.run_iteration([batches[0]], 0)
        moved[activation] = (conv.bias[:10] != -1).sum().item()
    assert moved == {"relu": 0, "leaky_relu": 10}


def test_of_two_networks_in_a_row_the_trained_one_is_watched(tmp_path):
    first, second = build_model(config(tmp_path, TRAIN__MODEL_TYPE="LSD")), build_model(config(tmp_path))
    kill(first, first.unet.l_conv[0].conv_pass[0], slice(None))
    both = AutoContext(first, second, ("raw",), fit=lambda size: size)
    raw = torch.rand(1, 1, 16, 16, 16)
    assert dead_channels(both, raw) == dead_channels(second, raw)


def test_a_watch_warns_once_of_what_is_dead_in_all_of_many_steps(tmp_path):
    network, watch = build_model(config(tmp_path)), ChannelWatch()

    def steps(count):
        for _ in range(count):
            with watch.watch(network):
                network(torch.rand(2, 1, 16, 16, 16))

    kill(network, network.unet.l_conv[2].conv_pass[2], slice(60))
    steps(ChannelWatch.WINDOW - 1)
    assert watch.dead() == {}
    assert watch.warning() is None
    steps(1)
    assert watch.dead()["l_conv.2"] >= 60
    assert "in l_conv.2" in watch.warning()
    assert watch.warning() is None
    for name in (0, 1):
        kill(network, network.unet.r_conv[0][name].conv_pass[2], slice(None))
    kill(network, network.unet.l_conv[2].conv_pass[0], slice(None))
    steps(ChannelWatch.WINDOW)
    assert "24 in r_conv.0.1" in watch.warning()


def test_training_logs_dead_channels_and_warns_of_them(tmp_path, monkeypatch, capsys):
    """Steps as large as the weights kill most channels at once."""
    monkeypatch.setattr(ChannelWatch, "WINDOW", 1)
    monkeypatch.setattr(ChannelWatch, "MIN_INTERVAL", 1)
    cfg = config(tmp_path, TRAIN__INITIAL_LR=0.3, TRAIN__WARMUP=0, TRAIN__EPOCHS=3, TRAIN__LOG_EVERY=1)
    volume = data_folder(cfg, "train") / "phantom.zarr"
    volume.parent.mkdir(parents=True)
    write_phantom(volume, (40, 40, 40), seed=0, voxel_size=(8, 8, 8))
    train(cfg)
    assert "warning: " in (said := capsys.readouterr().out)
    assert "lower TRAIN.INITIAL_LR or TRAIN.LR_FAN_IN" in said
    events = EventAccumulator(str(cfg.MODEL.LOG_DIR)).Reload()
    levels = ["l_conv.0", "l_conv.1", "l_conv.2", "r_conv.0.0", "r_conv.0.1"]
    assert [tag for tag in sorted(events.Tags()["scalars"]) if "dead" in tag] == [f"dead_channels/{x}" for x in levels]
    assert [event.step for event in events.Scalars("dead_channels/l_conv.2")] == [1, 2, 3]
    assert events.Scalars("dead_channels/l_conv.2")[-1].value > 20


def test_steps_fall_with_the_fan_in_of_convolutions(tmp_path):
    network = build_model(config(tmp_path))
    [(share, parameters)] = parameter_groups(network, 0)
    assert share == 1
    assert list(map(id, parameters)) == list(map(id, network.parameters()))

    groups = parameter_groups(network, 216)
    assert sorted(id(p) for _, group in groups for p in group) == sorted(id(p) for p in network.parameters())
    shares = {id(parameter): share for share, group in groups for parameter in group}
    wide = network.unet.r_conv[0][1].conv_pass[0]
    assert wide.in_channels == 24 + 72
    assert shares[id(wide.weight)] == pytest.approx(216 / (27 * 96))
    assert shares[id(wide.bias)] == shares[id(network.unet.l_conv[0].conv_pass[2].weight)] == 1
    assert {shares[id(up.up.weight)] for up in network.unet.r_up[0]} == {1}
