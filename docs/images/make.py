"""Draws detections.png of the README: objects of rare classes, their truth, the baseline's and CLIS's boxes.

python docs/images/make.py runs/shapes/baseline runs/shapes/clis [key=value ...]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

import clis
from clis.config import data_path
from clis.config_files import load_config
from clis.data.annotations import Annotations
from clis.data.images import read_image
from clis.data.streams import read_annotations
from clis.drawing import Mark, draw_caption, draw_marks, picture_of, side_by_side
from clis.models import CLISDetector

COLUMNS, SIDE, SCORE = 5, 240, 0.5
TRUTH, RIGHT, WRONG = (255, 255, 255), (90, 200, 120), (235, 110, 70)


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


def marks_of(
    detector: CLISDetector, image: Tensor, truth_boxes: list[list[float]], truth_labels: list[int]
) -> list[Mark]:
    """Detections above SCORE: solid green if class and place are right, else dashed and red."""
    (found,) = detector.detect(image)
    marks = []
    for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()):
        if score < SCORE:
            break
        right = any(
            label == other and overlap(box, boxes) >= 0.5 for boxes, other in zip(truth_boxes, truth_labels)
        )
        name = detector.categories[label].name
        marks.append(
            Mark(box=box, text=f"{name} {score:.2f}", color=RIGHT if right else WRONG, dashed=not right)
        )
    return marks


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


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
    detectors = [
        clis.load_detector(run / "checkpoints" / "last.pt") for run in (arguments.baseline, arguments.clis)
    ]
    categories = detectors[0].categories  # with the frequency of training
    annotations = read_annotations(data_path(config, config.data.val))
    annotations = dataclasses.replace(annotations, categories=categories)
    rows = {"ground truth": None, "baseline": detectors[0], "CLIS": detectors[1]}
    strips = []
    for name, detector in rows.items():
        pictures = []
        for row in rare_images(annotations, COLUMNS):
            image = read_image(data_path(config, config.data.val_images) / str(annotations.file_names[row]))
            boxes, labels = annotations.boxes_of(row).tolist(), annotations.labels_of(row).tolist()
            if detector is None:
                marks = [
                    Mark(box=box, text=categories[label].name, color=TRUTH)
                    for box, label in zip(boxes, labels)
                ]
            else:
                marks = marks_of(detector, image, boxes, labels)
            picture, scale = picture_of(image, smallest=2 * SIDE, largest=2 * SIDE)
            draw_marks(picture, marks, scale)
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
