"""CREMI: adult fly brain, serial sections, 40 x 4 x 4 nm (cremi.org). Holds only what differs from the defaults."""

from yacs.config import CfgNode

_C = CfgNode()

_C.SYSTEM = CfgNode()
_C.SYSTEM.CACHE_SIZE = 20

_C.DATA = CfgNode()
_C.DATA.BRAIN_VOL = "CREMI"
_C.DATA.FIB = 0

_C.TRAIN = CfgNode()
_C.TRAIN.EPOCHS = 300_000
_C.TRAIN.SAVE_EVERY = 5000

# The defaults of MODEL_ANISO are made for this data. These two are repeated because you will change them first.
_C.MODEL_ANISO = CfgNode()
_C.MODEL_ANISO.VOXEL_SIZE = (40, 4, 4)
_C.MODEL_ANISO.INPUT_SHAPE = (132, 268, 268)

_C.INS_SEGMENT = CfgNode()
_C.INS_SEGMENT.FRAGMENTS_IN_XY = True
