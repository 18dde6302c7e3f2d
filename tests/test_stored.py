import json
import os

import numcodecs
import numpy as np
import pytest
import zarr
from yacs.config import CfgNode

from lsdseg.data_utils.masks import open_mask
from lsdseg.data_utils.stored import ZARR_VERSION, count_chunks, read_header
from lsdseg.data_utils.volumes import (
    create_array,
    has_array,
    list_arrays,
    open_array,
    read,
    rename_array,
    require_whole,
    seal_array,
    write_array,
)
from lsdseg.errors import UserError

GRID = {"voxel_size": (40, 4, 4), "offset": (400, 8, 0)}
DATA = np.random.default_rng(0).integers(0, 99, (8, 12, 16)).astype(np.uint16)
FORMATS = [2, pytest.param(3, marks=pytest.mark.skipif(ZARR_VERSION < 3, reason="zarr 2 does not read format 3"))]


def foreign(path, compressor, separator=".", filters=None):
    """An array of chunks (4, 6, 8) as other software writes it."""
    array = zarr.open_array(
        store=str(path),
        path="x",
        mode="w",
        shape=DATA.shape,
        chunks=(4, 6, 8),
        dtype=DATA.dtype,
        compressor=compressor,
        filters=filters,
        dimension_separator=separator,
        **({"zarr_format": 2} if ZARR_VERSION >= 3 else {}),
    )
    array[:] = DATA
    array.attrs["resolution"] = [40, 4, 4]
    return array


def own(path, zarr_format=2):
    if zarr_format == 3:
        zarr.open_group(str(path), mode="w", zarr_format=3)
    array = create_array(path, "x", DATA.shape, dtype=DATA.dtype, chunk_shape=(4, 6, 8), **GRID)
    array[:] = DATA
    return read_header(path / "x").chunk_file((1, 0, 1))


def damage_is_named(path, file, reason=""):
    """Reading what touches the chunk names its file; reading the rest works."""
    array = open_array(path, "x")
    for voxels in (np.s_[:], np.s_[5, 2:4, -1], np.s_[..., 8:]):
        with pytest.raises(UserError, match=rf"x/\S* is damaged .*{reason}.*: restore it") as error:
            read(array, voxels)
        assert str(file) in str(error.value)
        assert len(str(error.value)) < 500
    with pytest.raises(UserError, match="is damaged"):
        array[array.roi]
    np.testing.assert_array_equal(read(array, np.s_[:4]), DATA[:4])


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("filters", [None, [numcodecs.Delta("<u2")]])
@pytest.mark.parametrize("left", [0, 10, 16, 100, -1])
def test_a_truncated_chunk_of_blosc_is_named(tmp_path, separator, filters, left):
    path = tmp_path / "a.zarr"
    foreign(path, numcodecs.Blosc(), separator, filters)
    np.testing.assert_array_equal(read(open_array(path, "x")), DATA)
    file = read_header(path / "x").chunk_file((1, 0, 1))
    file.write_bytes(file.read_bytes()[:left])
    damage_is_named(path, file)


