"""Apply a look-up table: python 05_extract_segmentation_from_lut.py -c FILE -mf hist_quant_50 -th 0.7"""

from argparse import ArgumentParser

from lsdseg.cli import add_merge_function, argument, deferred, run_script
from lsdseg.config.rules import threshold

extract_segmentation = deferred("lsdseg.engine.post.steps.relabel:extract_segmentation")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the merge function and the threshold of the look-up table."""
    # The defaults of the published script.
    add_merge_function(parser, default="hist_quant_50")
    parser.add_argument(
        "-th", "--threshold", type=argument(threshold), default=0.3, help="threshold, as given to 04 (default: 0.3)"
    )


if __name__ == "__main__":
    run_script(
        lambda cfg, args: extract_segmentation(cfg, args.merge_function, args.threshold),
        description="Write the segmentation of every test volume, block by block, from its look-up table.",
        example="python 05_extract_segmentation_from_lut.py -c config/config_predict.py -mf hist_quant_50 -th 0.7",
        default_config="config/config_predict.py",
        add_arguments=add_arguments,
    )
