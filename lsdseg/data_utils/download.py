"""Downloading public data sets, and laying them out for training.

FOLDER/VOLUME.zarr                          a volume, as data_utils/to_zarr.py would make it
FOLDER/downloads/DATASET/VOLUME.json        its record: URL, license, citation, checksum
FOLDER/downloads/DATASET/VOLUME/            what was downloaded of it, until its zarr is complete

A record is written when a download is complete. A volume with a record and a zarr is done, and nothing is asked of a
server.
"""

import datetime
import fcntl
import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.config.loader import load_config
from lsdseg.data_utils.convert import convert_source, print_arrays
from lsdseg.data_utils.fetch import Progress, Remote, digest, fetch, list_folder
from lsdseg.data_utils.formats import Source, Volume, choose_volume, open_source
from lsdseg.data_utils.layout import LABELS, RAW, SPLITS, data_folder
from lsdseg.data_utils.placement import voxel_size_nm
from lsdseg.data_utils.public import TABLE, DataSet, choose, describe, file_name, read_table, volume_url
from lsdseg.data_utils.replace import check_replaceable_zarr
from lsdseg.data_utils.volumes import open_array
from lsdseg.errors import UserError
from lsdseg.files import explain_os_errors, read_json, room_on_disk, write_whole

KEY = re.compile(r"[A-Z_]+\.[A-Z0-9_]+")  # what begins the settings on a command line
DOWNLOADS = "downloads"
ZIP = ".zip"


class Job(NamedTuple):
    """A volume to download.

    Attributes:
        data_set: what it belongs to.
        volume: its name.
        target: the zarr to write.
        record: the file that tells what was downloaded.
        folder: where the download lies until the zarr is complete.
    """

    data_set: DataSet
    volume: str
    target: Path
    record: Path
    folder: Path

    @property
    def url(self) -> str:
        """Where the volume is."""
        return volume_url(self.data_set, self.volume)

    @property
    def file(self) -> Path:
        """The file or folder that the download becomes."""
        return self.folder / file_name(self.url)


def download_volumes(
    words: Sequence[str],
    *,
    config: str | None,
    to: Path | None,
    listed: bool,
    table: Path | None,
    threads: int,
    overwrite: bool,
) -> None:
    """Download volumes, and convert each to a zarr; or print what there is.

    Args:
        words: names as for `public.choose`, then with `config` perhaps pairs KEY VALUE.
        config: config file whose folders `train/` and `test/` get the volumes.
        to: or the folder that gets them.
        listed: only print what the table says of them, or of all data sets.
        table: table of data sets. None: that of this package.
        threads: files to download at a time.
        overwrite: download volumes that are there already, and replace them.

    Raises:
        UserError: there is no such data set, folder or key; a zarr exists that was not downloaded; another process
            downloads to the same folder; or as for `fetch` and `convert`.
    """
    known = read_table(table or TABLE)
    count = next((number for number, word in enumerate(words) if KEY.fullmatch(word)), len(words))
    names, overrides = words[:count], words[count:]
    chosen = choose(known, names or (list(known) if listed else []))
    if listed:
        print(*(describe(data_set) for data_set in _data_sets(chosen)), sep="\n\n")
        return
    if not names:
        raise UserError("no data set is named: give one or more names, as --list shows them")
    if (config is None) == (to is None) or (overrides and config is None):
        raise UserError("where to write is not clear: give either -c CONFIG, perhaps with KEY VALUE, or --to FOLDER")
    cfg = load_config(config, overrides) if config else None
    jobs = [_job(data_set, volume, to or _folder(cfg, data_set)) for data_set, volume in chosen]
    if twice := {job.volume for job in jobs if sum(job.target == other.target for other in jobs) > 1}:
        raise UserError(f"several data sets have a volume {min(twice)}: download them to different folders, one by one")
    todo = [job for job in jobs if not _is_done(job, overwrite)]
    for data_set in _data_sets([(job.data_set, job.volume) for job in todo]):
        print(f"{data_set.name}: {data_set.title}. License: {data_set.license}")
        print(*(f"  please cite: {text}" for text in data_set.citation), sep="\n", flush=True)
    with ExitStack() as locks:
        for folder in {job.record.parents[1] for job in todo}:
            locks.enter_context(_only_one(folder))
        _download_and_convert(todo, threads)
    for job in jobs:
        if job not in todo:
            print(f"{job.target} was there already")
        print_arrays(job.target)
        if cfg is not None:
            _compare_voxel_size(job, cfg, config)


def _data_sets(chosen: Sequence[tuple[DataSet, str]]) -> list[DataSet]:
    """Return every data set once."""
    return list({data_set.name: data_set for data_set, _ in chosen}.values())


def _folder(cfg: CfgNode | None, data_set: DataSet) -> Path:
    """Return the folder of a config for the volumes of a data set; sections for 2D are taken from there, too."""
    if cfg is None or not cfg.DATA.HOME:
        raise UserError("DATA.HOME is empty: set it to the folder for your data")
    train, test = SPLITS
    folder = data_folder(cfg, train if data_set.training else test)
    return folder.parents[1] / "data_3d" / folder.name


def _job(data_set: DataSet, volume: str, folder: Path) -> Job:
    downloads = folder / DOWNLOADS / data_set.name
    return Job(data_set, volume, folder / f"{volume}.zarr", downloads / f"{volume}.json", downloads / volume)


