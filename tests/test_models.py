import math
import os
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional

from lsdseg.config.loader import load_config
from lsdseg.config.network_shapes import output_shape, tile_context
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    network_settings,
    read_checkpoint,
    save_checkpoint,
)
from lsdseg.models.losses import weighted_bce, weighted_mse

SMALL = (
    *("MODEL_ISO.NUM_FMAPS", "3", "MODEL_ISO.NUM_FMAPS_OUT", "4", "MODEL_ISO.FMAP_INC_FACTOR", "2"),
    *("MODEL_ISO.DOWNSAMPLE_FACTORS", "[[2, 2, 2], [1, 2, 2]]"),
    *("MODEL_ISO.KERNEL_SIZE_DOWN", "None", "MODEL_ISO.KERNEL_SIZE_UP", "None"),
    *("MODEL_ISO.INPUT_SHAPE", "(40, 56, 60)"),
)


BIAS = "aff_head.conv_pass.0.bias"


@pytest.fixture
def cfg():
    return load_config(overrides=SMALL)


def test_a_published_checkpoint_has_the_tensors_of_the_default_network():
    """Names and shapes that a published MTLSD checkpoint has: 12 feature maps, factor 5, four levels."""
    shapes = {}
    for level, (before, fmaps) in enumerate([(1, 12), (12, 60), (60, 300), (300, 1500)]):
        shapes[f"unet.l_conv.{level}.conv_pass.0.weight"] = (fmaps, before, 3, 3, 3)
        shapes[f"unet.l_conv.{level}.conv_pass.2.weight"] = (fmaps, fmaps, 3, 3, 3)
    for level, (fmaps, below) in enumerate([(12, 60), (60, 300), (300, 1500)]):
        factor = (3, 3, 3) if level == 2 else (2, 2, 2)
        shapes[f"unet.r_up.0.{level}.up.weight"] = (below, below, *factor)
        shapes[f"unet.r_conv.0.{level}.conv_pass.0.weight"] = (fmaps, fmaps + below, 3, 3, 3)
        shapes[f"unet.r_conv.0.{level}.conv_pass.2.weight"] = (fmaps, fmaps, 3, 3, 3)
    shapes["lsd_head.conv_pass.0.weight"] = (10, 12, 1, 1, 1)
    shapes["aff_head.conv_pass.0.weight"] = (3, 12, 1, 1, 1)
    biases = {name.replace("weight", "bias") for name in shapes}

    with torch.device("meta"):
        state = build_model(load_config()).state_dict()
    assert {n: tuple(t.shape) for n, t in state.items() if n.endswith("weight")} == shapes
    assert {n for n in state if n.endswith("bias")} == biases


