"""Segmentation of one volume by one command, which goes on where it stopped.

A network works on voxels of one size. The volume is rescaled to that size, and the segmentation back to the voxels of
the volume. What lies between, and the logs, are in a work folder beside the segmentation.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lsdseg.config.loader import dump_config, find_config, load_config
from lsdseg.data_utils.layout import RAW
from lsdseg.data_utils.placement import multiscales_of
from lsdseg.data_utils.replace import HEADERS
from lsdseg.data_utils.stored import ZARR_VERSION
from lsdseg.data_utils.volumes import has_array
from lsdseg.engine.blocks.lock import run_lock
from lsdseg.engine.chain import Chain, Command, fits_in_memory
from lsdseg.engine.estimate import show_estimates
from lsdseg.engine.evaluate.figure import draw_sample
from lsdseg.engine.predict.check import check_before_segmenting
from lsdseg.errors import UserError
from lsdseg.files import write_whole


def segment_volume(
    volume: Path | str,
    config: str,
    overrides: Sequence[str] = (),
    *,
    call: Callable[..., None],
    out: Path | str | None = None,
    resolution: Sequence[str] | None = None,
    blockwise: bool = False,
    skip_failed: bool = False,
    dry_run: bool = False,
) -> None:
    """Write `volumes/segmentation_050` (uint64) for each threshold on the voxels of a volume, and pictures beside it.

    The config is loaded with a work folder as DATA.HOME. The output keeps the segmentations at other thresholds.

    Args:
        volume: a zarr, or what data_utils/to_zarr.py reads, which is copied to a zarr first.
        config: config file.
        overrides: KEY VALUE pairs.
        call: runs a script, see `lsdseg.cli.call_script`.
        out: zarr to write. None: NAME_segmentation.zarr beside the volume.
        resolution: z, y, x voxel size in nm, where the volume does not say.
        blockwise: work block by block even if memory is large enough.
        skip_failed: go on without blocks that fail, see CLUSTER.SKIP_FAILED.
        dry_run: say what it would cost, and do nothing.

    Raises:
        UserError: before anything is written, if the volume or a setting cannot be used, or the output is another's.
    """
    volume = Path(volume).absolute()
    out = Path(out or volume.with_name(f"{volume.stem}_segmentation.zarr")).absolute()
    work = out.with_name(f"{out.stem}_work")
    options = ("-c", str(find_config(config)), *overrides, "DATA.HOME", str(work))
    options += ("CLUSTER.SKIP_FAILED", "True") if skip_failed else ()
    cfg = load_config(options[1], options[2:])
    raw = volume
    if _is_other_format(volume, cfg.DATA.RAW):
        if dry_run:
            raise UserError(f"--dry-run needs a zarr: convert {volume} with data_utils/to_zarr.py first")
        with run_lock(work / "lock", f"in {work}"):
            _keep_volume(work, volume)
            for script, *arguments in _conversion(volume, work, cfg.DATA.RAW, resolution):
                call(script, *arguments)
        raw = _converted(work)
    chain = Chain(cfg, raw, out, options, blockwise=blockwise)
    check_before_segmenting(raw, out, cfg, list(chain.results))
    chain = Chain(cfg, raw, out, options, blockwise=blockwise or not fits_in_memory(cfg, raw))
    if dry_run:
        show_estimates(chain)
        return
    with run_lock(work / "lock", f"in {work}"):
        _keep_volume(work, volume)
        _run(chain, work, call)
    _show_results(chain, work)


def _run(chain: Chain, work: Path, call: Callable[..., None]) -> None:
    """Run the commands that are left."""
    folder = None
    if chain.blockwise:  # logs are written to the current folder, so workers get a config without relative paths
        folder, config = work, ("-c", str(work / "config.yaml"))
        dump_config(chain.cfg, config[1])
        if chain.cfg.DATA.DB_HOST:  # the file does not hold its credentials
            os.environ.setdefault("LSD_DB_URI", chain.cfg.DATA.DB_HOST)
        chain = Chain(chain.cfg, chain.raw, chain.out, config, blockwise=True)
        print(f"python status.py {work} shows how far it is")
    for script, *arguments in chain.commands():
        call(script, *arguments, cwd=folder)


def _show_results(chain: Chain, work: Path) -> None:
    """Draw each segmentation, and say where all is."""
    print()
    for name, (made, _) in chain.results.items():
        stem = chain.out.stem.removesuffix("_segmentation")
        picture = chain.out.with_name(f"{stem}_{name.removeprefix('volumes/')}.png")
        draw_sample(chain.sample, made, picture)
        voxels = f"on the voxels of {chain.raw}/{chain.cfg.DATA.RAW}"
        print(f"{chain.out}/{name}, {voxels}; a section of it is in {picture}")
    print(f"affinities are in {chain.sample.output}; delete {work} if you do not need them")


def _is_other_format(volume: Path, raw: str) -> bool:
    """Return whether a volume must be converted: a file, or a folder that is no zarr with that dataset.

    An OME-Zarr is such a folder, and so is any of format 3 for a zarr library that does not read it.
    """
    if not volume.is_dir():
        return volume.is_file()
    if not any((volume / name).is_file() for name in HEADERS):
        return True
    if ZARR_VERSION < 3 and (volume / "zarr.json").is_file():
        return True
    return bool(multiscales_of(volume)) and not has_array(volume, raw)


def _converted(work: Path) -> Path:
    """Return the zarr in a work folder that a volume in another format is copied to."""
    return work / "volume.zarr"


def _conversion(volume: Path, work: Path, dataset: str, resolution: Sequence[str] | None) -> Iterator[Command]:
    """Yield the command that copies a volume in another format, unless that is done and the volume is the same.

    Args:
        volume: a file or folder.
        work: the work folder.
        dataset: what raw is called in the config, and in the volume if it has several datasets.
        resolution: z, y, x voxel size in nm, where the volume does not say.
    """
    newest = max(file.stat().st_mtime_ns for file in (volume, *volume.rglob("*")))
    stamp, note = f"{newest} {resolution}", work / "converted.txt"
    if _converted(work).is_dir() and note.is_file() and note.read_text(encoding="utf-8") == stamp:
        return
    options = ("--resolution", *resolution) if resolution else ()
    options += () if dataset == RAW else ("--dataset", dataset)
    yield "data_utils/to_zarr.py", str(volume), str(_converted(work)), "--overwrite", *options
    with write_whole(note) as file:
        file.write_text(stamp)


def _keep_volume(work: Path, raw: Path) -> None:
    """Note in a work folder which volume it is for.

    Raises:
        UserError: it is for another one, whose results would be replaced.
    """
    note = work / "volume.txt"
    if note.is_file() and (before := note.read_text(encoding="utf-8")) != str(raw):
        raise UserError(f"{work} belongs to the segmentation of {before}: delete it, or name another output (--out)")
    with write_whole(note) as file:
        file.write_text(str(raw), encoding="utf-8")
