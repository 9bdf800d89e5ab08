"""Pasting regions of image-level images onto an instance-level image: the views of contrastive pairs.

Paper, section III-B; its overview figure shows the rectangular crop with its background, pasted opaque, with
a flip and scale of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, floor, log, sqrt

import numpy as np
import torch
from torch import Tensor

from clis.data.transforms import resize_image, round_half_up


def paste(
    image: Tensor,
    boxes: Tensor,
    sources: Sequence[tuple[Tensor, Tensor]],
    *,
    size_range: tuple[float, float] = (32, 256),
    max_cover: float = 0.5,
    attempts: int = 10,
    flip_probability: float = 0.5,
    generator: np.random.Generator,
) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Paste the region of every source onto a copy of the image, where there is room for it.

    The square root of a crop's area is drawn log-uniformly from `size_range` (every octave is equally
    likely), both bounds limited to what fits in the image; its place is uniform. A place where the pastes
    together could hide more than `max_cover` of any box, earlier pasted ones included, is rejected, and size
    and place are drawn again.

    Args:
        image: uint8 [3, H, W].
        boxes: float32 [G, 4], xyxy, the ground truth of the image; it stays as it is.
        sources: pairs of an image, uint8 [3, H', W'], and the region to crop from it, float32 [4], xyxy; the
            region is clipped to its image and rounded outward to whole pixels.
        size_range: bounds of the pasted sqrt(area), in pixels of `image`, above 0.
        max_cover: largest share of a box's area, in [0, 1], that pastes may cover.
        attempts: draws of size and place before a source is given up.
        flip_probability: chance of a horizontal flip of a crop.
        generator: source of randomness.

    Returns:
        image: uint8 [3, H, W], a copy.
        pasted: (index of the source, box float32 [4]) of every source that found a place, in order. The box
            is exactly the pixels that were written, in whole numbers.
    """
    image = image.clone()
    boxes = boxes.double()
    covered = boxes.new_zeros(len(boxes))
    pasted: list[tuple[int, Tensor]] = []
    for index, (source, region) in enumerate(sources):
        crop = _crop(source, region)
        if crop.numel() == 0:
            continue
        if generator.random() < flip_probability:
            crop = crop.flip(-1)
        for _ in range(attempts):
            left, top, right, bottom = _random_place(crop.shape[-2:], image.shape[-2:], size_range, generator)
            box = boxes.new_tensor([left, top, right, bottom])
            now_covered = covered + _intersection(boxes, box)
            if (now_covered <= max_cover * _area(boxes)).all():
                image[:, top:bottom, left:right] = resize_image(crop, (bottom - top, right - left))
                pasted.append((index, box.float()))
                boxes = torch.cat([boxes, box[None]])
                covered = torch.cat([now_covered, now_covered.new_zeros(1)])
                break
    return image, pasted


def _crop(image: Tensor, region: Tensor) -> Tensor:
    """The whole pixels that the region touches; empty where it lies outside the image or has no area."""
    x1, y1, x2, y2 = region.clamp(min=0).tolist()
    return image[:, floor(y1) : ceil(y2), floor(x1) : ceil(x2)]


def _random_place(
    crop_size: tuple[int, int],
    image_size: tuple[int, int],
    size_range: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draw the pixels (left, top, right, bottom) for a crop, all inside the image, with the crop's shape."""
    (crop_height, crop_width), (image_height, image_width) = crop_size, image_size
    root_area = sqrt(crop_height * crop_width)
    largest = root_area * min(image_height / crop_height, image_width / crop_width)
    low, high = (log(min(bound, largest)) for bound in size_range)
    scale = exp(generator.uniform(low, high)) / root_area
    height = min(round_half_up(crop_height * scale), image_height)
    width = min(round_half_up(crop_width * scale), image_width)
    top = int(generator.integers(image_height - height, endpoint=True))
    left = int(generator.integers(image_width - width, endpoint=True))
    return left, top, left + width, top + height


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)


def _intersection(boxes: Tensor, box: Tensor) -> Tensor:
    """Area that each of the boxes shares with one box, [G]."""
    sides = torch.minimum(boxes[:, 2:], box[2:]) - torch.maximum(boxes[:, :2], box[:2])
    return sides.clamp(min=0).prod(dim=1)
