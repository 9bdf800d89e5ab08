"""Small pictures for the page: of the validation images with the worst mistakes, and of regions."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clis.data.annotated_images import open_annotated
from clis.data.annotations import Annotations
from clis.data.categories import Category
from clis.data.image_level import ImageLevelIndex
from clis.data.images import MAX_PIXELS, EncodedImage, ImageError, open_image
from clis.data.region_file import RegionSource, mean_scores
from clis.metric.verdicts import CLASS, LOCATION, NOTHING
from clis.progress import Progress
from clis.report.judged import Judged

SCORE = 0.3
"""The score from which on a mistake counts when pictures are chosen; where the page's slider starts."""
SIDE, REGION_SIDE = 320, 180
"""Longer side of a picture in pixels."""
PICTURE_BYTES = 6_000_000
"""Room in a page for pictures of validation images: about 450 photographs."""
MAX_UNREADABLE = 20
"""Images in a row, from the first, after which no more are tried: the folder is not there."""


def encode_small(image: EncodedImage, side: int) -> str:
    """Return an image as base64 of a JPEG whose longer side is at most this many pixels.

    Raises:
        ImageError: it cannot be decoded.
    """
    scale = min(1.0, side / max(image.size))
    height, width = (max(1, round(scale * length)) for length in image.size)
    pixels = image.decode_resized((height, width)).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=75, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def class_order(categories: Sequence[Category], ap: Sequence[np.ndarray]) -> np.ndarray:
    """Return labels, rare before common before frequent, within a group from the lowest AP of any run up.

    Args:
        ap: by run, float64 [C], -1 where a class has no ground truth; such classes come last in a group.
    """
    group = np.array(["rcf".index(category.frequency) for category in categories])
    worst = np.stack([np.where(each < 0, np.inf, each) for each in ap]).min(axis=0)
    counts = np.array([category.image_count for category in categories])
    return np.lexsort((counts, worst, group))


def worst_images(annotations: Annotations, runs: Sequence[Judged], count: int) -> list[int]:
    """Choose images for pictures, in turn by the most confident mistake and by the classes that fail.

    The latter goes through `class_order` again and again, and takes of each class an image in which one of
    its objects is not found with a score of `SCORE`, if there is one left.
    """
    worst = np.zeros(len(annotations))
    for run in runs:
        wrong = np.isin(run.verdicts.verdicts, (CLASS, LOCATION, NOTHING))
        np.maximum.at(worst, run.rows[wrong], run.detections.score[wrong])
    by_mistake = np.argsort(-worst, kind="stable").tolist()

    images = annotations.rows_of_boxes
    not_found = np.zeros(len(annotations.labels), np.int64)
    for run in runs:
        not_found += run.verdicts.required & (run.verdicts.found < SCORE)
    rank = np.argsort(class_order(annotations.categories, [run.curves.class_ap() for run in runs]))
    by_class = np.lexsort((-not_found, annotations.labels))
    labels = annotations.labels[by_class]
    turn = np.arange(len(labels)) - np.searchsorted(labels, labels)  # 0 for the first image of every class
    by_turn = images[by_class[np.lexsort((rank[labels], turn))]].tolist()

    chosen: dict[int, None] = {}
    for pair in itertools.zip_longest(by_mistake, by_turn):
        for image in pair:
            if image is not None and len(chosen) < count:
                chosen.setdefault(image)
    return list(chosen)


def read_pictures(
    annotations: Annotations,
    folder: Path,
    rows: Sequence[int],
    room: int | None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[dict[int, str], list[str]]:
    """Encode validation images; return them by place, and one sentence if some cannot be read.

    Args:
        room: bytes of base64 after which no more are read; None is no limit.
    """
    pictures: dict[int, str] = {}
    errors: list[str] = []
    used = 0
    by_count = room is None
    label, total = ("pictures", len(rows)) if room is None else ("pictures, kB", room // 1000)
    with Progress(label, total, at_most=True) as progress:
        for row in rows:
            try:
                picture = encode_small(open_annotated(annotations, folder, row, max_pixels), SIDE)
                used += len(picture)
                if room is not None and used > room:
                    break
                pictures[row] = picture
            except ImageError as error:
                errors.append(str(error))
                if len(errors) == MAX_UNREADABLE and not pictures:
                    break
            progress.advance(1 if by_count else used // 1000 - progress.done)
    if not errors:
        return pictures, []
    what = "Validation images cannot" if not pictures else f"{len(errors)} validation images cannot"
    return pictures, [f"{what} be used; pass data.root=FOLDER if they have moved. The first: {errors[0]}."]


def region_payload(
    index: ImageLevelIndex,
    regions: np.ndarray,
    categories: Sequence[Category],
    order: np.ndarray,
    count: int,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Return regions for the page's script: figures of every class, and pictures of some.

    A class has pictures of its lowest, its median and its highest score; classes come in `order` until there
    are `count` pictures.
    """
    labels, scores = np.asarray(index.labels), np.asarray(regions["score"], np.float64)
    total = np.bincount(labels, minlength=len(categories))
    means, by_rule = mean_scores(labels, regions, len(categories))

    by_score = np.lexsort((scores, labels))
    bounds = np.searchsorted(labels[by_score], np.arange(len(categories) + 1))
    shown: list[dict[str, Any]] = []
    with Progress("regions", count, at_most=True) as progress:
        for label in order.tolist():
            own = by_score[bounds[label] : bounds[label + 1]]
            for row in dict.fromkeys(own[[0, len(own) // 2, -1]].tolist() if len(own) else []):
                picture = _region_picture(index, regions[row], row, max_pixels)
                if len(shown) < count and picture is not None:
                    shown.append({"label": label, **picture})
                    progress.advance()
            if len(shown) >= count:
                break
    return {
        "means": [round(value, 4) for value in means.tolist()],
        "fallbacks": (total - by_rule).tolist(),
        "shown": shown,
    }


def _region_picture(
    index: ImageLevelIndex, region: np.void, row: int, max_pixels: int
) -> dict[str, Any] | None:
    """Return one region with its image, or None where the image cannot be read."""
    try:
        image = open_image(index.read(row), index.name(row), max_pixels)
        height, width = image.size
        picture = encode_small(image, REGION_SIDE)
    except ImageError:
        return None
    x1, y1, x2, y2 = (float(value) for value in region["box"])
    return {
        "name": index.name(row),
        "score": round(float(region["score"]), 4),
        "source": RegionSource(int(region["source"])).name.lower(),
        "box": [round(value, 4) for value in (x1 / width, y1 / height, x2 / width, y2 / height)],
        "ratio": round(width / height, 4),
        "picture": picture,
    }
