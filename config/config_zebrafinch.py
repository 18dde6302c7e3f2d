"""Zebra finch: basal ganglia, serial block-face, 20 x 9 x 9 nm. Holds only what differs from the defaults."""

from yacs.config import CfgNode

_C = CfgNode()

_C.SYSTEM = CfgNode()
_C.SYSTEM.CACHE_SIZE = 20

_C.DATA = CfgNode()
_C.DATA.BRAIN_VOL = "ZEBRAFINCH"
_C.DATA.FIB = 0

_C.TRAIN = CfgNode()
_C.TRAIN.EPOCHS = 300_000
_C.TRAIN.SAVE_EVERY = 5000

_C.MODEL_ANISO = CfgNode()
_C.MODEL_ANISO.VOXEL_SIZE = (20, 9, 9)
