"""Networks, losses and checkpoints. Nothing here knows a file layout or a data set."""

from models.multitask import MODEL_TYPES, build_model, task_channels

__all__ = ["MODEL_TYPES", "build_model", "task_channels"]
