"""Region proposal network: anchors, proposals and their losses (mmdetection 3.3's settings)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from clis import boxes as box_ops
from clis.config import RPNConfig
from clis.losses import at_least_float32, l1_loss, objectness_loss
from clis.models.backbone import STRIDES
from clis.models.windows import windows_around


def cell_anchors(config: RPNConfig, stride: int) -> Tensor:
    """Return the anchors [A,4] of a cell at the origin, each of (anchor_scale * stride)^2 square pixels."""
    side = config.anchor_scale * stride
    ratios = torch.tensor(config.anchor_ratios)
    half = torch.stack([side / ratios.sqrt(), side * ratios.sqrt()], dim=1) / 2
    half = half.round() if config.round_anchors else half
    return torch.cat([-half, half], dim=1)


def grid_anchors(cell: Tensor, height: int, width: int, spacing: tuple[int, int]) -> Tensor:
    """Return a level's anchors, [height * width * A, 4], row by row, centered on the cells' top left corners.

    Args:
        cell: [A,4], as from `cell_anchors`.
        spacing: pixels from row to row and from column to column.
    """
    y, x = torch.meshgrid(
        torch.arange(height, device=cell.device) * spacing[0],
        torch.arange(width, device=cell.device) * spacing[1],
        indexing="ij",
    )
    return (torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4) + cell).reshape(-1, 4)


def _at(boxes: Tensor, groups: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return boxes[index], groups[index]


class RPN(nn.Module):
    """One 3x3 convolution, then objectness and box deltas of the A anchors of every cell.

    Proposals come from maps of all cells. The losses need only a few hundred sampled anchors: for these the
    layers run once more, on the 3x3 cells around each, so that training needs no graph for the maps. Loss and
    gradient are, but for rounding, those that the maps would give.
    """

    cell_anchors: Tensor

    def __init__(self, channels: int, config: RPNConfig) -> None:
        super().__init__()
        self.config = config
        self.nms = box_ops.nms_top_k
        num_anchors = len(config.anchor_ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        cells = torch.stack([cell_anchors(config, stride) for stride in STRIDES])
        self.register_buffer("cell_anchors", cells, persistent=False)
        self._grids: dict[tuple[Any, ...], Tensor] = {}

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return objectness logits [B,n] and deltas [B,n,4] of every level."""
        objectness, deltas = [], []
        for feature in features:
            hidden = self.conv(feature).relu_()
            objectness.append(at_least_float32(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)))
            deltas.append(
                at_least_float32(self.deltas(hidden).permute(0, 2, 3, 1).reshape(len(feature), -1, 4))
            )
        return objectness, deltas

    def anchors(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors [n,4] of every level."""
        anchors = []
        padded_height, padded_width = (STRIDES[0] * side for side in features[0].shape[2:])
        for feature, stride, cell in zip(features, STRIDES, self.cell_anchors):
            height, width = feature.shape[2:]
            spacing = (stride, stride)
            if self.config.anchor_spacing == "grid":
                spacing = (padded_height // height, padded_width // width)
            anchors.append(self._grid(stride, cell, height, width, spacing))
        return anchors

    def _grid(self, stride: int, cell: Tensor, height: int, width: int, spacing: tuple[int, int]) -> Tensor:
        """Cut a level's anchors out of the largest grid that was needed so far, which stays on its device.

        Not while a program is exported: its tensors and sizes are placeholders.
        """
        if type(cell) is not Tensor:
            return grid_anchors(cell, height, width, spacing)
        key = (stride, spacing, cell.device, cell.dtype)
        grid = self._grids.get(key)
        if grid is None or grid.shape[0] < height or grid.shape[1] < width:
            rows, columns = (height, width) if grid is None else grid.shape[:2]
            rows, columns = max(rows, height), max(columns, width)
            with torch.inference_mode(False):  # training may need it later
                grid = grid_anchors(cell, rows, columns, spacing).view(rows, columns, -1, 4)
            self._grids[key] = grid
        return grid[:height, :width].reshape(-1, 4)

    def predict_at(
        self, features: Sequence[Tensor], images: Tensor, anchors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits [n] and deltas [n,4] of single anchors, equal to `forward`'s and with a gradient.

        Args:
            images: int64 [n], row of the batch.
            anchors: int64 [n], index over the anchors of all levels.
        """
        num_anchors = len(self.config.anchor_ratios)
        cells, ratios = anchors // num_anchors, anchors % num_anchors
        inputs = windows_around(features, images, cells, reach=1)
        hidden = F.conv2d(inputs, self.conv.weight, self.conv.bias).relu_()
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
        """Return the proposals of each image: at most `proposals` boxes [n,4], best first, inside the image.

        The best of each level are decoded and clipped; boxes without area, or of a side up to `min_size`, go;
        NMS is within levels.
        """
        pre_nms = self.config.pre_nms_train if self.training else self.config.pre_nms_test
        proposals = []
        for image, size in enumerate(sizes):
            best, moves, scores, levels = [], [], [], []
            for level, (logits, level_deltas, level_anchors) in enumerate(zip(objectness, deltas, anchors)):
                score, index = logits[image].topk(min(pre_nms, logits.shape[1]))
                best.append(level_anchors[index])
                moves.append(level_deltas[image, index])
                scores.append(score)
                levels.append(torch.full_like(index, level))
            box = box_ops.decode(
                torch.cat(best), torch.cat(moves), box_ops.RPN_STDS, self.config.shrink_limit
            )
            box, group = box_ops.clip(box, size), torch.cat(levels)
            large = (box[:, 2:] - box[:, :2] > self.config.min_size).all(dim=1)
            kept = self.nms(
                torch.cat(scores).masked_fill(~large, -math.inf),  # takes no part, without a new shape
                functools.partial(_at, box, group),
                self.config.nms_iou,
                self.config.proposals,
            )
            proposals.append(box[kept])
        return proposals

    def losses(
        self,
        features: Sequence[Tensor],
        anchors: Sequence[Tensor],
        boxes: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        seeds: Sequence[int],
        normalizer: float,
    ) -> dict[str, Tensor]:
        """Compute L_rpn for `boxes` [G,4] of each image: objectness of sampled anchors, L1 of the positives.

        Anchors that are centered outside their image, in the padding, are neither positive nor negative; in
        mmdetection they are negatives.

        Args:
            anchors: of every level, as from `anchors`.
            seeds: of each image, for the choice of anchors.
        """
        every = torch.cat(list(anchors))
        x, y = ((every[:, :2] + every[:, 2:]) / 2).unbind(dim=1)
        matches = []
        for truth, (height, width) in zip(boxes, sizes):
            outside = (x >= width) | (y >= height)
            iou = box_iou(truth, every).masked_fill(outside, -1)  # no box's best anchor is outside
            found = box_ops.match(iou, self.config.positive_iou, self.config.negative_iou, low_quality=True)
            matches.append(found.masked_fill(outside, box_ops.IGNORED))
        chosen = box_ops.sample(matches, self.config.samples, self.config.positive_fraction, seeds)

        images, sampled, is_object, targets, positives, count = [], [], [], [], [], 0
        for image, (truth, match_of, (positive, negative)) in enumerate(zip(boxes, matches, chosen)):
            sampled += [positive, negative]
            is_object += [torch.ones_like(positive), torch.zeros_like(negative)]
            images += [torch.full_like(each, image) for each in (positive, negative)]
            targets.append(box_ops.encode(every[positive], truth[match_of[positive]], box_ops.RPN_STDS))
            positives.append(torch.arange(count, count + len(positive), device=positive.device))
            count += len(positive) + len(negative)
        logits, deltas = self.predict_at(features, torch.cat(images), torch.cat(sampled))
        return {
            "rpn_objectness": objectness_loss(logits, torch.cat(is_object), normalizer),
            "rpn_box": l1_loss(deltas[torch.cat(positives)], torch.cat(targets), normalizer),
        }
