"""What datasets and folders are called and where they are: every script asks here, so that no two disagree.

HOME/DATA_DIR_PATH/BRAIN_VOL/data_{2d,3d}/{train,test}/SAMPLE.zarr  what the user provides
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.zarr               what prediction and segmentation write
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.blocks/TASK        which blocks of that are done
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.rag                its region adjacency graph
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/luts_full/seg_*.npz       look-up tables from fragments to segments
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE_scores.json        scores of its segmentations
"""

import re
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.config.defaults import get_cfg_defaults
from lsdseg.errors import UserError

SPLITS = ("train", "test")

# Datasets of a volume, as they are called unless DATA says otherwise.
_NAMES = get_cfg_defaults().DATA
RAW, LABELS, LABELS_MASK = _NAMES.RAW, _NAMES.NEURON_LABELS, _NAMES.NEURON_LABELS_MASK

# Beside the checkpoints of a run: the config to predict with them.
PREDICT_CONFIG = "config_predict.yaml"

# Datasets of an output zarr.
FRAGMENTS = "volumes/fragments"
SEGMENTATIONS = re.compile(r"volumes/(final_)?segmentation_(.*\d|mutex)")
MUTEX_SEGMENTATION = "volumes/segmentation_mutex"


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


def rag_folder(output: Path) -> Path:
    """Folder beside an output zarr that holds its region adjacency graph, unless a database does: SAMPLE.rag."""
    return output.with_suffix(".rag")


def log_folder(sample: str, task: str) -> Path:
    """Folder below the current directory for the config, the task and the logs of a run: daisy_logs/SAMPLE_TASK."""
    return Path("daisy_logs", f"{sample}_{task}").absolute()


def lut_path(output: Path, merge_function: str, threshold: float) -> Path:
    """A look-up table of an output zarr: luts_full/seg_sampleA_edges_hist_quant_50_70.npz beside it, for 0.7."""
    name = f"seg_{sample_name(output)}_edges_{merge_function}_{round(threshold * 100)}.npz"
    return output.parent / "luts_full" / name


def scores_path(output: Path, suffix: str = "json") -> Path:
    """Where the scores of the output zarr SAMPLE.zarr are: SAMPLE_scores.json (csv, png) beside it."""
    return output.with_name(f"{output.stem}_scores.{suffix}")


def prediction_name(task: str) -> str:
    """Dataset of a task's prediction: volumes/pred_affs."""
    return f"volumes/pred_{task}"


def segmentation_name(threshold: float) -> str:
    """Dataset of a segmentation that was made in memory: volumes/segmentation_055."""
    return f"volumes/segmentation_{_hundredths(threshold)}"


def final_segmentation_name(merge_function: str, threshold: float) -> str:
    """Dataset of a segmentation from a look-up table: volumes/final_segmentation_hist_quant_50_070."""
    return f"volumes/final_segmentation_{merge_function}_{_hundredths(threshold)}"


def sample_name(path: Path | str) -> str:
    """A zarr's stem in lower camel case, as in the names of collections and logs: sample_A-padded -> sampleAPadded."""
    first, *rest = re.findall(r"[^\W_]+", Path(path).stem) or ["sample"]
    return first[0].lower() + first[1:] + "".join(word[0].upper() + word[1:] for word in rest)


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


def _hundredths(threshold: float) -> str:
    return f"{round(threshold * 100):03d}"
