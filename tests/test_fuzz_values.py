"""Random configs, command lines and checkpoints: each ends well or in one line with status 2, and leaves nothing."""

import contextlib
import io
import os
import re
import runpy
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from lsdseg.config.defaults import get_cfg_defaults
from lsdseg.config.loader import CHECKOUT, dump_config, load_config
from lsdseg.config.rules import MERGE_FUNCTIONS, RULES
from lsdseg.engine.predict.arrays import config_for
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import load_checkpoint, network_settings, save_checkpoint

SECONDS = 120  # a case that takes longer hangs
SECRET = "s3cr3t"
SCRIPTS = sorted(
    file.relative_to(CHECKOUT).as_posix()
    for folder in (".", "data_utils", "pretrained")
    for file in (CHECKOUT / folder).glob("*.py")
    if "__main__" in file.read_text() and file.name not in ("demo.py", "phantom.py")
)

# Hypothesis also draws constants from this file. A password is only kept secret in its place, in an address.
text = st.text().filter(lambda drawn: SECRET not in drawn)
odd_text = (
    text
    | st.integers(300, 10**5).map(lambda length: "x" * length)
    | st.sampled_from(
        ["", "~", "~nosuchuser", "..", "/", "x" * 300, "None", "nan", "1e999", "[" * 200, "9" * 5000, "\ud800"]
        + [
            "2020-99-99",
            "!!python/name:os.system",
            "*a",
            "&a [*a]",
            "cuda:99",
            f"mongodb://anna:{SECRET}@h:1/?tls=true",
        ]
        + [
            "-1",
            "0",
            "1",
            "2",
            "0.5",
            "(8, 8, 8)",
            "[[2, 2, 2]]",
            "True",
            "mean",
            "mutex",
            "a.yaml",
            "-c",
            "-th",
            "--help=",
        ]
    )
)
numbers = st.integers() | st.floats() | st.integers(-3, 300) | st.sampled_from([2**32, 10**4000, -1, 0.5])
leaves = st.none() | st.booleans() | numbers | odd_text | st.dates() | st.binary(max_size=3)
plain = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_text, inner, max_size=3), max_leaves=12
)
shapes = st.lists(st.integers(0, 300), min_size=2, max_size=3)
values = plain | shapes | st.lists(shapes, max_size=4) | st.lists(st.lists(shapes, max_size=3), max_size=5)
DEFAULTS = {f"{section}.{name}": value for section, keys in get_cfg_defaults().items() for name, value in keys.items()}
known_values = st.sampled_from(list(DEFAULTS.values()))
keys = st.sampled_from(list(RULES)) | odd_text


class Hang(BaseException):
    """A case took too long."""


