"""RoIAlign, also with a gradient that is the same every time on a GPU."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from clis import boxes as box_ops


def roi_align(
    feature: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Pool RoIs [N,5] (row of the batch, xyxy) of `feature` [B,C,H,W] to [N,C,size,size].

    torchvision's operator. Under ``torch.use_deterministic_algorithms(True)`` on a GPU, whose threads add up
    that operator's gradient in any order, matrix products with the same result take its place. (torchvision
    itself then compiles a form that goes over every cell of the map for every point of a RoI; with adaptive
    sampling at the paper's size its gradient needs more memory than any device has.)

    Args:
        scale: cells per pixel.
        sampling_ratio: points per bin in each direction; 0 is as many as a bin has cells.
        aligned: a cell's value is at its center.
    """
    if feature.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return torchvision.ops.roi_align(feature, rois, size, scale, sampling_ratio, aligned)
    return roi_align_by_products(feature, rois, size, scale, sampling_ratio, aligned)


def roi_align_by_products(
    feature: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Pool as `roi_align`, by matrix products; equal to torchvision's operator but for rounding.

    The points of a bin are a grid and their interpolation is bilinear, so the mean over a bin is a product of
    weights over the rows and weights over the columns of the map.
    """
    height, width = feature.shape[2:]
    rows = _weights(rois[:, 2::2], height, size, scale, sampling_ratio, aligned)
    columns = _weights(rois[:, 1::2], width, size, scale, sampling_ratio, aligned)
    places, pooled = box_ops.rows_by_group(rois[:, 0].long(), len(feature)), []
    with torch.autocast(feature.device.type, enabled=False):
        for image, here in zip(feature, places):
            across = torch.einsum("nph,chw->npcw", rows[here], image)
            pooled.append(torch.einsum("npcw,nqw->ncpq", across, columns[here]))
    return torch.cat(pooled)[torch.cat(places).argsort()]


def _weights(ends: Tensor, cells: int, size: int, scale: float, sampling_ratio: int, aligned: bool) -> Tensor:
    """Return weights [N, size, cells] of the cells along one axis in each bin of RoIs from `ends` [N,2]."""
    first, last = (ends * scale - (0.5 if aligned else 0.0)).unbind(dim=1)
    length = last - first if aligned else (last - first).clamp(min=1.0)
    side = length / size
    if sampling_ratio > 0:
        points = torch.full_like(side, sampling_ratio)
    else:
        points = side.ceil()
    most = int(points.max().clamp(min=1)) if len(points) else 1
    number = torch.arange(most, dtype=ends.dtype, device=ends.device)
    bins = torch.arange(size, dtype=ends.dtype, device=ends.device)
    step = (side / points)[:, None, None]
    at = first[:, None, None] + bins[:, None] * side[:, None, None] + (number + 0.5) * step  # [N, size, most]
    counts = (number < points[:, None, None]) & (at >= -1) & (at <= cells)
    at = at.clamp(0, cells - 1)
    hats = 1 - (at[..., None] - torch.arange(cells, dtype=ends.dtype, device=ends.device)).abs()
    summed = hats.clamp(min=0).masked_fill(~counts[..., None], 0).sum(dim=2)
    return summed / points.clamp(min=1)[:, None, None]
