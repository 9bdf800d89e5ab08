"""Mosaic of four image-level images on one canvas (paper, section IV-A)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clis.data.transforms import FILL, cutout, random_flip, resize, round_half_up


def mosaic(
    images: Sequence[Tensor],
    regions: Tensor,
    *,
    size: int,
    scale_range: tuple[float, float] = (0.5, 1.5),
    flip_probability: float = 0.5,
    cutout_probability: float = 0.5,
    cutout_range: tuple[float, float] = (0.1, 0.4),
    min_region: float,
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Put four images on the 2 x 2 tiles of a gray canvas, each scaled, flipped and cut out on its own.

    An image larger than its tile is cropped at random, a smaller one lies at a random place in it. Its region
    follows it, clipped to the tile so that it never reaches into the neighbour; cutout leaves it as it is.

    Args:
        images: four uint8 [3, H, W] of any sizes, for the tiles in reading order.
        regions: float32 [4, 4], one xyxy box an image, in pixels of that image.
        size: side of the canvas in pixels, even.
        scale_range: bounds of the uniform random scale, where 1 fits the whole image to its tile.
        flip_probability: chance of a horizontal flip of an image.
        cutout_probability: chance of a cutout in an image.
        cutout_range: sides of the cutout as fractions of the image's (see `cutout`).
        min_region: least width and height, in canvas pixels, of a clipped region that is kept.
        generator: source of randomness.

    Returns:
        canvas: uint8 [3, size, size].
        regions: float32 [4, 4], xyxy on the canvas, each inside its tile.
        kept: bool [4]; False where cropping left the region smaller than `min_region`.

    Raises:
        ValueError: not four images and regions, or an odd size.
    """
    if len(images) != 4 or regions.shape != (4, 4):
        raise ValueError(
            f"a mosaic takes 4 images and their regions [4, 4], got {len(images)} and {list(regions.shape)}"
        )
    if size % 2:
        raise ValueError(f"a mosaic has 2 x 2 equal tiles: its size must be even, got {size}")
    tile = size // 2
    canvas = torch.full((3, size, size), FILL, dtype=torch.uint8)
    placed = []
    for index, image in enumerate(images):
        top, left = tile * (index // 2), tile * (index % 2)
        region = regions[index : index + 1]
        scale = generator.uniform(*scale_range)
        image, region = _fit(image, region, tile, scale)
        image, region = random_flip(image, region, generator, flip_probability)
        image = cutout(image, generator, cutout_probability, cutout_range)
        region = _place(image, region, canvas[:, top : top + tile, left : left + tile], generator)
        placed.append(region + region.new_tensor([left, top, left, top]))
    regions = torch.cat(placed)
    kept = (regions[:, 2:] - regions[:, :2] >= min_region).all(dim=1)
    return canvas, regions, kept


def _fit(image: Tensor, region: Tensor, tile: int, scale: float) -> tuple[Tensor, Tensor]:
    """Resize to `scale` times the size at which the whole image just fits the tile."""
    height, width = image.shape[-2:]
    scale *= tile / max(height, width)
    return resize(image, region, (round_half_up(height * scale), round_half_up(width * scale)))


def _place(image: Tensor, region: Tensor, tile: Tensor, generator: np.random.Generator) -> Tensor:
    """Write the image into the tile, a view of the canvas; return its region in tile coordinates, clipped."""
    size = tile.shape[-1]
    height, width = image.shape[-2:]
    top, left = (_random_offset(length, size, generator) for length in (height, width))
    visible = image[:, max(-top, 0) : size - top, max(-left, 0) : size - left]
    tile[:, max(top, 0) : top + height, max(left, 0) : left + width] = visible
    return (region + region.new_tensor([left, top, left, top])).clamp(0, size)


def _random_offset(length: int, tile: int, generator: np.random.Generator) -> int:
    """Where the image begins in the tile: at or after 0 where it fits, at or before 0 where it is cropped."""
    slack = tile - length
    return int(generator.integers(min(slack, 0), max(slack, 0), endpoint=True))
