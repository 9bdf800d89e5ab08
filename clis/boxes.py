"""Boxes as tensors (xyxy, absolute pixels): encode, decode, match, sample, and exact top-k NMS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

NEGATIVE = -1
IGNORED = -2
SORTED_WHOLE = 2**14
"""Most scores that `nms_top_k` sorts whole."""
_MAX_LOG_RATIO = math.log(1000 / 16)  # a box grows at most this much (mmdetection, torchvision)

Stds = tuple[float, float]
"""What deltas are divided by: those of the center, and those of the size."""
RPN_STDS: Stds = (1.0, 1.0)
ROI_STDS: Stds = (0.1, 0.2)


def encode(boxes: Tensor, targets: Tensor, stds: Stds) -> Tensor:
    """Compute deltas that move `boxes` [N,4] onto `targets` [N,4], divided by `stds`.

    They are the center shift relative to size and the log size ratio. Both arguments need sides above zero.
    Returns [N,4]. Source: Faster R-CNN's parametrization, mmdetection's stds.
    """
    size, target_size = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = (targets[:, :2] + targets[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / (2 * size)
    return torch.cat([shift / stds[0], (target_size / size).log() / stds[1]], dim=1)


def decode(boxes: Tensor, deltas: Tensor, stds: Stds, shrink_limit: float = 0.016) -> Tensor:
    """Invert `encode`: move boxes [...,4] by deltas [...,4], shrinking them to `shrink_limit` at most."""
    size = boxes[..., 2:] - boxes[..., :2]
    center = boxes[..., :2] + size / 2 + deltas[..., :2] * stds[0] * size
    least = math.log(shrink_limit) if shrink_limit > 0 else -math.inf
    half = size * (deltas[..., 2:] * stds[1]).clamp(least, _MAX_LOG_RATIO).exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip boxes [...,4] to an image of `size` (height, width)."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x, y], dim=-1).flatten(-2)


def match(iou: Tensor, positive_iou: float, negative_iou: float, low_quality: bool) -> Tensor:
    """Assign ground truth to each box by `iou` [G,N]: an index 0..G-1, `NEGATIVE` or `IGNORED`; int64 [N].

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
        order = torch.arange(1, num_truths + 1, device=iou.device, dtype=torch.int32)[:, None]
        claimed = (reached * order).amax(dim=0).long() - 1  # the last ground truth wins, as there
        matches = torch.where(claimed >= 0, claimed, matches)
    return matches


def sample(
    matches: Sequence[Tensor], samples: int, positive_fraction: float, seeds: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Choose positives of each image at random (up to their fraction), and negatives up to `samples` in all.

    The choice is a function of only seed and matches, on any device, and the host waits for the device once.

    Args:
        matches: int64 [N] of each image, as from `match`.
        seeds: one for each image, at least 0.

    Returns:
        int64 indices of the positives and of the negatives of each image, in random order.
    """
    most = int(samples * positive_fraction)
    drawn, counts = [], []
    for match_of, seed in zip(matches, seeds):
        order, total = random_order(len(match_of), seed, match_of.device), len(match_of)
        positive = order.masked_fill(match_of < 0, -1).topk(min(most, total))
        negative = order.masked_fill(match_of != NEGATIVE, -1).topk(min(samples, total))
        drawn.append((positive.indices, negative.indices))
        counts.append(torch.stack([(each.values >= 0).sum() for each in (positive, negative)]))
    chosen = []
    for (first, others), (positives, negatives) in zip(drawn, torch.stack(counts).tolist()):
        chosen.append((first[:positives], others[: min(negatives, samples - positives)]))
    return chosen


def random_order(count: int, seed: int, device: torch.device) -> Tensor:
    """Return different int64 numbers [count] in an order that looks random, by seed and place alone.

    A hash instead of a generator, which would draw on the host or differ from device to device. Source of its
    multiplier: T. Mueller's 32-bit integer hash, chosen there for how evenly input bits change output bits.
    """
    key = (seed + 1) * 0x9E3779B97F4A7C15 % 2**64  # spreads the bits of small seeds
    place = torch.arange(count, device=device)
    mixed = _mix(_mix(place ^ key % 2**32) ^ key // 2**32)
    return mixed << 31 | place


def uniform(count: int, seed: int, device: torch.device) -> Tensor:
    """Return numbers in [0,1), float64 [count], that look random, by seed and place alone.

    They are independent of `random_order`'s for the same seed.
    """
    return (random_order(count, ~seed, device) >> 31).double() / 2**32


def _mix(x: Tensor) -> Tensor:
    """Apply a bijection to int64 numbers in [0, 2**32)."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def rows_by_group(groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    """Split the rows of `groups`, int64 [N] in 0..num_groups-1, by group; the host waits once."""
    counts = (groups == torch.arange(num_groups, device=groups.device)[:, None]).sum(dim=1)
    return groups.argsort(stable=True).split(counts.tolist())


def nms_top_k(
    scores: Tensor,
    candidates: Callable[[Tensor], tuple[Tensor, Tensor]],
    iou_threshold: float,
    k: int,
    score_threshold: float = -math.inf,
    min_size: float = 0.0,
) -> Tensor:
    """Return the first `k` survivors of NMS over all candidates, exactly, without looking at most of them.

    Whether a candidate survives depends only on those before it, so the survivors among the top K are
    survivors among all. We take K, suppress, and double K until `k` survive or no candidate is left.

    Args:
        scores: float [N]. The order is total: score descending, then index ascending.
        candidates: maps int64 indices [n] to their boxes [n,4] and groups int64 [n]; only boxes of one group
            suppress each other.
        score_threshold: candidates at or below it are left out.
        min_size: boxes with a side below it are left out, too.

    Returns:
        int64 indices into `scores`, at most `k`, in order.
    """
    size = min(len(scores), max(4 * k, 1024))
    while True:
        order = _top(scores, size)
        boxes, groups = candidates(order)
        # written so that a NaN takes part and shows
        left_out = (scores[order] <= score_threshold) | (boxes[:, 2:] - boxes[:, :2] < min_size).any(dim=1)
        places = torch.nonzero(~left_out).squeeze(1)
        kept = order[places[grouped_nms(boxes[places], groups[places], iou_threshold)]]
        if len(kept) >= k or size == len(scores) or bool(scores[order[-1]] <= score_threshold):
            return kept[:k]
        size = min(len(scores), 2 * size)


def _top(scores: Tensor, size: int) -> Tensor:
    """Return the indices of the `size` highest scores, ties by index, also at the cut."""
    if len(scores) > SORTED_WHOLE and size > 0:  # sort no more than the best, though the host waits for them
        lowest = scores.topk(size, sorted=False).values.min()
        inside = torch.nonzero(~(scores < lowest)).squeeze(1)
        return inside[scores[inside].sort(descending=True, stable=True).indices[:size]]
    return scores.sort(descending=True, stable=True).indices[:size]


def grouped_nms(boxes: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Apply NMS within groups of boxes already in order; return the positions that survive, ascending."""
    if boxes.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    # float64: 1203 groups set apart by 2000 px do not fit float32
    boxes = boxes.double()
    apart = boxes + (groups * (boxes.max() - boxes.min() + 1))[:, None]
    rank = torch.arange(boxes.shape[0], 0, -1, dtype=torch.float64, device=boxes.device)
    return nms(apart, rank, iou_threshold)