def reference_forward(weights: dict, x: torch.Tensor, factors, crop_factors):
    """Compute what the published architecture gives, straight from tensor names, as an oracle."""

    def conv_pass(x, name, activation=functional.relu):
        for layer in (0, 2):
            if f"{name}.conv_pass.{layer}.weight" in weights:
                x = activation(
                    functional.conv3d(
                        x,
                        weights[f"{name}.conv_pass.{layer}.weight"],
                        weights[f"{name}.conv_pass.{layer}.bias"],
                    )
                )
        return x

    def crop(x, shape):
        begin = [(a - b) // 2 for a, b in zip(x.shape[2:], shape, strict=True)]
        return x[(..., *(slice(b, b + s) for b, s in zip(begin, shape, strict=True)))]

    skips = []
    for level, factor in enumerate(factors):
        skips.append(conv_pass(x, f"unet.l_conv.{level}"))
        x = functional.max_pool3d(skips[-1], factor, stride=factor)
    x = conv_pass(x, f"unet.l_conv.{len(factors)}")
    for level in reversed(range(len(factors))):
        name = f"unet.r_up.0.{level}.up"
        x = functional.conv_transpose3d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=factors[level])
        x = crop(x, [(s - 4) // f * f + 4 for s, f in zip(x.shape[2:], crop_factors[level], strict=True)])
        x = conv_pass(torch.cat([crop(skips[level], x.shape[2:]), x], dim=1), f"unet.r_conv.0.{level}")
    return [conv_pass(x, f"{head}_head", torch.sigmoid) for head in ("lsd", "aff")]


def test_forward_gives_the_numbers_of_the_published_architecture(cfg):
    torch.manual_seed(0)
    model = build_model(cfg)
    x = torch.randn(2, 1, *cfg.MODEL.INPUT_SHAPE)
    with torch.inference_mode():
        lsds, affs = model(x)
        expected = reference_forward(model.state_dict(), x, [(2, 2, 2), (1, 2, 2)], [(2, 4, 4), (1, 2, 2)])
    assert lsds.shape == (2, 10, *cfg.MODEL.OUTPUT_SHAPE)
    assert affs.shape == (2, 3, *cfg.MODEL.OUTPUT_SHAPE)
    torch.testing.assert_close(lsds, expected[0])
    torch.testing.assert_close(affs, expected[1])


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_output_has_the_size_that_the_config_works_out(padding):
    cfg = load_config(overrides=(*SMALL, "MODEL_ISO.PAD_CONV", padding))
    with torch.inference_mode():
        lsds, _ = build_model(cfg)(torch.zeros(1, 1, *cfg.MODEL.INPUT_SHAPE))
    network = cfg.MODEL.DOWNSAMPLE_FACTORS, None, None, padding
    assert lsds.shape[2:] == output_shape(cfg.MODEL.INPUT_SHAPE, *network)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_shifting_the_input_by_the_total_factor_shifts_the_output(padding):
    cfg = load_config(overrides=(*SMALL, "MODEL_ISO.PAD_CONV", padding))
    torch.manual_seed(0)
    model = build_model(cfg)
    context = tile_context(cfg.MODEL.DOWNSAMPLE_FACTORS, None, None, padding)
    shape = [s + 2 * c for s, c in zip((8, 8, 8), context, strict=True)]
    x = torch.randn(1, 1, *(s + f for s, f in zip(shape, (2, 4, 4), strict=True)))

    def inner(y):
        return y if padding == "valid" else y[(..., *(slice(c, c + 8) for c in context))]

    with torch.inference_mode():
        here = inner(model(x[..., : shape[0], : shape[1], : shape[2]]).affs)
        there = inner(model(x[..., 2:, 4:, 4:]).affs)
    assert here.shape == there.shape == (1, 3, 8, 8, 8)
    torch.testing.assert_close(here[..., 2:, 4:, 4:], there[..., :-2, :-4, :-4])


def test_weighted_mse_is_the_mean_over_weighted_entries():
    prediction, target = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.0, 0.0, 0.0])
    assert weighted_mse(prediction, target, torch.tensor([1.0, 0.5, 0.0])).item() == pytest.approx((1 + 2) / 2)
    assert weighted_mse(prediction, target, torch.zeros(3)).item() == 0


def test_weighted_cross_entropy_is_the_mean_over_weighted_entries():
    prediction, target = torch.tensor([0.5, 0.9, 0.1]), torch.tensor([1.0, 0.0, 0.0])
    expected = (-math.log(0.5) - 0.5 * math.log(0.1)) / 2
    assert weighted_bce(prediction, target, torch.tensor([1.0, 0.5, 0.0])).item() == pytest.approx(expected)
    assert weighted_bce(prediction, target, torch.tensor([1.0, 0.5, 0.0]), 4).item() == pytest.approx(expected / 2)
    assert weighted_bce(prediction, target, torch.zeros(3)).item() == 0
    # What is certain and wrong costs a lot, but the loss stays finite.
    certain = torch.ones(1, requires_grad=True)
    loss = weighted_bce(certain, torch.zeros(1), torch.ones(1))
    loss.backward()
    assert 10 < loss.item() < math.inf
    assert certain.grad.isfinite().all()


def test_checkpoint_round_trip_keeps_weights_optimizer_and_iteration(cfg, tmp_path):
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.randn(1, 1, *cfg.MODEL.INPUT_SHAPE)).affs.sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "model_checkpoint_7", model, optimizer, 7, network_settings(cfg))

    other = build_model(cfg)
    other_optimizer = torch.optim.Adam(other.parameters(), lr=1e-3)
    assert load_checkpoint(tmp_path / "model_checkpoint_7", other, cfg, other_optimizer) == 7
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    saved, loaded = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert all(torch.equal(saved[i]["exp_avg"], loaded[i]["exp_avg"]) for i in saved)
    assert os.listdir(tmp_path) == ["model_checkpoint_7"]


