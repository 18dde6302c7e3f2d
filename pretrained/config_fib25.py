"""Predict and segment with the weights in this folder: FIB-SEM, 10 x 10 x 10 nm.

It takes over their recipe, config/config_fib25.py, and sets only what differs. README.md in this folder describes the
weights.
"""

from pathlib import Path

from yacs.config import CfgNode

from lsdseg.config.loader import read_config_file

HERE = Path(__file__).resolve().parent

_C = CfgNode(read_config_file(HERE.parent / "config" / "config_fib25.py"))
# The recipe has changed since these weights were trained.
_C.TRAIN.AFF_LOSS = "mse"
_C.MODEL_ISO.ACTIVATION = "relu"
# Absolute, because relative paths in a config start at the current directory.
_C.TRAIN.CHECKPOINT = str(HERE / "fib25_mtlsd" / "model_checkpoint_6000")
# The middle of the thresholds that scored best on held-out sections.
_C.INS_SEGMENT.THRESHOLDS = [0.5]
