"""What steps take per voxel, as the runs before have measured it: OUTFILE/measured.json, for `segment.py --dry-run`.

A run adds what its own blocks took, whether it went to the end or not. Blocks that were done before, are skipped or are
empty say nothing about those that have to be computed, so they are left out. What was measured elsewhere says
nothing either: each entry is named after what it was measured on. One file serves all samples of an output
folder, and several runs may add to it at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from yacs.config import CfgNode

from lsdseg.data_utils.layout import measured_path
from lsdseg.engine.blocks.lock import run_lock
from lsdseg.engine.blocks.markers import RECORD
from lsdseg.engine.memory import processor
from lsdseg.errors import UserError
from lsdseg.files import read_json, write_whole

ANEW = "what it held is not used, and the next run writes it anew"


@dataclass(frozen=True)
class Rate:
    """What blocks took, summed up.

    Attributes:
        blocks: how many.
        computed: voxels that they computed, each with its context.
        written: voxels of the volume that they wrote.
        seconds: of workers.
        bytes: into files.
        peak: bytes of memory of the worker that took most.
        largest: voxels that the largest block computed.
    """

    blocks: int = 0
    computed: int = 0
    written: int = 0
    seconds: float = 0.0
    bytes: int = 0
    peak: int = 0
    largest: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isinstance(value, int | float) and 0 <= value < 1e30):
                raise ValueError(f"{name} is {value!r}")
        if self.blocks and not self.computed:
            raise ValueError(f"{self.blocks} blocks have no voxels")

    def __add__(self, other: Rate) -> Rate:
        # Memory for a voxel is what the largest blocks say: in small ones, it is mostly that of the libraries.
        memory = max((self.largest, self.peak), (other.largest, other.peak))
        return Rate(
            self.blocks + other.blocks,
            self.computed + other.computed,
            self.written + other.written,
            self.seconds + other.seconds,
            self.bytes + other.bytes,
            largest=memory[0],
            peak=memory[1],
        )

    def seconds_for(self, computed: int) -> float:
        """Return how long workers take for so many voxels."""
        return self.seconds / self.computed * computed

    def bytes_for(self, written: int) -> int:
        """Return how many bytes are written for so many voxels."""
        return int(self.bytes / max(1, self.written) * written)

    def peak_for(self, computed: int, libraries: int) -> int:
        """Return how much memory a block of so many voxels takes.

        Args:
            computed: voxels of the block, with its context.
            libraries: bytes that do not depend on them.
        """
        return int(libraries + max(0, self.peak - libraries) / max(1, self.largest) * computed)

    @classmethod
    def of_workers(cls, workers: Iterable[NDArray[Any]]) -> Rate:
        """Sum up the records of blocks of each worker, see `markers.records_in`, but for those that computed nothing.

        The first block of a worker, which loads and compiles what it needs, only counts if no worker did two.
        """
        each = [records[(records["computed"] > 0) & np.isfinite(records["seconds"])] for records in workers]
        first = 1 if any(len(records) > 1 for records in each) else 0
        own = np.concatenate([np.empty(0, RECORD), *(records[first:] for records in each)])
        return cls(
            blocks=len(own),
            computed=int(own["computed"].sum(dtype=np.float64)),
            written=int(own["written"].sum(dtype=np.float64)),
            seconds=float(own["seconds"].sum(dtype=np.float64)),
            bytes=int(own["bytes"].sum(dtype=np.float64)),
            peak=int(own["megabytes"].max(initial=0) * 1e6),
            largest=int(own["computed"].max(initial=0)),
        )


def rate_name(cfg: CfgNode, what: str) -> str:
    """Return the name of an entry for what runs on a processor: on this one, or on those of the jobs."""
    if cfg.CLUSTER.TYPE == "local":
        return f"{what} on {processor()}"
    return f"{what} on {cfg.CLUSTER.TYPE} {cfg.CLUSTER.PARTITION}".rstrip()


def keep_rate(cfg: CfgNode, name: str, rate: Rate) -> None:
    """Add what a run measured to the file. A run does not fail if that fails."""
    if not rate.blocks:
        return
    path = measured_path(cfg)
    try:
        with run_lock(path.with_suffix(".lock"), f"in {path.parent}"):
            rates = read_rates([path])
            rates[name] = rates.get(name, Rate()) + rate
            with write_whole(path) as partial:
                entries = {name: asdict(rate) for name, rate in sorted(rates.items())}
                partial.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    except UserError as error:
        print(f"warning: what this run measured for later estimates is lost: {error}", file=sys.stderr)


def read_rates(paths: Iterable[Path]) -> dict[str, Rate]:
    """Return the entries of files, added up. One that is damaged is left out with a warning; one may be missing."""
    found: dict[str, Rate] = {}
    for path in paths:
        if not path.is_file():
            continue
        try:
            rates = {name: Rate(**entry) for name, entry in read_json(path, ANEW).items()}
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        except (TypeError, ValueError) as error:
            print(f"warning: {path} is damaged ({error!s:.100}): {ANEW}", file=sys.stderr)
            continue
        for name, rate in rates.items():
            found[name] = found.get(name, Rate()) + rate
    return found


def bytes_written() -> int:
    """Return how many bytes this process has written to files so far, 0 where the system does not say."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
        return int(counts["wchar"])
    except (OSError, ValueError, KeyError):
        return 0
