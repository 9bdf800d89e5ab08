"""Region proposal network: anchors, proposals and their losses (mmdetection 3.3's settings)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from clis import boxes as box_ops
from clis.config import RPNConfig
from clis.losses import at_least_float32, l1_loss, objectness_loss
from clis.models.backbone import STRIDES
from clis.models.windows import windows


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
    """One 3x3 convolution, then objectness and box deltas of the A anchors of every cell.

    Proposals come from maps of all cells. The losses need a few hundred sampled anchors alone: for these the
    layers run once more, on the 3x3 cells around each, so that training needs no graph for the maps. Loss and
    gradient are, but for rounding, those that the maps would give.
    """

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
        objectness, deltas = [], []
        for feature in features:
            hidden = self.conv(feature).relu_()
            objectness.append(at_least_float32(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)))
            deltas.append(
                at_least_float32(self.deltas(hidden).permute(0, 2, 3, 1).reshape(len(feature), -1, 4))
            )
        return objectness, deltas, self.anchors(features)

    def anchors(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Anchors [n,4] of every level."""
        anchors = []
        padded_height, padded_width = (STRIDES[0] * side for side in features[0].shape[2:])
        for feature, stride in zip(features, STRIDES):
            height, width = feature.shape[2:]
            spacing = None
            if self.config.anchor_spacing == "grid":
                spacing = (padded_height // height, padded_width // width)
            anchors.append(make_anchors(self.config, stride, height, width, feature.device, spacing))
        return anchors

    def predict_at(
        self, features: Sequence[Tensor], images: Tensor, anchors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [n] and deltas [n,4] of single anchors, with a gradient; the same values as `forward` has.

        Args:
            images: int64 [n], row of the batch.
            anchors: int64 [n], index over the anchors of all levels.
        """
        num_anchors = len(self.config.anchor_ratios)
        cells, ratios = anchors // num_anchors, anchors % num_anchors
        around = torch.arange(-1, 2, device=cells.device)
        rows, patches, first = [], [], 0
        for feature in features:
            height, width = feature.shape[2:]
            rows.append(torch.nonzero((cells >= first) & (cells < first + height * width)).squeeze(1))
            cell = (cells[rows[-1]] - first)[:, None]
            y, x = cell // width + around, cell % width + around
            patches.append(windows(feature, images[rows[-1]], y, x))
            first += height * width
        patches = torch.cat(patches)[torch.cat(rows).argsort()]
        hidden = F.conv2d(patches, self.conv.weight, self.conv.bias).relu_()
        row = torch.arange(len(anchors), device=anchors.device)
        logits = self.objectness(hidden).flatten(1)[row, ratios]
        deltas = self.deltas(hidden).reshape(-1, num_anchors, 4)[row, ratios]
        return at_least_float32(logits), at_least_float32(deltas)

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
        features: Sequence[Tensor],
        boxes: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        generators: Sequence[torch.Generator],
        normalizer: float,
    ) -> dict[str, Tensor]:
        """L_rpn: objectness of sampled anchors and L1 of the positives, for `boxes` [G,4] of each image.

        Anchors that are centred outside their image, in the padding, are neither positive nor negative.
        """
        anchors = torch.cat(self.anchors(features))
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        images, sampled, is_object, targets = [], [], [], []
        for image, (truth, (height, width), generator) in enumerate(zip(boxes, sizes, generators)):
            outside = (centres >= centres.new_tensor([width, height])).any(dim=1)
            iou = box_iou(truth, anchors).masked_fill(outside, -1)  # no box's best anchor is outside
            matches = box_ops.match(iou, self.config.positive_iou, self.config.negative_iou, low_quality=True)
            matches = matches.masked_fill(outside, box_ops.IGNORED)
            positive, negative = box_ops.sample(
                matches, self.config.samples, self.config.positive_fraction, generator
            )
            sampled += [positive, negative]
            is_object += [positive >= 0, negative < 0]  # true, false
            images += [torch.full_like(each, image) for each in (positive, negative)]
            targets.append(box_ops.encode(anchors[positive], truth[matches[positive]], box_ops.RPN_STDS))
        is_object = torch.cat(is_object)
        logits, deltas = self.predict_at(features, torch.cat(images), torch.cat(sampled))
        return {
            "rpn_objectness": objectness_loss(logits, is_object, normalizer),
            "rpn_box": l1_loss(deltas[is_object], torch.cat(targets), normalizer),
        }
