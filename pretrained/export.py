"""Make weights that ship from a checkpoint: python pretrained/export.py -c CKPT_FOLDER/config_predict.yaml --to FOLDER

Two thirds of a checkpoint are the optimizer's state, which predicting does not need.
"""

from pathlib import Path

from lsdseg.cli import run_script
from lsdseg.errors import UserError
from lsdseg.models import build_model
from lsdseg.models.checkpoint import load_checkpoint, network_settings, write_state


def export(cfg, folder: Path | str) -> Path:
    """Write the weights of TRAIN.CHECKPOINT with their `network_settings`, under the same file name, to a folder.

    Returns:
        The file, which `load_checkpoint` takes.

    Raises:
        UserError: the checkpoint cannot be used, is that of another network, or would be replaced.
    """
    checkpoint = Path(cfg.TRAIN.CHECKPOINT)
    model = build_model(cfg)
    state = {
        "iteration": load_checkpoint(checkpoint, model, cfg),
        "model_state_dict": model.state_dict(),
        "network_settings": network_settings(cfg),
    }
    target = Path(folder) / checkpoint.name
    if target.exists() and target.samefile(checkpoint):
        raise UserError(f"{target} is the checkpoint itself: export to another folder")
    write_state(target, state)
    return target


def main(cfg, args) -> None:
    """Export, and say what came out."""
    written = export(cfg, args.to)
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(
        main,
        description="Write TRAIN.CHECKPOINT without the optimizer's state.",
        example="python pretrained/export.py -c run/config_predict.yaml --to pretrained/fib25_mtlsd",
        default_config=None,
        add_arguments=lambda parser: parser.add_argument("--to", metavar="FOLDER", required=True, help="where to"),
    )
