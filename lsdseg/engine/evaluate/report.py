"""The report that a lab sends round: one HTML file that holds everything it shows and loads nothing.

It reads in dark and light, in wide and narrow windows. Ground truth is orange and dashed in plots, segmentation blue,
which color-blind readers can tell apart.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from lsdseg.engine.evaluate.metrics import Mistake

WORST_NEURONS = 50  # rows of the table of neurons
ROOM = 0.04  # of the plot's axes, around a number beside a dot
RADIUS = 60  # voxels of the finest axis that a picture shows to either side of an error
TRUTH_COLOR, SEGMENT_COLOR, BOTH_COLOR = "#E69F00", "#56B4E9", "#FFFFFF"  # Okabe and Ito
PLANES = ("xy", "xz", "yz")

STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--paper:#fff;--line:#bbb;--head:#eee;--best:#fdf0d0}
@media (prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#161616;--line:#555;--head:#2a2a2a;--best:#4a3a10}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:76rem;margin:0 auto;
padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}
.scroll{overflow:auto;max-height:32rem;border:1px solid var(--line)}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{position:sticky;top:0;background:var(--head)}th:first-child,td:first-child,th:last-child,td:last-child{text-align:left}
td.wrap{white-space:normal;min-width:24rem;text-align:left}
tr.best{background:var(--best);font-weight:bold}
img{max-width:100%;height:auto;background:#fff;display:block}figure{margin:1.5rem 0}
"""


def render(
    report: Mapping[str, Any],
    neurons: Sequence[Mapping[str, Any]],
    pictures: Sequence[tuple[str, bytes]],
    notes: Sequence[str] = (),
) -> str:
    """Return the HTML of a report.

    Args:
        report: what `evaluate.score_sample` returns.
        neurons: all neurons, the worst first, as `metrics.list_neurons` returns them.
        pictures: caption and PNG of each error, the worst first.
        notes: lines that say what is missing and why.

    Returns:
        A page without references to anything outside of it.
    """
    shown = neurons[:WORST_NEURONS]
    name = escape(Path(report["sample"]).name)
    scored = f"{report['objects']} objects, {report['voxels'] / 1e6:.2f} million voxels, VOI in bits, lower is better"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>Segmentation of {name}</title><style>{STYLE}</style></head><body>",
        f"<h1>Segmentation of {name}</h1>",
        f"<p>Against {escape(report['ground_truth'])}: {scored}. Best: <b>{escape(report['best'])}</b>.</p>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<h2>Scores</h2>",
        "<p>Without boundary: voxels where neurons touch are left out. Connected: neurons are cut into the parts that "
        "hang together in this volume.</p>",
        _score_table(report),
        "<h2>Splits against merges</h2>",
        _image(plot_split_merge(report["scores"]), "VOI merge over VOI split, a line per method"),
        "<h2>Worst neurons</h2>",
        f"<p>The {len(shown)} worst of {len(neurons)} neurons in {escape(report['best'])}, by their share of VOI. "
        "Parts below 1 % of a neuron are not counted.</p>",
        _neuron_table(shown),
    ]
    parts.append(_run_lengths(report["skeletons"]))
    if pictures:
        parts.append(f"<h2>The {len(pictures)} worst errors</h2><p>Outlines of the ground truth are orange, of the ")
        parts.append("segmentation blue, and white where both coincide. The cross marks the position.</p>")
        parts += [
            f"<figure>{_image(png, text)}<figcaption>{escape(text)}</figcaption></figure>" for text, png in pictures
        ]
    return "\n".join([*parts, "</body></html>\n"])


