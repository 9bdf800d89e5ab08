"""The detections of a split as columns: .npz files of our own and LVIS result JSON, both read and written."""

from __future__ import annotations

import json
import numbers
import reprlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from clis.atomic import atomic_write
from clis.data.json_lists import NotJSON, read_list
from clis.text import check_regular

COLUMNS = ("image_id", "category_id", "bbox", "score")
ROWS = 1 << 16
"""Detections that are written at once."""


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
    masks: Sequence[Any] | None = None
    """D segmentations as in the file (RLE or polygons), where masks are to be evaluated."""
    area: np.ndarray | None = None
    """float64 [D] in square pixels where it is not the box's own: of results that have masks and no boxes."""
    source: str = "the results"
    """The file that they are from, for messages."""

    def __post_init__(self) -> None:
        for name in COLUMNS:
            if not isinstance(getattr(self, name), np.ndarray):
                raise ValueError(f"{name} must be a NumPy array, found {type(getattr(self, name)).__name__}")
        num = self.score.size
        expected = {"image_id": (num,), "category_id": (num,), "bbox": (num, 4), "score": (num,)}
        found = {name: getattr(self, name).shape for name in COLUMNS}
        if found != expected:
            raise ValueError(f"detections need columns of one length and bbox [D, 4], found shapes {found}")
        for name, kinds in zip(COLUMNS, ("iu", "iu", "f", "f")):
            dtype = getattr(self, name).dtype
            if dtype.kind not in kinds:
                raise ValueError(f"{name} must be {'float' if kinds == 'f' else 'integer'}, found {dtype}")
        for name in ("masks", "area"):
            column = getattr(self, name)
            if column is not None and len(column) != num:
                raise ValueError(f"{name} must be as long as the other columns, {num}; found {len(column)}")
        _reject(~np.isfinite(self.score), "score is not finite", self.score)
        _reject(~_all_finite(self.bbox), "bbox is not finite", self.bbox)
        negative = (self.bbox[:, 2] < 0) | (self.bbox[:, 3] < 0)
        _reject(negative, "bbox (x y w h) has a negative size", self.bbox)

    def __len__(self) -> int:
        return len(self.score)

    def save(self, path: str | Path) -> None:
        """Write the columns to `path`, which must end in .npz; an interrupted save leaves no half file."""
        if Path(path).suffix != ".npz":
            raise ValueError(f"{path}: detections are saved as .npz; use to_json for an LVIS result file")
        if self.masks is not None or self.area is not None:
            raise ValueError(f"{path}: an .npz file holds boxes alone; use to_json for masks")
        with atomic_write(path) as temporary:
            np.savez(temporary, **{name: getattr(self, name) for name in COLUMNS})

    def to_json(self, path: str | Path) -> None:
        """Write an LVIS result file: a list of image_id, category_id, bbox, score and any segmentation."""
        if self.area is not None and self.masks is None:
            raise ValueError(f"{path}: the areas are of masks, which are not here; load with masks=True")
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for start in range(0, max(len(self), 1), ROWS):
                text = json.dumps(self._records(slice(start, start + ROWS)))
                file.write(("[" if start == 0 else ", ") + text[1:-1])
            file.write("]")

    def _records(self, part: slice) -> list[dict[str, Any]]:
        names = [name for name in COLUMNS if self.area is None or name != "bbox"]  # an area that is no box's
        rows = zip(*(getattr(self, name)[part].tolist() for name in names))
        records: list[dict[str, Any]] = [dict(zip(names, row)) for row in rows]
        if self.masks is not None:
            for record, mask in zip(records, self.masks[part]):
                if isinstance(mask, dict) and isinstance(mask["counts"], bytes):
                    mask = {**mask, "counts": mask["counts"].decode()}
                record["segmentation"] = mask
        return records

    @classmethod
    def load(cls, path: str | Path, masks: bool = False) -> Detections:
        """Read what `save` wrote (.npz), or an LVIS result file (any other name), a part at a time.

        With `masks` the file's ``segmentation`` is kept; further keys are ignored. As in the `lvis` package,
        detections without bbox (in the first row) have the box and area of their masks, those with both the
        area of their box, and those without a mask their box for a mask.

        Raises ValueError with the path, and the row (counted from 0) and value where there is one, for a file
        that is truncated, a missing or ill-typed column or key, and all that the class itself rejects.
        """
        path = Path(path).expanduser()
        check_regular(path)
        try:
            if path.suffix == ".npz":
                if masks:
                    raise ValueError("an .npz file holds boxes alone; masks need an LVIS result file")
                return cls(**_read_npz(path), source=str(path))
            return cls(**_columns(_parts(path), masks), source=str(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]], masks: bool = False) -> Detections:
        """Make detections from a loaded LVIS result list, with the rules of `load`."""
        if not isinstance(records, list):
            raise ValueError(f"an LVIS result file is a list of objects, found {reprlib.repr(records)}")
        return cls(**_columns(iter([records]), masks))


def _all_finite(boxes: np.ndarray) -> np.ndarray:
    """Return which boxes are finite, bool [D], without a temporary of the size of the boxes."""
    finite = np.isfinite(boxes[:, 0])
    for column in boxes.T[1:]:
        finite &= np.isfinite(column)
    return finite


