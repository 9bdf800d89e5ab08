"""The JSON records of an LVIS or COCO-form file, checked and packed into arrays in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from clis.data.categories import frequency_group, image_class_pairs
from clis.data.json_lists import NotJSON, read_lists

Record = dict[str, Any]
Packed = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Arrays by name, and a few further values that JSON can hold."""

LISTS = {"images": "image", "annotations": "annotation", "categories": "category"}
"""The lists of an instance file, and what one of their records is called."""


MAX_NAME = 4096
"""Characters of a file name: a longer one is not a path, and all names take as much memory as the longest."""


def document_parts(
    path: str | Path, advance: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[str, list[Record]]]:
    """Yield the lists of an annotation file, some thousand records at a time; see `read_lists`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not JSON.
    """
    try:
        yield from read_lists(path, LISTS, advance)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such annotation file; if a config names it, it is relative to data.root: pass "
            "data.root=FOLDER if the data have moved (run folders and checkpoints keep theirs; CLIS_DATA is "
            "for configs without one)"
        ) from None
    except NotJSON as error:
        raise ValueError(
            f"{path}: not valid JSON, perhaps truncated ({error}); fetch or write the file again"
        ) from error


def read_document(path: str | Path) -> dict[str, list[Record]]:
    """Read all records of an annotation file by list, for callers that need the masks."""
    document: dict[str, list[Record]] = {}
    for key, records in document_parts(path):
        document.setdefault(key, []).extend(records)
    return document


def lists_of(document: Mapping[str, Any]) -> Iterator[tuple[str, list[Record]]]:
    """Yield the lists of a loaded file, in the form of `document_parts`."""
    return ((key, document[key]) for key in LISTS if isinstance(document.get(key), list))


