"""Exports are read with other programs' readers: the marked voxel must be at the same nanometer."""

import json
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
import tensorstore
import tifffile

from lsdseg.config.loader import CHECKOUT
from lsdseg.data_utils import export as export_module
from lsdseg.data_utils import export_mesh, export_precomputed, pyramid
from lsdseg.data_utils.convert import convert_volume
from lsdseg.data_utils.export import export_dataset
from lsdseg.data_utils.export_formats import FORMATS
from lsdseg.data_utils.layout import LABELS, RAW
from lsdseg.data_utils.pyramid import Level, mean, mode
from lsdseg.data_utils.records import Record
from lsdseg.data_utils.segment_tables import write_tables
from lsdseg.data_utils.stored import read_json
from lsdseg.data_utils.volumes import list_arrays, open_array, read, write_array
from lsdseg.engine.post.segments import segments_of_volume
from lsdseg.errors import UserError

# An odd first voxel along x, and a negative one along y: windows of coarser levels begin before the volume.
SHAPE, VOXEL_SIZE, OFFSET, MARKED = (40, 70, 150), (40, 8, 4), (400, -24, 12), (7, 3, 11)
SEGMENTATION, AFFINITIES = "volumes/segmentation_050", "volumes/pred_affs"
RNG = np.random.default_rng(0)
IDS = np.kron(RNG.integers(0, 9, (8, 10, 15)), np.ones((5, 7, 10))).astype(np.uint64)
IDS[MARKED] = 2**32 - 1
GRAY = RNG.integers(0, 200, SHAPE, dtype=np.uint8)
GRAY[MARKED] = 255
AFFS = RNG.random((3, *SHAPE), np.float32)
DATA = {SEGMENTATION: IDS, RAW: GRAY, AFFINITIES: AFFS}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sample.zarr"
    for name, data in DATA.items():
        write_array(path, name, data, voxel_size=VOXEL_SIZE, offset=OFFSET)
    return path


def script(name, *arguments):
    command = [sys.executable, CHECKOUT / "data_utils" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)


def open_store(driver, path, **options):
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}, **options}
    return tensorstore.open(spec, read=True).result()


def read_precomputed(path, level=0):
    """Voxels ([channel,] z, y, x), voxel size and offset in nm, as tensorstore reads them."""
    store = open_store("neuroglancer_precomputed", path, scale_index=level)
    units = [float(unit.multiplier) for unit in store.dimension_units[:3]]
    offset = [o * u for o, u in zip(store.domain.inclusive_min[:3], units, strict=True)]
    data = store.read().result().T
    return data[0] if len(data) == 1 else data, units[::-1], offset[::-1]


def ome_metadata(path):
    if (path / ".zattrs").exists():
        return json.loads((path / ".zattrs").read_text())
    return json.loads((path / "zarr.json").read_text())["attributes"]["ome"]


def read_ome(path, level=0):
    (multiscale,) = ome_metadata(path)["multiscales"]
    assert [axis["name"] for axis in multiscale["axes"]][-3:] == ["z", "y", "x"]
    assert {axis["unit"] for axis in multiscale["axes"][-3:]} == {"nanometer"}
    scale, translation = multiscale["datasets"][level]["coordinateTransformations"]
    driver = "zarr" if (path / ".zattrs").exists() else "zarr3"
    data = open_store(driver, path / multiscale["datasets"][level]["path"]).read().result()
    return data, scale["scale"][-3:], translation["translation"][-3:]


def read_tiff(path):
    with tifffile.TiffFile(path) as tiff:
        (pixels,) = re.findall(r"<Pixels [^>]*>", tiff.ome_metadata)
        plane = re.search(r"<Plane [^>]*>", tiff.ome_metadata)[0]
        values = dict(re.findall(r'(\w+)="([^"]*)"', pixels + plane))
        assert {values[f"{what}{axis}Unit"] for what in ("PhysicalSize", "Position") for axis in "XYZ"} == {"nm"}
        size, offset = ([float(values[f"{what}{axis}"]) for axis in "ZYX"] for what in ("PhysicalSize", "Position"))
        x = tiff.pages[0].tags["XResolution"].value
        assert size[2] == pytest.approx(1e7 * x[1] / x[0])
        return tiff.asarray(), size, offset


