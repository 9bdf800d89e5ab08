"""Train a detector: ``python train.py --config configs/shapes/clis.yaml``, or the same under torchrun."""

from clis.cli import run_command
from clis.commands import run_verb

if __name__ == "__main__":
    run_command(lambda: run_verb("train", prog="train.py"))
