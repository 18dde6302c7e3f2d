"""Run the whole pipeline on synthetic data: python demo.py (or `make demo`, which sets everything up first).

The demo makes its own data, prints and runs the commands that a user would type, and ends with a picture and a score.
"""

import json
import time
from argparse import Namespace
from pathlib import Path

from lsdseg.cli import call_script, command_parser, deferred, run_command
from lsdseg.config.loader import load_config
from lsdseg.data_utils.layout import PREDICT_CONFIG, data_folder, scores_path

write_phantom = deferred("lsdseg.data_utils.phantom:write_phantom")
draw_sample = deferred("lsdseg.engine.evaluate.figure:draw_sample")
samples_of = deferred("lsdseg.engine.sample:samples_of")
seed_everything = deferred("lsdseg.engine.training.train:seed_everything")
build_model = deferred("lsdseg.models:build_model")
save_untrained = deferred("lsdseg.models.checkpoint:save_untrained")

CHECKOUT = Path(__file__).resolve().parent
HOME = CHECKOUT / "demo_data"
CONFIG = CHECKOUT / "config" / "config_demo.py"
# Name -> voxels along each axis, and the seed. Training and test volumes differ in their seeds.
VOLUMES = {"train/phantom_1": (128, 1), "train/phantom_2": (128, 2), "test/phantom_3": (112, 3)}


def main(_arguments: Namespace) -> None:
    """Make phantoms, train, predict, segment and score. Compare with an untrained network, and draw a picture."""
    began = time.monotonic()
    cfg = load_config(CONFIG, ["DATA.HOME", str(HOME)])
    print_title("make synthetic volumes")
    for name, (size, seed) in VOLUMES.items():
        split, stem = name.split("/")
        path = data_folder(cfg, split) / f"{stem}.zarr"
        if not path.exists():
            write_phantom(path, (size,) * 3, seed=seed, voxel_size=tuple(cfg.MODEL.VOXEL_SIZE))
        print(path)

    print_title("train")
    call_script("trainer.py", "-c", CONFIG, "DATA.HOME", HOME, cwd=HOME)
    trained = Path(cfg.MODEL.CKPT_FOLDER) / PREDICT_CONFIG
    best, score = segment_and_score(trained, "trained")

    untrained_weights = Path(cfg.MODEL.CKPT_FOLDER).parent / "untrained" / "model_checkpoint_0"
    seed_everything(cfg.TRAIN.SEED)
    save_untrained(untrained_weights, build_model(cfg), cfg)
    _, score_untrained = segment_and_score(trained, "untrained", "TRAIN.CHECKPOINT", untrained_weights)

    print_title("draw")
    predicted = load_config(trained)
    (sample,) = samples_of(predicted)
    picture = HOME / "segmentation.png"
    draw_sample(sample, best, picture)

    print(f"\nVOI sum on a volume the network never saw: {score:.2f}")
    print(f"untrained network, same pipeline:          {score_untrained:.2f}")
    print(f"picture      {picture}\nsegmentation {sample.output}/{best}")
    print(f"report       {scores_path(sample.output, 'html')}\nTensorBoard  tensorboard --logdir {cfg.MODEL.LOG_DIR}")
    print("all of it    make view")
    print(f"finished in {time.monotonic() - began:.0f} s")


def segment_and_score(config: Path, network: str, *overrides: object) -> tuple[str, float]:
    """Predict, segment block by block, and evaluate.

    Args:
        config: the config file.
        network: what to call the network in titles.
        overrides: KEY, VALUE, ...

    Returns:
        The dataset of the best segmentation, and its VOI sum.
    """
    cfg = load_config(config, [str(value) for value in overrides])
    merge_function: list[object] = ["-mf", cfg.INS_SEGMENT.MERGE_FUNCTION]
    steps: list[tuple[str, str, list[object]]] = [
        ("predict", "predicter.py", []),
        ("fragments", "02_extract_fragments_blockwise.py", []),
        ("agglomerate", "03_agglomerate_blockwise.py", []),
        ("look-up tables", "04_find_segments_full.py", merge_function),
    ]
    for threshold in cfg.INS_SEGMENT.THRESHOLDS:
        steps.append(("segmentation", "05_extract_segmentation_from_lut.py", [*merge_function, "-th", threshold]))
    for title, script, options in [*steps, ("evaluate", "06_evaluate_volumes.py", [])]:
        print_title(f"{title} ({network} network)")
        call_script(script, "-c", config, *options, *overrides, cwd=HOME)
    report = json.loads(scores_path(samples_of(cfg)[0].output).read_text())
    return report["best"], next(row["voi_sum"] for row in report["scores"] if row["dataset"] == report["best"])


def print_title(title: str) -> None:
    """Print the title of the next step."""
    print(f"\n=== {title} ===", flush=True)


if __name__ == "__main__":
    run_command(command_parser("Run the whole pipeline on synthetic data, in ./demo_data.", "python demo.py"), main)
