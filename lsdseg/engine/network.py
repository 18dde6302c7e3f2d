"""From a config to what takes raw data to predictions: one network, or the two of an auto-context type."""

from torch import nn

from lsdseg.config.loader import derived_config
from lsdseg.config.model_types import MODEL_TYPES
from lsdseg.config.network_shapes import input_shape_within
from lsdseg.models import AutoContext, build_model
from lsdseg.models.checkpoint import load_checkpoint


def from_raw(cfg, network: nn.Module) -> nn.Module:
    """What takes raw data to the predictions of `network`: itself, or both networks of an auto-context type.

    Raises:
        UserError: the weights TRAIN.CHECKPOINT_AC of the first network cannot be used.
    """
    model_type = MODEL_TYPES[cfg.TRAIN.MODEL_TYPE]
    if model_type.first is None:
        return network
    first_cfg = first_config(cfg)
    first = build_model(first_cfg)
    load_checkpoint(cfg.TRAIN.CHECKPOINT_AC, first, first_cfg, key="TRAIN.CHECKPOINT_AC")
    model = cfg.MODEL
    shapes = model.DOWNSAMPLE_FACTORS, model.KERNEL_SIZE_DOWN, model.KERNEL_SIZE_UP, model.PAD_CONV
    return AutoContext(first, network, model_type.inputs, fit=lambda size: input_shape_within(size, *shapes))


def load_weights(cfg) -> nn.Module:
    """The configured model type from raw to predictions, with the weights TRAIN.CHECKPOINT.

    Raises:
        UserError: they cannot be used, or those of an auto-context type's first network cannot.
    """
    network = build_model(cfg)
    load_checkpoint(cfg.TRAIN.CHECKPOINT, network, cfg)
    return from_raw(cfg, network)


def first_config(cfg):
    """The config by which the first network of an auto-context type is trained, in folders `first` of its own."""
    section, suffix = "MODEL_ISO" if cfg.DATA.FIB else "MODEL_ANISO", "_2D" * cfg.DATA.DIM_2D
    names = ("LOG_DIR", "CKPT_FOLDER", "OUTPUT_DIR")
    folders = {f"{section}.{name}{suffix}": f"{cfg.MODEL[name]}/first" for name in names}
    return derived_config(
        cfg,
        {
            "TRAIN.MODEL_TYPE": MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].first,
            "TRAIN.EPOCHS": cfg.TRAIN.LSD_EPOCHS or cfg.TRAIN.EPOCHS,
            "TRAIN.CHECKPOINT": cfg.TRAIN.CHECKPOINT_AC,
            "TRAIN.VALIDATE_EVERY": 0,
            **folders,
        },
    )
