"""SNEMI3D: mouse cortex, serial sections, 29 x 6 x 6 nm (zenodo.org/records/7142003).

Holds only what differs from the defaults.
"""

from yacs.config import CfgNode

_C = CfgNode()

_C.SYSTEM = CfgNode()
_C.SYSTEM.CACHE_SIZE = 20

_C.DATA = CfgNode()
_C.DATA.BRAIN_VOL = "SNEMI"
_C.DATA.FIB = 0

_C.TRAIN = CfgNode()
_C.TRAIN.EPOCHS = 200_000
_C.TRAIN.SAVE_EVERY = 5000

# Voxels are less anisotropic than in CREMI: all kernels are 3x3x3, and the last factor is 2.
_C.MODEL_ANISO = CfgNode()
_C.MODEL_ANISO.VOXEL_SIZE = (29, 6, 6)
_C.MODEL_ANISO.DOWNSAMPLE_FACTORS = [[1, 2, 2], [2, 2, 2], [2, 2, 2]]
_C.MODEL_ANISO.KERNEL_SIZE_DOWN = None
_C.MODEL_ANISO.KERNEL_SIZE_UP = None
_C.MODEL_ANISO.INPUT_SHAPE = (96, 212, 212)
_C.MODEL_ANISO.INPUT_SHAPE_2D = (148, 148)

_C.INS_SEGMENT = CfgNode()
_C.INS_SEGMENT.FRAGMENTS_IN_XY = True
