"""Downloading files over HTTP, so that each appears whole or not at all and goes on where it stopped.

A file grows under its name with `.partial`. If the connection breaks off, or the program was killed, the rest is asked
for with a Range request. `If-Range` makes the server send all of it if it has changed since. A file gets its final name
after its size and, if one was published, its checksum were found right.
"""

import functools
import hashlib
import http.client
import os
import re
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from threading import Event, Lock
from typing import NamedTuple, TypeVar
from xml.etree import ElementTree

from tqdm import tqdm

from lsdseg.errors import UserError
from lsdseg.files import PARTIAL, explain_os_errors, room_on_disk

SECONDS = 10  # to wait for an answer, and for the next bytes
ATTEMPTS = 5  # without a new byte before a download is given up
PAUSE = 0.5  # seconds before the second attempt; each further pause is twice as long
PIECE = 2**18  # bytes that are read at once
BUSY = {408, 425, 429, 500, 502, 503, 504}  # answers after which it is worth asking again
HOPELESS = (TimeoutError, socket.gaierror, ssl.SSLCertVerificationError, http.client.InvalidURL)
AGAIN = "run the same command again; it goes on where it stopped"

T = TypeVar("T")


class Remote(NamedTuple):
    """A file behind a URL.

    Attributes:
        url: where it is, http or https.
        path: the file to write.
        size: in bytes. None: unknown.
        checksum: "md5:..." or "sha256:...". None: none was published.
    """

    url: str
    path: Path
    size: int | None = None
    checksum: str | None = None


class Progress:
    """A bar that several threads move.

    Args:
        bar: counts bytes.
    """

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.lock = bar, Lock()
        self.stopped = Event()  # set by whoever wants all downloads to end

    def add(self, count: int) -> None:
        """Count bytes, or with a negative number take them back."""
        with self.lock:
            self.bar.update(count)

    def expect(self, count: int) -> None:
        """Say that there will be more bytes than was known so far."""
        with self.lock:
            self.bar.total = (self.bar.total or 0) + count
            self.bar.refresh()


class _BrokenOffError(Exception):
    """A connection or an answer that was lost. Asking again may help."""


class _NothingLeftError(Exception):
    """What was asked for begins at the end of the file or behind it."""


def fetch(file: Remote, progress: Progress) -> None:
    """Download a file. Nothing is asked for if it is there already.

    Raises:
        UserError: there is no answer, no such file, no permission or no room on disk; or the file has another size or
            checksum than was published.
        CancelledError: `progress.stopped` was set.
    """
    if file.path.is_file() and file.size in (None, file.path.stat().st_size):
        progress.add(file.path.stat().st_size)
        if file.size is None:
            progress.expect(file.path.stat().st_size)
        return
    partial = file.path.with_name(file.path.name + PARTIAL)
    with explain_os_errors(file.path):
        partial.parent.mkdir(parents=True, exist_ok=True)
        begun = _size(partial)
        progress.add(begun)
        counted = [begun, file.size or 0]  # bytes that the bar shows as done, and as all
        _persist(lambda: _receive(file, partial, counted, progress), file.url, lambda: _size(partial), progress.stopped)
        _verify(file, partial)
        _version(partial).unlink(missing_ok=True)
        os.replace(partial, file.path)


def list_folder(url: str, folder: Path, stopped: Event) -> list[Remote]:
    """List what lies in a folder of an S3 bucket, with sizes and, where its ETags are MD5 sums, checksums.

    Args:
        url: of the folder, with the bucket in the name of the host: https://BUCKET.s3.amazonaws.com/FOLDER/.
        folder: where the files will be written.
        stopped: ends the attempts when it is set.

    Raises:
        UserError: there is no answer, no permission, no such folder, or a name in it that no file can have.
    """
    parts = urllib.parse.urlsplit(url)
    prefix = urllib.parse.unquote(parts.path.lstrip("/"))
    files: dict[str, Remote] = {}
    query = {"list-type": "2", "prefix": prefix}
    while True:
        page_url = f"{parts.scheme}://{parts.netloc}/?{urllib.parse.urlencode(query)}"
        page = _persist(functools.partial(_page, page_url), page_url, lambda: 0, stopped)
        before = len(files)
        for entry in page.findall("{*}Contents"):
            name = (entry.findtext("{*}Key") or "").removeprefix(prefix)
            if name and not name.endswith("/"):
                files[name] = _listed(parts, prefix, name, folder, entry)
        token = page.findtext("{*}NextContinuationToken")
        if not token or len(files) == before:
            break
        query["continuation-token"] = token
    if not files:
        raise UserError(f"{url} holds no files: check the address in the table of data sets")
    return list(files.values())


def _listed(
    parts: urllib.parse.SplitResult, prefix: str, name: str, folder: Path, entry: ElementTree.Element
) -> Remote:
    """Return a file of a listing."""
    etag, size = (entry.findtext("{*}ETag") or "").strip('"'), entry.findtext("{*}Size") or ""
    if {"", ".", ".."} & set(name.split("/")) or "\\" in name or not name.isprintable() or not size.isdecimal():
        raise UserError(
            f"{parts.netloc} lists {name[:80]!r} with {size[:20]!r} bytes, which is no file: use another copy"
        )
    url = f"{parts.scheme}://{parts.netloc}/{urllib.parse.quote(prefix + name)}"
    checksum = f"md5:{etag}" if re.fullmatch("[0-9a-f]{32}", etag) else None
    return Remote(url, folder / PurePosixPath(name), int(size), checksum)


