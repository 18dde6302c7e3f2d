"""FIB-25: fly medulla, FIB-SEM, 10 x 10 x 10 nm. The recipe takes an hour on two CPU cores with AMX.

Holds only what differs from the defaults. On a GPU, use a wider network and larger patches, and train longer; see
README.md.
"""

from yacs.config import CfgNode

_C = CfgNode()

_C.SYSTEM = CfgNode()
# One core makes batches, the other trains.
_C.SYSTEM.NUM_WORKERS = 1
_C.SYSTEM.CACHE_SIZE = 10

_C.DATA = CfgNode()
_C.DATA.DATA_DIR_PATH = "data"
_C.DATA.BRAIN_VOL = "FIB25"

_C.TRAIN = CfgNode()
# Nine channels, so that one network serves both segmentation methods.
_C.TRAIN.NEIGHBORHOOD = "LR_NEIGHBORHOOD"
_C.TRAIN.NEIGHBORHOOD_2D = "LR_NEIGHBORHOOD"
_C.TRAIN.EPOCHS = 8000
_C.TRAIN.SAVE_EVERY = 500
_C.TRAIN.INITIAL_LR = 1e-3
# Without this, a tenth of all channels is dead after 200 iterations, most of them on the two coarsest levels.
_C.TRAIN.LR_FAN_IN = 216
_C.TRAIN.EMA = 0.999
_C.TRAIN.LR_SCHEDULE = "cosine"
_C.TRAIN.WARMUP = 100
_C.TRAIN.MIXED_PRECISION = "auto"

_C.MODEL_ISO = CfgNode()
_C.MODEL_ISO.VOXEL_SIZE = (10, 10, 10)
_C.MODEL_ISO.NUM_FMAPS = 16
_C.MODEL_ISO.NUM_FMAPS_OUT = 16
_C.MODEL_ISO.FMAP_INC_FACTOR = 2
_C.MODEL_ISO.DOWNSAMPLE_FACTORS = [[2, 2, 2], [2, 2, 2], [2, 2, 2]]
# All 64^3 voxels of a patch are supervised. With "valid" padding that would take an input of 152^3 voxels.
_C.MODEL_ISO.PAD_CONV = "same"
# The few channels that die nevertheless can come back.
_C.MODEL_ISO.ACTIVATION = "leaky_relu"
_C.MODEL_ISO.INPUT_SHAPE = (64, 64, 64)
# For DATA.DIM_2D True.
_C.MODEL_ISO.DOWNSAMPLE_FACTORS_2D = [[2, 2], [2, 2], [2, 2]]
_C.MODEL_ISO.INPUT_SHAPE_2D = (128, 128)
# The sections are well aligned, and mirroring and transposing alone give 48 views of each patch.
_C.MODEL_ISO.PROB_ELASTIC = 0.15
_C.MODEL_ISO.JITTER_SIGMA = (2, 2, 2)
_C.MODEL_ISO.PROB_SLIP = 0.0
_C.MODEL_ISO.PROB_SHIFT = 0.0
_C.MODEL_ISO.MAX_MISALIGN = 0
_C.MODEL_ISO.INTENSITYAUG_SCALE_MIN = 0.9
_C.MODEL_ISO.INTENSITYAUG_SCALE_MAX = 1.1
_C.MODEL_ISO.INTENSITYAUG_SHIFT_MIN = -0.1
_C.MODEL_ISO.INTENSITYAUG_SHIFT_MAX = 0.1
# A membrane that fades is where two neurites merge; gray values differ from one volume to the next.
_C.MODEL_ISO.PROB_FADE = 0.2
_C.MODEL_ISO.PROB_GAMMA = 0.3
_C.MODEL_ISO.PROB_NOISE = 0.2
_C.MODEL_ISO.PROB_BLUR = 0.1

_C.INS_SEGMENT = CfgNode()
# Of several merge functions, the 75th percentile of the affinities between two fragments scored best on held-out
# sections. Merging fragments before that only takes evidence from it.
_C.INS_SEGMENT.MERGE_FUNCTION = "hist_quant_75"
_C.INS_SEGMENT.EPSILON_AGGLOMERATE = 0.0
# 0.02 cubic micrometers. Without this, one wrong merge of two long neurites costs a tenth of the score at 0.55.
_C.INS_SEGMENT.LARGE_SEGMENT = 20000
