"""The LVIS metric: from annotations and detections as arrays to average precision, in NumPy alone.

The numbers equal those of the `lvis` package (Gupta et al., LVIS, CVPR 2019), which follows pycocotools.
Shapes: T IoU thresholds, R recall points, C classes, A area ranges, N images.

`matching` determines what each detection is. Average precision then needs only the true positives, with
the number of false positives before each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clis.data.annotations import Annotations, load_annotations, pack_annotations
from clis.data.categories import Category
from clis.metric.detections import Detections
from clis.metric.masks import ground_truth_masks
from clis.metric.matching import (
    AREA_RANGES,
    FIXED_LIMIT,
    IN_ALL_RANGES,
    IOU_THRESHOLDS,
    RANGE_BITS,
    SETTING_BITS,
    A,
    Matches,
    Protocol,
    T,
    match,
)
from clis.text import markdown_table

RECALLS = np.linspace(0.0, 1.0, 101)
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300")


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Precision and recall of every class, -1 where a class has no ground truth in an area range."""

    precision: np.ndarray
    """float64 [T, R, C, A] in [0, 1] or -1: the highest precision at a recall of at least `RECALLS`."""
    recall: np.ndarray
    """float64 [T, C, A] in [0, 1] or -1: with all detections counted."""

    def mean_precision(self) -> np.ndarray:
        """Precision averaged over the recalls: float64 [T, C, A], -1 where undefined."""
        return self.precision.mean(axis=1)

    def class_ap(self) -> np.ndarray:
        """AP of each class over all areas, float64 [C], -1 where the class has no ground truth."""
        return self.precision[..., 0].mean(axis=(0, 1))


def evaluate(
    ground_truth: str | Path | Mapping[str, Any] | Annotations,
    detections: str | Path | list[dict[str, Any]] | Detections,
    iou_type: Literal["bbox", "segm"] = "bbox",
    *,
    max_detections: int = 300,
    protocol: Protocol = "standard",
) -> dict[str, float]:
    """Compute the LVIS figures of a split as fractions, under the `lvis` package's names; -1 where undefined.

    AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR@300, ARs@300, ARm@300, ARl@300 (300 is `max_detections`).
    The fixed and the pooled protocol (Dave et al., arXiv 2102.01066) keep `FIXED_LIMIT` detections per class
    instead of 300 per image, and their names begin with ``fixed_`` and ``pooled_``; pooled AP ranks the
    detections of all classes together and has no AP by area and no AR.

    Args:
        ground_truth: an annotation file of LVIS or COCO form, its loaded JSON, or `Annotations`.
        detections: a file that `Detections.load` reads, a loaded LVIS result list, or `Detections`.
        iou_type: "segm" compares masks; both arguments must then have them, so `Annotations` cannot be used.

    Raises:
        ValueError: bad input; the message names it.
        FileNotFoundError: there is no such file.
    """
    matches, annotations = load_and_match(ground_truth, detections, iou_type, max_detections, protocol)
    return summarize(matches, annotations.categories, max_detections, protocol)


def load_and_match(
    ground_truth: str | Path | Mapping[str, Any] | Annotations,
    detections: str | Path | list[dict[str, Any]] | Detections,
    iou_type: Literal["bbox", "segm"] = "bbox",
    max_detections: int = 300,
    protocol: Protocol = "standard",
) -> tuple[Matches, Annotations]:
    """Return the matches that `evaluate` summarizes, for further analysis, and the annotations.

    The arguments are those of `evaluate`.
    """
    if iou_type not in ("bbox", "segm"):
        raise ValueError(f"iou_type is {iou_type!r}; it must be bbox or segm")
    segm = iou_type == "segm"
    truth_masks = None
    if segm:
        if isinstance(ground_truth, Annotations):
            raise ValueError(
                "iou_type segm needs the annotation file or its loaded JSON: Annotations are boxes"
            )
        annotations, truth_masks = ground_truth_masks(ground_truth)
    else:
        annotations = _annotations(ground_truth)
    if isinstance(detections, str | Path):
        detections = Detections.load(detections, masks=segm)
    elif not isinstance(detections, Detections):
        detections = Detections.from_records(detections, masks=segm)
    if segm and detections.masks is None:
        raise ValueError("iou_type segm needs detections with masks: Detections.load(path, masks=True)")
    return match(annotations, detections, max_detections, protocol, truth_masks), annotations


