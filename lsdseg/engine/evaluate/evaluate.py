"""Score all segmentations of the test volumes. A report, tables and a plot are written beside the output zarr.

Volumes are read slab by slab and never copied. Only the table of overlaps stays in memory, see
`lsdseg.engine.evaluate.metrics`.
"""

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from funlib.geometry import Coordinate, Roi
from funlib.persistence import Array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.typing import LineStyleType
from numpy.typing import NDArray
from tqdm import tqdm
from yacs.config import CfgNode

from lsdseg.data_utils.checks import check_labels
from lsdseg.data_utils.labels import is_labeled
from lsdseg.data_utils.layout import FRAGMENTS, SEGMENTATIONS, neurons_path, scores_path
from lsdseg.data_utils.placement import in_picometers, nanometers, offset_nm, voxel_size_nm
from lsdseg.data_utils.records import Record, record_of
from lsdseg.data_utils.skeletons import Skeleton
from lsdseg.data_utils.swc import read_skeletons
from lsdseg.data_utils.volumes import (
    has_array,
    list_arrays,
    open_array,
    read,
    require_whole,
    slabs,
    source_defaults,
    voxels_of,
)
from lsdseg.engine.evaluate.metrics import (
    VARIANTS,
    Table,
    count_overlaps,
    list_mistakes,
    list_neurons,
    scores,
)
from lsdseg.engine.evaluate.report import Shown, render
from lsdseg.engine.evaluate.skeletons import make_skeletons, score_skeletons
from lsdseg.engine.sample import Sample, samples_of
from lsdseg.engine.sections import ids_by_section, scored_by_section
from lsdseg.errors import UserError
from lsdseg.files import write_whole

SCORES = ("voi_split", "voi_merge", "voi_sum", "adapted_rand_error", "segments")
VARIANT_SCORES = tuple(f"{score}_{variant}" for variant in VARIANTS for score in SCORES)
RUN_LENGTHS = ("erl_nm", "normalized_erl")
EDITS = ("splits_needed", "merges_needed")
COLUMNS = (
    "dataset",
    "written",
    "method",
    "merge_function",
    "threshold",
    *SCORES,
    *VARIANT_SCORES,
    *RUN_LENGTHS,
    *EDITS,
)
NEURON_COLUMNS = (
    "neuron",
    "voxels",
    "segments",
    "merged",
    "merged_with",
    "split_share",
    "merge_share",
    "share",
)
# Ground truth with more voxels is scored slab by slab only, without what needs all of it in memory.
MAX_VOXELS = 2**28
MOST_PICTURES = 10
# Colors of Okabe and Ito, which color-blind readers can tell apart.
COLORS = {"voi_split": "#0072B2", "voi_merge": "#D55E00", "voi_sum": "#000000"}
LINE_STYLES: tuple[LineStyleType, ...] = ("-", "--", ":", "-.")

# What `score_sample` returns.
Report = dict[str, Any]


@dataclass
class FromGraph:
    """What the region adjacency graph of a sample adds to its scores.

    Attributes:
        unwritten: segmentations that are no datasets of the output: the dataset that each would be -> array.
        edits_needed: returns the columns EDITS of a segmentation; nothing if it was not made from the graph.
    """

    unwritten: Mapping[str, Array] = field(default_factory=dict)
    edits_needed: Callable[[Array], Mapping[str, int]] = lambda _: {}


