"""Pages of HTML that need nothing else: text, tables, charts and pictures in one file, without scripts or links.

Each function returns a piece of HTML, and `write_page` puts pieces together. Text is escaped. Pages are readable on
wide and narrow screens, dark and light.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from lsdseg.files import write_whole
from lsdseg.pictures import RGBImage

# Colors of the lines of a chart, in that order; as many as colors that most eyes can tell apart.
LIGHT = ("#0072b2", "#d55e00", "#00805e", "#a8487c", "#6b5b00", "#333333")
DARK = ("#56b4e9", "#f08c3a", "#2fc79a", "#e39ac3", "#f0e442", "#cccccc")
WIDTH, HEIGHT = 560, 260  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 38  # margins of a chart
MOST_POINTS = 300  # of a line; more are averaged

_STYLE = """
:root{color-scheme:light dark;--text:#1c1f23;--faint:#5b6370;--line:#d5d9df;--back:#fff;--card:#f6f7f9;--bad:#b3261e;%s}
@media(prefers-color-scheme:dark){:root{--text:#e6e8eb;--faint:#a3abb8;--line:#3a4049;--back:#15181c;--card:#1e2227;
--bad:#ff8a80;%s}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:1rem;background:var(--back);color:var(--text);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}
h2{font-size:1.2rem;margin-top:2rem;border-top:1px solid var(--line);padding-top:1rem}
.faint,figcaption{color:var(--faint);font-size:.9rem}.bad{color:var(--bad)}
.grid{display:grid;gap:1rem;margin-bottom:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%%,24rem),1fr))}
figure{margin:0 0 1rem;padding:.75rem;background:var(--card);border:1px solid var(--line);border-radius:6px;min-width:0}
.grid figure{margin:0}figure img,figure svg{display:block;max-width:100%%;height:auto}
figure svg{width:100%%;max-width:44rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.25rem .75rem .25rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
.keys span{display:inline-block;margin-right:1rem}.keys i{display:inline-block;width:1.2em;height:.2em;
vertical-align:middle;margin-right:.4em}
svg text{fill:var(--faint);font-size:14px}svg .axis{stroke:var(--line);stroke-width:1}
svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
"""


def write_page(path: Path, title: str, pieces: Iterable[str]) -> None:
    """Write a page.

    Args:
        path: the file.
        title: of the page.
        pieces: HTML, as the other functions return it.

    Raises:
        UserError: the file cannot be written.
    """
    colors = [";".join(f"--c{number}:{color}" for number, color in enumerate(theme)) for theme in (LIGHT, DARK)]
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE % tuple(colors)}</style></head>"
    )
    with write_whole(path) as partial:
        body = "\n".join(pieces)
        partial.write_text(f"{head}<body><h1>{escape(title)}</h1>\n{body}</body></html>\n", encoding="utf-8")


def section(title: str, *pieces: str) -> str:
    """Put pieces below a heading. Without pieces, there is no heading either."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(pieces) if any(pieces) else ""


def grid(*pieces: str) -> str:
    """Put charts or pictures side by side, as many as fit."""
    return f'<div class="grid">{"".join(pieces)}</div>' if any(pieces) else ""


def text(words: str, kind: str = "") -> str:
    """Return a paragraph. Its kind is "faint" for remarks, "bad" for what is wrong, or empty."""
    return f'<p class="{kind}">{escape(words)}</p>'


def bullets(lines: Iterable[str], kind: str = "") -> str:
    """Return a list, with a kind as for `text`."""
    return f'<ul class="{kind}">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table. Floats have four digits."""

    def row(cells: Iterable[Any], tag: str) -> str:
        shown = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in shown)}</tr>"

    return f'<div class="scroll"><table>{row(head, "th")}{"".join(row(cells, "td") for cells in rows)}</table></div>'


def picture(image: RGBImage | bytes, caption: str) -> str:
    """Return a picture with a caption.

    Args:
        image: uint8 (y, x, 3), or a whole PNG file.
        caption: what it shows.
    """
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        image = buffer.getvalue()
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def chart(title: str, lines: Mapping[str, tuple[ArrayLike, ArrayLike]], x_name: str, from_zero: bool = False) -> str:
    """Draw lines.

    Args:
        title: what the chart shows, with its unit.
        lines: name -> x and y, both (n,). Values that are not finite are left out.
        x_name: what x is.
        from_zero: y begins at 0.
    """
    drawn = {name: _thinned(*points) for name, points in lines.items()}
    drawn = {name: points for name, points in drawn.items() if points.size}
    if not drawn:
        return ""
    points = np.concatenate(list(drawn.values()))
    (x_low, y_low), (x_high, y_high) = points.min(axis=0), points.max(axis=0)
    x_ticks, y_ticks = _ticks(x_low, x_high), _ticks(min(0.0, y_low) if from_zero else y_low, y_high)
    corner, far = np.array([x_low, y_ticks[0]]), np.array([max(x_high, x_low + 1e-9), y_ticks[-1]])
    size = np.array([WIDTH - LEFT - RIGHT, -(HEIGHT - TOP - BOTTOM)])

    def place(values: ArrayLike) -> np.ndarray:
        return (np.asarray(values) - corner) / (far - corner) * size + (LEFT, HEIGHT - BOTTOM)

    parts, keys = [], []
    for y in y_ticks:
        height = place((x_low, y))[1]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in (tick for tick in x_ticks if x_low <= tick <= x_high):
        across = place((x, y_ticks[0]))[0]
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{x:.6g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    for number, (name, line) in enumerate(drawn.items()):
        color, dashes = f"var(--c{number % len(LIGHT)})", f"{6 * (number // len(LIGHT))}"
        placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in place(line))
        if len(line) == 1:
            x, y = place(line)[0]
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
        parts.append(f'<polyline style="stroke:{color}" stroke-dasharray="{dashes}" points="{placed}"/>')
        keys.append(f'<span><i style="background:{color}"></i>{escape(name)}</span>')
    legend = f'<figcaption class="keys">{"".join(keys)}</figcaption>' if len(keys) > 1 else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><strong>{escape(title)}</strong>{svg}{legend}</figure>"


def _thinned(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Return the points (n, 2) of a line, averaged in groups if there are more than MOST_POINTS."""
    points = np.stack([np.asarray(x, float), np.asarray(y, float)], axis=-1)
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) <= MOST_POINTS:
        return points
    return np.array([group.mean(axis=0) for group in np.array_split(points, MOST_POINTS)])


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that reach from `low` or less to `high` or more."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [step * number for number in range(first, last + 1)]
