"""The log of edits beside an output, SAMPLE.edits: what people merged, split, marked as right, and took back.

It is text with one JSON object per line, and lines are only ever appended. An edit names fragments, not segments:
segments change with the threshold and with every edit, fragments stay. A line is on disk before the edit counts.
Whoever is killed while writing leaves half a line at the end, which never counted; the next edit takes its place.
"""

import fcntl
import getpass
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lsdseg.errors import UserError, quoted
from lsdseg.files import explain_os_errors

Action = Literal["merge", "split", "mark", "undo"]
ACTIONS = ("merge", "split", "mark", "undo")
LARGEST_ID = 2**64 - 1


@dataclass(frozen=True)
class Edit:
    """One line of the log.

    Attributes:
        number: of the edit, from 1.
        action: "merge": the two fragments are of one neuron; "split": they are of two; "mark": the segment of the first
            is right now; "undo" takes another edit back.
        a: the first fragment. For "undo", the number of the edit that is taken back.
        b: the second fragment; 0 for "mark" and "undo".
        author: who did it.
        time: when, in ISO 8601, UTC.
        fragments: id of the fragments that it is about.
    """

    number: int
    action: Action
    a: int
    b: int
    author: str
    time: str
    fragments: str


def active(edits: Sequence[Edit]) -> list[Edit]:
    """Return the merges and splits that were not taken back, in their order."""
    return [edit for edit in _standing(edits) if edit.action != "mark"]


def marked(edits: Sequence[Edit]) -> list[int]:
    """Return the fragments whose segments were marked as right."""
    return sorted({edit.a for edit in _standing(edits) if edit.action == "mark"})


def _standing(edits: Sequence[Edit]) -> list[Edit]:
    undone = {edit.a for edit in edits if edit.action == "undo"}
    return [edit for edit in edits if edit.action != "undo" and edit.number not in undone]


class EditLog:
    """The log of one output. Any number of processes may append to it at the same time.

    Args:
        path: the file, see `lsdseg.data_utils.layout.edits_path`. It need not exist.
        fragments: id of the fragments of the output. Edits of others are refused.
    """

    def __init__(self, path: Path | str, fragments: str = ""):
        self.path = Path(path)
        self.fragments = fragments

    def read(self) -> list[Edit]:
        """Return all edits. Half a line at the end is reported and left out.

        Raises:
            UserError: the file cannot be read, a line is damaged, or an edit is of other fragments.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}; check its permissions") from error
        edits, whole = self._parse(content)
        if whole < len(content):
            print(f"{self.path} ends in half a line, which is left out: whoever wrote it was stopped; repeat that edit")
        return edits

    def merge(self, a: int, b: int, author: str = "") -> Edit:
        """Append that two fragments are of one neuron."""
        return self._append("merge", a, b, author)

    def split(self, a: int, b: int, author: str = "") -> Edit:
        """Append that two fragments are of two neurons."""
        return self._append("split", a, b, author)

    def mark(self, fragment: int, author: str = "") -> Edit:
        """Append that the segment of a fragment is right now."""
        return self._append("mark", fragment, 0, author)

    def undo(self, author: str = "") -> Edit:
        """Append that the last edit that counts does not count.

        Returns:
            The edit that was taken back.

        Raises:
            UserError: there is none.
        """
        with self._locked() as (file, edits):
            standing = _standing(edits)
            if not standing:
                raise UserError(f"there is no edit in {self.path} to take back")
            self._write(file, Edit(len(edits) + 1, "undo", standing[-1].number, 0, *self._signature(author)))
            return standing[-1]

    def _append(self, action: Action, a: int, b: int, author: str) -> Edit:
        if a == b:
            raise UserError(f"a {action} takes two fragments, but both are {a}: choose two places")
        with self._locked() as (file, edits):
            edit = Edit(len(edits) + 1, action, int(a), int(b), *self._signature(author))
            self._write(file, edit)
            return edit

    def _signature(self, author: str) -> tuple[str, str, str]:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return author or _user(), now, self.fragments

    @contextmanager
    def _locked(self) -> Iterator[tuple[BinaryIO, list[Edit]]]:
        """Lock the file, read its edits, and let the body append to it. Half a line at its end is cut off."""
        with explain_os_errors(self.path), open(self.path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            edits, whole = self._parse(content)
            if whole < len(content):
                file.truncate(whole)
            elif content and not content.endswith(b"\n"):
                file.write(b"\n")
            yield file, edits

    def _write(self, file: BinaryIO, edit: Edit) -> None:
        line = json.dumps(_to_json(edit)).encode() + b"\n"
        size = os.fstat(file.fileno()).st_size
        if file.write(line) != len(line):  # the disk is full
            file.truncate(size)
            raise UserError(f"no room on disk for {self.path}: the edit was not kept; free some space and repeat it")
        os.fsync(file.fileno())

    def _parse(self, content: bytes) -> tuple[list[Edit], int]:
        """Return the edits, and how many bytes hold whole lines."""
        edits: list[Edit] = []
        undone: set[int] = set()
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                edit = _from_json(json.loads(line))
            except (ValueError, RecursionError) as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    return edits, len(content) - len(line)
                raise self._damaged(number, str(error)) from error
            if edit.number != number:
                raise self._damaged(number, f"it is edit {edit.number}, so lines are missing or doubled")
            if edit.action == "undo" and (
                not 0 < edit.a < number or edit.a in undone or edits[edit.a - 1].action == "undo"
            ):
                raise self._damaged(number, f"there is no edit {edit.a} to take back")
            if self.fragments and edit.fragments and edit.fragments != self.fragments:
                raise UserError(
                    f"line {number} of {self.path} edits segments of other fragments, which are no longer there: move "
                    "the file away, or restore these fragments"
                )
            if edit.action == "undo":
                undone.add(edit.a)
            edits.append(edit)
        return edits, len(content)

    def _damaged(self, line: int, reason: str) -> UserError:
        return UserError(f"line {line} of {self.path} is damaged ({reason}): correct it, or restore the file")


# What each action is about, by the names in the file.
_KEYS: dict[Action, tuple[str, ...]] = {"merge": ("a", "b"), "split": ("a", "b"), "mark": ("a",), "undo": ("undoes",)}


def _to_json(edit: Edit) -> dict[str, Any]:
    about = dict(zip(_KEYS[edit.action], (edit.a, edit.b), strict=False))
    signature = {"author": edit.author, "time": edit.time, "fragments": edit.fragments}
    return {"edit": edit.number, "action": edit.action, **about, **signature}


def _from_json(content: Any) -> Edit:
    """Read a line.

    Raises:
        ValueError: it is no edit.
    """
    if not isinstance(content, dict) or content.get("action") not in ACTIONS:
        raise ValueError("it is no merge, split, mark or undo")
    action: Action = content["action"]
    numbers: list[int] = []
    for key in ("edit", *_KEYS[action]):
        value = content.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST_ID:
            raise ValueError(f"its {key} is {quoted(value)}")
        numbers.append(value)
    number, a, b = (*numbers, 0)[:3]
    if a == b:
        raise ValueError("both fragments are the same")
    author, time, fragments = (str(content.get(key, "")) for key in ("author", "time", "fragments"))
    return Edit(number, action, a, b, author, time, fragments)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may know no name for the user
        return "unknown"