def evaluate(
    cfg: CfgNode,
    skeletons: Path | None = None,
    truth_file: Path | None = None,
    truth_dataset: str | None = None,
    fragments: str = FRAGMENTS,
    from_graph: Callable[[Sample], FromGraph] = lambda _: FromGraph(),
) -> None:
    """Score every segmentation of every test volume that has ground truth, DATA.NEURON_LABELS in its zarr.

    If sections were not linked, they are scored one by one: an object counts as a new object in each section. Writes
    SAMPLE_scores.html, .json, .csv and .png and SAMPLE_scores_neurons.csv beside the output zarr, and prints the table.

    Args:
        cfg: the config.
        skeletons: an SWC file or a folder of them, in nm. None: skeletons of the ground truth.
        truth_file: a zarr with the ground truth. None: the volume itself.
        truth_dataset: the ground truth in it. None: DATA.NEURON_LABELS.
        fragments: dataset of the fragments, which are scored if they are there.
        from_graph: what the graph of a sample adds.

    Raises:
        UserError: no volume has ground truth, or a volume that has was not segmented; SWC files are broken.
    """
    given = None if skeletons is None else read_skeletons(skeletons)
    work = []
    for sample in _with_truth(samples_of(cfg), truth_file, truth_dataset):
        if sample.ground_truth is None:
            print(f"{sample.volume.name} is left out: it has no ground truth {sample.truth_dataset}")
            continue
        if fragments != FRAGMENTS:
            open_array(sample.output, fragments)  # must be there if it is named
        graph = from_graph(sample)
        names = [] if graph.unwritten and not written_in(sample.output) else segmentations_in(sample.output)
        names = [name for name in names if name not in (FRAGMENTS, fragments)]
        work.append((sample, [fragments] * has_array(sample.output, fragments) + names, graph))
    if not work:
        raise UserError(
            f"no test volume has {cfg.DATA.NEURON_LABELS}; add ground truth, or name it in DATA.NEURON_LABELS"
        )
    for sample, names, graph in work:
        report = score_sample(sample, names, given, fragments, graph)
        print(format_table(report))
        _write_files(sample, report, graph)
        if report["best"] in graph.unwritten:
            made_by = graph.unwritten[report["best"]].attrs
            at = f"-mf {made_by['merge_function']} -th {made_by['threshold']:g}"
            print(f"to write it: python 05_extract_segmentation_from_lut.py -c CONFIG {at}")
        print(f"best         {report['best']}")
        print(f"report       {scores_path(sample.output, 'html')}; numbers and a plot are beside it")


def _write_files(sample: Sample, report: Report, graph: FromGraph) -> None:
    """Write the scores of a sample, and what they say of its best segmentation."""
    best = _open(sample, report["best"], graph.unwritten)
    table = _count_overlaps(sample, best)
    neurons = list_neurons(*table)
    for path, content in (
        (scores_path(sample.output), json.dumps(report, indent=2).encode()),
        (scores_path(sample.output, "csv"), _csv(report["scores"], COLUMNS).encode()),
        (scores_path(sample.output, "png"), _plot(report)),
        (neurons_path(sample.output), _csv(neurons, NEURON_COLUMNS).encode()),
        (scores_path(sample.output, "html"), _html(sample, report, best, table, neurons).encode()),
    ):
        with write_whole(path) as partial:
            partial.write_bytes(content)


def _with_truth(samples: list[Sample], file: Path | None, dataset: str | None) -> list[Sample]:
    """Let samples find their ground truth in another file or dataset.

    Raises:
        UserError: it is not there, or one file is given for several volumes.
    """
    if file is not None and len(samples) > 1:
        raise UserError(
            f"there are {len(samples)} test volumes, but one -gt_file {file}: leave one volume in the folder"
        )
    for sample in samples:
        sample.truth_file = sample.truth_file if file is None else file
        sample.truth_dataset = dataset or sample.truth_dataset
        if file is not None or dataset is not None:
            open_array(sample.truth_file, sample.truth_dataset, **source_defaults(sample.cfg))
    return samples


def _count_overlaps(sample: Sample, segmentation: Array) -> Table:
    assert sample.ground_truth is not None
    shared = overlaps(segmentation, sample.ground_truth, sample.ground_truth_mask, description="neurons")
    return count_overlaps(shared)


def _html(sample: Sample, report: Report, best: Array, table: Table, neurons: Sequence[Mapping[str, Any]]) -> str:
    """Make the report of a sample: its scores, and what went wrong in the best segmentation."""
    notes = ["Neurons and errors are those of the volume, not of single sections."] * report["by_section"]
    pictures: list[str] = []
    mistakes: dict[str, str] = {}
    whole = shared_labels(sample, best)
    if whole is None or sample.ground_truth is None:
        notes.append(
            f"No pictures: the ground truth has more than {MAX_VOXELS} voxels. Score a part of it to see them."
        )
    elif not has_array(sample.volume, sample.cfg.DATA.RAW) or sample.raw.voxel_size != best.voxel_size:
        notes.append(f"No pictures: {sample.cfg.DATA.RAW} is missing, or has other voxels than the segmentation.")
    else:
        begin = shared_roi(best, sample.ground_truth, sample.ground_truth_mask).begin
        shown = Shown(sample.raw, *whole, begin, best)
        pictures = shown.overview()
        found = list_mistakes(*table, MOST_PICTURES)
        for number, mistake in enumerate(tqdm(found, "pictures", leave=False, delay=2), 1):
            mistakes |= dict([shown.mistake(mistake, number)])
    return render(report, neurons, pictures, mistakes, notes)


