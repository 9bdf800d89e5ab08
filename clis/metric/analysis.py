"""Details of an AP: per class, by training images, by kind of error, and how certain a difference is."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clis.atomic import atomic_write
from clis.data.annotations import Annotations
from clis.data.categories import Category
from clis.metric.detections import Detections
from clis.metric.lvis_eval import Curves, accumulate, defined_mean, summarize
from clis.metric.matching import AREA_RANGES, IOU_THRESHOLDS, BoxIoU, Matches, Protocol, match
from clis.progress import Progress

ERROR_GROUPS = {"all": "rcf", "r": "r", "c": "c", "f": "f"}
COUNT_BINS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
"""First training-image count per bin; three bins per decade would hold too few images, one is too coarse."""
ERRORS = ("class", "location", "both", "duplicate", "background", "missed")
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1


# --- by class ---


def write_class_table(
    path: str | Path, matches: Matches, curves: Curves, categories: Sequence[Category]
) -> None:
    """Write a CSV file with one line per class: counts in training and here, AP, recall; undefined is empty.

    ``images`` and ``instances`` are those of the evaluated split that count (over all areas).
    """
    counted = matches.truth_counts[:, 0]
    labels = matches.truth_labels[counted]
    pairs = np.unique(matches.truth_images[counted] * matches.num_classes + labels)
    images = np.bincount(pairs % matches.num_classes, minlength=matches.num_classes)
    instances = np.bincount(labels, minlength=matches.num_classes)
    precision = curves.mean_precision()
    columns = {
        "AP": precision[..., 0].mean(axis=0),
        "AP50": precision[0, :, 0],
        "AP75": precision[5, :, 0],
        **{f"AP{name[0]}": precision[..., a].mean(axis=0) for a, name in enumerate(AREA_RANGES) if a},
        "AR": curves.recall[..., 0].mean(axis=0),
    }
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "name", "frequency", "train_images", "images", "instances", *columns])
        for label, category in enumerate(categories):
            values = [f"{column[label]:.6f}" if column[label] >= 0 else "" for column in columns.values()]
            head = [category.id, category.name, category.frequency, category.image_count]
            writer.writerow([*head, images[label], instances[label], *values])


def ap_by_image_count(curves: Curves, categories: Sequence[Category]) -> list[tuple[int, int, int, float]]:
    """Compute AP by training images, per bin: first count, last count, classes with ground truth, mean AP."""
    counts = np.array([category.image_count for category in categories])
    ap = curves.class_ap()
    rows = []
    for first, end in zip(COUNT_BINS, (*COUNT_BINS[1:], counts.max(initial=0) + 1)):
        chosen = ap[(counts >= first) & (counts < end) & (ap >= 0)]
        if len(chosen):
            rows.append((first, int(end) - 1, len(chosen), float(chosen.mean())))
    return rows


def merge_small_bins(
    rows: Sequence[tuple[int, int, int, float]], least: int = 3
) -> list[tuple[int, int, int, float]]:
    """Join neighbors among the rows of `ap_by_image_count` until each has at least `least` classes.

    A mean over one or two classes says more about them than about their number of images. A small bin is
    joined to the next one, the last one to that before it.
    """
    merged: list[tuple[int, int, int, float]] = []
    for row in rows:
        small = merged and merged[-1][2] < least
        merged.append(_joined(merged.pop(), row) if small else row)
    if len(merged) > 1 and merged[-1][2] < least:
        last = merged.pop()
        merged.append(_joined(merged.pop(), last))
    return merged


def _joined(
    first: tuple[int, int, int, float], second: tuple[int, int, int, float]
) -> tuple[int, int, int, float]:
    """Join two bins, their mean AP weighted by their classes."""
    count = first[2] + second[2]
    return first[0], second[1], count, (first[2] * first[3] + second[2] * second[3]) / count


# --- how sure ---


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap interval, as fractions."""

    value: float
    low: float
    high: float


