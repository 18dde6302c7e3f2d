"""What the names stand for in keys that choose an implementation: "module:name", without importing it.

The rules take the allowed names from these tables, so a new implementation is one file and one entry here.
"""

from importlib import import_module
from typing import Any

# INS_SEGMENT.METHOD: a subclass of lsdseg.engine.post.methods.Method.
METHODS = {
    "waterz": "lsdseg.engine.post.methods:Waterz",
    "mutex": "lsdseg.engine.post.methods:Mutex",
}

# CLUSTER.TYPE: a subclass of lsdseg.engine.blocks.workers.Workers.
SCHEDULERS = {
    "local": "lsdseg.engine.blocks.workers:LocalWorkers",
    "slurm": "lsdseg.engine.blocks.slurm:SlurmWorkers",
}

# INS_SEGMENT.MERGE_FUNCTION: the scoring function, a C++ type of waterz. waterz ships these compiled, and compiles
# others when it first meets them. A score is one minus an affinity, so 0 merges first.
MERGE_FUNCTIONS = {"mean": "OneMinus<MeanAffinity<RegionGraphType, ScoreValue>>"} | {
    f"hist_quant_{q}{suffix}": f"OneMinus<HistogramQuantileAffinity<RegionGraphType, {q}, ScoreValue, 256, {init}>>"
    for q in range(10, 100, 5)
    for suffix, init in (("", "false"), ("_initmax", "true"))
}


def resolve(reference: str) -> Any:
    """Import what a "module:name" refers to."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
