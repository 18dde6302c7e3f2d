"""Writing files and folders so that they appear whole or not at all, and handling a full disk.

A file that is written under its final name can be read when it is half done, or be taken for complete after the writer
was killed. So it is written under a temporary name and renamed, which POSIX file systems do in one step.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lsdseg.errors import UserError

PARTIAL = ".partial"  # suffix of files, folders and arrays that are not complete
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def write_whole(path: Path | str) -> Iterator[Path]:
    """Let the body write a file under a temporary name, and rename it to `path` if the body succeeds.

    Missing parent folders are created.

    Yields:
        The temporary name.

    Raises:
        UserError: instead of an OSError, if the disk is full or read-only or permission is missing.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the object that a JSON file of ours holds.

    Raises:
        UserError: the file is damaged or cannot be read; the message ends with the remedy.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        reason = "it holds no object"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise UserError(f"{path} cannot be read ({reason}): {remedy}")


@contextmanager
def explain_os_errors(path: Path | str) -> Iterator[None]:
    """Turn an OSError of the body into a UserError.

    Raises:
        UserError: `path` cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def room_on_disk(path: Path | str, needed_bytes: int = 0) -> Iterator[None]:
    """Check that there is room and permission to write `path`, run the body, and watch for a full disk.

    Raises:
        UserError: before the body runs, if fewer than `needed_bytes` are free or permission is missing. Afterwards,
            instead of the body's OSError, if the disk or the quota is full.
    """
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: no permission to write in {folder}; write elsewhere")
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"no room on disk for {path}: {byte_count(needed_bytes)} needed, {byte_count(free)} free; "
            "delete something or write elsewhere"
        )
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise cannot_write(path, error) from error


def cannot_write(path: Path | str, error: OSError) -> UserError:
    """Return the error to raise after the operating system failed to write `path`."""
    remedy = "free some space" if error.errno in FULL_DISK else "check the permissions, or write elsewhere"
    return UserError(f"cannot write {path}: {error.strerror or error}; {remedy}, then run the same command again")


def byte_count(count: int) -> str:
    """Return a number of bytes in words: 1.5 GB."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next((f"{count / unit:.1f} {name}" for unit, name in units if count >= unit), f"{count} bytes")