def bootstrap(
    first: Matches,
    second: Matches,
    categories: Sequence[Category],
    samples: int = 200,
    seed: int = 0,
    protocol: Protocol = "standard",
) -> dict[str, Interval]:
    """Estimate, by a paired bootstrap over images, how far `second`'s figures are above those of `first`.

    Every sample draws the split's images with replacement, the same for both. A class is left out of a sample
    that holds none of its ground truth. Percentile interval (Efron & Tibshirani 1993, chapter 13).

    Args:
        protocol: by which both were matched.

    Returns:
        For those of AP, AP50, AP75, APr, APc and APf that are defined on the split and in any sample: the
        difference on the whole split with its interval. The names are the protocol's, as in `summarize`.
    """
    columns = ("truth_places", "truth_labels", "truth_images")
    if not all(np.array_equal(getattr(first, name), getattr(second, name)) for name in columns):
        raise ValueError("a paired bootstrap needs two results on the same annotations")
    generator = np.random.default_rng(seed)
    names = [name for name, value in _figures(first, categories, protocol, None).items() if value >= 0]
    difference = _difference(first, second, categories, protocol, names, None)
    drawn = np.empty((samples, len(names)))
    with Progress("bootstrap", samples) as progress:
        for row in drawn:
            weights = generator.multinomial(first.num_images, np.full(first.num_images, 1 / first.num_images))
            row[:] = _difference(first, second, categories, protocol, names, weights)
            progress.advance()
    intervals = {}
    for name, value, column in zip(names, difference.tolist(), drawn.T):
        defined = column[~np.isnan(column)]
        if len(defined):
            intervals[name] = Interval(value, *np.percentile(defined, [2.5, 97.5]).tolist())
    return intervals


def _figures(
    matches: Matches, categories: Sequence[Category], protocol: Protocol, image_weights: np.ndarray | None
) -> dict[str, float]:
    figures = summarize(matches, categories, protocol=protocol, image_weights=image_weights, num_areas=1)
    return {name: value for name, value in figures.items() if name.rpartition("_")[2].startswith("AP")}


def _difference(
    first: Matches,
    second: Matches,
    categories: Sequence[Category],
    protocol: Protocol,
    names: Sequence[str],
    image_weights: np.ndarray | None,
) -> np.ndarray:
    """Return the difference per figure, float64 [names]; NaN where a sample holds no class of the group."""
    below, above = (_figures(matches, categories, protocol, image_weights) for matches in (first, second))
    return np.array([above[name] - below[name] if below[name] >= 0 else np.nan for name in names])


# --- what is wrong ---


def class_agnostic(annotations: Annotations, detections: Detections, matches: Matches) -> dict[str, float]:
    """Compute AP, AP50, AP75 and AR of the boxes alone: matched to all ground truth regardless of class.

    Unmatched detections are ignored in an image where any class is not exhaustively annotated.
    """
    num_images = len(annotations)
    category = Category(id=1, name="object", frequency="f", image_count=num_images)
    any_partial = np.diff(annotations.not_exhaustive[0]) > 0
    merged = dataclasses.replace(
        annotations,
        categories=(category,),
        labels=np.zeros_like(annotations.labels),
        negatives=(np.arange(num_images + 1), np.zeros(num_images, np.int64)),  # judged in every image
        not_exhaustive=(
            np.concatenate([[0], np.cumsum(any_partial)]), np.zeros(any_partial.sum(), np.int64)
        ),
    )  # fmt: skip
    rows = np.sort(matches.rows)
    boxes = Detections(
        image_id=detections.image_id[rows],
        category_id=np.ones(len(rows), np.int64),
        bbox=detections.bbox[rows],
        score=detections.score[rows],
    )
    # No limit a second time: what was judged is judged.
    figures = summarize(match(merged, boxes, max(len(rows), 1)), merged.categories, num_areas=1)
    return {name: figures[name] for name in ("AP", "AP50", "AP75")} | {"AR": figures["AR@300"]}