def read_hdf(path):
    with h5py.File(path) as file:
        names = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        (name,) = names
        assert name in (LABELS, RAW, AFFINITIES)
        return file[name][:], file[name].attrs["resolution"], file[name].attrs["offset"]


def read_sections(path):
    """Voxels only: a folder of TIFFs does not say where it lies."""
    return (np.stack([tifffile.imread(file) for file in sorted(path.iterdir())]),)


READERS = {
    "precomputed": read_precomputed,
    "ome-zarr": read_ome,
    "ome-zarr-0.5": read_ome,
    "tiff": read_tiff,
    "hdf5": read_hdf,
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("to", READERS)
def test_every_voxel_is_at_the_same_nanometer(sample, tmp_path, to, name):
    export_dataset(sample, tmp_path / "out", to=to, dataset=name, overwrite=False)
    data, voxel_size, offset = READERS[to](tmp_path / "out")
    np.testing.assert_array_equal(data, DATA[name])
    assert (tuple(voxel_size), tuple(offset)) == (VOXEL_SIZE, OFFSET)


@pytest.mark.parametrize("to", ["precomputed", "tiff", "hdf5"])
def test_an_export_is_converted_back(sample, tmp_path, to):
    out, back = tmp_path / {"tiff": "out.tif", "hdf5": "out.hdf"}.get(to, "out"), tmp_path / "back.zarr"
    export_dataset(sample, out, to=to, dataset=None, overwrite=False)
    convert_volume(out, back, labels=None, dataset=None, sections=":", resolution=None, overwrite=False)
    array = open_array(back, RAW)
    np.testing.assert_array_equal(read(array), IDS)
    assert (tuple(array.voxel_size), tuple(array.offset)) == (VOXEL_SIZE, OFFSET)


def test_command_line(sample, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back.zarr"
    done = script("export.py", sample, "--to", "precomputed", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: Neuroglancer precomputed of {SEGMENTATION}")
    done = script("to_zarr.py", out, back)
    assert done.returncode == 0, done.stderr
    assert tuple(open_array(back, RAW).offset) == OFFSET
    refused = script("export.py", sample, "--to", "precomputed", out)
    assert (refused.returncode, refused.stderr) == (2, f"error: {out} exists: add --overwrite, or write elsewhere\n")


def test_zarr_opens_ome_zarr_where_it_was(sample, tmp_path):
    export_dataset(sample, tmp_path / "out", to="ome-zarr", dataset=RAW, overwrite=False)
    array = open_array(tmp_path / "out", "0")
    np.testing.assert_array_equal(read(array), GRAY)
    assert (tuple(array.voxel_size), tuple(array.offset)) == (VOXEL_SIZE, OFFSET)
    assert list_arrays(tmp_path / "out") == ["0", "1", "2"]
    (channel,) = ome_metadata(tmp_path / "out")["omero"]["channels"]
    assert (channel["window"]["end"], channel["color"]) == (255, "FFFFFF")


def voxels_of_level(data, begin, factor, choose):
    """Brute force: for every coarse voxel, `choose` of the fine ones that lie in it."""
    groups = {}
    for index in np.ndindex(data.shape):
        coarse = tuple((i + b) // f for i, b, f in zip(index, begin, factor, strict=True))
        groups.setdefault(coarse, []).append(data[index])
    first = np.min(list(groups), axis=0)
    result = np.zeros(np.max(list(groups), axis=0) - first + 1, data.dtype)
    for coarse, values in groups.items():
        result[tuple(coarse - first)] = choose(values)
    return result, first


def most_frequent(values):
    ids, counts = np.unique(values, return_counts=True)
    return ids[counts == counts.max()].max()


@pytest.mark.parametrize(("name", "choose"), [(SEGMENTATION, most_frequent), (RAW, lambda v: np.rint(np.mean(v)))])
def test_levels_of_precomputed_lie_on_each_other(sample, tmp_path, name, choose):
    export_dataset(sample, tmp_path / "out", to="precomputed", dataset=name, overwrite=False)
    # x is narrowest, then x and y are.
    for level, factor in ((1, (1, 1, 2)), (2, (1, 2, 2))):
        fine, size, offset = read_precomputed(tmp_path / "out", level - 1)
        begin = [int(o // s) for o, s in zip(offset, size, strict=True)]
        expected, first = voxels_of_level(fine[:8], begin, factor, choose)
        data, coarse_size, coarse_offset = read_precomputed(tmp_path / "out", level)
        np.testing.assert_array_equal(data[:8], expected)
        assert coarse_size == [s * f for s, f in zip(size, factor, strict=True)]
        assert coarse_offset == [b * s for b, s in zip(first, coarse_size, strict=True)]
    scales = json.loads((tmp_path / "out" / "info").read_text())["scales"]
    assert [scale["resolution"] for scale in scales] == [[4, 8, 40], [8, 8, 40], [16, 16, 40]]  # x y z
    assert scales[0]["size"] == [150, 70, 40]
    assert scales[0]["voxel_offset"] == [3, -3, 10]


def test_levels_of_ome_zarr_have_their_centers_where_they_belong(sample, tmp_path):
    export_dataset(sample, tmp_path / "out", to="ome-zarr-0.5", dataset=None, overwrite=False)
    metadata = ome_metadata(tmp_path / "out")
    assert "image-label" in metadata
    assert "omero" not in metadata
    data, size, translation = read_ome(tmp_path / "out", 2)
    expected, _ = voxels_of_level(IDS[:8], (0, 0, 0), (1, 1, 2), most_frequent)
    expected, _ = voxels_of_level(expected, (0, 0, 0), (1, 2, 2), most_frequent)
    np.testing.assert_array_equal(data[:8], expected)
    # The first voxel covers 1 x 2 x 4 of the finest, the center of the first of which is at OFFSET.
    assert size == [40, 16, 16]
    assert translation == [400, -24 + 8 / 2, 12 + 3 * 4 / 2]


def test_mode_and_mean_of_windows():
    values = RNG.integers(0, 3, (5, 6, 8)).astype(np.uint8)
    for function, choose in ((mode, most_frequent), (mean, lambda v: np.rint(np.mean(v)))):
        expected, _ = voxels_of_level(values, (0, 0, 0), (1, 2, 2), choose)
        np.testing.assert_array_equal(function(values, (1, 2, 2)), expected)
    assert mode(np.array([[[0, 0, 7, 7]]], np.uint64), (1, 1, 4)) == 7
    assert Level((1, 1, 1), (0, 0, 0), (9, 9, 9), (8, 8, 15)).coarser().voxel_size == (16, 16, 30)
    assert Level((1, 1, 1), (0, 0, 0), (9, 9, 9), (8, 8, 16)).coarser().voxel_size == (16, 16, 16)


@pytest.mark.parametrize(
    ("name", "shard_bytes", "shards"),
    # Chunks are of 8^3 voxels, and there are 5 x 9 x 19.
    [(SEGMENTATION, 2**28, 2 * 3 * 5), (AFFINITIES, 2**28, 2 * 3 * 5), (AFFINITIES, 8 * 8**3 * 12, 3 * 5 * 10)],
)
def test_large_levels_are_sharded(sample, tmp_path, monkeypatch, name, shard_bytes, shards):
    monkeypatch.setattr(export_precomputed, "SHARD_BYTES", shard_bytes)
    for module in (pyramid, export_precomputed):
        monkeypatch.setattr(module, "EDGE", 8)
    monkeypatch.setattr(export_precomputed, "MANY_CHUNKS", 100)
    export_dataset(sample, tmp_path / "out", to="precomputed", dataset=name, overwrite=False)
    scales = json.loads((tmp_path / "out" / "info").read_text())["scales"]
    assert ["sharding" in scale for scale in scales][:4] == [True, True, True, False]
    files = list((tmp_path / "out" / scales[0]["key"]).iterdir())
    assert len(files) == shards
    data, _, offset = read_precomputed(tmp_path / "out")
    np.testing.assert_array_equal(data, DATA[name])
    assert tuple(offset) == OFFSET
    monkeypatch.setattr(export_precomputed, "MANY_CHUNKS", 10**6)
    export_dataset(sample, tmp_path / "plain", to="precomputed", dataset=name, overwrite=False)
    for level in range(len(scales)):
        sharded, plain = (read_precomputed(tmp_path / folder, level)[0] for folder in ("out", "plain"))
        np.testing.assert_array_equal(sharded, plain)


def ball(shape, center, radius):
    """Voxels whose centers are less than a radius (nm) from a center (nm)."""
    centers = [o + (np.arange(n) + 0.5) * v for o, n, v in zip(OFFSET, shape, VOXEL_SIZE, strict=True)]
    z, y, x = (along - c for along, c in zip(centers, center, strict=True))
    return z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 < radius**2


def read_mesh(folder, segment):
    """All pieces of a segment as one: vertices x, y, z in nm, and triangles; vertices at the same place are one."""
    vertices, faces, count = [], [], 0
    for name in json.loads((folder / f"{segment}:0").read_text())["fragments"]:
        content = (folder / name).read_bytes()
        (size,) = np.frombuffer(content, "<u4", 1)
        vertices.append(np.frombuffer(content, "<f4", 3 * size, 4).reshape(-1, 3))
        faces.append(np.frombuffer(content, "<u4", -1, 4 + 12 * size).reshape(-1, 3) + count)
        count += size
    together, numbers = np.unique(np.concatenate(vertices), axis=0, return_inverse=True)
    return together, numbers.ravel()[np.concatenate(faces)]


def test_a_mesh_is_closed_across_blocks_and_in_place(tmp_path, monkeypatch):
    shape, center = (40, 70, 150), (1000, 200, 250)
    ids = np.where(ball(shape, center, 180), 2**40, 0).astype(np.uint64)
    ids[:, 60:, :] = 5  # touches the border of the volume on five sides
    write_array(tmp_path / "in.zarr", SEGMENTATION, ids, voxel_size=VOXEL_SIZE, offset=OFFSET)
    monkeypatch.setattr(export_mesh, "BLOCK", 16)
    export_dataset(tmp_path / "in.zarr", tmp_path / "out", to="precomputed", dataset=None, overwrite=False, mesh=True)
    np.testing.assert_array_equal(read_precomputed(tmp_path / "out")[0], ids)
    folder = tmp_path / "out" / json.loads((tmp_path / "out" / "info").read_text())["mesh"]
    assert json.loads((folder / "info").read_text()) == {"@type": "neuroglancer_legacy_mesh"}
    assert sorted(file.name for file in folder.glob("*:0")) == ["1099511627776:0", "5:0"]
    for segment, low in (
        (2**40, None),
        (5, [o + v * b for o, v, b in zip(OFFSET, VOXEL_SIZE, (0, 60, 0), strict=True)]),
    ):
        vertices, faces = read_mesh(folder, segment)
        edges = np.concatenate([faces[:, pair] for pair in ([0, 1], [1, 2], [2, 0])])
        counts = np.unique(edges, axis=0, return_counts=True)[1]
        assert counts.tolist() == [1] * len(counts)  # no edge in one direction twice
        assert {tuple(edge) for edge in edges} == {tuple(edge[::-1]) for edge in edges}  # each has its other side
        a, b, c = (vertices[faces[:, corner]].astype(float) - vertices.mean(axis=0) for corner in range(3))
        volume = np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6  # above 0: triangles face outwards
        assert volume == pytest.approx((ids == segment).sum() * np.prod(VOXEL_SIZE), rel=0.04)
        if low is None:
            middle = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
            np.testing.assert_allclose(middle[::-1], center, atol=20)
        else:
            np.testing.assert_allclose(vertices.min(axis=0)[::-1], low, atol=1e-3)


def test_segments_have_their_sizes_in_neuroglancer(tmp_path, capsys, monkeypatch):
    path = tmp_path / "sample.zarr"

    def export(name, **options):
        export_dataset(path, tmp_path / name, to="precomputed", dataset=None, overwrite=True, **options)
        return read_json(tmp_path / name / "info").get("segment_properties")

    def write():
        made = Record("a test", {}, {}).attributes
        return write_array(path, SEGMENTATION, IDS, voxel_size=VOXEL_SIZE, offset=OFFSET, attributes=made)

    write_tables(path, SEGMENTATION, write(), "a test", segments_of_volume(IDS))
    assert export("all") == "segment_properties"
    inline = read_json(tmp_path / "all" / "segment_properties" / "info")["inline"]
    ids, counts = np.unique(IDS[IDS > 0], return_counts=True)
    size, tags = inline["properties"]
    assert inline["ids"] == list(map(str, ids))
    assert (size["id"], size["data_type"], size["values"]) == ("voxels", "uint32", counts.tolist())
    orphans = [segment for segment, tagged in zip(ids, tags["values"], strict=True) if tagged]
    inner = np.zeros(SHAPE, bool)
    inner[1:-1, 1:-1, 1:-1] = True
    assert orphans == [segment for segment in ids if inner[segment == IDS].all()]
    assert 2**32 - 1 in orphans
    assert export("all") == "segment_properties"  # in place of the one before

    assert export("part", region="400:800,-24:80,12:100") is None
    assert export("renumbered", renumbered=True) is None
    monkeypatch.setattr(export_precomputed, "MOST_SEGMENTS", 3)
    assert export("many") is None
    assert "sizes of segments are left out: there are more than 3" in capsys.readouterr().out
    monkeypatch.undo()
    write()
    assert export("made_anew") is None
    assert re.search(
        r"sizes of segments are left out: .* is of another volumes/segmentation_050", capsys.readouterr().out
    )


def test_meshes_need_a_segmentation_and_precomputed(sample, tmp_path):
    for to, name in (("tiff", SEGMENTATION), ("precomputed", RAW)):
        with pytest.raises(
            UserError, match=f"--mesh is for a segmentation .* --to precomputed: leave it out for {name}"
        ):
            export_dataset(sample, tmp_path / "out", to=to, dataset=name, overwrite=False, mesh=True)


def test_overwriting_replaces_exports_only(sample, tmp_path):
    for to, written_as in FORMATS.items():
        out = tmp_path / to
        for _ in range(2):
            export_dataset(sample, out, to=to, dataset=None, overwrite=True)
        with pytest.raises(UserError, match="exists: add --overwrite"):
            export_dataset(sample, out, to=to, dataset=None, overwrite=False)
        if written_as.folder:
            (out / "notes.txt").touch()
        else:
            out.write_text("mine")
        with pytest.raises(UserError, match="is not replaced, because it is no"):
            export_dataset(sample, out, to=to, dataset=None, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FORMATS)
    for target in (sample, sample / "volumes"):
        with pytest.raises(UserError, match="is an input"):
            export_dataset(sample, target, to="ome-zarr", dataset=None, overwrite=True)


def test_an_interrupted_export_leaves_what_was_there(sample, tmp_path, monkeypatch):
    of_raw = [to for to in FORMATS if to != "swc"]  # which is of segmentations only
    for to in of_raw:
        export_dataset(sample, tmp_path / to, to=to, dataset=RAW, overwrite=False)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "read", interrupt)
    for to in of_raw:
        for target, overwrite in ((tmp_path / to, True), (tmp_path / "new", False)):
            with pytest.raises(KeyboardInterrupt):
                export_dataset(sample, target, to=to, dataset=None, overwrite=overwrite)
        reader = READERS.get(to, read_sections)
        np.testing.assert_array_equal(reader(tmp_path / to)[0], GRAY)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(of_raw)


def test_a_full_disk_is_explained(sample, small_disk):
    disk = small_disk(100)
    message = f"cannot write {disk}/out: No space left on device; free some space, then run the same command again"
    for to in ("precomputed", "ome-zarr-0.5", "tiff"):
        with pytest.raises(UserError, match=message):
            export_dataset(sample, disk / "out", to=to, dataset=AFFINITIES, overwrite=False)
        assert not list(disk.iterdir())
    # HDF5 may crash when the process ends.
    refused = script("export.py", sample, "--dataset", AFFINITIES, "--to", "hdf5", disk / "out")
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (2, f"error: {message}")
    assert not list(disk.iterdir())


def test_what_cannot_be_exported_is_refused(sample, tmp_path):
    def volume(name, data, offset=OFFSET, path=tmp_path / "in.zarr"):
        write_array(path, name, data, voxel_size=VOXEL_SIZE[-len(offset) :], offset=offset)

    volume("volumes/segmentation_040", np.array([[[7, 2**32]]], np.uint64))
    volume("volumes/segmentation_060", np.array([[[7, -3]]], np.int64))
    volume("shifted", GRAY, offset=(400, -24, 13))
    volume("doubles", np.ones((2, 2, 2)))
    volume("section", GRAY[0], offset=(0, 0))
    volume("channels", AFFS)
    volume("labels/ids", IDS, path=tmp_path / "none.zarr")
    for source, dataset, to, message in [
        ("in.zarr", None, "hdf5", "holds volumes/segmentation_040, volumes/segmentation_060: name the one"),
        ("none.zarr", None, "hdf5", "holds labels/ids: name the one to export with --dataset"),
        (
            "in.zarr",
            "volumes/segmentation_040",
            "tiff",
            "holds the id 4294967296, which is no uint32 .*--renumber or --to hdf5",
        ),
        (
            "in.zarr",
            "volumes/segmentation_060",
            "precomputed",
            "holds the id -3, which is no uint64 .*--renumber or --to hdf5",
        ),
        ("in.zarr", "shifted", "precomputed", "no whole number of voxels .*--to ome-zarr"),
        ("in.zarr", "doubles", "precomputed", "is float64, which Neuroglancer precomputed cannot hold: .*--to hdf5"),
        ("in.zarr", "section", "tiff", "only .* can be exported"),
        ("in.zarr", "channels", "tiff-sections", "has channels, .*: export it --to tiff"),
        ("in.zarr", "other", "tiff", "no dataset other in"),
        ("no.zarr", None, "tiff", "no.zarr"),
    ]:
        with pytest.raises(UserError, match=message):
            export_dataset(tmp_path / source, tmp_path / "out", to=to, dataset=dataset, overwrite=False)
        assert not list(tmp_path.glob("*out*"))


def test_the_way_out_that_an_error_names_works(tmp_path):
    """Ids that TIFF and precomputed refuse, offsets that precomputed refuses."""
    ids = np.array([[[-3, 2**40]]], np.int64)
    write_array(tmp_path / "in.zarr", SEGMENTATION, ids, voxel_size=VOXEL_SIZE, offset=(1, 2, 3))
    for to in ("hdf5", "ome-zarr"):
        export_dataset(tmp_path / "in.zarr", tmp_path / to, to=to, dataset=None, overwrite=False)
        data, _, offset = READERS[to](tmp_path / to)
        assert data.tolist() == ids.tolist()
        assert tuple(offset) == (1, 2, 3)
