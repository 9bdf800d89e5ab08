"""Arguments that several verbs take."""

from __future__ import annotations

import argparse


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a config: its file and the overrides."""
    parser.add_argument("config", help="a YAML file, e.g. configs/lvis_v1/clis_r50.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change the config")


def positive(text: str) -> int:
    """Read a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)
