"""Records: what a result was made from, kept with it.

A result is an array, a table of a graph, or a look-up table. It has an id, which is new whenever it is made anew, and
lists the ids of all that it was made from and the values of all settings that it depends on (`config.rules.settings_of`
collects them). A step compares that with what it would use now, before it goes on with a result or builds on it.

Volumes of others have no record. They are known by a fingerprint: their placement, and the voxels of some chunks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from funlib.persistence import Array

from lsdseg.config.defaults import get_cfg_defaults
from lsdseg.data_utils.volumes import has_array, open_array, read, require_whole
from lsdseg.errors import UserError

ATTRIBUTE = "made_from"
# How many chunks of an array, and pieces of a file, are looked at. More would show smaller changes and take longer.
SAMPLED = 64
PIECE = 2**16
START_OVER = "set DATA.DROP_DS_MONGOTABLE True to make it anew"


@dataclass(frozen=True)
class Record:
    """What a result was made from.

    Attributes:
        step: the step that made it.
        inputs: name of an input -> its id, or the fingerprint of an input without one.
        settings: key -> value, what JSON can hold.
        id: of the result itself.
    """

    step: str
    inputs: dict[str, str]
    settings: dict[str, Any]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return {"id": self.id, "step": self.step, "inputs": self.inputs, "settings": self.settings}

    @classmethod
    def from_json(cls, content: Any) -> Record | None:
        """Return the record in what was stored, None if that is no record."""
        try:
            return cls(str(content["step"]), dict(content["inputs"]), dict(content["settings"]), str(content["id"]))
        except (KeyError, TypeError, ValueError):
            return None

    def __str__(self) -> str:
        inputs = ", ".join(f"{name} {made[:8]}" for name, made in self.inputs.items())
        return f"{self.id[:8]}, made by {self.step} from {inputs}"

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes for an array that has this record."""
        return {ATTRIBUTE: self.to_json()}

    def differences(self, other: Record) -> list[str]:
        """List what another result would be made from that this one was not, each in a few words."""
        found = [f"it was made by {self.step}, not by {other.step}"] if self.step != other.step else []
        for name in sorted(self.inputs.keys() | other.inputs.keys()):
            before, now = self.inputs.get(name), other.inputs.get(name)
            if before != now:
                what = "was not used" if before is None else "is not used now" if now is None else "was replaced"
                found.append(f"{name} {what}")
        # A key that one does not have is younger than that one. The default of such a key is what was done before.
        keys = self.settings.keys() | other.settings.keys()
        defaults = _defaults(keys)
        settings, theirs = (json.loads(json.dumps(defaults | one.settings)) for one in (self, other))
        for key in sorted(keys):
            before, now = settings[key], theirs[key]
            if before != now:
                found.append(f"{key} was {_short(before)}, is {_short(now)}")
        return found

    def require_same(self, what: str, other: Record) -> None:
        """Check that going on with this result means the same as making the other one.

        Args:
            what: names the result, for the message.
            other: what would be made now.

        Raises:
            UserError: it does not.
        """
        if changes := self.differences(other):
            raise UserError(f"{what} was made from something else: {'; '.join(changes)}: {START_OVER}, or change back")


def record_of(array: Array) -> Record | None:
    """Return the record of an array, None if it has none: others made it, or a version before records."""
    return Record.from_json(array.attrs.get(ATTRIBUTE))


def is_made(path: Path, dataset: str, record: Record) -> bool:
    """Return whether a dataset is there, and made from what a record says.

    Raises:
        UserError: it is, but has lost chunks.
    """
    if not has_array(path, dataset):
        return False
    made_from = record_of(open_array(path, dataset))
    if made_from is None or made_from.differences(record):
        return False
    require_whole(path, dataset)
    return True


def identity(array: Array) -> str:
    """Return the id of an array, or its fingerprint if it has no record."""
    record = record_of(array)
    return fingerprint(array) if record is None else record.id


def fingerprint(array: Array) -> str:
    """Return a hash of an array's shape, type and placement, and of the voxels of up to SAMPLED chunks.

    It does not depend on how chunks are compressed or where the array lies. A change in other chunks is not seen.
    """
    placement = [list(map(int, values)) for values in (array.shape, array.offset, array.voxel_size)]
    digest = hashlib.blake2b(json.dumps([placement, array.dtype.str]).encode(), digest_size=16)
    chunks = array.chunk_shape
    grid = [-(-size // chunk) for size, chunk in zip(array.shape, chunks, strict=True)]
    total = math.prod(grid)
    # The same chunks each time, spread over the volume.
    numbers = range(total) if total <= SAMPLED else np.random.default_rng(0).integers(0, total, SAMPLED)
    for number in numbers:
        index = np.unravel_index(int(number), grid)
        slices = tuple(slice(int(i) * c, (int(i) + 1) * c) for i, c in zip(index, chunks, strict=True))
        digest.update(np.ascontiguousarray(read(array, slices)).data)
    return digest.hexdigest()


def file_fingerprint(path: Path | str) -> str:
    """Return a hash of the size of a file and of up to SAMPLED pieces of it, spread over the file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(str(size).encode(), digest_size=16)
            for start in sorted({max(0, size - PIECE) * n // (SAMPLED - 1) for n in range(SAMPLED)}):
                file.seek(start)
                digest.update(file.read(PIECE))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _defaults(keys: Iterable[str]) -> dict[str, Any]:
    """Return the default of each key, None if the config has no such key (any more)."""
    defaults = get_cfg_defaults()
    parts = {key: key.split(".", 1) for key in keys}
    return {key: defaults[part[0]].get(part[-1]) if part[0] in defaults else None for key, part in parts.items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
