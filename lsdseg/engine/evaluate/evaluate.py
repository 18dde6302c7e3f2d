"""Scores of all segmentations of a volume, in tables and a plot beside its output zarr.

Volumes are read block by block and never copied: only the table of overlaps is kept, see
`lsdseg.engine.evaluate.metrics`.
"""

import csv
import io
import itertools
import json

import numpy as np
from funlib.geometry import Coordinate, Roi
from matplotlib.figure import Figure
from tqdm import tqdm

from lsdseg.data_utils.labels import is_labeled
from lsdseg.data_utils.layout import FRAGMENTS, SEGMENTATIONS, scores_path
from lsdseg.data_utils.volumes import list_arrays, open_array, read, slabs, voxels_of
from lsdseg.engine.evaluate.metrics import count_overlaps, scores
from lsdseg.engine.sample import samples_of
from lsdseg.engine.sections import ids_by_section, scored_by_section
from lsdseg.errors import UserError
from lsdseg.files import write_whole

SCORES = ("voi_split", "voi_merge", "voi_sum", "adapted_rand_error", "segments")
COLUMNS = ("dataset", "method", "merge_function", "threshold", *SCORES)
# Okabe and Ito's colours, which colour-blind readers tell apart
COLORS = {"voi_split": "#0072B2", "voi_merge": "#D55E00", "voi_sum": "#000000"}
LINE_STYLES = ("-", "--", ":", "-.")


def evaluate(cfg):
    """Score every segmentation of every test volume that has ground truth (DATA.NEURON_LABELS in its zarr).

    Sections that were not linked are scored one by one: an object is another one in each of them. Writes
    SAMPLE_scores.json, .csv and .png beside the output zarr, and prints the table.

    Raises:
        UserError: no volume has ground truth, or one that has was not segmented.
    """
    work = []
    for sample in samples_of(cfg):
        if sample.ground_truth is None:
            print(f"{sample.volume.name} is left out: it has no ground truth {cfg.DATA.NEURON_LABELS}")
            continue
        work.append((sample, segmentations_in(sample.output)))
    if not work:
        raise UserError(
            f"no test volume has {cfg.DATA.NEURON_LABELS}; add ground truth, or name it in DATA.NEURON_LABELS"
        )
    for sample, names in work:
        report = score_sample(sample, names)
        print(format_table(report))
        for suffix, content in (
            ("json", json.dumps(report, indent=2).encode()),
            ("csv", _csv(report).encode()),
            ("png", _plot(report)),
        ):
            with write_whole(scores_path(sample.output, suffix)) as partial:
                partial.write_bytes(content)
        print(f"best: {report['best']}; scores in {scores_path(sample.output)}, and there as .csv and .png")


def segmentations_in(path):
    """Names of the segmentations in an output zarr, led by the fragments if they are there.

    Raises:
        UserError: there is no segmentation.
    """
    names = list_arrays(path)
    segmentations = [name for name in names if SEGMENTATIONS.fullmatch(name)]
    if not segmentations:
        raise UserError(f"no volumes/segmentation_* in {path}; run instance_segmenter.py first")
    return [FRAGMENTS] * (FRAGMENTS in names) + segmentations


def score_sample(sample, names):
    """Score datasets of a sample's output against its ground truth.

    Returns:
        dict: sample, ground_truth, by_section (whether sections were scored one by one), objects, voxels (both of the
        ground truth that was compared), best (the dataset of lowest VOI sum, fragments aside) and scores, a list of
        dicts with the keys COLUMNS.

    Raises:
        UserError: as `overlaps`, or no voxel in common is labelled.
    """
    truth_name = sample.cfg.DATA.NEURON_LABELS
    rows, by_section = [], scored_by_section(sample.cfg)
    for name in names:
        segmentation = open_array(sample.output, name)
        arrays = segmentation, sample.ground_truth, sample.ground_truth_mask
        shared = overlaps(*arrays, by_section=by_section, description=name)
        try:
            row = scores(*count_overlaps(shared))
        except ValueError as error:
            raise UserError(f"{name} in {sample.output} and {truth_name} in {sample.volume}: {error}") from error
        labels = {key: segmentation.attrs.get(key) for key in ("method", "merge_function", "threshold")}
        rows.append({"dataset": name, **labels, **row})
    best = min((row for row in rows if row["dataset"] != FRAGMENTS), key=lambda row: row["voi_sum"])
    return {
        "sample": str(sample.volume),
        "ground_truth": truth_name,
        "by_section": by_section,
        "objects": rows[0]["objects"],
        "voxels": rows[0]["voxels"],
        "best": best["dataset"],
        "scores": [{key: row[key] for key in COLUMNS} for row in rows],
    }


