"""List doubtful segments, without ground truth: python quality.py -c CKPT_FOLDER/config_predict.yaml"""

from argparse import ArgumentParser

from lsdseg.cli import deferred, run_script

quality = deferred("lsdseg.engine.evaluate.quality:quality")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the segmentation."""
    parser.add_argument(
        "--segmentation",
        metavar="DATASET",
        help="the segmentation, such as segmentation_050 (default: the best one that 06 found, or the middle one)",
    )


if __name__ == "__main__":
    run_script(
        lambda cfg, args: quality(cfg, args.segmentation),
        description="List likely merges and splits in a segmentation of every test volume, without ground truth.",
        example="python quality.py -c config/config_predict.py --segmentation segmentation_050",
        default_config="config/config_predict.py",
        add_arguments=add_arguments,
    )
