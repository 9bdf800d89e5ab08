"""Which detections are judged, and with what result: matching at all settings of the LVIS metric.

Shapes: T IoU thresholds, A area ranges, C classes, N images, D judged detections, G ground truths.

Only the (image, class) pairs that hold ground truth need an IoU. What a detection is at the T x A settings is
one bit each of one integer, `SETTING_BITS`, and matching goes over those integers: the k-th candidate match
of every pair at once.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clis.data.annotations import Annotations
from clis.metric.detections import Detections
from clis.metric.masks import MaskIoU

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREA_RANGES = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""Square pixels, both ends inclusive: a box of 32 x 32 is small and medium."""

FIXED_LIMIT = 10_000
"""Detections per class over the split for fixed and pooled AP (Dave et al., arXiv 2102.01066)."""

Protocol = Literal["standard", "fixed", "pooled"]
T, A = len(IOU_THRESHOLDS), len(AREA_RANGES)
RANGE_BITS = (1 << T) - 1
"""The bits of one area range; bit t is threshold t, and range a is shifted by a * T."""
IN_ALL_RANGES = sum(1 << (a * T) for a in range(A))
SETTING_BITS = RANGE_BITS * IN_ALL_RANGES
CANDIDATES = PART = 1 << 17
"""Pairs of a detection and a ground truth, and detections, that are worked on at once: bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The judged detections, best first within each class, and what each is at every setting.

    Bit a * T + t is IoU threshold t and area range a. A detection that is neither a true positive nor ignored
    at a bit is a false positive there.
    """

    rows: np.ndarray
    """int64 [D], the row of each in the `Detections`; with ties in the package's order."""
    labels: np.ndarray
    """Integer [D], ascending."""
    images: np.ndarray
    """Integer [D], rank of the image id."""
    scores: np.ndarray
    """float64 [D], falling within a class."""
    true_positive: np.ndarray
    """int64 [D] of bits."""
    ignored: np.ndarray
    """int64 [D] of bits: neither true nor false."""
    truth_labels: np.ndarray
    """int64 [G]."""
    truth_images: np.ndarray
    """int64 [G], rank of the image id."""
    truth_counts: np.ndarray
    """bool [G, A]: whether the ground truth has to be found in this area range."""
    truth_found: np.ndarray
    """int64 [G] of bits: taken by a detection."""
    truth_places: np.ndarray
    """int64 [G], the row of each in the `Annotations`."""
    num_classes: int
    num_images: int

    def with_labels(self, label_of: np.ndarray) -> Matches:
        """Relabel the matches, int64 [C] by old label: matched by class, counted by group; -1 drops."""
        labels, truth_labels = label_of[self.labels], label_of[self.truth_labels]
        order = np.lexsort((-self.scores, labels))
        order = order[labels[order] >= 0]
        kept = truth_labels >= 0
        return dataclasses.replace(
            self,
            labels=labels[order],
            **{name: getattr(self, name)[order] for name in _DETECTION_COLUMNS},
            truth_labels=truth_labels[kept],
            **{name: getattr(self, name)[kept] for name in _TRUTH_COLUMNS},
            num_classes=int(label_of.max(initial=0)) + 1,
        )


_DETECTION_COLUMNS = ("rows", "images", "scores", "true_positive", "ignored")
_TRUTH_COLUMNS = ("truth_images", "truth_counts", "truth_found", "truth_places")  # beside the labels


