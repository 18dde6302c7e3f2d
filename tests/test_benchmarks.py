"""Benchmarks answer --help, write rows of one form, and the page is made of those rows."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ratios
import run
import table

CHECKOUT = Path(__file__).resolve().parents[1]
BENCHMARKS = CHECKOUT / "benchmarks"


COMMANDS = [*run.QUICK, *run.LONG]


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """A function that adds one row with a command, on a machine with another CPU if that is named."""

    def make(command, *costs, cpu=None, load=0.0, **goal):
        monkeypatch.setattr(sys, "argv", ["benchmarks/" + command.split()[0], *command.split()[1:]])
        monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
        rows = ratios.Rows(tmp_path / "rows.json")
        if cpu:
            rows.machine["cpu"] = cpu
        rows.add("ours", *costs[:1], "theirs", *costs[1:], **goal)
        return ratios.read_rows(tmp_path / "rows.json")

    return make


def test_a_ratio_is_the_median_of_pairs(rows_of):
    (row,) = rows_of("luts.py --edges 10 --json out.json", [2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert (row["ratio"], row["least"], row["most"], row["repeats"]) == (2, 1, 3, 3)
    assert (row["cost"], row["other_cost"]) == (4, 3)
    assert row["command"] == "python benchmarks/luts.py --edges 10"
    assert row["machine"]["cores"] >= 1
    assert row["versions"].keys() == {"python", "torch", "numpy", "daisy"}


def test_sides_take_turns():
    calls = []
    sides = [lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"]
    assert ratios.in_turns(3, *sides) == [[1, 4, 5], [2, 3, 6]]
    assert calls == list("abbaab")


def test_the_page_shows_ratios_goals_machines_and_load(rows_of):
    rows = [
        *rows_of("luts.py", [3.0, 1.0, 2.0], [1.0, 1.0, 1.0], goal=0.5),
        *rows_of("luts.py", [3.0, 1.0], [1.0, 1.0], goal=2.5),
        *rows_of("luts.py", [3.0, 1.0], [1.0, 1.0], goal=3),
        *rows_of("luts.py", [0.25], [1.0], goal=0.5, goal_in="s"),
        *rows_of("tree.py", [5.0], [1.0], cpu="Another CPU", load=1000.0),
    ]
    page = table.page_of(rows)
    assert "| ours | theirs | 2 s | 1 s | **2** | 1 to 3 | 3 | 0.5, missed |" in page
    assert "| 1 to 3 | 2 | 2.5, unclear |" in page
    assert "| 1 to 3 | 2 | 3, met |" in page
    assert "| ours | theirs | 0.25 s | 1 s | **0.25** | 0.25 to 0.25 | 1 | 0.5 s, met |" in page
    first, second = re.split(r"^## .* cores$", page, flags=re.MULTILINE)[1:]
    assert "Other work shared the cores" in second
    assert "Other work shared the cores" not in first
    assert all(f"`python benchmarks/{command}`" in page for command in COMMANDS)


def test_the_page_in_docs_is_made_of_the_rows_that_are_kept():
    page = (CHECKOUT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == table.page_of(ratios.read_rows(BENCHMARKS / "results.json")), "run python benchmarks/table.py"


def test_a_command_that_runs_again_replaces_its_own_rows(rows_of):
    quick, other = run.QUICK[0], run.QUICK[1]
    old = [*rows_of(other, [1.0], [1.0]), *rows_of(quick, [2.0], [1.0]), *rows_of("gone.py", [1.0], [1.0])]
    merged = run.merged(old, rows_of(quick, [3.0], [1.0]), quick)
    assert [(row["command"].split()[1], row["ratio"]) for row in merged] == [
        (f"benchmarks/{quick.split()[0]}", 3),
        (f"benchmarks/{other.split()[0]}", 1),
    ]


@pytest.mark.parametrize("name", sorted({command.split()[0] for command in COMMANDS}))
def test_benchmarks_that_make_runs_exist_and_explain_their_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    assert ended.value.code == 0
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    given = {word for command in COMMANDS if command.split()[0] == name for word in command.split()[1:]}
    assert "--json" in options
    assert {word for word in given if word.startswith("--")} <= options


def test_a_benchmark_writes_rows_as_it_prints(tmp_path):
    file = tmp_path / "rows.json"
    words = [BENCHMARKS / "table_tree.py", "--grid", "2", "--edge", "4", "--repeats", "2", "--json", file]
    done = subprocess.run([sys.executable, *words], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = ratios.read_rows(file)
    assert 0 < row["least"] <= row["ratio"] <= row["most"]
    assert row["repeats"] == 2
    assert done.stdout.count("down, and tables") == 2


@pytest.mark.parametrize("content", ["", "{}", '[{"name": "ours"}]', None])
def test_damaged_rows_are_one_line(tmp_path, content):
    file, page = tmp_path / "rows.json", tmp_path / "page.md"
    if content is not None:
        file.write_text(content)
    for words in (["table.py", file, page], ["run.py", "--results", file, "no_such_benchmark"]):
        done = subprocess.run([sys.executable, BENCHMARKS / words[0], *words[1:]], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert not page.exists()


def test_rows_are_json_a_line_each(rows_of, tmp_path):
    rows = rows_of("luts.py", [1.0], [1.0])
    ratios.write_rows(tmp_path / "two.json", [*rows, *rows])
    lines = (tmp_path / "two.json").read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == [*rows, *rows]
