"""Build the network that predicts from raw data: one U-Net, or both networks of an auto-context type."""

from torch import nn
from yacs.config import CfgNode

from lsdseg.config.loader import derived_config
from lsdseg.config.model_types import MODEL_TYPES
from lsdseg.config.network_shapes import input_shape_within
from lsdseg.models import AutoContext, build_model
from lsdseg.models.checkpoint import load_checkpoint


def complete_network(cfg: CfgNode, network: nn.Module) -> nn.Module:
    """Complete a network so that it predicts from raw data.

    Args:
        cfg: the config.
        network: the model type's own network, as `build_model` returns it.

    Returns:
        `network` itself. For an auto-context type, a module that runs the first network before it, with the weights
        TRAIN.CHECKPOINT_AC.

    Raises:
        UserError: the weights of the first network cannot be used.
    """
    model_type = MODEL_TYPES[cfg.TRAIN.MODEL_TYPE]
    if model_type.first is None:
        return network
    first_cfg = first_network_config(cfg)
    first = build_model(first_cfg)
    load_checkpoint(cfg.TRAIN.CHECKPOINT_AC, first, first_cfg, key="TRAIN.CHECKPOINT_AC")
    model = cfg.MODEL
    shapes = model.DOWNSAMPLE_FACTORS, model.KERNEL_SIZE_DOWN, model.KERNEL_SIZE_UP, model.PAD_CONV
    return AutoContext(first, network, model_type.inputs, fit=lambda size: input_shape_within(size, *shapes))


def load_network(cfg: CfgNode) -> nn.Module:
    """Build the network that predicts from raw data, and load the weights TRAIN.CHECKPOINT.

    Raises:
        UserError: its weights, or those of an auto-context type's first network, cannot be used.
    """
    network = build_model(cfg)
    load_checkpoint(cfg.TRAIN.CHECKPOINT, network, cfg)
    return complete_network(cfg, network)


def first_network_config(cfg: CfgNode) -> CfgNode:
    """Return the config that trains the first network of an auto-context type, in subfolders named `first`."""
    section, suffix = "MODEL_ISO" if cfg.DATA.FIB else "MODEL_ANISO", "_2D" * cfg.DATA.DIM_2D
    names = ("LOG_DIR", "CKPT_FOLDER", "OUTPUT_DIR")
    folders = {f"{section}.{name}{suffix}": f"{cfg.MODEL[name]}/first" for name in names}
    return derived_config(
        cfg,
        {
            "TRAIN.MODEL_TYPE": MODEL_TYPES[cfg.TRAIN.MODEL_TYPE].first,
            "TRAIN.EPOCHS": cfg.TRAIN.LSD_EPOCHS or cfg.TRAIN.EPOCHS,
            "TRAIN.CHECKPOINT": cfg.TRAIN.CHECKPOINT_AC,
            "TRAIN.INITIAL_WEIGHTS": "",
            "TRAIN.VALIDATE_EVERY": 0,
            **folders,
        },
    )