def match(
    annotations: Annotations,
    detections: Detections,
    max_detections: int = 300,
    protocol: Protocol = "standard",
    truth_masks: Sequence[dict[str, Any]] | None = None,
) -> Matches:
    """Match the detections of every class to its ground truth in each image, at all settings.

    An image keeps its `max_detections` highest scores over all classes (fixed and pooled: a class keeps its
    `FIXED_LIMIT` highest over all images).

    Federated annotations are judged as the `lvis` package does: boxes without area are dropped, and so are
    detections of a class that is neither annotated in the image nor known to be absent from it; unmatched
    detections of a class that is not exhaustively annotated in the image are ignored.

    Other annotations are judged as pycocotools does: every image is exhaustive for every class, boxes without
    area stay, a crowd absorbs any number of detections, and `max_detections` is per image and class.

    Args:
        truth_masks: compressed RLE of each annotation, A of them: masks are compared instead of boxes.

    Raises:
        ValueError: image or category ids that the annotations do not hold, or ground-truth boxes that are not
            finite or have a negative size.
    """
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, found {max_detections}")
    if protocol not in ("standard", "fixed", "pooled"):
        raise ValueError(f"protocol is {protocol!r}; it must be standard, fixed or pooled")
    check_truth(annotations)
    truth = _ground_truth(annotations)
    judged = _judged(annotations, detections, truth, max_detections if protocol == "standard" else None)
    rows = judged["rows"]

    boxes = detections.bbox[rows]
    area = _box_areas(boxes) if detections.area is None else detections.area[rows]
    iou: BoxIoU | MaskIoU
    if truth_masks is None:
        iou = BoxIoU(boxes, annotations.bboxes[truth["place"]], truth["crowd"])
    elif detections.masks is None:
        raise ValueError("truth_masks need detections with masks: Detections.load(path, masks=True)")
    else:
        sizes = annotations.image_sizes[np.argsort(annotations.image_ids)][judged["images"]]
        iou = MaskIoU(detections.masks, rows, sizes, truth_masks, truth["place"], truth["crowd"])
    true_positive, ignored, found = _match_pairs(judged["truth_start"], judged["truth_count"], truth, iou)
    excused = np.where(judged["excused"], SETTING_BITS, _range_bits(~_in_ranges(area)))
    ignored |= ~true_positive & excused
    return Matches(
        rows=rows,
        labels=judged["labels"],
        images=judged["images"],
        scores=detections.score[rows].astype(np.float64),
        true_positive=true_positive,
        ignored=ignored,
        truth_labels=truth["label"],
        truth_images=truth["image"],
        truth_counts=truth["counts"],
        truth_found=found,
        truth_places=truth["place"],
        num_classes=annotations.num_classes,
        num_images=len(annotations),
    )


# --- who is judged ---

_TRUTH = np.dtype(
    [("key", "i8"), ("label", "i8"), ("image", "i8"), ("place", "i8"), ("crowd", "?"), ("has_id", "?"),
     ("counts", "?", A)]
)  # fmt: skip


def check_truth(annotations: Annotations) -> None:
    """Check the ground truth of a split.

    Raises:
        ValueError: there is none, or a box is not finite or has a negative size.
    """
    boxes, areas = annotations.bboxes, annotations.areas
    bad = ~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] < 0).any(axis=1) | np.isnan(areas)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{annotations.path}: annotation {annotations.annotation_ids[row]}: box {boxes[row].tolist()} or "
            f"area {areas[row]} is not finite or negative; correct or remove it ({bad.sum()} like it)"
        )


def _ground_truth(annotations: Annotations) -> np.ndarray:
    """Return the annotations that count, `_TRUTH` [G], by image and class, in file order within a pair."""
    truth = np.empty(len(annotations.labels), _TRUTH)
    truth["label"] = annotations.labels
    truth["image"] = _ranks_of_rows(annotations, annotations.offsets)
    truth["key"] = truth["image"] * annotations.num_classes + truth["label"]
    truth["place"] = np.arange(len(truth))
    truth["crowd"] = annotations.crowd & (not annotations.federated)  # the lvis package knows no crowds
    # Both packages mark a matched detection with the id of its annotation, so that id 0 reads as unmatched.
    truth["has_id"] = annotations.annotation_ids != 0
    ignored = np.where(annotations.federated, annotations.ignored, annotations.crowd)
    truth["counts"] = _in_ranges(annotations.areas) & ~ignored[:, None]
    if annotations.federated:
        truth = truth[_has_area(annotations.areas)]
    return truth[np.argsort(truth["key"], kind="stable")]


