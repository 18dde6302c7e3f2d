"""Public volumes are downloaded from a server on loopback that misbehaves as servers do."""

import fcntl
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from lsdseg.config.loader import load_config
from lsdseg.data_utils import fetch
from lsdseg.data_utils.download import download_volumes
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW, volumes_in
from lsdseg.data_utils.public import TABLE, choose, read_table
from lsdseg.data_utils.volumes import create_array, list_arrays, open_array, read
from lsdseg.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
RAW_VOXELS = np.random.default_rng(0).integers(0, 256, (6, 40, 50), np.uint8)
LABEL_VOXELS = np.arange(4 * 30 * 40, dtype=np.uint64).reshape(4, 30, 40) // 100
ENTRY = {
    "title": "a cube",
    "raw": "volumes/raw",
    "labels": "volumes/labels/neuron_ids",
    "voxel_size": [40, 4, 4],
    "voxel_size_from": "the test",
    "training": True,
    "checksums": {},
    "checksums_from": "none published",
    "license": "CC0",
    "license_from": "the test",
    "citation": ["Somebody et al. 2020"],
    "url_from": "the test",
    "tried": True,
}


class Server:
    """Files of a folder on loopback, with Range, ETags and the listings of S3, and with what can go wrong.

    Attributes:
        requests: path and Range of every request.
        sent: bytes of files that were sent.
        cuts: after how many bytes of an answer the connection breaks off, one number for each of the next answers.
        ranges: whether Range is heeded.
        status: what to answer instead of a file. None: the file.
        silent: whether nothing is answered at all.
        page: files on each page of a listing.
    """

    def __init__(self, folder):
        self.folder, self.requests, self.sent, self.cuts = folder, [], 0, []
        self.ranges, self.status, self.silent, self.page = True, None, False, 3
        self.lock, self.over = threading.Lock(), threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()

    def answer(self, request):
        asked = request.headers.get("Range")
        with self.lock:
            self.requests.append((request.path, asked))
        if self.silent:
            self.over.wait(30)
        elif self.status is not None:
            request.send_error(self.status)
        elif "list-type=2" in request.path:
            self.list(request)
        else:
            self.send(request, (self.folder / urllib.parse.unquote(request.path.lstrip("/"))).read_bytes(), asked)

    def send(self, request, content, asked):
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        begin = 0
        if self.ranges and asked and request.headers.get("If-Range") in (None, etag):
            begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if begin >= len(content):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(content)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(content) - begin))
        request.send_header("ETag", etag)
        request.end_headers()
        with self.lock:
            cut = self.cuts.pop(0) if self.cuts else len(content)
            part = content[begin : begin + cut]
            self.sent += len(part)
        request.wfile.write(part)

    def list(self, request):
        """Answer as ListObjectsV2 of S3 does, one page at a time."""
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(request.path).query))
        files = sorted(p for p in self.folder.rglob("*") if p.is_file())
        keys = [k for k in (str(p.relative_to(self.folder)) for p in files) if k.startswith(query["prefix"])]
        begin = int(query.get("continuation-token", 0))
        end = begin + self.page
        entries = "".join(
            f"<Contents><Key>{key}</Key><ETag>&quot;{hashlib.md5(content).hexdigest()}&quot;</ETag>"
            f"<Size>{len(content)}</Size></Contents>"
            for key in keys[begin:end]
            for content in [(self.folder / key).read_bytes()]
        )
        token = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < len(keys) else ""
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        page = f'<ListBucketResult xmlns="{namespace}">{entries}{token}</ListBucketResult>'.encode()
        request.send_response(200)
        request.send_header("Content-Length", str(len(page)))
        request.end_headers()
        request.wfile.write(page)

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    monkeypatch.setattr(fetch, "PIECE", 4096)
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    yield server
    server.close()


@pytest.fixture
def cube(server):
    """The path of a served file in CREMI's layout: labels cover the middle of raw."""
    path = server.folder / "cube.hdf"
    with h5py.File(path, "w") as file:
        for name, voxels, offset in ((RAW, RAW_VOXELS, (0, 0, 0)), (LABELS, LABEL_VOXELS, (40, 20, 20))):
            file[name] = voxels
            file[name].attrs.update({"resolution": (40.0, 4.0, 4.0), "offset": offset})
        file["volumes/labels/clefts"] = LABEL_VOXELS
        file["annotations/ids"] = np.arange(10)
    return path


