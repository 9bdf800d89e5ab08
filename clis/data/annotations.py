"""Instance-level annotations: LVIS v1, LVIS v0.5 and COCO-form JSON files as packed arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

MAX_OVERFLOW = 1.0
"""Pixels by which a training box may leave its image and be clipped without a word: LVIS's own rounding."""

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Category:
    """One class; its label is its place in `Annotations.categories`."""

    id: int
    name: str
    synset: str = ""
    """WordNet synset as in LVIS, e.g. ``aerosol.n.02``; empty where the file has none."""
    frequency: str
    """``r``, ``c`` or ``f``: 1-10, 11-100 or more than 100 training images (LVIS)."""
    image_count: int
    """Training images that hold the class."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotations:
    """One annotation file, packed: N images, A annotations, C classes.

    Annotations are grouped by image, in file order within an image; images are in file order. Labels are
    0..C-1 in ascending order of the category id.
    """

    path: str
    categories: tuple[Category, ...]
    image_ids: np.ndarray
    """int64 [N]."""
    image_sizes: np.ndarray
    """int32 [N, 2], height and width."""
    file_names: np.ndarray
    """str [N], relative to the image folder (see `image_file_name`)."""
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
    """True where the file has LVIS's neg_category_ids / not_exhaustive_category_ids; False means every image
    is annotated exhaustively for every class."""
    negatives: tuple[np.ndarray, np.ndarray]
    """Labels known to be absent: (offsets int64 [N + 1], labels int64 [...]); empty where not federated."""
    not_exhaustive: tuple[np.ndarray, np.ndarray]
    """Labels not exhaustively annotated, in the same form."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        """C, background not counted."""
        return len(self.categories)

    def boxes_of(self, image: int) -> np.ndarray:
        """Boxes of the image at this place: float32 [G, 4], xyxy in pixels of the stored image."""
        return _corners(self.bboxes[self._rows(image)]).astype(np.float32)

    def labels_of(self, image: int) -> np.ndarray:
        """Labels of the image at this place: int64 [G]."""
        return self.labels[self._rows(image)]

    def _rows(self, image: int) -> slice:
        return slice(self.offsets[image], self.offsets[image + 1])


def load_annotations(path: str | Path) -> Annotations:
    """Reads an LVIS v1, LVIS v0.5 or COCO-form JSON file; the boxes keep the file's digits.

    A category without LVIS's ``image_count`` or ``frequency`` has them counted in this file.

    Raises:
        ValueError: the file is not JSON, lacks a key, repeats an id, refers to an unknown one, or holds no
            image or no annotation; the message names the file and the first record at fault.
    """
    return pack_annotations(read_document(path), path)


def pack_annotations(document: dict[str, list[Record]], path: str | Path) -> Annotations:
    """The same of a loaded file; `path` is its name in errors."""
    images, records = _checked_lists(document, path)
    categories, category_ids = _sorted_categories(document["categories"], path)

    image_ids = _unique_ids(images, "image", path)
    annotation_ids = _unique_ids(records, "annotation", path)
    rows = _references(records, "image_id", image_ids, path)
    labels = _references(records, "category_id", category_ids, path)
    bboxes = _bboxes(records, path)
    order = np.argsort(rows, kind="stable")
    return Annotations(
        path=str(path),
        categories=_categories(categories, rows, labels, path),
        image_ids=image_ids,
        image_sizes=_image_sizes(images, path),
        file_names=_file_names(images, path),
        offsets=np.searchsorted(rows[order], np.arange(len(images) + 1)).astype(np.int64),
        annotation_ids=annotation_ids[order],
        labels=labels[order],
        bboxes=bboxes[order],
        areas=_areas(records, bboxes, path)[order],
        crowd=np.array([bool(record.get("iscrowd")) for record in records])[order],
        ignored=np.array([bool(record.get("ignore")) for record in records])[order],
        federated=any("neg_category_ids" in image for image in images),
        negatives=_label_lists(images, "neg_category_ids", category_ids, path),
        not_exhaustive=_label_lists(images, "not_exhaustive_category_ids", category_ids, path),
    )


def image_file_name(record: Record) -> str:
    """Path of an image record below the image folder.

    LVIS v1 has no ``file_name``: the last two parts of ``coco_url`` name the file (its val split holds
    train2017 images). LVIS v0.5 prefixes some names with ``COCO_val2014_``, which the 2017 files do not have.
    """
    if "file_name" not in record:
        return "/".join(record["coco_url"].split("/")[-2:])
    return record["file_name"].removeprefix("COCO_val2014_").removeprefix("COCO_train2014_")


def check_same_categories(
    first: Sequence[Category], first_source: str, second: Sequence[Category], second_source: str
) -> None:
    """Raises `ValueError`, naming the sources, unless each label is the same category id and name in both."""
    if len(first) != len(second):
        raise ValueError(
            f"{first_source} has {len(first)} categories, {second_source} has {len(second)}; they must be of "
            "one data set"
        )
    for label, (a, b) in enumerate(zip(first, second)):
        if (a.id, a.name) != (b.id, b.name):
            raise ValueError(
                f"label {label} is category {a.id} ({a.name}) in {first_source} but {b.id} ({b.name}) in "
                f"{second_source}; they must be of one data set"
            )


def checked_for_training(
    annotations: Annotations, *, drop_invalid: bool
) -> tuple[Annotations, dict[str, int]]:
    """Annotations that can be learned from: no crowd; every box has area in float32 and lies in its image.

    Boxes that leave their image by up to `MAX_OVERFLOW` pixels are clipped. With `drop_invalid`, so are those
    that leave it further, and boxes that are not finite or have no area (left) are dropped.

    Returns:
        The annotations (every image stays), and how many boxes were left out as ``crowd``, ``dropped``, and
        ``clipped`` by more than `MAX_OVERFLOW`.

    Raises:
        ValueError: an invalid box and not `drop_invalid`; the message names the first.
    """
    rows = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    limits = np.tile(annotations.image_sizes[rows, ::-1], 2)
    corners = _corners(annotations.bboxes)
    clipped = np.clip(corners, 0, limits)
    infinite = ~np.isfinite(corners).all(axis=1)
    # In float32, as `boxes_of` gives it: a width of 1e-6 at x = 600 is none.
    x1, y1, x2, y2 = clipped.astype(np.float32).T
    empty = (x2 <= x1) | (y2 <= y1)
    # Decimal digits do not add up exactly in binary (600.01 + 40.99), hence the 1e-6.
    outside = np.abs(corners - clipped).max(axis=1) > MAX_OVERFLOW + 1e-6
    counted = ~annotations.crowd
    if not drop_invalid:
        _refuse(annotations, rows, counted & infinite, "is not finite", "remove it")
        _refuse(annotations, rows, counted & empty, "has no area", "remove it")
        _refuse(annotations, rows, counted & outside, "leaves the image by more than 1 px", "correct it")

    keep = counted & ~infinite & ~empty
    moved = (corners != clipped).any(axis=1)
    bboxes = annotations.bboxes.copy()
    bboxes[moved] = np.hstack([clipped[:, :2], clipped[:, 2:] - clipped[:, :2]])[moved]
    counts = {
        "dropped": int((counted & ~keep).sum()),
        "clipped": int((keep & outside).sum()),
        "crowd": int(annotations.crowd.sum()),
    }
    return _select(replace(annotations, bboxes=bboxes), keep), counts


def _select(annotations: Annotations, keep: np.ndarray) -> Annotations:
    """The annotations where the mask [A] is True; every image stays."""
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


def _refuse(annotations: Annotations, rows: np.ndarray, bad: np.ndarray, what: str, remedy: str) -> None:
    """Raises for the first annotation of the mask [A], if there is one."""
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
    """xywh -> xyxy, float64 [..., 4]."""
    return np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1)


def read_document(path: str | Path) -> dict[str, list[Record]]:
    """The JSON of an annotation file; errors as in `load_annotations`."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such annotation file (a config's paths are relative to data.root, or CLIS_DATA)"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON, perhaps truncated ({error}); fetch or write the file again"
        ) from error


