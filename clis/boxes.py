"""Boxes as tensors (xyxy, absolute pixels): encode, decode, match, sample, and exact top-k NMS."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import nms

NEGATIVE = -1
IGNORED = -2
_MAX_LOG_RATIO = math.log(1000 / 16)  # a box grows at most this much (mmdetection, torchvision)

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # not in torch 2.4

RPN_STDS = (1.0, 1.0, 1.0, 1.0)
ROI_STDS = (0.1, 0.1, 0.2, 0.2)


def encode(boxes: Tensor, targets: Tensor, stds: tuple[float, ...]) -> Tensor:
    """Deltas that move `boxes` [N,4] onto `targets` [N,4]: centre shift by size, log size ratio, over `stds`.

    Both need sides above zero. Returns [N,4]. Source: Faster R-CNN's parametrisation, mmdetection's stds.
    """
    size, target_size = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = (targets[:, :2] + targets[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / (2 * size)
    return torch.cat([shift, (target_size / size).log()], dim=1) / boxes.new_tensor(stds)


def decode(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...], shrink_limit: float = 0.016) -> Tensor:
    """The inverse of `encode`: boxes [...,4] moved by deltas [...,4], shrunk to `shrink_limit` at most."""
    deltas = deltas * boxes.new_tensor(stds)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + size / 2 + deltas[..., :2] * size
    least = math.log(shrink_limit) if shrink_limit > 0 else -math.inf
    half = size * deltas[..., 2:].clamp(least, _MAX_LOG_RATIO).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [...,4] inside an image of `size` (height, width)."""
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    return boxes.clamp(min=0).minimum(limit)


def match(iou: Tensor, positive_iou: float, negative_iou: float, low_quality: bool) -> Tensor:
    """Ground truth of each box, from `iou` [G,N]: an index 0..G-1, `NEGATIVE` or `IGNORED`; int64 [N].

    A box takes the ground truth of its highest IoU if that is at least `positive_iou`, and is negative
    below `negative_iou`. With `low_quality`, the boxes that reach a ground truth's highest IoU belong to it
    as well, if that is at least `negative_iou`. Source: mmdetection 3.3, MaxIoUAssigner.
    """
    num_truths, num_boxes = iou.shape
    if num_truths == 0:
        return torch.full((num_boxes,), NEGATIVE, device=iou.device)
    best, index = iou.max(dim=0)
    matches = torch.where(best >= positive_iou, index, IGNORED)
    matches = torch.where(best < negative_iou, NEGATIVE, matches)
    if low_quality and num_boxes > 0:
        highest = iou.max(dim=1, keepdim=True).values
        reached = (iou == highest) & (highest >= negative_iou)
        order = torch.arange(1, num_truths + 1, device=iou.device)[:, None]
        claimed = (reached * order).amax(dim=0) - 1  # the last ground truth wins, as there
        matches = torch.where(claimed >= 0, claimed, matches)
    return matches


