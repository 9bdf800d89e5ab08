"""Sizes, boxes and pixels of one image: pure functions, no argument is ever modified.

Images are uint8 [3, H, W]; boxes float32 [G, 4], xyxy in pixels of their image. Boxes follow their pixels
exactly. All randomness comes from the `numpy.random.Generator` that is passed in.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from clis.resize import round_half_up

FILL = 114
"""Gray of every pixel that no image covers: cutout and mosaic."""


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Multiply height and width by the scale, rounded to whole pixels."""
    return round_half_up(size[0] * scale), round_half_up(size[1] * scale)


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Mirror boxes left and right with their image: x becomes `width` - x."""
    flipped = boxes.clone()
    flipped[:, [0, 2]] = width - boxes[:, [2, 0]]
    return flipped


def random_cutout(
    size: tuple[int, int],
    generator: np.random.Generator,
    probability: float,
    side_range: tuple[float, float],
) -> tuple[int, int, int, int] | None:
    """Draw the rectangle of an image that is filled with gray (DeVries and Taylor 2017).

    Args:
        size: height and width of the image.
        generator: source of randomness.
        probability: chance that anything is filled.
        side_range: bounds of the rectangle's sides as fractions of the image's, in [0, 1]; height and width
            are drawn independently, uniformly.

    Returns:
        xyxy in whole pixels, uniformly placed wholly inside the image; None where nothing is filled.
    """
    if generator.random() >= probability:
        return None
    top, bottom = _random_span(size[0], generator.uniform(*side_range), generator)
    left, right = _random_span(size[1], generator.uniform(*side_range), generator)
    return left, top, right, bottom


def _random_span(length: int, fraction: float, generator: np.random.Generator) -> tuple[int, int]:
    extent = round_half_up(length * fraction)
    start = int(generator.integers(length - extent, endpoint=True))
    return start, start + extent
