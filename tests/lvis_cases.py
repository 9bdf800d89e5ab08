"""Data sets for the tests of the metric: made by hand, random, and packed as the loader packs them."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as rle

from clis.data.annotations import Annotations, pack_annotations
from clis.metric.detections import Detections


def annotations_of(data: dict) -> Annotations:
    """The loader's arrays of an LVIS-form or COCO-form dict."""
    return pack_annotations(data, "hand_made.json")


def detections_of(rows: list[dict]) -> Detections:
    return Detections(
        image_id=np.array([r["image_id"] for r in rows], np.int64),
        category_id=np.array([r["category_id"] for r in rows], np.int64),
        bbox=np.array([r["bbox"] for r in rows], np.float64).reshape(-1, 4),
        score=np.array([r["score"] for r in rows], np.float64),
    )


def image_record(image_id: int, **lists: list[int]) -> dict:
    return {"id": image_id, "file_name": f"{image_id}.jpg", "width": 400, "height": 400, **lists}


def random_case(rng: np.random.Generator, federated: bool) -> tuple[dict, list[dict]]:
    """A small data set with its detections: whole-number boxes and few score levels, so that ties abound."""
    image_ids = rng.choice(np.arange(1, 50), rng.integers(1, 7), replace=False).tolist()  # in no order
    class_ids = rng.choice(np.arange(1, 20), rng.integers(1, 6), replace=False).tolist()
    images = [image_record(image_id) for image_id in image_ids]
    for image in images if federated else []:
        image["neg_category_ids"] = [c for c in class_ids if rng.random() < 0.4]
        image["not_exhaustive_category_ids"] = [c for c in class_ids if rng.random() < 0.3]
    pairs = [(image_id, class_id) for image_id in image_ids for class_id in class_ids]
    truth = [
        {"image_id": i, "category_id": c, **random_truth(rng), "iscrowd": int(rng.random() < 0.2)}
        for i, c in pairs
        for _ in range(rng.choice([0, 0, 1, 2, 5]))
    ]
    truth = truth or [
        {"image_id": image_ids[0], "category_id": class_ids[0], **random_truth(rng), "iscrowd": 0}
    ]
    rng.shuffle(truth)
    for number, annotation in enumerate(truth):
        annotation["id"] = number  # one of them is 0
        if federated:
            del annotation["iscrowd"]
    detections = [random_detection(rng, truth, pairs) for _ in range(rng.integers(1, 120))]
    frequencies = rng.choice(["r", "c", "f"], len(class_ids)).tolist()
    categories = [{"id": c, "name": f"c{c}", "frequency": f} for c, f in zip(class_ids, frequencies)]
    return {"images": images, "annotations": truth, "categories": categories}, detections


def random_truth(rng: np.random.Generator) -> dict:
    size = rng.choice([8, 32, 40, 96, 120]) + rng.integers(-3, 4, 2) * rng.integers(0, 2)
    size[0] *= rng.random() > 0.08  # no area
    area = size.prod() * rng.choice([1.0, 1.0, 0.6])  # LVIS has the mask's area; 32 x 32 is on a border
    return {
        "bbox": [*rng.integers(0, 30, 2).astype(float).tolist(), *size.astype(float).tolist()],
        "area": area,
    }


def random_detection(rng: np.random.Generator, truth: list[dict], pairs: list[tuple[int, int]]) -> dict:
    image_id, category_id = pairs[rng.integers(len(pairs))]
    box = random_truth(rng)["bbox"]
    if truth and rng.random() < 0.8:
        near = truth[rng.integers(len(truth))]
        image_id, category_id = near["image_id"], near["category_id"]
        jitter = rng.integers(-4, 5, 4) * (rng.random() < 0.7)
        box = (np.array(near["bbox"]) + jitter).clip(min=0).tolist()
    score = float(rng.integers(0, 12)) / 11
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def with_masks(data: dict, rows: list[dict], rng: np.random.Generator, keep_boxes: bool) -> None:
    """Gives every annotation a polygon or an RLE near its box, and every detection an RLE."""
    for record in [*data["annotations"], *rows]:
        x, y, w, h = record["bbox"]
        cut = rng.choice([0.0, 0.5])
        polygon = [[x, y, x + max(w, 1), y, x + max(w, 1), y + max(h, 1), x + cut * w, y + max(h, 1)]]
        mask = rle.merge(rle.frPyObjects(polygon, 400, 400))
        mask["counts"] = mask["counts"].decode()
        record["segmentation"] = mask if "score" in record or rng.random() < 0.3 else polygon
    for row in rows:
        if not keep_boxes:
            del row["bbox"]


def hand_made(**image_lists: list[int]) -> dict:
    """Class 1 with three boxes in images 10 and 20, and class 2 with none anywhere."""
    boxes = [(10, [0, 0, 100, 100]), (10, [200, 0, 100, 100]), (20, [0, 0, 100, 100])]
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": [], **image_lists}
    return {
        "images": [image_record(image_id, **lists) for image_id in (10, 20, 30)],
        "categories": [
            {"id": 1, "name": "cat", "frequency": "r", "image_count": 5},
            {"id": 2, "name": "dog", "frequency": "c", "image_count": 50},
        ],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": 1, "bbox": box, "area": 100 * 100}
            for i, (image, box) in enumerate(boxes)
        ],
    }


HAND_MADE_DETECTIONS = [
    {"image_id": 10, "category_id": 1, "bbox": [0, 0, 100, 100], "score": 0.9},  # IoU 1
    {"image_id": 10, "category_id": 1, "bbox": [300, 300, 100, 100], "score": 0.8},  # hits nothing
    {"image_id": 20, "category_id": 1, "bbox": [0, 0, 100, 62], "score": 0.7},  # IoU 0.62
]
