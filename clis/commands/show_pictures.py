"""What a training step sees, as pictures: images with pasted pairs, mosaics, and regions of a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from clis.data.categories import Category
from clis.data.image_level import ImageLevelIndex
from clis.data.images import MAX_PIXELS, ImageError, open_image
from clis.data.loader import Explained
from clis.data.mosaic import Placement
from clis.data.region_file import RegionSource
from clis.drawing import GRAY, Mark, class_color, draw_caption, draw_marks, picture_of, side_by_side
from clis.resize import image_size, scale_boxes

YELLOW = (255, 225, 0)
PICTURE = (900, 1400)
"""Smallest and largest longest side, in pixels, of an image or a mosaic."""
TILE, CAPTION = 260, 20
"""Longest side of an image in the row of a class, and size of the text below it, in pixels."""


@dataclass(frozen=True)
class Streams:
    """What the pictures name and color."""

    categories: Sequence[Category]
    index: ImageLevelIndex | None
    regions: np.ndarray | None
    """`REGION_DTYPE` [n]; None where the regions are not known yet."""
    scored: bool
    """Whether the regions' scores tell them apart."""
    max_pixels: int = MAX_PIXELS


def draw_image(explained: Explained, streams: Streams) -> Image.Image:
    """Draw the instance-level image with its boxes; pasted ones are dashed and named by their pair."""
    sample, names = explained.sample, [category.name for category in streams.categories]
    picture, scale = picture_of(sample.image, *PICTURE)
    num_pasted = len(sample.pair_boxes)
    num_truths = len(sample.boxes) - num_pasted
    marks = [
        Mark(
            box=box,
            text=names[label]
            if place < num_truths
            else f"pair {place - num_truths + 1}: {names[label]} (pasted)",
            color=class_color(label),
            dashed=place >= num_truths,
        )
        for place, (box, label) in enumerate(zip(sample.boxes.tolist(), sample.labels.tolist()))
    ]
    draw_marks(picture, marks[::-1], scale)  # the pasted ones on top, as their pixels are
    return picture


def draw_mosaics(explained: Explained, streams: Streams) -> list[Image.Image]:
    """Draw the mosaics: regions with their scores, dashed where they are half of a pair, and cutouts.

    Regions that are too small after clipping, and so are not trained on, are gray and say so. Where the
    regions are not known yet, the images' own borders are drawn instead.
    """
    plan, pictures = explained.plan, []
    pair_of = {place: number for number, (place, _) in enumerate(plan.pastes, 1)}
    for number, mosaic in enumerate(explained.sample.mosaics):
        picture, scale = picture_of(mosaic, *PICTURE)
        marks, cutouts = [], []
        for place in range(4 * number, 4 * number + 4):
            placement, tile = plan.placements[place], mosaic.shape[-1] // 2
            if streams.regions is None:
                box = _on_canvas((0, 0, placement.size[1], placement.size[0]), placement, place % 4, tile)
            else:
                box = tuple(plan.regions[place].tolist())
            marks.append(_region_mark(explained, streams, place, box, pair_of.get(place)))
            if placement.cutout is not None:
                box = _on_canvas(placement.cutout, placement, place % 4, tile)
                if box[2] > box[0] and box[3] > box[1]:
                    cutouts.append(Mark(box=box, text="cutout", color=GRAY, dashed=True))
        draw_marks(picture, [*marks, *cutouts], scale)
        pictures.append(picture)
    return pictures


def _region_mark(
    explained: Explained, streams: Streams, place: int, box: Sequence[float], pair: int | None
) -> Mark:
    assert streams.index is not None  # there are mosaics
    row = int(explained.source_rows[place])
    label = int(streams.index.labels[row])
    text, color = streams.categories[label].name, class_color(label)
    if streams.regions is None:
        return Mark(box=box, text=text, color=color, dashed=True)
    text += score_text(streams, row)
    if not explained.plan.kept[place]:
        return Mark(box=box, text=f"{text}: too small, left out", color=GRAY)
    if pair is not None:
        text = f"pair {pair}: {text}"
    return Mark(box=box, text=text, color=color, dashed=pair is not None)


def score_text(streams: Streams, row: int) -> str:
    """Return what follows a region's class in its caption: the score, and whether it is a fallback."""
    assert streams.regions is not None
    region = streams.regions[row]
    score = f" {format_score(region['score'])}" if streams.scored else ""
    return score + (" (fallback)" if region["source"] == RegionSource.FALLBACK else "")


def format_score(score: float) -> str:
    """Format a score; those of rare classes are small, and get a third digit."""
    if score < 0.0005:
        return "<0.001"
    return f"{score:.2f}" if score >= 0.095 else f"{score:.3f}"


def _on_canvas(
    box: Sequence[float], placement: Placement, index: int, tile: int
) -> tuple[float, float, float, float]:
    """Move a box of a placed image, xyxy in its pixels, to the canvas, clipped to its tile."""
    x, y = tile * (index % 2), tile * (index // 2)
    x1, y1, x2, y2 = (
        min(max(side + start, 0), tile)
        for side, start in zip(box, (placement.left, placement.top, placement.left, placement.top))
    )
    return x + x1, y + y1, x + x2, y + y2


def class_rows(
    own: np.ndarray, scores: np.ndarray, count: int, generator: np.random.Generator
) -> dict[str, list[int]]:
    """Choose rows of a class: those with the lowest and highest scores, and others between them at random.

    Args:
        own: int64 [n], its rows of the index.
        scores: [n], their regions' scores.
        count: the most rows of each kind; a class with fewer images has none twice.
    """
    ranked = own[np.argsort(scores, kind="stable")]
    each = min(count, (len(ranked) + 2) // 3)
    lowest, highest = ranked[:each], ranked[max(each, len(ranked) - each) :]
    between = ranked[each : len(ranked) - len(highest)]
    chosen = np.sort(generator.permutation(len(between))[:count])
    kinds = {"lowest": lowest, "random": between[chosen], "highest": highest}
    return {kind: rows.tolist() for kind, rows in kinds.items()}


def draw_class(rows: dict[str, list[int]], streams: Streams) -> Image.Image:
    """Draw image-level images of a class with their regions in a row, each with its kind and score."""
    kinds = [(kind, row) for kind, places in rows.items() for row in places]
    return side_by_side([_draw_tile(kind, row, streams) for kind, row in kinds])


def _draw_tile(kind: str, row: int, streams: Streams) -> Image.Image:
    assert streams.index is not None  # there are regions
    assert streams.regions is not None
    region = streams.regions[row]
    try:
        image = open_image(streams.index.read(row), streams.index.name(row), streams.max_pixels)
        pixels, _ = image.decode_reduced((TILE, TILE))
    except ImageError:
        return draw_caption(Image.new("RGB", (TILE, TILE), GRAY), "unreadable", CAPTION, lines=2)
    picture, scale = picture_of(pixels, TILE, TILE)
    text = kind
    if region["source"] != RegionSource.UNREADABLE:
        box = scale_boxes(torch.tensor(region["box"]), image.size, image_size(pixels))
        draw_marks(picture, [Mark(box=box.tolist(), color=YELLOW)], scale, width=4)
        share = _area(region["box"]) / (image.size[0] * image.size[1])
        text = f"{kind}{score_text(streams, row)}".strip() + f"\n{100 * share:.0f} % of the image"
    return draw_caption(picture, text, CAPTION, lines=2)


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