def overlaps(segmentation, ground_truth, mask=None, *, by_section=False, max_bytes=2**27, description=None):
    """Yield blocks (segmentation, ground truth) of two label volumes on disk, where both have voxels.

    Args:
        segmentation, ground_truth: arrays with their place in the world, as `open_array` gives them.
        mask: a third one; the ground truth reads 0 where it is 0, and where an id says that a voxel is not labelled.
            Only the ROI that all share is read.
        by_section: give segments and objects another id in every section.
        max_bytes: size of a block of the segmentation.
        description: name on the progress bar.

    Raises:
        ValueError: voxels of different size, or voxel grids shifted by parts of a voxel.
    """
    arrays = [segmentation, ground_truth] + ([mask] if mask is not None else [])
    voxel_size = segmentation.voxel_size
    roi = segmentation.roi
    for array in arrays:
        if array.voxel_size != voxel_size:
            raise ValueError(f"voxel sizes differ: {tuple(voxel_size)} and {tuple(array.voxel_size)} nm")
        if any((array.offset - segmentation.offset) % voxel_size):
            raise ValueError(f"offsets {segmentation.offset} and {array.offset} nm differ by part of a voxel")
        roi = roi.intersect(array.roi)
    segment_numbers, object_numbers = {}, {}
    for slab in tqdm(slabs(segmentation, max_bytes), description, unit="slab", leave=False, delay=2):
        begin = segmentation.offset + Coordinate(s.start for s in slab) * voxel_size
        part = Roi(begin, Coordinate(s.stop - s.start for s in slab) * voxel_size).intersect(roi)
        if part.empty:
            continue
        labels, truth, *masks = (read(array, voxels_of(array, part)) for array in arrays)
        known = (truth != 0) & is_labeled(truth) & (masks[0] != 0 if masks else True)
        if by_section:
            section = (part.begin[0] - roi.begin[0]) // voxel_size[0]
            labels = ids_by_section(labels, section, segment_numbers)
            truth = ids_by_section(truth, section, object_numbers)
        yield labels, np.where(known, truth, 0)


def format_table(report):
    """The scores of a `score_sample` report as lines of text, one per segmentation."""
    width = max(len(row["dataset"]) for row in report["scores"])
    lines = [
        f"{report['sample']}: {report['objects']} objects, {report['voxels'] / 1e6:.2f} million voxels"
        + ", section by section" * report["by_section"],
        f"{'':{width}}  VOI split   merge     sum  adapted Rand error  segments",
    ]
    for row in report["scores"]:
        lines.append(
            f"{row['dataset']:{width}}  {row['voi_split']:9.3f} {row['voi_merge']:7.3f} {row['voi_sum']:7.3f}"
            f"  {row['adapted_rand_error']:18.3f}  {row['segments']:8d}"
        )
    return "\n".join(lines)


def _csv(report):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(report["scores"])
    return text.getvalue()


def _plot(report):
    """PNG of the VOI over the thresholds, a style of line for each merge function, and for each method without them."""
    series = {}
    for row in report["scores"]:
        if row["dataset"] != FRAGMENTS:
            kind, _, rest = row["dataset"].removeprefix("volumes/").partition("segmentation_")
            name = f"{kind}{rest if row['threshold'] is None else row['merge_function']}"
            series.setdefault(name.replace("_", " "), []).append(row)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for style, (name, rows) in zip(itertools.cycle(LINE_STYLES), series.items()):
        for score, color in COLORS.items():
            label = f"{score.removeprefix('voi_')}, {name}"
            if rows[0]["threshold"] is None:
                axes.axhline(rows[0][score], linestyle=style, color=color, label=label)
                continue
            thresholds, values = zip(*sorted((row["threshold"], row[score]) for row in rows), strict=True)
            axes.plot(thresholds, values, style, color=color, marker="o", label=label)
    axes.set(xlabel="threshold", ylabel="VOI (bits)", ylim=(0, None), title=f"best: {report['best']}")
    if series:
        figure.legend(loc="outside lower center", ncols=min(3, len(series)), fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    return image.getvalue()
