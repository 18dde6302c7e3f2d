"""Damaged and odd volumes, drawn at random: each ends well or in one line, and leaves everything else as it was."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.errors import UserError

GRID = {"voxel_size": (40, 4, 4), "offset": (400, 8, 0)}
DATA = np.random.default_rng(0).integers(1, 255, (5, 7, 9)).astype(np.uint8)


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "a.zarr"
    for name in ("volumes/raw", "volumes/labels/ids"):
        write_array(path, name, DATA, **GRID)
    return path


def one_line(error):
    """The message of a UserError, which a user reads in one line."""
    text = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert "\n" not in text
    assert 20 < len(text) < 600, text
    return text


def files_in(folder):
    """Path -> content of every file, of every one but headers of groups."""
    return {
        file.relative_to(folder): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (".zgroup", "zarr.json")
    }


names = st.text() | st.lists(
    st.sampled_from(["volumes", "raw", "labels", "ids", ".", "..", "", "0", "c", ".zarray", "new", "x.partial", "ä"])
).map("/".join)


@fuzz
@given(name=names)
def test_an_array_of_any_name_harms_no_other(volume, name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.zarr")
        shutil.copytree(volume, path)
        before = files_in(Path(folder))
        try:
            write_array(path, name, DATA[:2] + 1, **GRID)
        except UserError as error:
            one_line(error)
            assert files_in(Path(folder)) == before
            return
        written = Path(*(part for part in name.split("/") if part not in (".", "")))
        np.testing.assert_array_equal(read(open_array(path, name)), DATA[:2] + 1)
        assert written.as_posix() in list_arrays(path)
        others = {file for file in before if not file.is_relative_to("a.zarr" / written)}
        after = files_in(Path(folder))
        assert {file: after[file] for file in others} == {file: before[file] for file in others}
        assert all(file in before or file.is_relative_to("a.zarr" / written) for file in after)