@dataclasses.dataclass(frozen=True)
class ErrorShares:
    """AP50 and what each kind of error takes from it: fractions by group of classes (`ERROR_GROUPS`)."""

    ap50: dict[str, float]
    lost: dict[str, dict[str, float]]
    """By error (`ERRORS`), then by group: AP50 with only this kind fixed, minus AP50; -1 where undefined."""
    counts: dict[str, int]
    """How many detections (missed: ground truths) are of each kind."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """The F false positives among the judged detections of `Matches`, and the missed ground truths."""

    places: np.ndarray
    """int64 [F], of each in the matches."""
    kinds: np.ndarray
    """uint8 [F], place in `ERRORS`."""
    truths: np.ndarray
    """int64 [F], the ground truth that it is about; -1 for ``background`` and ``both``."""
    missed: np.ndarray
    """bool [G]."""

    def of_kind(self, name: str) -> np.ndarray:
        """Return which of the false positives are of this kind, bool [F]."""
        return self.kinds == ERRORS.index(name)


def find_errors(annotations: Annotations, detections: Detections, matches: Matches) -> Errors:
    """Find the kind of every false positive at IoU 0.5, as in TIDE (Bolya et al., arXiv 2008.08115).

    A judged false positive is, in this order: poorly located (IoU 0.1 to 0.5 with a ground truth of its
    class), of the wrong class (at least 0.5 with one of another class), a duplicate (at least 0.5 with one of
    its class, which is taken), background (below 0.1 with everything), or wrong in both. A ground truth that
    nothing takes and that no location or class error could have taken is missed. Detections that the metric
    ignores are not errors.
    """
    hit = (matches.true_positive & 1) != 0
    false = np.flatnonzero(~hit & ((matches.ignored & 1) == 0))
    own, own_truth, other, other_truth = _best_overlaps(annotations, detections, matches, false)
    location = (own >= BACKGROUND_IOU) & (own < FOREGROUND_IOU)
    wrong_class = ~location & (other >= FOREGROUND_IOU)
    duplicate = ~location & ~wrong_class & (own >= FOREGROUND_IOU)
    background = ~location & ~wrong_class & ~duplicate & (np.maximum(own, other) < BACKGROUND_IOU)
    kinds = np.full(len(false), ERRORS.index("both"), np.uint8)
    for name, chosen in (
        ("class", wrong_class), ("location", location), ("duplicate", duplicate), ("background", background)
    ):  # fmt: skip
        kinds[chosen] = ERRORS.index(name)
    truths = np.where(wrong_class, other_truth, np.where(location | duplicate, own_truth, -1))
    missed = matches.truth_counts[:, 0] & ((matches.truth_found & 1) == 0)
    missed[truths[location | wrong_class]] = False
    return Errors(false, kinds, truths, missed)


def error_shares(
    annotations: Annotations,
    detections: Detections,
    matches: Matches,
    categories: Sequence[Category],
    errors: Errors | None = None,
) -> ErrorShares:
    """Compute the share of AP50 lost to each kind of error (`find_errors`), as TIDE does.

    To fix a kind of error, the best location or class error of a free ground truth becomes its true positive,
    and all other errors of the kind vanish; missed ground truth is no longer required. A class of which all
    is missed then has AP 0 if it has detections, and else does not count.

    Args:
        errors: those of the matches, if they are known.
    """
    errors = errors or find_errors(annotations, detections, matches)
    free = matches.truth_counts[:, 0] & ((matches.truth_found & 1) == 0)
    groups = np.array([category.frequency for category in categories])
    base = _ap50(matches, groups)
    lost, counts = {}, {}
    for name in ERRORS[:-1]:
        chosen = errors.of_kind(name)
        targets = errors.truths[chosen] if name in ("class", "location") else None
        fixed = _fix(matches, errors.places[chosen], targets, free)
        lost[name], counts[name] = _gain(base, _ap50(fixed, groups)), int(chosen.sum())
    asked_for = dataclasses.replace(matches, truth_counts=matches.truth_counts & ~errors.missed[:, None])
    every = np.arange(matches.num_classes)
    has_both = np.isin(every, matches.labels) & np.isin(
        every, matches.truth_labels[matches.truth_counts[:, 0]]
    )
    lost["missed"] = _gain(base, _ap50(asked_for, groups, has_both))
    counts["missed"] = int(errors.missed.sum())
    return ErrorShares(base, lost, counts)


def _best_overlaps(
    annotations: Annotations, detections: Detections, matches: Matches, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find, for each chosen detection, the highest IoU with a ground truth of its image and class, and which.

    Then the same for other classes. IoU 0 and ground truth 0 where there is none.
    """
    by_image = np.flatnonzero(matches.truth_counts[:, 0])
    by_image = by_image[np.argsort(matches.truth_images[by_image], kind="stable")]
    bounds = np.searchsorted(matches.truth_images[by_image], np.arange(matches.num_images + 1))
    truth_boxes = annotations.bboxes[matches.truth_places]
    iou = BoxIoU(detections.bbox[matches.rows], truth_boxes, np.zeros(len(truth_boxes), bool))
    best = np.zeros((2, len(chosen)))
    best_truth = np.zeros((2, len(chosen)), np.int64)
    for start in range(0, len(chosen), 1 << 15):
        part = np.arange(start, min(start + (1 << 15), len(chosen)))
        images = matches.images[chosen[part]]
        counts = np.diff(bounds)[images]
        place = np.repeat(part, counts)
        within = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        truths = by_image[np.repeat(bounds[images], counts) + within]
        overlap = iou(chosen[place], truths)
        is_other = (matches.labels[chosen[place]] != matches.truth_labels[truths]).astype(np.int64)
        order = np.argsort(overlap, kind="stable")  # the last assignment stays: the highest
        best[is_other[order], place[order]] = overlap[order]
        best_truth[is_other[order], place[order]] = truths[order]
    return best[0], best_truth[0], best[1], best_truth[1]


