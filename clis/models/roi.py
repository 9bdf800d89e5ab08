"""Regions of interest: sampling with targets, RoIAlign over the pyramid, detections from scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from clis import boxes as box_ops
from clis.config import RoIConfig, TestConfig
from clis.losses import at_least_float32
from clis.models.backbone import STRIDES
from clis.models.roi_align import roi_align
from clis.models.windows import windows


@dataclass(frozen=True)
class SampledRoIs:
    """N RoIs of a batch with their targets; of each image the positives come first."""

    boxes: Tensor
    """[N,4]."""
    images: Tensor
    """int64 [N], row of the batch."""
    labels: Tensor
    """int64 [N], background is C."""
    positives: Tensor
    """int64 [P], the rows whose label is not background."""
    targets: Tensor
    """[P,4] deltas of the positives."""


@torch.no_grad()
def sample_rois(
    proposals: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    config: RoIConfig,
    num_classes: int,
    seeds: Sequence[int],
) -> SampledRoIs:
    """Sample RoIs of each image from its proposals [n,4] and ground truth [G,4], which is added to them.

    Args:
        seeds: of each image, for the choice of RoIs.
    """
    candidates = [torch.cat(pair) for pair in zip(boxes, proposals)]
    matches = [
        box_ops.match(box_iou(truth, each), config.positive_iou, config.positive_iou, low_quality=False)
        for truth, each in zip(boxes, candidates)
    ]
    chosen = box_ops.sample(matches, config.samples, config.positive_fraction, seeds)
    rois, images, roi_labels, targets, positives, count = [], [], [], [], [], 0
    for image, (candidate, truth, label, match_of, (positive, negative)) in enumerate(
        zip(candidates, boxes, labels, matches, chosen)
    ):
        matched = match_of[positive]
        rois.append(candidate[torch.cat([positive, negative])])
        images.append(torch.full((len(rois[-1]),), image, device=truth.device))
        roi_labels.append(torch.cat([label[matched], torch.full_like(negative, num_classes)]))
        targets.append(box_ops.encode(candidate[positive], truth[matched], box_ops.ROI_STDS))
        positives.append(torch.arange(count, count + len(positive), device=truth.device))
        count += len(rois[-1])
    return SampledRoIs(*map(torch.cat, (rois, images, roi_labels, positives, targets)))


class RoIPooler(nn.Module):
    """RoIAlign from the level that fits each box: P2-P5, floor(log2(sqrt(area) / finest_scale + 1e-6))."""

    def __init__(self, config: RoIConfig) -> None:
        super().__init__()
        self.config = config

    def levels(self, boxes: Tensor) -> Tensor:
        """Return the level 0..3 (P2..P5) of each box, int64 [N]."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
        return torch.log2(side / self.config.finest_scale + 1e-6).floor().clamp(0, 3).long()

    def forward(
        self,
        features: Sequence[Tensor],
        boxes: Tensor,
        images: Tensor,
        output_convs: Sequence[nn.Sequential] | None = None,
    ) -> Tensor:
        """Pool features [N, channels, pool_size, pool_size] of boxes [N,4] on rows `images` int64 [N].

        They are float32 at least: RoIAlign takes boxes in the type of the features, and bfloat16 holds 701 px
        as 700.

        Args:
            features: P2-P5.
            output_convs: a level's 3x3 convolution that `features` still lack; it is computed where it is
                pooled from, which for a few boxes is a small part of the maps.
        """
        levels = self.levels(boxes)
        rois = torch.cat([images[:, None].to(boxes), boxes], dim=1)
        size, ratio, aligned = self.config.pool_size, self.config.sampling_ratio, self.config.aligned
        sides: list[tuple[int, int] | None]
        if output_convs is None:
            rows, sides = box_ops.rows_by_group(levels, 4), [None] * 4
        else:
            rows, sides = _rows_and_windows(boxes, levels)
        pooled = []
        for level, (feature, stride, row, side) in enumerate(zip(features[:4], STRIDES, rows, sides)):
            here = rois[row]
            if output_convs is not None and side is not None:
                feature, here = _output_conv_around(here, feature, output_convs[level], stride, side)
            feature = at_least_float32(feature)
            pooled.append(roi_align(feature, here.to(feature.dtype), size, 1 / stride, ratio, aligned))
        return torch.cat(pooled)[torch.cat(rows).argsort()]


