"""The metric equals the `lvis` package, pycocotools and a plain version, and cases worked out by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import plain_lvis_eval
import pytest
from lvis_cases import HAND_MADE_DETECTIONS, annotations_of, detections_of, hand_made, random_case, with_masks

from clis.data.annotations import Annotations
from clis.metric import lvis_eval, matching
from clis.metric.detections import Detections
from clis.metric.lvis_eval import METRICS, Curves, accumulate, evaluate, format_table
from clis.metric.matching import match
from clis.metric.official import official_precision


def curves_of(annotations: Annotations, detections: Detections, max_detections: int = 300) -> Curves:
    return accumulate(match(annotations, detections, max_detections))


def package(
    data: dict, rows: list[dict], max_detections: int, folder: Path, iou_type: str = "bbox"
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Figures, precision and recall of the published package."""
    for name, content in (("annotations.json", data), ("results.json", rows)):
        (folder / name).write_text(json.dumps(content))
    return official_precision(folder / "annotations.json", folder / "results.json", iou_type, max_detections)


def assert_equal_to_package(
    data: dict, rows: list[dict], max_detections: int, folder: Path, iou_type: str = "bbox"
) -> None:
    """All figures of the package, and every point of its curves, to 1e-9."""
    figures, precision, recall = package(data, rows, max_detections, folder, iou_type)
    matches, _ = lvis_eval.load_and_match(data, rows, iou_type, max_detections)
    curves = accumulate(matches)
    np.testing.assert_allclose(curves.precision, precision, rtol=0, atol=1e-9)
    np.testing.assert_allclose(curves.recall, recall, rtol=0, atol=1e-9)
    ours = evaluate(data, rows, iou_type, max_detections=max_detections)
    assert {name: ours[name] for name in figures} == pytest.approx(figures, rel=0, abs=1e-9)


