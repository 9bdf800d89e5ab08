"""``python -m clis regions CONFIG --scan``: at which image size does the detector find regions?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from clis.config import DETECTOR_RULES, Config, data_path
from clis.data.image_level import ImageLevelIndex
from clis.data.images import ImageError
from clis.data.region_file import REGION_DTYPE, RegionSource
from clis.data.streams import make_index, read_annotations
from clis.engine.bad_images import check_bad_images
from clis.engine.region_search import (
    image_key,
    load_searcher,
    read_boxes,
    region_rule,
    regions_of,
    search_batches,
)
from clis.models import CLISDetector
from clis.progress import Progress, say
from clis.text import markdown_table

FRACTIONS = (0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.25)
"""Of `test.short_side`: the sizes that are tried where none are named."""


def scan_sizes(
    config: Config,
    device: torch.device,
    detector: Config | None = None,
    *,
    sizes: Sequence[int] = (),
    images: int = 500,
    boxes: Path | None = None,
) -> None:
    """Print what the region search of a config finds at each size, on images spread evenly over the index.

    The mean score needs no true boxes. On the embedded benchmark (two data seeds) it was highest at 64
    pixels, where the mean IoU with the true boxes was within 0.03 of its best. Nothing else was measured.

    Args:
        detector: finds the regions; None is `regions.detector`.
        sizes: shorter sides in pixels; default `FRACTIONS` of the size at test.
        images: how many are looked at.
        boxes: a JSON file of true boxes, as `regions.boxes` takes it; adds the mean IoU with them.

    Raises:
        FileNotFoundError, ValueError: the detector or a file is missing or wrong; the rule needs no detector.
        ImageError: more images than `data.max_bad_images` cannot be read.
    """
    if config.regions.rule not in DETECTOR_RULES:
        raise ValueError(f"regions.rule={config.regions.rule} needs no detector, so there is no size to find")
    index = make_index(config, read_annotations(data_path(config, config.data.train)))
    rows = np.unique(np.linspace(0, len(index) - 1, min(images, len(index))).astype(int)).tolist()
    truth = None if boxes is None else read_boxes(boxes, index)
    if truth is not None and not any(image_key(index.location(row)) in truth for row in rows):
        raise ValueError(f"{boxes}: no box of the {len(rows)} images that are looked at; raise --images")
    model = load_searcher(config, device, detector)
    sizes = sorted(sizes) or [round(fraction * config.test.short_side) for fraction in FRACTIONS]
    say(f"{len(rows)} of {len(index)} images, by {config.regions.rule}:")
    lines, scores = [], {}
    for size in sizes:
        max_size = round(size * config.regions.max_size / max(config.regions.short_side))
        section = dataclasses.replace(config.regions, short_side=(size,), max_size=max_size)
        began = time.monotonic()
        rows, found = _search(dataclasses.replace(config, regions=section), index, rows, model)
        rate = len(rows) / (time.monotonic() - began)
        scores[size, max_size] = float(found["score"].mean())
        cells = [str(size), str(max_size), f"{found['score'].mean():.4f}", f"{rate:.1f}"]
        if truth is not None:
            overlaps = _overlaps(found["box"], [image_key(index.location(row)) for row in rows], truth)
            cells += [f"{overlaps.mean():.3f}", f"{100 * (overlaps > 0.5).mean():.1f}"]
        lines.append(cells)
    head = ["short_side", "max_size", "mean score", "images a second"]
    head += ["mean IoU", "% above 0.5"] if truth is not None else []
    say(markdown_table(head, lines))
    size, max_size = max(scores, key=scores.__getitem__)
    say(f"the mean score is highest with regions.short_side={size} regions.max_size={max_size}")


def _search(
    config: Config, index: ImageLevelIndex, rows: Sequence[int], detector: CLISDetector
) -> tuple[list[int], np.ndarray]:
    """Find the regions of the rows, `REGION_DTYPE` [n], as the search of the config makes them.

    Returns:
        The rows whose images can be read, in order, and their regions.

    Raises:
        ImageError: more images than `data.max_bad_images` cannot be read, or all.
    """
    place = {row: number for number, row in enumerate(rows)}
    found, rule = np.zeros(len(rows), dtype=REGION_DTYPE), region_rule(config, index, detector)
    unreadable: list[str] = []
    with Progress(f"short side {config.regions.short_side[0]}", len(rows)) as progress:
        for some, images in search_batches(config, index, rows, detector):
            unreadable += [image for image in images if isinstance(image, str)]
            check_bad_images(unreadable, config.data.max_bad_images)
            found[[place[row] for row in some]] = regions_of(some, images, rule)
            progress.advance(len(some))
    for message in unreadable:
        say(f"left out: {message}")
    if len(unreadable) == len(rows):
        raise ImageError(f"none of the {len(rows)} images can be read; the last: {unreadable[-1]}")
    read = np.flatnonzero(found["source"] != RegionSource.UNREADABLE)
    return [rows[number] for number in read.tolist()], found[read]


def _overlaps(boxes: np.ndarray, names: Sequence[str], truth: Mapping[str, Tensor]) -> np.ndarray:
    """Return the IoU of each box [4] with the true one of its image, where there is one."""
    pairs = [(torch.from_numpy(box), truth[name]) for box, name in zip(boxes, names) if name in truth]
    return np.array([box_iou(box[None], true[None]).item() for box, true in pairs])
