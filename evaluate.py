"""Evaluate a checkpoint: ``python evaluate.py runs/shapes/clis/checkpoints/last.pt``."""

from clis.__main__ import run_command
from clis.engine.evaluate import main

if __name__ == "__main__":
    run_command(main)