@pytest.mark.parametrize("seed", range(200))
def test_equals_the_lvis_package(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, rows = random_case(rng, federated=True)
    assert_equal_to_package(data, rows, int(rng.choice([3, 10, 300])), tmp_path)


@pytest.mark.parametrize("keep_boxes", [True, False])
@pytest.mark.parametrize("seed", range(15))
def test_masks_equal_the_lvis_package(seed: int, keep_boxes: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, rows = random_case(rng, federated=True)
    with_masks(data, rows, rng, keep_boxes)
    assert_equal_to_package(data, rows, int(rng.choice([10, 300])), tmp_path, "segm")


@pytest.mark.parametrize("max_detections", [1, 10, 100, 300])
@pytest.mark.parametrize("seed", range(12))
def test_exhaustive_annotations_equal_pycocotools(seed: int, max_detections: int, tmp_path: Path) -> None:
    data, rows = random_case(np.random.default_rng(seed), federated=False)
    assert_equal_to_package(data, rows, max_detections, tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_without_negatives_the_other_list_excuses_nothing(seed: int, tmp_path: Path) -> None:
    data, rows = random_case(np.random.default_rng(seed), federated=False)
    for image in data["images"]:
        image["not_exhaustive_category_ids"] = [category["id"] for category in data["categories"]]
    assert_equal_to_package(data, rows, 300, tmp_path)


@pytest.mark.parametrize("keep_boxes", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_masks_equal_pycocotools(seed: int, keep_boxes: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, rows = random_case(rng, federated=False)
    with_masks(data, rows, rng, keep_boxes)
    assert_equal_to_package(data, rows, 300, tmp_path, "segm")


@pytest.mark.parametrize("federated", [True, False])
def test_more_detections_than_an_image_may_have(federated: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data, _ = random_case(np.random.default_rng(7), federated)
    rows = []
    for place in rng.integers(0, len(data["annotations"]), 6000):
        near = data["annotations"][place]
        box = (np.array(near["bbox"]) + rng.uniform(0, 9, 4)).tolist()
        ids = {"image_id": near["image_id"], "category_id": near["category_id"]}
        rows.append({**ids, "bbox": box, "score": round(rng.random(), 2)})
    for max_detections in (100, 300):  # federated: of an image; otherwise of an image and class
        keys = [(row["image_id"], not federated and row["category_id"]) for row in rows]
        assert max(keys.count(key) for key in set(keys)) > max_detections
        assert_equal_to_package(data, rows, max_detections, tmp_path)
    assert set(METRICS) <= set(evaluate(data, rows))


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_plain_version(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    data, rows = random_case(rng, federated=True)
    plain = plain_lvis_eval.average_precision(data, rows, 20)
    ours = curves_of(annotations_of(data), detections_of(rows), 20).class_ap()
    assert ours.tolist() == pytest.approx(plain, rel=0, abs=1e-9)


@pytest.mark.parametrize("federated", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_small_parts_change_nothing(seed: int, federated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data, rows = random_case(np.random.default_rng(seed), federated)
    whole = curves_of(annotations_of(data), detections_of(rows))
    monkeypatch.setattr(matching, "CANDIDATES", 3)
    monkeypatch.setattr(matching, "PART", 3)
    parts = curves_of(annotations_of(data), detections_of(rows))
    np.testing.assert_array_equal(parts.precision, whole.precision)


@pytest.mark.parametrize("seed", range(20))
def test_fixed_ap_equals_the_package_on_the_best_of_each_class(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dave et al. (arXiv 2102.01066) hand the official evaluator the best of each class over the whole split.
    data, rows = random_case(np.random.default_rng(seed), federated=True)
    for module in (matching, lvis_eval):
        monkeypatch.setattr(module, "FIXED_LIMIT", 7)
    by_score = sorted(range(len(rows)), key=lambda place: (-rows[place]["score"], place))
    best: list[int] = []
    for category in data["categories"]:
        best += [place for place in by_score if rows[place]["category_id"] == category["id"]][:7]
    figures, _, _ = package(data, [rows[place] for place in sorted(best)], -1, tmp_path)
    ours = evaluate(data, rows, protocol="fixed")
    assert list(ours)[:9] == [f"fixed_{name}" for name in METRICS[:9]]
    for name in METRICS[:9]:
        assert ours[f"fixed_{name}"] == pytest.approx(figures[name], rel=0, abs=1e-9)
    assert ours["fixed_AR@7"] == pytest.approx(figures["AR@-1"], rel=0, abs=1e-9)


def test_pooled_ap_ranks_all_classes_together() -> None:
    # One ground truth each. Class 1 (rare): true at 0.9, false at 0.8. Class 2 (common): false at 0.95, true
    # at 0.7. Pooled: false, true, false, true: precision 1/2 at recall 1/2 and 2/4 at 1, so 1/2 everywhere.
    data = hand_made(neg_category_ids=[1, 2])
    for image in data["images"]:
        image["neg_category_ids"] = [1, 2] if image["id"] == 30 else []
    box = [0, 0, 100, 100]
    data["annotations"] = [
        {"id": c, "image_id": 10 * c, "category_id": c, "bbox": box, "area": 10000} for c in (1, 2)
    ]
    rows = [
        {"image_id": image, "category_id": c, "bbox": box, "score": score}
        for image, c, score in ((10, 1, 0.9), (30, 1, 0.8), (30, 2, 0.95), (20, 2, 0.7))
    ]
    pooled = evaluate(data, rows, protocol="pooled")
    assert pooled == {
        "pooled_AP": pytest.approx(1 / 2), "pooled_AP50": pytest.approx(1 / 2),
        "pooled_AP75": pytest.approx(1 / 2), "pooled_APr": pytest.approx(1),
        "pooled_APc": pytest.approx(1 / 2), "pooled_APf": -1,
    }  # fmt: skip
    assert evaluate(data, rows)["AP"] == pytest.approx((1 + 1 / 2) / 2)  # each class by itself


@pytest.mark.parametrize("seed", range(20))
def test_a_weighted_image_counts_like_its_copies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data, rows = random_case(rng, federated=True)
    for row, score in zip(rows, rng.permutation(len(rows))):
        row["score"] = float(score + 1) / len(rows)  # no ties between different detections
    for annotation in data["annotations"]:
        annotation["id"] += 1  # id 0 reads as unmatched, and a copy of it has another id
    weights = rng.integers(0, 4, len(data["images"]))
    weights[[image["id"] for image in data["images"]].index(data["annotations"][0]["image_id"])] += 1
    by_rank = weights[np.argsort([image["id"] for image in data["images"]])]
    weighted = accumulate(match(annotations_of(data), detections_of(rows)), by_rank)

    copies: dict = {"categories": data["categories"], "images": [], "annotations": []}
    copied_rows = []
    for image, weight in zip(data["images"], weights):
        for copy_number in range(weight):
            new = {"image_id": 1000 * copy_number + image["id"]}
            copies["images"].append({**image, "id": new["image_id"]})
            copies["annotations"] += [
                {**a, **new, "id": 10_000 * copy_number + a["id"]}
                for a in data["annotations"]
                if a["image_id"] == image["id"]
            ]
            copied_rows += [{**row, **new} for row in rows if row["image_id"] == image["id"]]
    expected = curves_of(annotations_of(copies), detections_of(copied_rows))
    np.testing.assert_allclose(weighted.precision, expected.precision, rtol=0, atol=1e-12)
    np.testing.assert_allclose(weighted.recall, expected.recall, rtol=0, atol=1e-12)


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
    curves = curves_of(annotations_of(data), detections_of(rows))
    assert curves.recall[:, 0, 0].tolist() == [1.0] * 7 + [0.5] * 3  # 90 / 110 = 0.82
    assert_equal_to_package(data, rows, 300, tmp_path)


def test_class_ap_tells_absent_from_missed() -> None:
    data = hand_made()
    data["categories"].append({"id": 3, "name": "cow", "frequency": "f"})
    box = {"id": 9, "image_id": 30, "category_id": 3, "bbox": [0, 0, 50, 50], "area": 2500}
    data["annotations"].append(box)
    per_class = curves_of(annotations_of(data), detections_of(HAND_MADE_DETECTIONS[:1])).class_ap()
    assert per_class.tolist() == pytest.approx([34 / 101, -1, 0])


def test_no_detections_is_zero_where_there_is_ground_truth() -> None:
    metrics = evaluate(annotations_of(hand_made()), detections_of([]))
    assert metrics["AP"] == metrics["APr"] == metrics["AR@300"] == 0
    assert metrics["APc"] == -1


def test_float32_detections_are_judged_as_their_float64_values() -> None:
    # 100 ground truths 1e-7 apart from an IoU of 0.5, on both sides: float32 arithmetic would mix them up.
    rng = np.random.default_rng(0)
    data = hand_made()
    boxes = (rng.random((100, 4)) * 50 + 20).astype(np.float32)
    data["annotations"] = [
        {
            "id": i + 1, "image_id": 10, "category_id": 1, "area": 2000,
            "bbox": [float(x), 1000.0 * i + float(y), float(w), 2 * float(h) * (1 + 1e-7 * (-1) ** i)],
        }
        for i, (x, y, w, h) in enumerate(boxes)
    ]  # fmt: skip
    placed = [[float(x), 1000.0 * i + float(y), float(w), float(h)] for i, (x, y, w, h) in enumerate(boxes)]
    rows = detections_of([{"image_id": 10, "category_id": 1, "bbox": box, "score": 1} for box in placed])
    small = Detections(
        image_id=rows.image_id,
        category_id=rows.category_id,
        bbox=rows.bbox.astype(np.float32),
        score=rows.score.astype(np.float32),
    )
    exact = Detections(
        image_id=rows.image_id,
        category_id=rows.category_id,
        bbox=small.bbox.astype(np.float64),
        score=rows.score,
    )
    assert evaluate(annotations_of(data), small) == evaluate(annotations_of(data), exact)


def test_detections_of_unknown_images_are_refused_as_by_the_package() -> None:
    rows = copy.deepcopy(HAND_MADE_DETECTIONS)
    rows[1]["image_id"], rows[2]["image_id"] = 77, 5
    with pytest.raises(ValueError, match=r"2 detections have image ids that hand_made.json .* row 1: 77"):
        evaluate(annotations_of(hand_made()), detections_of(rows))


def test_masks_are_not_compared_with_detections_that_have_none() -> None:
    with pytest.raises(ValueError, match="truth_masks need detections with masks"):
        match(annotations_of(hand_made()), detections_of(HAND_MADE_DETECTIONS), truth_masks=[])


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_paths_may_begin_at_home(iou_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data, rows = random_case(np.random.default_rng(0), federated=True)
    with_masks(data, rows, np.random.default_rng(0), keep_boxes=True)
    (tmp_path / "annotations.json").write_text(json.dumps(data))
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert evaluate("~/annotations.json", "~/results.json", iou_type) == evaluate(data, rows, iou_type)


@pytest.mark.parametrize("seed", range(10))
def test_detections_of_unknown_classes_are_named_and_dropped_as_by_the_package(
    seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    data, rows = random_case(rng, federated=True)
    rows[0]["category_id"] = 77  # higher than all
    for row in rows:
        if rng.random() < 0.3:
            row["category_id"] = 77
    figures, _, _ = package(data, rows, 5, tmp_path)  # they still use up the limit of an image
    with pytest.warns(UserWarning, match=rf"{sum(r['category_id'] == 77 for r in rows)} detections have cat"):
        ours = evaluate(data, rows, max_detections=5)
    assert ours == pytest.approx(figures, rel=0, abs=1e-9)


@pytest.mark.parametrize("box", [[0, 0, float("nan"), 5], [9, 9, -5, 5]])
def test_a_bad_ground_truth_box_is_named(box: list[float]) -> None:
    data = hand_made()
    data["annotations"][1]["bbox"] = box
    with pytest.raises(ValueError, match=r"hand_made.json: annotation 2: box .* is not finite or negative"):
        evaluate(annotations_of(data), detections_of(HAND_MADE_DETECTIONS))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_detections": 0}, "max_detections must be at least 1, found 0"),
        ({"protocol": "best"}, "protocol is 'best'; it must be standard, fixed or pooled"),
        ({"iou_type": "keypoints"}, "iou_type is 'keypoints'; it must be bbox or segm"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(wrong: dict, message: str) -> None:
    data, rows = hand_made(), HAND_MADE_DETECTIONS
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[0, 0, 100, 0, 100, 100]]
    with pytest.raises(ValueError, match=message):
        evaluate(data, rows, **wrong)


def test_masks_need_masks_on_both_sides() -> None:
    with pytest.raises(ValueError, match="Annotations are boxes"):
        evaluate(annotations_of(hand_made()), [], "segm")
    for bad in (None, 5, {"counts": "abc"}, {"size": [400, 400], "counts": [5, "x"]}, [[1]]):
        data = hand_made()
        for annotation in data["annotations"]:
            annotation["segmentation"] = bad
        with pytest.raises(ValueError, match="annotation 1: the segmentation is no polygons and no RLE"):
            evaluate(data, [], "segm")
    data = hand_made()
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[0, 0, 100, 0, 100, 100]]
    with pytest.raises(ValueError, match="needs detections with masks"):
        evaluate(data, detections_of(HAND_MADE_DETECTIONS), "segm")
    for bad, problem in (
        ("abc", "no polygons and no RLE"),
        (None, "no polygons and no RLE"),
        ({"size": [400, 400], "counts": 7}, "no polygons and no RLE"),
        ({"size": [40, 400], "counts": "0"}, r"of size \[40, 400\], the image is \[400, 400\]"),
        # pycocotools looks for the missing pixels forever
        ({"size": [400, 400], "counts": [10, 5]}, "an RLE whose counts add up to 15, .* has 160000 pixels"),
    ):
        rows = [{**row, "segmentation": bad} for row in HAND_MADE_DETECTIONS]
        with pytest.raises(ValueError, match=f"detection in row 0: the segmentation is {problem}"):
            evaluate(data, rows, "segm")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["polygons", "boxes alone", "masks alone, for boxes"])
def test_every_form_of_results_that_the_package_takes(seed: int, kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, rows = random_case(rng, federated=True)
    with_masks(data, rows, rng, keep_boxes=kind != "masks alone, for boxes")
    for row in rows:
        if kind == "polygons":
            x, y, w, h = row["bbox"]
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h + 1]]
        elif kind == "boxes alone":
            del row["segmentation"]
    assert_equal_to_package(data, rows, 300, tmp_path, "bbox" if kind.endswith("boxes") else "segm")


@pytest.mark.parametrize("seed", range(10))
def test_ignored_annotations_equal_the_package(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data, rows = random_case(rng, federated=True)
    for annotation in data["annotations"]:
        annotation["ignore"] = int(rng.random() < 0.3)
        annotation["iscrowd"] = int(rng.random() < 0.3)  # to which the lvis package pays no heed
    assert_equal_to_package(data, rows, 300, tmp_path)


def test_arguments_in_the_wrong_order_are_named() -> None:
    with pytest.raises(ValueError, match=r"ground_truth is a list; .* comes before the detections"):
        evaluate(HAND_MADE_DETECTIONS, hand_made())


def test_paths_loaded_json_and_arrays_give_the_same(tmp_path: Path) -> None:
    data, rows = random_case(np.random.default_rng(3), federated=True)
    (tmp_path / "annotations.json").write_text(json.dumps(data))
    detections_of(rows).save(tmp_path / "detections.npz")
    detections_of(rows).to_json(tmp_path / "results.json")
    expected = evaluate(annotations_of(data), detections_of(rows))
    assert expected["AP"] > 0
    for results in (tmp_path / "detections.npz", str(tmp_path / "results.json"), rows):
        assert evaluate(tmp_path / "annotations.json", results) == expected
        assert evaluate(data, results) == expected


def test_table_prints_percent_and_a_dash_where_undefined() -> None:
    metrics = dict.fromkeys(METRICS, 0.25) | {"APr": -1.0, "AP": 0.0, "AR@300": 1.0}
    assert format_table({"CE": metrics, "baseline": metrics}).splitlines() == [
        "| run      |  AP | AP50 | AP75 | APr |  APc |  APf |    AR |",
        "|:---------|----:|-----:|-----:|----:|-----:|-----:|------:|",
        "| CE       | 0.0 | 25.0 | 25.0 |   - | 25.0 | 25.0 | 100.0 |",
        "| baseline | 0.0 | 25.0 | 25.0 |   - | 25.0 | 25.0 | 100.0 |",
    ]
