"""``python -m clis config FILE``: a config as it would run, with all defaults."""

from __future__ import annotations

import argparse

from clis.commands.arguments import add_config
from clis.config_files import config_to_yaml, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis config`: a config and its overrides."""
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the config with its overrides and all defaults as YAML."""
    print(config_to_yaml(load_config(arguments.config, arguments.overrides)), end="")
