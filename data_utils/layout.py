"""Where volumes and results lie below DATA.HOME: every script asks here, so that no two disagree.

HOME/DATA_DIR_PATH/BRAIN_VOL/data_{2d,3d}/{train,test}/SAMPLE.zarr  what the user provides
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.zarr               what prediction and segmentation write
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.blocks/TASK        which blocks of that are done
"""

from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from config.errors import UserError

SPLITS = ("train", "test")


def data_folder(cfg: CfgNode, split: str) -> Path:
    """HOME/DATA_DIR_PATH/BRAIN_VOL/data_{2d,3d}/SPLIT, existing or not; split is "train" or "test"."""
    data = cfg.DATA
    return Path(data.HOME) / data.DATA_DIR_PATH / data.BRAIN_VOL / f"data_{_dimensions(cfg)}" / split


def volumes_in(cfg: CfgNode, split: str) -> list[Path]:
    """The volumes `*.zarr` in `data_folder(cfg, split)`, sorted by name.

    In 2D, those of data_3d if data_2d has none: sections are then drawn from them.

    Raises UserError if DATA.HOME or the folder is missing or holds no zarr.
    """
    home = cfg.DATA.HOME
    if not home or not Path(home).is_dir():
        raise UserError(f"DATA.HOME is {str(home)!r}, which is no folder: set it to the folder that holds your data")
    folder = data_folder(cfg, split)
    volumes_3d = folder.parents[1] / "data_3d" / split
    if not any(folder.glob("*.zarr")) and volumes_3d.is_dir():
        folder = volumes_3d
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist: make it with data_utils/create_dir_organisation.py, "
            "or set DATA.DATA_DIR_PATH and DATA.BRAIN_VOL"
        )
    volumes = sorted(volume for volume in folder.glob("*.zarr") if volume.is_dir())
    if not volumes:
        raise UserError(f"no *.zarr in {folder}: put a volume there, for example with data_utils/hdf_to_zarr.py")
    return volumes


def run_name(checkpoint: Path | str) -> str:
    """Name of the training run that wrote a checkpoint file: the name of its folder."""
    return Path(checkpoint).absolute().parent.name


def output_path(cfg: CfgNode, sample_path: Path | str) -> Path:
    """OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.zarr for a volume and the weights TRAIN.CHECKPOINT.

    Raises UserError if TRAIN.CHECKPOINT is empty.
    """
    checkpoint = cfg.TRAIN.CHECKPOINT
    if not checkpoint:
        raise UserError("TRAIN.CHECKPOINT is empty: set it to a file model_checkpoint_ITERATION that trainer.py wrote")
    run = Path(cfg.DATA.OUTFILE) / cfg.TRAIN.MODEL_TYPE / _dimensions(cfg) / run_name(checkpoint)
    return run / Path(checkpoint).name / f"{Path(sample_path).stem}.zarr"


def block_markers(output: Path, task: str) -> Path:
    """Folder beside an output zarr that records which blocks of a task are done: SAMPLE.blocks/TASK."""
    return output.with_suffix(".blocks") / task


def create_dir_organisation(base: Path | str, names: Sequence[str]) -> list[Path]:
    """Make BASE/NAME/data_{2d,3d}/{train,test} for every name; folders that exist stay as they are.

    base is HOME/DATA_DIR_PATH, a name a DATA.BRAIN_VOL. Returns the folders.
    """
    folders = [
        Path(base) / name / f"data_{dimensions}" / split
        for name in names
        for dimensions in ("2d", "3d")
        for split in SPLITS
    ]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return folders


def _dimensions(cfg: CfgNode) -> str:
    return "2d" if cfg.DATA.DIM_2D else "3d"
