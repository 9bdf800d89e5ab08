"""Detections on disk: what is written is read again, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from lvis_cases import HAND_MADE_DETECTIONS, detections_of, random_case, with_masks
from pycocotools import mask as rle

from clis.data import json_lists
from clis.metric import detections as module
from clis.metric.detections import Detections


@pytest.mark.parametrize("num", [0, 3])
def test_detections_survive_saving(num: int, tmp_path: Path) -> None:
    rows = HAND_MADE_DETECTIONS[:num]
    rows = [{**row, "bbox": [0.1, 1 / 3, 7.0, 1e-7]} for row in rows]
    detections = detections_of(rows)
    detections.save(tmp_path / "detections.npz")
    detections.to_json(tmp_path / "detections.json")
    assert json.loads((tmp_path / "detections.json").read_text()) == rows
    for path in sorted(tmp_path.iterdir()):
        loaded = Detections.load(path)
        assert len(loaded) == num
        for name in ("image_id", "category_id", "bbox", "score"):
            np.testing.assert_array_equal(getattr(loaded, name), getattr(detections, name), strict=True)
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file is left


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "detections.npz"
    detections_of(HAND_MADE_DETECTIONS).save(path)
    full = mock.patch("numpy.savez", side_effect=OSError("disk full"))
    with full, pytest.raises(OSError, match="disk full"):
        detections_of([]).save(path)
    assert len(Detections.load(path)) == 3
    with pytest.raises(ValueError, match="to_json"):
        detections_of([]).save(tmp_path / "detections.json")


GOOD_ROW = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5], "score": 0.5}


@pytest.mark.parametrize(
    ("bad_row", "message"),
    [
        ({"image_id": 1, "bbox": [0, 0, 5, 5]}, "row 1: no category_id, score"),
        ([1, 2], "row 1: an object is needed"),
        ({**GOOD_ROW, "image_id": "0001"}, "row 1: image_id is not an integer: '0001'"),
        ({**GOOD_ROW, "bbox": [0, 0, 5]}, r"row 1: bbox is not four numbers .*\[0, 0, 5\]"),
        ({**GOOD_ROW, "bbox": [0, 0, 5, None]}, "row 1: bbox is not four numbers"),
        ({**GOOD_ROW, "bbox": [0, 0, 5, float("inf")]}, "row 1: bbox is not finite"),
        ({**GOOD_ROW, "bbox": [9, 0, -5, 5]}, r"row 1: bbox .* negative size: \[9.0, 0.0, -5.0, 5.0\]"),
        ({**GOOD_ROW, "score": float("nan")}, "row 1: score is not finite: nan"),
        ({**GOOD_ROW, "score": "high"}, "row 1: score is not a number: 'high'"),
    ],
)
def test_bad_json_row_is_named(bad_row: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD_ROW, bad_row]))
    with pytest.raises(ValueError, match=rf"results\.json: {message}"):
        Detections.load(path)


@pytest.mark.parametrize("name", ["cut.npz", "cut.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_truncated_file_is_named(name: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / name
    detections = detections_of(HAND_MADE_DETECTIONS)
    (detections.save if name.endswith("npz") else detections.to_json)(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{name}: not (a )?whole"):
        Detections.load(path)


def test_json_must_be_a_list(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match=r"annotations.json: .* list of objects"):
        Detections.load(path)


def test_bad_npz_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "detections.npz"
    columns = {k: np.array([GOOD_ROW[k]] * 3) for k in ("image_id", "category_id", "score")}
    columns["bbox"] = np.zeros((3, 4))

    def load(**changed: np.ndarray | None) -> None:
        np.savez(path, **{k: v for k, v in {**columns, **changed}.items() if v is not None})
        Detections.load(path)

    load()
    with pytest.raises(ValueError, match=r"detections.npz: no column bbox, score"):
        load(bbox=None, score=None)
    with pytest.raises(ValueError, match=r"detections.npz: .*columns of one length.*\(2,\)"):
        load(image_id=np.array([1, 2]))
    with pytest.raises(ValueError, match=r"detections.npz: .*columns of one length"):
        load(bbox=np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"detections.npz: image_id must be integer, found float64"):
        load(image_id=np.ones(3))
    with pytest.raises(ValueError, match=r"row 2: score is not finite: nan \(1 such rows\)"):
        load(score=np.array([0.1, 0.2, np.nan]))


def test_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    for name in ("none.npz", "none.json"):
        with pytest.raises(FileNotFoundError):
            Detections.load(tmp_path / name)


def write_rows(path: Path, num: int, **extra: object) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = [
        {
            "image_id": i // 3,
            "category_id": i % 7,
            "bbox": rng.random(4).round(3).tolist(),
            "score": i / num,
            **extra,
        }
        for i in range(num)
    ]
    path.write_text(json.dumps(rows))
    return rows


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_read_in_small_parts_is_the_whole_file(
    chunk: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Cuts fall inside numbers, names, boxes and nested values; braces and commas inside a string mislead.
    rows = write_rows(tmp_path / "results.json", 40, note='a "}, {" b', more={"list": [{"a": 1}, {"b": [2]}]})
    (tmp_path / "results.json").write_text(json.dumps(rows, indent=indent))
    monkeypatch.setattr(json_lists, "CHUNK", chunk)
    loaded = Detections.load(tmp_path / "results.json")
    expected = detections_of(rows)
    for name in ("image_id", "category_id", "bbox", "score"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(expected, name), strict=True)


def test_a_bad_row_far_into_the_file_has_its_own_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "results.json", 60)
    rows[47]["score"] = "high"
    (tmp_path / "results.json").write_text(json.dumps(rows))
    monkeypatch.setattr(json_lists, "CHUNK", 500)
    with pytest.raises(ValueError, match="row 47: score is not a number: 'high'"):
        Detections.load(tmp_path / "results.json")
    (tmp_path / "results.json").write_text(json.dumps(rows[:40])[:-20])
    with pytest.raises(ValueError, match=r"results.json: not whole JSON after \d\d rows"):
        Detections.load(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_id", 2**70, "image_id is not an integer of 64 bits"),
        ("category_id", 2**63 + 5, "category_id is not an integer of 64 bits"),
        ("bbox", [0, 0, 5, 5, 0.5], "bbox is not four numbers"),
        ("bbox", [[0, 0, 5, 5]], "bbox is not four numbers"),
        ("score", None, "score is not a number: None"),
    ],
)
def test_an_odd_value_is_named_with_its_row(key: str, value: object, message: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "results.json", 4)
    rows[2][key] = value
    with pytest.raises(ValueError, match=f"row 2: {message}"):
        Detections.from_records(rows)
    for row in rows:  # all of them, so that NumPy alone would make a column of it
        row[key] = value
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        Detections.from_records(rows)


def test_columns_are_arrays() -> None:
    with pytest.raises(ValueError, match="image_id must be a NumPy array, found list"):
        Detections(image_id=[1], category_id=[1], bbox=[[0, 0, 1, 1]], score=[0.5])


@pytest.mark.parametrize("num", [0, 1, 5, 11])
def test_json_written_in_small_parts_is_whole(
    num: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.json", num)
    monkeypatch.setattr(module, "ROWS", 5)
    detections_of(rows).to_json(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == rows


@pytest.mark.parametrize("keep_boxes", [True, False])
def test_masks_survive_a_result_file(keep_boxes: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data, rows = random_case(rng, federated=True)
    with_masks(data, rows, rng, keep_boxes)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(rows))
    first = Detections.load(path, masks=True)
    assert [dict(mask) for mask in first.masks] == [row["segmentation"] for row in rows]
    if keep_boxes:  # the area is the box's, as in the lvis package
        assert first.area is None
    else:
        np.testing.assert_array_equal(first.bbox, [rle.toBbox(row["segmentation"]) for row in rows])
        np.testing.assert_array_equal(first.area, [rle.area(row["segmentation"]) for row in rows])
    first.to_json(path)
    second = Detections.load(path, masks=True)
    assert second.masks == first.masks
    np.testing.assert_array_equal(second.bbox, first.bbox)
    np.testing.assert_array_equal(second.area, first.area)
    with pytest.raises(ValueError, match=r"an .npz file holds boxes alone; use to_json"):
        first.save(tmp_path / "detections.npz")
    without = Detections.load(path)
    if not keep_boxes:  # a file of it would have neither the masks nor their areas
        with pytest.raises(ValueError, match="areas are of masks, which are not here; load with masks"):
            without.to_json(tmp_path / "lost.json")
        with pytest.raises(ValueError, match="holds boxes alone"):
            without.save(tmp_path / "detections.npz")
        assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_a_mask_that_is_none_is_named(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json", 3, segmentation={"size": [4, 4], "counts": "00"})
    rows[2]["segmentation"] = [[0, 0, 4, 0, 4, 4]]
    for row in rows:
        del row["bbox"]
    with pytest.raises(ValueError, match="row 2: no bbox, and segmentation is not a compressed RLE"):
        Detections.from_records(rows, masks=True)