def _annotations(ground_truth: str | Path | Mapping[str, Any] | Annotations) -> Annotations:
    if isinstance(ground_truth, Annotations):
        return ground_truth
    if isinstance(ground_truth, Mapping):
        return pack_annotations(ground_truth, "ground truth")
    if isinstance(ground_truth, str | Path):
        return load_annotations(ground_truth)
    raise ValueError(
        f"ground_truth is a {type(ground_truth).__name__}; it must be an annotation file, its loaded JSON (a "
        "mapping) or Annotations, and comes before the detections"
    )


def accumulate(matches: Matches, image_weights: np.ndarray | None = None, num_areas: int = A) -> Curves:
    """Trace precision over recall of every class.

    Args:
        image_weights: int64 [N] by rank of the image id: how often each image counts; default once.
        num_areas: how many of `AREA_RANGES`, from the first.
    """
    shape = (num_areas, T, matches.num_classes)
    precision, recall = np.full((*shape, len(RECALLS)), -1.0), np.full(shape, -1.0)
    weights = None if image_weights is None else image_weights[matches.images]
    truth_weights = None if image_weights is None else image_weights[matches.truth_images]
    bounds = np.searchsorted(matches.labels, np.arange(matches.num_classes + 1))
    false_positive = SETTING_BITS & ~(matches.true_positive | matches.ignored)
    # Most detections are false, or ignored, at all thresholds alike: these are counted once per area range.
    steady = (false_positive & IN_ALL_RANGES) * RANGE_BITS == false_positive
    steady &= matches.true_positive == 0
    moving = np.flatnonzero(~steady)
    moving_bounds = np.searchsorted(moving, bounds)
    moving_weights = None if weights is None else weights[moving]
    true_bits, false_bits = matches.true_positive[moving], false_positive[moving]
    for a in range(num_areas):
        counts = matches.truth_counts[:, a]
        num_truth = np.bincount(
            matches.truth_labels[counts],
            None if truth_weights is None else truth_weights[counts],
            matches.num_classes,
        ).astype(np.int64)
        defined = np.flatnonzero(num_truth)
        num_truth = num_truth[defined]
        steady_false = _running_sum(steady & ((false_positive & (1 << (a * T))) != 0), weights)
        in_front = steady_false[moving] - np.repeat(steady_false[bounds[:-1]], np.diff(moving_bounds))
        needed = _needed(num_truth)
        for t in range(T):
            bit = 1 << (a * T + t)
            hits = np.flatnonzero(true_bits & bit)
            if moving_weights is not None:
                hits = hits[moving_weights[hits] > 0]
            num_false = _running_sum((false_bits & bit) != 0, moving_weights)
            starts, ends = moving_bounds[defined], moving_bounds[defined + 1]
            curves = _curves(hits, moving_weights, num_false, in_front, starts, ends, needed)
            precision[a, t, defined], recall[a, t, defined] = curves[0], curves[1] / num_truth
    return Curves(precision=precision.transpose(1, 3, 2, 0), recall=recall.transpose(1, 2, 0))


