"""Volumes in other formats, each with one marked voxel, three different extents and three voxel sizes."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorstore
import tifffile

from lsdseg.config.loader import CHECKOUT
from lsdseg.data_utils.convert import convert_volume
from lsdseg.data_utils.export import export_dataset
from lsdseg.data_utils.formats import open_source
from lsdseg.data_utils.layout import LABELS, LABELS_MASK, RAW
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.errors import UserError

SHAPE, VOXEL_SIZE, OFFSET, MARKED = (10, 14, 18), (40, 8, 4), (400, 80, 8), (7, 3, 11)
VOXELS = np.random.default_rng(0).integers(0, 200, SHAPE, dtype=np.uint8)
VOXELS[MARKED] = 255
IDS = np.random.default_rng(1).integers(1, 9, SHAPE).astype(np.uint64)
OPTIONS = {"dataset": None, "sections": ":", "resolution": None, "overwrite": False}


def to_zarr(*arguments):
    command = [sys.executable, CHECKOUT / "data_utils" / "to_zarr.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)


def write_hdf(path, data, voxel_size=VOXEL_SIZE, offset=OFFSET, chunks=(5, 7, 9)):
    with h5py.File(path, "w") as file:
        file.create_dataset("em", data=data, chunks=chunks).attrs.update(resolution=voxel_size, offset=offset)


def write_imagej(path, data, voxel_size=VOXEL_SIZE):
    z, y, x = voxel_size
    metadata = {"spacing": z / 1000, "unit": "um", "axes": "ZYX"}
    tifffile.imwrite(path, data, imagej=True, resolution=(1000 / x, 1000 / y), metadata=metadata)


def write_one_page(path, data):
    """A stack as ImageJ writes those of more than 4 GB: its pages but the first are not described."""
    z, y, x = VOXEL_SIZE
    metadata = {"spacing": z / 1000, "unit": "um", "axes": "ZYX"}
    options = {"imagej": True, "truncate": True, "metadata": metadata}
    tifffile.imwrite(path, data, byteorder=">", resolution=(1000 / x, 1000 / y), **options)


def write_ome(path, data, voxel_size=VOXEL_SIZE):
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", voxel_size, strict=True)}
    units = {f"PhysicalSize{axis}Unit": "nm" for axis in "ZYX"}
    tifffile.imwrite(path, data, ome=True, photometric="minisblack", metadata={"axes": "ZYX", **sizes, **units})


def write_stage_position(path, data):
    """An OME-TIFF as microscopes write it: the position is that of the stage."""
    planes = {f"Position{axis}": [1234.5] * len(data) for axis in "ZYX"}
    units = {f"Position{axis}Unit": ["µm"] * len(data) for axis in "ZYX"}
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", VOXEL_SIZE, strict=True)}
    nanometers = {f"PhysicalSize{axis}Unit": "nm" for axis in "ZYX"}
    metadata = {"axes": "ZYX", **sizes, **nanometers, "Plane": planes | units}
    tifffile.imwrite(path, data, ome=True, metadata=metadata)


def write_sections(path, data):
    path.mkdir()
    for number, section in enumerate(data):
        tifffile.imwrite(path / f"section_{number:03d}.tif", section, compression="zlib")


def write_n5(path, data, attributes=None, voxel_size=VOXEL_SIZE, offset=OFFSET, chunks=(4, 5, 6)):
    dataset = path / "em" / "s0"
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{dataset}/"}}
    metadata = {"dimensions": data.shape[::-1], "blockSize": chunks[::-1], "dataType": data.dtype.name}
    metadata["compression"] = {"type": "gzip"}
    store = tensorstore.open(spec | {"metadata": metadata}, create=True).result()
    store.write(data.T).result()
    placed = {"pixelResolution": {"unit": "nm", "dimensions": voxel_size[::-1]}, "offset": offset[::-1]}
    file = dataset / "attributes.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (placed if attributes is None else attributes)))
    (path / "attributes.json").write_text(json.dumps({"n5": "2.5.0"}))


def write_precomputed(path, data, sharded=False, voxel_size=VOXEL_SIZE, offset=OFFSET, chunks=(4, 5, 6)):
    scale = {
        "key": "s0",
        "size": data.shape[::-1],
        "resolution": voxel_size[::-1],
        "voxel_offset": [round(o / v) for o, v in zip(offset, voxel_size, strict=True)][::-1],
        "chunk_size": chunks[::-1],
        "encoding": "raw",
    }
    if sharded:
        shards = {"preshift_bits": 1, "minishard_bits": 1, "shard_bits": 1}
        scale["sharding"] = {"@type": "neuroglancer_uint64_sharded_v1", "hash": "identity", **shards}
    kind = "segmentation" if data.dtype == np.uint64 else "image"
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "multiscale_metadata": {"type": kind, "data_type": data.dtype.name, "num_channels": 1},
        "scale_metadata": {key: value for key, value in scale.items() if key != "key"},
    }
    store = tensorstore.open(spec, create=True).result()
    store[..., 0].write(data.T).result()


def write_ome_zarr(path, data, version="0.4", axes="tczyx", voxel_size=VOXEL_SIZE, offset=OFFSET):
    """A pyramid of two levels, in micrometers, as others write it."""
    driver = "zarr" if version == "0.4" else "zarr3"
    order = [axes.replace("t", "").replace("c", "").index(name) for name in "zyx"]
    levels = []
    for level, step in enumerate((1, 2)):
        voxels = np.transpose(data[::step, ::step, ::step], np.argsort(order))
        shape = [1] * (len(axes) - 3) + list(voxels.shape)
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/{level}/"}}
        store = tensorstore.open(spec, create=True, dtype=data.dtype, shape=shape).result()
        store.write(voxels.reshape(shape)).result()
        size = dict(zip("zyx", voxel_size, strict=True))
        at = dict(zip("zyx", offset, strict=True))
        scale = [size[name] * step / 1000 if name in size else 1 for name in axes]
        translation = [at[name] / 1000 if name in at else 0 for name in axes]
        steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": translation}]
        levels.append({"path": str(level), "coordinateTransformations": steps})
    kinds = {"t": "time", "c": "channel"}
    named = [{"name": n, "type": kinds[n]} if n in kinds else _space(n) for n in axes]
    multiscales = [{"version": version, "axes": named, "datasets": levels}]
    if version == "0.4":
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps({"multiscales": multiscales}))
    else:
        attributes = {"ome": {"version": version, "multiscales": multiscales}}
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        (path / "zarr.json").write_text(json.dumps(group))


def _space(name):
    return {"name": name, "type": "space", "unit": "micrometer"}


def write_zarr3(path, data, voxel_size=VOXEL_SIZE, offset=OFFSET):
    """volumes/raw with attributes, in format 3."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/volumes/raw/"}}
    tensorstore.open(spec, create=True, dtype=data.dtype, shape=data.shape).result().write(data).result()
    file = path / "volumes" / "raw" / "zarr.json"
    placed = {"attributes": {"resolution": voxel_size, "offset": offset}}
    file.write_text(json.dumps(json.loads(file.read_text()) | placed))
    (path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group"}))


WRITERS = {
    "volume.hdf": write_hdf,
    "imagej.tif": write_imagej,
    "large.tif": write_one_page,
    "ome.tif": write_ome,
    "stage.tif": write_stage_position,
    "sections": write_sections,
    "volume.n5": write_n5,
    "precomputed": write_precomputed,
    "sharded": lambda path, data: write_precomputed(path, data, sharded=True),
    "ome04.zarr": write_ome_zarr,
    "ome05.zarr": lambda path, data: write_ome_zarr(path, data, "0.5", "xyz"),
    "zarr3.zarr": write_zarr3,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_marked_voxel_is_at_the_same_nanometer(name, tmp_path):
    WRITERS[name](tmp_path / name, VOXELS)
    size = ("--resolution", *VOXEL_SIZE) if name == "sections" else ()
    run = to_zarr(tmp_path / name, tmp_path / "out.zarr", *size)
    assert run.returncode == 0, run.stderr
    raw = open_array(tmp_path / "out.zarr", RAW)
    np.testing.assert_array_equal(read(raw), VOXELS)
    placed = not name.endswith(".tif") and name != "sections"
    assert (tuple(raw.voxel_size), tuple(raw.offset)) == (VOXEL_SIZE, OFFSET if placed else (0, 0, 0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"compression": "zlib"},
        {"compression": "zlib", "rowsperstrip": 5},
        {"compression": "zlib", "rowsperstrip": 5, "predictor": 2, "byteorder": ">"},
        {"compression": "zlib", "tile": (16, 32)},
        {"tile": (32, 16)},
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_boxes_of_sections_are_read_from_strips_and_tiles(options, dtype, tmp_path):
    data = np.random.default_rng(2).integers(0, 250, (3, 50, 70)).astype(dtype)
    tifffile.imwrite(tmp_path / "in.tif", data, photometric="minisblack", **options)
    with open_source(tmp_path / "in.tif") as source:
        stored = source.volumes[0].data
        for box in (np.s_[:, :, :], np.s_[1:3, 7:33, 15:17], np.s_[2:, 49:, 69:], np.s_[::2, 3:40:9, 60:20:-7]):
            np.testing.assert_array_equal(stored[box], data[box])
        assert stored[0:0, 3:3, :].shape == (0, 0, 70)


def test_more_sections_than_a_process_may_open(tmp_path):
    write_sections(tmp_path / "in", np.repeat(VOXELS, 4, axis=0))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, limit[1]))
    try:
        convert_volume(tmp_path / "in", tmp_path / "out.zarr", labels=None, **OPTIONS | {"resolution": VOXEL_SIZE})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    np.testing.assert_array_equal(read(open_array(tmp_path / "out.zarr", RAW)), np.repeat(VOXELS, 4, axis=0))


def test_labels_of_another_format_come_along_and_sections_are_cut(tmp_path):
    write_n5(tmp_path / "raw.n5", VOXELS)
    write_precomputed(tmp_path / "labels", IDS)
    run = to_zarr(tmp_path / "raw.n5", tmp_path / "out.zarr", "--labels", tmp_path / "labels", "--sections", "2:7")
    assert run.returncode == 0, run.stderr
    assert list_arrays(tmp_path / "out.zarr") == [LABELS_MASK, LABELS, RAW]
    for name, expected in ((RAW, VOXELS), (LABELS, IDS)):
        array = open_array(tmp_path / "out.zarr", name)
        np.testing.assert_array_equal(read(array), expected[2:7])
        assert tuple(array.offset) == (OFFSET[0] + 2 * VOXEL_SIZE[0], *OFFSET[1:])
    again = to_zarr(tmp_path / "raw.n5", tmp_path / "out.zarr")
    assert (again.returncode, "exists: add --overwrite" in again.stderr) == (2, True)


def _colors(folder: Path):
    tifffile.imwrite(folder / "in.tif", np.zeros((4, 8, 8, 3), np.uint8), photometric="rgb")
    return folder / "in.tif"


def _planes_of_colors(folder: Path):
    tifffile.imwrite(folder / "in.tif", np.zeros((4, 8, 9), np.uint8), photometric="rgb", planarconfig="separate")
    return folder / "in.tif"


def _channels_of_ome(folder: Path):
    tifffile.imwrite(folder / "in.tif", np.zeros((3, 5, 8, 9), np.uint8), ome=True, metadata={"axes": "CZYX"})
    return folder / "in.tif"


def _channels_of_one_section(folder: Path):
    tifffile.imwrite(folder / "in.tif", np.zeros((3, 8, 9), np.uint8), ome=True, metadata={"axes": "CYX"})
    return folder / "in.tif"


def _hyperstack(folder: Path):
    tifffile.imwrite(folder / "in.tif", np.zeros((5, 2, 8, 9), np.uint8), imagej=True, metadata={"axes": "ZCYX"})
    return folder / "in.tif"


def _channels_of_hdf(folder: Path):
    with h5py.File(folder / "in.hdf", "w") as file:
        file["em"] = np.zeros((4, 5, 8, 9), np.uint8)
    return folder / "in.hdf"


def _truncated(folder: Path):
    write_imagej(folder / "in.tif", VOXELS)
    (folder / "in.tif").write_bytes((folder / "in.tif").read_bytes()[:-900])
    return folder / "in.tif"


def _truncated_stack(folder: Path):
    write_one_page(folder / "in.tif", VOXELS)
    (folder / "in.tif").write_bytes((folder / "in.tif").read_bytes()[:-900])
    return folder / "in.tif"


def _unlike_sections(folder: Path):
    write_sections(folder / "in", VOXELS)
    tifffile.imwrite(folder / "in" / "section_900.tif", np.zeros((3, 3), np.uint8))
    return folder / "in"


def _no_size(folder: Path):
    write_n5(folder / "in.n5", VOXELS, attributes={})
    return folder / "in.n5"


def _two_datasets(folder: Path):
    write_n5(folder / "in.n5", VOXELS)
    (folder / "in.n5" / "em").rename(folder / "in.n5" / "first")
    write_n5(folder / "in.n5", VOXELS)
    return folder / "in.n5"


def _damaged_chunk(folder: Path):
    write_n5(folder / "in.n5", VOXELS)
    chunk = folder / "in.n5" / "em" / "s0" / "1" / "1" / "1"
    chunk.write_bytes(chunk.read_bytes()[:20])
    return folder / "in.n5"


def _two_channels(folder: Path):
    write_ome_zarr(folder / "in.zarr", VOXELS, axes="czyx")
    file = folder / "in.zarr" / "0" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [2, *SHAPE]}))
    return folder / "in.zarr"


