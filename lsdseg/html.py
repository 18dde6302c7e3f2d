"""Pages of HTML that need nothing else: text, tables, charts and pictures in one file, without scripts or links.

Each function returns a piece of HTML, and `write_page` puts pieces together. Text is escaped. Pages are readable on
wide and narrow screens, dark and light.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from lsdseg.files import write_whole
from lsdseg.pictures import RGBImage

# Colors of the lines of a chart, in that order; as many as colors that most eyes can tell apart.
LIGHT = ("#0072b2", "#d55e00", "#00805e", "#a8487c", "#6b5b00", "#333333")
DARK = ("#56b4e9", "#f08c3a", "#2fc79a", "#e39ac3", "#f0e442", "#cccccc")
# Of a chart or a plane, in units that are about one pixel on a narrow screen as on a wide one, so texts stay readable.
WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 38
MOST_POINTS = 300  # of a line; more are averaged
MOST_DOTS = 40  # of a line whose points are marked
NOTE_SPACE = 30  # at least, between two notes beside points
NUMBER = re.compile(r"-?[\d.]+(e[+-]?\d+)?( x -?[\d.]+)*( ?%)?")  # or several, such as a shape

_STYLE = """
:root{color-scheme:light dark;--text:#1c1f23;--faint:#5b6370;--line:#d5d9df;--back:#fff;--card:#f6f7f9;--bad:#b3261e;
--mark:#fdf0d0;%s}
@media(prefers-color-scheme:dark){:root{--text:#e6e8eb;--faint:#a3abb8;--line:#3a4049;--back:#15181c;--card:#1e2227;
--bad:#ff8a80;--mark:#4a3a10;%s}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:1rem;background:var(--back);color:var(--text);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}
h2{font-size:1.2rem;margin-top:2rem;border-top:1px solid var(--line);padding-top:1rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem;font-weight:600}
.faint,figcaption{color:var(--faint);font-size:.9rem}.bad{color:var(--bad)}
.grid{display:grid;gap:1rem;margin-bottom:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%%,20rem),1fr))}
figure{margin:0 0 1rem;padding:.75rem;background:var(--card);border:1px solid var(--line);border-radius:6px;min-width:0}
.grid figure{margin:0}figure img,figure svg{display:block;max-width:100%%;height:auto}
figure svg{width:100%%;max-width:30rem}
.scroll{overflow:auto;max-height:32rem;border-bottom:1px solid var(--line);margin-bottom:1rem}
table{border-collapse:separate;border-spacing:0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .9rem .25rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top;
max-width:26rem}
th{position:sticky;top:0;background:var(--back);z-index:1;vertical-align:bottom}
th:first-child,td:first-child{position:sticky;left:0;background:var(--back);max-width:min(26rem,40vw)}
th,td{overflow-wrap:break-word}th:first-child{z-index:2}.number{text-align:right}td.number{white-space:nowrap}
tr.marked td{background:var(--mark);font-weight:600}
.keys span{display:inline-flex;align-items:center;margin-right:1rem}.keys i{flex:none;width:1.2em;height:.2em;
margin-right:.4em}
svg text{fill:var(--faint);font-size:13px}svg .axis{stroke:var(--line);stroke-width:1}
svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg image{image-rendering:pixelated}svg .tick{stroke:var(--faint);stroke-width:1}
svg .bar{stroke:var(--text);stroke-width:4}svg .halo{stroke:#fff;stroke-width:5}svg .cross{stroke:#000;stroke-width:2}
@media print{.scroll{max-height:none;overflow:visible}figure,tr{break-inside:avoid}}
"""


def page(title: str, pieces: Iterable[str]) -> str:
    """Return a page: a title, and pieces of HTML as the other functions return them."""
    colors = [";".join(f"--c{number}:{color}" for number, color in enumerate(theme)) for theme in (LIGHT, DARK)]
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE % tuple(colors)}</style></head>"
    )
    body = "\n".join(pieces)
    return f"{head}<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"


def write_page(path: Path, title: str, pieces: Iterable[str]) -> None:
    """Write a page.

    Args:
        path: the file.
        title: of the page.
        pieces: HTML, as the other functions return it.

    Raises:
        UserError: the file cannot be written.
    """
    with write_whole(path) as partial:
        partial.write_text(page(title, pieces), encoding="utf-8")


def section(title: str, *pieces: str) -> str:
    """Put pieces below a heading. Without pieces, there is no heading either."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(pieces) if any(pieces) else ""


def subsection(title: str, *pieces: str) -> str:
    """Put pieces below a smaller heading."""
    return f"<h3>{escape(title)}</h3>\n" + "\n".join(pieces)


def grid(*pieces: str) -> str:
    """Put charts or pictures side by side, as many as fit."""
    return f'<div class="grid">{"".join(pieces)}</div>' if any(pieces) else ""


def text(words: str, kind: str = "") -> str:
    """Return a paragraph. Its kind is "faint" for remarks, "bad" for what is wrong, or empty."""
    return f'<p class="{kind}">{escape(words)}</p>'


def bullets(lines: Iterable[str], kind: str = "") -> str:
    """Return a list, with a kind as for `text`."""
    return f'<ul class="{kind}">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], *, decimals: int | None = None, marked: Container[int] = ()
) -> str:
    """Return a table, or nothing without rows. If it is large, it scrolls, with its head and first column in view.

    Args:
        head: names of the columns. Columns of numbers are aligned at the right.
        rows: their cells. None is an empty one.
        decimals: of floats. None: they have four significant digits.
        marked: numbers of the rows that stand out.
    """

    def shown(cell: Any) -> str:
        if isinstance(cell, float):
            return f"{cell:.4g}" if decimals is None else f"{cell:.{decimals}f}"
        return "" if cell is None else str(cell)

    texts = [[shown(cell) for cell in cells] for cells in rows]
    if not texts:
        return ""
    numbers = [all(NUMBER.fullmatch(cell or "0") for cell in column) for column in zip(*texts, strict=True)]
    numbers[:1] = [False]  # names the row

    def row(cells: Sequence[str], tag: str, kind: str = "") -> str:
        kinds = (' class="number"' * number for number in numbers)
        line = "".join(f"<{tag}{k}>{escape(cell)}</{tag}>" for cell, k in zip(cells, kinds, strict=True))
        return f"<tr{kind}>{line}</tr>"

    body = "\n".join(row(cells, "td", ' class="marked"' * (n in marked)) for n, cells in enumerate(texts))
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'
    )


