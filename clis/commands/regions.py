"""``python -m clis regions``: the region file of a config, or with ``--scan`` the size to search at."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from clis.commands.arguments import add_config, positive
from clis.commands.region_scan import scan_sizes
from clis.config_files import load_config
from clis.distributed import choose_device, process_group
from clis.engine.preemption import stopping_at_once
from clis.engine.prerequisites import detector_config
from clis.engine.region_search import find_regions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis regions`."""
    add_config(parser)
    parser.add_argument(
        "--scan", nargs="?", const="", metavar="SIZE,SIZE,...",
        help="make no file, but show what the detector finds at these shorter sides (default: from a quarter "
        "to five quarters of test.short_side)",
    )  # fmt: skip
    parser.add_argument("--images", type=positive, metavar="N", help="scan N images (default: 500)")
    parser.add_argument("--boxes", type=Path, metavar="FILE", help="report a scan's mean IoU with true boxes")


def run(arguments: argparse.Namespace) -> None:
    """Make the region file of a config, or with `--scan` print what the search finds at each size.

    Raises:
        ValueError: options of a scan without one, a scan on several processes, or a wrong size.
    """
    config = load_config(arguments.config, arguments.overrides)
    detector = detector_config(config, arguments.overrides)
    device = choose_device(config.train.device)
    if arguments.scan is None:
        for name in ("images", "boxes"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} is for a scan: add --scan")
        with process_group(device), stopping_at_once():
            find_regions(config, device, detector)
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--scan runs on one process: start it without torchrun")
    sizes = [size.strip() for size in arguments.scan.split(",") if size.strip()]
    if wrong := [size for size in sizes if not size.isdecimal() or int(size) == 0]:
        raise ValueError(f"--scan {arguments.scan}: {wrong[0]!r} is not a size; write e.g. 200,400,600")
    images = arguments.images or 500
    scan_sizes(config, device, detector, sizes=list(map(int, sizes)), images=images, boxes=arguments.boxes)
