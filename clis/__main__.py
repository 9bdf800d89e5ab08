"""Utilities around training and evaluation: ``python -m clis VERB``, also as the console script ``clis``."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence

import clis
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
    parser.add_argument("--version", action="version", version=f"clis {clis.__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of those below")
    if not argv:
        parser.print_help(sys.stderr)
        sys.exit(2)
    if not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], VERBS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
        parser.exit(2, f"{parser.prog}: error: no verb {argv[0]!r}; {meant}\n")
    parser.parse_args(argv)


def script() -> None:
    """Run as a program: an error that a user can fix ends it in one line."""
    run_command(main)


if __name__ == "__main__":
    script()
