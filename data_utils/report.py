"""See what a network would learn from: python data_utils/report.py train/*.zarr"""

from pathlib import Path

from lsdseg.cli import command_parser, deferred, run_command

report_volumes = deferred("lsdseg.engine.training.volumes_report:report_volumes")


def main() -> None:
    """Write the page."""
    parser = command_parser(
        "Write one HTML page about labeled volumes: pictures, gray values, labels, and what is probably wrong.",
        "python data_utils/report.py train/*.zarr\n  python data_utils/report.py -c config/config_cremi.py",
        "\nlsdseg/config/defaults.py explains every key.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="VOLUME | KEY VALUE",
        help="volumes in any format; or, with -c, settings that override the config",
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="show all training volumes of a config")
    parser.add_argument(
        "--to", metavar="FILE", type=Path, help="the page (default: volumes_report.html in this folder)"
    )
    run_command(parser, lambda arguments: report_volumes(**vars(arguments)))


if __name__ == "__main__":
    main()
