"""Make look-up tables from the graph: python 04_find_segments_full.py -c FILE -mf hist_quant_50 -th 0.7"""

from argparse import ArgumentParser

from lsdseg.cli import add_merge_function, argument, deferred, run_script
from lsdseg.config.rules import threshold

find_segments = deferred("lsdseg.engine.post.steps.tables:find_segments")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the merge function and the threshold."""
    add_merge_function(parser)
    parser.add_argument(
        "-th", "--threshold", type=argument(threshold), help="one threshold (default: all INS_SEGMENT.THRESHOLDS)"
    )


if __name__ == "__main__":
    run_script(
        lambda cfg, args: find_segments(cfg, args.merge_function, args.threshold),
        description="Find the segments of every test volume: connected components of the edges up to a threshold.",
        example="python 04_find_segments_full.py -c daisy_logs/sampleA_fragments/config_0.yaml -mf mean -th 0.7",
        default_config="config/config_predict.py",
        add_arguments=add_arguments,
    )