@pytest.mark.parametrize("compressor", [None, numcodecs.GZip(), numcodecs.Zstd(), numcodecs.LZ4()], ids=str)
def test_a_truncated_chunk_is_named(tmp_path, compressor):
    path = tmp_path / "a.zarr"
    foreign(path, compressor)
    file = read_header(path / "x").chunk_file((1, 0, 1))
    file.write_bytes(file.read_bytes()[:-20])
    damage_is_named(path, file)


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_each_flipped_bit_of_an_own_chunk_is_noticed(tmp_path, zarr_format):
    path = tmp_path / "a.zarr"
    file = own(path, zarr_format)
    whole = file.read_bytes()
    array = open_array(path, "x")
    rng = np.random.default_rng(0)
    noticed = 0
    for at in rng.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read(array), DATA)  # some bits of a frame say nothing
        except UserError as error:
            noticed += str(file) in str(error)
    assert noticed > 190


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_whatever_else_has_the_place_of_a_chunk_is_named(tmp_path, zarr_format):
    path = tmp_path / "a.zarr"
    file = own(path, zarr_format)
    file.unlink()
    assert not read(open_array(path, "x"))[4:, :6, 8:].any()  # a missing chunk has the fill value
    file.mkdir()
    damage_is_named(path, file, "not a file")
    file.rmdir()
    os.mkfifo(file)
    damage_is_named(path, file, "not a file")
    file.unlink()
    file.symlink_to(file.name)
    damage_is_named(path, file, "symbolic links")


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_chunks_are_counted(tmp_path, zarr_format):
    path = tmp_path / "a.zarr"
    file = own(path, zarr_format)
    file.with_name(f"{file.name}.{'0' * 32}.partial").touch()
    header = read_header(path / "x")
    assert count_chunks(header) == 8
    file.unlink()
    assert count_chunks(header) == 7
    foreign(tmp_path / "b.zarr", None, ".")
    assert count_chunks(read_header(tmp_path / "b.zarr/x")) == 8
    create_array(path, "y", (4, 4, 4), dtype=np.uint8, **GRID)
    assert count_chunks(read_header(path / "y")) == 0


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_lost_chunks_are_noticed_when_an_array_was_complete(tmp_path, zarr_format):
    path = tmp_path / "a.zarr"
    own(path, zarr_format)
    require_whole(path, "x")
    rename_array(path, "x", "y")
    seal_array(path, "y")
    copy = write_array(path, "z", DATA, attributes=dict(open_array(path, "y").attrs), **GRID)
    assert "stored_chunks" not in copy.attrs
    read_header(path / "y").chunk_file((0, 1, 1)).unlink()
    for check in (require_whole, seal_array):
        with pytest.raises(UserError, match=rf"^1 of 8 chunks of y in {path} are missing"):
            check(path, "y")
    require_whole(path, "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [10**9] * 3}, "more than this suite can read"),
        ({"shape": [10**12, 12, 16]}, "more than this suite can read"),
        ({"chunks": [2**11] * 3}, "more than this suite can read"),
        ({"shape": [0, 12, 16]}, "some voxels"),
        ({"shape": [12]}, "damaged"),
        ({"shape": [-1, 12, 16]}, "damaged"),
        ({"shape": [True, 12, 16]}, "damaged"),
        ({"shape": "abc"}, "damaged"),
        ({"shape": None}, "damaged"),
        ({"chunks": [0, 6, 8]}, "damaged"),
        ({"chunks": [4.0, 6, 8]}, "damaged"),
        ({"dtype": "<U5"}, "holds <U5: store integers or floats"),
        ({"dtype": "|O"}, "holds object: store integers or floats"),
        ({"dtype": "<M8[s]"}, "holds datetime64.*: store integers or floats"),
        ({"dtype": "<f16"}, "holds float128: store integers or floats"),
        ({"dtype": [["a", "<i4"]]}, "damaged"),
        ({"dtype": "blue"}, "damaged"),
        ({"compressor": {"id": "pickle5"}}, "damaged"),
        ({"compressor": 5}, "damaged"),
        ({"filters": "no"}, "damaged"),
        ({"fill_value": "no"}, "damaged"),
        ({"order": "Z"}, "damaged"),
        ({"dimension_separator": "x"}, "damaged"),
        ({"zarr_format": 7}, "damaged"),
    ],
    ids=str,
)
def test_damaged_headers(tmp_path, change, message):
    path = tmp_path / "a.zarr"
    foreign(path, None)
    header = path / "x/.zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        open_array(path, "x")
    assert str(path / "x") in str(error.value)
    assert list_arrays(path) == ["x"]


@pytest.mark.parametrize("file", [".zarray", ".zattrs"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100000, b"null", b'{"a": 1'])
def test_damaged_json(tmp_path, file, content):
    path = tmp_path / "a.zarr"
    foreign(path, None)
    (path / "x" / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"x/{file} is damaged"):
        open_array(path, "x")


