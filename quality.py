"""List doubtful segments, without ground truth: python quality.py -c CKPT_FOLDER/config_predict.yaml"""

from argparse import ArgumentParser

from lsdseg.cli import deferred, run_script

quality = deferred("lsdseg.engine.evaluate.quality:quality")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the segmentation."""
    parser.add_argument(
        "--segmentation",
        metavar="DATASET",
        help="such as segmentation_050 (default: what 06 found best, or the middle)",
    )


if __name__ == "__main__":
    run_script(
        lambda cfg, args: quality(cfg, args.segmentation),
        description="List the segments of every test volume whose shape contradicts the predicted LSDs the most.",
        example="python quality.py -c config/config_predict.py --segmentation segmentation_050",
        default_config="config/config_predict.py",
        add_arguments=add_arguments,
    )
