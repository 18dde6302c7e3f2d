"""Networks, losses and checkpoints. Nothing here depends on a file layout or a data set."""

from lsdseg.models.autocontext import AutoContext
from lsdseg.models.multitask import build_model

__all__ = ["AutoContext", "build_model"]
