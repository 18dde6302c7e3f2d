"""Which arrays and zarrs may be replaced, and how: only what this suite wrote, and only by something complete.

An array of the suite is known by its attributes (see `OWN`). Everything else in a folder is somebody's work: a group, a
plain folder, an array of other software, an input. It is never replaced, and the user is told where it lies.
"""

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path, PurePosixPath
from typing import Any

from lsdseg.data_utils.stored import read_json
from lsdseg.errors import UserError
from lsdseg.files import PARTIAL, explain_os_errors

# Attributes that `create_array` writes. Other software writes some of them, but not all.
OWN = {"resolution", "offset", "voxel_size", "axis_names", "units"}
HEADERS = {".zgroup", ".zattrs", ".zarray", ".zmetadata", "zarr.json"}
# A folder is deleted when it was gone so many times in a row, or after so many seconds.
QUIET, PATIENCE = 3, 5
DISCARDED = ".discarded"  # suffix of what was replaced and is being deleted


def array_folder(path: Path | str, dataset: str) -> Path:
    """Return the folder of a dataset in a zarr.

    Raises:
        UserError: the name leads out of the zarr or cannot be the name of a folder.
    """
    parts = dataset.split("/")
    if dataset.startswith("/") or not all(map(_usable, parts)):
        raise UserError(f"{dataset[:80]!r} is no name of a dataset in {path}: use names and slashes, as in volumes/raw")
    return Path(path, *parts)


def is_array(folder: Path) -> bool:
    """Return whether a folder is a zarr array of format 2 or 3. One with a damaged zarr.json is none."""
    if (folder / ".zarray").is_file():
        return True
    return (folder / "zarr.json").is_file() and _read(folder / "zarr.json").get("node_type") == "array"


def check_replaceable_array(path: Path | str, dataset: str) -> None:
    """Check that a dataset can be written: nothing has its name, or an array that this suite wrote.

    Raises:
        UserError: there is something else, or the dataset would lie in another array.
    """
    folder = array_folder(path, dataset)
    if folder == Path(path):
        raise UserError(f"{dataset!r} is no name of a dataset to write in {path}: use one as volumes/raw")
    for parent in folder.parents[: len(PurePosixPath(dataset).parts) - 1]:
        if is_array(parent):
            raise UserError(f"{dataset} would lie inside the array {parent}: choose another name")
    if os.path.lexists(folder) and (folder.is_symlink() or not _is_own(folder)):
        raise UserError(
            f"{dataset} in {path} is not an array that this suite wrote, so it is not replaced: "
            "choose another name, or move it away"
        )


def check_replaceable_zarr(path: Path, inputs: Sequence[Path | str] = ()) -> None:
    """Check that a zarr can be written as a whole: nothing has its name, or a zarr with only arrays of this suite.

    Args:
        path: the zarr.
        inputs: what the zarr is made from.

    Raises:
        UserError: it is an input, lies in one or contains one; or it holds anything else.
    """
    check_apart(path, inputs)
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is not a zarr: write elsewhere, or move it away")
    folders = [path]
    while folders:
        for child in sorted(folders.pop().iterdir()):
            if child.is_dir() and not child.is_symlink() and not is_array(child):
                folders.append(child)
            elif not (child.name in HEADERS or _is_own(child)):
                raise UserError(
                    f"{path} is not replaced, because {child.relative_to(path)} in it was not written by this suite: "
                    "write elsewhere, or move it away"
                )


def check_apart(path: Path, inputs: Sequence[Path | str]) -> None:
    """Check that what is written is no link, and neither an input nor in one nor around one.

    Raises:
        UserError: it is.
    """
    target = path.resolve()
    for source in map(Path, inputs):
        real = source.resolve()
        if target == real or target in real.parents or real in target.parents:
            raise UserError(f"{path} is an input, lies in one or contains one ({source}): write elsewhere")
    if path.is_symlink():
        raise UserError(f"{path} is a link, so it is not replaced: write elsewhere, or remove the link")


def replace_folder(new: Path, old: Path) -> None:
    """Give a complete folder its final name. What had that name is moved aside before it is deleted.

    So a reader never sees a folder of that name that is half deleted, even if the process is killed.
    """
    if old.exists():
        old.rename(_hidden(old, DISCARDED))
    new.rename(old)
    for folder in _hidden_ones(old, DISCARDED):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def write_zarr(path: Path | str, inputs: Sequence[Path | str] = ()) -> Iterator[Path]:
    """Let the body write a zarr under a temporary name, as `write_folder` does.

    Args:
        path: the zarr. An existing one is replaced.
        inputs: what the zarr is made from.

    Yields:
        The temporary name.

    Raises:
        UserError: as for `check_replaceable_zarr`, before the body runs; or the folder cannot be created.
    """
    path = Path(path)
    with write_folder(path, lambda: check_replaceable_zarr(path, inputs)) as partial:
        yield partial


@contextmanager
def write_folder(path: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Let the body write a folder under a temporary name, and give it its name if the body succeeds.

    What killed runs left is deleted. A lock on the temporary folder tells them from runs that still work.

    Args:
        path: the folder. An existing one is replaced.
        check: raises UserError if the folder must not be replaced. Called before and after the body.

    Yields:
        The temporary name.

    Raises:
        UserError: as `check` does, or the folder cannot be created.
    """
    check()
    for left in _hidden_ones(path, PARTIAL):
        with _locked(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    partial = _hidden(path, PARTIAL)
    with explain_os_errors(path):
        partial.mkdir(parents=True)
    try:
        with _locked(partial):
            yield partial
            check()
            replace_folder(partial, path)
    finally:
        _delete(partial)


@contextmanager
def replacing_array(path: Path | str, dataset: str) -> Iterator[str]:
    """Let the body make an array under a temporary name, and give it its name if the body succeeds.

    Yields:
        The temporary name of the dataset, which nothing lists.

    Raises:
        UserError: something else has that name, or the name without PARTIAL that the array will get.
    """
    for name in (dataset, dataset.removesuffix(PARTIAL)):
        check_replaceable_array(path, name)
    folder = array_folder(path, dataset)
    new = _hidden(folder, PARTIAL)
    try:
        yield new.relative_to(path).as_posix()
        replace_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _usable(name: str) -> bool:
    """Return whether a group or an array can have this name, on every file system and in a message of one line."""
    return not name.startswith(".") and "\\" not in name and name.isprintable() and len(name.encode()) <= 150


def _is_own(folder: Path) -> bool:
    """Return whether a folder is an array that this suite wrote."""
    if not is_array(folder):
        return False
    attributes = _read(folder / ".zattrs") or _read(folder / "zarr.json").get("attributes")
    return isinstance(attributes, dict) and attributes.keys() >= OWN


def _read(file: Path) -> dict[str, Any]:
    """Return what a JSON file says, nothing if it is damaged or missing."""
    try:
        return read_json(file)
    except UserError:
        return {}


def _delete(folder: Path) -> None:
    """Delete a folder for good: threads of tensorstore go on for a moment after one failed, and make it anew."""
    end = time.monotonic() + PATIENCE
    gone = 0 if folder.exists() else QUIET
    while gone < QUIET and time.monotonic() < end:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        gone = 0 if folder.exists() else gone + 1


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{suffix}")


def _hidden_ones(path: Path, suffix: str) -> list[Path]:
    """Return the folders that got their names from `_hidden`."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}{re.escape(suffix)}")
    return [child for child in path.parent.glob(".*") if name.fullmatch(child.name)]


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder while the body runs, or tell it that another process holds the lock or that there are no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