def _fix(matches: Matches, errors: np.ndarray, targets: np.ndarray | None, free: np.ndarray) -> Matches:
    """Remove these detections from the matches, but make each free target's best one its true positive."""
    true_positive, labels = matches.true_positive.copy(), matches.labels.copy()
    gone = np.zeros(len(labels), bool)
    gone[errors] = True
    if targets is not None:
        order = np.lexsort((-matches.scores[errors], targets))
        firsts = order[np.flatnonzero(np.diff(targets[order], prepend=-1))]
        firsts = firsts[free[targets[firsts]]]
        fixed = errors[firsts]
        gone[fixed] = False
        true_positive[fixed] |= 1
        labels[fixed] = matches.truth_labels[targets[firsts]]
    kept = np.flatnonzero(~gone)
    kept = kept[np.lexsort((-matches.scores[kept], labels[kept]))]
    return dataclasses.replace(
        matches, rows=matches.rows[kept], labels=labels[kept], images=matches.images[kept],
        scores=matches.scores[kept], true_positive=true_positive[kept], ignored=matches.ignored[kept],
    )  # fmt: skip


def _ap50(matches: Matches, frequency: np.ndarray, counted: np.ndarray | None = None) -> dict[str, float]:
    """Compute AP50 by frequency group; a `counted` class (bool [C]) without ground truth has AP 0."""
    precision = accumulate(matches, num_areas=1).precision[IOU_THRESHOLDS == FOREGROUND_IOU, ..., 0]
    if counted is not None:
        precision = np.where(counted & (precision < 0), 0.0, precision)
    return {
        name: defined_mean(precision[:, :, np.isin(frequency, list(letters))])
        for name, letters in ERROR_GROUPS.items()
    }


def _gain(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {
        name: after[name] - before[name] if min(after[name], before[name]) >= 0 else -1.0 for name in before
    }
