"""How Neuroglancer colors images: programs in GLSL, which run for every voxel on the screen.

Each `#uicontrol` becomes a slider in the panel of the layer. What its positions mean stands above it in the program,
which the panel shows, too.
"""

from collections.abc import Sequence

from lsdseg.engine.offsets import DIRECT_NEIGHBORS, Offset

# A channel of -1 is black. Unsigned bytes are scaled to 0..1; floats are taken as they are.
_VALUE = """float value(int channel) {
  return channel < 0 ? 0.0 : toNormalized(getDataValue(channel));
}
"""
_BLACK = -1


def gray_shader(lowest: float, highest: float) -> str:
    """Show an image of one channel in shades of gray, black at `lowest` and white at `highest`."""
    return (
        f"#uicontrol invlerp contrast(range=[{lowest:g}, {highest:g}])\n"
        "void main() {\n  emitGrayscale(contrast());\n}\n"
    )


def channels_shader(count: int) -> str:
    """Show an image of `count` channels: three as red, green and blue, others one at a time."""
    if count == 3:
        return _groups_shader([(0, 1, 2)], ["the three channels"])
    return _groups_shader([(n, n, n) for n in range(count)], [f"channel {n}" for n in range(count)])


def affinities_shader(offsets: Sequence[Offset]) -> str:
    """Show affinities, three channels at a time: those along z, y and x as red, green and blue.

    Args:
        offsets: offset (z, y, x) in voxels of each channel. Those of direct neighbors are shown first, and others in
            their order, by a slider.
    """
    groups, names = [], []
    for group in _triples(offsets):
        groups.append(tuple(offsets.index(offset) if offset in offsets else _BLACK for offset in group))
        names.append(" ".join(str(tuple(offset)) for offset in group if offset in offsets))
    return _groups_shader(groups, names)


def lsds_shader(count: int) -> str:
    """Show LSDs: the offset to the local center of mass as red, green and blue, the other channels one at a time.

    Args:
        count: number of channels: 10, or 6 in sections.
    """
    first = (0, 1, 2) if count == 10 else (_BLACK, 0, 1)
    others = range(3 if count == 10 else 2, count)
    names = ["offset to the center of mass along z, y, x", *(f"channel {n}" for n in others)]
    return _groups_shader([first, *((n, n, n) for n in others)], names)


def line_shader(highest: float) -> str:
    """Color lines by their property `score`: blue at 0, orange red at `highest`, colors of Okabe and Ito."""
    return (
        f"void main() {{\n  float share = clamp(prop_score() / {highest:f}, 0.0, 1.0);\n"
        "  setColor(mix(vec3(0.0, 0.45, 0.7), vec3(0.84, 0.37, 0.0), share));\n  setLineWidth(3.0);\n}\n"
    )


def _triples(offsets: Sequence[Offset]) -> list[list[Offset]]:
    """Group offsets by three, along z, y and x; what is not there is an offset of 0."""
    direct = [offset if offset in offsets else (0, 0, 0) for offset in DIRECT_NEIGHBORS]
    others = [offset for offset in offsets if offset not in DIRECT_NEIGHBORS]
    triples = [others[n : n + 3] for n in range(0, len(others), 3)]
    shown = [direct] if any(any(offset) for offset in direct) else []
    return shown + [triple + [(0, 0, 0)] * (3 - len(triple)) for triple in triples]


def _groups_shader(groups: Sequence[tuple[int, ...]], names: Sequence[str]) -> str:
    """Show one of several groups of three channels, chosen by a slider if there are more than one."""
    lines = [f"// group {n}: {name}\n" for n, name in enumerate(names)] if len(groups) > 1 else []
    if len(groups) > 1:
        lines.append(f"#uicontrol int group slider(min=0, max={len(groups) - 1}, default=0)\n")
    red, green, blue = groups[0]
    lines += [_VALUE, f"void main() {{\n  ivec3 shown = ivec3({red}, {green}, {blue});\n"]
    for n, (red, green, blue) in enumerate(groups[1:], start=1):
        lines.append(f"  if (group == {n}) shown = ivec3({red}, {green}, {blue});\n")
    return "".join([*lines, "  emitRGB(vec3(value(shown.r), value(shown.g), value(shown.b)));\n}\n"])
