"""Export weights to ship: python pretrained/export.py -c CKPT_FOLDER/config_predict.yaml --to FOLDER

Two thirds of a checkpoint are the state of the optimizer, which prediction does not need.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from lsdseg.cli import run_script
from lsdseg.engine.statistics import training_statistics
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import TRAINING_DATA, load_checkpoint, network_settings, read_checkpoint, write_state


def export(cfg: CfgNode, folder: Path | str, volumes: Sequence[Path | str] = ()) -> Path:
    """Write the weights of TRAIN.CHECKPOINT to a folder, under the same file name.

    Their `network_settings` and the statistics of their training data are written with them.

    Args:
        cfg: the config of the network, with TRAIN.CHECKPOINT.
        folder: where to write the file.
        volumes: zarrs that the network was trained on, to compute the statistics from. Without any, take those that the
            checkpoint has, if any.

    Returns:
        The file, which `load_checkpoint` can read.

    Raises:
        UserError: the checkpoint cannot be used or belongs to another network, or the new file would replace it.
    """
    checkpoint = Path(cfg.TRAIN.CHECKPOINT)
    model = build_model(cfg)
    state = {
        "iteration": load_checkpoint(checkpoint, model, cfg),
        "model_state_dict": model.state_dict(),
        "network_settings": network_settings(cfg),
    }
    statistics = read_checkpoint(checkpoint).get(TRAINING_DATA)
    if volumes:
        statistics = training_statistics([Path(volume) for volume in volumes], cfg)
    if statistics:
        state[TRAINING_DATA] = statistics
    target = Path(folder) / checkpoint.name
    if target.exists() and target.samefile(checkpoint):
        raise UserError(f"{target} is the checkpoint itself: export to another folder")
    write_state(target, state)
    return target


def main(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Export the weights and print the file and its size."""
    written = export(cfg, args.to, args.volume)
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the output and the training data."""
    parser.add_argument("--to", metavar="FOLDER", required=True, help="the folder to write the weights to")
    parser.add_argument(
        "--volume",
        metavar="ZARR",
        action="append",
        default=[],
        help="a training volume, for its statistics if the checkpoint has none; may be repeated",
    )


if __name__ == "__main__":
    run_script(
        main,
        description="Write TRAIN.CHECKPOINT without the optimizer's state.",
        example="python pretrained/export.py -c run/config_predict.yaml --to pretrained/fib25_mtlsd",
        default_config=None,
        add_arguments=add_arguments,
    )