def _reject(bad: np.ndarray, problem: str, values: np.ndarray) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"row {row}: {problem}: {values[row].tolist()} ({bad.sum()} such rows)")


def _read_npz(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):  # the table of contents is at the end: a truncated file has none
            raise ValueError("not a whole .npz file; write it again")
    try:
        with np.load(path) as columns:
            missing = [name for name in COLUMNS if name not in columns]
            if missing:
                raise ValueError(f"no column {', '.join(missing)}; found {', '.join(columns)}")
            return {name: columns[name] for name in COLUMNS}
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"damaged .npz file ({error}); write it again") from error


def _parts(path: Path) -> Iterator[list[Any]]:
    """Yield the rows of a result file, some thousands at a time."""
    num_rows = 0
    try:
        for rows in read_list(path):
            yield rows
            num_rows += len(rows)
    except NotJSON as error:
        raise ValueError(f"not whole JSON after {num_rows} rows ({error}); write it again") from error


def _columns(parts: Iterator[list[Any]], masks: bool) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, "masks", "area")}
    start, boxes = 0, True
    for rows in parts:
        if start == 0 and rows and isinstance(rows[0], dict):  # the packages, too, go by the first
            boxes = "bbox" in rows[0] or "segmentation" not in rows[0]
        try:
            part = _fast_columns(rows, boxes, masks)
        except Exception as error:  # whatever numpy or pycocotools makes of an odd value
            for number, row in enumerate(rows, start):
                _check_row(number, row, boxes)
            raise ValueError(f"among the {len(rows)} rows from row {start}: {error}") from error
        for name, values in part.items():
            columns[name].append(values)
        start += len(rows)
    found: dict[str, Any] = {name: np.concatenate(columns[name]) for name in COLUMNS}
    if masks:
        found["masks"] = [mask for part in columns["masks"] for mask in part]
    if not boxes:
        found["area"] = np.concatenate(columns["area"])
    return found


def _fast_columns(rows: list[Any], boxes: bool, masks: bool) -> dict[str, Any]:
    """Return the columns of some rows; raise one of several errors where a row is malformed."""
    columns: dict[str, Any] = {
        "image_id": _typed([row["image_id"] for row in rows], "iu", np.int64),
        "category_id": _typed([row["category_id"] for row in rows], "iu", np.int64),
        "score": _typed([row["score"] for row in rows], "iuf", np.float64),
    }
    if boxes:
        columns["bbox"] = _typed([row["bbox"] for row in rows], "iuf", np.float64, 4)
        if masks:
            columns["masks"] = [
                row["segmentation"] if "segmentation" in row else _rectangle(*row["bbox"]) for row in rows
            ]
    else:
        segmentations = [row["segmentation"] for row in rows]
        columns["bbox"] = np.asarray(rle.toBbox(segmentations), np.float64).reshape(-1, 4)
        columns["area"] = rle.area(segmentations).astype(np.float64)
        if masks:
            columns["masks"] = segmentations
    return columns


def _rectangle(x: float, y: float, w: float, h: float) -> list[list[float]]:
    """Return a box as polygons."""
    return [[x, y, x, y + h, x + w, y + h, x + w, y]]


def _typed(values: list[Any], kinds: str, dtype: type, width: int | None = None) -> np.ndarray:
    """Return an array [len(values)], or [len(values), width], of this type."""
    shape = (len(values),) if width is None else (len(values), width)
    array = np.array(values)
    if not values:
        return np.zeros(shape, dtype)
    if array.dtype.kind not in kinds or array.shape != shape or (array.dtype == np.uint64):
        raise TypeError(f"values of type {array.dtype} and shape {array.shape}")
    return array.astype(dtype, copy=False)


def _check_row(number: int, row: object, boxes: bool) -> None:
    """Raise an error that says what is wrong with a row, if anything is."""
    if not isinstance(row, dict):
        raise ValueError(f"row {number}: an object is needed, found {reprlib.repr(row)}")
    needed = ("image_id", "category_id", "bbox" if boxes else "segmentation", "score")
    missing = [name for name in needed if name not in row]
    if missing:
        raise ValueError(f"row {number}: no {', '.join(missing)} in {reprlib.repr(row)}")
    for name in ("image_id", "category_id"):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"row {number}: {name} is not an integer: {value!r}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"row {number}: {name} is not an integer of 64 bits: {value!r}")
    if boxes:
        box = row["bbox"]
        if not isinstance(box, Sequence | np.ndarray) or len(box) != 4 or not all(map(_is_number, box)):
            raise ValueError(f"row {number}: bbox is not four numbers x y w h: {reprlib.repr(box)}")
    else:
        mask = row["segmentation"]
        if not isinstance(mask, dict) or not {"size", "counts"} <= set(mask):
            raise ValueError(
                f"row {number}: no bbox, and segmentation is not a compressed RLE with size and counts: "
                f"{reprlib.repr(mask)}"
            )
    if not _is_number(row["score"]):
        raise ValueError(f"row {number}: score is not a number: {row['score']!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