def picture(png: bytes, caption: str) -> str:
    """Return a picture, a whole PNG file, with a caption."""
    return (
        f'<figure><img alt="{escape(caption)}" src="{_address(png)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def image_address(image: RGBImage) -> str:
    """Return a picture, uint8 (y, x, 3), as an address that holds all of it, for `image` in an SVG."""
    gray = (image == image[..., :1]).all()
    # With 256 colors, the file has a third of the size and looks the same.
    small = Image.fromarray(image[..., 0]) if gray else Image.fromarray(image).quantize(256)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return _address(buffer.getvalue())


def _address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def chart(
    title: str,
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]],
    x_name: str,
    from_zero: bool = False,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Draw lines, and a dot at each point if they are few.

    Args:
        title: what the chart shows, with its unit.
        lines: name -> x and y, both (n,). Values that are not finite are left out.
        x_name: what x is.
        from_zero: both axes begin at 0 if no value is below.
        notes: name -> n words, of a line whose values are all finite. They stand beside its points where there is room.
    """
    drawn = {name: _thinned(*points) for name, points in lines.items()}
    drawn = {name: points for name, points in drawn.items() if points.size}
    if not drawn:
        return ""
    place, axes = _axes(np.concatenate(list(drawn.values())), x_name, from_zero)
    parts, keys = [axes], []
    taken: list[NDArray[np.float64]] = []
    for number, (name, line) in enumerate(drawn.items()):
        color, dashes = f"var(--c{number % len(LIGHT)})", f"{6 * (number // len(LIGHT))}"
        points = place(line)
        placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline style="stroke:{color}" stroke-dasharray="{dashes}" points="{placed}"/>')
        if len(line) <= MOST_DOTS:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in points]
        for words, (x, y) in zip((notes or {}).get(name, ()), points, strict=False):
            if all(math.dist((x, y), other) > NOTE_SPACE for other in taken):
                taken.append(np.array((x, y)))
                anchor = "end" if x > WIDTH - RIGHT - NOTE_SPACE else "start"
                shift = -6 if anchor == "end" else 6
                parts.append(f'<text x="{x + shift:.1f}" y="{y - 4:.1f}" text-anchor="{anchor}">{escape(words)}</text>')
        keys.append(f'<span><i style="background:{color}"></i>{escape(name)}</span>')
    legend = f'<figcaption class="keys">{"".join(keys)}</figcaption>' if len(keys) > 1 else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><strong>{escape(title)}</strong>{svg}{legend}</figure>"


def _axes(
    points: NDArray[np.float64], x_name: str, from_zero: bool
) -> tuple[Callable[[ArrayLike], NDArray[np.float64]], str]:
    """Return a function that says where points (n, 2) lie in a chart, and the SVG of its axes."""
    (x_low, y_low), (x_high, y_high) = points.min(axis=0), points.max(axis=0)
    if from_zero:
        x_low, y_low = min(0.0, x_low), min(0.0, y_low)
    if x_low == x_high:
        x_low, x_high = x_low - (abs(x_low) / 2 or 1), x_high + (abs(x_high) / 2 or 1)  # in the middle
    x_ticks, y_ticks = _ticks(x_low, x_high), _ticks(y_low, y_high)
    corner, far = np.array([x_low, y_ticks[0]]), np.array([x_high, y_ticks[-1]])
    size = np.array([WIDTH - LEFT - RIGHT, -(HEIGHT - TOP - BOTTOM)])

    def place(values: ArrayLike) -> NDArray[np.float64]:
        placed: NDArray[np.float64] = (np.asarray(values) - corner) / (far - corner) * size + (LEFT, HEIGHT - BOTTOM)
        return placed

    parts = []
    for y in y_ticks:
        height = place((x_low, y))[1]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in (tick for tick in x_ticks if x_low <= tick <= x_high):
        across = place((x, y_ticks[0]))[0]
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:.6g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    return place, "".join(parts)


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
