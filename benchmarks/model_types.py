"""Compare the scores of all model types and segmentation methods after the same few iterations.

    make demo                                                  # makes the synthetic volumes
    python benchmarks/model_types.py -c config_demo.py DATA.HOME demo_data TRAIN.EPOCHS 600

Every type trains on the train folder of the config's data set and predicts the test folder. Predictions are segmented
by waterz (best of INS_SEGMENT.THRESHOLDS) and by mutex watershed. All of this runs the scripts that a user would call.
Affinities have the offsets TRAIN.LR_NEIGHBORHOOD. In 2D, networks train on sections, and segments are linked into 3D
objects by overlap. There is one run each, so small differences mean nothing. All files are in DATA.HOME/model_types. A
run that is already there is not repeated.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from lsdseg.cli import call_script, run_script
from lsdseg.config.loader import load_config
from lsdseg.config.model_types import MODEL_TYPES
from lsdseg.data_utils.layout import PREDICT_CONFIG, output_path, scores_path, volumes_in
from lsdseg.data_utils.volumes import has_array
from lsdseg.models.checkpoint import checkpoint_path

SETTINGS_2D = {"DATA.DIM_2D": True, "INS_SEGMENT.LINK_SECTIONS": 0.5}
NEIGHBORHOOD = {"TRAIN.NEIGHBORHOOD": "LR_NEIGHBORHOOD", "TRAIN.NEIGHBORHOOD_2D": "LR_NEIGHBORHOOD"}
COLUMNS = "{:<12}{:>5}{:>12}{:>12}{:>12}"


def main(cfg: CfgNode, args: Namespace) -> None:
    """Train, predict, segment and score every model type, and print a row for each."""
    has_mito = all(has_array(path, cfg.DATA.MITO_LABELS) for path in volumes_in(cfg, "train"))
    rows = []
    for flat in (False, True):
        for name, model_type in MODEL_TYPES.items():
            if "mito" not in model_type.tasks or has_mito:
                scores = train_and_score(cfg, args, name, flat)
                rows.append((name, "2D" if flat else "3D", *scores))
    print("\n" + COLUMNS.format("type", "", "waterz", "threshold", "mutex"))
    for row in rows:
        print(COLUMNS.format(*row))


def train_and_score(cfg: CfgNode, args: Namespace, model_type: str, flat: bool) -> tuple[str, str, str]:
    """Train, predict, segment and score one model type.

    Returns:
        The VOI sum of waterz, its best threshold, and the VOI sum of mutex watershed; "-" for a type without
        affinities.
    """
    runs = Path(cfg.DATA.HOME) / "model_types"
    run = runs / f"{model_type}_{'2D' if flat else '3D'}"
    folders = {f"MODEL_ISO.{key}": run / key for key in ("LOG_DIR", "OUTPUT_DIR")} | {"MODEL_ISO.CKPT_FOLDER": run}
    settings = {"TRAIN.MODEL_TYPE": model_type} | NEIGHBORHOOD | (SETTINGS_2D if flat else {}) | folders
    if first := MODEL_TYPES[model_type].first:
        folder = runs / f"{first}_{'2D' if flat else '3D'}"
        settings["TRAIN.CHECKPOINT_AC"] = checkpoint_path(folder, cfg.TRAIN.EPOCHS)
    call_script("trainer.py", "-c", args.config, *args.overrides, *pairs(settings))
    if "affs" not in MODEL_TYPES[model_type].tasks:
        return "-", "-", "-"
    predicted = run / PREDICT_CONFIG
    call_script("predicter.py", "-c", predicted)
    for method in ("waterz", "mutex"):
        call_script("instance_segmenter.py", "-c", predicted, "INS_SEGMENT.METHOD", method)
    call_script("06_evaluate_volumes.py", "-c", predicted)
    predict_cfg = load_config(predicted)
    report = json.loads(scores_path(output_path(predict_cfg, volumes_in(predict_cfg, "test")[0])).read_text())
    by_method = {
        method: min((row for row in report["scores"] if row["method"] == method), key=lambda row: row["voi_sum"])
        for method in ("waterz", "mutex")
    }
    waterz, mutex = by_method["waterz"], by_method["mutex"]
    return f"{waterz['voi_sum']:.3f}", f"{waterz['threshold']:.2f}", f"{mutex['voi_sum']:.3f}"


def pairs(settings: dict[str, Any]) -> list[str]:
    """Return settings as the arguments KEY, VALUE, ..."""
    return [str(part) for item in settings.items() for part in item]


if __name__ == "__main__":
    run_script(
        main,
        description="Train, segment and score every model type.",
        example="python benchmarks/model_types.py -c config_demo.py DATA.HOME demo_data TRAIN.EPOCHS 600",
        default_config="config/config_demo.py",
        add_arguments=lambda _: None,
    )
