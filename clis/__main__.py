"""Utilities around training and evaluation: ``python -m clis VERB``, also as the console script ``clis``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clis.cli import run_command
from clis.commands import VERBS, run_verb


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb named by the first argument with the remaining arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in VERBS:
        run_verb(argv[0], argv[1:])
        return
    width = max(map(len, VERBS))
    table = "\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="python -m clis",
        description="Train, evaluate and inspect detectors.",
        epilog=f"verbs:\n{table}\n\npython -m clis VERB --help describes the arguments of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of those below")
    parser.parse_args(argv)


def script() -> None:
    """Run as a program: an error that a user can fix ends it in one line."""
    run_command(main)


if __name__ == "__main__":
    script()
