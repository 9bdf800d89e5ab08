"""Train a detector: ``python train.py --config configs/shapes/clis.yaml``, or the same under torchrun."""

from clis.__main__ import run_command
from clis.engine.train import main

if __name__ == "__main__":
    run_command(main)