def segmentations_in(path: Path) -> list[str]:
    """Return the names of the segmentations in an output zarr. If there are fragments, they come first.

    Raises:
        UserError: there is no segmentation.
    """
    segmentations = written_in(path)
    if not segmentations:
        raise UserError(f"no volumes/segmentation_* in {path}; run instance_segmenter.py first")
    return [FRAGMENTS] * has_array(path, FRAGMENTS) + segmentations


def written_in(path: Path) -> list[str]:
    """Return the names of the segmentations in an output zarr, perhaps none."""
    return [name for name in list_arrays(path) if SEGMENTATIONS.fullmatch(name)]


def _open(sample: Sample, name: str, unwritten: Mapping[str, Array]) -> Array:
    return unwritten[name] if name in unwritten else open_array(sample.output, name)


def score_sample(
    sample: Sample,
    names: Sequence[str],
    given: Mapping[str, Skeleton] | None = None,
    fragments: str = FRAGMENTS,
    graph: FromGraph | None = None,
) -> Report:
    """Score datasets in a sample's output against its ground truth.

    Args:
        sample: the sample.
        names: the datasets.
        given: skeletons by name. None: they are made from the ground truth. Sections have none.
        fragments: the dataset of `names` that is no segmentation and cannot be the best.
        graph: what it adds; None: nothing.

    Returns:
        sample, ground_truth: path of the volume, and name of its labels.
        by_section: whether sections were scored one by one.
        objects, voxels: how many the ground truth has.
        best: the segmentation with the lowest VOI sum.
        scores: a list of dicts with the keys COLUMNS, one per dataset. Scores of variants (`VARIANTS`) and run lengths
            are None where the ground truth has more than MAX_VOXELS voxels, or nothing is left to score; edits, where a
            segmentation was not made from a graph.
        skeletons: of the best segmentation, what `score_skeletons` returns; None if there are none.

    Raises:
        UserError: there is no ground truth, labels are no unsigned (z, y, x), or they do not meet (see `overlaps`).
    """
    truth, truth_name = sample.ground_truth, sample.truth_dataset
    if truth is None:
        raise UserError(f"{sample.volume} has no ground truth {truth_name}: add it, or name it in DATA.NEURON_LABELS")
    check_labels(truth, f"{truth_name} in {sample.truth_file}")
    rows: list[dict[str, Any]] = []
    made_from, runs = dict[str, Any](), dict[str, Any]()
    by_section, graph = scored_by_section(sample.cfg), graph or FromGraph()
    for name in (*names, *graph.unwritten):
        require_whole(sample.output, name)
        segmentation = _open(sample, name, graph.unwritten)
        check_labels(segmentation, f"{name} in {sample.output}")
        rows.append({"dataset": name, "written": name not in graph.unwritten})
        rows[-1] |= {key: segmentation.attrs.get(key) for key in ("method", "merge_function", "threshold")}
        rows[-1] |= _score_all_voxels(sample, name, segmentation, by_section)
        rows[-1] |= _score_variants(sample, segmentation, by_section)
        if not by_section:
            runs[name], given = _score_runs(sample, segmentation, given)
            rows[-1] |= {**_run_lengths(runs[name]), **graph.edits_needed(segmentation)}
        made_from |= {name: record.to_json()} if (record := record_of(segmentation)) else {}
    best = min((row for row in rows if row["dataset"] != fragments), key=lambda row: row["voi_sum"])["dataset"]
    return {
        "sample": str(sample.volume),
        "ground_truth": truth_name,
        "by_section": by_section,
        **{key: rows[0][key] for key in ("objects", "voxels")},
        "best": best,
        "scores": [{key: row.get(key) for key in COLUMNS} for row in rows],
        "skeletons": runs.get(best),
        "made_from": made_from,
    }


