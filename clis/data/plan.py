"""The random choices for a sample, all drawn from sizes and boxes before any pixel is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clis.config import DataConfig
from clis.data.mosaic import Placement, plan_mosaic
from clis.data.pasting import Paste, plan_pastes
from clis.data.transforms import flip_boxes
from clis.resize import scale_boxes, shortest_size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How an instance-level image and its s image-level images become a sample."""

    size: tuple[int, int]
    """Height and width that the instance-level image is resized to."""
    flipped: bool
    boxes: Tensor
    """float32 [G,4] xyxy, the ground truth in the resized and flipped image."""
    placements: list[Placement]
    """s of them, four per mosaic."""
    regions: Tensor
    """float32 [s,4] xyxy in pixels of their mosaic."""
    kept: Tensor
    """bool [s], whether enough of the region is left."""
    pastes: list[tuple[int, Paste]]
    """At most t: place among the s, and how its region is pasted; in the order in which they are drawn."""


def plan_sample(
    data: DataConfig,
    t: int,
    size: tuple[int, int],
    boxes: Tensor,
    source_sizes: Sequence[tuple[int, int]],
    source_regions: Tensor,
    generator: np.random.Generator,
) -> Plan:
    """Draw a plan for images of these sizes.

    Args:
        t: how many regions are pasted at most, of those that are kept in their mosaics.
        size: height and width of the instance-level image, as stored.
        boxes: float32 [G,4] xyxy in its pixels.
        source_sizes: height and width of the s image-level images, as stored; s is a multiple of 4.
        source_regions: float32 [s,4] xyxy in their pixels.
    """
    resized = shortest_size(size, int(generator.choice(data.short_sides)), data.max_size)
    boxes = scale_boxes(boxes, size, resized)
    flipped = bool(generator.random() < data.flip)
    boxes = flip_boxes(boxes, resized[1]) if flipped else boxes

    placements, regions, insides = [], [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.bool)]
    for first in range(0, len(source_sizes), 4):
        four, moved, inside = plan_mosaic(
            source_sizes[first : first + 4], source_regions[first : first + 4], data, generator
        )
        placements += four
        regions.append(moved)
        insides.append(inside)
    kept = torch.cat(insides)

    chosen = generator.permutation(np.flatnonzero(kept.numpy()))[:t].tolist()
    sources = [(source_sizes[place], source_regions[place]) for place in chosen]
    pastes = plan_pastes(resized, boxes, sources, data, generator)
    return Plan(
        size=resized,
        flipped=flipped,
        boxes=boxes,
        placements=placements,
        regions=torch.cat(regions),
        kept=kept,
        pastes=[(chosen[index], paste) for index, paste in pastes],
    )
