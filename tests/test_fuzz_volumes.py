"""Damaged and odd volumes, drawn at random: each ends well or in one line, and leaves everything else as it was."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import pytest
import zarr
from fuzz import damage, ends_well_or_in_one_line, fuzz, json_values
from hypothesis import given
from hypothesis import strategies as st
from test_corrected import write_annotation

from lsdseg.data_utils.convert import convert
from lsdseg.data_utils.corrected import import_proofread
from lsdseg.data_utils.stored import ZARR_VERSION, count_chunks, read_header
from lsdseg.data_utils.volumes import has_array, is_stored, list_arrays, open_array, read, slabs, write_array

GRID = {"voxel_size": (40, 4, 4), "offset": (400, 8, 0)}
DATA = np.random.default_rng(0).integers(1, 255, (5, 7, 9)).astype(np.uint8)
COMPRESSORS = {
    "none": None,
    "own": numcodecs.Zstd(level=1, checksum=True),
    "zstd": numcodecs.Zstd(),
    "gzip": numcodecs.GZip(),
    "bz2": numcodecs.BZ2(),
    "lz4": numcodecs.LZ4(),
    **{f"blosc_{name}": numcodecs.Blosc(name) for name in ("lz4", "zstd", "zlib", "blosclz")},
}
SCALE = {"type": "scale", "scale": [40, 4, 4]}
MULTISCALES = [
    {"axes": [{"name": n, "type": "space", "unit": "nanometer"} for n in "zyx"], "datasets": [{"path": "none"}]}
]
MULTISCALES[0]["datasets"][0]["coordinateTransformations"] = [SCALE]


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "a.zarr"
    for name in ("volumes/raw", "volumes/labels/ids"):
        write_array(path, name, DATA, **GRID)
    return path


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """A zarr with an array for each compressor, of chunks (3, 4, 9), as other software writes them."""
    path = tmp_path_factory.mktemp("fuzz") / "a.zarr"
    for name, compressor in COMPRESSORS.items():
        array = zarr.open_array(
            store=str(path),
            path=name,
            mode="w",
            shape=DATA.shape,
            chunks=(3, 4, 9),
            dtype="<u2",
            compressor=compressor,
            **({"zarr_format": 2} if ZARR_VERSION >= 3 else {}),
        )
        array[:] = DATA // 40
        array.attrs["resolution"] = [40, 4, 4]
    return path


@pytest.fixture(scope="module")
def hdf(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "a.hdf"
    with h5py.File(path, "w") as file:
        file.create_dataset("volumes/raw", data=DATA, chunks=(2, 4, 9), compression="gzip")
        file.create_dataset("volumes/labels/neuron_ids", data=DATA.astype(np.int32))
        file.create_dataset("annotations/names", data=np.full(3, b"axon"))
        for name in ("raw", "labels/neuron_ids"):
            file[f"volumes/{name}"].attrs["resolution"] = (40.0, 4.0, 4.0)
    return path


def use(path, dataset):
    """Everything that a script does with a dataset that it reads."""
    list_arrays(path)
    has_array(path, dataset)
    array = open_array(path, dataset)
    count_chunks(read_header(path / dataset))
    box = tuple(slice(0, min(size, 6)) for size in array.shape)
    is_stored(path, dataset, box)
    assert len(slabs(array)) >= 1
    assert read(array, box).shape == tuple(along.stop for along in box)


def files_in(folder):
    """Path -> content of every file but the headers of groups."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        file.relative_to(folder): file.read_bytes()
        for file in files
        if file.name not in (".zgroup", ".zattrs", "zarr.json") or file.with_name(".zarray").is_file()
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
        with ends_well_or_in_one_line() as refused:
            write_array(path, name, DATA[:2] + 1, **GRID)
        if refused:
            assert files_in(Path(folder)) == before
            return
        written = Path(*(part for part in name.split("/") if part))
        np.testing.assert_array_equal(read(open_array(path, name)), DATA[:2] + 1)
        assert written.as_posix() in list_arrays(path)
        others = {file for file in before if not file.is_relative_to("a.zarr" / written)}
        after = files_in(Path(folder))
        assert {file: after[file] for file in others} == {file: before[file] for file in others}
        assert all(file in before or file.is_relative_to("a.zarr" / written) for file in after)


