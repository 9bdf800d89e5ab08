"""A detector as a module that torch.export can follow: no loop, branch or shape that depends on pixels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clis.boxes import grouped_nms
from clis.models import CLISDetector
from clis.resize import padded_size


class Program(nn.Module):
    """`CLISDetector.detect` without the parts that only training has, and with one-turn NMS.

    Images of any size are resized inside, and padded to the square canvas that holds every resized image, so
    that all that follows has one size. The given detector is changed.
    """

    def __init__(
        self, detector: CLISDetector, nms: Callable[..., Tensor], num_candidates: int, batch: int | None
    ) -> None:
        """Prepare a detector for export.

        Args:
            nms: `nms_of_best`, or another one like it.
            num_candidates: how many boxes of an image NMS chooses from.
            batch: images at a time; None is one image without the dimension.
        """
        super().__init__()
        self.detector, self.num_images = detector, batch
        detector.nms = functools.partial(nms, num_candidates=num_candidates)
        detector.rpn.nms = nms
        detector.image_classification = detector.contrastive = None

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | list[tuple[Tensor, Tensor, Tensor]]:
        """Return boxes [n,4], scores [n] and labels [n] of uint8 RGB images, best first.

        Args:
            images: [3,H,W], or [batch,3,H,W] for a list of such triples.
        """
        single = self.num_images is None
        found = self.detector.detect([images] if single else images.unbind())
        triples = [(each.boxes, each.scores, each.labels) for each in found]
        return triples[0] if single else triples


def letterbox(detector: CLISDetector, in_float: bool) -> None:
    """Let the detector take images of any size in a program: sizes that are symbols, and one square canvas.

    The canvas is that of ``model.backbone.canvas: square``, which this sets. On it a detector with the canvas
    ``batch`` sees what it sees of an image that shares its batch with larger ones.

    Args:
        in_float: resize in float32 and round, as for devices that have no kernel for uint8.
    """
    backbone, test = detector.backbone, detector.test_config
    side, _ = padded_size((test.max_size, test.max_size))
    backbone.square = True

    def batch(images: Sequence[Tensor], max_size: int | None = None) -> Tensor:
        normalized = [backbone.normalize(image) for image in images]
        return torch.stack([F.pad(x, (0, side - x.shape[2], 0, side - x.shape[1])) for x in normalized])

    def resized_size(size: tuple[int, int], short_side: int, max_size: int) -> tuple[Any, Any]:
        scale = torch.sym_min(short_side / torch.sym_min(*size), max_size / torch.sym_max(*size))
        half = 0.0 if test.resize == "torchvision" else 0.5
        height, width = (torch.sym_max(torch.sym_int(length * scale + half), 1) for length in size)
        return height, width

    def resize(image: Tensor, size: tuple[int, int], extent: None = None) -> Tensor:
        if test.resize == "torchvision":
            return F.interpolate(image.to(backbone.normalize.mean)[None], size=size, mode="bilinear")[0]
        antialias = test.resize == "pillow"
        if not in_float:
            return F.interpolate(image[None], size=size, mode="bilinear", antialias=antialias)[0]
        resized = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=antialias)[0]
        return resized.round().clamp(0, 255)

    vars(backbone)["batch"] = batch  # in place of the methods, for this object alone
    vars(detector).update(resized_size=resized_size, resize=resize)


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