def summarize(
    matches: Matches,
    categories: Sequence[Category],
    max_detections: int = 300,
    protocol: Protocol = "standard",
    image_weights: np.ndarray | None = None,
    num_areas: int = A,
) -> dict[str, float]:
    """Average the figures of `evaluate` over what is defined; fewer `num_areas` leave out those by area.

    `image_weights` as in `accumulate`.
    """
    frequency = np.array([category.frequency for category in categories])
    if protocol == "pooled":
        groups = {"": np.zeros(len(frequency), np.int64)}
        groups |= {group: np.where(frequency == group, 0, -1) for group in "rcf"}
        curves = {
            group: accumulate(matches.with_labels(labels), image_weights, 1)
            for group, labels in groups.items()
        }
        pooled = {group: each.mean_precision() for group, each in curves.items()}
        metrics = _by_threshold(pooled[""]) | {f"AP{group}": pooled[group] for group in "rcf"}
    else:
        split = accumulate(matches, image_weights, num_areas)
        areas = {name[0]: index for index, name in enumerate(AREA_RANGES) if 0 < index < num_areas}
        precision, recall = split.mean_precision(), split.recall
        metrics = {
            **_by_threshold(precision),
            **{f"AP{letter}": precision[..., index] for letter, index in areas.items()},
            **{f"AP{group}": precision[:, frequency == group, 0] for group in "rcf"},
        }
        limit = max_detections if protocol == "standard" else FIXED_LIMIT
        metrics[f"AR@{limit}"] = recall[..., 0]
        metrics |= {f"AR{letter}@{limit}": recall[..., index] for letter, index in areas.items()}
    prefix = "" if protocol == "standard" else f"{protocol}_"
    return {prefix + name: defined_mean(values) for name, values in metrics.items()}


def _by_threshold(precision: np.ndarray) -> dict[str, np.ndarray]:
    """Return the AP, AP50 and AP75 parts of precision [T, C, A] over all areas."""
    return {
        "AP": precision[..., 0],
        "AP50": precision[IOU_THRESHOLDS == 0.5, :, 0],
        "AP75": precision[IOU_THRESHOLDS == 0.75, :, 0],
    }


def defined_mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not -1, or -1 if there are none."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


# --- precision over recall ---


def _needed(num_truth: np.ndarray) -> np.ndarray:
    """Return the fewest truths n whose share, n / num_truth as a float, reaches each recall: int64 [C, R]."""
    total = np.maximum(num_truth, 1)[:, None]
    needed = np.ceil(RECALLS * total).astype(np.int64)
    needed -= (needed > 0) & ((needed - 1) / total >= RECALLS)
    needed += needed / total < RECALLS
    return needed


def _running_sum(counted: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the weight of what is True before each place: int64 [D + 1]."""
    sums = np.zeros(len(counted) + 1, np.int64)
    np.cumsum(counted if weights is None else counted * weights, out=sums[1:])
    return sums


def _curves(
    hits: np.ndarray,
    weights: np.ndarray | None,
    num_false: np.ndarray,
    in_front: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    needed: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision [C, R] and the number of true positives [C] of the classes at one setting.

    Args:
        hits: the places of the true positives, ascending; class c has the places starts[c]:ends[c].
        num_false: the false positives before each place, over all classes.
        in_front: further ones before each place, of its class.
        needed: the true positives that reach each recall, [C, R].
    """
    num_true = _running_sum(np.ones(len(hits), bool), None if weights is None else weights[hits])
    first, last = np.searchsorted(hits, starts), np.searchsorted(hits, ends)
    num_hits = last - first
    true = num_true[1:] - np.repeat(num_true[first], num_hits)
    false = num_false[hits] - np.repeat(num_false[starts], num_hits) + in_front[hits]
    precision = true / (false + true + np.spacing(1))

    # The first true positive at which each recall is reached; after the class's last one, it never is.
    reached = np.searchsorted(num_true[1:], num_true[first, None] + needed)
    reached = reached.clip(first[:, None], last[:, None])
    best = np.maximum.reduceat(np.append(precision, 0.0), reached.ravel()).reshape(reached.shape)
    best[reached == last[:, None]] = 0.0
    return np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1], num_true[last] - num_true[first]


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Format `evaluate` results by run name as a Markdown table: percent, one decimal.

    An undefined metric, or one that a row does not have, is `-`.
    """
    columns = ("AP", "AP50", "AP75", "APr", "APc", "APf", "AR")
    lines = []
    for run, metrics in rows.items():
        recall = next((name for name in metrics if name.startswith("AR@")), "AR")
        values = [metrics.get(recall if name == "AR" else name, -1) for name in columns]
        lines.append([run, *("-" if value < 0 else f"{100 * value:.1f}" for value in values)])
    return markdown_table(["run", *columns], lines)
