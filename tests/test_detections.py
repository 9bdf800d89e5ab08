"""Detections on disk: what is written is read again, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from lvis_cases import HAND_MADE_DETECTIONS, detections_of

from clis.engine.detections import Detections


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
