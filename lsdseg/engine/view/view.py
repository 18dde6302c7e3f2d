"""What view.py does: find the samples, make a page of each, and serve them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.config.loader import load_config
from lsdseg.engine.sample import Sample, samples_of
from lsdseg.engine.view.layers import Layer, find_layer, layers_of
from lsdseg.errors import UserError


@dataclass
class Options:
    """What a page shows beside all that is found, and where it is served.

    Attributes:
        compare: two segmentations to show side by side.
        worst: list of quality.py to walk through, one of `walk.LISTS`; None: do not.
        proofread: threshold at which to edit segments. None: the page only shows.
        merge_function: whose scores to edit by.
        author: who edits.
        export_labels: zarr to write instead of a page: ground truth of the segments that were marked as right.
        overwrite: replace that zarr if it exists.
        host: address to listen at.
        port: 0 for any that is free.
    """

    compare: Sequence[str] = ()
    worst: str | None = None
    proofread: float | None = None
    merge_function: str | None = None
    author: str = ""
    export_labels: Path | None = None
    overwrite: bool = False
    host: str = "127.0.0.1"
    port: int = 0


@dataclass
class _Shown:
    """A page to be: a sample, its layers, and the two that are compared."""

    sample: Sample
    layers: list[Layer]
    compare: list[Layer] = field(default_factory=list)


def view(words: Sequence[str], config: str | None, volume: Path | None, **options: object) -> None:
    """Serve a page for a zarr, or for every test volume of a config, until Ctrl-C; or export labels.

    Args:
        words: SAMPLE.zarr, or nothing; then KEY VALUE ... that override the config.
        config: the config file.
        volume: the zarr that SAMPLE.zarr was made from.
        options: the attributes of `Options`.

    Raises:
        UserError: neither a zarr nor a config is given; a zarr is missing or has nothing to show; as for `layers_of`,
            `find_layer`, `open_proofreading`, `read_places`, `listen` and `export_labels`.
    """
    wanted = Options(**options)  # type: ignore[arg-type]
    zarr = Path(words[0]) if words and Path(words[0]).suffix == ".zarr" else None
    if zarr is None and config is None:
        raise UserError("name a zarr or a config: python view.py SAMPLE.zarr, or python view.py -c CONFIG")
    if wanted.compare and wanted.proofread is not None:
        raise UserError("--compare shows segmentations, --proofread edits one: choose one of the two")
    if volume is not None and zarr is None:
        raise UserError("--volume goes with SAMPLE.zarr: a config names its volumes itself")
    cfg = load_config(config, list(words[1:] if zarr else words))
    samples = [Sample(cfg, volume or zarr, zarr)] if zarr else _predicted(cfg)
    if wanted.export_labels:
        _export_labels(samples, wanted.export_labels, wanted)
        return
    shown = [_Shown(sample, layers_of(cfg, sample.volume, sample.output)) for sample in samples]
    for page in shown:
        page.compare = [find_layer(page.layers, name) for name in wanted.compare]
    _serve(shown, wanted)


def _export_labels(samples: Sequence[Sample], target: Path, options: Options) -> None:
    from lsdseg.engine.view.export_labels import export_labels
    from lsdseg.engine.view.proofread import open_proofreading

    if options.proofread is None:
        raise UserError("--export-labels goes with --proofread THRESHOLD, that at which the segments were proofread")
    if len(samples) > 1:
        raise UserError(f"--export-labels takes one volume, and the config has {len(samples)}: name one SAMPLE.zarr")
    proofreading = open_proofreading(samples[0], options.proofread, options.merge_function)
    export_labels(proofreading, samples[0], target, options.overwrite)


def _serve(shown: Sequence[_Shown], options: Options) -> None:
    # Neuroglancer is imported only after all that can be wrong in a volume was found.
    from lsdseg.engine.view.page import links, listen, make_page, serve
    from lsdseg.engine.view.proofread import Editor, open_proofreading
    from lsdseg.engine.view.sizes import Sizes
    from lsdseg.engine.view.walk import Walk, read_places

    places = [(options.worst, read_places(page.sample.output, options.worst)) for page in shown if options.worst]
    edited = [
        open_proofreading(page.sample, options.proofread, options.merge_function, options.author)
        for page in shown
        if options.proofread is not None
    ]
    listen(options.host, options.port)
    pages = [(page.sample.output.stem, make_page(page.layers, page.sample.output.stem, page.compare)) for page in shown]
    for (_, page), of_page in zip(pages, shown, strict=True):
        Sizes(page, of_page.layers, of_page.sample.output)
    for (_, page), proofreading in zip(pages, edited, strict=False):
        Editor(page, proofreading)
    for (_, page), (name, listed) in zip(pages, places, strict=False):
        Walk(page, listed, name)
    serve(links(pages, options.host))


def _predicted(cfg: CfgNode) -> list[Sample]:
    """The samples of the test folder that were predicted. The others are printed."""
    samples = samples_of(cfg)
    found = [sample for sample in samples if sample.output.is_dir()]
    missing = [sample for sample in samples if not sample.output.is_dir()]
    if not found:
        raise UserError(
            f"there is no output {missing[0].output}: run predicter.py with this config first, or show the volume "
            f"alone: python view.py {missing[0].volume}"
        )
    for sample in missing:
        print(f"{sample.volume.name} is left out: there is no output {sample.output}")
    return found
