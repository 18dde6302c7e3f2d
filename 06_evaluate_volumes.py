"""Score segmentations: python 06_evaluate_volumes.py -c CKPT_FOLDER/config_predict.yaml"""

from argparse import ArgumentParser
from pathlib import Path

from lsdseg.cli import run_script
from lsdseg.engine.evaluate.evaluate import evaluate


def add_arguments(parser: ArgumentParser) -> None:
    """Add where skeletons lie."""
    text = "SWC file, or folder of them, in nm (default: skeletons are made from the ground truth)"
    parser.add_argument("--skeletons", metavar="SWC", type=Path, help=text)


if __name__ == "__main__":
    run_script(
        lambda cfg, args: evaluate(cfg, args.skeletons),
        description="Score the segmentations of the test volumes: VOI, adapted Rand error, expected run length.",
        example="python 06_evaluate_volumes.py -c config/config_predict.py",
        default_config="config/config_predict.py",
        add_arguments=add_arguments,
    )
