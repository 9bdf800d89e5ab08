"""Sizes of resized images, their pixels and their boxes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def image_size(image: Tensor) -> tuple[int, int]:
    """Return the height and width of an image [..., H, W]."""
    height, width = image.shape[-2:]
    return height, width


def round_half_up(x: float) -> int:
    """Round a non-negative length to whole pixels, at least 1."""
    return max(int(x + 0.5), 1)


def shortest_size(
    size: tuple[int, int],
    short_side: float,
    max_size: float,
    to_whole: Callable[[float], int] = round_half_up,
) -> tuple[int, int]:
    """Scale height and width to a short side of `short_side` pixels, but a long one of at most `max_size`."""
    scale = min(short_side / min(size), max_size / max(size))
    height, width = (max(to_whole(side * scale), 1) for side in size)
    return height, width


def padded_size(size: tuple[int, int]) -> tuple[int, int]:
    """Round height and width up to multiples of 32, the last stride of the ResNet: what images are padded to.

    Images of equal padded size share a batch in which each is padded as it would be alone. Others do not: a
    convolution sees the zeros beyond an image's border.
    """
    height, width = (-(-side // 32) * 32 for side in size)
    return height, width


def resize_image(
    image: Tensor,
    size: tuple[int, int],
    extent: tuple[float, float] | None = None,
    antialias: bool = True,
) -> Tensor:
    """Resize uint8 [3, H, W] to `size` (height, width), bilinear, with antialiasing as in Pillow.

    Args:
        extent: height and width of what is resized, from the upper left corner; None is the whole image. An
            image that was decoded at 1 / k of its size ends somewhere in its last row and column. It is not
            smaller than `size`.
        antialias: without it, four pixels make one at any scale, as in OpenCV.

    Returns:
        uint8 [3, *size]; `image` itself where nothing changes. The order in memory (channels first or last)
        is kept.
    """
    if tuple(extent or image.shape[-2:]) == tuple(size):
        return image
    # image[None] would hide from interpolate that the channels come last, which costs twice the time.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    # With factors, interpolate takes the whole number below each product.
    factors = extent and [(new + 1e-6) / old for new, old in zip(size, extent)]
    wanted = {"scale_factor": factors} if extent else {"size": size}
    if image.device.type == "cpu":
        return F.interpolate(batch, **wanted, mode="bilinear", antialias=antialias)[0]
    # elsewhere there is no kernel for uint8
    resized = F.interpolate(batch.float(), **wanted, mode="bilinear", antialias=antialias)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def scale_boxes(boxes: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Scale boxes [...,4] of an image resized from `size` to `new_size`, both (height, width).

    Each axis is scaled by the ratio of the actual sizes, which rounding makes differ slightly.
    """
    x, y = boxes[..., 0::2] * (new_size[1] / size[1]), boxes[..., 1::2] * (new_size[0] / size[0])
    return torch.stack([x, y], dim=-1).flatten(-2)
