"""Names and places of datasets, files and folders. Every script takes them from here, so no two disagree.

HOME/DATA_DIR_PATH/BRAIN_VOL/data_{2d,3d}/{train,test}/SAMPLE.zarr  volumes that the user provides
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.zarr               output of prediction and segmentation
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.blocks/STEP        markers of its finished blocks
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.blocks/STEP.lock   keeps two runs from writing the results of a step
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.rag                its region adjacency graph
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.edits              what people merged and split in it
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.segments           tables of the segments of its segmentations
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/luts_full/seg_*.npz       look-up tables from fragments to segments
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE_scores.json        scores of its segmentations
OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE_quality.json       its doubtful segments
OUTFILE/measured.json                                               what steps take per voxel, for estimates
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.config.defaults import get_cfg_defaults
from lsdseg.data_utils.formats import is_volume
from lsdseg.data_utils.place_files import is_place, paths_in
from lsdseg.errors import UserError
from lsdseg.files import explain_os_errors

SPLITS = ("train", "test")

# Default names of the datasets of a volume; the section DATA of a config can override them.
_NAMES = get_cfg_defaults().DATA
RAW, LABELS, LABELS_MASK = _NAMES.RAW, _NAMES.NEURON_LABELS, _NAMES.NEURON_LABELS_MASK

# The config to predict with, beside the checkpoints of a run.
PREDICT_CONFIG = "config_predict.yaml"

# Datasets of an output zarr.
FRAGMENTS = "volumes/fragments"
SEGMENTATIONS = re.compile(r"volumes/(final_)?segmentation_(.*\d|mutex)")
MUTEX_SEGMENTATION = "volumes/segmentation_mutex"


def data_folder(cfg: CfgNode, split: str) -> Path:
    """Return HOME/DATA_DIR_PATH/BRAIN_VOL/data_{2d,3d}/SPLIT, for "train" or "test". It need not exist."""
    data = cfg.DATA
    return Path(data.HOME, data.DATA_DIR_PATH, data.BRAIN_VOL, f"data_{_dimensions(cfg)}", split)


def volumes_in(cfg: CfgNode, split: str) -> list[Path]:
    """Return the volumes in `data_folder(cfg, split)`, sorted by name: zarrs, and volumes in any other format.

    A volume in another format is left out where a zarr has its name, which may be a copy of it. So is a volume that a
    file NAME.volume there names. In 2D, volumes in data_3d are used if data_2d has none. Sections are then taken from
    them.

    Raises:
        UserError: DATA.HOME or the folder is missing, the folder holds no volume, or a file NAME.volume is damaged.
    """
    folder = _folder_in_use(cfg, split)
    volumes = volumes_at(folder)
    if not volumes:
        raise UserError(
            f"no *.zarr in {folder}, and no volume in another format{_named(others_in(cfg, split))}: put a volume "
            "there, for example with data_utils/to_zarr.py"
        )
    return volumes


def others_in(cfg: CfgNode, split: str) -> list[Path]:
    """Return the files and folders where `volumes_in` looks that are no volumes, sorted; hidden ones do not count."""
    folder = _folder_in_use(cfg, split)
    return sorted(path for path in folder.glob("[!.]*") if not (_is_zarr_folder(path) or is_volume(path)))


def _folder_in_use(cfg: CfgNode, split: str) -> Path:
    """Return the folder with the volumes of "train" or "test"."""
    home = cfg.DATA.HOME
    if not home or not Path(home).is_dir():
        raise UserError(f"DATA.HOME is {str(home)!r}, which is not a folder: set it to the folder with your data")
    folder = data_folder(cfg, split)
    volumes_3d = folder.parents[1] / "data_3d" / split
    if not volumes_at(folder) and volumes_3d.is_dir():
        folder = volumes_3d
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist: create it with data_utils/create_dir_organisation.py, "
            "or set DATA.DATA_DIR_PATH and DATA.BRAIN_VOL"
        )
    return folder


def volumes_at(folder: Path) -> list[Path]:
    """Return the volumes in a folder as `volumes_in` does, none if it does not exist."""
    paths = sorted(path for path in folder.glob("[!.]*") if _is_zarr_folder(path) or is_volume(path))
    parts: set[Path] = set()
    for path in filter(is_place, paths):
        # A location may be a folder in a container, which is then a part, too.
        parts |= {part for place in paths_in(path) - {_absolute(path)} for part in (place, *place.parents)}
    whole = [path for path in paths if _absolute(path) not in parts]
    copied = {path.stem for path in whole if path.suffix == ".zarr"}
    return [path for path in whole if path.suffix == ".zarr" or path.stem not in copied]


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _is_zarr_folder(path: Path) -> bool:
    return path.suffix == ".zarr" and path.is_dir()


def _named(paths: Sequence[Path]) -> str:
    return f" ({', '.join(path.name for path in paths[:5])} is in none)" if paths else ""


def run_name(checkpoint: Path | str) -> str:
    """Return the name of the training run that wrote a checkpoint: the name of its folder."""
    return Path(checkpoint).absolute().parent.name


def output_path(cfg: CfgNode, sample_path: Path | str) -> Path:
    """Return OUTFILE/MODEL_TYPE/{2d,3d}/RUN/CHECKPOINT/SAMPLE.zarr for a volume and the weights TRAIN.CHECKPOINT.

    Raises:
        UserError: TRAIN.CHECKPOINT is empty.
    """
    checkpoint = cfg.TRAIN.CHECKPOINT
    if not checkpoint:
        raise UserError("TRAIN.CHECKPOINT is empty: set it to a file model_checkpoint_ITERATION that trainer.py wrote")
    run = Path(cfg.DATA.OUTFILE, cfg.TRAIN.MODEL_TYPE, _dimensions(cfg), run_name(checkpoint))
    return run / Path(checkpoint).name / f"{Path(sample_path).stem}.zarr"


def block_markers(output: Path, step: str) -> Path:
    """Return the folder beside an output zarr with the markers of a step's finished blocks: SAMPLE.blocks/STEP."""
    return output.with_suffix(".blocks") / step