def _checked_lists(document: object, path: str | Path) -> tuple[list[Record], list[Record]]:
    """The images and annotations of a document that has all three lists."""
    for key in ("images", "annotations", "categories"):
        value = document.get(key) if isinstance(document, dict) else None
        if not isinstance(value, list):
            raise ValueError(
                f"{path}: no list of {key!r}; an LVIS or COCO-form instance file has images, annotations and "
                "categories"
            )
        if not value:
            raise ValueError(f"{path}: empty split: no {key}; use a file that has some")
    return document["images"], document["annotations"]


def _fault(path: str | Path, kind: str, records: Sequence[Record], place: int, what: str) -> ValueError:
    """The error for one record: named by its id where it has one, else by its place in the file."""
    record = records[place]
    has_id = isinstance(record, dict) and "id" in record
    name = f"{kind} {record['id']}" if has_id else f"{kind} number {place} in the file"
    image = f" (image {record['image_id']})" if has_id and "image_id" in record else ""
    return ValueError(f"{path}: {name}{image}: {what}")


def _column(records: Sequence[Record], key: str, kind: str, path: str | Path) -> list[Any]:
    try:
        return [record[key] for record in records]
    except (KeyError, TypeError):
        bad = [not isinstance(record, dict) or key not in record for record in records]
        what = f"key {key!r} is missing ({sum(bad)} like it); add it or remove the record"
        raise _fault(path, kind, records, bad.index(True), what) from None


