"""What view.py does: find the samples, make a page of each, and serve them."""

from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.config.loader import load_config
from lsdseg.engine.sample import samples_of
from lsdseg.engine.view.layers import Layer, find_layer, layers_of
from lsdseg.errors import UserError

# A volume and its output; either may be missing.
Found = tuple[Path | None, Path | None]


def view(
    words: Sequence[str],
    config: str | None,
    volume: Path | None,
    compare: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 0,
) -> None:
    """Serve a page for a zarr, or for every test volume of a config, until Ctrl-C.

    Args:
        words: SAMPLE.zarr, or nothing; then KEY VALUE ... that override the config.
        config: the config file.
        volume: the zarr that SAMPLE.zarr was made from.
        compare: two segmentations to show side by side.
        host: address to listen at.
        port: 0 for any that is free.

    Raises:
        UserError: neither a zarr nor a config is given; a zarr is missing or has nothing to show; as for `layers_of`,
            `find_layer` and `listen`.
    """
    zarr = Path(words[0]) if words and Path(words[0]).suffix == ".zarr" else None
    if (zarr is None) == (config is None):
        raise UserError("name either a zarr or a config: python view.py SAMPLE.zarr, or python view.py -c CONFIG")
    if volume is not None and zarr is None:
        raise UserError("--volume goes with SAMPLE.zarr: a config names its volumes itself")
    cfg = load_config(config, list(words[1:] if zarr else words))
    found = [(volume, zarr)] if zarr else _samples(cfg)
    shown = [(layers, _title(*paths)) for paths in found for layers in [layers_of(cfg, *paths)]]
    sides = [[find_layer(layers, name) for name in compare] for layers, _ in shown]
    _serve(shown, sides, host, port)


def _serve(shown: Sequence[tuple[list[Layer], str]], sides: Sequence[list[Layer]], host: str, port: int) -> None:
    # Neuroglancer is imported only after all that can be wrong was checked.
    from lsdseg.engine.view.page import links, listen, make_page, wait

    listen(host, port)
    pages = [(title, make_page(layers, title, side)) for (layers, title), side in zip(shown, sides, strict=True)]
    print(links(pages, host), flush=True)
    wait()


def _samples(cfg: CfgNode) -> list[Found]:
    """The volumes of the test folder that were predicted, and their outputs. The others are printed."""
    samples = samples_of(cfg)
    found: list[Found] = [(sample.volume, sample.output) for sample in samples if sample.output.is_dir()]
    missing = [sample for sample in samples if not sample.output.is_dir()]
    if not found:
        raise UserError(
            f"there is no output {missing[0].output}: run predicter.py with this config first, or show the volume "
            f"alone: python view.py {missing[0].volume}"
        )
    for sample in missing:
        print(f"{sample.volume.name} is left out: there is no output {sample.output}")
    return found


def _title(volume: Path | None, output: Path | None) -> str:
    return (output or volume or Path()).stem
