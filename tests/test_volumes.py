import errno
import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorstore
import zarr
from funlib.geometry import Coordinate, Roi
from funlib.persistence import open_ds

from lsdseg.data_utils.placement import nanometers, offset_nm, voxel_size_nm
from lsdseg.data_utils.replace import write_zarr
from lsdseg.data_utils.volumes import (
    create_array,
    list_arrays,
    open_array,
    read,
    rename_array,
    slabs,
    source_defaults,
    write_array,
)
from lsdseg.errors import UserError
from lsdseg.files import room_on_disk

ZARR_3 = int(zarr.__version__.split(".")[0]) >= 3
FORMAT_2 = {"zarr_format": 2} if ZARR_3 else {}
GRID = {"voxel_size": (40, 4, 4), "offset": (400, 8, 0)}


@pytest.fixture
def data():
    return np.random.default_rng(0).integers(0, 255, (5, 7, 9)).astype(np.uint8)


def bare_zarr(path, dataset, data, attributes, group_attributes=None):
    """A zarr as other software writes it."""
    array = zarr.open_array(store=str(path), path=dataset, mode="w", shape=data.shape, dtype=data.dtype, **FORMAT_2)
    array[:] = data
    array.attrs.update(attributes)
    if group_attributes:
        (path / dataset).parent.joinpath(".zattrs").write_text(json.dumps(group_attributes))


def test_roundtrip(tmp_path, data):
    write_array(tmp_path / "a.zarr", "volumes/raw", data, **GRID, attributes={"note": "x"})
    array = open_array(tmp_path / "a.zarr", "volumes/raw")
    assert array.voxel_size == Coordinate(40, 4, 4)
    assert array.roi == Roi((400, 8, 0), (200, 28, 36))
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array[:], data)
    np.testing.assert_array_equal(read(array), data)
    np.testing.assert_array_equal(read(array, np.s_[1:3, :, 4]), data[1:3, :, 4])
    np.testing.assert_array_equal(array[Roi((440, 12, 4), (80, 8, 12))], data[1:3, 1:3, 1:4])
    assert array.attrs["resolution"] == [40, 4, 4]
    assert array.attrs["offset"] == [400, 8, 0]
    assert array.attrs["note"] == "x"


def test_written_arrays_open_with_other_software(tmp_path, data):
    write_array(tmp_path / "a.zarr", "volumes/raw", data, **GRID)
    header = json.loads((tmp_path / "a.zarr/volumes/raw/.zarray").read_text())
    assert header["zarr_format"] == 2
    assert header["compressor"]["id"] == "zstd"
    assert "raw" in zarr.open_group(str(tmp_path / "a.zarr"), mode="r")["volumes"]
    assert open_ds(tmp_path / "a.zarr/volumes/raw").roi == Roi((400, 8, 0), (200, 28, 36))


def test_channels_come_first_and_share_a_chunk(tmp_path):
    array = create_array(tmp_path / "a.zarr", "affs", (3, 100, 80, 70), dtype=np.float32, **GRID)
    assert array.axis_names == ["c^", "z", "y", "x"]
    assert array.roi.shape == Coordinate(4000, 320, 280)
    assert array.chunk_shape == (3, 64, 64, 64)
    array[:, 2:4] = np.float32(0.5)
    assert read(open_array(tmp_path / "a.zarr", "affs")).sum() == 3 * 2 * 80 * 70 * 0.5


def test_create_replaces_and_rename_moves(tmp_path, data):
    path = tmp_path / "a.zarr"
    write_array(path, "x", data, **GRID)
    create_array(path, "x", (2, 2, 2), dtype=np.uint64, **GRID)
    assert open_array(path, "x").shape == (2, 2, 2)
    assert not read(open_array(path, "x")).any()
    write_array(path, "volumes/y", data, **GRID)
    rename_array(path, "volumes/y", "x")
    np.testing.assert_array_equal(read(open_array(path, "x")), data)
    assert list_arrays(path) == ["x"]


