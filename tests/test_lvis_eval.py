"""The metric equals the `lvis` package and pycocotools, and a case worked out by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from lvis import LVIS, LVISEval, LVISResults
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from clis.data.annotations import Annotations, Category
from clis.engine.lvis_eval import METRICS, Detections, accumulate, evaluate, format_table

pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")  # in lvis/results.py


def annotations_of(data: dict) -> Annotations:
    """Pack an LVIS-form or COCO-form dict as the loader does."""
    category_ids = sorted(c["id"] for c in data["categories"])
    by_id = {c["id"]: c for c in data["categories"]}
    label = {category_id: i for i, category_id in enumerate(category_ids)}
    rows = [[a for a in data["annotations"] if a["image_id"] == i["id"]] for i in data["images"]]
    flat = [a for image_rows in rows for a in image_rows]

    def packed(key: str) -> tuple[np.ndarray, np.ndarray]:
        lists = [[label[c] for c in image.get(key, [])] for image in data["images"]]
        return offsets_of(lists), np.array([c for labels in lists for c in labels], np.int64)

    return Annotations(
        path="hand_made.json",
        categories=tuple(
            Category(id=c, name=f"c{c}", frequency=by_id[c].get("frequency", "f"), image_count=1)
            for c in category_ids
        ),
        image_ids=np.array([i["id"] for i in data["images"]], np.int64),
        image_sizes=np.full((len(rows), 2), 400, np.int32),
        file_names=np.array([f"{i['id']}.jpg" for i in data["images"]]),
        offsets=offsets_of(rows),
        annotation_ids=np.array([a["id"] for a in flat], np.int64),
        labels=np.array([label[a["category_id"]] for a in flat], np.int64),
        bboxes=np.array([a["bbox"] for a in flat], np.float64).reshape(-1, 4),
        areas=np.array([a["area"] for a in flat], np.float64),
        crowd=np.array([a.get("iscrowd", 0) for a in flat], bool),
        federated="neg_category_ids" in data["images"][0],
        negatives=packed("neg_category_ids"),
        not_exhaustive=packed("not_exhaustive_category_ids"),
    )


def offsets_of(lists: list[list]) -> np.ndarray:
    return np.cumsum([0] + [len(x) for x in lists])


def detections_of(rows: list[dict]) -> Detections:
    return Detections(
        image_id=np.array([r["image_id"] for r in rows], np.int64),
        category_id=np.array([r["category_id"] for r in rows], np.int64),
        bbox=np.array([r["bbox"] for r in rows], np.float64).reshape(-1, 4),
        score=np.array([r["score"] for r in rows], np.float64),
    )


def random_case(rng: np.random.Generator, federated: bool) -> tuple[dict, list[dict]]:
    """A small data set with its detections: whole-number boxes and few score levels, so that ties abound."""
    image_ids = rng.choice(np.arange(1, 50), rng.integers(1, 7), replace=False).tolist()  # in no order
    class_ids = rng.choice(np.arange(1, 20), rng.integers(1, 6), replace=False).tolist()
    images = [{"id": image_id, "width": 400, "height": 400} for image_id in image_ids]
    for image in images if federated else []:
        image["neg_category_ids"] = [c for c in class_ids if rng.random() < 0.4]
        image["not_exhaustive_category_ids"] = [c for c in class_ids if rng.random() < 0.3]
    pairs = [(image_id, class_id) for image_id in image_ids for class_id in class_ids]
    truth = [
        {"image_id": i, "category_id": c, **random_truth(rng), "iscrowd": int(rng.random() < 0.2)}
        for i, c in pairs
        for _ in range(rng.choice([0, 0, 1, 2, 5]))
    ]
    rng.shuffle(truth)
    for number, annotation in enumerate(truth):
        annotation["id"] = number  # one of them is 0
        if federated:
            del annotation["iscrowd"]
    detections = [random_detection(rng, truth, pairs) for _ in range(rng.integers(1, 120))]
    frequencies = rng.choice(["r", "c", "f"], len(class_ids)).tolist()
    categories = [{"id": c, "name": f"c{c}", "frequency": f} for c, f in zip(class_ids, frequencies)]
    return {"images": images, "annotations": truth, "categories": categories}, detections


def random_truth(rng: np.random.Generator) -> dict:
    size = rng.choice([8, 32, 40, 96, 120]) + rng.integers(-3, 4, 2) * rng.integers(0, 2)
    size[0] *= rng.random() > 0.08  # no area
    area = size.prod() * rng.choice([1.0, 1.0, 0.6])  # LVIS has the mask's area; 32 x 32 is on a border
    return {
        "bbox": [*rng.integers(0, 30, 2).astype(float).tolist(), *size.astype(float).tolist()],
        "area": area,
    }


def random_detection(rng: np.random.Generator, truth: list[dict], pairs: list[tuple[int, int]]) -> dict:
    image_id, category_id = pairs[rng.integers(len(pairs))]
    box = random_truth(rng)["bbox"]
    if truth and rng.random() < 0.8:
        near = truth[rng.integers(len(truth))]
        image_id, category_id = near["image_id"], near["category_id"]
        jitter = rng.integers(-4, 5, 4) * (rng.random() < 0.7)
        box = (np.array(near["bbox"]) + jitter).clip(min=0).tolist()
    score = float(rng.integers(0, 12)) / 11
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def lvis_reference(data: dict, rows: list[dict], max_detections: int, folder: Path) -> LVISEval:
    path = folder / "annotations.json"
    path.write_text(json.dumps(data))
    truth = LVIS(str(path))
    results = LVISResults(truth, copy.deepcopy(rows), max_dets=max_detections)
    reference = LVISEval(truth, results, "bbox")
    reference.params.max_dets = max_detections
    with mock.patch.object(np, "float", float, create=True):  # lvis 0.5.3 uses the name that NumPy removed
        reference.run()
    return reference


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_lvis_package(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, rows = random_case(rng, federated=True)
    max_detections = int(rng.choice([3, 10, 300]))
    reference = lvis_reference(data, rows, max_detections, tmp_path)

    annotations, detections = annotations_of(data), detections_of(rows)
    curves = accumulate(annotations, detections, max_detections)
    np.testing.assert_allclose(curves.precision, reference.eval["precision"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(curves.recall, reference.eval["recall"], rtol=0, atol=1e-9)
    metrics = evaluate(annotations, detections, max_detections)
    assert list(metrics) == list(reference.results)
    assert metrics == pytest.approx(reference.results, rel=0, abs=1e-9)


def test_equals_the_lvis_package_with_more_than_300_detections_in_an_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data, _ = random_case(np.random.default_rng(7), federated=True)
    near = [data["annotations"][i] for i in rng.integers(0, len(data["annotations"]), 1500)]
    rows = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": (np.array(a["bbox"]) + rng.uniform(0, 9, 4)).tolist(),
            "score": round(rng.random(), 2),
        }
        for a in near
    ]
    assert max(np.unique([r["image_id"] for r in rows], return_counts=True)[1]) > 300
    reference = lvis_reference(data, rows, 300, tmp_path)
    metrics = evaluate(annotations_of(data), detections_of(rows))
    assert metrics == pytest.approx(reference.results, rel=0, abs=1e-9)
    assert set(METRICS) <= set(metrics)


@pytest.mark.parametrize("seed", range(30))
def test_exhaustive_annotations_equal_pycocotools(seed: int) -> None:
    data, rows = random_case(np.random.default_rng(seed), federated=False)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(data)
        truth.createIndex()
        reference = COCOeval(truth, truth.loadRes(copy.deepcopy(rows)), "bbox")
        reference.params.maxDets = [1, 10, 300]
        reference.evaluate()
        reference.accumulate()
    annotations, detections = annotations_of(data), detections_of(rows)
    curves = accumulate(annotations, detections)
    precision = reference.eval["precision"][..., -1]
    np.testing.assert_allclose(curves.precision, precision, rtol=0, atol=1e-9)
    np.testing.assert_allclose(curves.recall, reference.eval["recall"][..., -1], rtol=0, atol=1e-9)

    metrics = evaluate(annotations, detections)
    for name, values in (("AP", precision), ("AP50", precision[0]), ("AP75", precision[5])):
        defined = values[..., 0][values[..., 0] > -1]
        assert metrics[name] == pytest.approx(defined.mean() if defined.size else -1, rel=0, abs=1e-9)


def hand_made(**image_lists: list[int]) -> dict:
    """Class 1 with three boxes in images 10 and 20, and class 2 with none anywhere."""
    boxes = [(10, [0, 0, 100, 100]), (10, [200, 0, 100, 100]), (20, [0, 0, 100, 100])]
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": [], **image_lists}
    return {
        "images": [{"id": 10, **lists}, {"id": 20, **lists}, {"id": 30, **lists}],
        "categories": [{"id": 1, "frequency": "r"}, {"id": 2, "frequency": "c"}],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": 1, "bbox": box, "area": 100 * 100}
            for i, (image, box) in enumerate(boxes)
        ],
    }


HAND_MADE_DETECTIONS = [
    {"image_id": 10, "category_id": 1, "bbox": [0, 0, 100, 100], "score": 0.9},  # IoU 1
    {"image_id": 10, "category_id": 1, "bbox": [300, 300, 100, 100], "score": 0.8},  # hits nothing
    {"image_id": 20, "category_id": 1, "bbox": [0, 0, 100, 62], "score": 0.7},  # IoU 0.62
]


def test_hand_computed_average_precision() -> None:
    # Thresholds 0.50, 0.55, 0.60: true, false, true. Recall 1/3, 1/3, 2/3 and precision 1, 1/2, 2/3: at the
    # 34 recall points 0 ... 0.33 precision is 1, at the 33 points 0.34 ... 0.66 it is 2/3, behind that 0.
    loose = (34 + 33 * 2 / 3) / 101
    # The other seven: true, false, false. Precision is 1 up to recall 1/3.
    strict = 34 / 101
    metrics = evaluate(annotations_of(hand_made()), detections_of(HAND_MADE_DETECTIONS))
    assert metrics["AP50"] == pytest.approx(loose)
    assert metrics["AP75"] == pytest.approx(strict)
    assert metrics["AP"] == pytest.approx((3 * loose + 7 * strict) / 10)
    assert metrics["AR@300"] == pytest.approx((3 * 2 / 3 + 7 * 1 / 3) / 10)
    # All truth is larger than 96 x 96, and class 1 is rare; class 2 has no ground truth, so it is nowhere.
    assert metrics["APr"] == metrics["APl"] == metrics["AP"]
    assert metrics["APc"] == metrics["APf"] == metrics["APs"] == metrics["APm"] == -1


def test_federated_lists_decide_what_a_false_positive_is() -> None:
    # The confident false positive of class 1 sits in image 30, where class 1 is not annotated.
    stray = {"image_id": 30, "category_id": 1, "bbox": [0, 0, 100, 100], "score": 0.95}
    rows = detections_of([stray, HAND_MADE_DETECTIONS[0]])

    def ap(**lists: list[int]) -> float:
        return evaluate(annotations_of(hand_made(**lists)), rows)["AP"]

    assert ap() == pytest.approx(34 / 101)  # unknown there: dropped, precision 1 up to recall 1/3
    assert ap(neg_category_ids=[1]) == pytest.approx(34 / 2 / 101)  # absent there: precision 1/2
    assert ap(neg_category_ids=[1], not_exhaustive_category_ids=[1]) == pytest.approx(34 / 101)  # ignored
    exhaustive = hand_made()
    for image in exhaustive["images"]:
        del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    assert evaluate(annotations_of(exhaustive), rows)["AP"] == pytest.approx(34 / 2 / 101)


def test_of_two_boxes_with_the_same_iou_the_later_is_taken(tmp_path: Path) -> None:
    # The first detection lies halfway between the two boxes, IoU 90 / 110 with both. The second is the box of
    # the earlier one, IoU 80 / 120 with the later: right at every threshold only if the earlier is free.
    data = hand_made()
    data["annotations"] = [
        {"id": i, "image_id": 10, "category_id": 1, "bbox": [x, 0, 100, 100], "area": 10000}
        for i, x in ((1, 0), (2, 20))
    ]
    rows = [
        {"image_id": 10, "category_id": 1, "bbox": [x, 0, 100, 100], "score": score}
        for x, score in ((10, 0.9), (0, 0.8))
    ]
    curves = accumulate(annotations_of(data), detections_of(rows))
    assert curves.recall[:, 0, 0].tolist() == [1.0] * 7 + [0.5] * 3  # 90 / 110 = 0.82
    reference = lvis_reference(data, rows, 300, tmp_path)
    np.testing.assert_array_equal(curves.recall, reference.eval["recall"])


def test_class_ap_tells_absent_from_missed() -> None:
    data = hand_made()
    data["categories"].append({"id": 3, "frequency": "f"})
    box = {"id": 9, "image_id": 30, "category_id": 3, "bbox": [0, 0, 50, 50], "area": 2500}
    data["annotations"].append(box)
    per_class = accumulate(annotations_of(data), detections_of(HAND_MADE_DETECTIONS[:1])).class_ap()
    assert per_class.tolist() == pytest.approx([34 / 101, -1, 0])


def test_no_detections_is_zero_where_there_is_ground_truth() -> None:
    metrics = evaluate(annotations_of(hand_made()), detections_of([]))
    assert metrics["AP"] == metrics["APr"] == metrics["AR@300"] == 0
    assert metrics["APc"] == -1


def test_float32_detections_are_judged_as_their_float64_values() -> None:
    rows = detections_of(HAND_MADE_DETECTIONS)
    small = Detections(
        image_id=rows.image_id,
        category_id=rows.category_id,
        bbox=rows.bbox.astype(np.float32),
        score=rows.score.astype(np.float32),
    )
    assert evaluate(annotations_of(hand_made()), small) == evaluate(annotations_of(hand_made()), rows)


@pytest.mark.parametrize(
    ("key", "message"),
    [("image_id", "2 detections have image ids"), ("category_id", "2 detections have category ids")],
)
def test_unknown_ids_are_named(key: str, message: str) -> None:
    rows = copy.deepcopy(HAND_MADE_DETECTIONS)
    rows[1][key], rows[2][key] = 77, 5
    with pytest.raises(ValueError, match=rf"{message}.*hand_made.json.*row 1: 77"):
        evaluate(annotations_of(hand_made()), detections_of(rows))


def test_max_detections_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_detections"):
        evaluate(annotations_of(hand_made()), detections_of(HAND_MADE_DETECTIONS), max_detections=0)


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


def test_table_prints_percent_and_a_dash_where_undefined() -> None:
    metrics = dict.fromkeys(METRICS, 0.25) | {"APr": -1.0, "AP": 0.0, "AR@300": 1.0}
    assert format_table({"CE": metrics, "baseline": metrics}).splitlines() == [
        "| run      |   AP | AP50 | AP75 |  APr |  APc |  APf |   AR |",
        "|:---------|-----:|-----:|-----:|-----:|-----:|-----:|-----:|",
        "| CE       |  0.0 | 25.0 | 25.0 |    - | 25.0 | 25.0 | 100.0 |",
        "| baseline |  0.0 | 25.0 | 25.0 |    - | 25.0 | 25.0 | 100.0 |",
    ]