def _integers(records: Sequence[Record], key: str, kind: str, path: str | Path) -> np.ndarray:
    """int64 [len(records)]; numpy alone would round 1.5 and parse "1"."""
    values = _column(records, key, kind, path)
    bad = next((place for place, value in enumerate(values) if not _is_int64(value)), None)
    if bad is not None:
        raise _fault(path, kind, records, bad, f"{key} is {values[bad]!r}; it must be an integer of 64 bits")
    return np.array(values, dtype=np.int64)


def _is_int64(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _unique_ids(records: Sequence[Record], kind: str, path: str | Path) -> np.ndarray:
    ids = _integers(records, "id", kind, path)
    values, counts = np.unique(ids, return_counts=True)
    repeated = values[counts > 1]
    if len(repeated):
        raise ValueError(
            f"{path}: {kind} id {repeated[0]} is used more than once ({len(repeated)} such ids); "
            f"give every {kind} an id of its own"
        )
    return ids


def _places(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Place of each value among the unique ids, -1 where it is none of them: int64, as long as values."""
    order = np.argsort(ids)
    found = order[np.searchsorted(ids, values, sorter=order).clip(max=len(ids) - 1)]
    return np.where(ids[found] == values, found, -1)


def _references(records: Sequence[Record], key: str, ids: np.ndarray, path: str | Path) -> np.ndarray:
    values = _integers(records, key, "annotation", path)
    places = _places(values, ids)
    unknown = places < 0
    if unknown.any():
        first = int(np.argmax(unknown))
        kind = key.removesuffix("_id")
        what = (
            f"{key} {values[first]} is none of the file's ({unknown.sum()} such annotations); remove them or "
            f"add the {kind} records"
        )
        raise _fault(path, "annotation", records, first, what)
    return places


def _floats(
    values: list[Any], shape: tuple[int, ...], key: str, records: Sequence[Record], path: str | Path
) -> np.ndarray:
    """float64 of this shape for one value a record."""
    try:
        array = np.array(values)
        if array.dtype.kind in "iuf" and array.shape == shape:
            return array.astype(np.float64)
    except ValueError:  # lists of unequal length
        pass
    for place, value in enumerate(values):
        item = np.array(value, dtype=object)
        if item.shape != shape[1:] or not all(_is_float64(number) for number in item.flat):
            what = f"{key} is {value!r}; it must be {'4 numbers' if key == 'bbox' else 'a number'}"
            raise _fault(path, "annotation", records, place, what)
    return np.array(values, dtype=np.float64)  # integers beyond 64 bits


def _is_float64(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000


def _bboxes(records: Sequence[Record], path: str | Path) -> np.ndarray:
    values = _column(records, "bbox", "annotation", path)
    return _floats(values, (len(records), 4), "bbox", records, path)


def _areas(records: Sequence[Record], bboxes: np.ndarray, path: str | Path) -> np.ndarray:
    box_areas = bboxes[:, 2] * bboxes[:, 3]
    values = [record.get("area", area) for record, area in zip(records, box_areas.tolist())]
    return _floats(values, (len(records),), "area", records, path)


def _image_sizes(images: Sequence[Record], path: str | Path) -> np.ndarray:
    sizes = np.stack([_integers(images, key, "image", path) for key in ("height", "width")], axis=1)
    bad = (sizes <= 0).any(axis=1)
    if bad.any():
        height, width = sizes[bad][0]
        what = f"height {height} and width {width} must be positive; correct or remove it"
        raise _fault(path, "image", images, int(np.argmax(bad)), what)
    return sizes.astype(np.int32)


def _file_names(images: Sequence[Record], path: str | Path) -> np.ndarray:
    for place, image in enumerate(images):
        if not isinstance(image.get("file_name", image.get("coco_url")), str):
            raise _fault(path, "image", images, place, "neither file_name nor coco_url is a string; add one")
    return np.array([image_file_name(image) for image in images])


def _sorted_categories(records: Sequence[Record], path: str | Path) -> tuple[list[Record], np.ndarray]:
    ids = _unique_ids(records, "category", path)
    order = np.argsort(ids)
    return [records[place] for place in order], ids[order]


def _categories(
    records: Sequence[Record], rows: np.ndarray, labels: np.ndarray, path: str | Path
) -> tuple[Category, ...]:
    """LVIS's own counts where the file has them, else counts of the images (rows) that hold each label."""
    names = _column(records, "name", "category", path)
    image_label_pairs = np.unique(rows * len(records) + labels)
    counts = np.bincount(image_label_pairs % len(records), minlength=len(records)).tolist()
    categories = []
    for place, (record, name) in enumerate(zip(records, names)):
        count = record.get("image_count", counts[place])
        if not isinstance(name, str) or not isinstance(count, int):
            what = f"name {name!r} and image_count {count!r} must be a string and an integer"
            raise _fault(path, "category", records, place, what)
        frequency = record.get("frequency", _frequency(count))
        if frequency not in ("r", "c", "f"):
            what = f"frequency {frequency!r} must be r, c or f"
            raise _fault(path, "category", records, place, what)
        synset = record.get("synset") or ""
        categories.append(
            Category(id=record["id"], name=name, synset=synset, frequency=frequency, image_count=count)
        )
    return tuple(categories)


def _frequency(image_count: int) -> str:
    return "r" if image_count <= 10 else "c" if image_count <= 100 else "f"


def _label_lists(
    images: Sequence[Record], key: str, category_ids: np.ndarray, path: str | Path
) -> tuple[np.ndarray, np.ndarray]:
    """One list of category ids an image -> offsets int64 [N + 1], labels int64 [...]."""
    lists = [image.get(key) or () for image in images]
    for place, ids in enumerate(lists):
        if not isinstance(ids, list | tuple) or not all(isinstance(id_, int) for id_ in ids):
            what = f"{key} is {ids!r}; it must be a list of category ids"
            raise _fault(path, "image", images, place, what)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])]).astype(np.int64)
    label_of = {category_id: label for label, category_id in enumerate(category_ids.tolist())}
    labels = np.array([label_of.get(id_, -1) for id_ in chain.from_iterable(lists)], dtype=np.int64)
    unknown = labels < 0
    if unknown.any():
        first = int(np.argmax(unknown))
        image = int(np.searchsorted(offsets, first, side="right")) - 1
        value = lists[image][first - offsets[image]]
        what = f"{key} has the unknown category id {value!r} ({unknown.sum()} such entries); remove them"
        raise _fault(path, "image", images, image, what)
    return offsets, labels