@pytest.mark.parametrize(
    "name",
    ["volumes", "volumes/labels", "foreign", "foreign/inside", "notes", "link", "..", "/x", ".", "a/../../b", ""],
)
def test_nothing_but_own_arrays_is_replaced(tmp_path, data, name):
    path = tmp_path / "a.zarr"
    for dataset in ("volumes/raw", "volumes/labels/ids", "new"):
        write_array(path, dataset, data, **GRID)
    bare_zarr(path, "foreign", data, {"resolution": [40, 4, 4], "offset": [0, 0, 0]})
    (path / "notes").mkdir()
    (path / "notes/mine.txt").write_text("kept")
    (path / "link").symlink_to(path / "volumes/raw")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"not replaced|no name of a dataset|inside the array"):
        write_array(path, name, data, **GRID)
    with pytest.raises(UserError, match=r"not replaced|no name of a dataset|inside the array"):
        write_array(path, f"{name}.partial" if name.isalpha() else name, data, **GRID)
    with pytest.raises(UserError, match=r"not replaced|no name of a dataset|inside the array"):
        rename_array(path, "new", name)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_array_that_cannot_be_made_leaves_nothing(tmp_path, data):
    path = tmp_path / "a.zarr"
    write_array(path, "x", data, **GRID)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TypeError, match="JSON serializable"):
        write_array(path, "x", data, **GRID, attributes={"odd": object()})
    assert sorted(tmp_path.rglob("*")) == before
    np.testing.assert_array_equal(read(open_array(path, "x")), data)


def foreign_file(path, data):
    write_array(path, "x", data, **GRID)
    (path / "notes.txt").write_text("mine")


def foreign_array(path, data):
    bare_zarr(path, "x", data, {"resolution": [40, 4, 4]})


def link(path, data):
    write_array(path.with_name("other.zarr"), "x", data, **GRID)
    path.symlink_to(path.with_name("other.zarr"))


def plain_file(path, data):
    path.write_text("mine")


@pytest.mark.parametrize("make", [foreign_file, foreign_array, link, plain_file])
def test_a_zarr_with_anything_else_is_not_replaced(tmp_path, data, make):
    path = tmp_path / "a.zarr"
    make(path, data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"not replaced|is not a zarr"), write_zarr(path):
        pytest.fail("the body must not run")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_input_is_not_replaced(tmp_path, data):
    inner = tmp_path / "a.zarr/inner.zarr"
    write_array(inner, "x", data, **GRID)
    for target in (inner, tmp_path / "a.zarr", inner / "new.zarr", tmp_path):
        with pytest.raises(UserError, match="is an input"), write_zarr(target, [inner]):
            pytest.fail("the body must not run")
    assert list_arrays(inner) == ["x"]


def test_a_zarr_is_replaced_whole_and_leftovers_of_killed_runs_go(tmp_path, data):
    path, mine = tmp_path / "a.zarr", tmp_path / "a.zarr.partial"
    write_array(path, "old", data, **GRID)
    mine.mkdir()
    killed = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(path,))
    killed.start()
    killed.join(timeout=60)
    assert len(list(tmp_path.iterdir())) == 3
    with write_zarr(path) as first:
        assert first.is_dir()
        with write_zarr(path) as second:  # another run at the same time does not touch the first one's folder
            write_array(second, "second", data, **GRID)
        assert list_arrays(path) == ["second"]
        write_array(first, "first", data, **GRID)
    assert list_arrays(path) == ["first"]
    assert sorted(tmp_path.iterdir()) == [path, mine]


def die_while_writing(path):
    with write_zarr(path):
        os._exit(1)


def test_forked_process_reads(tmp_path, data):
    array = write_array(tmp_path / "a.zarr", "x", data, **GRID)
    array[array.roi]  # a thread pool started here would hang the child
    with multiprocessing.get_context("fork").Pool(1) as pool:
        total = pool.apply_async(sum_in_child, (tmp_path / "a.zarr",)).get(timeout=60)
    assert total == 2 * int(data.sum())


def sum_in_child(path):
    array = open_array(path, "x")
    return int(array[array.roi].sum() + read(array).sum())


def write_sections(path, dataset, data, numbers):
    for number in numbers:
        write_array(path, f"{dataset}/{number}", data[number], voxel_size=(4, 4), offset=(8, 0))


def test_sections_of_one_number_lie_at_one_place(tmp_path, data):
    write_sections(tmp_path / "a.zarr", "raw", data, range(5))
    write_sections(tmp_path / "a.zarr", "labels", data, (2, 3, 4))
    raw, labels = (open_array(tmp_path / "a.zarr", name) for name in ("raw", "labels"))
    assert (raw.offset, raw.voxel_size, raw.shape) == ((0, 8, 0), (4, 4, 4), (5, 7, 9))
    assert (labels.offset, labels.shape) == ((8, 8, 0), (3, 7, 9))
    np.testing.assert_array_equal(raw[labels.roi], labels[labels.roi])


def test_a_missing_section_is_named(tmp_path, data):
    write_sections(tmp_path / "a.zarr", "raw", data, (1, 2, 4))
    with pytest.raises(UserError, match=r"^raw in .*a\.zarr has sections 1 to 4, but no section 3: add it"):
        open_array(tmp_path / "a.zarr", "raw")


