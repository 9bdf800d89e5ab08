"""``python -m clis train``, or ``train.py``: the whole recipe of a config."""

from __future__ import annotations

import argparse

from clis.commands.arguments import add_config
from clis.config_files import load_config
from clis.distributed import choose_device, process_group
from clis.engine.train import recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis train`."""
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train and evaluate the detector of a config, after everything that it needs first."""
    config = load_config(arguments.config, arguments.overrides)
    device = choose_device(config.train.device)
    with process_group(device):
        recipe(config, arguments.config, arguments.overrides, device)