def describe_uncounted(annotations: Annotations) -> list[str]:
    """Say of which ground truths the figures take no account, and why: as in the published packages.

    Returns:
        A line for each reason; none if every ground truth counts.
    """
    total, areas = len(annotations.labels), annotations.areas
    judged = _in_ranges(areas)[:, 0] & (_has_area(areas) | (not annotations.federated))
    counts = {
        "have the annotation id 0, which both published packages take for unmatched: number ids from 1": (
            annotations.annotation_ids == 0
        ),
        "have an `area` that is not above 0, or beyond 1e10: correct it": ~judged,
    }
    if annotations.federated:
        counts["are flagged `ignore`"] = annotations.ignored
    else:
        counts["are crowds (`iscrowd`)"] = annotations.crowd
    lines = []
    for reason, mask in counts.items():
        if mask.any():
            part = f"{int(mask.sum())} of {total} ground truths do not count"
            what = "none of the ground truths counts" if mask.all() else part
            lines.append(f"{annotations.path}: {what}: they {reason}")
    return lines


def _judged(
    annotations: Annotations, detections: Detections, truth: np.ndarray, max_detections: int | None
) -> dict[str, np.ndarray]:
    """Return the judged detections, best first in each class: their rows, labels, images and truths."""
    num_classes = annotations.num_classes
    category_ids = np.array([category.id for category in annotations.categories], dtype=np.int64)
    images = _places(detections.image_id, np.sort(annotations.image_ids))
    if (images < 0).any():
        raise ValueError(
            f"{_unknown(images, 'image', detections, annotations)}; evaluate on the split that the detector "
            "ran over"
        )
    labels = _places(detections.category_id, category_ids)
    kept = _within_limit(images, labels, detections.score, max_detections, annotations.federated)
    if (labels < 0).any():
        warnings.warn(
            f"{_unknown(labels, 'category', detections, annotations)}; they are dropped once the limit has "
            "been applied, as the lvis package does",
            stacklevel=2,
        )
        kept &= labels >= 0

    pairs = [truth["key"]] + [_pair_keys(annotations, annotations.negatives)] * annotations.federated
    known = np.unique(np.concatenate(pairs))
    some_rows, some_pairs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part in _parts(len(detections)):
        keys = images[part].astype(np.int64) * num_classes + labels[part]
        place = np.searchsorted(known, keys)
        is_known = np.append(known, -1)[place] == keys
        judged = kept[part]
        if annotations.federated:
            areas = _box_areas(detections.bbox[part]) if detections.area is None else detections.area[part]
            judged = judged & is_known & _has_area(areas)
        judged = np.flatnonzero(judged)
        some_rows.append(judged + part.start)
        # len(known) is the place of no pair: nothing to match
        some_pairs.append(np.where(is_known, place, len(known))[judged])
    rows, pair = np.concatenate(some_rows), np.concatenate(some_pairs)

    # Ties in score: by image id, then by row, as in both packages. Stable sorts, the last key first.
    order = np.argsort(images[rows], kind="stable")
    order = order[np.argsort(-detections.score[rows[order]], kind="stable")]
    order = order[np.argsort(labels[rows[order]].astype(_smallest(num_classes)), kind="stable")]
    rows, pair = rows[order], pair[order]
    starts = np.append(np.searchsorted(truth["key"], known), len(truth))
    partial = np.isin(known, _pair_keys(annotations, annotations.not_exhaustive)) & annotations.federated
    return {
        "rows": rows,
        "labels": labels[rows],
        "images": images[rows],
        "truth_start": starts[pair],
        "truth_count": np.append(np.diff(starts), 0)[pair],
        "excused": np.append(partial, False)[pair],
    }


def _parts(count: int) -> Iterator[slice]:
    """Yield slices of 0..count-1 to work through one by one: temporaries then stay in the cache."""
    for start in range(0, count, PART):
        yield slice(start, min(start + PART, count))


def _smallest(count: int) -> type:
    """Return the integer type for 0..count-1; NumPy sorts one of 16 bits in linear time."""
    return np.uint16 if count <= 1 << 16 else np.int64