def _unknown_codec(folder: Path):
    write_zarr3(folder / "in.zarr", VOXELS)
    file = folder / "in.zarr" / "volumes" / "raw" / "zarr.json"
    file.write_text(file.read_text().replace('"bytes"', '"fractal"'))
    return folder / "in.zarr"


def _empty_zarr(folder: Path):
    (folder / "in.zarr").mkdir()
    (folder / "in.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    return folder / "in.zarr"


def _unknown(folder: Path):
    (folder / "in").mkdir()
    return folder / "in"


def _no_tiff(folder: Path):
    (folder / "in.tif").write_text("hello")
    return folder / "in.tif"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_colors, "has 3 values for each pixel, such as colors: convert it to gray values first"),
        (_planes_of_colors, "has 4 values for each pixel, such as colors"),
        (_channels_of_ome, "has 3 along C and 5 along Z: save one stack of sections, such as one channel"),
        (_channels_of_one_section, "has 3 along C: save one stack"),
        (_hyperstack, "has 5 along Z and 2 along C: save one stack"),
        (_channels_of_hdf, r"volumes/raw in .*in.hdf has shape \(4, 5, 8, 9\): store one channel of it"),
        (_truncated, "in.tif is no TIFF or damaged"),
        (_truncated_stack, r"in.tif is no TIFF or damaged \(it has 1 of 10 sections\)"),
        (_unlike_sections, "differ in shape or type"),
        (_no_size, "volumes/raw in .* has no voxel size: .*--resolution Z Y X"),
        (_two_datasets, "holds em, first: name the one to take with --dataset"),
        (_damaged_chunk, "volumes/raw in .* cannot be read"),
        (_two_channels, r"0 in .*in.zarr has 2 along c: write a copy with one image"),
        (_unknown_codec, "volumes/raw cannot be read .*fractal.*: use another copy"),
        (_empty_zarr, "holds no zarr array with the axes z, y, x"),
        (_unknown, "is a folder of none of the formats: it holds no TIFFs, no info of Neuroglancer precomputed"),
        (_no_tiff, "is no TIFF or damaged"),
        (lambda folder: folder / "none", "none does not exist"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(make, message, tmp_path):
    refused = to_zarr(make(tmp_path), tmp_path / "out.zarr")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if "error:" in line]
    assert re.search(message, line), line
    assert not (tmp_path / "out.zarr").exists()


