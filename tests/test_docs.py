"""What the documentation shows runs as it stands."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lsdseg.config.implementations import METHODS, SCHEDULERS, resolve
from lsdseg.config.model_types import TASKS
from lsdseg.engine.blocks.workers import Workers

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("pretrained/*.md")]


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """All names that the examples of docs/python.md leave."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "pretrained").symlink_to(CHECKOUT / "pretrained")
    examples = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs" / "python.md").read_text(), re.DOTALL)
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec("\n".join(examples), names)
    return names


def test_python_examples_predict_and_segment(namespace):
    raw, labels = namespace["raw"], namespace["labels"]
    assert namespace["affinities"].shape == (9, *raw.shape)
    assert namespace["lsds"].shape == namespace["target"].shape == (10, *raw.shape)
    assert namespace["by_mutex"].shape == labels.shape
    assert list(namespace["segmentations"]) == [0.4, 0.5, 0.6]
    assert 0 <= namespace["scores"]["voi_sum"] < 5


def test_python_examples_read_the_graph(namespace):
    ids, u, scores = namespace["ids"], namespace["u"], namespace["merge_scores"]
    assert sorted(namespace["nodes"]["id"]) == ids.tolist()
    assert list(namespace["nodes"]) == ["id", "center_z", "center_y", "center_x"]
    assert len(namespace["weak"]) == np.count_nonzero(scores > np.float32(0.4))
    assert namespace["batch_u"].tolist() == u.tolist()
    _, groups = np.unique(namespace["segmentations"][0.4], return_inverse=True)
    _, from_graph = np.unique(namespace["at_04"], return_inverse=True)
    assert len(set(zip(groups.ravel().tolist(), from_graph.ravel().tolist(), strict=True))) == groups.max() + 1


def test_import_does_not_clash_with_packages_of_others(tmp_path):
    """Notebooks have their own `config` and `models` beside them."""
    for name in ("config", "models"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    code = "import config, models, lsdseg; lsdseg.load_config(); print(config.mine, models.mine, lsdseg.agglomerate)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True True <function agglomerate")


@pytest.mark.parametrize("table", [METHODS, SCHEDULERS, {name: task.target for name, task in TASKS.items()}])
def test_tables_name_code_that_exists(table):
    for reference in table.values():
        assert callable(resolve(reference))


def test_methods_and_schedulers_are_called_what_the_config_calls_them():
    assert {name: resolve(reference).name for name, reference in METHODS.items()} == {name: name for name in METHODS}
    assert all(issubclass(resolve(reference), Workers) for reference in SCHEDULERS.values())


@pytest.mark.parametrize("page", sorted(page.relative_to(CHECKOUT) for page in PAGES), ids=str)
def test_links_lead_somewhere(page):
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (CHECKOUT / page).parent.joinpath(link).exists()]
    assert not missing


def test_every_function_fits_on_a_screen():
    """No function of the suite is longer than 60 lines."""
    too_long = []
    folders = [CHECKOUT / part for part in ("lsdseg", "data_utils", "config", "pretrained")]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    for file in [*files, *CHECKOUT.glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 >= 60:
                too_long.append(f"{file.relative_to(CHECKOUT)}: {node.name}")
    assert not too_long


SLOW = {"dask", "funlib", "numba", "scipy", "torch"}  # what takes most of a second to import


def test_scripts_import_what_does_the_work_only_when_it_is_called():
    scripts = [*CHECKOUT.glob("*.py"), *CHECKOUT.glob("data_utils/*.py")]
    program = "import runpy, sys\nfor path in sys.argv[1:]: runpy.run_path(path)\nprint(*sys.modules)"
    assert len(scripts) > 15
    loaded = subprocess.run(
        [sys.executable, "-c", program, *map(str, scripts)], capture_output=True, text=True, check=True
    )
    assert not SLOW & set(loaded.stdout.split())
