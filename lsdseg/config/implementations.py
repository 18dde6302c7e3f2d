"""Keys that choose an implementation: what each name stands for, as "module:name", without importing it.

The rules take the names that are allowed from here, so a new implementation is a file of its own and one entry.
"""

from importlib import import_module
from typing import Any

# INS_SEGMENT.METHOD: an `engine.post.methods.Method`.
METHODS = {
    "waterz": "lsdseg.engine.post.methods:Waterz",
    "mutex": "lsdseg.engine.post.methods:Mutex",
}

# CLUSTER.TYPE: an `engine.blocks.workers.Workers`.
SCHEDULERS = {
    "local": "lsdseg.engine.blocks.workers:LocalWorkers",
    "slurm": "lsdseg.engine.blocks.slurm:SlurmWorkers",
}

# INS_SEGMENT.MERGE_FUNCTION: the scoring function, a type of waterz' C++. waterz ships these compiled; it compiles
# others when it first meets them. A score is one minus an affinity, so 0 merges first.
MERGE_FUNCTIONS = {"mean": "OneMinus<MeanAffinity<RegionGraphType, ScoreValue>>"} | {
    f"hist_quant_{q}{suffix}": f"OneMinus<HistogramQuantileAffinity<RegionGraphType, {q}, ScoreValue, 256, {init}>>"
    for q in range(10, 100, 5)
    for suffix, init in (("", "false"), ("_initmax", "true"))
}


def resolve(reference: str) -> Any:
    """What a "module:name" refers to."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
