"""``python -m clis export``: a trained detector as one program of torch.export, to run without our code."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clis.atomic import atomic_write
from clis.config_files import config_from_dict, config_to_dict, merge_overrides
from clis.distributed import choose_device
from clis.engine.checkpoint import load_checkpoint, load_model
from clis.models import CLISDetector
from clis.progress import say

CATEGORIES = "categories.json"
"""File in the program's archive: the category of each label."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="the program to write, a .pt2 file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the section test")
    parser.add_argument(
        "--size", type=int, nargs=2, required=True, metavar=("HEIGHT", "WIDTH"), help="of the images"
    )
    parser.add_argument("--device", default="cpu", help="where the program will run")


def run(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    export(arguments.checkpoint, arguments.out, tuple(arguments.size), device, arguments.overrides)


class OneImage(nn.Module):
    """`CLISDetector.detect` of one image, without the parts that only training has."""

    def __init__(self, detector: CLISDetector) -> None:
        super().__init__()
        self.detector = detector
        detector.image_classification = detector.contrastive = None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [n,4], scores [n] and labels [n] of a uint8 RGB image [3,H,W], best first."""
        found = self.detector.detect([image])[0]
        return found.boxes, found.scores, found.labels


def export(
    checkpoint: Path, out: Path, size: tuple[int, int], device: torch.device, overrides: Sequence[str] = ()
) -> None:
    """Writes the detector in `checkpoint` as the program `out`, for images of one size.

    The program finds what `CLISDetector.detect` finds, as long as `test.export_candidates` boxes are enough
    for NMS to choose from: a loop whose end depends on the image cannot be exported. It is tried on an image
    of noise before it is written. With it are the categories, as `CATEGORIES`.

    Args:
        out: a .pt2 file.
        size: height and width of the images, before they are resized as the `test` section says.
        device: where the program will run.
        overrides: `key.path=value` of the `test` section.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or an argument is wrong.
    """
    if out.suffix != ".pt2":
        raise ValueError(f"{out}: the name of an exported program ends in .pt2")
    if min(size) < 1:
        raise ValueError(f"--size {size[0]} {size[1]}: height and width are above 0")
    if wrong := [each for each in overrides if not each.startswith("test.")]:
        raise ValueError(f"{wrong[0]}: only the section test can change, e.g. test.detections=100")
    state = load_checkpoint(checkpoint)
    values = config_to_dict(config_from_dict(state["config"], source=str(checkpoint)))
    config = config_from_dict(merge_overrides(values, overrides), source="override")
    detector = load_model(state, config, str(checkpoint)).to(device).eval()
    detector.to(memory_format=torch.contiguous_format)  # in which torch.export.save stores all weights
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator).to(device)
    expected = detector.detect([noise])[0]
    program = torch.export.export(OneImage(detector), (noise,), strict=False)
    boxes, scores, labels = program.module()(noise)
    same = len(boxes) == len(expected.boxes) and torch.allclose(boxes, expected.boxes, atol=0.01)
    if not same or not torch.equal(labels, expected.labels) or not torch.allclose(scores, expected.scores):
        raise ValueError(
            f"{out}: on noise the program finds {len(boxes)} boxes, the detector {len(expected.boxes)} or "
            f"others; raise test.export_candidates={config.test.export_candidates}"
        )
    categories = json.dumps([dataclasses.asdict(category) for category in detector.categories])
    with atomic_write(out) as temporary:
        torch.export.save(program, temporary, extra_files={CATEGORIES: categories})
    say(f"{out}: for uint8 RGB images [3, {size[0]}, {size[1]}] on {device.type}")
