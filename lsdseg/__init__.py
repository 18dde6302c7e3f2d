"""Neurons from electron microscopy: networks that predict Local Shape Descriptors and affinities, and all that follows.

What works on numpy arrays is here under short names; `docs/python.md` shows each in a few lines. Everything else is in
the packages: `config`, `data_utils`, `engine`, `models`, `rag`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsdseg.config.loader import load_config
    from lsdseg.engine.evaluate.metrics import evaluate
    from lsdseg.engine.post.agglomerate import agglomerate
    from lsdseg.engine.post.fragments import extract_fragments
    from lsdseg.engine.post.graph import score_edges
    from lsdseg.engine.post.link import link_sections
    from lsdseg.engine.post.mutex import mutex_watershed
    from lsdseg.engine.post.tables import connected_segments, relabel
    from lsdseg.engine.predict.arrays import predict
    from lsdseg.engine.training.lsd import local_shape_descriptors

# Imported when they are first asked for, since some bring torch or a compiler along.
_MODULES = {
    "agglomerate": "lsdseg.engine.post.agglomerate",
    "connected_segments": "lsdseg.engine.post.tables",
    "evaluate": "lsdseg.engine.evaluate.metrics",
    "extract_fragments": "lsdseg.engine.post.fragments",
    "link_sections": "lsdseg.engine.post.link",
    "load_config": "lsdseg.config.loader",
    "local_shape_descriptors": "lsdseg.engine.training.lsd",
    "mutex_watershed": "lsdseg.engine.post.mutex",
    "predict": "lsdseg.engine.predict.arrays",
    "relabel": "lsdseg.engine.post.tables",
    "score_edges": "lsdseg.engine.post.graph",
}

__all__ = [
    "agglomerate",
    "connected_segments",
    "evaluate",
    "extract_fragments",
    "link_sections",
    "load_config",
    "local_shape_descriptors",
    "mutex_watershed",
    "predict",
    "relabel",
    "score_edges",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lsdseg' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
