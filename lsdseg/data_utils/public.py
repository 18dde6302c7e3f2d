"""The table of public data sets: which volumes there are, where, under which license, and how to cite them.

`datasets.json` beside this module is one; `--table FILE` reads another of the same form. docs/public_volumes.md
explains its keys.
"""

import difflib
import re
import textwrap
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lsdseg.errors import UserError, quoted
from lsdseg.files import read_json

TABLE = Path(__file__).with_name("datasets.json")
NAME = r"[A-Za-z0-9][A-Za-z0-9_+.-]{0,99}"
TEXT = r"[^\n]+"
CHECKSUM = "md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}"


class DataSet(NamedTuple):
    """Volumes that were published together; the keys of an entry of the table.

    Attributes:
        name: what the user calls it.
        title: what it is.
        url: of a volume: a file; or a folder in an S3 bucket, with `/` at the end. {volume} stands for the volume.
        volumes: names of the volumes.
        raw: name of raw inside the file: a dataset, or for a zip archive a file.
        labels: name of the labels.
        voxel_size: z, y, x in nm, where the volume says nothing.
        voxel_size_from: where that is said.
        training: whether it goes to train/; else to test/.
        checksums: volume -> "md5:..." or "sha256:...", where one was published.
        checksums_from: where that is said.
        license: its name.
        license_from: where that is said.
        citation: what to cite.
        url_from: where the URL is from.
        tried: whether this suite has downloaded it from there.
    """

    name: str
    title: str
    url: str
    volumes: Sequence[str]
    raw: str
    labels: str
    voxel_size: Sequence[float]
    voxel_size_from: str
    training: bool
    checksums: Mapping[str, str]
    checksums_from: str
    license: str
    license_from: str
    citation: Sequence[str]
    url_from: str
    tried: bool


def read_table(path: Path) -> dict[str, DataSet]:
    """Read a table of data sets.

    Raises:
        UserError: it cannot be read, or an entry lacks a key or has a value that it cannot have.
    """
    content = read_json(path, "write it as docs/public_volumes.md says")
    entries = content.get("data_sets")
    if not entries or not isinstance(entries, dict) or not _all(entries, NAME):
        raise UserError(f"{path} is no table of data sets: write it as docs/public_volumes.md says")
    return {name: _data_set(name, entry, path) for name, entry in entries.items()}


def _data_set(name: str, entry: Any, path: Path) -> DataSet:
    """Check an entry of the table, and return what it says."""
    good: dict[str, Callable[[Any], bool]] = {
        "url": lambda value: _all([value], r"https?://[A-Za-z0-9.:-]+/[!-~]+"),
        "volumes": lambda value: isinstance(value, list) and bool(value) and _all(value, NAME),
        "voxel_size": lambda value: isinstance(value, list) and len(value) == 3 and all(_is_size(n) for n in value),
        "training": lambda value: isinstance(value, bool),
        "tried": lambda value: isinstance(value, bool),
        "checksums": lambda value: _is_mapping(value, NAME) and _all(value.values(), CHECKSUM),
        "citation": lambda value: isinstance(value, list) and _all(value, TEXT),
    }
    entry = entry if isinstance(entry, dict) else {}
    for key in DataSet._fields[1:]:
        if key not in entry:
            raise UserError(f"{path}: {name} has no {key}: add it; docs/public_volumes.md explains the keys")
        if not good.get(key, lambda value: _all([value], TEXT))(entry[key]):
            raise UserError(f"{path}: {name} has {key} {quoted(entry[key])}: correct it as docs/public_volumes.md says")
    if unknown := sorted(set(entry) - set(DataSet._fields[1:])):
        raise UserError(f"{path}: {name} has the key {quoted(unknown[0])}: use {', '.join(DataSet._fields[1:])}")
    data_set = DataSet(name=name, **entry)
    urls = {volume_url(data_set, volume) for volume in data_set.volumes}
    if len(urls) < len(data_set.volumes):
        raise UserError(
            f"{path}: {name} has several volumes at one URL: name each once, and write {{volume}} in the URL"
        )
    if data_set.raw == data_set.labels:
        raise UserError(f"{path}: {name} has the same name for raw and labels: correct one of them")
    if set(data_set.checksums) - (set() if data_set.url.endswith("/") else set(data_set.volumes)):
        raise UserError(
            f"{path}: {name} has checksums of what is no file: give those of its volumes, none for a folder"
        )
    if not all(re.fullmatch(NAME, file_name(url)) for url in urls):
        raise UserError(
            f"{path}: {name} has url {quoted(data_set.url)}: its path must end in the name of a file or folder"
        )
    return data_set


def volume_url(data_set: DataSet, volume: str) -> str:
    """Return where a volume is."""
    return data_set.url.replace("{volume}", volume)


def file_name(url: str) -> str:
    """Return the last name in the path of a URL."""
    return PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name


def _is_mapping(value: Any, names: str) -> bool:
    return isinstance(value, dict) and _all(value, names)


def _all(values: Any, expression: str) -> bool:
    return all(isinstance(value, str) and re.fullmatch(expression, value) for value in values)


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e6


def choose(table: Mapping[str, DataSet], words: Sequence[str]) -> list[tuple[DataSet, str]]:
    """Return the volumes that words name: NAME is a whole data set, NAME/VOLUME one of its volumes.

    Raises:
        UserError: there is none of that name; the message names the nearest.
    """
    known: dict[str, list[tuple[DataSet, str]]] = {}
    for name, data_set in table.items():
        known[name] = [(data_set, volume) for volume in data_set.volumes]
        known |= {f"{name}/{volume}": [(data_set, volume)] for volume in data_set.volumes}
    chosen: list[tuple[DataSet, str]] = []
    for word in words:
        if word not in known:
            nearest = difflib.get_close_matches(word[:100].lower(), known, n=1, cutoff=0)[0]
            raise UserError(f"no data set is called {quoted(word)}: did you mean {nearest}? --list shows all of them")
        chosen += [pair for pair in known[word] if pair not in chosen]
    return chosen


def describe(data_set: DataSet) -> str:
    """Return what the table says about a data set, in lines for the terminal."""
    checksums = ", ".join(data_set.checksums.values())
    facts = {
        "volumes": " ".join(data_set.volumes),
        "at": f"{data_set.url} ({data_set.url_from})",
        "tried": "yes" if data_set.tried else "no: this suite has not been run on this URL yet",
        "voxel size": f"{' x '.join(f'{n:g}' for n in data_set.voxel_size)} nm, z y x ({data_set.voxel_size_from})",
        "raw": data_set.raw,
        "labels": data_set.labels,
        "training": "yes" if data_set.training else "no",
        "checksums": f"{checksums} ({data_set.checksums_from})" if checksums else data_set.checksums_from,
        "license": f"{data_set.license} ({data_set.license_from})",
    }
    lines = [f"{data_set.name}: {data_set.title}"]
    for key, value in [*facts.items(), *(("cite", text) for text in data_set.citation)]:
        lines += textwrap.wrap(
            value, 110, initial_indent=f"  {key:12}", subsequent_indent=" " * 14, break_on_hyphens=False
        )
    return "\n".join(lines)
