"""Skeletons as SWC files: a line of id, type, x, y, z, radius and the parent's id, -1 for none, for each point, in nm.

Cannon et al., Journal of Neuroscience Methods 1998; http://www.neuronland.org/NLMorphologyConverter/MorphologyFormats/SWC/Spec.html
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lsdseg.data_utils.skeletons import Skeleton
from lsdseg.errors import UserError


def write_swc(path: Path, skeleton: Skeleton, comment: str) -> None:
    """Write a skeleton with radii.

    Args:
        path: the file.
        skeleton: trees.
        comment: the first line.
    """
    assert skeleton.radii is not None
    order, parents = skeleton.parents()
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(1, len(order) + 1)
    rows = zip(
        number[order].tolist(),
        skeleton.points[order].tolist(),
        skeleton.radii[order].tolist(),
        np.where(parents < 0, -1, number[parents])[order].tolist(),
        strict=True,
    )
    lines = (f"{one} 0 {x:.10g} {y:.10g} {z:.10g} {radius:.6g} {parent}\n" for one, (z, y, x), radius, parent in rows)
    header = f"# {comment}\n# id type x y z radius parent, in nm\n"
    path.write_text(header + "".join(lines), encoding="utf-8")


def read_swc(path: Path) -> Skeleton:
    """Read a skeleton from an SWC file.

    Raises:
        UserError: the file cannot be read; a line is no such line; an id occurs twice; a parent is missing, or parents
            form a loop.
    """
    rows: dict[int, tuple[list[float], int]] = {}  # id -> z, y, x and radius, and the parent
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give SWC files, or a folder of them") from error
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            x, y, z, radius = map(float, words[2:6])
            one, parent = int(words[0]), int(words[6])
            if not all(map(math.isfinite, (x, y, z))):
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(
                f"line {number} of {path} is no line of SWC: write id, type, x, y, z, radius, parent"
            ) from None
        if one in rows:
            raise UserError(f"line {number} of {path} has the id {one} again: give every point an id of its own")
        rows[one] = [z, y, x, radius], parent
    if not rows:
        raise UserError(f"{path} has no points: leave it out")
    number_of = {one: number for number, one in enumerate(rows)}
    edges = []
    for one, (_, parent) in rows.items():
        if parent < 0:
            continue
        if parent not in number_of:
            raise UserError(f"{path}: point {one} has the parent {parent}, which is missing: add it, or write -1")
        edges.append((number_of[one], number_of[parent]))
    _refuse_loops(path, {one: parent for one, (_, parent) in rows.items()})
    table = np.array([values for values, _ in rows.values()])
    return Skeleton(table[:, :3], np.array(edges, np.int64).reshape(-1, 2), table[:, 3])


def _refuse_loops(path: Path, parents: Mapping[int, int]) -> None:
    rooted: set[int] = set()
    for start in parents:
        walked: set[int] = set()
        one = start
        while one >= 0 and one not in rooted:
            if one in walked:
                raise UserError(f"{path}: the parents of point {one} form a loop: write -1 as the parent of its root")
            walked.add(one)
            one = parents[one]
        rooted |= walked


def read_skeletons(path: Path) -> dict[str, Skeleton]:
    """Read an SWC file, or all in a folder, by name.

    Raises:
        UserError: there is none, or as for `read_swc`.
    """
    files = sorted(path.glob("*.swc")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"no *.swc in {path}: name the folder with the skeletons")
    return {file.stem: read_swc(file) for file in files}
