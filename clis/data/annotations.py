"""Instance-level annotations: LVIS v1, LVIS v0.5 and COCO-form JSON files as packed arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from clis.data.annotation_cache import cached
from clis.data.categories import Category, image_class_pairs
from clis.data.mapped import MappedFile
from clis.data.records import Packed, document_parts, lists_of, pack_records
from clis.text import counted

MAX_OVERFLOW = 1.0
"""Pixels by which a training box may leave its image and be clipped silently: LVIS's own rounding."""
ROUNDING = 1e-3
"""By which fractions of an image may leave 0..1."""
FEWEST_BOXES = 10
"""Of fewer boxes nobody can say whether they are meant as x1, y1, x2, y2."""
CACHED_BYTES = 8_000_000
"""Size in bytes from which on an annotation file is cached (see `clis.data.annotation_cache`)."""

_PAIRS = ("negatives", "not_exhaustive")

Advance = Callable[[int], object]
"""Called with the number of bytes after each part of a file that was read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotations:
    """One annotation file, packed: N images, A annotations, C classes.

    Annotations are grouped by image, in file order within an image; images are in file order. Labels are
    0..C-1 in ascending order of the category id. The arrays of a big file are read-only and memory-mapped:
    all processes share them, including those that they are sent to.
    """

    path: str
    categories: tuple[Category, ...]
    image_ids: np.ndarray
    """int64 [N]."""
    image_sizes: np.ndarray
    """int32 [N, 2], height and width."""
    file_names: np.ndarray
    """str [N], relative to the image folder (see `clis.data.records.image_file_name`)."""
    offsets: np.ndarray
    """int64 [N + 1]: the annotations of image i are the rows offsets[i]:offsets[i + 1] of the next five."""
    annotation_ids: np.ndarray
    """int64 [A]."""
    labels: np.ndarray
    """int64 [A]."""
    bboxes: np.ndarray
    """float64 [A, 4], x y w h as in the file, so that the metric sees the file's own digits."""
    areas: np.ndarray
    """float64 [A], the file's ``area`` (w * h where the file has none)."""
    crowd: np.ndarray
    """bool [A], COCO's ``iscrowd``; never in LVIS."""
    ignored: np.ndarray
    """bool [A], ``ignore``, by which the `lvis` package leaves a box uncounted; never in LVIS itself."""
    federated: bool
    """True where the file has LVIS's neg_category_ids; False means every image is annotated exhaustively for
    every class."""
    groups_counted: bool
    """Whether classes have no ``frequency`` in the file, so that their groups are those of its own counts."""
    renamed: int
    """File names that were shortened (see `clis.data.records.image_file_name`)."""
    negatives: tuple[np.ndarray, np.ndarray]
    """Labels known to be absent: (offsets int64 [N + 1], labels int64 [...]); empty where not federated."""
    not_exhaustive: tuple[np.ndarray, np.ndarray]
    """Labels not exhaustively annotated, in the same form; they mean nothing where not federated."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image_ids)

    def __repr__(self) -> str:
        counts = f"{len(self)} images, {len(self.labels)} boxes, {self.num_classes} classes"
        return f"<Annotations of {self.path}: {counts}>"

    @property
    def num_classes(self) -> int:
        """C, background not counted."""
        return len(self.categories)

    @property
    def rows_of_boxes(self) -> np.ndarray:
        """The place of the image of each box, int64 [A]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def images_per_class(self) -> np.ndarray:
        """Count the images with a box of each class, int64 [C]."""
        _, held = image_class_pairs(self.rows_of_boxes, self.labels, self.num_classes)
        return np.bincount(held, minlength=self.num_classes)

    def boxes_of(self, image: int) -> np.ndarray:
        """Return the boxes of the image at this place: float32 [G, 4], xyxy in pixels of the stored image."""
        return _corners(self.bboxes[self._rows(image)]).astype(np.float32)

    def labels_of(self, image: int) -> np.ndarray:
        """Return the labels of the image at this place: int64 [G]."""
        return self.labels[self._rows(image)].copy()

    def _rows(self, image: int) -> slice:
        return slice(self.offsets[image], self.offsets[image + 1])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process: mapped arrays by the names of their files."""
        return {name: _each(value, np.ndarray, MappedFile.replace) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            self.__dict__[name] = _each(value, MappedFile, MappedFile.open)


def _each(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to the value, or to each element of a tuple, where it is of this kind."""
    if isinstance(value, tuple):
        return tuple(_each(item, kind, change) for item in value)
    return change(value) if isinstance(value, kind) else value


def load_annotations(
    path: str | Path, advance: Advance = lambda count: None, *, unlabeled: bool = False
) -> Annotations:
    """Read an LVIS v1, LVIS v0.5 or COCO-form JSON file; the boxes keep the file's digits.

    A category without LVIS's ``image_count`` or ``frequency`` has them counted in this file. Files of
    `CACHED_BYTES` and more are read once and then mapped from the cache, as long as they stay the same.

    Args:
        unlabeled: accept a file without annotations, such as that of a test split.

    Raises:
        ValueError: the file is not JSON, lacks a key, repeats an id, refers to an unknown one, or holds no
            image or no annotation; the message names the file and the first record at fault.
    """
    path = os.path.expanduser(path)

    def build() -> Packed:
        return pack_records(document_parts(path, advance), path)

    annotations = _unpacked(cached(path, "file", build) if _is_big(path) else build(), path)
    if not unlabeled:
        _refuse_unlabeled(annotations)
    return annotations


