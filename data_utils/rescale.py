"""Resample a volume: python data_utils/rescale.py IN.zarr OUT.zarr --voxel-size 10 10 10"""

from pathlib import Path

from lsdseg.cli import command_parser, run_command
from lsdseg.data_utils.layout import RAW
from lsdseg.data_utils.rescale import rescale
from lsdseg.data_utils.volumes import open_array
from lsdseg.errors import UserError


def main():
    """Rescale one dataset."""
    parser = command_parser(
        "Resample a volume to another voxel size, in nm and z, y, x order.",
        "python data_utils/rescale.py volume.zarr test/volume.zarr --voxel-size 10 10 10",
    )
    parser.add_argument("source", metavar="IN.zarr", type=Path)
    parser.add_argument("target", metavar="OUT.zarr", type=Path)
    parser.add_argument("--dataset", default=RAW, help="what to read (default: %(default)s)")
    parser.add_argument("--to", metavar="DATASET", help="what to write (default: the same name)")
    grid = parser.add_mutually_exclusive_group(required=True)
    grid.add_argument("--voxel-size", type=int, nargs=3, metavar=("Z", "Y", "X"), help="the new one, whole nm")
    grid.add_argument("--like", nargs=2, metavar=("ZARR", "DATASET"), help="or: take the voxels and ROI of this volume")
    parser.add_argument("--labels", action="store_true", help="labels, or a mask: take the nearest voxel")
    parser.add_argument("--overwrite", action="store_true", help="replace a zarr that exists")
    run_command(parser, resample)


def resample(arguments):
    """Open what is read, and refuse to replace it, before anything is written."""
    source, target = arguments.source, arguments.target
    array = open_array(source, arguments.dataset)
    like = open_array(*arguments.like) if arguments.like else None
    inputs = [source, *(arguments.like or [])[:1]]
    if target.exists() and any(target.samefile(path) for path in inputs):
        raise UserError(f"{target} is an input and would be replaced as a whole: write elsewhere")
    if target.exists() and not arguments.overwrite:
        raise UserError(f"{target} exists: add --overwrite, or write elsewhere")
    dataset = arguments.to or arguments.dataset
    grid = (like.voxel_size, like.roi) if like else (arguments.voxel_size,)
    rescale(array, target, dataset, *grid, labels=arguments.labels)
    written = open_array(target, dataset)
    print(f"{target}: {dataset} {written.dtype} {written.shape}, {tuple(written.voxel_size)} nm")


if __name__ == "__main__":
    main()