@contextlib.contextmanager
def no_hang():
    def stop(*_):
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def empty_folder():
    """An empty current directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def files_in(folder):
    """All files and folders but caches of libraries."""
    files = (file.relative_to(folder) for file in folder.rglob("*"))
    return sorted(file.as_posix() for file in files if file.parts[0] not in (".cache", ".config"))


def assert_one_line(error):
    assert re.fullmatch(r"[^\n]{10,1000}", str(error))
    assert SECRET not in str(error)


def assert_loads(*arguments):
    """Load a config. It loads again from what is written of it, or ends in one line."""
    try:
        cfg = load_config(*arguments)
    except UserError as error:
        assert_one_line(error)
        return
    dump_config(cfg, "out.yaml")
    assert SECRET not in Path("out.yaml").read_text()
    again = load_config("out.yaml")
    again.defrost()
    again.DATA.DB_HOST = cfg.DATA.DB_HOST
    assert again == cfg


@fuzz
@given(pairs=st.lists(st.tuples(keys, values | known_values), max_size=4))
def test_any_pairs(pairs):
    with empty_folder(), no_hang():
        assert_loads(None, [part for pair in pairs for part in pair])


trees = st.dictionaries(
    st.sampled_from(sorted(get_cfg_defaults())) | odd_text,
    st.dictionaries(st.sampled_from([key.partition(".")[2] for key in RULES]) | odd_text, values, max_size=3) | values,
    max_size=3,
)


@fuzz
@given(tree=trees, cut=st.none() | st.integers(0, 300), noise=st.text(max_size=3))
def test_any_yaml_file(tree, cut, noise):
    with empty_folder() as folder, no_hang():
        text = yaml.dump(tree, allow_unicode=True)
        text = text if cut is None else text[:cut] + noise + text[cut:]
        (folder / "a.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        assert_loads("a.yaml")


ENDINGS = ["raise SystemExit", "import sys\nsys.exit('x' * 10**5)", "1 / 0", "def get_cfg_defaults(): return 1 / 0"]
ENDINGS += [
    "cfg = cfg, cfg",
    "import numpy as np\ncfg = {'MODEL_ISO': {'VOXEL_SIZE': np.zeros((3, 3))}}",
    "assert 0",
    "",
]


@fuzz
@given(tree=trees, ending=st.sampled_from(ENDINGS) | text)
def test_any_python_file(tree, ending):
    with empty_folder() as folder, no_hang():
        text = f"import datetime\nnan = inf = 1e999\ncfg = {tree!r}\n{ending}\n" if len(repr(tree)) < 4000 else ending
        (folder / "a.py").write_bytes(text.encode("utf-8", "surrogatepass"))
        assert_loads("a.py")


def can_be_argument(word):
    """Whether a shell can pass it: it is what some bytes decode to, without a zero."""
    try:
        return b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:
        return False


words = (
    keys
    | odd_text
    | values.map(lambda value: str(value)[:4000] if not isinstance(value, int) else hex(value))
    | st.sampled_from(
        ["-c", "-mf", "-th", "--raw", "--out", "--to", "--sections", "--labels", "--like", "--resolution"]
    )
    | st.sampled_from(["config_cremi.py", "config_snemi.py", "a.zarr", *MERGE_FUNCTIONS])
).filter(can_be_argument)


@fuzz
@given(script=st.sampled_from(SCRIPTS), arguments=st.lists(words, max_size=6), more=st.booleans())
def test_any_command_line(script, arguments, more):
    """The folders of the data are empty, so what passes all checks of values ends there."""
    home = ["DATA.HOME", "home"] if more and not script.startswith("data_utils") else []
    with empty_folder() as folder, no_hang(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments, *home])
        patch.setenv("HOME", str(folder))
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(CHECKOUT / script), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        assert SECRET not in out.getvalue() + err.getvalue()
        if status:
            assert status == 2
            error = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
            assert len(error) == 1
            assert_one_line(error[0])
            assert files_in(folder) == []


SMALL = ["MODEL_ISO.NUM_FMAPS", 2, "MODEL_ISO.NUM_FMAPS_OUT", 2, "MODEL_ISO.FMAP_INC_FACTOR", 1]
SMALL += ["MODEL_ISO.DOWNSAMPLE_FACTORS", [[2, 2, 2]], "MODEL_ISO.KERNEL_SIZE_DOWN", None]
SMALL += ["MODEL_ISO.KERNEL_SIZE_UP", None, "MODEL_ISO.INPUT_SHAPE", (20, 20, 20)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config, a network, its optimizer and a checkpoint of them."""
    cfg = load_config(None, SMALL)
    model = build_model(cfg)
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    path = tmp_path_factory.mktemp("run") / "model_checkpoint_1"
    more = {"ema_state_dict": model.state_dict(), "validation_voi": 1.5}
    statistics = {"histogram": [1 / 256] * 256, "voxel_size": [8.0, 8.0, 8.0], "lines": -0.2, "contrast": 0.1}
    more["training_data"] = [statistics]
    save_checkpoint(path, model, optimizer, 1, network_settings(cfg), **more)
    return cfg, model, optimizer, path


tensors = st.sampled_from(
    [torch.tensor(float("nan")), torch.zeros(2), torch.zeros(2, 1, 3, 3, 3), torch.ones(2, dtype=torch.complex64)]
    + [torch.zeros(2).to_sparse(), torch.zeros(1).expand(10**6), torch.zeros(2, dtype=torch.int8), torch.zeros(0)]
)
DAMAGE = ["values", "tensors", "bytes"]


def places(tree, path=()):
    """The paths to all entries of a checkpoint."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


@fuzz
@given(data=st.data(), kind=st.sampled_from(DAMAGE))
def test_any_checkpoint(trained, data, kind):
    cfg, model, optimizer, original = trained
    with empty_folder() as folder, no_hang():
        path = folder / "model_checkpoint_1"
        content = original.read_bytes()
        if kind == "bytes":
            position = data.draw(st.integers(0, len(content)))
            changed = content[:position] + data.draw(st.binary(max_size=4)) + content[position + 1 :]
            path.write_bytes(changed[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
        else:
            state = torch.load(original, weights_only=True)
            for place in data.draw(st.lists(st.sampled_from(list(places(state))), min_size=1, max_size=3)):
                holder = state
                try:
                    for key in place[:-1]:
                        holder = holder[key]
                    old = holder[place[-1]]
                except (KeyError, IndexError, TypeError):
                    continue  # an earlier change took it away
                if isinstance(holder, torch.Tensor):
                    continue  # an earlier change put it there
                if kind == "tensors" and isinstance(old, torch.Tensor):
                    odd = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
                    holder[place[-1]] = torch.full(old.shape, odd)
                else:
                    holder[place[-1]] = data.draw(plain | tensors)
            torch.save(state, path)
        for arguments in ((), (optimizer,)):
            try:
                iteration = load_checkpoint(path, model, cfg, *arguments)
            except UserError as error:
                assert_one_line(error)
                continue
            assert iteration >= 0
        try:
            config_for(path)
        except UserError as error:
            assert_one_line(error)
            assert all(torch.isfinite(weights).all() for weights in model.parameters())