def load_training_annotations(
    path: str | Path,
    *,
    drop_invalid: bool,
    empty_images: bool = True,
    advance: Advance = lambda count: None,
) -> tuple[Annotations, dict[str, int]]:
    """Load annotations and apply `checked_for_training`, with the result cached as in `load_annotations`."""

    def build() -> Packed:
        annotations, counts = checked_for_training(
            load_annotations(path, advance), drop_invalid=drop_invalid, empty_images=empty_images
        )
        arrays, values = _packed(annotations)
        return arrays, values | {"counts": counts}

    form = "training" + "-drop-invalid" * drop_invalid + "-no-empty" * (not empty_images)
    packed = cached(path, form, build) if _is_big(path) else build()
    return _unpacked(packed, path), packed[1]["counts"]


def pack_annotations(document: Mapping[str, Any], path: str | Path) -> Annotations:
    """Pack a loaded JSON document as `load_annotations` does; `path` is its name in errors."""
    annotations = _unpacked(pack_records(lists_of(document), path), path)
    _refuse_unlabeled(annotations)
    return annotations


def _refuse_unlabeled(annotations: Annotations) -> None:
    if not len(annotations.labels):
        raise ValueError(
            f"{annotations.path}: empty split: no annotations, so nothing can be trained on or judged; use a "
            "file that has some (evaluate.py CHECKPOINT data.val=FILE gives the detections of one without)"
        )


def _is_big(path: str | Path) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) >= CACHED_BYTES


def _packed(annotations: Annotations) -> Packed:
    """Return the arrays in the form that `pack_records` gave them."""
    values = {field.name: getattr(annotations, field.name) for field in fields(annotations)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    for name in _PAIRS:
        arrays[f"{name}_offsets"], arrays[f"{name}_labels"] = values[name]
    categories = [asdict(category) for category in annotations.categories]
    return arrays, {
        "categories": categories, "federated": annotations.federated,
        "groups_counted": annotations.groups_counted, "renamed": annotations.renamed,
    }  # fmt: skip


def _unpacked(packed: Packed, path: str | Path) -> Annotations:
    arrays, values = dict(packed[0]), packed[1]
    pairs = {name: (arrays.pop(f"{name}_offsets"), arrays.pop(f"{name}_labels")) for name in _PAIRS}
    return Annotations(
        path=str(path),
        categories=tuple(Category(**category) for category in values["categories"]),
        federated=values["federated"],
        groups_counted=values["groups_counted"],
        renamed=values["renamed"],
        negatives=pairs["negatives"],
        not_exhaustive=pairs["not_exhaustive"],
        **arrays,
    )


def checked_for_training(
    annotations: Annotations, *, drop_invalid: bool, empty_images: bool = True
) -> tuple[Annotations, dict[str, int]]:
    """Return the annotations fit for training: every box with area in float32 and inside its image.

    Crowds and boxes flagged `ignore` are left out. Boxes that leave their image by up to `MAX_OVERFLOW`
    pixels are clipped. With `drop_invalid`, so are those that leave it further, and boxes are dropped that
    are not finite, have no area (left), a side under one pixel or an ``area`` of at most 0 (mmdetection 3.3,
    CocoDataset.parse_data_info).

    Args:
        empty_images: keep images that no box is left in, as background.

    Returns:
        The annotations, and how many ``crowd boxes``, ``ignored boxes`` (flag ``ignore``) and ``dropped
        boxes`` were left out, ``clipped boxes`` were clipped by more than `MAX_OVERFLOW`, and ``empty
        images`` were left out.

    Raises:
        ValueError: boxes are of another form than x, y, width, height in pixels; a box is invalid and
            `drop_invalid` is False (the message names the first); or no box is left.
    """
    rows = annotations.rows_of_boxes
    limits = np.tile(annotations.image_sizes[rows, ::-1], 2)
    corners = _corners(annotations.bboxes)
    clipped = np.clip(corners, 0, limits)
    infinite = ~np.isfinite(corners).all(axis=1)
    # In float32, as `boxes_of` gives it: a width of 1e-6 at x = 600 is none.
    x1, y1, x2, y2 = clipped.astype(np.float32).T
    empty = (x2 <= x1) | (y2 <= y1)
    # Decimal digits do not add up exactly in binary (600.01 + 40.99), hence the 1e-6.
    outside = np.abs(corners - clipped).max(axis=1) > MAX_OVERFLOW + 1e-6
    used = ~annotations.crowd & ~annotations.ignored
    _refuse_other_forms(annotations, annotations.bboxes[used], limits[used], outside[used])
    if not drop_invalid:
        _refuse(annotations, rows, used & infinite, "is not finite", "remove it")
        _refuse(annotations, rows, used & empty, "has no area", "remove it")
        _refuse(annotations, rows, used & outside, "leaves the image by more than 1 px", "correct it")

    keep = used & ~infinite & ~empty
    if drop_invalid:
        keep &= (annotations.bboxes[:, 2:] >= 1).all(axis=1) & (annotations.areas > 0)
    moved = (corners != clipped).any(axis=1)
    bboxes = annotations.bboxes.copy()
    bboxes[moved] = np.hstack([clipped[:, :2], clipped[:, 2:] - clipped[:, :2]])[moved]
    counts = {
        "dropped boxes": int((used & ~keep).sum()),
        "clipped boxes": int((keep & outside).sum()),
        "crowd boxes": int(annotations.crowd.sum()),
        "ignored boxes": int((annotations.ignored & ~annotations.crowd).sum()),
    }
    kept = _select(replace(annotations, bboxes=bboxes), keep)
    if not len(kept.labels):
        raise ValueError(
            f"{annotations.path}: no box is left to train on: {describe_changes(counts)}; correct the boxes"
        )
    has_box = (np.diff(kept.offsets) > 0) | empty_images
    counts["empty images"] = int((~has_box).sum())
    return _select_images(kept, has_box) if counts["empty images"] else kept, counts


def _select_images(annotations: Annotations, keep: np.ndarray) -> Annotations:
    """Select the images where the mask [N] is True; those left out have no annotation."""
    pairs = {}
    for name in _PAIRS:
        offsets, labels = getattr(annotations, name)
        inside = np.repeat(keep, np.diff(offsets))
        lengths = np.diff(offsets)[keep]
        pairs[name] = (np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), labels[inside])
    return replace(
        annotations,
        image_ids=annotations.image_ids[keep],
        image_sizes=annotations.image_sizes[keep],
        file_names=annotations.file_names[keep],
        offsets=np.concatenate([[0], annotations.offsets[1:][keep]]),
        negatives=pairs["negatives"],
        not_exhaustive=pairs["not_exhaustive"],
    )


