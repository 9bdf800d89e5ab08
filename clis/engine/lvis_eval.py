"""The LVIS box metric: detections and annotations as arrays in, average precision out.

The numbers equal those of the `lvis` package (Gupta et al., LVIS, CVPR 2019), which follows pycocotools.
Shapes: T IoU thresholds, R recall points, C classes, A area ranges, D detections, G ground-truth boxes.
"""

from __future__ import annotations

import json
import reprlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clis.data.annotations import Annotations, Category
from clis.files import written_whole

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREA_RANGES = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""Square pixels, both ends inclusive: a box of 32 x 32 is small and medium."""

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300")

_COLUMNS = ("image_id", "category_id", "bbox", "score")


@dataclass(frozen=True, kw_only=True)
class Detections:
    """The detections of a split, one row each, in any order; D may be 0.

    Raises ValueError with the row (counted from 0) and its value where the columns differ in length, a box or
    a score is not finite, or a box has a negative size.
    """

    image_id: np.ndarray
    """int64 [D]."""
    category_id: np.ndarray
    """int64 [D], the annotation file's ids, not labels."""
    bbox: np.ndarray
    """float32 or float64 [D, 4], x y w h in pixels of the stored image."""
    score: np.ndarray
    """float32 or float64 [D]; among equal scores the earlier row ranks higher."""

    def __post_init__(self) -> None:
        num = self.score.size
        expected = {"image_id": (num,), "category_id": (num,), "bbox": (num, 4), "score": (num,)}
        found = {name: getattr(self, name).shape for name in _COLUMNS}
        if found != expected:
            raise ValueError(f"detections need columns of one length and bbox [D, 4], found shapes {found}")
        for name, kinds in zip(_COLUMNS, ("iu", "iu", "f", "f")):
            dtype = getattr(self, name).dtype
            if dtype.kind not in kinds:
                raise ValueError(f"{name} must be {'float' if kinds == 'f' else 'integer'}, found {dtype}")
        _reject(~np.isfinite(self.score), "score is not finite", self.score)
        _reject(~np.isfinite(self.bbox).all(axis=1), "bbox is not finite", self.bbox)
        _reject((self.bbox[:, 2:] < 0).any(axis=1), "bbox (x y w h) has a negative size", self.bbox)

    def __len__(self) -> int:
        return len(self.score)

    def save(self, path: str | Path) -> None:
        """Write the columns to `path`, which must end in .npz; an interrupted save leaves no half file."""
        if Path(path).suffix != ".npz":
            raise ValueError(f"{path}: detections are saved as .npz; use to_json for an LVIS result file")
        with written_whole(path) as temporary:
            np.savez(temporary, **{name: getattr(self, name) for name in _COLUMNS})

    def to_json(self, path: str | Path) -> None:
        """Write an LVIS result file: a list of objects with image_id, category_id, bbox and score."""
        rows = zip(*(getattr(self, name).tolist() for name in _COLUMNS))
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps([dict(zip(_COLUMNS, row)) for row in rows]))

    @classmethod
    def load(cls, path: str | Path) -> Detections:
        """Read what `save` wrote (.npz), or an LVIS result file (any other name); further keys are ignored.

        Raises ValueError with the path, and the row (counted from 0) and value where there is one, for a file
        that is not whole, a missing or ill-typed column or key, and all that the class itself rejects.
        """
        path = Path(path)
        try:
            return cls(**(_read_npz(path) if path.suffix == ".npz" else _read_json(path)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _reject(bad: np.ndarray, problem: str, values: np.ndarray) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"row {row}: {problem}: {values[row].tolist()} ({bad.sum()} such rows)")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):  # the table of contents is at the end: a cut file has none
            raise ValueError("not a whole .npz file; write it again")
    try:
        with np.load(path) as columns:
            missing = [name for name in _COLUMNS if name not in columns]
            if missing:
                raise ValueError(f"no column {', '.join(missing)}; found {', '.join(columns)}")
            return {name: columns[name] for name in _COLUMNS}
    except zipfile.BadZipFile as error:
        raise ValueError(f"damaged .npz file ({error}); write it again") from error


def _read_json(path: Path) -> dict[str, np.ndarray]:
    with open(path, encoding="utf-8") as file:
        try:
            rows = json.load(file)
        except ValueError as error:
            raise ValueError(f"not whole JSON ({error}); write it again") from error
    if not isinstance(rows, list):
        raise ValueError(f"an LVIS result file is a list of objects, found {reprlib.repr(rows)}")
    for number, row in enumerate(rows):
        _check_row(number, row)
    return {
        "image_id": np.array([row["image_id"] for row in rows], dtype=np.int64),
        "category_id": np.array([row["category_id"] for row in rows], dtype=np.int64),
        "bbox": np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4),
        "score": np.array([row["score"] for row in rows], dtype=np.float64),
    }


