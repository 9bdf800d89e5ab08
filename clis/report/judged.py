"""What the metric says of the runs: by class, by error, and box by box."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clis.data.annotations import Annotations
from clis.data.categories import Category
from clis.metric.analysis import (
    ErrorShares,
    ap_by_image_count,
    error_shares,
    find_errors,
    merge_small_bins,
)
from clis.metric.detections import Detections
from clis.metric.lvis_eval import Curves, accumulate
from clis.metric.matching import match
from clis.metric.verdicts import NOT_JUDGED, Verdicts, verdicts_of
from clis.report.packed import NONE, pack, pack_boxes, pack_scores, units_of

STAGES = 4
"""Of `judge`."""
FLOOR = 0.02
"""Detections with lower scores are not embedded."""
ROOM = 17_000_000
"""Bytes of a page for the detections and the fates of the ground truth, of all runs together."""
BOX_BYTES, TRUTH_BYTES = 20, 11
"""Of one detection and of one ground truth of one run, as base64."""
BOXES_OF_AN_IMAGE = 50
"""Maximum number of judged boxes per image and run, and of boxes that are not judged."""
LEAST_CLASSES = 3
"""Classes that a bin of AP against training images must have."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A run's detections, judged."""

    detections: Detections
    curves: Curves
    """Over all areas."""
    shares: ErrorShares
    verdicts: Verdicts
    rows: np.ndarray
    """int64 [D], image of each detection, its place in the annotations."""


def judge(
    annotations: Annotations, detections: Detections, limit: int, advance: Callable[[], None]
) -> Judged:
    """Match a run's detections, at most `limit` of an image, and find out what each is.

    Args:
        advance: called `STAGES` times on the way; of LVIS's size each takes seconds.

    Raises:
        ValueError: they are of other images.
    """
    matches = match(annotations, detections, limit)
    advance()
    errors = find_errors(annotations, detections, matches)
    advance()
    shares = error_shares(annotations, detections, matches, annotations.categories, errors)
    advance()
    order = np.argsort(annotations.image_ids, kind="stable")
    judged = Judged(
        detections=detections,
        curves=accumulate(matches, num_areas=1),
        shares=shares,
        verdicts=verdicts_of(annotations, detections, matches, errors),
        rows=order[np.searchsorted(annotations.image_ids[order], detections.image_id)],
    )
    advance()
    return judged


def count_bins(curves: Curves, categories: Sequence[Category]) -> list[tuple[int, int, int, float]]:
    """Compute AP by training images, as `ap_by_image_count`, in bins of at least `LEAST_CLASSES` classes."""
    bins = merge_small_bins(ap_by_image_count(curves, categories), LEAST_CLASSES)
    return [row for row in bins if row[2] >= LEAST_CLASSES]  # a data set may have fewer classes


def boxes_to_embed(runs: Sequence[Judged], num_images: int) -> tuple[list[np.ndarray], int]:
    """Choose the detections to embed, by image and falling score: int64 [n] of each run, within `ROOM`.

    Of an image and run, the highest scores from `FLOOR` on among what is judged, and as many of the rest.

    Returns:
        The rows, and how many of an image and run there may be.
    """
    ranked = [_ranked_boxes(run, num_images) for run in runs]
    truths = sum(len(run.verdicts.found) for run in runs)
    most = (ROOM - TRUTH_BYTES * truths) // BOX_BYTES
    counts = np.cumsum(sum(np.bincount(ranks, minlength=BOXES_OF_AN_IMAGE) for _, ranks in ranked))
    limit = max(1, int(np.searchsorted(counts, most, side="right")))
    chosen = []
    for run, (rows, ranks) in zip(runs, ranked):
        rows = rows[ranks < limit]
        chosen.append(rows[np.lexsort((-run.detections.score[rows], run.rows[rows]))])
    return chosen, limit


def _ranked_boxes(judged: Judged, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return detections and the rank of each in its image, among what is judged or what is not: int64 [n]."""
    rows = np.flatnonzero(judged.detections.score >= FLOOR)
    group = judged.rows[rows] + num_images * (judged.verdicts.verdicts[rows] == NOT_JUDGED)
    order = np.lexsort((-judged.detections.score[rows], group))
    rows, group = rows[order], group[order]
    ranks = np.arange(len(rows)) - np.searchsorted(group, group)
    kept = ranks < BOXES_OF_AN_IMAGE
    return rows[kept], ranks[kept]


def run_payload(judged: Judged, annotations: Annotations, rows: np.ndarray) -> dict[str, Any]:
    """Return what the page's script needs of one run's results; `rows` as in `boxes_to_embed`."""
    verdicts, images, found = judged.verdicts, judged.rows[rows], judged.detections
    category_ids = np.array([category.id for category in annotations.categories])
    labels = np.searchsorted(category_ids, found.category_id[rows])
    labels[category_ids[labels.clip(max=len(category_ids) - 1)] != found.category_id[rows]] = NONE
    truths = verdicts.truths[rows]
    precision = judged.curves.precision[..., 0]
    return {
        "ap": pack(judged.curves.class_ap(), "f4"),
        "ap50": pack(precision[0].mean(axis=0), "f4"),
        "recall50": pack(judged.curves.recall[0, :, 0], "f4"),
        "precision": pack((precision[0].T.clip(min=0) * 255).round(), "u1"),
        "bins": count_bins(judged.curves, annotations.categories),
        "errors": dataclasses.asdict(judged.shares),
        "truths": {
            "found": pack_scores(verdicts.found),
            "other": pack_scores(verdicts.other),
            "otherLabels": pack(np.where(verdicts.other_labels < 0, NONE, verdicts.other_labels), "u2"),
            "off": pack_scores(verdicts.off),
        },
        "boxes": {
            "offsets": pack(np.searchsorted(images, np.arange(len(annotations) + 1)), "u4"),
            "labels": pack(labels, "u2"),
            "scores": pack(units_of(found.score[rows]), "u2"),
            "verdicts": pack(verdicts.verdicts[rows], "u1"),
            "truths": pack(np.where(truths < 0, NONE, truths - annotations.offsets[images]), "u2"),
            "corners": pack_boxes(found.bbox[rows], annotations.image_sizes[images]),
        },
    }


def image_payload(annotations: Annotations, required: np.ndarray) -> dict[str, Any]:
    """Return the images and ground truth for the page's script; `required` as in `Verdicts`."""
    sizes = annotations.image_sizes
    return {
        "ids": list(map(str, annotations.image_ids.tolist())),  # JavaScript would round those above 2**53
        "files": [str(name) for name in annotations.file_names],
        "sizes": pack(sizes.clip(max=NONE), "u2"),
        "offsets": pack(annotations.offsets, "u4"),
        "labels": pack(annotations.labels, "u2"),
        "required": pack(required, "u1"),
        "corners": pack_boxes(annotations.bboxes, np.repeat(sizes, np.diff(annotations.offsets), axis=0)),
    }


def class_payload(annotations: Annotations, image_level: np.ndarray | None) -> dict[str, Any]:
    """Return the classes for the page's script: names, frequencies and counts in every stream.

    Args:
        image_level: int64 [C], image-level images of each class, if there is such a stream.
    """
    count = annotations.num_classes
    categories = annotations.categories
    return {
        "names": [category.name for category in categories],
        "frequencies": "".join(category.frequency for category in categories),
        "trainImages": [category.image_count for category in categories],
        "trainInstances": [category.instance_count for category in categories],
        "imageLevel": None if image_level is None else image_level.tolist(),
        "valImages": annotations.images_per_class().tolist(),
        "valInstances": np.bincount(annotations.labels, minlength=count).tolist(),
    }
