"""``python -m clis train``, or ``train.py``: the whole recipe of a config."""

from __future__ import annotations

import argparse

from clis.config_files import load_config
from clis.distributed import choose_device, process_group
from clis.engine.train import recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis train`."""
    parser.add_argument("--config", required=True, help="e.g. configs/shapes/clis.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="change the config, e.g. train.steps=100 output=runs/short. Those of the model, the "
        "instance-level data and the training also apply to the runs that it needs first",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Train and evaluate the detector of a config, after everything that it needs first."""
    config = load_config(arguments.config, arguments.overrides)
    device = choose_device(config.train.device)
    with process_group(device):
        recipe(config, arguments.config, arguments.overrides, device)
