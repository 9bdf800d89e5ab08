"""``python -m clis compare RUN_FOLDER...``: results of runs as one table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from clis.metric.lvis_eval import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")


def run(arguments: argparse.Namespace) -> None:
    print(format_table({str(f): json.loads((f / "eval.json").read_text()) for f in arguments.folders}))
