"""``python -m clis compare RUN_FOLDER...``: results of runs as one table."""

from __future__ import annotations

import argparse

from clis.engine.run_folder import RunFolder
from clis.metric.lvis_eval import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=RunFolder, metavar="RUN_FOLDER")


def run(arguments: argparse.Namespace) -> None:
    print(format_table({str(folder): folder.read_result() for folder in arguments.folders}))
