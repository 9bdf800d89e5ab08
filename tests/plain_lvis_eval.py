"""The LVIS metric as one would explain it: slow loops over every class, image, threshold and detection."""

from __future__ import annotations

import numpy as np


def average_precision(data: dict, rows: list[dict], max_detections: int) -> list[float]:
    """AP of each class by ascending id, over 10 IoU thresholds and all areas; -1 is undefined."""
    kept = []
    for image in data["images"]:
        found = [row for row in rows if row["image_id"] == image["id"]]
        kept += sorted(found, key=lambda row: -row["score"])[:max_detections]  # stable: ties keep their order
    kept = [row for row in kept if row["bbox"][2] * row["bbox"][3] > 0]
    truths = [truth for truth in data["annotations"] if truth["area"] > 0]
    result = []
    for category in sorted(category["id"] for category in data["categories"]):
        values = []
        for threshold in np.linspace(0.5, 0.95, 10):
            outcomes, num_truth = [], 0
            for image in sorted(data["images"], key=lambda image: image["id"]):
                here = of_pair(truths, image["id"], category)
                num_truth += len(here)
                if here or category in image["neg_category_ids"]:
                    excused = category in image["not_exhaustive_category_ids"]
                    found = of_pair(kept, image["id"], category)
                    outcomes += match_image(here, found, threshold, excused)
            values.append(interpolated(outcomes, num_truth) if num_truth else -1.0)
        result.append(float(np.mean(values)))
    return result


def of_pair(records: list[dict], image_id: int, category_id: int) -> list[dict]:
    return [r for r in records if (r["image_id"], r["category_id"]) == (image_id, category_id)]


def match_image(
    truths: list[dict], rows: list[dict], threshold: float, excused: bool
) -> list[tuple[float, bool]]:
    """(score, right or wrong) of each detection that counts, best score first."""
    free, outcomes = list(truths), []
    for row in sorted(rows, key=lambda row: -row["score"]):
        best = None
        for truth in free:
            overlap = iou(row["bbox"], truth["bbox"])
            if overlap >= threshold and (best is None or overlap >= iou(row["bbox"], best["bbox"])):
                best = truth
        if best is not None:
            free.remove(best)
        right = best is not None and best["id"] != 0  # the package takes id 0 for no match
        if right or not excused:
            outcomes.append((row["score"], right))
    return outcomes


def interpolated(outcomes: list[tuple[float, bool]], num_truth: int) -> float:
    """Mean over 101 recalls of the best precision at that recall or a higher one."""
    points, right = [], 0
    for rank, (_, is_right) in enumerate(sorted(outcomes, key=lambda outcome: -outcome[0]), 1):
        right += is_right
        points.append((right / num_truth, right / rank))
    best = [
        max((precision for recall, precision in points if recall >= wanted), default=0.0)
        for wanted in np.linspace(0, 1, 101)
    ]
    return float(np.mean(best))


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)
