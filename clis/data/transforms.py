"""Augmentation of one image with its boxes: pure functions, no argument is ever modified.

Images are uint8 [3, H, W]; boxes float32 [G, 4], xyxy in pixels of their image. Boxes follow their pixels
exactly. All randomness comes from the `numpy.random.Generator` that is passed in.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FILL = 114
"""Gray of every pixel that no image covers: cutout and mosaic."""


def round_half_up(x: float) -> int:
    """Round a non-negative length to whole pixels, at least 1."""
    return max(int(x + 0.5), 1)


def resize_scale(height: int, width: int, short_side: float, max_size: float) -> float:
    """Return the scale that makes the short side `short_side` but the long side at most `max_size`."""
    return min(short_side / min(height, width), max_size / max(height, width))


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [3, H, W] to `size` (height, width), bilinear with antialiasing."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if image.device.type == "cpu":
        return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    # elsewhere there is no kernel for uint8
    resized = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def resize(image: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize an image to `size` (height, width) and its boxes with it.

    Each axis of the boxes is scaled by the ratio of the actual sizes, which rounding makes differ slightly.
    """
    height, width = image.shape[-2:]
    ratio_y, ratio_x = size[0] / height, size[1] / width
    return resize_image(image, size), boxes * boxes.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])


def resize_shortest(
    image: Tensor, boxes: Tensor, short_side: float, max_size: float
) -> tuple[Tensor, Tensor]:
    """Resize to a short side of `short_side` pixels, but a long side of at most `max_size`."""
    height, width = image.shape[-2:]
    scale = resize_scale(height, width, short_side, max_size)
    return resize(image, boxes, (round_half_up(height * scale), round_half_up(width * scale)))


def flip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror left and right: x becomes W - x."""
    flipped = boxes.clone()
    flipped[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return image.flip(-1), flipped


def random_flip(
    image: Tensor, boxes: Tensor, generator: np.random.Generator, probability: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Mirror left and right with the given probability."""
    return flip(image, boxes) if generator.random() < probability else (image, boxes)


def cutout(
    image: Tensor,
    generator: np.random.Generator,
    probability: float = 0.5,
    side_range: tuple[float, float] = (0.1, 0.4),
) -> Tensor:
    """Fill one random rectangle with gray (DeVries and Taylor 2017); boxes stay as they are.

    Args:
        image: uint8 [3, H, W].
        generator: source of randomness.
        probability: chance that anything is filled.
        side_range: bounds of the rectangle's sides as fractions of the image's, in [0, 1]; height and width
            are drawn independently, uniformly.

    Returns:
        uint8 [3, H, W]: a copy where something was filled, else `image` itself. The rectangle lies wholly
        inside the image, uniformly placed.
    """
    if generator.random() >= probability:
        return image
    height, width = image.shape[-2:]
    top, bottom = _random_span(height, generator.uniform(*side_range), generator)
    left, right = _random_span(width, generator.uniform(*side_range), generator)
    image = image.clone()
    image[:, top:bottom, left:right] = FILL
    return image


def _random_span(length: int, fraction: float, generator: np.random.Generator) -> tuple[int, int]:
    extent = round_half_up(length * fraction)
    start = int(generator.integers(length - extent, endpoint=True))
    return start, start + extent
