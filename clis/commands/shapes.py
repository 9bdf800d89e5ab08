"""``python -m clis shapes FOLDER``: the embedded benchmark alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from clis.data.shapes import ShapesSpec, generate_shapes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis shapes`."""
    parser.add_argument("folder", type=Path, help="folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=0, help="set the data seed (default 0, the benchmark)")


def run(arguments: argparse.Namespace) -> None:
    """Draw the embedded benchmark into a folder.

    Raises:
        ValueError: the seed is below 0.
    """
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed}: must be at least 0")
    generate_shapes(arguments.folder, ShapesSpec(seed=arguments.seed))
