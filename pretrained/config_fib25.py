"""Predict and segment with the weights in this folder: FIB-SEM, 10 x 10 x 10 nm.

It takes over their recipe, config/config_fib25.py, and sets only what differs. README.md in this folder describes the
weights.
"""

from pathlib import Path

from yacs.config import CfgNode

from lsdseg.config.loader import read_config_file

HERE = Path(__file__).resolve().parent

_C = CfgNode(read_config_file(HERE.parent / "config" / "config_fib25.py"))
# Absolute, because relative paths in a config start at the current directory.
_C.TRAIN.CHECKPOINT = str(HERE / "fib25_mtlsd" / "model_checkpoint_8000")
# The threshold that scored best on held-out sections.
_C.INS_SEGMENT.THRESHOLDS = [0.55]