def test_latest_checkpoint_is_the_one_of_the_highest_iteration(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("model_checkpoint_90", "model_checkpoint_1000", ".model_checkpoint_2000.tmp"):
        (tmp_path / name).touch()
    assert latest_checkpoint(tmp_path).name == "model_checkpoint_1000"


def test_a_published_checkpoint_without_extra_keys_loads(cfg, tmp_path):
    model = build_model(cfg)
    path = tmp_path / "model_checkpoint_300000"
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": {}}, path)
    assert load_checkpoint(path, build_model(cfg), cfg) == 300000


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_a_checkpoint_with_pickled_code_is_refused_and_not_run(cfg, tmp_path):
    path, target = tmp_path / "model_checkpoint_1", tmp_path / "executed"
    torch.save({"model_state_dict": Malicious(target)}, path)
    with pytest.raises(UserError, match=r"model_checkpoint_1 contains pickled code"):
        load_checkpoint(path, build_model(cfg), cfg)
    assert not target.exists()


def test_broken_and_foreign_checkpoints_are_refused(cfg, tmp_path):
    model = build_model(cfg)
    with pytest.raises(UserError, match=r"no checkpoint at .*missing"):
        load_checkpoint(tmp_path / "missing", model, cfg)

    truncated = tmp_path / "truncated"
    torch.save({"model_state_dict": model.state_dict()}, truncated)
    truncated.write_bytes(truncated.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"):
        load_checkpoint(truncated, model, cfg)

    for name, content in {"text": b"hello", "pickle": pickle.dumps({"a": 1}), "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=str(tmp_path / name)):
            load_checkpoint(tmp_path / name, model, cfg)

    torch.save({"state_dict": {}}, tmp_path / "foreign")
    with pytest.raises(UserError, match="no model_state_dict"):
        load_checkpoint(tmp_path / "foreign", model, cfg)


STATISTICS = {"histogram": [1 / 256] * 256, "voxel_size": [8.0, 8.0, 8.0], "lines": -0.2, "contrast": None}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: state["model_state_dict"][BIAS].fill_(float("nan")), f"{BIAS} holds NaN"),
        (lambda state: set_weights(state, torch.Tensor.to_sparse), f"{BIAS} is .*not floating-point"),
        (lambda state: set_weights(state, torch.Tensor.int), f"{BIAS} is torch.int32, not floating-point"),
        (lambda state: set_weights(state, lambda x: x.to(torch.complex64)), f"{BIAS} is torch.complex64, not floating"),
        (lambda state: state["model_state_dict"].update({5: torch.zeros(1)}), "model_state_dict is"),
        (lambda state: state.update(iteration="x" * 10**6), "iteration is 'xxx"),
        (lambda state: state.update(iteration=-1), "iteration is -1"),
        (lambda state: state.update(iteration=torch.zeros(3)), "iteration is tensor"),
        (lambda state: state.update(network_settings=[1]), r"network_settings is \[1\]"),
        (
            lambda state: state["network_settings"].update({"MODEL_ISO.NUM_FMAPS": torch.zeros(3)}),
            "NUM_FMAPS is tensor",
        ),
        (lambda state: state.update(ema_state_dict=7), "ema_state_dict is 7"),
        (lambda state: state.update(scaler_state_dict={"scale": 1.0}), "scaler_state_dict is"),
        (lambda state: state.update(training_data=[{"histogram": [1.0]}]), r"training_data is \[\{"),
        (lambda state: state.update(training_data=[STATISTICS | {"lines": float("nan")}]), r"training_data is \[\{"),
        (lambda state: state.update(training_data=[STATISTICS | {"voxel_size": [0, 8, 8]}]), r"training_data is \[\{"),
        (lambda state: state.update(training_data=[STATISTICS] * 65), r"training_data is \[\{"),
        (lambda state: state.update(training_data=torch.zeros(3)), "training_data is tensor"),
        (lambda state: state.update(optimizer_state_dict={}), "in optimizer_state_dict"),
        (lambda state: state["optimizer_state_dict"]["state"].update({0: {"step": 1}}), "does not fit the weights"),
        (lambda state: state["optimizer_state_dict"]["state"].update({0: []}), r"holds \[\]"),
        (lambda state: state["optimizer_state_dict"]["state"].update({0: torch.zeros(0)}), "holds tensor"),
        (lambda state: state["optimizer_state_dict"]["state"][0]["exp_avg"].fill_(float("nan")), "exp_avg .* NaN"),
    ],
)
def test_damaged_fields_of_checkpoints_are_named(cfg, tmp_path, damage, said):
    model = build_model(cfg)
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    path = tmp_path / "model_checkpoint_1"
    save_checkpoint(path, model, optimizer, 1, network_settings(cfg))
    state = read_checkpoint(path)
    damage(state)
    torch.save(state, path)
    with pytest.raises(UserError, match=rf"^.*model_checkpoint_1 is damaged, .{{0,30}}{said}.*copy it again") as error:
        load_checkpoint(path, model, cfg, optimizer)
    assert len(str(error.value)) < 650


