"""Region proposal network: anchors, proposals and their losses (mmdetection 3.3's settings)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from clis import boxes as box_ops
from clis.config import RPNConfig
from clis.losses import at_least_float32, l1_loss, objectness_loss
from clis.models.backbone import STRIDES


def make_anchors(
    config: RPNConfig,
    stride: int,
    height: int,
    width: int,
    device: torch.device,
    spacing: tuple[int, int] | None = None,
) -> Tensor:
    """Anchors of one level, [height * width * A, 4], row by row, centred on the cells' top left corners.

    Every ratio (height / width) has the same area, (anchor_scale * stride)^2 pixels. `spacing` is the pixels
    from row to row and from column to column; None is `stride`.
    """
    side = config.anchor_scale * stride
    ratios = torch.tensor(config.anchor_ratios, device=device)
    half = torch.stack([side / ratios.sqrt(), side * ratios.sqrt()], dim=1) / 2
    if config.round_anchors:
        half = half.round()
    down, right = spacing or (stride, stride)
    y, x = torch.meshgrid(
        torch.arange(height, device=device) * down,
        torch.arange(width, device=device) * right,
        indexing="ij",
    )
    centre = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
    return torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4)


class RPN(nn.Module):
    """One 3x3 convolution, then objectness and box deltas of the A anchors of every cell."""

    def __init__(self, channels: int, config: RPNConfig) -> None:
        super().__init__()
        self.config = config
        num_anchors = len(config.anchor_ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of every level: objectness logits [B,n], deltas [B,n,4], anchors [n,4]."""
        objectness, deltas, anchors = [], [], []
        padded_height, padded_width = (STRIDES[0] * side for side in features[0].shape[2:])
        for feature, stride in zip(features, STRIDES):
            hidden = self.conv(feature).relu_()
            objectness.append(at_least_float32(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)))
            deltas.append(
                at_least_float32(self.deltas(hidden).permute(0, 2, 3, 1).reshape(len(feature), -1, 4))
            )
            height, width = feature.shape[2:]
            spacing = None
            if self.config.anchor_spacing == "grid":
                spacing = (padded_height // height, padded_width // width)
            anchors.append(make_anchors(self.config, stride, height, width, feature.device, spacing))
        return objectness, deltas, anchors

    @torch.no_grad()
    def propose(
        self,
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Proposals of each image, at most `proposals` boxes [n,4], best first, inside the image.

        The best of each level are decoded and clipped; boxes without area, or of a side up to `min_size`, go;
        NMS is within levels.
        """
        pre_nms = self.config.pre_nms_train if self.training else self.config.pre_nms_test
        proposals = []
        for image, size in enumerate(sizes):
            boxes, scores, levels = [], [], []
            for level, (logits, level_deltas, level_anchors) in enumerate(zip(objectness, deltas, anchors)):
                score, index = logits[image].topk(min(pre_nms, logits.shape[1]))
                moved = box_ops.decode(
                    level_anchors[index],
                    level_deltas[image, index],
                    box_ops.RPN_STDS,
                    self.config.shrink_limit,
                )
                moved = box_ops.clip(moved, size)
                large = (moved[:, 2:] - moved[:, :2] > self.config.min_size).all(dim=1)
                boxes.append(moved)
                scores.append(score.masked_fill(~large, -math.inf))  # takes no part, without a new shape
                levels.append(torch.full_like(index, level))
            box, group = torch.cat(boxes), torch.cat(levels)
            kept = box_ops.nms_top_k(
                torch.cat(scores),
                lambda index, box=box, group=group: (box[index], group[index]),
                self.config.nms_iou,
                self.config.proposals,
            )
            proposals.append(box[kept])
        return proposals

    def losses(
        self,
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        boxes: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        generators: Sequence[torch.Generator],
        normalizer: float,
    ) -> dict[str, Tensor]:
        """L_rpn: objectness of sampled anchors and L1 of the positives, for `boxes` [G,4] of each image.

        Anchors that are centred outside their image, in the padding, are neither positive nor negative.
        """
        logits, all_deltas, all_anchors = torch.cat(objectness, 1), torch.cat(deltas, 1), torch.cat(anchors)
        centres = (all_anchors[:, :2] + all_anchors[:, 2:]) / 2
        losses = {"rpn_objectness": logits.sum() * 0, "rpn_box": all_deltas.sum() * 0}
        for image, (truth, (height, width), generator) in enumerate(zip(boxes, sizes, generators)):
            outside = (centres >= centres.new_tensor([width, height])).any(dim=1)
            iou = box_iou(truth, all_anchors).masked_fill(outside, -1)  # no box's best anchor is outside
            matches = box_ops.match(iou, self.config.positive_iou, self.config.negative_iou, low_quality=True)
            matches = matches.masked_fill(outside, box_ops.IGNORED)
            positive, negative = box_ops.sample(
                matches, self.config.samples, self.config.positive_fraction, generator
            )
            sampled = torch.cat([positive, negative])
            is_object = torch.arange(len(sampled), device=sampled.device) < len(positive)
            targets = box_ops.encode(all_anchors[positive], truth[matches[positive]], box_ops.RPN_STDS)
            losses["rpn_objectness"] += objectness_loss(logits[image, sampled], is_object, normalizer)
            losses["rpn_box"] += l1_loss(all_deltas[image, positive], targets, normalizer)
        return losses
