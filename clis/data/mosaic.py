"""Mosaic of four image-level images on one canvas (paper, section IV-A): planned from sizes, then drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
import torch
from torch import Tensor

from clis.config import DataConfig
from clis.data.transforms import FILL, random_cutout, scaled_size
from clis.resize import resize_image


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How one image lies on its tile."""

    crop: tuple[int, int, int, int] | None
    """Part of the stored image that is placed, xyxy in whole pixels; None is all of it."""
    size: tuple[int, int]
    """Height and width that it is resized to."""
    flipped: bool
    top: int
    left: int
    """Where the image begins in the tile: at or after 0 where it fits, before 0 where it is cropped."""
    cutout: tuple[int, int, int, int] | None
    """Gray rectangle, xyxy in pixels of the resized and flipped image."""


def plan_mosaic(
    sizes: Sequence[tuple[int, int]], regions: Tensor, data: DataConfig, generator: np.random.Generator
) -> tuple[list[Placement], Tensor, Tensor]:
    """Draw how four images lie on the 2 x 2 tiles of a canvas, each with its own scale, flip and cutout.

    An image larger than its tile is cropped at random, a smaller one is placed at random in it. Its region
    follows it, clipped to the tile so that it never reaches into the neighbor; cutout leaves it unchanged.

    Args:
        sizes: height and width of four images, for the tiles in reading order.
        regions: float32 [4, 4], one xyxy box per image, in pixels of that image.
        data: the canvas (`mosaic_size`, even) and what is drawn how (`mosaic_scale`, where 1 fits the whole
            image to its tile, `mosaic_surroundings`, `flip`, `cutout`, `cutout_size`, `min_region`).
        generator: source of randomness.

    Returns:
        placements: four.
        regions: float32 [4, 4], xyxy on the canvas, each inside its tile.
        kept: bool [4]; False where cropping left the region smaller than `data.min_region`.
    """
    tile = data.mosaic_size // 2
    placements, placed = [], []
    for index, (stored, region) in enumerate(zip(sizes, regions.tolist())):
        crop = None
        if data.mosaic_surroundings is not None:
            crop = _crop_around(region, stored, data.mosaic_surroundings)
            stored = crop[3] - crop[1], crop[2] - crop[0]
            region = [side - start for side, start in zip(region, crop[:2] * 2)]
        scale = generator.uniform(*data.mosaic_scale) * tile / max(stored)
        height, width = scaled_size(stored, scale)
        flipped = bool(generator.random() < data.flip)
        cutout = random_cutout((height, width), generator, data.cutout, data.cutout_size)
        top, left = (_random_offset(length, tile, generator) for length in (height, width))
        placement = Placement(
            crop=crop, size=(height, width), flipped=flipped, top=top, left=left, cutout=cutout
        )
        placements.append(placement)
        x, y = tile * (index % 2), tile * (index // 2)
        x1, y1, x2, y2 = _region_on_tile(region, stored, placement, tile)
        placed.append([x + x1, y + y1, x + x2, y + y2])
    regions = torch.tensor(placed, dtype=torch.float32)
    kept = (regions[:, 2:] - regions[:, :2] >= data.min_region).all(dim=1)
    return placements, regions, kept


def _crop_around(region: Sequence[float], size: tuple[int, int], factor: float) -> tuple[int, int, int, int]:
    """Return the crop, xyxy, of an image of `size` around a region: its sides times `factor`, at least 1."""
    x1, y1, x2, y2 = region
    spans = []
    for low, high, length in ((x1, x2, size[1]), (y1, y2, size[0])):
        center, half = (low + high) / 2, (high - low) / 2 * factor
        start = min(max(floor(center - half), 0), length - 1)
        spans.append((start, min(max(ceil(center + half), start + 1), length)))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _region_on_tile(
    region: Sequence[float], stored: tuple[int, int], placement: Placement, tile: int
) -> list[float]:
    """Return the place on its tile, clipped, of the region of an image, or of a part, of this size; xyxy."""
    (height, width), (x1, y1, x2, y2) = placement.size, region
    ratio_y, ratio_x = height / stored[0], width / stored[1]
    x1, y1, x2, y2 = x1 * ratio_x, y1 * ratio_y, x2 * ratio_x, y2 * ratio_y
    if placement.flipped:
        x1, x2 = width - x2, width - x1
    moved = (x1 + placement.left, y1 + placement.top, x2 + placement.left, y2 + placement.top)
    return [min(max(x, 0), tile) for x in moved]


def _random_offset(length: int, tile: int, generator: np.random.Generator) -> int:
    slack = tile - length
    return int(generator.integers(min(slack, 0), max(slack, 0), endpoint=True))


def draw_tile(image: Tensor, placement: Placement, canvas: Tensor, index: int) -> None:
    """Write an image on tile `index` of a canvas, uint8 [3, size, size], as planned.

    Args:
        image: uint8 [3, H, W], as stored or, where nothing is cropped, already resized to `placement.size`;
            not modified.
    """
    tile = canvas.shape[-1] // 2
    y, x = tile * (index // 2), tile * (index % 2)
    (height, width), top, left = placement.size, y + placement.top, x + placement.left
    y1, y2 = max(top, y), min(top + height, y + tile)
    x1, x2 = max(left, x), min(left + width, x + tile)
    if placement.crop is not None:
        crop_x1, crop_y1, crop_x2, crop_y2 = placement.crop
        image = image[:, crop_y1:crop_y2, crop_x1:crop_x2]
    image = resize_image(image, placement.size)[:, y1 - top : y2 - top]
    if placement.flipped:
        image = image[:, :, left + width - x2 : left + width - x1].flip(-1)
    else:
        image = image[:, :, x1 - left : x2 - left]
    visible = canvas[:, y1:y2, x1:x2]
    visible.copy_(image)
    if placement.cutout:
        above, before = y1 - top, x1 - left  # what is cropped off, and maybe the whole cutout with it
        gray_x1, gray_y1, gray_x2, gray_y2 = placement.cutout
        rows = slice(max(gray_y1 - above, 0), max(gray_y2 - above, 0))
        columns = slice(max(gray_x1 - before, 0), max(gray_x2 - before, 0))
        visible[:, rows, columns] = FILL