def write_table(server, **changes):
    path = server.folder.parent / "table.json"
    entry = ENTRY | {"url": f"{server.url}/{{volume}}.hdf", "volumes": ["cube"]} | changes
    path.write_text(json.dumps({"data_sets": {"cubes": entry}}))
    return path


def download(server, *words, table=None, **options):
    given = {"config": None, "to": server.folder.parent / "train", "listed": False, "threads": 2, "overwrite": False}
    download_volumes(words or ["cubes"], table=table or write_table(server), **(given | options))
    return server.folder.parent / "train" / "cube.zarr"


def md5(path):
    return f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"


def check_cube(zarr):
    assert list_arrays(zarr) == [LABELS_MASK, LABELS, RAW]
    assert np.array_equal(read(open_array(zarr, RAW)), RAW_VOXELS)
    labels = open_array(zarr, LABELS)
    assert np.array_equal(read(labels), LABEL_VOXELS)
    assert (tuple(labels.voxel_size), tuple(labels.offset)) == ((40, 4, 4), (40, 20, 20))


def left(folder):
    """What there is in a folder but for records and the locked folder itself."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]


def test_volumes_of_a_config_can_be_trained_on_and_are_asked_for_once(server, cube, tmp_path, capsys):
    settings = ["DATA.HOME", str(tmp_path / "home"), "DATA.BRAIN_VOL", "CUBES"]
    download(server, "cubes", *settings, to=None, config="config_cremi.py")
    (zarr,) = volumes_in(load_config("config_cremi.py", settings), "train")
    assert zarr.name == "cube.zarr"
    check_cube(zarr)
    output = capsys.readouterr().out
    assert "License: CC0" in output
    assert "Somebody et al. 2020" in output
    assert "warning" not in output

    record = json.loads((zarr.parent / "downloads" / "cubes" / "cube.json").read_text())
    assert record["sha256"] == hashlib.sha256(cube.read_bytes()).hexdigest()
    assert record["bytes"] == cube.stat().st_size
    assert (record["license"], record["compared_with_published_checksums"]) == ("CC0", False)
    assert left(zarr.parent / "downloads") == []

    asked = len(server.requests)
    download(server, "cubes", *settings, to=None, config="config_cremi.py")
    assert len(server.requests) == asked
    assert "was there already" in capsys.readouterr().out
    download(server, "cubes", *settings, to=None, config="config_fib25.py")
    assert "warning" not in capsys.readouterr().err


def test_other_voxels_than_those_of_the_config_are_pointed_out(server, cube, tmp_path, capsys):
    download(server, "cubes", "DATA.HOME", str(tmp_path / "home"), to=None, config="config_fib25.py")
    assert "warning" in (output := capsys.readouterr().out)
    assert "MODEL_ISO.VOXEL_SIZE" in output


@pytest.mark.parametrize("checksum", [True, False])
def test_broken_connection_goes_on_where_it_stopped(server, cube, checksum):
    server.cuts = [10_000, 5_000]
    check_cube(download(server, table=write_table(server, checksums={"cube": md5(cube)} if checksum else {})))
    assert [asked for _, asked in server.requests] == [None, "bytes=10000-", "bytes=15000-"]
    assert server.sent == cube.stat().st_size


def test_next_run_goes_on_where_the_last_one_stopped(server, cube):
    server.cuts = [10_000] + [0] * (fetch.ATTEMPTS - 1)
    with pytest.raises(UserError, match="run the same command again"):
        download(server)
    folder = server.folder.parent / "train" / "downloads" / "cubes" / "cube"
    assert sorted(left(folder)) == ["cube.hdf.partial", "cube.hdf.partial.version"]
    server.requests.clear()
    check_cube(download(server))
    assert [asked for _, asked in server.requests] == ["bytes=10000-"]
    assert server.sent == cube.stat().st_size


def test_run_that_ended_before_it_renamed_the_file_asks_for_no_byte(server, cube):
    folder = server.folder.parent / "train" / "downloads" / "cubes" / "cube"
    folder.mkdir(parents=True)
    shutil.copy(cube, folder / "cube.hdf.partial")
    check_cube(download(server, table=write_table(server, checksums={"cube": md5(cube)})))
    assert server.sent == 0


def test_file_that_changed_in_between_starts_again(server, cube):
    server.cuts = [10_000] + [0] * (fetch.ATTEMPTS - 1)
    with pytest.raises(UserError, match="run the same command again"):
        download(server)
    with h5py.File(cube, "a") as file:
        file["more"] = np.arange(5000)
    before = server.sent
    check_cube(download(server))
    assert server.sent - before == cube.stat().st_size


def test_part_of_unknown_version_starts_again(server, cube):
    folder = server.folder.parent / "train" / "downloads" / "cubes" / "cube"
    folder.mkdir(parents=True)
    (folder / "cube.hdf.partial").write_bytes(b"something else")
    check_cube(download(server))


def test_part_that_is_too_long_starts_again(server, cube):
    folder = server.folder.parent / "train" / "downloads" / "cubes" / "cube"
    folder.mkdir(parents=True)
    (folder / "cube.hdf.partial").write_bytes(cube.read_bytes() + b"more")
    check_cube(download(server, table=write_table(server, checksums={"cube": md5(cube)})))


def test_server_that_ignores_range(server, cube):
    server.ranges, server.cuts = False, [10_000]
    check_cube(download(server))
    assert server.sent == 10_000 + cube.stat().st_size


def test_wrong_bytes_leave_nothing(server, cube):
    table = write_table(server, checksums={"cube": "md5:" + "0" * 32})
    with pytest.raises(UserError, match=f"gave {md5(cube)}, not md5:0000"):
        download(server, table=table)
    assert left(server.folder.parent / "train") == []
    check_cube(download(server, table=write_table(server, checksums={"cube": md5(cube)})))


@pytest.mark.parametrize(
    ("status", "remedy"), [(404, "look for its new address"), (403, "ask for access"), (503, "5 times")]
)
def test_refusals_say_what_to_do(server, cube, status, remedy):
    server.status = status
    with pytest.raises(UserError, match=f"{status}.*{remedy}"):
        download(server)
    assert left(server.folder.parent / "train") == []


def test_busy_server_is_asked_again(server, cube):
    server.status = 503
    threading.Timer(0.03, setattr, (server, "status", None)).start()
    check_cube(download(server))


def test_silent_server(server, cube, monkeypatch):
    monkeypatch.setattr(fetch, "SECONDS", 0.3)
    server.silent = True
    with pytest.raises(UserError, match="has not answered for"):
        download(server)
    assert len(server.requests) == 1


def test_no_server(server):
    table = write_table(server, url="http://127.0.0.1:1/{volume}.hdf")
    with pytest.raises(UserError, match="refused, 5 times"):
        download(server, table=table)


def test_no_volume_behind_a_url_can_be_downloaded_again(server, cube):
    good = cube.read_bytes()
    cube.write_bytes(b"<html>please log in</html>")
    with pytest.raises(UserError, match=r"no HDF5 file.*kept in") as error:
        download(server)
    cube.write_bytes(good)
    shutil.rmtree(re.search(r"kept in (\S+): delete it", str(error.value))[1])
    check_cube(download(server))


def served_zarr(server):
    zarr = server.folder / "funke" / "cube.zarr"
    for name, voxels, offset in ((RAW, RAW_VOXELS, (0, 0, 0)), (LABELS, LABEL_VOXELS, (40, 20, 20))):
        array = create_array(zarr, name, voxels.shape, voxel_size=(40, 4, 4), offset=offset, dtype=voxels.dtype)
        array[:] = voxels
    return zarr, write_table(server, url=f"{server.url}/funke/{{volume}}.zarr/")


def test_zarr_in_a_bucket(server):
    zarr, table = served_zarr(server)
    files = [path for path in zarr.rglob("*") if path.is_file()]
    (server.folder / "funke" / "cube.zarr_other").write_text("not asked for")
    assert len(files) > 2 * server.page
    server.cuts = [10] * 3
    check_cube(download(server, table=table))
    assert server.sent == sum(path.stat().st_size for path in files)
    record = json.loads((server.folder.parent / "train" / "downloads" / "cubes" / "cube.json").read_text())
    assert (record["files"], record["compared_with_published_checksums"]) == (len(files), True)


def test_bucket_goes_on_file_by_file(server):
    zarr, table = served_zarr(server)
    some = next(path for path in zarr.rglob("*") if path.is_file() and path.stat().st_size > 1000)
    whole = some.read_bytes()

    class Stingy(type(server)):
        def send(self, request, content, asked):
            if content == whole:
                request.send_error(403)
            else:
                super().send(request, content, asked)

    server.__class__ = Stingy
    with pytest.raises(UserError, match="403"):
        download(server, table=table, threads=1)
    server.__class__ = Server
    check_cube(download(server, table=table))
    assert server.sent == sum(path.stat().st_size for path in zarr.rglob("*") if path.is_file())


@pytest.mark.parametrize("key", ["funke/cube.zarr/../../evil", "funke/cube.zarr//evil", "funke/cube.zarr/a\\b"])
def test_bucket_cannot_write_elsewhere(server, key, monkeypatch):
    _, table = served_zarr(server)
    page = f"<r><Contents><Key>{key}</Key><Size>3</Size></Contents></r>"
    monkeypatch.setattr(server, "list", lambda request: server.send(request, page.encode(), None))
    with pytest.raises(UserError, match="which is no file"):
        download(server, table=table)


def test_empty_and_unreadable_buckets(server, monkeypatch):
    _, table = served_zarr(server)
    monkeypatch.setattr(server, "list", lambda request: server.send(request, b"<html", None))
    with pytest.raises(UserError, match="lists no files"):
        download(server, table=table)
    monkeypatch.setattr(server, "list", lambda request: server.send(request, b"<r></r>", None))
    with pytest.raises(UserError, match="holds no files"):
        download(server, table=table)


def test_tiffs_in_a_zip(server, tmp_path):
    with zipfile.ZipFile(server.folder / "cube.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, voxels in (("image/raw.tif", RAW_VOXELS), ("seg/labels.tif", (RAW_VOXELS // 9).astype(np.uint16))):
            tifffile.imwrite(tmp_path / "volume.tif", voxels)
            archive.write(tmp_path / "volume.tif", name)
    members = {"raw": "image/raw.tif", "labels": "seg/labels.tif"}
    zarr = download(server, table=write_table(server, url=f"{server.url}/cube.zip", training=False, **members))
    assert np.array_equal(read(open_array(zarr, RAW)), RAW_VOXELS)
    assert np.array_equal(read(open_array(zarr, LABELS)), RAW_VOXELS // 9)
    assert tuple(open_array(zarr, RAW).voxel_size) == (40, 4, 4)
    with pytest.raises(UserError, match="cannot be unpacked"):
        download(server, table=write_table(server, url=f"{server.url}/cube.zip"), overwrite=True)


def test_existing_zarr_is_replaced_only_if_told(server, cube, capsys):
    zarr = server.folder.parent / "train" / "cube.zarr"
    array = create_array(zarr, RAW, (2, 2, 2), voxel_size=(1, 1, 1), offset=(0, 0, 0), dtype=np.uint8)
    array[:] = np.ones((2, 2, 2), np.uint8)
    with pytest.raises(UserError, match=r"cube\.zarr exists"):
        download(server)
    assert server.requests == []
    check_cube(download(server, overwrite=True))
    capsys.readouterr()
    with h5py.File(cube, "a") as file:
        file["more"] = np.arange(5000)
    check_cube(download(server, overwrite=True))
    assert "has changed since" in capsys.readouterr().out
    (zarr / "notes.txt").write_text("mine")
    asked = len(server.requests)
    with pytest.raises(UserError, match=r"notes\.txt"):
        download(server, overwrite=True)
    shutil.rmtree(zarr)
    zarr.symlink_to("elsewhere")
    with pytest.raises(UserError, match="is a link"):
        download(server)
    assert len(server.requests) == asked


def test_volumes_of_the_same_name_need_different_folders(server, cube):
    table = write_table(server)
    entries = json.loads(table.read_text())["data_sets"]
    table.write_text(json.dumps({"data_sets": {"one": entries["cubes"], "two": entries["cubes"]}}))
    with pytest.raises(UserError, match="several data sets have a volume cube"):
        download(server, "one", "two", table=table)
    check_cube(download(server, "two", table=table))


def test_full_disk(server, cube, small_disk):
    disk = small_disk(40)
    with pytest.raises(UserError, match="no room on disk"):
        download(server, to=disk)
    _, table = served_zarr(server)
    (server.folder / "funke" / "cube.zarr" / "large").write_bytes(bytes(100_000))
    server.requests.clear()
    with pytest.raises(UserError, match="no room on disk"):
        download(server, to=disk, table=table)
    assert all("list-type" in path for path, _ in server.requests)


def test_two_processes_do_not_write_the_same_file(server, cube):
    folder = server.folder.parent / "train" / "downloads"
    folder.mkdir(parents=True)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process"):
        download(server)
    os.close(descriptor)
    check_cube(download(server))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"license": None}, "cubes has license None"),
        ({"url": "ftp://example.org/{volume}"}, "cubes has url"),
        ({"url": "http://[example/a.hdf"}, "cubes has url"),
        ({"url": "http://example.org/%2e%2e"}, "must end in the name"),
        ({"volumes": ["../cube"]}, "cubes has volumes"),
        ({"volumes": ["a", "b"], "url": "http://example.org/a.hdf"}, "several volumes at one URL"),
        ({"checksums": {"cube": "md5:12"}}, "cubes has checksums"),
        ({"checksums": {"cube2": "md5:" + "0" * 32}}, "checksums of what is no file"),
        ({"voxel_size": [1, 0, 1]}, "cubes has voxel_size"),
        ({"citations": []}, "the key 'citations'"),
        ({"name": "a"}, "the key 'name'"),
        ({"labels": "volumes/raw"}, "the same name for raw and labels"),
    ],
)
def test_mistakes_in_a_table(server, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        download(server, table=write_table(server, **changes))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"data_sets": {}}', '{"data_sets": {"a": 1}}'])
def test_files_that_are_no_table(server, content, tmp_path):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=r"bad\.json"):
        download(server, table=tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["fib52"], {}, "did you mean fib25?"),
        (["FIB25"], {}, "did you mean fib25?"),
        (["fib25/trvol-250-3"], {}, "did you mean fib25/trvol-250-"),
        (["cremy"], {}, "did you mean cremi?"),
        (["snemi3d"], {"to": None}, "-c CONFIG"),
        (["snemi3d"], {"config": "config_snemi.py"}, "-c CONFIG"),
        (["snemi3d", "DATA.HOME", "x"], {}, "-c CONFIG"),
        (["DATA.HOME", "x"], {"to": None, "config": "config_snemi.py"}, "no data set is named"),
        (["snemi3d", "DATA.HOME", ""], {"to": None, "config": "config_snemi.py"}, "DATA.HOME"),
    ],
)
def test_mistakes_on_the_command_line(server, words, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        download(server, *words, table=TABLE, **options)


def test_script_ends_a_mistake_with_one_line(server, cube):
    script = CHECKOUT / "data_utils" / "download_volumes.py"
    command = [sys.executable, script, "cubes", "--table", write_table(server), "--to", server.folder.parent / "train"]
    server.status = 404
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: http://\S+/cube.hdf gives nothing \(404 .*", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    server.status = None
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_cube(server.folder.parent / "train" / "cube.zarr")


def test_list_shows_every_data_set_that_is_shipped(capsys):
    table = read_table(TABLE)
    chosen = choose(table, list(table))
    names = [volume for _, volume in chosen]
    assert len(set(names)) == len(names)  # so that all fit into one folder
    download_volumes([], config=None, to=None, listed=True, table=None, threads=1, overwrite=False)
    listed = capsys.readouterr().out
    for data_set, volume in chosen:
        assert re.search(rf"^{data_set.name}: ", listed, re.MULTILINE)
        assert volume in listed.split()
    download_volumes(["snemi3d"], config=None, to=None, listed=True, table=None, threads=1, overwrite=False)
    assert "fib25" not in capsys.readouterr().out