def sample(
    matches: Tensor, samples: int, positive_fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices of randomly chosen positives (up to their fraction), and of negatives up to `samples` in all.

    `matches` is int64 [N] as from `match`; `generator` is on the CPU, so that the draw is a function of the
    item's seed whatever the device.
    """
    positive = torch.nonzero(matches >= 0).squeeze(1)
    negative = torch.nonzero(matches == NEGATIVE).squeeze(1)
    num_positive = min(len(positive), int(samples * positive_fraction))
    num_negative = min(len(negative), samples - num_positive)
    return _choose(positive, num_positive, generator), _choose(negative, num_negative, generator)


def _choose(indices: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if count == len(indices):
        return indices
    order = torch.randperm(len(indices), generator=generator)[:count]
    return indices[order.to(indices.device)]


def nms_top_k(
    scores: Tensor,
    candidates: Callable[[Tensor], tuple[Tensor, Tensor]],
    iou_threshold: float,
    k: int,
    score_threshold: float = -math.inf,
    min_size: float = 0.0,
    export_candidates: int | None = None,
) -> Tensor:
    """The first `k` survivors of NMS over all candidates, exactly, without looking at most of them.

    Whether a candidate survives depends only on those before it, so the survivors among the top K are
    survivors among all. We take K, suppress, and double K until `k` survive or no candidate is left.

    Args:
        scores: float [N]. The order is total: score descending, then index ascending.
        candidates: maps int64 indices [n] to their boxes [n,4] and groups int64 [n]; only boxes of one group
            suppress each other.
        score_threshold: candidates at or below it do not take part.
        min_size: nor do boxes with a side below it.
        export_candidates: in a program of torch.export, where no loop may end by what the image holds, how
            many of the best take part; None is all.

    Returns:
        int64 indices into `scores`, at most `k`, in order.
    """
    if _is_exporting():
        size = scores.shape[0]  # of `len` the exporter would want the number
        if export_candidates is not None:
            size = torch.sym_min(size, export_candidates)
        return _nms_of_best(scores, candidates, iou_threshold, k, score_threshold, min_size, size)
    num_candidates = int((scores > score_threshold).sum())
    size = min(num_candidates, max(4 * k, 1024))
    while True:
        order = _top(scores, size)
        boxes, groups = candidates(order)
        large = ~(boxes[:, 2:] - boxes[:, :2] < min_size).any(dim=1)  # true for NaN, which is not to hide
        order, boxes, groups = order[large], boxes[large], groups[large]
        kept = order[_grouped_nms(boxes, groups, iou_threshold)]
        if len(kept) >= k or size == num_candidates:
            return kept[:k]
        size = min(num_candidates, 2 * size)


def _nms_of_best(
    scores: Tensor,
    candidates: Callable[[Tensor], tuple[Tensor, Tensor]],
    iou_threshold: float,
    k: int,
    score_threshold: float,
    min_size: float,
    size: int,
) -> Tensor:
    """`nms_top_k` over the `size` best in one turn, with no shape but that of the result left to the data.

    Candidates that do not count stay, each in a group of its own where it suppresses nothing, and go behind
    NMS. So do two boxes that are added, for the exporter takes it that two survive at least.
    """
    order = scores.sort(descending=True, stable=True).indices[:size]
    boxes, groups = candidates(order)
    small = (boxes[:, 2:] - boxes[:, :2] < min_size).any(dim=1)
    counts = (scores[order] > score_threshold) & ~small
    alone = groups.max() + 1 + torch.arange(size, device=boxes.device)
    boxes = torch.cat([boxes, boxes.new_tensor([[0, 0, 1, 1], [0, 0, 1, 1]])])
    groups = torch.cat([torch.where(counts, groups, alone), alone[-1] + groups.new_tensor([1, 2])])
    counts = torch.cat([counts, counts.new_zeros(2)])
    order = torch.cat([order, order.new_zeros(2)])
    kept = _grouped_nms(boxes, groups, iou_threshold)
    return order[kept[counts[kept]]][:k]


def _top(scores: Tensor, size: int) -> Tensor:
    """Indices of the `size` highest scores, ties by index, also at the cut."""
    if size == 0:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    lowest = scores.topk(size, sorted=False).values.min()
    inside = torch.nonzero(scores >= lowest).squeeze(1)
    return inside[scores[inside].sort(descending=True, stable=True).indices[:size]]


def _grouped_nms(boxes: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """NMS within groups of boxes that are in order already; positions that survive, ascending."""
    if boxes.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    # float64: 1203 groups set apart by 2000 px do not fit float32
    boxes = boxes.double()
    apart = boxes + (groups * (boxes.max() - boxes.min() + 1))[:, None]
    rank = torch.arange(boxes.shape[0], 0, -1, dtype=torch.float64, device=boxes.device)
    return nms(apart, rank, iou_threshold)