@pytest.mark.parametrize(
    "attributes",
    [
        {"resolution": [40.0, 4.0, 4.0], "offset": [400.0, 8.0, 0.0]},
        {"voxel_size": [40, 4, 4], "offset": [400, 8, 0]},
        {"voxel_size": [0.04, 0.004, 0.004], "offset": [0.4, 0.008, 0], "units": ["um"] * 3},
    ],
)
def test_attribute_conventions(tmp_path, data, attributes):
    bare_zarr(tmp_path / "a.zarr", "x", data, attributes)
    array = open_array(tmp_path / "a.zarr", "x")
    assert array.voxel_size == Coordinate(40, 4, 4)
    assert array.offset == Coordinate(400, 8, 0)


@pytest.mark.parametrize(("unit", "factor"), [("nanometer", 1), ("micrometer", 1e-3)])
def test_ome_ngff(tmp_path, data, unit, factor):
    axes = [{"name": "c", "type": "channel"}] + [{"name": n, "type": "space", "unit": unit} for n in "zyx"]
    levels = [
        {
            "path": f"s{level}",
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, 40 * factor, 4 * 2**level * factor, 4 * 2**level * factor]},
                {"type": "translation", "translation": [0, 400 * factor, 8 * factor, 0]},
            ],
        }
        for level in (0, 1)
    ]
    metadata = {"multiscales": [{"axes": axes, "datasets": levels}]}
    bare_zarr(tmp_path / "a.zarr", "volumes/raw/s1", data[None], {}, metadata)
    array = open_array(tmp_path / "a.zarr", "volumes/raw/s1")
    assert array.voxel_size == Coordinate(40, 8, 8)
    assert array.offset == Coordinate(400, 8, 0)


def test_defaults_serve_arrays_without_attributes_only(tmp_path, data):
    preprocess = SimpleNamespace(SOURCE_DATA_RESOLUTION=(8, 8, 8), SOURCE_DATA_OFFSET=(16, 0, 0))
    defaults = source_defaults(SimpleNamespace(PREPROCESS=preprocess))
    bare_zarr(tmp_path / "a.zarr", "x", data, {})
    array = open_array(tmp_path / "a.zarr", "x", **defaults)
    assert (array.voxel_size, array.offset) == ((8, 8, 8), (16, 0, 0))
    write_array(tmp_path / "a.zarr", "y", data, **GRID)
    assert open_array(tmp_path / "a.zarr", "y", **defaults).voxel_size == (40, 4, 4)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "has no voxel size"),
        ({"resolution": [0, 4, 4]}, "correct its attribute resolution"),
        ({"resolution": [4, 4, 4], "units": ["parsec"] * 3}, "'parsec', an unknown unit"),
    ],
)
def test_bad_attributes(tmp_path, data, attributes, message):
    bare_zarr(tmp_path / "a.zarr", "x", data, attributes)
    with pytest.raises(UserError, match=message) as error:
        open_array(tmp_path / "a.zarr", "x")
    assert f"x in {tmp_path / 'a.zarr'}" in str(error.value)


def test_missing(tmp_path, data):
    with pytest.raises(UserError, match=r"a\.zarr does not exist"):
        open_array(tmp_path / "a.zarr", "x")
    write_array(tmp_path / "a.zarr", "volumes/raw", data, **GRID)
    for name in ("volumes/affs", "volumes"):
        with pytest.raises(UserError, match=rf"no dataset {name} in .*a\.zarr; it holds volumes/raw"):
            open_array(tmp_path / "a.zarr", name)


@pytest.mark.skipif(not ZARR_3, reason="zarr 2 does not read format 3")
def test_zarrs_in_format_3_stay_in_format_3(tmp_path, data):
    path = tmp_path / "a.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    group.create_array("volumes/raw", data=data, attributes={"resolution": [40, 4, 4]})
    write_array(path, "volumes/mask", data, **GRID)
    assert list_arrays(path) == ["volumes/mask", "volumes/raw"]
    for name in list_arrays(path):
        np.testing.assert_array_equal(read(open_array(path, name)), data)
        np.testing.assert_array_equal(group[name][:], data)


@pytest.mark.skipif(ZARR_3, reason="zarr 3 reads format 3")
def test_format_3_is_refused_by_zarr_2(tmp_path):
    (tmp_path / "a.zarr/x").mkdir(parents=True)
    (tmp_path / "a.zarr/x/zarr.json").write_text('{"zarr_format": 3, "node_type": "array"}')
    with pytest.raises(UserError, match="zarr format 3, which zarr 2"):
        open_array(tmp_path / "a.zarr", "x")


