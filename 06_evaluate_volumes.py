"""Score segmentations: python 06_evaluate_volumes.py -c CKPT_FOLDER/config_predict.yaml"""

from argparse import ArgumentParser
from pathlib import Path

from lsdseg.cli import deferred, run_script
from lsdseg.data_utils.layout import FRAGMENTS

score = deferred("lsdseg.engine.scoring:score")


def add_arguments(parser: ArgumentParser) -> None:
    """Add where ground truth, skeletons and fragments lie."""
    text = "SWC file, or folder of them, in nm (default: skeletons are made from the ground truth)"
    parser.add_argument("--skeletons", metavar="SWC", type=Path, help=text)
    parser.add_argument("-gt_file", "--gt_file", metavar="ZARR", type=Path, help="ground truth, if not in the volume")
    parser.add_argument("-gt_ds", "--gt_ds", metavar="DATASET", help="ground truth (default: DATA.NEURON_LABELS)")
    text = "fragments in the output (default: %(default)s)"
    parser.add_argument("-frags_ds", "--frags_ds", metavar="DATASET", default=FRAGMENTS, help=text)
    text = "score look-up tables of 04, too, whose segmentation 05 did not write (always done if none was written)"
    parser.add_argument("--tables", action="store_true", help=text)


if __name__ == "__main__":
    run_script(
        lambda cfg, args: score(cfg, args.skeletons, args.gt_file, args.gt_ds, args.frags_ds, args.tables),
        description="Score the segmentations of the test volumes: VOI, adapted Rand error, expected run length.",
        example="python 06_evaluate_volumes.py -c config/config_predict.py",
        default_config="config/config_predict.py",
        add_arguments=add_arguments,
    )