def _score_all_voxels(sample: Sample, name: str, segmentation: Array, by_section: bool) -> dict[str, float]:
    """Score a segmentation against the whole ground truth, slab by slab."""
    truth, mask = sample.ground_truth, sample.ground_truth_mask
    assert truth is not None
    try:
        return scores(*count_overlaps(overlaps(segmentation, truth, mask, by_section=by_section, description=name)))
    except ValueError as error:
        truth_name = f"{sample.truth_dataset} in {sample.truth_file}"
        raise UserError(f"{name} in {sample.output} and {truth_name}: {error}") from error


def _score_variants(sample: Sample, segmentation: Array, by_section: bool) -> dict[str, float | None]:
    """Score a segmentation against each variant of the ground truth."""
    found: dict[str, float | None] = dict.fromkeys(VARIANT_SCORES)
    whole = shared_labels(sample, segmentation)
    if whole is None:
        return found
    labels, truth = whole
    for variant, make in VARIANTS.items():
        parts = make(truth, by_section)
        if by_section:
            pair = (ids_by_section(labels, 0, {}), np.where(parts > 0, ids_by_section(parts, 0, {}), 0))
        else:
            pair = (labels, parts)
        if parts.any():
            row = scores(*count_overlaps([pair]))
            found |= {f"{score}_{variant}": row[score] for score in SCORES}
    return found