@pytest.mark.parametrize(
    ("voxel_size", "offset"),
    [((7.5, 7.5, 7.5), (75, -15, 7.5)), ((8, 8, 8), (0.5, 0, 0)), ((20, 4.4, 4.4), (100, 0, 8.8))],
)
def test_nanometers_need_not_be_whole(tmp_path, data, voxel_size, offset):
    """What is made on the voxels of an array has its unit, and files say nanometers."""
    array = write_array(tmp_path / "a.zarr", "x", data, voxel_size=voxel_size, offset=offset)
    assert (voxel_size_nm(array), offset_nm(array)) == (voxel_size, offset)
    assert zarr.open(str(tmp_path / "a.zarr"), mode="r")["x"].attrs["resolution"] == list(voxel_size)
    begin = array.offset + array.voxel_size * Coordinate(1, 2, 3)
    part = Roi(begin, array.voxel_size * 4)
    np.testing.assert_array_equal(array[part], data[1:5, 2:6, 3:7])
    assert nanometers(begin, array) == pytest.approx(np.add(offset, np.multiply((1, 2, 3), voxel_size)))
    child = write_array(
        tmp_path / "a.zarr", "y", data, voxel_size=voxel_size_nm(array), offset=nanometers(begin, array)
    )
    assert (child.units, child.voxel_size, child.offset) == (array.units, array.voxel_size, begin)


def test_many_voxels_of_a_third_of_a_nanometer_stay_on_their_grid(tmp_path, data):
    first, second = (
        write_array(tmp_path / "a.zarr", str(n), data, voxel_size=(25 / 3,) * 3, offset=(n * 25 / 3, 0, 0))
        for n in (0, 1000)
    )
    assert not any((second.offset - first.offset) % first.voxel_size)


def test_a_voxel_size_is_checked_before_anything_is_replaced(tmp_path, data):
    write_array(tmp_path / "a.zarr", "x", data, **GRID)
    with pytest.raises(UserError, match="correct its attribute resolution"):
        write_array(tmp_path / "a.zarr", "x", data, voxel_size=(-4.5, 4, 4), offset=(0, 0, 0))
    np.testing.assert_array_equal(read(open_array(tmp_path / "a.zarr", "x")), data)


@pytest.mark.parametrize("max_bytes", [1, 2**14, 2**17, 2**30])
def test_slabs_cover_the_array_once_within_memory(tmp_path, max_bytes):
    array = create_array(tmp_path / "a.zarr", "x", (2, 33, 40, 50), dtype=np.uint64, chunk_shape=(2, 8, 8, 16), **GRID)
    count = np.zeros(array.shape, int)
    for slab in slabs(array, max_bytes):
        count[slab] += 1
        assert count[slab].size * 8 <= max(max_bytes, 2 * 8 * 8 * 16 * 8)
        assert all(along.start % chunk == 0 for along, chunk in zip(slab, array.chunk_shape, strict=True))
    assert (count == 1).all()
    assert len(slabs(array, 2**30)) == 1


def test_too_little_room_is_noticed_before_writing(tmp_path):
    path = tmp_path / "new" / "a.zarr"
    message = rf"no room on disk for {path}: 1000000000\.0 GB needed, .* free"
    with pytest.raises(UserError, match=message), room_on_disk(path, 10**18):
        pytest.fail("the body must not run")
    with room_on_disk(path, 1):
        path.mkdir(parents=True)


def test_full_disk_while_writing(tmp_path):
    full_disk = Path("/dev/full")
    with pytest.raises(UserError, match="No space left on device"), room_on_disk(tmp_path / "a.zarr"):
        full_disk.write_bytes(b"x")
    with pytest.raises(OSError, match="other") as error, room_on_disk(tmp_path):
        raise OSError(errno.EIO, "other")
    assert not isinstance(error.value, UserError)


def test_others_read_our_zarrs_and_chunks_hold_checksums(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 200, (20, 30, 70)).astype(np.uint64)
    write_array(tmp_path / "a.zarr", "em", voxels, voxel_size=(8, 8, 8), offset=(0, 0, 0))
    open_array(tmp_path / "a.zarr", "em", "r+")[:5] = voxels[:5]  # written by what the metadata say
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/a.zarr/em/"}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), voxels)
    has_checksum = 0b100  # RFC 8878, 3.1.1.1.1: Frame_Header_Descriptor
    chunks = [file for file in (tmp_path / "a.zarr/em").rglob("*") if file.is_file() and file.name.isdigit()]
    assert len(chunks) == 2
    assert all(chunk.read_bytes()[4] & has_checksum for chunk in chunks)