def test_a_stack_that_imagej_calls_channels_is_one_of_sections(tmp_path):
    tifffile.imwrite(tmp_path / "in.tif", VOXELS, imagej=True)
    with tifffile.TiffFile(tmp_path / "in.tif") as tiff:
        assert tiff.series[0].axes == "CYX"
    done = to_zarr(tmp_path / "in.tif", tmp_path / "out.zarr", "--resolution", *VOXEL_SIZE)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(read(open_array(tmp_path / "out.zarr", RAW)), VOXELS)


@pytest.mark.parametrize(
    ("stored", "values", "ids"),
    [
        ("uint32", [0, 2**32 - 1], [0, 2**32 - 1]),
        ("uint64", [0, 2**63 + 1], [0, 2**63 + 1]),
        ("uint64", [7, 2**64 - 3], [7, 2**64 - 3]),
        ("int32", [-1, 2**31 - 1], [2**64 - 1, 2**31 - 1]),
        ("int64", [-3, 2**62 + 1], [2**64 - 3, 2**62 + 1]),
        ("float32", [0, 2**24 - 1], [0, 2**24 - 1]),
        ("float64", [-3, 2**53 - 1], [2**64 - 3, 2**53 - 1]),
    ],
)
def test_labels_of_any_type_are_converted_exactly(tmp_path, stored, values, ids):
    labels = np.array(values, stored)[np.arange(VOXELS.size).reshape(SHAPE) % 2]
    write_hdf(tmp_path / "raw.hdf", VOXELS)
    write_hdf(tmp_path / "labels.hdf", labels)
    convert_volume(tmp_path / "raw.hdf", tmp_path / "out.zarr", labels=tmp_path / "labels.hdf", **OPTIONS)
    array = open_array(tmp_path / "out.zarr", LABELS)
    assert array.dtype == (stored if stored.startswith("u") else np.uint64)
    assert read(array).ravel()[:2].tolist() == ids
    known = read(open_array(tmp_path / "out.zarr", LABELS_MASK)).ravel()[:2]
    assert known.tolist() == [id_ < 2**64 - 3 for id_ in ids]


