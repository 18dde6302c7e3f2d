"""Make docs/benchmarks.md of the rows that run.py keeps.

python benchmarks/table.py
python benchmarks/table.py MY_ROWS.json MY_PAGE.md
"""

import argparse
import ast
import json
from itertools import groupby
from pathlib import Path

from lsdseg.cli import command_parser, run_command
from lsdseg.files import write_whole
from ratios import FLAGS, Row, read_rows
from run import HERE, LONG, QUICK, RESULTS

PAGE = HERE.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

`make bench` measures these rows, in about a quarter of an hour on two cores, and `make bench-full` adds the long ones.
Both write `benchmarks/results.json` and this page; nothing here is written by hand. What else was measured, and what it
means for a run, is in [results.md](results.md) and [scale.md](scale.md).

A ratio is what a row costs divided by what the other side costs, so less is better. Both sides run in turns. Each
repeat gives a ratio; the table has their median, the least and the most. So a ratio means something on a machine that
does other work, while a cost alone is only an upper bound there. A goal is the most that a ratio or a cost should be.
The goal of a ratio is met or missed if it is in every repeat, and otherwise unclear; of a cost, the median counts.
"""


def main() -> None:
    """Parse the command line."""
    parser = command_parser(__doc__.splitlines()[0], "python benchmarks/table.py MY_ROWS.json MY_PAGE.md")
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="(default: benchmarks/results.json)")
    parser.add_argument("page", nargs="?", type=Path, default=PAGE, help="(default: docs/benchmarks.md)")
    run_command(parser, write_page)


def write_page(args: argparse.Namespace) -> None:
    """Write the page."""
    text = page_of(read_rows(args.results))
    with write_whole(args.page) as partial:
        partial.write_text(text, encoding="utf-8")
    print(args.page)


def page_of(rows: list[Row]) -> str:
    """Return the page: for each machine and set of versions a table, and how to run each benchmark."""
    parts = [HEAD]
    for setting in dict.fromkeys(map(setting_of, rows)):
        parts.append(section([row for row in rows if setting_of(row) == setting]))
    return "\n".join([*parts, how_to_run({row["command"] for row in rows})])


def setting_of(row: Row) -> str:
    """What two rows have in common if they can stand in one table."""
    return json.dumps([row["machine"], row["versions"]], sort_keys=True)


def section(rows: list[Row]) -> str:
    """Return what describes the machine, and the table."""
    lines = [
        f"## {rows[0]['machine']['cpu']}, {rows[0]['machine']['cores']} cores",
        "",
        description(rows),
        "",
        "| | against | cost | of the other | ratio | least to most | repeats | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for command, group in groupby(rows, lambda row: row["command"]):
        lines.append(f"| **{command.removeprefix('python benchmarks/')}** | | | | | | | |")
        lines += map(line_of, group)
    return "\n".join([*lines, ""])


def description(rows: list[Row]) -> str:
    """Describe the machine, the versions, and how busy the machine was."""
    machine, versions = rows[0]["machine"], rows[0]["versions"]
    features = [flag for flag in FLAGS if flag in machine["flags"]]
    without = [flag for flag in FLAGS if flag not in machine["flags"]]
    cpu = ", ".join([*features, *(f"no {flag}" for flag in without)])
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    threads = machine["OMP_NUM_THREADS"]
    dates, loads = sorted(row["date"][:10] for row in rows), sorted(row["load"] for row in rows)
    text = (
        f"{machine['memory_gb']} GB of memory; {cpu}; {machine['gpu'] or 'no GPU'}. {packages}"
        f"{f', OMP_NUM_THREADS {threads}' if threads else ''}. Measured "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, at a load average of {loads[0]:g} to {loads[-1]:g}."
    )
    if loads[len(loads) // 2] > machine["cores"] + 1:
        text += " Other work shared the cores, so all costs are upper bounds."
    return text


def line_of(row: Row) -> str:
    """Return a row's line of the table."""
    cells = [
        row["name"],
        row["against"],
        f"{number(row['cost'])} {row['unit']}",
        f"{number(row['other_cost'])} {row['unit']}",
        f"**{number(row['ratio'])}**",
        f"{number(row['least'])} to {number(row['most'])}",
        str(row["repeats"]),
        goal_of(row),
    ]
    return f"| {' | '.join(cells)} |"


def goal_of(row: Row) -> str:
    """Return the goal of a row, and whether it was reached; of a cost only the median is known."""
    if row["goal"] is None:
        return ""
    if row["goal_in"] != "ratio":
        return f"{row['goal']:g} {row['goal_in']}, {'met' if row['cost'] <= row['goal'] else 'missed'}"
    verdict = "met" if row["most"] <= row["goal"] else "missed" if row["least"] > row["goal"] else "unclear"
    return f"{row['goal']:g}, {verdict}"


def number(value: float) -> str:
    """Return a number with three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def how_to_run(measured: set[str]) -> str:
    """Return the list of commands, with the first line of what each script says of itself."""
    lines = ["## How to run each", "", "| command | does | `make` |", "|---|---|---|"]
    for command in QUICK + LONG:
        script = (HERE / command.split()[0]).read_text(encoding="utf-8")
        what = (ast.get_docstring(ast.parse(script)) or "").splitlines()[0].partition(": python ")[0].rstrip(".")
        full = f"python benchmarks/{command}"
        target = "bench" if command in QUICK else "bench-full"
        lines.append(f"| `{full}` | {what} | {target}{'' if full in measured else ', not measured here'} |")
    lines += ["", "`--json FILE` writes the ratios of one command to a file, and `--help` explains its options.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
