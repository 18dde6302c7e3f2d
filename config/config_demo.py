"""The phantom of `make demo`: a network that learns to find its neurites in minutes on two CPU cores.

Holds only what differs from the defaults.
"""

from yacs.config import CfgNode

_C = CfgNode()

_C.SYSTEM = CfgNode()
# One core makes batches, the other trains.
_C.SYSTEM.NUM_WORKERS = 1
_C.SYSTEM.CACHE_SIZE = 10

_C.DATA = CfgNode()
_C.DATA.HOME = "demo_data"
_C.DATA.DATA_DIR_PATH = "data"
_C.DATA.BRAIN_VOL = "PHANTOM"

_C.TRAIN = CfgNode()
_C.TRAIN.EPOCHS = 900
_C.TRAIN.SAVE_EVERY = 450
_C.TRAIN.INITIAL_LR = 2e-3
_C.TRAIN.LR_SCHEDULE = "cosine"
_C.TRAIN.WARMUP = 50
_C.TRAIN.MIXED_PRECISION = "auto"

_C.MODEL_ISO = CfgNode()
_C.MODEL_ISO.VOXEL_SIZE = (10, 10, 10)
_C.MODEL_ISO.NUM_FMAPS = 12
_C.MODEL_ISO.NUM_FMAPS_OUT = 12
_C.MODEL_ISO.FMAP_INC_FACTOR = 2
_C.MODEL_ISO.DOWNSAMPLE_FACTORS = [[2, 2, 2], [2, 2, 2]]
_C.MODEL_ISO.KERNEL_SIZE_DOWN = None
_C.MODEL_ISO.KERNEL_SIZE_UP = None
# With "same" padding, every voxel of a small patch is supervised.
_C.MODEL_ISO.PAD_CONV = "same"
_C.MODEL_ISO.INPUT_SHAPE = (48, 48, 48)
# For DATA.DIM_2D True.
_C.MODEL_ISO.DOWNSAMPLE_FACTORS_2D = [[2, 2], [2, 2], [2, 2]]
_C.MODEL_ISO.INPUT_SHAPE_2D = (96, 96)
# Phantoms all look alike, so mirroring and transposing are enough.
_C.MODEL_ISO.PROB_ELASTIC = 0.0

_C.INS_SEGMENT = CfgNode()
_C.INS_SEGMENT.BLOCK_SIZE = (64, 64, 64)
_C.INS_SEGMENT.CONTEXT = (16, 16, 16)
_C.INS_SEGMENT.THRESHOLDS = [0.3, 0.4, 0.5, 0.6]
_C.INS_SEGMENT.MERGE_FUNCTION = "hist_quant_75"
_C.INS_SEGMENT.EPSILON_AGGLOMERATE = 0.0