def _select(annotations: Annotations, keep: np.ndarray) -> Annotations:
    """Select the annotations where the mask [A] is True; every image stays."""
    kept_before = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
    return replace(
        annotations,
        offsets=kept_before[annotations.offsets],
        annotation_ids=annotations.annotation_ids[keep],
        labels=annotations.labels[keep],
        bboxes=annotations.bboxes[keep],
        areas=annotations.areas[keep],
        crowd=annotations.crowd[keep],
        ignored=annotations.ignored[keep],
    )


def describe_changes(counts: Mapping[str, int]) -> str:
    """Say what `checked_for_training` has counted: ``1 dropped box, 12 crowd boxes``."""
    one = {what: what.replace("boxes", "box").replace("images", "image") for what in counts}
    return ", ".join(counted(count, one[what], what) for what, count in counts.items() if count)


def _refuse_other_forms(
    annotations: Annotations, bboxes: np.ndarray, limits: np.ndarray, outside: np.ndarray
) -> None:
    """Raise an error if boxes are fractions of their images, or x1, y1, x2, y2: no switch corrects these.

    Args:
        bboxes: of the annotations that count, [n,4].
        limits: width, height, width, height of their images, [n,4].
        outside: which of them, as x, y, width, height, leave their images, [n].
    """
    form = "boxes are x, y, width, height in pixels"
    finite = np.isfinite(bboxes).all(axis=1)
    bboxes, limits, outside = bboxes[finite], limits[finite], outside[finite]
    within = (np.abs(bboxes) <= 1 + ROUNDING).all() and (limits > 2).all()
    if within and (bboxes[:, 2:] > 0).any():
        raise ValueError(
            f"{annotations.path}: all boxes are within 0..1, as fractions of the image would be; {form}"
        )
    as_corners = (bboxes[:, 2:] >= bboxes[:, :2]).all() and (bboxes <= limits + MAX_OVERFLOW).all()
    if len(bboxes) >= FEWEST_BOXES and outside.mean() > 0.5 and as_corners:
        raise ValueError(
            f"{annotations.path}: {outside.sum()} of {len(bboxes)} boxes leave their images, and all of them "
            f"would fit as x1, y1, x2, y2; {form} (clip boxes that are meant to leave their images)"
        )


def _refuse(annotations: Annotations, rows: np.ndarray, bad: np.ndarray, what: str, remedy: str) -> None:
    """Raise an error for the first annotation of the mask [A], if there is one."""
    if not bad.any():
        return
    first = int(np.argmax(bad))
    image_id, (height, width) = annotations.image_ids[rows[first]], annotations.image_sizes[rows[first]]
    box = ", ".join(f"{value:.10g}" for value in annotations.bboxes[first])
    raise ValueError(
        f"{annotations.path}: annotation {annotations.annotation_ids[first]} (image {image_id}): box [{box}] "
        f"{what}; {remedy} or pass data.drop_invalid=true ({bad.sum()} such boxes; this image is {width} x "
        f"{height} px)"
    )


def _corners(bboxes: np.ndarray) -> np.ndarray:
    """Convert boxes from xywh to xyxy, float64 [..., 4]."""
    return np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1)