@fuzz
@given(
    key=st.sampled_from(["shape", "chunks", "dtype", "compressor", "fill_value", "order", "filters", "zarr_format"])
    | st.just("dimension_separator"),
    value=json_values
    | st.lists(st.integers(-1, 2**40), max_size=4)
    | st.sampled_from(["<u2", "|O", ">f4", "<f16", "|S3", "<M8[ns]", "|b1", "|V9", {"id": "blosc"}, [{"id": "delta"}]]),
)
def test_damaged_headers(arrays, key, value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.zarr")
        shutil.copytree(arrays / "none", path / "none")
        header = path / "none/.zarray"
        header.write_text(json.dumps(json.loads(header.read_text()) | {key: value}))
        with ends_well_or_in_one_line() as refused:
            use(path, "none")
        assert not refused or str(path / "none") in refused[0]


@fuzz
@given(file=st.sampled_from([".zarray", ".zattrs"]), change=damage())
def test_damaged_text_of_headers(arrays, file, change):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.zarr")
        shutil.copytree(arrays / "none", path / "none")
        header = path / "none" / file
        header.write_bytes(change(header.read_bytes()))
        with ends_well_or_in_one_line() as refused:
            use(path, "none")
        assert not refused or str(path) in refused[0]


@fuzz
@given(
    attributes=st.dictionaries(
        st.sampled_from(["resolution", "voxel_size", "offset", "units", "axis_names"]),
        json_values | st.lists(st.integers(-5, 50) | st.floats(), min_size=2, max_size=4),
    )
)
def test_damaged_attributes(arrays, attributes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.zarr")
        shutil.copytree(arrays / "none", path / "none")
        (path / "none/.zattrs").write_text(json.dumps(attributes))
        with ends_well_or_in_one_line() as refused:
            use(path, "none")
        assert not refused or str(path) in refused[0]


def replaced_inside(tree, steps, value):
    """A copy of a JSON tree with the value at the end of a path; each step chooses a child by number."""
    if not steps or not isinstance(tree, list | dict) or not tree:
        return value
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    at = keys[steps[0] % len(keys)]
    changed = tree.copy()
    changed[at] = replaced_inside(tree[at], steps[1:], value)
    return changed


@fuzz
@given(steps=st.lists(st.integers(0, 5), max_size=6), value=json_values)
def test_damaged_ome_metadata(arrays, steps, value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.zarr")
        shutil.copytree(arrays / "none", path / "none")
        (path / "none/.zattrs").write_text("{}")
        (path / ".zattrs").write_text(json.dumps(replaced_inside({"multiscales": MULTISCALES}, steps, value)))
        with ends_well_or_in_one_line() as refused:
            use(path, "none")
        assert not refused or str(path) in refused[0]


@fuzz
@given(name=st.sampled_from(sorted(COMPRESSORS)), change=damage())
def test_damaged_chunks(arrays, name, change):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.zarr")
        shutil.copytree(arrays / name, path / name)
        file = path / name / "1.0.0"
        whole = file.read_bytes()
        file.write_bytes(change(whole))
        with ends_well_or_in_one_line() as refused:
            same = np.array_equal(read(open_array(path, name)), DATA // 40)
        if refused:
            assert str(file) in refused[0]
        else:  # plain formats have no checksums, but what is too short is noticed
            assert same or (name != "own" and len(file.read_bytes()) >= len(whole))


@fuzz
@given(
    at=st.sampled_from(["", "own", "own/.zarray", "own/.zattrs", "own/0.0.0", "own/1.0.0"]),
    kind=st.sampled_from(["nothing", "folder", "loop", "up", "pipe", "device", "unreadable"]),
)
def test_anything_in_the_place_of_a_file(arrays, at, kind):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "zarrs/a.zarr")
        shutil.copytree(arrays / "own", path / "own")
        place = path / at
        if kind != "unreadable":
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        if kind == "unreadable":
            place.chmod(0)
        elif kind == "folder":
            place.mkdir()
        elif kind == "pipe":
            os.mkfifo(place)
        elif kind != "nothing":
            place.symlink_to({"loop": place.name, "up": "..", "device": "/dev/zero"}[kind])
        with ends_well_or_in_one_line():
            use(path, "own")


@fuzz
@given(changes=st.lists(damage(), min_size=1, max_size=3))
def test_damaged_hdf(hdf, changes):
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.hdf"), Path(folder, "out/a.zarr")
        content = hdf.read_bytes()
        for change in changes:
            content = change(content)
        source.write_bytes(content)
        with ends_well_or_in_one_line() as refused:
            convert(source, target)
        assert (not target.exists()) == bool(refused)
        assert not refused or str(source) in refused[0]
        assert not list(Path(folder).rglob(".*.partial"))


@pytest.fixture(scope="module")
def corrected(tmp_path_factory):
    """A sample, and corrected ids of it: an array of numpy, and an annotation of webKnossos."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_array(folder / "a.zarr", "volumes/raw", DATA, voxel_size=(40, 4, 4), offset=(0, 0, 0))
    np.save(folder / "ids.npy", DATA.astype(np.uint32))
    write_annotation(folder / "ids.zip", DATA.astype(np.uint64), [(0, 0, 0)], scale=(40, 4, 4))
    return folder


@fuzz
@given(name=st.sampled_from(["ids.npy", "ids.zip"]), changes=st.lists(damage(), min_size=1, max_size=3))
def test_damaged_corrections(corrected, name, changes):
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, name), Path(folder, "out/a.zarr")
        content = (corrected / name).read_bytes()
        for change in changes:
            content = change(content)
        source.write_bytes(content)
        with ends_well_or_in_one_line() as refused:
            import_proofread(source, target, sample=corrected / "a.zarr", region="0:200,0:28,0:36")
        assert (not target.exists()) == bool(refused)
        assert not list(Path(folder).rglob(".*.partial"))
