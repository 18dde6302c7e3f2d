"""Volumes behind a URL: zarr, OME-Zarr, N5 and Neuroglancer precomputed.

What describes a volume is small, and copied to a temporary folder that looks like a volume on disk. Its voxels are read
where they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import tensorstore

from lsdseg.config.implementations import resolve
from lsdseg.data_utils.formats import FOLDERS, Source
from lsdseg.data_utils.placement import multiscales_of
from lsdseg.data_utils.tensorstores import CONTEXT
from lsdseg.errors import UserError

SECONDS = 10  # to wait for an answer


@contextmanager
def open_remote(url: str, datasets: Sequence[str]) -> Iterator[Source]:
    """Open a volume behind a URL.

    Args:
        url: http, https, gs or s3.
        datasets: names that it may have there. What lies elsewhere in a container is not found, since most servers list
            nothing.

    Raises:
        UserError: there is no answer, or nothing in any of the formats.
    """
    with TemporaryDirectory() as folder:
        mirror = Path(folder).resolve() / "volume"
        _copy_descriptions(url, mirror, datasets)
        found = [function for name, (_, function) in FOLDERS.items() if any(mirror.rglob(name))]
        if not found:
            tried = ", ".join(f"{name} of {format_name}" for name, (format_name, _) in FOLDERS.items())
            raise UserError(f"{url} holds no volume: tried {tried}, there and in {' and '.join(datasets)}")

        def store(path: Path) -> str:
            inner = path.relative_to(mirror).as_posix()
            return url.rstrip("/") + ("/" if inner == "." else f"/{inner}/")

        try:
            with resolve(found[0])(mirror, store) as source:
                yield source
        except UserError as error:
            raise UserError(str(error).replace(str(mirror), url)) from error


def _copy_descriptions(url: str, mirror: Path, datasets: Sequence[str]) -> None:
    """Copy the files that describe a volume, its groups and the levels of its pyramids."""
    folders = {"."} | {
        str(folder)
        for dataset in datasets
        for folder in (PurePosixPath(dataset), PurePosixPath(dataset) / "s0", *PurePosixPath(dataset).parents)
    }
    _copy(url, mirror, folders)
    levels = {
        str(PurePosixPath(folder, level["path"]))
        for folder in folders
        for multiscale in multiscales_of(mirror / folder)
        for level in multiscale.get("datasets", [])
    }
    _copy(url, mirror, levels)


def _copy(url: str, mirror: Path, folders: set[str]) -> None:
    names = [str(PurePosixPath(folder, name)) for folder in sorted(folders) for name in (*FOLDERS, ".zattrs")]
    try:
        context = tensorstore.Context(CONTEXT)
        files = tensorstore.KvStore.open(url.rstrip("/") + "/", context=context).result(SECONDS)
        answers = [files.read(name) for name in names]
        found = {name: answer.result(SECONDS) for name, answer in zip(names, answers, strict=True)}
    except TimeoutError:
        raise UserError(
            f"{url} has not answered for {SECONDS} s: check the address, and that it can be reached"
        ) from None
    except Exception as error:
        reason = str(error).partition(" [")[0][-200:]
        raise UserError(f"{url} cannot be read ({reason}): check the address, and that you may read it") from error
    for name, answer in found.items():
        if answer.state == "value":
            file = mirror / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(answer.value)
