"""The phantom of `make demo`: a network that learns to see its neurites in minutes on two CPU cores.

Only what differs from config.py.
"""

from yacs.config import CfgNode

_C = CfgNode()

_C.SYSTEM = CfgNode()
_C.SYSTEM.NUM_WORKERS = 2
_C.SYSTEM.CACHE_SIZE = 10

_C.DATA = CfgNode()
_C.DATA.HOME = "demo"
_C.DATA.DATA_DIR_PATH = "data"
_C.DATA.BRAIN_VOL = "PHANTOM"

_C.TRAIN = CfgNode()
_C.TRAIN.EPOCHS = 300
_C.TRAIN.SAVE_EVERY = 100
_C.TRAIN.INITIAL_LR = 1e-3
_C.TRAIN.LR_SCHEDULE = "cosine"
_C.TRAIN.WARMUP = 20

_C.MODEL_ISO = CfgNode()
_C.MODEL_ISO.VOXEL_SIZE = (10, 10, 10)
_C.MODEL_ISO.NUM_FMAPS = 8
_C.MODEL_ISO.NUM_FMAPS_OUT = 8
_C.MODEL_ISO.FMAP_INC_FACTOR = 3
_C.MODEL_ISO.DOWNSAMPLE_FACTORS = [[2, 2, 2], [2, 2, 2]]
_C.MODEL_ISO.KERNEL_SIZE_DOWN = None
_C.MODEL_ISO.KERNEL_SIZE_UP = None
_C.MODEL_ISO.INPUT_SHAPE = (84, 84, 84)
