"""Pasting regions of image-level images onto an instance-level image: the views of contrastive pairs.

Paper, section III-B; its overview figure shows the rectangular crop with its background, pasted opaque, with
a flip and scale of its own. Planned from sizes, then drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, floor, log, sqrt

import numpy as np
from torch import Tensor

from clis.config import DataConfig
from clis.resize import resize_image, round_half_up

ATTEMPTS = 10
"""Draws of size and place before a source is given up."""


@dataclass(frozen=True, kw_only=True)
class Paste:
    """Which pixels of an image go where on another; both xyxy in whole pixels."""

    crop: tuple[int, int, int, int]
    flipped: bool
    box: tuple[int, int, int, int]


def plan_pastes(
    size: tuple[int, int],
    boxes: Tensor,
    sources: Sequence[tuple[tuple[int, int], Tensor]],
    data: DataConfig,
    generator: np.random.Generator,
) -> list[tuple[int, Paste]]:
    """Draw where on an image the region of every source is pasted, if there is room for it.

    The square root of a crop's area is drawn log-uniformly from `data.paste_size` (every octave is
    equally likely), both bounds limited to what fits in the image; its place is uniform. A place where the
    pastes together could hide more than `data.paste_max_cover` of any box, earlier pasted ones included, is
    rejected, and size and place are drawn again, up to `ATTEMPTS` times. `data.flip` is the chance of a flip.

    Args:
        size: height and width of the image.
        boxes: float32 [G, 4], xyxy, the ground truth of the image; it stays as it is.
        sources: height and width of an image, and the region to crop from it, float32 [4], xyxy; the region
            is clipped to its image and rounded outward to whole pixels.
        generator: source of randomness.

    Returns:
        (index of the source, how it is pasted) of every source that found a place, in the order in which
        they are to be drawn.
    """
    standing = boxes.numpy().astype(np.float64)
    covered = np.zeros(len(standing))
    pastes: list[tuple[int, Paste]] = []
    for index, (source_size, region) in enumerate(sources):
        x1, y1, x2, y2 = crop = _crop(source_size, region)
        if x1 >= x2 or y1 >= y2:
            continue
        flipped = bool(generator.random() < data.flip)
        for _ in range(ATTEMPTS):
            place = _random_place((y2 - y1, x2 - x1), size, data.paste_size, generator)
            now_covered = covered + _intersection(standing, place)
            if (now_covered <= data.paste_max_cover * _area(standing)).all():
                pastes.append((index, Paste(crop=crop, flipped=flipped, box=place)))
                standing = np.concatenate([standing, [place]])
                covered = np.append(now_covered, 0)
                break
    return pastes


def draw_paste(image: Tensor, source: Tensor, paste: Paste) -> None:
    """Write a crop into `image`: exactly the pixels of `paste.box`.

    Args:
        image: uint8 [3, H, W].
        source: uint8 [3, H', W'], the image that the crop is from, as stored; not modified.
    """
    x1, y1, x2, y2 = paste.crop
    left, top, right, bottom = paste.box
    crop = resize_image(source[:, y1:y2, x1:x2], (bottom - top, right - left))
    image[:, top:bottom, left:right] = crop.flip(-1) if paste.flipped else crop


def _crop(size: tuple[int, int], region: Tensor) -> tuple[int, int, int, int]:
    """Return the whole pixels that the region touches; no area where it is outside the image or has none."""
    x1, y1, x2, y2 = region.clamp(min=0).tolist()
    return floor(x1), floor(y1), min(ceil(x2), size[1]), min(ceil(y2), size[0])


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


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)


def _intersection(boxes: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Area that each of the boxes shares with one box, [G]."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    return sides.clip(min=0).prod(axis=1)