def _is_done(job: Job, overwrite: bool) -> bool:
    """Return whether a volume is there.

    Raises:
        UserError: something else has its name.
    """
    if overwrite or not job.target.exists():
        check_replaceable_zarr(job.target)
        return False
    if _recorded(job).get("url") != job.url:
        raise UserError(
            f"{job.target} exists, and was not downloaded from {job.url}: add --overwrite, or write elsewhere"
        )
    return True


def _recorded(job: Job) -> dict[str, object]:
    """Return the record of a download, nothing if there is none."""
    return read_json(job.record, "delete it, and run the same command again") if job.record.is_file() else {}


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep a second process from downloading to the same folder."""
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process downloads to {folder}: wait until it ends, or write elsewhere") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _download_and_convert(jobs: Sequence[Job], threads: int) -> None:
    """Download the files of all volumes in parallel, and convert each volume as soon as it is complete."""
    with (
        tqdm(desc="downloading", unit="B", unit_scale=True, disable=not jobs) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        progress = Progress(bar)
        try:
            files = list(pool.map(lambda job: _files(job, progress), jobs))
            _check_room(jobs, [file for remotes in files for file in remotes], progress)
            downloads = [[pool.submit(fetch, file, progress) for file in remotes] for remotes in files]
            for job, remotes, running in zip(jobs, files, downloads, strict=True):
                for download in running:
                    download.result()
                _record(job, remotes)
                _convert(job)
        except BaseException:
            progress.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _files(job: Job, progress: Progress) -> list[Remote]:
    """Return the files of a volume."""
    if job.url.endswith("/"):
        return list_folder(job.url, job.file, progress.stopped)
    return [Remote(job.url, job.file, checksum=job.data_set.checksums.get(job.volume))]


def _check_room(jobs: Sequence[Job], files: Sequence[Remote], progress: Progress) -> None:
    """Tell the bar how many bytes there are, as far as a listing says, and check that they fit on the disk."""
    progress.expect(sum(file.size or 0 for file in files))
    missing = sum(file.size or 0 for file in files if not file.path.is_file())
    for folder in {job.record.parent for job in jobs}:
        with room_on_disk(folder, missing):
            pass


def _record(job: Job, files: Sequence[Remote]) -> None:
    """Keep what was downloaded, with license and citation, beside the volume. Say so if no checksum was published."""
    sums = {file.path.relative_to(job.folder).as_posix(): digest(file.path, "sha256") for file in files}
    (only,) = sums.values() if len(sums) == 1 else (None,)
    lines = "".join(f"{checksum}  {name}\n" for name, checksum in sorted(sums.items()))
    found = only or hashlib.sha256(lines.encode()).hexdigest()
    before = _recorded(job)
    if before.get("url") == job.url and before.get("sha256") not in (None, found):
        tqdm.write(f"warning: {job.url} has changed since {before.get('date')}: sha256 was {before['sha256']}")
    published = all(file.checksum for file in files)
    if not published:
        tqdm.write(f"{job.url}: no checksum is published; sha256 {found} is recorded in {job.record}")
    record = {
        "url": job.url,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "files": len(files),
        "bytes": sum(file.path.stat().st_size for file in files),
        "sha256": found,
        "compared_with_published_checksums": published,
        "license": job.data_set.license,
        "license_from": job.data_set.license_from,
        "citation": list(job.data_set.citation),
    }
    with write_whole(job.record) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _convert(job: Job) -> None:
    """Write the zarr of a volume that was downloaded, and delete the download."""
    try:
        volumes: list[Volume] = []
        with ExitStack() as opened:
            for name, (path, dataset) in zip((RAW, LABELS), _places(job), strict=True):
                source = opened.enter_context(open_source(path))
                volumes.append(choose_volume(source, name, dataset, path, "in the table of data sets"))
                volumes[-1] = volumes[-1]._replace(name=name)
            convert_source(Source(volumes, []), job.file, job.target, (None, None), job.data_set.voxel_size)
    except UserError as error:
        raise UserError(f"{error}; the download is kept in {job.folder}: delete it to download it again") from error
    shutil.rmtree(job.folder)


def _places(job: Job) -> list[tuple[Path, str | None]]:
    """Return where raw and labels are: a file, and the dataset in it. From an archive, files with one are unpacked."""
    names = (job.data_set.raw, job.data_set.labels)
    if job.file.suffix.lower() != ZIP:
        return [(job.file, name) for name in names]
    try:
        with zipfile.ZipFile(job.file) as archive:
            return [(_unpack(archive, name, job.folder), None) for name in names]
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{job.file} cannot be unpacked ({str(error)[:150]}): use another copy") from error


def _unpack(archive: zipfile.ZipFile, name: str, folder: Path) -> Path:
    path = folder / "unpacked" / name.replace("/", "_")
    member = archive.getinfo(name)
    with (
        room_on_disk(path, member.file_size),
        write_whole(path) as partial,
        open(partial, "wb") as target,
        archive.open(member) as source,
    ):
        shutil.copyfileobj(source, target)
    return path


def _compare_voxel_size(job: Job, cfg: CfgNode, config: str | None) -> None:
    """Warn if the network of a config expects other voxels."""
    size = voxel_size_nm(open_array(job.target, RAW))
    if size != tuple(cfg.MODEL.VOXEL_SIZE):
        section = "MODEL_ISO" if cfg.DATA.FIB else "MODEL_ANISO"
        print(
            f"warning: {job.target} has voxels of {size} nm, but {section}.VOXEL_SIZE in {config} is "
            f"{tuple(cfg.MODEL.VOXEL_SIZE)}: set it, or resample with data_utils/rescale.py"
        )