def _score_table(report: Mapping[str, Any]) -> str:
    kinds = {"": "", " without boundary": "_without_boundary", " connected": "_connected"}
    head = ["dataset", "method", "threshold", "segments"]
    head += [f"{name}{kind}" for kind in kinds for name in ("split", "merge", "VOI sum", "Rand error")]
    head += ["ERL (nm)", "normalized ERL", "splits needed", "merges needed"]
    rows = []
    for row in report["scores"]:
        method = " ".join(str(row[key]) for key in ("method", "merge_function") if row[key])
        cells = [row["dataset"] + " (not written)" * (not row["written"]), method, row["threshold"], row["segments"]]
        for suffix in kinds.values():
            cells += [row[f"{name}{suffix}"] for name in ("voi_split", "voi_merge", "voi_sum", "adapted_rand_error")]
        cells += [None if row["erl_nm"] is None else round(row["erl_nm"]), row["normalized_erl"]]
        cells += [row["splits_needed"], row["merges_needed"]]
        rows.append((cells, row["dataset"] == report["best"]))
    return _table(head, rows)


def _run_lengths(skeletons: Mapping[str, Any] | None) -> str:
    if skeletons is None:
        return "<h2>Run lengths</h2><p>There are no skeletons for an expected run length (ERL) here.</p>"
    neurons = sorted(skeletons["neurons"], key=lambda one: one["erl"] - one["length"])
    head = ["skeleton", "length (nm)", "run length (nm)", "splits", "mergers", "merged with"]
    rows = []
    for one in neurons[:WORST_NEURONS]:
        others = ", ".join(one["merged_with"][:10])
        cells = [one["name"], round(one["length"]), round(one["erl"]), one["splits"], len(one["merged_with"]), others]
        rows.append((cells, False))
    erl, best = round(skeletons["erl"]), round(skeletons["erl_best"])
    text = (
        f"Expected run length (ERL) {erl} nm of {best} nm without errors, "
        f"normalized {skeletons['normalized_erl']:.3f}. "
        f"The {len(rows)} skeletons that lost most, of {len(neurons)}."
    )
    return f"<h2>Run lengths</h2><p>{text}</p>{_table(head, rows)}"