@pytest.mark.parametrize("place", ["/dev/zero", "pipe"])
def test_a_header_that_never_ends(tmp_path, place):
    path = tmp_path / "a.zarr"
    foreign(path, None)
    (path / "x/.zattrs").unlink()
    os.mkfifo(path / "x/pipe")
    (path / "x/.zattrs").symlink_to(place)
    with pytest.raises(UserError, match=r"x/\.zattrs is damaged"):
        open_array(path, "x")
    with pytest.raises(UserError, match="not replaced"):
        write_array(path, "x", DATA, **GRID)


@pytest.mark.parametrize(
    "attributes",
    [
        {"resolution": "4 4 4"},
        {"resolution": [None, 4, 4]},
        {"resolution": [float("nan"), 4, 4]},
        {"resolution": [1e300, 4, 4]},
        {"resolution": [[4], 4, 4]},
        {"resolution": []},
        {"resolution": [4]},
        {"resolution": 4},
        {"resolution": {"z": 4}},
        {"resolution": [4, 4, 4], "offset": [float("inf"), 0, 0]},
        {"resolution": [4, 4, 4], "offset": "abc"},
        {"resolution": [4, 4, 4], "units": 5},
        {"resolution": [4, 4, 4], "units": [None] * 3},
        {"resolution": [4, 4, 4], "units": [["nm"]] * 3},
        {"resolution": [4, 4, 4], "units": []},
    ],
    ids=str,
)
def test_damaged_attributes(tmp_path, attributes):
    path = tmp_path / "a.zarr"
    foreign(path, None)
    (path / "x/.zattrs").write_text(json.dumps(attributes))
    with pytest.raises(UserError, match=rf"^x in {path} has "):
        open_array(path, "x")


@pytest.mark.parametrize(
    "multiscales", [5, [5], [{}], [{"datasets": [{"path": "x", "coordinateTransformations": 5}], "axes": []}]], ids=str
)
def test_damaged_ome_metadata(tmp_path, multiscales):
    path = tmp_path / "a.zarr"
    foreign(path, None)
    (path / ".zattrs").write_text(json.dumps({"multiscales": multiscales}))
    with pytest.raises(UserError, match=rf"OME-NGFF metadata of x in .* in {path}/.zattrs is damaged"):
        open_array(path, "x")


def test_links_that_form_a_loop_end(tmp_path):
    path = tmp_path / "a.zarr"
    write_array(path, "volumes/raw", DATA, **GRID)
    for number in range(5):
        (path / f"loop{number}").symlink_to(path)
        (path / f"volumes/up{number}").symlink_to(path / "volumes")
    (path / "away").symlink_to("/")
    (path / "up").symlink_to("..")
    write_array(tmp_path / "b.zarr", "inside/labels", DATA, **GRID)
    (path / "group").symlink_to(tmp_path / "b.zarr/inside")
    (path / "self").symlink_to("self")
    (path / "alias").symlink_to(path / "volumes/raw")
    assert list_arrays(path) == ["alias", "group/labels", "volumes/raw"]
    assert not has_array(path, "self")
    np.testing.assert_array_equal(read(open_array(path, "alias")), DATA)


def test_a_mask_of_other_axes_is_refused(tmp_path):
    path = tmp_path / "mask.zarr"
    write_array(path, "mask", DATA[None], **GRID)
    with pytest.raises(UserError, match=r"mask in .* has shape .*: store it with the axes z, y, x"):
        open_mask(CfgNode({"MASK_FILE": str(path), "MASK_DATASET": "mask"}))


def test_a_folder_that_is_half_a_disk_is_not_walked(tmp_path, monkeypatch):
    monkeypatch.setattr("lsdseg.data_utils.volumes.MAX_GROUPS", 5)
    for number in range(6):
        (tmp_path / f"home/{number}").mkdir(parents=True)
    with pytest.raises(UserError, match="more than 5 folders"):
        open_array(tmp_path / "home", "volumes/raw")


def test_messages_name_ten_datasets_at_most(tmp_path):
    for number in range(15):
        create_array(tmp_path / "a.zarr", f"raw_{number:02}", (2, 2, 2), dtype=np.uint8, **GRID)
    with pytest.raises(UserError, match=r"it holds raw_00, .*, raw_09, 5 more$"):
        open_array(tmp_path / "a.zarr", "volumes/raw")
