"""See how training goes, or went, on one page: python training_report.py -c config/config_cremi.py"""

from pathlib import Path

from lsdseg.cli import command_parser, deferred, run_command

report_training = deferred("lsdseg.engine.training.report:report_training")


def main() -> None:
    """Write the page."""
    parser = command_parser(
        "Write one HTML page about a training run: losses, speed, scores, dead channels, pictures and training data.",
        "python training_report.py -c config/config_cremi.py DATA.HOME /data\n  python training_report.py lsd_logs",
        "\nlsdseg/config/defaults.py explains every key.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="LOGS | KEY VALUE",
        help="a folder of logs; or, with -c, settings that override the config",
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="the config that the run was started with")
    parser.add_argument("--to", metavar="FILE", type=Path, help="the page (default: training_report.html in the logs)")
    run_command(parser, lambda arguments: report_training(**vars(arguments)))


if __name__ == "__main__":
    main()
