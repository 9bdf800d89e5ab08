"""Regions of interest: sampling with targets, RoIAlign over the pyramid, detections from scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, roi_align

from clis import boxes as box_ops
from clis.config import RoIConfig, TestConfig
from clis.losses import at_least_float32
from clis.models.backbone import STRIDES
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
    targets: Tensor
    """[P,4] deltas of the positives alone, in the order of `torch.nonzero(labels < C)`."""


@torch.no_grad()
def sample_rois(
    proposals: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    config: RoIConfig,
    num_classes: int,
    generators: Sequence[torch.Generator],
) -> SampledRoIs:
    """Samples RoIs of each image from its proposals [n,4] and ground truth [G,4], which is added to them."""
    rois, images, roi_labels, targets = [], [], [], []
    for image, (proposal, truth, label, generator) in enumerate(zip(proposals, boxes, labels, generators)):
        candidates = torch.cat([truth, proposal])
        iou = box_iou(truth, candidates)
        matches = box_ops.match(iou, config.positive_iou, config.positive_iou, low_quality=False)
        positive, negative = box_ops.sample(matches, config.samples, config.positive_fraction, generator)
        matched = matches[positive]
        rois.append(candidates[torch.cat([positive, negative])])
        images.append(torch.full((len(rois[-1]),), image, device=truth.device))
        roi_labels.append(torch.cat([label[matched], torch.full_like(negative, num_classes)]))
        targets.append(box_ops.encode(candidates[positive], truth[matched], box_ops.ROI_STDS))
    return SampledRoIs(torch.cat(rois), torch.cat(images), torch.cat(roi_labels), torch.cat(targets))


class RoIPooler(nn.Module):
    """RoIAlign from the level that fits each box: P2-P5, floor(log2(sqrt(area) / finest_scale + 1e-6))."""

    def __init__(self, config: RoIConfig) -> None:
        super().__init__()
        self.config = config

    def levels(self, boxes: Tensor) -> Tensor:
        """Level 0..3 (P2..P5) of each box, int64 [N]."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
        return torch.log2(side / self.config.finest_scale + 1e-6).floor().clamp(0, 3).long()

    def forward(
        self,
        features: Sequence[Tensor],
        boxes: Tensor,
        images: Tensor,
        last_layers: Sequence[nn.Sequential] | None = None,
    ) -> Tensor:
        """Pooled features [N, channels, pool_size, pool_size] of boxes [N,4] on rows `images` int64 [N].

        They are float32 at least: RoIAlign takes boxes in the type of the features, and bfloat16 holds 701 px
        as 700.

        Args:
            features: P2-P5.
            last_layers: a level's 3x3 convolution that `features` still lack; it is computed where it is
                pooled from, which for a few boxes is a small part of the maps.
        """
        levels = self.levels(boxes)
        rois = torch.cat([images[:, None].to(boxes), boxes], dim=1)
        size, ratio, aligned = self.config.pool_size, self.config.sampling_ratio, self.config.aligned
        rows, pooled = [], []
        for level, (feature, stride) in enumerate(zip(features[:4], STRIDES)):
            rows.append(torch.nonzero(levels == level).squeeze(1))
            here = rois[rows[-1]]
            if last_layers is not None:
                feature, here = _last_layer_around(here, feature, last_layers[level], stride)
            feature = at_least_float32(feature)
            pooled.append(roi_align(feature, here.to(feature.dtype), size, 1 / stride, ratio, aligned))
        return torch.cat(pooled)[torch.cat(rows).argsort()]


def _last_layer_around(
    rois: Tensor, feature: Tensor, layer: nn.Sequential, stride: int
) -> tuple[Tensor, Tensor]:
    """layer(feature) where RoIAlign reads it for rois [n,5], and the rois in the coordinates of that.

    One window a RoI, all of one size, moved inside the map so that a window ends where the map does: RoIAlign
    treats its border as the map's. The whole map instead where that is less work, or where the layer has a
    norm, whose statistics are the map's. Without RoIs the layer is not computed: no gradient from here.
    """
    if len(rois) == 0:
        return feature, rois
    # RoIAlign reads from half a cell before the box (`aligned`) to the right neighbour of its last point,
    # of a box that is one cell wide at least (not `aligned`)
    low = (rois[:, 1:3] / stride).floor().long() - 1
    high = (rois[:, 3:] / stride).ceil().long() + 2
    width, height = (high - low).amax(dim=0).tolist()
    width, height = min(width, feature.shape[3]), min(height, feature.shape[2])
    if len(layer) > 1 or len(rois) * height * width >= feature[:, 0].numel():
        return layer(feature), rois
    x = low[:, 0].clamp(0, feature.shape[3] - width)
    y = low[:, 1].clamp(0, feature.shape[2] - height)
    columns, rows = (
        first[:, None] + torch.arange(-1, side + 1, device=rois.device)  # and the convolution's neighbours
        for first, side in ((x, width), (y, height))
    )
    inputs = windows(feature, rois[:, 0].long(), rows, columns)
    index = torch.arange(len(rois), dtype=rois.dtype, device=rois.device)
    moved = rois[:, 1:] - stride * torch.stack([x, y, x, y], dim=1)
    return F.conv2d(inputs, layer[0].weight, layer[0].bias), torch.cat([index[:, None], moved], dim=1)


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
    rois: Tensor, scores: Tensor, deltas: Tensor, size: tuple[int, int], config: TestConfig
) -> ImageDetections:
    """The `detections` best boxes above the score threshold, not too small, after NMS within classes.

    Args:
        rois: [n,4].
        scores: [n,C].
        deltas: [n,C,4], or [n,1,4] where the boxes are class-agnostic.
        size: height and width of the image.
    """
    num_classes, num_boxes = scores.shape[1], deltas.shape[1]

    def candidates(index: Tensor) -> tuple[Tensor, Tensor]:
        roi, label = index // num_classes, index % num_classes
        own = deltas[roi, label.clamp(max=num_boxes - 1)]
        moved = box_ops.decode(rois[roi], own, box_ops.ROI_STDS, config.shrink_limit)
        return box_ops.clip(moved, size), label

    flat = scores.flatten()
    kept = box_ops.nms_top_k(
        flat,
        candidates,
        config.nms_iou,
        config.detections,
        config.score_threshold,
        config.min_size,
        config.export_candidates,
    )
    boxes, labels = candidates(kept)
    return ImageDetections(boxes, flat[kept], labels)