@pytest.mark.parametrize(
    ("stored", "value"),
    [("int32", -4), ("float32", 0.5), ("float32", 2**24), ("float64", 2**53), ("float64", np.nan)],
)
def test_labels_that_are_no_exact_ids_are_refused(tmp_path, stored, value):
    labels = np.zeros(SHAPE, stored)
    labels[MARKED] = value
    write_hdf(tmp_path / "raw.hdf", VOXELS)
    write_hdf(tmp_path / "labels.hdf", labels)
    with pytest.raises(UserError, match=f"volumes/labels/neuron_ids is {stored} and holds .* which is no exact id: "):
        convert_volume(tmp_path / "raw.hdf", tmp_path / "out.zarr", labels=tmp_path / "labels.hdf", **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.hdf", "raw.hdf"]


@pytest.mark.parametrize(("to", "reads"), [("precomputed", True), ("ome-zarr", True), ("hdf5", True), ("tiff", False)])
def test_ids_above_2_63_are_kept_or_refused(tmp_path, to, reads):
    ids = np.array([[[1, 2**63 + 1], [2**64 - 4, 0]]], np.uint64)
    write_array(tmp_path / "in.zarr", LABELS, ids, voxel_size=VOXEL_SIZE, offset=OFFSET)
    out = tmp_path / ("out.hdf" if to == "hdf5" else "out")
    options = {"to": to, "dataset": LABELS, "overwrite": False}
    if not reads:
        with pytest.raises(UserError, match="which is no uint32 and cannot be written"):
            export_dataset(tmp_path / "in.zarr", out, **options)
        assert not out.exists()
        return
    export_dataset(tmp_path / "in.zarr", out, **options)
    write_array(tmp_path / "raw.zarr", RAW, ids.astype(np.uint8), voxel_size=VOXEL_SIZE, offset=OFFSET)
    convert_volume(tmp_path / "raw.zarr", tmp_path / "back.zarr", labels=out, **OPTIONS)
    assert read(open_array(tmp_path / "back.zarr", LABELS)).tolist() == ids.tolist()
