"""``python -m clis export``: a trained detector as one program of torch.export, to run without our code."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clis.atomic import atomic_write
from clis.boxes import grouped_nms
from clis.config_files import config_from_dict, config_to_dict, merge_overrides, resolve_data_root
from clis.distributed import choose_device
from clis.engine.checkpoint import load_checkpoint, load_model
from clis.engine.evaluate import measure_calibration
from clis.models import CLISDetector
from clis.progress import say

CATEGORIES = "categories.json"
"""File in the program's archive: the category of each label."""

CANDIDATES = 5000
"""Boxes of an image that NMS chooses from, the default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis export`."""
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="the program to write, a .pt2 file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the section test")
    parser.add_argument(
        "--size", type=int, nargs=2, required=True, metavar=("HEIGHT", "WIDTH"), help="of the images"
    )
    parser.add_argument(
        "--candidates",
        type=int,
        default=CANDIDATES,
        metavar="N",
        help=f"set how many boxes of an image NMS chooses from (default {CANDIDATES})",
    )
    parser.add_argument("--device", default="cpu", help="where the program will run")


def run(arguments: argparse.Namespace) -> None:
    """Export the detector of a checkpoint for images of one size on a device."""
    device = choose_device(arguments.device)
    export(
        arguments.checkpoint,
        arguments.out,
        tuple(arguments.size),
        device,
        arguments.overrides,
        candidates=arguments.candidates,
    )


def nms_of_best(
    scores: Tensor,
    candidates: Callable[[Tensor], tuple[Tensor, Tensor]],
    iou_threshold: float,
    k: int,
    score_threshold: float = -math.inf,
    min_size: float = 0.0,
    num_candidates: int | None = None,
) -> Tensor:
    """Stand in for `clis.boxes.nms_top_k` in a program, where the image cannot decide when a loop ends.

    NMS runs once, over the `num_candidates` best (None is all), with no shape but that of the result left to
    the data. Candidates that do not count stay, each in a group of its own where it suppresses nothing, and
    are removed after NMS. So are two boxes that are added, since the exporter assumes that at least two
    survive.
    """
    size: int | torch.SymInt = scores.shape[0]  # of `len` the exporter would want the number
    if num_candidates is not None:
        size = torch.sym_min(size, num_candidates)
    order = scores.sort(descending=True, stable=True).indices[:size]
    boxes, groups = candidates(order)
    small = (boxes[:, 2:] - boxes[:, :2] < min_size).any(dim=1)
    counts = ~(scores[order] <= score_threshold) & ~small
    alone = groups.max() + 1 + torch.arange(size, device=boxes.device)
    boxes = torch.cat([boxes, boxes.new_tensor([[0, 0, 1, 1], [0, 0, 1, 1]])])
    groups = torch.cat([torch.where(counts, groups, alone), alone[-1] + groups.new_tensor([1, 2])])
    counts = torch.cat([counts, counts.new_zeros(2)])
    order = torch.cat([order, order.new_zeros(2)])
    kept = grouped_nms(boxes, groups, iou_threshold)
    return order[kept[counts[kept]]][:k]


class OneImage(nn.Module):
    """`CLISDetector.detect` of one image, without the parts that only training has and with one-turn NMS.

    The given detector is changed.
    """

    def __init__(self, detector: CLISDetector, num_candidates: int) -> None:
        super().__init__()
        self.detector = detector
        detector.nms = functools.partial(nms_of_best, num_candidates=num_candidates)
        detector.rpn.nms = nms_of_best
        detector.image_classification = detector.contrastive = None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes [n,4], scores [n] and labels [n] of a uint8 RGB image [3,H,W], best first."""
        found = self.detector.detect([image])[0]
        return found.boxes, found.scores, found.labels


def export(
    checkpoint: Path,
    out: Path,
    size: tuple[int, int],
    device: torch.device,
    overrides: Sequence[str] = (),
    candidates: int = CANDIDATES,
) -> None:
    """Write the detector in `checkpoint` as the program `out`, for images of one size.

    The program finds what `CLISDetector.detect` finds, as long as `candidates` boxes are enough for NMS to
    choose from: a loop whose end depends on the image cannot be exported. It is tried on an image of noise
    before it is written. With it are the categories, as `CATEGORIES`.

    Args:
        out: a .pt2 file.
        size: height and width of the images, before they are resized as the `test` section says.
        device: where the program will run.
        overrides: `key.path=value` of the `test` section.
        candidates: how many boxes of an image NMS chooses from, the best ones.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or an argument is wrong.
    """
    if out.suffix != ".pt2":
        raise ValueError(f"{out}: the name of an exported program ends in .pt2")
    if min(size) < 1:
        raise ValueError(f"--size {size[0]} {size[1]}: height and width are above 0")
    if candidates < 1:
        raise ValueError(f"--candidates {candidates}: must be at least 1")
    if wrong := [each for each in overrides if not each.startswith("test.")]:
        raise ValueError(f"{wrong[0]}: only the section test can change, e.g. test.detections=100")
    state = load_checkpoint(checkpoint)
    values = config_to_dict(config_from_dict(state["config"], source=str(checkpoint)))
    config = config_from_dict(merge_overrides(values, overrides), source="override")
    detector = load_model(state, config, str(checkpoint)).to(device).eval()
    measure_calibration(detector, resolve_data_root(config))
    detector.to(memory_format=torch.contiguous_format)  # in which torch.export.save stores all weights
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator).to(device)
    expected = detector.detect([noise])[0]
    program = torch.export.export(OneImage(detector, candidates), (noise,), strict=False)
    boxes, scores, labels = program.module()(noise)
    same = len(boxes) == len(expected.boxes) and torch.allclose(boxes, expected.boxes, atol=0.01)
    if not same or not torch.equal(labels, expected.labels) or not torch.allclose(scores, expected.scores):
        raise ValueError(
            f"{out}: on noise the program finds {len(boxes)} boxes, the detector {len(expected.boxes)} or "
            f"others; raise --candidates {candidates}"
        )
    categories = json.dumps([dataclasses.asdict(category) for category in detector.categories])
    with atomic_write(out) as temporary:
        torch.export.save(program, temporary, extra_files={CATEGORIES: categories})
    say(f"{out}: for uint8 RGB images [3, {size[0]}, {size[1]}] on {device.type}")
