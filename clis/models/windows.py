"""Small windows of feature maps, for layers that are needed at a few places alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def windows(feature: Tensor, images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Windows [n,C,h,w] of maps [B,C,H,W], zero outside the map.

    Args:
        images: int64 [n], row of the batch.
        y, x: int64 [n,h] and [n,w], the cells of each window.
    """
    height, width = feature.shape[2:]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]
    cells = feature.permute(0, 2, 3, 1).flatten(0, 2)
    # a look-up of rows, for its gradient is a sum in a fixed order; that of indexing is not, on many threads
    picked = F.embedding((images[:, None, None] * height + y) * width + x, cells)
    return (picked * inside[..., None]).permute(0, 3, 1, 2)
