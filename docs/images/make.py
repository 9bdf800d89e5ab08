"""Draws detections.png of the README: objects of rare classes, their truth, the baseline's and CLIS's boxes.

python docs/images/make.py runs/shapes/baseline runs/shapes/clis [key=value ...]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

import clis
from clis.config import data_path
from clis.config_files import load_config
from clis.data.annotations import Annotations
from clis.data.images import read_image
from clis.data.streams import read_annotations
from clis.drawing import Mark, draw_caption, draw_marks, picture_of, side_by_side
from clis.metric.analysis import find_errors
from clis.metric.detections import Detections
from clis.metric.matching import match
from clis.metric.verdicts import RIGHT, verdicts_of

COLUMNS, SIDE, SCORE = 5, 240, 0.5
GREEN, RED = (90, 200, 120), (235, 110, 70)


def rare_images(annotations: Annotations, count: int) -> list[int]:
    """The first images of `count` different rare classes, which hold few other objects."""
    rare = [label for label, category in enumerate(annotations.categories) if category.frequency == "r"]
    sizes = np.diff(annotations.offsets)
    chosen: list[int] = []
    for label in rare:
        rows = [row for row in range(len(annotations)) if label in annotations.labels_of(row)]
        rows = [row for row in sorted(rows, key=lambda row: (sizes[row], row)) if row not in chosen]
        chosen += rows[:1]
        if len(chosen) == count:
            break
    return chosen


def marks_of(annotations: Annotations, detections: Detections) -> dict[int, list[Mark]]:
    """Detections above SCORE by image id: solid and green if right, else dashed and red."""
    matches = match(annotations, detections)
    errors = find_errors(annotations, detections, matches)
    verdicts = verdicts_of(annotations, detections, matches, errors).verdicts
    names = {category.id: category.name for category in annotations.categories}
    marks: dict[int, list[Mark]] = defaultdict(list)
    for row in np.flatnonzero(detections.score >= SCORE):
        x, y, width, height = detections.bbox[row].tolist()
        right = verdicts[row] == RIGHT
        mark = Mark(
            box=(x, y, x + width, y + height),
            text=f"{names[int(detections.category_id[row])]} {detections.score[row]:.2f}",
            color=GREEN if right else RED,
            dashed=not right,
        )
        marks[int(detections.image_id[row])].append(mark)
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("baseline", type=Path)
    parser.add_argument("clis", type=Path)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. data.root=... if the data moved"
    )
    arguments = parser.parse_args()
    config = load_config(arguments.clis / "config.yaml", arguments.overrides)
    categories = clis.load_detector(arguments.clis / "checkpoints" / "last.pt").categories
    annotations = read_annotations(data_path(config, config.data.val))
    annotations = dataclasses.replace(annotations, categories=categories)  # with the frequency of training
    rows = rare_images(annotations, COLUMNS)
    truth = {
        int(annotations.image_ids[row]): [
            Mark(box=box, text=categories[label].name)
            for box, label in zip(annotations.boxes_of(row).tolist(), annotations.labels_of(row).tolist())
        ]
        for row in rows
    }
    found = [
        marks_of(annotations, Detections.load(run / "detections.npz"))
        for run in (arguments.baseline, arguments.clis)
    ]
    strips = []
    for name, marks in zip(("ground truth", "baseline", "CLIS"), (truth, *found)):
        pictures = []
        for row in rows:
            image = read_image(data_path(config, config.data.val_images) / str(annotations.file_names[row]))
            picture, scale = picture_of(image, smallest=2 * SIDE, largest=2 * SIDE)
            draw_marks(picture, marks[int(annotations.image_ids[row])], scale)
            pictures.append(picture)
        strips.append(draw_caption(side_by_side(pictures), name, 28))
    width, height = max(strip.width for strip in strips), sum(strip.height for strip in strips)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    sheet = sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)
    path = Path(__file__).parent / "detections.png"
    sheet.quantize(128).save(path, optimize=True)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