def set_weights(state, change):
    state["model_state_dict"][BIAS] = change(state["model_state_dict"][BIAS])


def test_options_of_the_optimizer_are_those_of_the_config(cfg, tmp_path):
    model = build_model(cfg)
    save_checkpoint(tmp_path / "a", model, torch.optim.Adam(model.parameters(), betas=(0.1, 0.2)), 1, {})
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    load_checkpoint(tmp_path / "a", model, cfg, optimizer)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_a_checkpoint_of_another_network_is_refused_by_config_key_or_tensor_name(cfg, tmp_path):
    other = load_config(overrides=(*SMALL, "MODEL_ISO.NUM_FMAPS", "5"))
    model = build_model(other)
    optimizer = torch.optim.Adam(model.parameters())
    save_checkpoint(tmp_path / "ours", model, optimizer, 1, network_settings(other))
    with pytest.raises(UserError, match=r"MODEL_ISO.NUM_FMAPS is 3 but .*ours was trained with 5"):
        load_checkpoint(tmp_path / "ours", build_model(cfg), cfg)

    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "published")
    with pytest.raises(UserError, match=r"unet.l_conv.0.conv_pass.0.bias is 5 there and 3 here.*NUM_FMAPS"):
        load_checkpoint(tmp_path / "published", build_model(cfg), cfg)

    weights = build_model(cfg).state_dict()
    del weights["aff_head.conv_pass.0.bias"]
    torch.save({"model_state_dict": weights}, tmp_path / "headless")
    with pytest.raises(UserError, match=r"aff_head.conv_pass.0.bias is missing there.*MODEL_TYPE"):
        load_checkpoint(tmp_path / "headless", build_model(cfg), cfg)


def test_a_leaky_network_is_another_one_though_its_tensors_are_the_same(cfg, tmp_path):
    leaky = load_config(overrides=(*SMALL, "MODEL_ISO.ACTIVATION", "leaky_relu"))
    models = build_model(cfg), build_model(leaky)
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(1, 1, *cfg.MODEL.INPUT_SHAPE)
    with torch.inference_mode():
        assert not torch.equal(models[0](x).affs, models[1](x).affs)
    optimizer = torch.optim.Adam(models[1].parameters())
    save_checkpoint(tmp_path / "leaky", models[1], optimizer, 1, network_settings(leaky))
    load_checkpoint(tmp_path / "leaky", models[1], leaky)
    with pytest.raises(UserError, match=r"MODEL_ISO.ACTIVATION is relu but .* was trained with leaky_relu"):
        load_checkpoint(tmp_path / "leaky", models[0], cfg)
    # Published checkpoints do not say what they were trained with: it was ReLUs.
    torch.save({"model_state_dict": models[0].state_dict()}, tmp_path / "published")
    load_checkpoint(tmp_path / "published", models[0], cfg)
    with pytest.raises(UserError, match=r"MODEL_ISO.ACTIVATION is leaky_relu but .* was trained with relu"):
        load_checkpoint(tmp_path / "published", models[1], leaky)


def test_long_range_neighborhood_gives_one_channel_each():
    offsets = "[[-1,0,0],[0,-1,0],[0,0,-1],[-3,0,0]]"
    cfg = load_config(overrides=(*SMALL, "TRAIN.NEIGHBORHOOD", offsets))
    with torch.inference_mode():
        outputs = build_model(cfg)(torch.zeros(1, 1, *cfg.MODEL.INPUT_SHAPE))
    assert outputs.affs.shape[1] == 4
    assert math.isfinite(float(outputs.lsds.sum()))
    assert np.all((outputs.affs.numpy() > 0) & (outputs.affs.numpy() < 1))