def _check_row(number: int, row: object) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"row {number}: an object is needed, found {reprlib.repr(row)}")
    missing = [name for name in _COLUMNS if name not in row]
    if missing:
        raise ValueError(f"row {number}: no {', '.join(missing)} in {reprlib.repr(row)}")
    for name in ("image_id", "category_id"):
        if not isinstance(row[name], int):
            raise ValueError(f"row {number}: {name} is not an integer: {row[name]!r}")
    box = row["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
        raise ValueError(f"row {number}: bbox is not four numbers x y w h: {reprlib.repr(box)}")
    if not isinstance(row["score"], int | float):
        raise ValueError(f"row {number}: score is not a number: {row['score']!r}")


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Precision and recall of every class, -1 where a class has no ground truth in an area range."""

    precision: np.ndarray
    """float64 [T, R, C, A] in [0, 1] or -1: the highest precision at a recall of at least `RECALLS`."""
    recall: np.ndarray
    """float64 [T, C, A] in [0, 1] or -1: with all detections counted."""

    def class_ap(self) -> np.ndarray:
        """AP of each class over all areas, float64 [C], -1 where the class has no ground truth."""
        return self.precision[..., 0].mean(axis=(0, 1))


def evaluate(annotations: Annotations, detections: Detections, max_detections: int = 300) -> dict[str, float]:
    """The LVIS figures of a split: `METRICS`, then ARs, ARm and ARl, as fractions; undefined is -1.

    Arguments and errors as in `accumulate`.
    """
    curves = accumulate(annotations, detections, max_detections)
    return summarize(curves, annotations.categories, max_detections)


def accumulate(annotations: Annotations, detections: Detections, max_detections: int = 300) -> Curves:
    """Match the detections of every class to its ground truth and trace precision over recall.

    An image keeps its `max_detections` highest scores over all classes.

    Federated annotations are judged as the `lvis` package does: boxes without area are dropped, and so are
    detections of a class that is neither annotated in the image nor known to be absent from it; unmatched
    detections of a class that is not exhaustively annotated in the image are ignored.

    Other annotations are judged as pycocotools does, except that its limit is by image and class: every image
    is exhaustive for every class, boxes without area stay, and a crowd absorbs any number of detections.

    Raises ValueError for image or category ids that the annotations do not hold.
    """
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, found {max_detections}")
    num_classes = len(annotations.categories)
    truth = _ground_truth(annotations)
    predictions = _predictions(annotations, detections, truth, max_detections)
    shape = (len(AREA_RANGES), len(IOU_THRESHOLDS), num_classes)
    precision, recall = np.full((*shape, len(RECALLS)), -1.0), np.full(shape, -1.0)
    truth_bounds, bounds = (
        np.searchsorted(rows["label"], np.arange(num_classes + 1)) for rows in (truth, predictions)
    )
    for c in range(num_classes):
        class_truth = truth[truth_bounds[c] : truth_bounds[c + 1]]
        if len(class_truth):
            class_predictions = predictions[bounds[c] : bounds[c + 1]]
            precision[:, :, c], recall[:, :, c] = _class_curves(class_truth, class_predictions)
    return Curves(precision=precision.transpose(1, 3, 2, 0), recall=recall.transpose(1, 2, 0))


def summarize(curves: Curves, categories: Sequence[Category], max_detections: int = 300) -> dict[str, float]:
    """Average the curves into the figures of `evaluate`, leaving out undefined entries (-1)."""
    frequency = np.array([category.frequency for category in categories])
    areas = {name[0]: index for index, name in enumerate(AREA_RANGES) if name != "all"}
    precision, recall = curves.precision, curves.recall
    metrics = {
        "AP": precision[..., 0],
        "AP50": precision[IOU_THRESHOLDS == 0.5, ..., 0],
        "AP75": precision[IOU_THRESHOLDS == 0.75, ..., 0],
        **{f"AP{letter}": precision[..., index] for letter, index in areas.items()},
        **{f"AP{group}": precision[:, :, frequency == group, 0] for group in "rcf"},
        f"AR@{max_detections}": recall[..., 0],
        **{f"AR{letter}@{max_detections}": recall[..., index] for letter, index in areas.items()},
    }
    return {name: _defined_mean(values) for name, values in metrics.items()}


def _defined_mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


# One row each, sorted by label, then image; `image` is the rank of the image id.
_TRUTH = np.dtype(
    [("label", "i8"), ("image", "i8"), ("bbox", "f8", 4), ("area", "f8"), ("crowd", "?"), ("counts", "?")]
)
_PREDICTION = np.dtype(
    [("label", "i8"), ("image", "i8"), ("bbox", "f8", 4), ("area", "f8"), ("score", "f8"), ("excused", "?")]
)


def _ground_truth(annotations: Annotations) -> np.ndarray:
    """The annotations as `_TRUTH` rows [G], in file order within an image and class."""
    truth = np.empty(len(annotations.labels), _TRUTH)
    truth["label"] = annotations.labels
    truth["image"] = _ranks_of_rows(annotations, annotations.offsets)
    truth["bbox"] = annotations.bboxes
    truth["area"] = annotations.areas
    truth["crowd"] = annotations.crowd
    # Both packages mark a matched detection with the id of its annotation, so that id 0 reads as unmatched.
    truth["counts"] = annotations.annotation_ids != 0
    if annotations.federated:
        truth = truth[_has_area(truth)]
    return truth[np.lexsort((truth["image"], truth["label"]))]


def _predictions(
    annotations: Annotations, detections: Detections, truth: np.ndarray, max_detections: int
) -> np.ndarray:
    """The detections that are judged, as `_PREDICTION` rows [D], by falling score in an image and class."""
    predictions = np.empty(len(detections), _PREDICTION)
    category_ids = np.array([category.id for category in annotations.categories], dtype=np.int64)
    predictions["label"] = _ranks(detections.category_id, category_ids, "category", annotations.path)
    predictions["image"] = _ranks(
        detections.image_id, np.sort(annotations.image_ids), "image", annotations.path
    )
    predictions["bbox"] = detections.bbox
    predictions["area"] = predictions["bbox"][:, 2] * predictions["bbox"][:, 3]
    predictions["score"] = detections.score
    predictions = _trim(predictions, max_detections)
    if annotations.federated:
        predictions = predictions[_has_area(predictions)]
        judged = np.concatenate([_keys(truth, annotations), _pair_keys(annotations, annotations.negatives)])
        predictions = predictions[np.isin(_keys(predictions, annotations), judged)]
    partial = _pair_keys(annotations, annotations.not_exhaustive)
    predictions["excused"] = np.isin(_keys(predictions, annotations), partial)
    return predictions[np.lexsort((predictions["image"], predictions["label"]))]


def _ranks(ids: np.ndarray, known: np.ndarray, what: str, path: str) -> np.ndarray:
    """The place [D] of each id in `known`, which ascends."""
    ranks = np.searchsorted(known, ids)
    unknown = np.append(known, 0)[ranks] != ids
    unknown |= ranks == len(known)
    if unknown.any():
        row = int(unknown.argmax())
        raise ValueError(
            f"{unknown.sum()} detections have {what} ids that {path} does not hold, the first in row {row}: "
            f"{ids[row]}; evaluate on the split that the detector ran over"
        )
    return ranks


def _ranks_of_rows(annotations: Annotations, offsets: np.ndarray) -> np.ndarray:
    """The rank of the image id for every row of a column packed by `offsets` (images are in file order)."""
    ranks = np.argsort(np.argsort(annotations.image_ids))
    return np.repeat(ranks, np.diff(offsets))


def _keys(rows: np.ndarray, annotations: Annotations) -> np.ndarray:
    """One integer for each (image, class)."""
    return rows["image"] * len(annotations.categories) + rows["label"]


def _pair_keys(annotations: Annotations, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """`_keys` of one of the federated lists."""
    offsets, labels = pairs
    return _ranks_of_rows(annotations, offsets) * len(annotations.categories) + labels


def _has_area(rows: np.ndarray) -> np.ndarray:
    return (rows["area"] > 0) & (rows["area"] < np.inf)


def _trim(predictions: np.ndarray, max_detections: int) -> np.ndarray:
    """The highest scores of each image, in falling order; among equal scores the earlier rows."""
    predictions = predictions[np.lexsort((-predictions["score"], predictions["image"]))]
    image = predictions["image"]
    place = np.arange(len(image)) - np.searchsorted(image, image)
    return predictions[place < max_detections]


def _class_curves(truth: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision [A, T, R] and recall [A, T] of one class."""
    ignored_truth = _outside(truth["area"]) | truth["crowd"]
    matched, ignored = _match_class(truth, predictions, ignored_truth)
    order = np.argsort(-predictions["score"], kind="stable")  # ties: by image id, as the packages
    matched, ignored = matched[..., order], ignored[..., order]
    true_positives = np.cumsum(matched & ~ignored, axis=-1)
    false_positives = np.cumsum(~matched & ~ignored, axis=-1)

    precision = np.full((*matched.shape[:2], len(RECALLS)), -1.0)
    recall = np.full(matched.shape[:2], -1.0)
    for a, num_truth in enumerate((~ignored_truth).sum(axis=1)):
        for t in range(len(IOU_THRESHOLDS) if num_truth else 0):
            precision[a, t], recall[a, t] = _curve(true_positives[a, t], false_positives[a, t], num_truth)
    return precision, recall


def _curve(
    true_positives: np.ndarray, false_positives: np.ndarray, num_truth: int
) -> tuple[np.ndarray, float]:
    """Precision at `RECALLS` and the final recall, from running counts [D] by falling score."""
    recall = true_positives / num_truth
    precision = true_positives / (true_positives + false_positives + np.spacing(1))
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(recall, RECALLS)
    # One zero behind the end: the precision at a recall that is never reached.
    return np.append(best_from_here, 0.0)[reached], recall[-1] if len(recall) else 0.0


def _match_class(
    truth: np.ndarray, predictions: np.ndarray, ignored_truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of one class are matched, and which do not count, bool [A, T, D] each."""
    shape = (len(AREA_RANGES), len(IOU_THRESHOLDS), len(predictions))
    matched, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    images, starts = np.unique(truth["image"], return_index=True)
    ends = np.append(starts[1:], len(truth))
    firsts = np.searchsorted(predictions["image"], images, side="left")
    lasts = np.searchsorted(predictions["image"], images, side="right")
    for start, end, first, last in zip(starts, ends, firsts, lasts):
        boxes = truth[start:end]
        iou = _box_iou(predictions["bbox"][first:last], boxes["bbox"], boxes["crowd"])
        candidates = np.flatnonzero(iou.max(axis=1) >= IOU_THRESHOLDS[0])
        chosen = _match_image(iou[candidates], ignored_truth[:, start:end], boxes["crowd"])
        found, columns = chosen >= 0, first + candidates
        matched[..., columns] = found & boxes["counts"][chosen]
        chosen_ignored = np.take_along_axis(ignored_truth[:, None, start:end], chosen, axis=-1)
        ignored[..., columns] = found & chosen_ignored
    excused = _outside(predictions["area"]) | predictions["excused"]
    return matched, ignored | (~matched & excused[:, None])


def _match_image(iou: np.ndarray, ignored: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Give each detection of one image and class, by falling score, the best free box.

    `iou` float64 [D, G], `ignored` bool [A, G], `crowd` bool [G]. Returns the box's index int64 [A, T, D], -1
    for none. A box that counts goes before an ignored one, then the higher IoU, then the later box; a crowd
    stays free.
    """
    num_boxes = len(crowd)
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    # Whole numbers, because adding a bonus to the IoU would round away small differences.
    rank_by_iou = np.argsort(np.argsort(iou, axis=1, kind="stable"), axis=1)
    bonus = np.where(ignored, 0, num_boxes)[:, None, :]
    free = np.ones((len(ignored), len(thresholds), num_boxes), bool)
    chosen = np.full((*free.shape[:2], len(iou)), -1)
    for d in range(len(iou)):
        fits = free & (iou[d] >= thresholds)
        if not fits.any():
            continue
        best = np.where(fits, rank_by_iou[d] + bonus, -1).argmax(axis=-1)
        found = fits.any(axis=-1)
        chosen[found, d] = best[found]
        a, t = np.nonzero(found & ~crowd[best])
        free[a, t, best[a, t]] = False
    return chosen


def _outside(areas: np.ndarray) -> np.ndarray:
    """bool [A, D]: which areas lie outside each area range."""
    low, high = np.array(list(AREA_RANGES.values())).T[..., None]
    return (areas < low) | (areas > high)


def _box_iou(boxes: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU float64 [D, G] of xywh boxes; with a crowd the intersection over the detection's own area."""
    low = np.maximum(boxes[:, None, :2], truth[:, :2])
    high = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], truth[:, :2] + truth[:, 2:])
    intersection = (high - low).clip(min=0).prod(axis=-1)
    area = boxes[:, 2:].prod(axis=-1)[:, None]
    union = np.where(crowd, area, area + truth[:, 2:].prod(axis=-1) - intersection)
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=intersection > 0)


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table of `evaluate` results by run name: percent, one decimal, `-` where undefined."""
    columns = ("AP", "AP50", "AP75", "APr", "APc", "APf", "AR")
    width = max(map(len, ["run", *rows]))
    lines = [
        f"| {'run':<{width}} | " + " | ".join(f"{name:>4}" for name in columns) + " |",
        f"|:{'-' * width}-|" + "-----:|" * len(columns),
    ]
    for run, metrics in rows.items():
        recall = next(name for name in metrics if name.startswith("AR@"))
        values = [metrics[recall if name == "AR" else name] for name in columns]
        cells = ("-" if value < 0 else f"{100 * value:.1f}" for value in values)
        lines.append(f"| {run:<{width}} | " + " | ".join(f"{cell:>4}" for cell in cells) + " |")
    return "\n".join(lines)