def _cells(boxes: Tensor, stride: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return the first cell, and one past the last, int64 [n,2] (x, y), that RoIAlign reads for boxes [n,4].

    It reads from half a cell before the box (`aligned`) to the right neighbor of its last point, of a box
    that is one cell wide at least (not `aligned`).
    """
    return (boxes[:, :2] / stride).floor().long() - 1, (boxes[:, 2:] / stride).ceil().long() + 2


def _rows_and_windows(
    boxes: Tensor, levels: Tensor
) -> tuple[tuple[Tensor, ...], list[tuple[int, int] | None]]:
    """Return the rows of each level, and the size of a window that holds any of its boxes.

    The size is width and height in cells, or None where a level has no box. The host waits once for both.
    """
    low, high = _cells(boxes, STRIDES[0] * 2 ** levels[:, None])
    of_level = levels == torch.arange(4, device=levels.device)[:, None]
    largest = (
        (torch.where(of_level[..., None], high - low, 0).amax(dim=1)) if len(boxes) else low.new_zeros(4, 2)
    )
    counts, *sides = torch.cat([of_level.sum(dim=1)[:, None], largest], dim=1).T.tolist()
    rows = levels.argsort(stable=True).split(counts)
    return rows, [(width, height) if count else None for count, width, height in zip(counts, *sides)]


def _output_conv_around(
    rois: Tensor, feature: Tensor, layer: nn.Sequential, stride: int, side: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return layer(feature) where RoIAlign reads it for rois [n,5], and the rois in the coordinates of that.

    One window per RoI, all of one size, moved inside the map so that a window ends where the map does:
    RoIAlign treats its border as the map's. The whole map instead where that is less work, or where the layer
    has a norm, whose statistics are the map's.

    Args:
        side: width and height in cells that hold what RoIAlign reads for any of the rois.
    """
    width, height = min(side[0], feature.shape[3]), min(side[1], feature.shape[2])
    if len(layer) > 1 or len(rois) * height * width >= feature[:, 0].numel():
        return layer(feature), rois
    low, _ = _cells(rois[:, 1:], stride)
    x = low[:, 0].clamp(0, feature.shape[3] - width)
    y = low[:, 1].clamp(0, feature.shape[2] - height)
    columns, rows = (
        first[:, None] + torch.arange(-1, side + 1, device=rois.device)  # and the convolution's neighbors
        for first, side in ((x, width), (y, height))
    )
    inputs = windows(feature, rois[:, 0].long(), rows, columns)
    index = torch.arange(len(rois), dtype=rois.dtype, device=rois.device)
    moved = rois[:, 1:] - stride * torch.stack([x, y, x, y], dim=1)
    convolution = layer[0]
    assert isinstance(convolution, nn.Conv2d)
    return F.conv2d(inputs, convolution.weight, convolution.bias), torch.cat([index[:, None], moved], dim=1)


@dataclass(frozen=True)
class ImageDetections:
    """Detections of one image, best first."""

    boxes: Tensor
    """[n,4] xyxy in pixels of the image."""
    scores: Tensor
    """[n] in 0..1."""
    labels: Tensor
    """int64 [n]."""


def select_detections(
    rois: Tensor,
    scores: Tensor,
    deltas: Tensor,
    size: tuple[int, int],
    config: TestConfig,
    nms: Callable[..., Tensor] = box_ops.nms_top_k,
) -> ImageDetections:
    """Select the `detections` best boxes above the score threshold, not too small, after NMS within classes.

    Args:
        rois: [n,4].
        scores: [n,C].
        deltas: [n,C,4], or [n,1,4] where the boxes are class-agnostic.
        size: height and width of the image.
        nms: takes and returns what `nms_top_k` does.
    """
    num_classes, num_boxes = scores.shape[1], deltas.shape[1]

    def candidates(index: Tensor) -> tuple[Tensor, Tensor]:
        roi, label = index // num_classes, index % num_classes
        own = deltas[roi, label.clamp(max=num_boxes - 1)]
        moved = box_ops.decode(rois[roi], own, box_ops.ROI_STDS, config.shrink_limit)
        return box_ops.clip(moved, size), label

    flat = scores.flatten()
    kept = nms(
        flat,
        candidates,
        config.nms_iou,
        config.detections,
        config.score_threshold,
        config.min_size,
    )
    boxes, labels = candidates(kept)
    return ImageDetections(boxes, flat[kept], labels)