def _neuron_table(neurons: Sequence[Mapping[str, Any]]) -> str:
    head = ["neuron", "voxels", "segments", "share of VOI split", "of VOI merge", "of VOI", "merged with"]
    rows = []
    for neuron in neurons:
        others = ", ".join(map(str, neuron["merged_with"])) + (
            f" and {neuron['merged'] - len(neuron['merged_with'])} more" if neuron["merged"] > 10 else ""
        )
        shares = [f"{100 * neuron[key]:.1f} %" for key in ("split_share", "merge_share", "share")]
        rows.append(([str(neuron["neuron"]), neuron["voxels"], neuron["segments"], *shares, others], False))
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[tuple[Sequence[Any], bool]]) -> str:
    def cell(value: Any) -> str:
        text = "" if value is None else f"{value:.3f}" if isinstance(value, float) else escape(str(value))
        return f'<td class="wrap">{text}</td>' if len(text) > 60 else f"<td>{text}</td>"

    lines = "".join(
        f"<tr{' class=best' if best else ''}>{''.join(cell(value) for value in cells)}</tr>\n" for cells, best in rows
    )
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>\n<tbody>{lines}</tbody></table></div>'
    )


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def plot_split_merge(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot VOI merge over VOI split as a PNG: a line per method, a dot per threshold with its number."""
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        words = [str(row[key]) for key in ("method", "merge_function") if row[key]]
        if row["threshold"] is None or not words:
            words = [row["dataset"].removeprefix("volumes/")]
        series.setdefault(" ".join(words), []).append(row)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    limits = [1.1 * max(row[key] for row in rows) or 1 for key in ("voi_split", "voi_merge")]
    numbered: list[tuple[float, float]] = []
    colors = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7")
    for number, (name, members) in enumerate(series.items()):
        ordered = sorted(members, key=lambda row: row["threshold"] or 0)
        split, merge = ([row[key] for row in ordered] for key in ("voi_split", "voi_merge"))
        style: dict[str, Any] = {"color": colors[number % len(colors)], "marker": "osD^v"[number // 2 % 5]}
        axes.plot(split, merge, ("-", "--", ":", "-.")[number % 4], label=name, **style)
        for row in ordered:
            place = (row["voi_split"], row["voi_merge"])
            near = any(math.dist(*(np.divide(at, limits) for at in (place, other))) < ROOM for other in numbered)
            if row["threshold"] is not None and not near:
                numbered.append(place)
                axes.annotate(f"{row['threshold']:g}", place, (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="VOI split (bits)", ylabel="VOI merge (bits)")
    axes.set(xlim=(0, limits[0]), ylim=(0, limits[1]))
    if len(series) <= 20:
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return _png(figure)


def draw_mistake(
    raw: NDArray[Any],
    truth: NDArray[Any],
    labels: NDArray[Any],
    center: Sequence[int],
    voxel_size: Sequence[float],
) -> bytes:
    """Draw the three planes through a point of a crop as a PNG: raw, outlines, a scale bar and a cross.

    Args:
        raw: (z, y, x) of any number type.
        truth: labels of the same shape.
        labels: the segmentation, the same shape.
        center: the point, an index z, y, x.
        voxel_size: in nm.
    """
    low, high = np.percentile(raw, (0.5, 99.5))
    gray = np.clip((raw - low) / max(high - low, 1e-6), 0, 1)
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    for axes, name, normal in zip(figure.subplots(1, 3), PLANES, (0, 1, 2), strict=True):
        down, across = (axis for axis in range(3) if axis != normal)
        sections = [np.take(array, center[normal], axis=normal) for array in (gray, truth, labels)]
        if name == "yz":  # y runs down in it, as in xy
            sections, (down, across) = [section.T for section in sections], (across, down)
        size = (voxel_size[down], voxel_size[across])
        extent = (0, sections[0].shape[1] * size[1], sections[0].shape[0] * size[0], 0)
        axes.imshow(_outlined(*sections), extent=extent, interpolation="nearest")
        point = ((center[across] + 0.5) * size[1], (center[down] + 0.5) * size[0])
        axes.plot(*point, "+", color="white", markersize=16, markeredgewidth=4)
        axes.plot(*point, "+", color="black", markersize=14, markeredgewidth=1.5)
        bar = _round_length(extent[1] / 4)
        left, bottom = extent[1] * 0.05, extent[2] * 0.94
        for width, color in ((7, "black"), (4, "white")):
            axes.plot([left, left + bar], [bottom, bottom], color=color, linewidth=width, solid_capstyle="butt")
        axes.set(title=f"{name}, bar {bar:g} nm", xlim=extent[:2], ylim=extent[2:])
        axes.set_axis_off()
    return _png(figure)


def _outlined(gray: NDArray[Any], truth: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """Draw outlines on a section (y, x) in 0..1, four pixels per voxel. Returns RGB."""
    gray, truth, labels = (array.repeat(4, axis=0).repeat(4, axis=1) for array in (gray, truth, labels))
    image = np.repeat(gray[..., None].astype(np.float64), 3, axis=2)
    of_truth, of_labels = (find_boundaries(array, mode="thick") for array in (truth, labels))
    for where, color in ((of_truth, TRUTH_COLOR), (of_labels, SEGMENT_COLOR), (of_truth & of_labels, BOTH_COLOR)):
        image[where] = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return image


def _round_length(length: float) -> float:
    """Return the largest of 1, 2, 5, 10, 20 ... that is not longer."""
    power: float = 10.0 ** np.floor(np.log10(length))
    return max(n * power for n in (1, 2, 5) if n * power <= length)


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, dpi=100)
    return image.getvalue()


def caption(mistake: Mistake, position: Sequence[float], number: int) -> str:
    """Describe an error in one line, with its position in nm."""
    place = ", ".join(f"{value:.0f}" for value in position)
    what = "is cut off from the rest of it" if mistake.kind == "split" else "hangs on another neuron"
    return (
        f"{number}. {mistake.kind}: the part of neuron {mistake.neuron} in segment {mistake.segment} {what}; "
        f"{mistake.voxels} voxels, {mistake.bits:.4f} bits of VOI; at {place} nm (z, y, x)"
    )
