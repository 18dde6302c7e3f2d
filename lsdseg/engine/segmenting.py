"""Segmentation of one volume by one command, which goes on where it stopped.

A network works on voxels of one size. A volume with others is rescaled to that size, and the segmentation back to the
voxels of the volume. What lies between, and the logs, are in a work folder beside the segmentation.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from lsdseg.config.loader import dump_config, find_config, load_config
from lsdseg.data_utils.formats import PLACE
from lsdseg.data_utils.in_place import is_in_place
from lsdseg.data_utils.layout import RAW
from lsdseg.data_utils.place_files import REMOTE, Place, place_of, write_place
from lsdseg.engine.blocks.lock import run_lock
from lsdseg.engine.chain import Chain, fits_in_memory
from lsdseg.engine.estimate import require_memory, show_estimates
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
        volume: a volume in any of the formats, or a URL.
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
    volume = str(volume) if REMOTE.match(str(volume)) else str(Path(volume).absolute())
    beside = Path.cwd() if REMOTE.match(volume) else Path(volume).parent
    out = Path(out or beside / f"{PurePosixPath(volume).stem}_segmentation.zarr").absolute()
    work = out.with_name(f"{out.stem}_work")
    options = ("-c", str(find_config(config)), *overrides, "DATA.HOME", str(work))
    options += ("CLUSTER.SKIP_FAILED", "True") if skip_failed else ()
    cfg = load_config(options[1], options[2:])
    with TemporaryDirectory() as scratch:
        raw = _named(volume, Path(scratch), cfg.DATA.RAW, resolution)
        chain = Chain(cfg, raw, out, options, blockwise=blockwise)
        check_before_segmenting(raw, out, cfg, list(chain.results))
        chain = Chain(cfg, raw, out, options, blockwise=blockwise or not fits_in_memory(cfg, raw))
        require_memory(chain)
        if dry_run:
            show_estimates(chain)
            return
    with run_lock(work / "lock", f"in {work}"):
        _keep_volume(work, volume)
        chain = replace(chain, raw=_named(volume, work, cfg.DATA.RAW, resolution))
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


def _named(volume: str, work: Path, dataset: str, resolution: Sequence[str] | None) -> Path:
    """Return the zarr, or a file in a work folder that names the volume, if that is no zarr or says no voxel size."""
    path = Path(volume)
    remote = REMOTE.match(volume)
    if not (remote or resolution or is_in_place(path)):
        return path
    place = Place(volume, None if dataset == RAW else dataset) if remote else place_of(path, dataset)
    if resolution:
        place = place._replace(voxel_size=[float(size) for size in resolution])
    named = work / f"{PurePosixPath(volume).stem}{PLACE}"
    write_place(named, place)
    return named


def _keep_volume(work: Path, volume: str) -> None:
    """Note in a work folder which volume it is for.

    Raises:
        UserError: it is for another one, whose results would be replaced.
    """
    note = work / "volume.txt"
    if note.is_file() and (before := note.read_text(encoding="utf-8")) != volume:
        raise UserError(f"{work} belongs to the segmentation of {before}: delete it, or name another output (--out)")
    with write_whole(note) as file:
        file.write_text(volume, encoding="utf-8")
