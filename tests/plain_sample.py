"""A sample as one would make it plainly: whole images, one step after the other, each on all of the pixels.

It draws from its generator in the order of `clis.data.plan`, so that both make the same sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, floor, log, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clis.config import DataConfig

FILL = 114


def plain_sample(
    data: DataConfig,
    t: int,
    image: Tensor,
    boxes: Tensor,
    sources: Sequence[tuple[Tensor, Tensor]],
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From images and their boxes or region: image with pastes, its boxes, mosaics, regions that are kept."""
    short_side = int(generator.choice(data.short_sides))
    scale = min(short_side / min(image.shape[1:]), data.max_size / max(image.shape[1:]))
    image, boxes = random_flip(*resize(image, boxes, rounded(image, scale)), generator, data.flip)
    mosaics = [
        plain_mosaic(
            sources[first : first + 4],
            data.mosaic_size,
            data.mosaic_scale,
            data.flip,
            data.cutout,
            data.cutout_size,
            generator,
        )
        for first in range(0, len(sources), 4)
    ]
    regions = torch.cat([regions for _, regions in mosaics])
    kept = (regions[:, 2:] - regions[:, :2] >= data.min_region).all(dim=1)
    chosen = generator.permutation(np.flatnonzero(kept.numpy()))[:t]
    image, pasted = plain_paste(
        image,
        boxes,
        [sources[i] for i in chosen],
        data.paste_size,
        data.paste_max_cover,
        data.flip,
        generator,
    )
    return image, torch.cat([boxes, pasted]), torch.stack([canvas for canvas, _ in mosaics]), regions[kept]


def rounded(image: Tensor, scale: float) -> tuple[int, int]:
    """Height and width at a scale, halves up, at least 1."""
    height, width = (max(int(length * scale + 0.5), 1) for length in image.shape[1:])
    return height, width


def resize(image: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """In float32, rounded once."""
    ratio = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]]).repeat(2)
    resized = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
    return resized.round().to(torch.uint8), boxes * ratio


def random_flip(
    image: Tensor, boxes: Tensor, generator: np.random.Generator, probability: float
) -> tuple[Tensor, Tensor]:
    if generator.random() >= probability:
        return image, boxes
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return image.flip(2), torch.stack([image.shape[2] - x2, y1, image.shape[2] - x1, y2], dim=1)


def random_span(
    length: int, side_range: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int]:
    extent = max(int(length * generator.uniform(*side_range) + 0.5), 1)
    start = int(generator.integers(length - extent, endpoint=True))
    return start, start + extent


def plain_mosaic(
    sources: Sequence[tuple[Tensor, Tensor]],
    size: int,
    scale_range: tuple[float, float],
    flip: float,
    cutout: float,
    cutout_range: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """The canvas, and the four regions clipped to their tiles."""
    tile = size // 2
    canvas, placed = torch.full((3, size, size), FILL, dtype=torch.uint8), []
    for index, (image, region) in enumerate(sources):
        scale = generator.uniform(*scale_range) * tile / max(image.shape[1:])
        image, region = resize(image, region[None], rounded(image, scale))
        image, region = random_flip(image, region, generator, flip)
        if generator.random() < cutout:
            top, bottom = random_span(image.shape[1], cutout_range, generator)
            left, right = random_span(image.shape[2], cutout_range, generator)
            image = image.clone()
            image[:, top:bottom, left:right] = FILL
        slack = [tile - length for length in image.shape[1:]]
        top, left = (int(generator.integers(min(s, 0), max(s, 0), endpoint=True)) for s in slack)
        for y in range(max(top, 0), min(top + image.shape[1], tile)):
            x1, x2 = max(left, 0), min(left + image.shape[2], tile)
            row = image[:, y - top, x1 - left : x2 - left]
            canvas[:, tile * (index // 2) + y, tile * (index % 2) + x1 : tile * (index % 2) + x2] = row
        corner = torch.tensor([tile * (index % 2), tile * (index // 2)]).repeat(2)
        placed.append((region + torch.tensor([left, top]).repeat(2)).clamp(0, tile) + corner)
    return canvas, torch.cat(placed)


def plain_paste(
    image: Tensor,
    boxes: Tensor,
    sources: Sequence[tuple[Tensor, Tensor]],
    size_range: tuple[float, float],
    max_cover: float,
    flip: float,
    generator: np.random.Generator,
    attempts: int = 10,
) -> tuple[Tensor, Tensor]:
    """The image with the pastes, and the pasted boxes."""
    image, (height, width) = image.clone(), image.shape[1:]
    truths = [box.tolist() for box in boxes]
    pasted: list[list[int]] = []
    for source, region in sources:
        x1, y1, x2, y2 = region.clamp(min=0).tolist()
        crop = source[:, floor(y1) : ceil(y2), floor(x1) : ceil(x2)]
        crop = crop.flip(2) if generator.random() < flip else crop
        root = sqrt(crop.shape[1] * crop.shape[2])
        largest = root * min(height / crop.shape[1], width / crop.shape[2])
        for _ in range(attempts):
            low, high = (log(min(bound, largest)) for bound in size_range)
            h, w = rounded(crop, exp(generator.uniform(low, high)) / root)
            h, w = min(h, height), min(w, width)
            top = int(generator.integers(height - h, endpoint=True))
            left = int(generator.integers(width - w, endpoint=True))
            place = [left, top, left + w, top + h]
            # every box, with what was pasted after it and what would be now
            boxes_with_later = [(box, pasted) for box in truths]
            boxes_with_later += [(box, pasted[i + 1 :]) for i, box in enumerate(pasted)]
            if all(
                sum(shared(box, other) for other in [*later, place]) <= max_cover * shared(box, box)
                for box, later in boxes_with_later
            ):
                image[:, top : top + h, left : left + w] = resize(crop, torch.zeros(0, 4), (h, w))[0]
                pasted.append(place)
                break
    return image, torch.tensor(pasted, dtype=torch.float32).reshape(-1, 4)


def shared(a: Sequence[float], b: Sequence[float]) -> float:
    """Area of the intersection of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
