"""What stands behind an AP: cases worked out by hand."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from lvis_cases import annotations_of, detections_of, hand_made, image_record, random_case

from clis.metric import analysis
from clis.metric.lvis_eval import accumulate, evaluate, summarize
from clis.metric.matching import match

BOX = [0, 0, 100, 100]


def test_class_table_has_counts_and_empty_cells_where_undefined(tmp_path: Path) -> None:
    annotations = annotations_of(hand_made())
    rows = [{"image_id": 10, "category_id": 1, "bbox": BOX, "score": 0.9}]
    matches = match(annotations, detections_of(rows))
    path = tmp_path / "classes.csv"
    analysis.write_class_table(path, matches, accumulate(matches), annotations.categories)
    cat, dog = csv.DictReader(path.open())
    # Three boxes of the cat in two images; one found at every threshold: AP 34/101 (recall 1/3), AR 1/3.
    assert {key: cat[key] for key in ("id", "name", "frequency", "train_images", "images", "instances")} == {
        "id": "1", "name": "cat", "frequency": "r", "train_images": "5", "images": "2", "instances": "3",
    }  # fmt: skip
    assert float(cat["AP"]) == float(cat["AP50"]) == float(cat["APl"]) == pytest.approx(34 / 101, abs=1e-6)
    assert float(cat["AR"]) == pytest.approx(1 / 3, abs=1e-6)
    assert cat["APs"] == dog["AP"] == dog["AR"] == ""
    assert (dog["images"], dog["instances"]) == ("0", "0")


def test_ap_by_training_images_averages_the_classes_of_a_bin() -> None:
    data = hand_made()
    counts = {1: 3, 2: 9, 3: 10, 4: 700}
    data["categories"] = [
        {"id": c, "name": f"c{c}", "frequency": "r", "image_count": count} for c, count in counts.items()
    ]
    data["annotations"] = [
        {"id": c, "image_id": 10, "category_id": c, "bbox": BOX, "area": 10000} for c in (1, 2, 3)
    ]
    rows = [{"image_id": 10, "category_id": c, "bbox": BOX, "score": 0.9} for c in (1, 3)]
    annotations = annotations_of(data)
    curves = accumulate(match(annotations, detections_of(rows)))
    # Class 4 has no ground truth here. 3..9: one right, one missed; 10..29: right.
    assert analysis.ap_by_image_count(curves, annotations.categories) == [
        (3, 9, 2, pytest.approx(0.5)),
        (10, 29, 1, pytest.approx(1.0)),
    ]


class TestBootstrap:
    def test_of_a_result_with_itself_is_zero(self) -> None:
        data, rows = random_case(np.random.default_rng(2), federated=True)
        annotations = annotations_of(data)
        matches = match(annotations, detections_of(rows))
        for interval in analysis.bootstrap(matches, matches, annotations.categories, 20).values():
            assert interval == analysis.Interval(0, 0, 0)

    def test_brackets_the_difference_and_is_reproducible(self) -> None:
        # 40 images with one box each; the better result finds 30 of them, the other 10, nothing else.
        data = hand_made()
        data["images"] = [
            image_record(i, neg_category_ids=[], not_exhaustive_category_ids=[]) for i in range(40)
        ]
        data["annotations"] = [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": BOX, "area": 10000} for i in range(40)
        ]
        annotations = annotations_of(data)

        def result(num: int):
            rows = [{"image_id": i, "category_id": 1, "bbox": BOX, "score": 0.5} for i in range(num)]
            return match(annotations, detections_of(rows))

        intervals = analysis.bootstrap(result(10), result(30), annotations.categories, 300)
        assert intervals == analysis.bootstrap(result(10), result(30), annotations.categories, 300)
        assert list(intervals) == ["AP", "AP50", "AP75", "APr"]  # the class is rare
        # Recall is the share of images found; the share of the 20 images between has mean 1/2 and standard
        # deviation sqrt(0.5 * 0.5 / 40) = 0.079, so the interval is about 0.5 +- 1.96 * 0.079.
        interval = intervals["AP"]
        assert interval.value == pytest.approx(0.5, abs=0.011)  # 101 recall points
        assert interval.low == pytest.approx(0.5 - 0.155, abs=0.04)
        assert interval.high == pytest.approx(0.5 + 0.155, abs=0.04)

    def test_needs_the_same_annotations(self) -> None:
        one, other = (random_case(np.random.default_rng(seed), federated=True) for seed in (1, 2))
        matches = [match(annotations_of(data), detections_of(rows)) for data, rows in (one, other)]
        with pytest.raises(ValueError, match="same annotations"):
            analysis.bootstrap(*matches, annotations_of(one[0]).categories)


def error_case() -> tuple[dict, list[dict]]:
    """Two classes, six boxes, and one detection of every kind of error."""
    data = hand_made(neg_category_ids=[], not_exhaustive_category_ids=[])
    truths = [
        (10, 1, [0, 0, 100, 100]),  # found, and found again
        (10, 1, [200, 0, 100, 100]),  # poorly located
        (10, 2, [0, 200, 100, 100]),  # taken for class 1
        (10, 2, [200, 200, 100, 100]),  # found
        (20, 1, [0, 0, 100, 100]),  # missed
        (20, 2, [0, 0, 50, 50]),  # missed
    ]
    data["annotations"] = [
        {"id": i, "image_id": image, "category_id": c, "bbox": box, "area": box[2] * box[3]}
        for i, (image, c, box) in enumerate(truths, 1)
    ]
    detections = [
        (10, 1, [0, 0, 100, 100], 0.90),  # right
        (10, 2, [200, 200, 100, 100], 0.85),  # right
        (10, 1, [0, 0, 100, 90], 0.80),  # duplicate
        (10, 1, [200, 60, 100, 100], 0.75),  # IoU 40 / 160 = 0.25 with its own class: location
        (10, 1, [0, 200, 100, 100], 0.70),  # IoU 1 with class 2: class
        (10, 1, [330, 330, 50, 50], 0.65),  # background
        (10, 1, [200, 250, 100, 100], 0.60),  # IoU 50 / 150 = 0.33 with class 2: both
    ]
    rows = [
        {"image_id": image, "category_id": c, "bbox": box, "score": score}
        for image, c, box, score in detections
    ]
    return data, rows


def test_error_shares_by_hand() -> None:
    data, rows = error_case()
    annotations, detections = annotations_of(data), detections_of(rows)
    matches = match(annotations, detections)
    shares = analysis.error_shares(annotations, detections, matches, annotations.categories)
    assert shares.counts == {
        "class": 1, "location": 1, "both": 1, "duplicate": 1, "background": 1, "missed": 2,
    }  # fmt: skip
    third, two_thirds = 34 / 101, 67 / 101  # recall 1/3 and 2/3 of the 101 points
    # Class 1 (rare): right, then five errors; class 2 (common): right alone; three boxes each.
    assert shares.ap50 == {
        "all": pytest.approx(third),
        "r": pytest.approx(third),
        "c": pytest.approx(third),
        "f": -1,
    }
    # Mended location: true, duplicate, true, ...: precision 2/3 at recall 2/3.
    location = third + 33 / 101 * 2 / 3
    assert shares.lost["location"]["r"] == pytest.approx(location - third)
    assert shares.lost["location"]["c"] == pytest.approx(0)
    # The mended class error is the second true positive of class 2, at precision 1.
    assert shares.lost["class"]["c"] == pytest.approx(two_thirds - third)
    assert shares.lost["class"]["all"] == pytest.approx((two_thirds - third) / 2)
    # Behind the last true positive, false positives cost nothing.
    for name in ("both", "duplicate", "background"):
        assert shares.lost[name]["all"] == pytest.approx(0)
    # One missed box of each class is not asked for: recall 1/2 of two boxes, 51 points.
    assert shares.lost["missed"]["all"] == pytest.approx(51 / 101 - third)
    assert shares.lost["missed"]["f"] == -1


@pytest.mark.parametrize(("score", "gain"), [(0.5, 0.0), (None, -1.0)])
def test_a_class_of_which_all_is_missed_has_no_ap_to_win(score: float | None, gain: float) -> None:
    """TIDE: where nothing is asked for any more, a class with false positives has AP 0, as before; one
    without detections does not count. The other class is right."""
    data, _ = error_case()
    data["annotations"] = [
        {"id": 1 + c, "image_id": 10 * c, "category_id": c, "bbox": [0, 0, 50, 50], "area": 2500}
        for c in (1, 2)
    ]
    rows = [{"image_id": 10, "category_id": 1, "bbox": [0, 0, 50, 50], "score": 0.9}]
    if score is not None:
        rows.append({"image_id": 20, "category_id": 2, "bbox": [200, 200, 50, 50], "score": score})
    annotations, detections = annotations_of(data), detections_of(rows)
    matches = match(annotations, detections)
    shares = analysis.error_shares(annotations, detections, matches, annotations.categories)
    assert shares.counts["missed"] == 1
    assert shares.lost["missed"]["c"] == gain
    assert shares.lost["missed"]["all"] == pytest.approx(0.0 if score else 0.5)


def test_only_the_best_error_mends_a_box() -> None:
    data, rows = error_case()
    rows.append({**rows[4], "score": 0.95})  # a second, better one of the wrong class, on the same box
    annotations, detections = annotations_of(data), detections_of(rows)
    shares = analysis.error_shares(
        annotations, detections, match(annotations, detections), annotations.categories
    )
    assert shares.counts["class"] == 2
    # As in the case above; the second one vanishes and is no duplicate.
    assert shares.lost["class"]["c"] == pytest.approx(33 / 101)


def test_every_false_positive_is_of_one_kind_and_taking_it_away_never_costs() -> None:
    for seed in range(30):
        data, rows = random_case(np.random.default_rng(seed), federated=True)
        for annotation in data["annotations"]:
            annotation["id"] += 1
        annotations, detections = annotations_of(data), detections_of(rows)
        matches = match(annotations, detections)
        shares = analysis.error_shares(annotations, detections, matches, annotations.categories)
        judged = np.count_nonzero(((matches.true_positive | matches.ignored) & 1) == 0)
        assert sum(shares.counts[name] for name in analysis.ERRORS[:5]) == judged
        for name in ("duplicate", "background", "both", "missed"):
            assert shares.lost[name]["all"] >= -1e-12


def test_class_agnostic_counts_a_wrong_name_as_found() -> None:
    data, rows = error_case()
    annotations, detections = annotations_of(data), detections_of(rows)
    figures = analysis.class_agnostic(annotations, detections, match(annotations, detections))
    # By score: right, right, duplicate, loose, right (wrong name), background, loose: recall 3/6, precision
    # 1, 1, 2/3, 2/4, 3/5. Recall up to 2/6: 34 points at 1; up to 3/6: 17 more at 3/5.
    assert figures["AP50"] == pytest.approx((34 + 17 * 3 / 5) / 101)
    assert figures["AR"] == pytest.approx(3 / 6)
    assert evaluate(annotations, detections)["AP50"] < figures["AP50"]


def test_frequency_groups_of_another_file_decide_the_summary() -> None:
    data, rows = error_case()
    annotations = annotations_of(data)
    matches = match(annotations, detections_of(rows))
    frequent = [dataclasses.replace(category, frequency="f") for category in annotations.categories]
    metrics = summarize(matches, frequent)
    assert metrics["APr"] == metrics["APc"] == -1
    assert metrics["APf"] == metrics["AP"]


@pytest.mark.parametrize("seed", range(40))
def test_with_one_class_boxes_alone_are_the_metric_itself(seed: int) -> None:
    data, rows = random_case(np.random.default_rng(seed), federated=True)
    only = data["categories"][0]["id"]
    for record in [*data["annotations"], *rows]:
        record["category_id"] = only
    data["categories"] = data["categories"][:1]
    for image in data["images"]:
        image["neg_category_ids"] = [only] if only in image["neg_category_ids"] else []
        image["not_exhaustive_category_ids"] = [only] if only in image["not_exhaustive_category_ids"] else []
    annotations, detections = annotations_of(data), detections_of(rows)
    figures = analysis.class_agnostic(annotations, detections, match(annotations, detections))
    expected = evaluate(annotations, detections)
    assert figures == {
        "AP": expected["AP"], "AP50": expected["AP50"], "AP75": expected["AP75"], "AR": expected["AR@300"],
    }  # fmt: skip


def test_bootstrap_leaves_out_what_no_sample_defines() -> None:
    data, rows = random_case(np.random.default_rng(2), federated=True)
    for annotation in data["annotations"]:
        annotation["area"] = 0  # none counts
    annotations = annotations_of(data)
    matches = match(annotations, detections_of(rows))
    assert analysis.bootstrap(matches, matches, annotations.categories, 3) == {}


def test_small_bins_are_joined_with_their_neighbors():
    """(1, 0.5) and (2, 0.2) join to (3, 0.3); the last one, alone, joins the one before."""
    rows = [(0, 0, 1, 0.5), (1, 2, 2, 0.2), (3, 9, 4, 0.5), (10, 29, 1, 1.0)]
    (first, second) = analysis.merge_small_bins(rows)
    assert first == pytest.approx((0, 2, 3, 0.3))
    assert second == pytest.approx((3, 29, 5, 0.6))
    assert analysis.merge_small_bins(rows[:1]) == rows[:1]  # nothing to join it with
    assert analysis.merge_small_bins([]) == []
