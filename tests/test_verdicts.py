"""What every box is: a case worked out by hand, and properties of random ones."""

from __future__ import annotations

import numpy as np
import pytest
from lvis_cases import annotations_of, detections_of, image_record, random_case

from clis.metric.analysis import find_errors
from clis.metric.matching import match
from clis.metric.verdicts import CLASS, LOCATION, NOT_JUDGED, NOTHING, RIGHT, VERDICTS, Verdicts, verdicts_of

CUP, TEA, DOG = 1, 2, 3


def hand_made() -> dict:
    """Three images of three classes; a class is verified where it has a box or is a negative."""
    boxes = [
        (10, CUP, [0, 0, 100, 100]), (10, DOG, [200, 0, 100, 100]),
        (20, CUP, [0, 0, 100, 100]),
        (30, DOG, [50, 50, 200, 200]), (30, TEA, [300, 300, 80, 80]),
    ]  # fmt: skip
    negatives = {10: [], 20: [DOG], 30: [CUP]}
    return {
        "images": [
            image_record(i, neg_category_ids=negatives[i], not_exhaustive_category_ids=[]) for i in negatives
        ],
        "categories": [
            {"id": CUP, "name": 'cup "big" </script>', "frequency": "r", "image_count": 2},
            {"id": TEA, "name": "thé ☕ <b>&amp;", "frequency": "c", "image_count": 20},
            {"id": DOG, "name": "dog", "frequency": "f", "image_count": 200},
        ],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": c, "bbox": box, "area": box[2] * box[3]}
            for i, (image, c, box) in enumerate(boxes)
        ],
    }


DETECTIONS = [
    (10, CUP, [0, 0, 100, 100], 0.9, "right"),
    (10, CUP, [200, 0, 100, 100], 0.8, "class"),  # on the dog
    (10, DOG, [200, 0, 100, 100], 0.5, "right"),
    (10, TEA, [0, 200, 50, 50], 0.95, "not judged"),  # nobody has looked for tea in image 10
    (20, DOG, [200, 200, 100, 100], 0.7, "nothing"),  # known to be absent
    (20, CUP, [0, 0, 100, 40], 0.6, "location"),  # IoU 0.4
    (30, DOG, [50, 50, 200, 200], 0.85, "right"),
    (30, DOG, [50, 50, 200, 190], 0.4, "duplicate"),
]


def detection_rows() -> list[dict]:
    return [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s, _ in DETECTIONS]


def judged(data: dict, rows: list[dict]) -> tuple[Verdicts, object]:
    annotations, detections = annotations_of(data), detections_of(rows)
    matches = match(annotations, detections)
    errors = find_errors(annotations, detections, matches)
    return verdicts_of(annotations, detections, matches, errors), matches


def test_the_hand_made_case():
    verdicts, _ = judged(hand_made(), detection_rows())
    assert [VERDICTS[verdict] for verdict in verdicts.verdicts] == [row[-1] for row in DETECTIONS]
    # Annotations 0..4: cup, dog | cup | dog, tea.
    assert verdicts.truths.tolist() == [0, 1, 1, -1, -1, 2, 3, 3]
    assert verdicts.found.tolist() == [0.9, 0.5, -1, 0.85, -1]
    assert verdicts.other.tolist() == [-1, 0.8, -1, -1, -1]
    assert verdicts.other_labels.tolist() == [-1, 0, -1, -1, -1]
    assert verdicts.off.tolist() == [-1, -1, 0.6, -1, -1]
    assert verdicts.required.all()
    assert np.flatnonzero(verdicts.missed(0.3)).tolist() == [4]
    assert np.flatnonzero(verdicts.missed(0.65)).tolist() == [2, 4]  # the dog of image 10 is called a cup
    assert np.flatnonzero(verdicts.missed(0.88)).tolist() == [1, 2, 3, 4]


def test_of_two_boxes_on_two_objects_the_better_score_chooses_first():
    """The score of 0.9 takes the object at 0 (IoU 0.96); that of 0.4 fits better, but takes the other."""
    data = hand_made()
    data["annotations"] = [
        {"id": 1, "image_id": 10, "category_id": CUP, "bbox": [30, 0, 100, 100], "area": 10000},
        {"id": 2, "image_id": 10, "category_id": CUP, "bbox": [0, 0, 100, 100], "area": 10000},
    ]
    rows = [
        {"image_id": 10, "category_id": CUP, "bbox": [0, 0, 100, 100], "score": 0.4},
        {"image_id": 10, "category_id": CUP, "bbox": [2, 0, 100, 100], "score": 0.9},
    ]
    verdicts, _ = judged(data, rows)
    assert verdicts.truths.tolist() == [0, 1]
    assert verdicts.found.tolist() == [0.4, 0.9]


def test_what_takes_the_annotation_with_id_0_does_not_free_it_for_another():
    """Both packages count the box on annotation 0 as false, though it takes it; the next one gets the other.

    That box of 100 x 90 fits annotation 0 better (IoU 0.9) than the other one (70 / 90 = 0.78).
    """
    data = hand_made()
    data["annotations"] = [
        {"id": 0, "image_id": 10, "category_id": CUP, "bbox": [0, 0, 100, 100], "area": 10000},
        {"id": 1, "image_id": 10, "category_id": CUP, "bbox": [0, 0, 100, 70], "area": 7000},
    ]
    rows = [
        {"image_id": 10, "category_id": CUP, "bbox": [0, 0, 100, 100], "score": 0.9},
        {"image_id": 10, "category_id": CUP, "bbox": [0, 0, 100, 90], "score": 0.8},
    ]
    verdicts, _ = judged(data, rows)
    assert [VERDICTS[verdict] for verdict in verdicts.verdicts] == ["duplicate", "right"]
    assert verdicts.truths.tolist() == [0, 1]
    assert verdicts.found.tolist() == [-1, 0.8]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("federated", [True, False])
def test_verdicts_agree_with_the_matches(seed, federated):
    data, rows = random_case(np.random.default_rng(seed), federated)
    for annotation in data["annotations"]:
        annotation["id"] += 1  # a match with id 0 reads as none, in both packages
    verdicts, matches = judged(data, rows)
    hits = (matches.true_positive & 1) != 0
    assert (verdicts.verdicts == RIGHT).sum() == hits.sum()
    assert set(np.flatnonzero(verdicts.verdicts == RIGHT)) == set(matches.rows[hits])
    found = np.zeros(len(verdicts.found), bool)
    found[matches.truth_places[((matches.truth_found & 1) != 0) & matches.truth_counts[:, 0]]] = True
    np.testing.assert_array_equal(verdicts.found >= 0, found)
    # What the metric neither counts nor sees is no mistake.
    outside = np.setdiff1d(np.arange(len(rows)), matches.rows)
    assert (verdicts.verdicts[outside] == NOT_JUDGED).all()
    ignored = matches.rows[((matches.ignored & 1) != 0) & ~hits]
    assert (verdicts.verdicts[ignored] == NOT_JUDGED).all()
    about = np.isin(verdicts.verdicts, (RIGHT, CLASS, LOCATION))
    assert (verdicts.truths[about] >= 0).all()
    assert (verdicts.truths[verdicts.verdicts == NOTHING] == -1).all()
