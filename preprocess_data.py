"""Derive new data sets from a data set: python preprocess_data.py -c FILE PREPROCESS.EXPORT_2D_FROM_3D True"""

import argparse

from yacs.config import CfgNode

from lsdseg.cli import ID, argument, deferred, run_script

preprocess = deferred("lsdseg.data_utils.preprocess:preprocess")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option of the published script."""
    parser.add_argument(
        "--background_value",
        metavar="ID",
        type=argument(ID),
        help="id of voxels that nobody has labeled: 0 in exported sections, and in their mask",
    )


def main(cfg: CfgNode, arguments: argparse.Namespace) -> None:
    """Do what the config says."""
    preprocess(cfg, arguments.background_value)


if __name__ == "__main__":
    run_script(
        main,
        description="Export sections (PREPROCESS.EXPORT_2D_FROM_3D) or match gray values (PREPROCESS.HISTOGRAM_MATCH).",
        example="python preprocess_data.py -c config_cremi.py PREPROCESS.EXPORT_2D_FROM_3D True",
        default_config="config/config.py",
        add_arguments=add_arguments,
    )
