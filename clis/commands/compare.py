"""``python -m clis compare RUN_FOLDER...``: results of runs as one table."""

from __future__ import annotations

import argparse

from clis.engine.run_folder import RunFolder
from clis.metric.lvis_eval import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis compare`: run folders."""
    parser.add_argument("folders", nargs="+", type=RunFolder, metavar="RUN_FOLDER")


def run(arguments: argparse.Namespace) -> None:
    """Print the results of finished runs as one table."""
    print(format_table({str(folder): folder.read_result() for folder in arguments.folders}))
