"""The formats to export to, without the libraries that write them.

A format is a module with one function that writes and one that recognizes what was written, and an entry in FORMATS.
"""

from typing import NamedTuple


class Format(NamedTuple):
    """A format to export to.

    Attributes:
        title: what it is called.
        write: "module:function" that takes an `Export` and the path to write.
        is_own: "module:function" that takes a path and says whether an export wrote all that is there.
        folder: whether it is a folder, not a file.
    """

    title: str
    write: str
    is_own: str
    folder: bool


FORMATS = {
    "precomputed": Format(
        "Neuroglancer precomputed",
        "lsdseg.data_utils.export_precomputed:write_precomputed",
        "lsdseg.data_utils.export_precomputed:is_own",
        folder=True,
    ),
    "ome-zarr": Format(
        "OME-Zarr 0.4",
        "lsdseg.data_utils.export_ome:write_ome_04",
        "lsdseg.data_utils.export_ome:is_own",
        folder=True,
    ),
    "ome-zarr-0.5": Format(
        "OME-Zarr 0.5",
        "lsdseg.data_utils.export_ome:write_ome_05",
        "lsdseg.data_utils.export_ome:is_own",
        folder=True,
    ),
    "tiff": Format(
        "OME-TIFF",
        "lsdseg.data_utils.export_tiff:write_tiff",
        "lsdseg.data_utils.export_tiff:is_own",
        folder=False,
    ),
    "tiff-sections": Format(
        "folder of TIFFs",
        "lsdseg.data_utils.export_tiff:write_sections",
        "lsdseg.data_utils.export_tiff:is_own_folder",
        folder=True,
    ),
    "hdf5": Format(
        "HDF5 in CREMI's layout",
        "lsdseg.data_utils.export_hdf:write_hdf",
        "lsdseg.data_utils.export_hdf:is_own",
        folder=False,
    ),
    "swc": Format(
        "folder of SWC skeletons",
        "lsdseg.data_utils.export_skeletons:write_swc_folder",
        "lsdseg.data_utils.export_skeletons:is_own_folder",
        folder=True,
    ),
}
