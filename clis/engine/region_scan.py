"""``python -m clis regions CONFIG --scan``: at which image size does the detector find regions?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou

from clis.config import DETECTOR_RULES, Config, data_path
from clis.data.images import ImageError
from clis.data.loader import image_loader
from clis.engine.log import Progress, say
from clis.engine.regions import ImageOfRow, image_reader, load_searcher, read_boxes, region_rule
from clis.engine.streams import make_index, read_annotations

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
    """Prints what the region search of a config finds at each size, on images spread evenly over the index.

    The mean score of the labelled class needs no true boxes and is highest near the size where the boxes are
    best, so it says which `regions.short_side` to take.

    Args:
        detector: finds the regions; None is `regions.detector`.
        sizes: shorter sides in pixels; default `FRACTIONS` of the size at test.
        images: how many are looked at.
        boxes: a JSON file of true boxes, as `regions.boxes` takes it; adds the mean IoU with them.

    Raises:
        FileNotFoundError, ValueError: the detector or a file is missing or wrong; the rule needs no detector.
        ImageError: an image cannot be read.
    """
    if config.regions.rule not in DETECTOR_RULES:
        raise ValueError(f"regions.rule={config.regions.rule} needs no detector, so there is no size to find")
    index = make_index(config, read_annotations(data_path(config, config.data.train)))
    truth = None if boxes is None else read_boxes(boxes, index)
    model = load_searcher(config, device, detector)
    sizes = sorted(sizes) or [round(fraction * config.test.short_side) for fraction in FRACTIONS]
    rows = np.unique(np.linspace(0, len(index) - 1, min(images, len(index))).astype(int)).tolist()
    say(f"{len(rows)} of {len(index)} images; mean score of the labelled class by regions.short_side:")
    lines, scores = [], {}
    for size in sizes:
        max_size = round(size * config.regions.max_size / max(config.regions.short_side))
        regions = dataclasses.replace(config.regions, short_side=(size,), max_size=max_size)
        sized = dataclasses.replace(config, regions=regions)
        rule, found = region_rule(sized, index, model), {}
        began = time.monotonic()
        loader = image_loader(
            image_reader(sized, index), rows, config.regions.images_per_batch, config.data.workers
        )
        with Progress(f"short side {size}", len(rows)) as progress:
            for batch, loaded in loader:
                if bad := [image for image in loaded if not isinstance(image, ImageOfRow)]:
                    raise ImageError(bad[0])
                found |= dict(zip(batch, rule(batch, loaded)))
                progress.advance(len(batch))
        rate = len(rows) / (time.monotonic() - began)
        scores[size] = float(np.mean([score for _, score in found.values()]))
        cells = [str(size), str(max_size), f"{scores[size]:.4f}", f"{rate:.1f}"]
        if truth is not None:
            overlaps = [
                box_iou(box[None], truth[index.name(row)][None]).item()
                for row, (box, _) in found.items()
                if index.name(row) in truth
            ]
            cells += [f"{np.nanmean(overlaps):.3f}", f"{100 * np.mean(np.array(overlaps) > 0.5):.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    head = ["short_side", "max_size", "mean score", "images a second"]
    head += ["mean IoU", "% above 0.5"] if truth is not None else []
    best = max(scores, key=scores.__getitem__)
    say("\n".join(["| " + " | ".join(head) + " |", "|" + "--:|" * len(head), *lines]))
    say(f"the mean score is highest at regions.short_side={best}")
