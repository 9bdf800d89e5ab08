"""``python -m clis pretrain CONFIG``: the ResNet of a config as an image classifier."""

from __future__ import annotations

import argparse

from clis.commands.arguments import add_config
from clis.config_files import load_config
from clis.data.streams import generate_data
from clis.distributed import choose_device, process_group
from clis.engine.at_work import at_work, only_process
from clis.engine.preemption import stopping_at_once
from clis.engine.pretrain import pretrain
from clis.engine.run_folder import RunFolder
from clis.progress import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis pretrain`: a config and its overrides."""
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Pre-train the ResNet of a config as an image classifier, and print how a detector uses its weights.

    Raises:
        ValueError: `pretrain.epochs` is 0.
    """
    config = load_config(arguments.config, arguments.overrides)
    if config.pretrain.epochs == 0:
        raise ValueError("pretrain.epochs is 0: nothing to do; pass e.g. pretrain.epochs=100")
    device = choose_device(config.train.device)
    with process_group(device):
        generate_data(config)
        folder = RunFolder(config.output).pretraining
        folder.path.mkdir(parents=True, exist_ok=True)
        with only_process(RunFolder(config.output)), stopping_at_once(), at_work(folder) as now:
            now("pre-training as an image classifier")
            path = pretrain(config, device)
        say(f"for a detector of this network: pretrain.epochs=0 model.backbone.weights={path.absolute()}")
