"""What to set to predict and segment; the rest is as in config.py.

Training leaves a complete predict config beside each checkpoint, with the network that it trained: take that
with `-c` where you have it. This file is for checkpoints that come without one, and the network must be
described below as it was for training.
"""

from yacs.config import CfgNode

_C = CfgNode()

_C.SYSTEM = CfgNode()
_C.SYSTEM.NUM_WORKERS = 5

_C.DATA = CfgNode()
# Predict every zarr in HOME/DATA_DIR_PATH/BRAIN_VOL/data_3d/test; results go to HOME/lsd_outputs.
_C.DATA.BRAIN_VOL = "HEMI"
# 1 for isotropic data and MODEL_ISO, 0 for anisotropic data and MODEL_ANISO.
_C.DATA.FIB = 1

_C.TRAIN = CfgNode()
# The weights, such as /data/lsd_checkpoints/MTLSD_3D/HEMI/run/model_checkpoint_300000, and their model type.
_C.TRAIN.CHECKPOINT = ""
_C.TRAIN.MODEL_TYPE = "MTLSD"

_C.MODEL_ISO = CfgNode()
_C.MODEL_ISO.VOXEL_SIZE = (8, 8, 8)

_C.MODEL_ANISO = CfgNode()
_C.MODEL_ANISO.VOXEL_SIZE = (40, 4, 4)