def pack_records(parts: Iterable[tuple[str, list[Record]]], path: str | Path) -> Packed:
    """Check and pack the records of a file; `path` is its name in errors.

    Returns:
        The arrays of `clis.data.annotations.Annotations` by their names, the pairs as ``..._offsets`` and
        ``..._labels``; and `categories` (the fields of each), `federated`, `groups_counted` and
        `renamed`.

    Raises:
        ValueError: see `clis.data.annotations.load_annotations`.
    """
    images, annotations, records = _read_columns(parts, path)
    image_ids, annotation_ids = images.pop("id"), annotations["id"]
    _check_unique(image_ids, "image", path)
    _check_unique(annotation_ids, "annotation", path)
    categories, category_ids = _sorted_categories(records, path)
    rows = _references(annotations, "image_id", image_ids, path)
    labels = _references(annotations, "category_id", category_ids, path)
    order = np.argsort(rows, kind="stable")
    arrays = {
        "image_ids": image_ids,
        "image_sizes": images["size"],
        "file_names": images["file_name"],
        "offsets": np.searchsorted(rows[order], np.arange(len(image_ids) + 1)).astype(np.int64),
        "annotation_ids": annotation_ids[order],
        "labels": labels[order],
        "bboxes": annotations["bbox"][order],
        "areas": annotations["area"][order],
        "crowd": annotations["crowd"][order],
        "ignored": annotations["ignored"][order],
    }
    for name, key in (("negatives", "neg_category_ids"), ("not_exhaustive", "not_exhaustive_category_ids")):
        counts, listed = images[f"{key}_counts"], images[key]
        arrays[f"{name}_offsets"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        arrays[f"{name}_labels"] = _listed_labels(
            listed, arrays[f"{name}_offsets"], category_ids, image_ids, key, path
        )
    return arrays, {
        "categories": _category_fields(categories, rows, labels, path),
        "federated": _is_federated(images["federated"], image_ids, path),
        "groups_counted": not all("frequency" in record for record in categories),
        "renamed": int(images["renamed"].sum()),
    }


def _is_federated(has_negatives: np.ndarray, image_ids: np.ndarray, path: str | Path) -> bool:
    """Return whether images say which classes they do not have (LVIS); all do, or none does."""
    if has_negatives.any() and not has_negatives.all():
        first = image_ids[np.flatnonzero(~has_negatives)[0]]
        raise ValueError(
            f"{path}: image {first} has no neg_category_ids, which other images have: the file is neither "
            "LVIS's nor COCO's form; give every image both (an empty list verifies no absent class), or none"
        )
    return bool(has_negatives.any())


def image_file_name(record: Record) -> str:
    """Return the path of an image record below the image folder.

    LVIS v1 has no ``file_name``: the last two parts of ``coco_url`` name the file (its val split holds
    train2017 images). LVIS v0.5 prefixes some names with ``COCO_val2014_``, which the 2017 files that it is
    used with do not have; COCO 2014 itself has files of such names.
    """
    if record.get("file_name") is None:
        return "/".join(record["coco_url"].split("/")[-2:])
    name = record["file_name"]
    is_lvis = "neg_category_ids" in record
    return name.removeprefix("COCO_val2014_").removeprefix("COCO_train2014_") if is_lvis else name


def _read_columns(
    parts: Iterable[tuple[str, list[Record]]], path: str | Path
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[Record]]:
    """Read the columns of the images and of the annotations, and the category records, all in file order."""
    columns: dict[str, list[dict[str, np.ndarray]]] = {"images": [], "annotations": []}
    categories: list[Record] = []
    counts: dict[str, int] = {}
    for key, records in parts:
        first = counts.setdefault(key, 0)
        counts[key] += len(records)
        if key == "categories":
            categories += records
        elif records:
            read = _image_columns if key == "images" else _annotation_columns
            columns[key].append(read(_Part(path, LISTS[key], records, first)))
    if "images" in counts and "categories" in counts:
        counts.setdefault("annotations", 0)  # some files of a test split lack the key
    for key in LISTS:
        if key not in counts:
            raise ValueError(
                f"{path}: no list of {key!r}; an LVIS or COCO-form instance file has images, annotations and "
                "categories"
            )
        if not counts[key] and key != "annotations":
            raise ValueError(f"{path}: empty split: no {key}; use a file that has some")
    if not counts["annotations"]:
        columns["annotations"] = [_annotation_columns(_Part(path, "annotation", []))]
    images, annotations = (
        {name: np.concatenate([part[name] for part in c]) for name in c[0]} for c in columns.values()
    )
    return images, annotations, categories


class _Part:
    """Some records of one list of a file, starting at number `first`."""

    def __init__(self, path: str | Path, kind: str, records: Sequence[Record], first: int = 0) -> None:
        self.path, self.kind, self.records, self.first = path, kind, records, first

    def fault(self, place: int, what: str) -> ValueError:
        """Make the error for one record: named by its id where it has one, else by its place in the file."""
        record = self.records[place]
        has_id = isinstance(record, dict) and "id" in record
        name = (
            f"{self.kind} {record['id']}"
            if has_id
            else f"{self.kind} number {self.first + place} in the file"
        )
        image = f" (image {record['image_id']})" if has_id and "image_id" in record else ""
        return ValueError(f"{self.path}: {name}{image}: {what}")

    def column(self, key: str) -> list[Any]:
        """Return the values of a key, one per record; raise an error where a record lacks it."""
        try:
            return [record[key] for record in self.records]
        except (KeyError, TypeError):
            bad = [not isinstance(record, dict) or key not in record for record in self.records]
            what = (
                f"key {key!r} is missing ({sum(bad)} of {len(bad)} like it here); add it or remove the record"
            )
            raise self.fault(bad.index(True), what) from None

    def integers(self, key: str) -> np.ndarray:
        """Return int64 values, one per record; numpy alone would round 1.5 and parse "1"."""
        values = self.column(key)
        try:
            if set(map(type, values)) <= {int}:
                return np.array(values, dtype=np.int64)
        except OverflowError:
            pass
        place = next(place for place, value in enumerate(values) if not _is_int64(value))
        raise self.fault(place, f"{key} is {values[place]!r}; it must be an integer of 64 bits")

    def flags(self, key: str) -> np.ndarray:
        """Return bool values, one per record: 0 or 1, true or false; null or no such key is False."""
        values = [record.get(key) or 0 for record in self.records]
        for place, value in enumerate(values):
            if isinstance(value, str) or value not in (0, 1):  # "0" would count as true
                raise self.fault(place, f"{key} is {value!r}; it must be 0 or 1")
        return np.array(values, dtype=bool)

    def floats(self, key: str, values: list[Any], *width: int) -> np.ndarray:
        """Return one float64 value, or `width` values, per record."""
        try:
            array = np.array(values) if values else np.zeros((0, *width))
            if array.dtype.kind in "iuf" and array.shape == (len(values), *width):
                return array.astype(np.float64)
        except ValueError:  # lists of unequal length
            pass
        for place, value in enumerate(values):
            item = np.array(value, dtype=object)
            if item.shape != width or not all(_is_float64(number) for number in item.flat):
                what = f"{key} is {value!r}; it must be {f'{width[0]} numbers' if width else 'a number'}"
                raise self.fault(place, what)
        return np.array(values, dtype=np.float64)  # integers beyond 64 bits


def _is_int64(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_float64(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000


def _annotation_columns(part: _Part) -> dict[str, np.ndarray]:
    columns = {key: part.integers(key) for key in ("id", "image_id", "category_id")}
    columns["bbox"] = part.floats("bbox", part.column("bbox"), 4)
    box_areas = (columns["bbox"][:, 2] * columns["bbox"][:, 3]).tolist()
    areas = [record.get("area", area) for record, area in zip(part.records, box_areas)]
    columns["area"] = part.floats("area", areas)
    columns["crowd"], columns["ignored"] = part.flags("iscrowd"), part.flags("ignore")
    return columns


def _image_columns(part: _Part) -> dict[str, np.ndarray]:
    columns = {"id": part.integers("id")}
    sizes = np.stack([part.integers(key) for key in ("height", "width")], axis=1)
    bad = ((sizes <= 0) | (sizes >= 2**31)).any(axis=1)
    if bad.any():
        height, width = sizes[bad][0]
        what = f"height {height} and width {width} must be positive and below 2**31; correct or remove it"
        raise part.fault(int(np.argmax(bad)), what)
    columns["size"] = sizes.astype(np.int32)
    for place, image in enumerate(part.records):
        file = image.get("file_name")
        file = image.get("coco_url") if file is None else file
        if not isinstance(file, str):
            raise part.fault(place, "neither file_name nor coco_url is a string; add one")
        if len(file) > MAX_NAME:
            raise part.fault(place, f"its file name is longer than {MAX_NAME} characters; shorten it")
    columns["file_name"] = np.array([image_file_name(image) for image in part.records])
    columns["renamed"] = np.array(
        [(image.get("file_name") or file).rpartition("/")[2] != file.rpartition("/")[2]
         for image, file in zip(part.records, columns["file_name"].tolist())]
    )  # fmt: skip
    columns["federated"] = np.array(["neg_category_ids" in image for image in part.records])
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        lists = [image.get(key) or () for image in part.records]
        for place, ids in enumerate(lists):
            if not isinstance(ids, list | tuple) or not all(map(_is_int64, ids)):
                raise part.fault(place, f"{key} is {ids!r}; it must be a list of category ids")
        columns[f"{key}_counts"] = np.array([len(ids) for ids in lists])
        columns[key] = np.array(list(chain.from_iterable(lists)), dtype=np.int64)
    return columns


def _check_unique(ids: np.ndarray, kind: str, path: str | Path) -> None:
    values, counts = np.unique(ids, return_counts=True)
    repeated = values[counts > 1]
    if len(repeated):
        raise ValueError(
            f"{path}: {kind} id {repeated[0]} is used more than once ({len(repeated)} such ids); "
            f"give every {kind} an id of its own"
        )


def _places(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the place of each value among the unique ids, -1 if absent: int64, as long as values."""
    order = np.argsort(ids)
    found = order[np.searchsorted(ids, values, sorter=order).clip(max=len(ids) - 1)]
    return np.where(ids[found] == values, found, -1)


def _references(
    annotations: dict[str, np.ndarray], key: str, ids: np.ndarray, path: str | Path
) -> np.ndarray:
    """Return the places int64 [A] of the annotations' values among the ids."""
    places = _places(annotations[key], ids)
    unknown = places < 0
    if unknown.any():
        first = int(np.argmax(unknown))
        kind = key.removesuffix("_id")
        what = (
            f"{key} {annotations[key][first]} is none of the file's ({unknown.sum()} such annotations); "
            f"remove them or add the {kind} records"
        )
        record = {name: annotations[name][first] for name in ("id", "image_id")}
        raise _Part(path, "annotation", [record]).fault(0, what)
    return places


def _listed_labels(
    listed: np.ndarray, offsets: np.ndarray, category_ids: np.ndarray, image_ids: np.ndarray, key: str,
    path: str | Path,
) -> np.ndarray:  # fmt: skip
    """Return the labels, int64, of the category ids that the images list."""
    labels = _places(listed, category_ids)
    unknown = labels < 0
    if unknown.any():
        first = int(np.argmax(unknown))
        image = int(np.searchsorted(offsets, first, side="right")) - 1
        what = (
            f"{key} has the unknown category id {listed[first]} ({unknown.sum()} such entries); remove them"
        )
        raise _Part(path, "image", [{"id": image_ids[image]}]).fault(0, what)
    return labels


def _sorted_categories(records: Sequence[Record], path: str | Path) -> tuple[list[Record], np.ndarray]:
    ids = _Part(path, "category", records).integers("id")
    _check_unique(ids, "category", path)
    order = np.argsort(ids)
    return [records[place] for place in order], ids[order]


def _category_fields(
    records: Sequence[Record], rows: np.ndarray, labels: np.ndarray, path: str | Path
) -> list[dict[str, Any]]:
    """Return LVIS's own counts where the file has them, else those of boxes and of images (rows) with any."""
    part = _Part(path, "category", records)
    names = part.column("name")
    _, held = image_class_pairs(rows, labels, len(records))
    counts = np.bincount(held, minlength=len(records)).tolist()
    instances = np.bincount(labels, minlength=len(records)).tolist()
    categories = []
    for place, (record, name) in enumerate(zip(records, names)):
        count = record.get("image_count", counts[place])
        boxes = record.get("instance_count", instances[place])
        if not (isinstance(name, str) and isinstance(count, int) and isinstance(boxes, int)):
            what = f"name {name!r} must be a string; image_count {count!r}, instance_count {boxes!r} integers"
            raise part.fault(place, what)
        frequency = record.get("frequency", frequency_group(count))
        if frequency not in ("r", "c", "f"):
            raise part.fault(place, f"frequency {frequency!r} must be r, c or f")
        synset = record.get("synset") or ""
        categories.append(
            {
                "id": record["id"],
                "name": name,
                "synset": synset,
                "frequency": frequency,
                "image_count": count,
                "instance_count": boxes,
            }
        )
    return categories
