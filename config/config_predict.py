"""What to set to predict and segment with a checkpoint that comes without a config.

Training writes a complete config, `config_predict.yaml`, beside its checkpoints: pass that with `-c` if you have it.
Otherwise use this file, and describe the network below exactly as it was in training. Holds only what differs from the
defaults.
"""

from yacs.config import CfgNode

_C = CfgNode()

_C.SYSTEM = CfgNode()
_C.SYSTEM.NUM_WORKERS = 5

_C.DATA = CfgNode()
# Every zarr in HOME/DATA_DIR_PATH/BRAIN_VOL/data_3d/test is predicted. Results go to HOME/lsd_outputs.
_C.DATA.BRAIN_VOL = "HEMI"
# 1: isotropic data, uses MODEL_ISO. 0: anisotropic data, uses MODEL_ANISO.
_C.DATA.FIB = 1

_C.TRAIN = CfgNode()
# The weights, e.g. /data/lsd_checkpoints/MTLSD_3D/HEMI/run/model_checkpoint_300000, and their model type.
_C.TRAIN.CHECKPOINT = ""
_C.TRAIN.MODEL_TYPE = "MTLSD"

_C.MODEL_ISO = CfgNode()
_C.MODEL_ISO.VOXEL_SIZE = (8, 8, 8)

_C.MODEL_ANISO = CfgNode()
_C.MODEL_ANISO.VOXEL_SIZE = (40, 4, 4)
