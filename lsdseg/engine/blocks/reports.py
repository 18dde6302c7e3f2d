"""What workers say of themselves beside their logs: the block that one is at, and the blocks that failed.

`status.py` shows it, and the supervisor ends a run in which one block after the other fails in the same way. Each
worker writes files of its own, named like its log. They are for people to read, so a full disk loses them silently;
what is done is recorded elsewhere (`markers.py`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

NOW, FAILURES = ".now", ".failures"
MOST_LISTED = 5  # blocks in what people read


@dataclass(frozen=True)
class Report:
    """A block that a worker is at, or that failed.

    Attributes:
        block: its number in the grid, from 0.
        begin: its first corner in nm, z, y, x.
        shape: in nm.
        log: name of the worker's log.
        error: type and message of what made it fail, in one line.
        time: when that was, or when it began, in seconds since 1970.
    """

    block: int
    begin: list[float]
    shape: list[float]
    log: str
    error: str = ""
    time: float = field(default_factory=time.time)

    @classmethod
    def at(
        cls, block: int, grid: Sequence[int], begin: Sequence[float], shape: Sequence[float], error: str = ""
    ) -> Report:
        """A block of a grid whose first block has this corner and shape in nm."""
        index = map(int, np.unravel_index(block, grid))
        return cls(block, [b + n * s for b, n, s in zip(begin, index, shape, strict=True)], list(shape), "", error)

    @property
    def kind(self) -> str:
        """The error without what differs from block to block: its numbers."""
        return re.sub(r"\d+", "#", self.error)

    @property
    def place(self) -> str:
        """Where the block is: z 0 to 400, y 0 to 400, x 0 to 400 nm."""
        spans = zip("zyx", self.begin, self.shape, strict=True)
        return ", ".join(f"{axis} {begin} to {begin + size}" for axis, begin, size in spans) + " nm"


def report_begin(log: Path, report: Report) -> None:
    """Say which block a worker is at."""
    with suppress(OSError):
        log.with_suffix(NOW).write_text(json.dumps(asdict(report)), encoding="utf-8")


def report_end(log: Path) -> None:
    """Say that a worker is at no block any more."""
    with suppress(OSError):
        log.with_suffix(NOW).unlink(missing_ok=True)


def report_failure(log: Path, report: Report) -> None:
    """Say that a block failed."""
    with suppress(OSError), log.with_suffix(FAILURES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(report)) + "\n")


def clear_reports(folder: Path) -> None:
    """Remove the reports of an earlier run."""
    for suffix in (NOW, FAILURES):
        for file in folder.glob(f"*{suffix}"):
            file.unlink(missing_ok=True)


def current_blocks(folder: Path) -> list[Report]:
    """Return the blocks that workers are at, the oldest first."""
    return sorted(_reports(folder, NOW), key=lambda report: report.time)


def failures(folder: Path) -> list[Report]:
    """Return each failure of a block, in the order of their times. A block that was tried again is there again."""
    return sorted(_reports(folder, FAILURES), key=lambda report: report.time)


def failed_blocks(folder: Path) -> dict[int, Report]:
    """Return the last failure of each block that failed, by its number, whether it was done since or not."""
    return {report.block: report for report in failures(folder)}


def same_error(found: list[Report], since: float) -> list[Report]:
    """Return the last failures after a time that have the same error, one for each block, the first one first."""
    same: dict[int, Report] = {}
    for report in reversed(found):
        if report.time <= since or report.kind != found[-1].kind:
            break
        same[report.block] = report
    return list(reversed(same.values()))


def _reports(folder: Path, suffix: str) -> Iterator[Report]:
    for file in folder.glob(f"*{suffix}"):
        try:
            lines: list[Any] = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # its worker has just removed it
            continue
        for line in lines:
            with suppress(ValueError, TypeError):  # half a line, or the file of another program
                yield Report(**json.loads(line))