def rag_folder(output: Path) -> Path:
    """Return the folder beside an output zarr for its region adjacency graph, if no database holds it: SAMPLE.rag."""
    return output.with_suffix(".rag")


def edits_path(output: Path) -> Path:
    """Return the log of edits beside an output zarr, see `lsdseg.rag.edits`: SAMPLE.edits."""
    return output.with_suffix(".edits")


def segments_folder(output: Path, dataset: str) -> Path:
    """Return the folder beside an output zarr with the tables of a segmentation: SAMPLE.segments/segmentation_055."""
    return output.with_suffix(".segments") / dataset.removeprefix("volumes/")


def log_folder(sample: str, step: str) -> Path:
    """Return the folder for the config and the logs of a step, in the current directory: daisy_logs/SAMPLE_STEP."""
    return Path("daisy_logs", f"{sample}_{step}").absolute()


def lut_path(output: Path, merge_function: str, threshold: float) -> Path:
    """Return the path of a table, beside the output zarr: luts_full/seg_sampleA_edges_hist_quant_50_70.npz for 0.7."""
    name = f"seg_{sample_name(output)}_edges_{merge_function}_{_hundredths(threshold, digits=1)}.npz"
    return output.parent / "luts_full" / name


def scores_path(output: Path, suffix: str = "json") -> Path:
    """Return the path of the scores of an output zarr SAMPLE.zarr, beside it: SAMPLE_scores.json (csv, png)."""
    return output.with_name(f"{output.stem}_scores.{suffix}")


def neurons_path(output: Path) -> Path:
    """Return the path of the list of all neurons of an output zarr SAMPLE.zarr: SAMPLE_scores_neurons.csv."""
    return output.with_name(f"{output.stem}_scores_neurons.csv")


def quality_path(output: Path, ending: str = ".json") -> Path:
    """Return the path of a list of what is doubtful in an output zarr SAMPLE.zarr: SAMPLE_quality.json."""
    return output.with_name(f"{output.stem}_quality{ending}")


def prediction_name(task: str) -> str:
    """Return the dataset of a task's prediction: volumes/pred_affs."""
    return f"volumes/pred_{task}"


def segmentation_name(threshold: float) -> str:
    """Return the dataset of a segmentation that is made in memory: volumes/segmentation_055."""
    return f"volumes/segmentation_{_hundredths(threshold)}"


def final_segmentation_name(merge_function: str, threshold: float) -> str:
    """Return the dataset of a segmentation from a table: volumes/final_segmentation_hist_quant_50_070."""
    return f"volumes/final_segmentation_{merge_function}_{_hundredths(threshold)}"


def measured_path(cfg: CfgNode) -> Path:
    """Return the file with what steps take per voxel, as runs have measured it: OUTFILE/measured.json."""
    return Path(cfg.DATA.OUTFILE, "measured.json")


def sample_name(path: Path | str) -> str:
    """Return a zarr's stem in lower camel case, for collections and logs: sampleAPadded for sample_A-padded.zarr."""
    words: list[str] = re.findall(r"[^\W_]+", Path(path).stem) or ["sample"]
    first, *rest = words
    return first[0].lower() + first[1:] + "".join(word[0].upper() + word[1:] for word in rest)


def create_data_folders(base: Path | str, names: Sequence[str]) -> list[Path]:
    """Create BASE/NAME/data_{2d,3d}/{train,test} for every name. Existing folders are left alone.

    Args:
        base: HOME/DATA_DIR_PATH of a config.
        names: data sets, DATA.BRAIN_VOL of a config.

    Returns:
        The folders.

    Raises:
        UserError: a folder cannot be created.
    """
    folders = [
        Path(base) / name / f"data_{dimensions}" / split
        for name in names
        for dimensions in ("2d", "3d")
        for split in SPLITS
    ]
    with explain_os_errors(base):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    return folders


def _dimensions(cfg: CfgNode) -> str:
    return "2d" if cfg.DATA.DIM_2D else "3d"


def _hundredths(threshold: float, digits: int = 3) -> str:
    """Write 0.7 as 070, and 0.704 as 070_4, so that no two thresholds have the same name."""
    whole, _, rest = f"{round(threshold * 100, 6):0.6f}".partition(".")
    return f"{int(whole):0{digits}d}" + f"_{rest.rstrip('0')}".rstrip("_")
