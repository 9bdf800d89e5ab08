"""Evaluate a checkpoint, or the result files of any detector.

``python evaluate.py CHECKPOINT``, or ``python evaluate.py --annotations FILE --results FILE`` (which is
``python -m clis score``).
"""

import sys

from clis.cli import run_command
from clis.commands import run_verb

if __name__ == "__main__":
    by_files = any(argument.startswith(("--annotations", "--results")) for argument in sys.argv[1:])
    run_command(lambda: run_verb("score" if by_files else "evaluate", prog="evaluate.py"))
