"""``python -m clis report RUN_FOLDER...``: one HTML file that says what runs get right and wrong, and why."""

from __future__ import annotations

import argparse
from pathlib import Path

from clis.commands.arguments import non_negative, read_names, split_overrides
from clis.report.page import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis report`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_FOLDER",
        help="run folders of one data set, finished or not; key=value changes their configs, e.g. "
        "data.root=/datasets if the data have moved",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the first run folder"
    )
    parser.add_argument(
        "--names", nargs="+", default=[], metavar="RUN=NAME", help="name runs in the page, by folder"
    )
    parser.add_argument(
        "--images",
        type=non_negative,
        metavar="N",
        help="validation images with a picture (default: as many as 6 MB hold, about 450 photographs)",
    )
    parser.add_argument(
        "--regions", type=non_negative, default=90, metavar="N", help="regions with a picture (default 90)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page of some runs."""
    named, overrides = split_overrides(arguments.runs, "run folder")
    folders = [Path(each) for each in named]
    names = read_names(arguments.names, [str(folder) for folder in folders])
    write_report(
        folders,
        arguments.out or folders[0] / "report.html",
        names=[names.get(str(folder), str(folder)) for folder in folders],
        overrides=overrides,
        images=arguments.images,
        regions=arguments.regions,
    )