def _run_lengths(found: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the columns RUN_LENGTHS of a row."""
    return {} if found is None else dict(zip(RUN_LENGTHS, (found["erl"], found["normalized_erl"]), strict=True))


def _score_runs(
    sample: Sample, segmentation: Array, skeletons: Mapping[str, Skeleton] | None
) -> tuple[dict[str, Any] | None, Mapping[str, Skeleton] | None]:
    """Score a segmentation by skeletons. If none are given, they are made, and returned for the next segmentation.

    Raises:
        UserError: none of those that are given lies inside.
    """
    whole = shared_labels(sample, segmentation)
    if whole is None or sample.ground_truth is None:
        return None, skeletons
    roi = shared_roi(segmentation, sample.ground_truth, sample.ground_truth_mask)
    begin, voxel_size = nanometers(roi.begin, segmentation), voxel_size_nm(segmentation)
    made = make_skeletons(whole[1], voxel_size, begin) if skeletons is None else skeletons
    try:
        return score_skeletons(made, whole[0], voxel_size, begin), made
    except ValueError as error:
        if skeletons is None:  # all objects are too small
            return None, skeletons
        raise UserError(f"{error} of {sample.output}: check that SWC files are in nm, in the order x y z") from error


def shared_labels(sample: Sample, segmentation: Array) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Read a segmentation and the ground truth in the ROI that they share (`shared_roi`).

    Returns:
        Both (z, y, x); the ground truth is 0 where nothing is known. None if they have more than MAX_VOXELS voxels.
    """
    truth, mask = sample.ground_truth, sample.ground_truth_mask
    if truth is None:
        return None
    roi = shared_roi(segmentation, truth, mask)
    if math.prod(roi.shape / segmentation.voxel_size) > MAX_VOXELS:
        return None
    return _read_pair(segmentation, truth, mask, roi)


def shared_roi(segmentation: Array, ground_truth: Array, mask: Array | None = None) -> Roi:
    """Return the ROI in which label volumes lie on the same voxels.

    Raises:
        ValueError: the voxels differ in size, or their grids are shifted by part of a voxel.
    """
    roi, grid = segmentation.roi, in_picometers(segmentation)
    for array in (ground_truth, *([] if mask is None else [mask])):
        own, whole = voxel_size_nm(array), voxel_size_nm(segmentation)
        if own != whole:
            raise ValueError(
                f"voxel sizes differ: {whole} and {own} nm; bring the ground truth to "
                "the voxels of the segmentation with data_utils/rescale.py --labels"
            )
        if any((in_picometers(array).offset - grid.offset) % grid.voxel_size):
            offsets = f"{offset_nm(segmentation)} and {offset_nm(array)}"
            raise ValueError(f"offsets {offsets} nm differ by part of a voxel")
        roi = roi.intersect(array.roi)
    return roi


def _read_pair(
    segmentation: Array, ground_truth: Array, mask: Array | None, roi: Roi
) -> tuple[NDArray[Any], NDArray[Any]]:
    labels, truth = (read(array, voxels_of(array, roi)) for array in (segmentation, ground_truth))
    known = (truth != 0) & is_labeled(truth)
    if mask is not None:
        known &= read(mask, voxels_of(mask, roi)) != 0
    return labels, np.where(known, truth, 0)


def overlaps(
    segmentation: Array,
    ground_truth: Array,
    mask: Array | None = None,
    *,
    by_section: bool = False,
    max_bytes: int = 2**27,
    description: str | None = None,
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Read two label volumes slab by slab in the ROI that they share.

    Args:
        segmentation: array on disk, as `open_array` returns it.
        ground_truth: the same.
        mask: a third array, which restricts the ROI too. The ground truth becomes 0 where the mask is 0, and where its
            id means "unlabeled".
        by_section: give segments and objects different ids in each section.
        max_bytes: size of a slab of the segmentation.
        description: text on the progress bar.

    Yields:
        A slab of the segmentation, and the same voxels of the ground truth.

    Raises:
        ValueError: the voxels differ in size, or their grids are shifted by part of a voxel.
    """
    voxel_size = segmentation.voxel_size
    roi = shared_roi(segmentation, ground_truth, mask)
    segment_numbers: dict[int, int] = {}
    object_numbers: dict[int, int] = {}
    for slab in tqdm(slabs(segmentation, max_bytes), description, unit="slab", leave=False, delay=2):
        begin = segmentation.offset + Coordinate(s.start for s in slab) * voxel_size
        part = Roi(begin, Coordinate(s.stop - s.start for s in slab) * voxel_size).intersect(roi)
        if part.empty:
            continue
        labels, truth = _read_pair(segmentation, ground_truth, mask, part)
        known = truth != 0
        if by_section:
            section = (part.begin[0] - roi.begin[0]) // voxel_size[0]
            labels = ids_by_section(labels, section, segment_numbers)
            truth = ids_by_section(truth, section, object_numbers)
        yield labels, np.where(known, truth, 0)


def format_table(report: Report) -> str:
    """Format the scores in a report as text, with one line per dataset."""
    names = [row["dataset"] if row["written"] else f"{row['dataset']} (not written)" for row in report["scores"]]
    width = max(map(len, names))
    lines = [
        f"{report['sample']}: {report['objects']} objects, {report['voxels'] / 1e6:.2f} million voxels"
        + ", section by section" * report["by_section"],
        f"{'':{width}}  VOI split   merge     sum  adapted Rand error  segments",
    ]
    for name, row in zip(names, report["scores"], strict=True):
        lines.append(
            f"{name:{width}}  {row['voi_split']:9.3f} {row['voi_merge']:7.3f} {row['voi_sum']:7.3f}"
            f"  {row['adapted_rand_error']:18.3f}  {row['segments']:8d}"
        )
    if made_from := Record.from_json(report["made_from"].get(report["best"])):
        lines.append(f"{report['best']} is {made_from}")
    return "\n".join(lines)


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(
        {key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()} for row in rows
    )
    return text.getvalue()


def _plot(report: Report) -> bytes:
    """Plot the VOI over the thresholds, as a PNG.

    Each score has a color, and each merge function and each method without thresholds a line style.
    """
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["scores"]:
        if row["dataset"] != FRAGMENTS and SEGMENTATIONS.fullmatch(row["dataset"]):
            kind, _, rest = row["dataset"].removeprefix("volumes/").partition("segmentation_")
            name = f"{kind}{rest if row['threshold'] is None else row['merge_function']}"
            series.setdefault(name.replace("_", " "), []).append(row)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    keys = [Line2D([], [], color=color, label=score.removeprefix("voi_")) for score, color in COLORS.items()]
    for style, (name, rows) in zip(itertools.cycle(LINE_STYLES), series.items()):
        keys.append(Line2D([], [], color="gray", linestyle=style, label=name))
        for score, color in COLORS.items():
            if rows[0]["threshold"] is None:
                axes.axhline(rows[0][score], linestyle=style, color=color)
                continue
            thresholds, values = zip(*sorted((row["threshold"], row[score]) for row in rows), strict=True)
            axes.plot(thresholds, values, linestyle=style, color=color, marker="o")
    axes.set(xlabel="threshold", ylabel="VOI (bits)", ylim=(0, None))
    axes.set_title("\n".join(wrap(f"best: {report['best']}", 60)), fontsize=11)
    if series:
        figure.legend(handles=keys, loc="outside lower center", ncols=2, fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    return image.getvalue()