def _page(url: str) -> ElementTree.Element:
    with _answer(url) as answer:
        content = b"".join(iter(lambda: _next(answer), b""))
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise UserError(f"{url} lists no files ({error}): check the address in the table of data sets") from error


def _persist(attempt: Callable[[], T], url: str, gained: Callable[[], int], stopped: Event) -> T:
    """Call `attempt` until it does not break off, or did so ATTEMPTS times without having gained a byte."""
    failures = 0
    while True:
        before = gained()
        try:
            return attempt()
        except _BrokenOffError as error:
            failures = 1 if gained() > before else failures + 1
            if failures == ATTEMPTS:
                raise UserError(f"{url} cannot be downloaded ({error}, {ATTEMPTS} times): {AGAIN}") from error
        if stopped.wait(PAUSE * 2 ** (failures - 1)):
            raise CancelledError


def _answer(url: str, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
    """Send a GET request, and return the answer, to be closed by the caller. Its status is 200 or 206."""
    request = urllib.request.Request(url, headers={"User-Agent": "lsd-neuron-segmentation", **(headers or {})})
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=SECONDS)
        return answer
    except urllib.error.HTTPError as error:
        with error:
            if error.code in BUSY:
                raise _BrokenOffError(f"{error.code} {error.reason}") from error
            if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise _NothingLeftError(error.headers.get("Content-Range", "")) from error
            raise UserError(f"{url} gives nothing ({error.code} {error.reason}): {_remedy(error.code)}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _explained(url, error) from error


def _remedy(code: int) -> str:
    if code in (401, 403):
        return "its owner does not let you read it; ask for access, or download it in a browser and convert it"
    return "it may have moved; look for its new address, and write it in a table of your own for --table"


def _explained(url: str, error: Exception) -> Exception:
    """Return what to raise after a connection failed."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return UserError(f"{url} has not answered for {SECONDS} s: check that it can be reached, and {AGAIN}")
    if isinstance(reason, HOPELESS):
        return UserError(f"{url} cannot be reached ({reason}): check the address and your connection, and {AGAIN}")
    return _BrokenOffError(str(reason) or type(reason).__name__)


def _receive(file: Remote, partial: Path, counted: list[int], progress: Progress) -> None:
    """Ask for what is missing of a file, and write it. `counted`: the bytes that the bar shows as done, and as all."""
    have, version = _size(partial), _read(_version(partial))
    if have and have == file.size:
        return
    if not (version or file.checksum):  # the rest may be that of a newer version, and nobody would notice
        have = 0
    headers = {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {}) if have else {}
    try:
        answer = _answer(file.url, headers)
    except _NothingLeftError as error:
        if str(error) == f"bytes */{have}":
            return
        partial.unlink()
        raise _BrokenOffError("what was there is longer than the file") from error
    with answer:
        begin, total = _extent(answer, file, have)
        progress.add(begin - counted[0])
        progress.expect((total or counted[1]) - counted[1])
        counted[:] = begin, total or counted[1]
        with room_on_disk(file.path, (total or begin) - begin), open(partial, "ab" if begin else "wb") as output:
            if begin == 0:  # only now, when nothing of an older version is left
                _version(partial).write_text(_version_of(answer), encoding="utf-8")
            while piece := _next(answer):
                output.write(piece)
                progress.add(len(piece))
                counted[0] += len(piece)
                if progress.stopped.is_set():
                    raise CancelledError
    if total is not None and counted[0] != total:
        raise _BrokenOffError(f"the connection broke off after {counted[0]} of {total} bytes")


def _next(answer: http.client.HTTPResponse) -> bytes:
    """Return the next bytes; a server that falls silent in the middle is asked for the rest."""
    try:
        return answer.read1(PIECE)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(str(error) or type(error).__name__) from error


def _extent(answer: http.client.HTTPResponse, file: Remote, have: int) -> tuple[int, int | None]:
    """Return which byte an answer begins with, and the size of the whole file if the answer says so."""
    if answer.status == HTTPStatus.PARTIAL_CONTENT:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if not match or int(match[1]) != have:
            raise UserError(f"{file.url} answers with another part than was asked for: use another copy")
        begin, size = have, match[2]
    else:
        begin, size = 0, answer.headers.get("Content-Length", "")
    total = int(size) if size.isdecimal() else None
    if file.size is not None and total is not None and total != file.size:
        raise UserError(f"{file.url} has {total} bytes, not {file.size} as published: it has changed; use another copy")
    return begin, total


def _verify(file: Remote, partial: Path) -> None:
    """Compare size and checksum with what was published; what differs is deleted."""
    found, expected = f"{_size(partial)} bytes", f"{file.size} bytes"
    if file.size in (None, _size(partial)):
        if file.checksum is None:
            return
        algorithm, _, _ = file.checksum.partition(":")
        found, expected = f"{algorithm}:{digest(partial, algorithm)}", file.checksum
        if found == expected:
            return
    partial.unlink()
    _version(partial).unlink(missing_ok=True)
    raise UserError(
        f"{file.url} gave {found}, not {expected} as published, so it was deleted: run the same command again, "
        "and if that does not help, use another copy"
    )


def digest(path: Path, algorithm: str) -> str:
    """Return the checksum of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _version_of(answer: http.client.HTTPResponse) -> str:
    """Return what tells this version of a file from others in `If-Range`, RFC 9110: a strong ETag, or a date."""
    etag = str(answer.headers.get("ETag", ""))
    return etag if etag and not etag.startswith("W/") else str(answer.headers.get("Last-Modified", ""))


def _version(partial: Path) -> Path:
    """Return the file that keeps what `_version_of` returned, for the next run."""
    return partial.with_name(partial.name + ".version")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