def _places(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the place of each id in `known`, which ascends: int32 [D], -1 where it is none of them."""
    places = np.empty(len(ids), np.int32)
    low, high = int(known[0]), int(known[-1])
    dense = high - low < 2 * (len(ids) + len(known))
    if dense:  # a table is several times faster than searching
        table = np.full(high - low + 2, -1, np.int32)
        table[known - low] = np.arange(len(known))
    for part in _parts(len(ids)):
        some = ids[part].astype(np.int64, copy=False)
        if dense:
            places[part] = table[np.where((some >= low) & (some <= high), some - low, -1)]
        else:
            place = np.searchsorted(known, some).clip(max=len(known) - 1)
            places[part] = np.where(known[place] == some, place, -1)
    return places


def _unknown(places: np.ndarray, what: str, detections: Detections, annotations: Annotations) -> str:
    row = int((places < 0).argmax())
    return (
        f"{detections.source}: {(places < 0).sum()} detections have {what} ids that {annotations.path} does "
        f"not hold, the first in row {row}: {getattr(detections, f'{what}_id')[row]}"
    )


def _ranks_of_rows(annotations: Annotations, offsets: np.ndarray) -> np.ndarray:
    """Return the rank of the image id for each row of a column packed by `offsets` (images in file order)."""
    ranks = np.argsort(np.argsort(annotations.image_ids))
    return np.repeat(ranks, np.diff(offsets))


def _pair_keys(annotations: Annotations, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return one integer for each (image, class) of one of the federated lists."""
    offsets, labels = pairs
    return _ranks_of_rows(annotations, offsets) * annotations.num_classes + labels


def _within_limit(
    images: np.ndarray, labels: np.ndarray, scores: np.ndarray, max_detections: int | None, federated: bool
) -> np.ndarray:
    """Return the best of each image (not federated: image and class; no maximum: class): bool [D]."""
    if max_detections is None:
        groups, limit = labels + 1, FIXED_LIMIT
    elif federated:
        groups, limit = images, max_detections
    else:
        groups, limit = images.astype(np.int64) * (labels.max(initial=0) + 2) + labels + 1, max_detections
        groups = np.unique(groups, return_inverse=True)[1]
    kept = np.ones(len(groups), bool)
    counts = np.zeros(int(groups.max(initial=-1)) + 1, np.int64)
    for part in _parts(len(groups)):
        counts += np.bincount(groups[part], minlength=len(counts))
    crowded = np.flatnonzero((counts > limit)[groups])
    if len(crowded):
        # Stable: of equal scores the earlier.
        order = crowded[np.lexsort((-scores[crowded], groups[crowded]))]
        ordered = groups[order]
        place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        kept[order[place >= limit]] = False
    return kept


def _box_areas(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, 2].astype(np.float64) * boxes[:, 3]


def _has_area(areas: np.ndarray) -> np.ndarray:
    return (areas > 0) & (areas < np.inf)


def _in_ranges(areas: np.ndarray) -> np.ndarray:
    """Return which areas are in each range: bool [..., A]."""
    ranges = AREA_RANGES.values()
    return np.stack([(areas >= low) & (areas <= high) for low, high in ranges], axis=-1)


def _range_bits(in_ranges: np.ndarray) -> np.ndarray:
    """Return all thresholds of the ranges that are True: bool [..., A] -> int64 [...]."""
    bits = np.zeros(in_ranges.shape[:-1], np.int64)
    for a in range(A):
        bits |= in_ranges[..., a] * np.int64(RANGE_BITS << (a * T))
    return bits


# --- matching ---


class BoxIoU:
    """IoU of detection and ground-truth boxes, taken by place: (int64 [n], int64 [n]) -> float64 [n].

    Args:
        boxes: [D, 4], x y w h; `truth` [G, 4] likewise.
        crowd: bool [G]; with a crowd, the intersection over the detection's own area.
    """

    def __init__(self, boxes: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> None:
        self.boxes, self.truth = _box_columns(boxes), _box_columns(truth)
        self.crowd = crowd if crowd.any() else None

    def __call__(self, detections: np.ndarray, truths: np.ndarray) -> np.ndarray:
        """Compute the IoU of each pair, rounded as in pycocotools."""
        overlap = np.zeros(len(detections))
        (left, top, right, bottom, area), truth = self.boxes, self.truth
        width = np.minimum(right[detections], truth[2][truths]) - np.maximum(
            left[detections], truth[0][truths]
        )
        overlapping = np.flatnonzero(width > 0)
        d, g, width = detections[overlapping], truths[overlapping], width[overlapping]
        height = np.minimum(bottom[d], truth[3][g]) - np.maximum(top[d], truth[1][g])
        intersection = width * height.clip(min=0)
        union = area[d] + truth[4][g] - intersection
        if self.crowd is not None:
            union = np.where(self.crowd[g], area[d], union)
        overlap[overlapping] = np.divide(
            intersection, union, out=np.zeros_like(union), where=intersection > 0
        )
        return overlap


def _box_columns(boxes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return left, top, right, bottom and area, float64, of boxes x y w h."""
    x, y, w, h = boxes.T.astype(np.float64, copy=False)
    return x, y, x + w, y + h, w * h


def _match_pairs(
    starts: np.ndarray, counts: np.ndarray, truth: np.ndarray, iou: BoxIoU | MaskIoU
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give each detection the best free ground truth of its image and class, at every setting.

    Detection i may take truths starts[i] : starts[i] + counts[i]. Of each pair the higher score chooses first
    and takes one that counts before an ignored one, then the higher IoU, then the later. A crowd stays free.

    Returns:
        Bits int64 [D] of the true positives and of the detections that took an ignored ground truth, and [G]
        of the truths taken.
    """
    detection, chosen, scope = _operations(starts, counts, truth, iou)
    true_positive, ignored = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    undecided = np.full(len(starts), SETTING_BITS)
    free = np.full(len(truth), SETTING_BITS)
    counting = _range_bits(truth["counts"])
    matched_bits = np.where(truth["has_id"], counting, 0)
    stays_free = np.where(truth["crowd"], SETTING_BITS, 0)
    for part in _rounds(truth["key"][chosen]):
        d, g = detection[part], chosen[part]  # at most one operation of a pair, so no two of the same d or g
        taken = scope[part] & undecided[d] & free[g]
        undecided[d] &= ~taken
        free[g] &= ~taken | stays_free[g]
        true_positive[d] |= taken & matched_bits[g]
        ignored[d] |= taken & ~counting[g]
    return true_positive, ignored, SETTING_BITS & ~free


def _operations(
    starts: np.ndarray, counts: np.ndarray, truth: np.ndarray, iou: BoxIoU | MaskIoU
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return candidate matches in the order in which a pair tries them: detection, truth, bits [n] each."""
    detection, chosen, overlap = _candidates(starts, counts, iou)
    fits = ((1 << np.searchsorted(IOU_THRESHOLDS, overlap, side="right")) - 1) * IN_ALL_RANGES
    several = np.bincount(detection, minlength=1)[detection] > 1
    # A detection of several candidates first goes through those that count, then through the ignored ones.
    choice = np.flatnonzero(several)
    choice = choice[np.lexsort((-chosen[choice], -overlap[choice], detection[choice]))]
    counting = _range_bits(truth["counts"])[chosen[choice]]
    first, second = fits[choice] & counting, fits[choice] & ~counting
    single = np.flatnonzero(~several)
    place = np.concatenate([single, choice[first != 0], choice[second != 0]])
    scope = np.concatenate([fits[single], first[first != 0], second[second != 0]])
    order = np.argsort(detection[place], kind="stable")
    return detection[place[order]], chosen[place[order]], scope[order]


def _candidates(
    starts: np.ndarray, counts: np.ndarray, iou: BoxIoU | MaskIoU
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the (detection, truth) of one image and class with an IoU of at least 0.5, and that IoU."""
    found: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    with_truth = np.flatnonzero(counts)
    ends = np.cumsum(counts[with_truth])
    first = 0
    while first < len(with_truth):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + CANDIDATES, side="right")), first + 1)
        part = with_truth[first:last]
        detection = np.repeat(part, counts[part])
        within = np.arange(len(detection)) - np.repeat(ends[first:last] - counts[part] - before, counts[part])
        truths = starts[detection] + within
        overlap = iou(detection, truths)
        close = overlap >= IOU_THRESHOLDS[0]
        found.append((detection[close], truths[close], overlap[close]))
        first = last
    detection, truths, overlap = (np.concatenate(columns) for columns in zip(*found))
    return detection, truths, overlap


def _rounds(pairs: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the places of the first operation of every pair, then of every second one, and so on."""
    by_pair = np.argsort(pairs, kind="stable")
    ordered = pairs[by_pair]
    number = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    by_number = by_pair[np.argsort(number, kind="stable")]
    ends = np.cumsum(np.bincount(number)) if len(number) else ()
    yield from np.split(by_number, ends[:-1])
