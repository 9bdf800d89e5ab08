"""Small windows of feature maps, for layers that are needed only at a few places."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def windows(feature: Tensor, images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return windows [n,C,h,w] of maps [B,C,H,W], zero outside the map.

    Args:
        images: int64 [n], row of the batch.
        y, x: int64 [n,h] and [n,w], the cells of each window.
    """
    height, width = feature.shape[2:]
    inside = _inside(y, height)[:, :, None] & _inside(x, width)[:, None, :]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    places = (images[:, None, None] * height + y[:, :, None]) * width + x[:, None, :]
    return _picked(_rows(feature), places, inside)


def windows_around(features: Sequence[Tensor], images: Tensor, cells: Tensor, reach: int) -> Tensor:
    """Return windows [n,C,2*reach+1,2*reach+1] around cells of several maps, zero outside of a cell's map.

    They come from one table of all maps, since one look-up costs a GPU less than one per map; and the host
    need not wait for the number of cells per map.

    Args:
        features: maps [B,C,H,W] of different sizes.
        images: int64 [n], row of the batch.
        cells: int64 [n], counted row by row through the maps of an image.
    """
    sides = [tuple(feature.shape[2:]) for feature in features]
    starts = [0, *itertools.accumulate(height * width for height, width in sides)][: len(sides)]
    is_beyond = [cells >= start for start in starts[1:]]

    def of_map(values: Sequence[int]) -> Tensor:
        """Return the value of each cell's map, int64 [n]."""
        chosen = torch.full_like(cells, values[0])
        for beyond, value in zip(is_beyond, values[1:]):
            chosen = torch.where(beyond, value, chosen)
        return chosen

    start = of_map(starts)
    height, width = (of_map(column)[:, None] for column in zip(*sides))
    around = torch.arange(-reach, reach + 1, device=cells.device)
    cell = (cells - start)[:, None]
    y, x = cell // width + around, cell % width + around
    inside = _inside(y, height)[:, :, None] & _inside(x, width)[:, None, :]
    y, x = torch.minimum(y.clamp(min=0), height - 1), torch.minimum(x.clamp(min=0), width - 1)
    # the table has the rows of one map for all images, then those of the next map
    first = len(features[0]) * start[:, None] + images[:, None] * height * width
    places = (first + y * width)[:, :, None] + x[:, None, :]
    return _picked(torch.cat([_rows(feature) for feature in features]), places, inside)


def _inside(cells: Tensor, side: Tensor | int) -> Tensor:
    return (cells >= 0) & (cells < side)


def _rows(feature: Tensor) -> Tensor:
    """Return the cells [B*H*W, C]; a view where the channels come last in memory."""
    return feature.permute(0, 2, 3, 1).flatten(0, 2)


def _picked(rows: Tensor, places: Tensor, inside: Tensor) -> Tensor:
    """Return windows [n,C,h,w] of rows [cells, C] at `places` [n,h,w], zero where not `inside` [n,h,w].

    A look-up, for its gradient is a sum in a fixed order; that of indexing is not, on many threads.
    """
    return (F.embedding(places, rows) * inside[..., None]).permute(0, 3, 1, 2)
