"""Annotation files: packing against plain loops over the same JSON, and every error at the border."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clis.data.annotations import checked_for_training, load_annotations
from clis.data.categories import check_same_categories
from clis.data.records import image_file_name

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SAMPLES = ["coco_mini/train.json", "coco_mini/val.json", "lvis/lvis_v0.5_val_100.json"]


def document():
    """Two images, three annotations out of image order, categories out of id order, one crowd."""
    return {
        "images": [
            {"id": 42, "file_name": "b.jpg", "height": 100, "width": 200},
            {"id": 7, "file_name": "a.jpg", "height": 50, "width": 60},
        ],
        "annotations": [
            {"id": 17, "image_id": 7, "category_id": 9, "bbox": [3, 4, 10, 9], "area": 40.5},
            {"id": 18, "image_id": 42, "category_id": 2, "bbox": [0.25, 1, 2.5, 4]},
            {"id": 16, "image_id": 7, "category_id": 2, "bbox": [0, 0, 60, 50], "iscrowd": 1},
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "emu"}],
    }


def counts_of(**counts: int) -> dict[str, int]:
    """What `checked_for_training` counts, 0 where nothing is said."""
    names = ("dropped", "clipped", "crowd", "ignored")
    return {f"{name} boxes": counts.get(name, 0) for name in names} | {"empty images": counts.get("empty", 0)}


@pytest.fixture
def load(tmp_path):
    def write_and_load(content):
        path = tmp_path / "train.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_annotations(path)

    return write_and_load


def test_coco_form(load):
    annotations = load(document())
    assert [category.name for category in annotations.categories] == ["dog", "emu", "cat"]  # ids 2, 5, 9
    assert [category.id for category in annotations.categories] == [2, 5, 9]
    assert annotations.num_classes == 3
    assert len(annotations) == 2
    assert annotations.image_ids.tolist() == [42, 7]
    assert annotations.image_sizes.tolist() == [[100, 200], [50, 60]]
    assert annotations.annotation_ids.tolist() == [18, 17, 16]  # image 42 is first in the file, then 17, 16
    assert annotations.offsets.tolist() == [0, 1, 3]
    assert annotations.labels_of(0).tolist() == [0]
    assert annotations.labels_of(1).tolist() == [2, 0]
    assert annotations.boxes_of(0).tolist() == [[0.25, 1, 2.75, 5]]
    assert annotations.boxes_of(1).dtype == np.float32
    assert annotations.areas.tolist() == [10, 40.5, 3000]  # 2.5 * 4 and 60 * 50 where the file has none
    assert annotations.crowd.tolist() == [False, False, True]
    assert not annotations.federated
    assert annotations.negatives[0].tolist() == [0, 0, 0]
    assert annotations.negatives[1].size == 0


def test_frequency_is_counted_in_images_where_the_file_has_none(load):
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 8} for i in range(101)]
    # Class k is in the first so many images, twice in each: boxes must not count.
    holds = {1: 10, 2: 11, 3: 100, 4: 101, 5: 0}
    pairs = [(image, k) for k, count in holds.items() for image in range(count)] * 2
    records = [
        {"id": n, "image_id": image, "category_id": k, "bbox": [0, 0, 1, 1]}
        for n, (image, k) in enumerate(pairs)
    ]
    categories = [{"id": k, "name": str(k)} for k in holds]
    annotations = load({"images": images, "annotations": records, "categories": categories})
    assert [c.image_count for c in annotations.categories] == [10, 11, 100, 101, 0]
    assert [c.instance_count for c in annotations.categories] == [20, 22, 200, 202, 0]
    assert [c.frequency for c in annotations.categories] == ["r", "c", "c", "f", "r"]


def test_lvis_fields_win(load):
    content = document()
    content["categories"][1] |= {"frequency": "f", "image_count": 1234, "synset": "dog.n.01"}
    content["images"][0] |= {"neg_category_ids": [9, 5], "not_exhaustive_category_ids": [2]}
    content["images"][1] |= {"neg_category_ids": []}
    annotations = load(content)
    dog = annotations.categories[0]
    assert (dog.frequency, dog.image_count, dog.synset) == ("f", 1234, "dog.n.01")
    assert annotations.federated
    assert [part.tolist() for part in annotations.negatives] == [[0, 2, 2], [2, 1]]
    assert [part.tolist() for part in annotations.not_exhaustive] == [[0, 1, 1], [0]]


def test_a_file_of_both_forms_is_refused(load):
    """Merged of LVIS and COCO: an image without the list would be verified for no class that it lacks."""
    content = document()
    content["images"][0] |= {"neg_category_ids": [9, 5]}
    with pytest.raises(ValueError, match=r"image \d+ has no neg_category_ids, which other images have"):
        load(content)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"coco_url": "http://images.cocodataset.org/train2017/000000391895.jpg"},
            "train2017/000000391895.jpg",
        ),
        ({"file_name": "COCO_val2014_000000266409.jpg", "neg_category_ids": []}, "000000266409.jpg"),
        ({"file_name": "COCO_train2014_000000000009.jpg", "neg_category_ids": [3]}, "000000000009.jpg"),
        ({"file_name": "COCO_train2014_000000000009.jpg"}, "COCO_train2014_000000000009.jpg"),  # COCO 2014
        ({"file_name": "train/000001.jpg"}, "train/000001.jpg"),
        ({"file_name": "old/COCO_val2014_1.jpg"}, "old/COCO_val2014_1.jpg"),
    ],
)
def test_image_file_name(record, expected):
    assert image_file_name(record) == expected


def test_a_file_name_of_null_is_none(load):
    """As in LVIS v1, which has none: the address names the file, and counts as no changed name."""
    content = document()
    content["images"][0] |= {"file_name": None, "coco_url": "http://images.cocodataset.org/val2017/1.jpg"}
    annotations = load(content)
    assert annotations.file_names[0] == "val2017/1.jpg"
    assert annotations.renamed == 0


@pytest.mark.parametrize("sample", SAMPLES)
def test_packing_equals_plain_loops(sample):
    if not (SHARED / sample).exists():
        pytest.skip("sample data is not here")
    content = json.loads((SHARED / sample).read_text())
    annotations = load_annotations(SHARED / sample)
    ids = sorted(category["id"] for category in content["categories"])
    assert annotations.federated
    assert [c.id for c in annotations.categories] == ids
    assert {c.id: (c.frequency, c.image_count) for c in annotations.categories} == {
        c["id"]: (c["frequency"], c["image_count"]) for c in content["categories"]
    }
    for i, image in enumerate(content["images"]):
        expected = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        rows = slice(annotations.offsets[i], annotations.offsets[i + 1])
        assert annotations.image_ids[i] == image["id"]
        assert annotations.annotation_ids[rows].tolist() == [a["id"] for a in expected]
        assert annotations.bboxes[rows].tolist() == [a["bbox"] for a in expected]  # digit for digit
        assert annotations.areas[rows].tolist() == [a["area"] for a in expected]
        assert [ids[label] for label in annotations.labels_of(i)] == [a["category_id"] for a in expected]
        for key, (offsets, labels) in (
            ("neg_category_ids", annotations.negatives),
            ("not_exhaustive_category_ids", annotations.not_exhaustive),
        ):
            assert [ids[label] for label in labels[offsets[i] : offsets[i + 1]]] == image[key]
    assert checked_for_training(annotations, drop_invalid=False)[1] == {
        "dropped boxes": 0,
        "clipped boxes": 0,
        "crowd boxes": 0,
        "ignored boxes": 0,
        "empty images": 0,
    }


def without(kind, key):
    def change(content):
        del content[kind][1][key]

    return change


def changed(kind, **values):
    def change(content):
        content[kind][1] |= values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("categories"), "no list of 'categories'"),
        (lambda content: content.update(images=[]), "empty split: no images"),
        (lambda content: content.update(annotations=[]), "empty split: no annotations"),
        (without("annotations", "bbox"), "annotation 18 (image 42): key 'bbox' is missing"),
        (without("annotations", "id"), "annotation number 1 in the file: key 'id' is missing"),
        (without("images", "height"), "image 7: key 'height' is missing"),
        (without("images", "file_name"), "image 7: neither file_name nor coco_url"),
        (without("categories", "name"), "category 2: key 'name' is missing"),
        (changed("images", id=42), "image id 42 is used more than once"),
        (changed("annotations", id=17), "annotation id 17 is used more than once"),
        (changed("categories", id=9), "category id 9 is used more than once"),
        (
            changed("annotations", image_id=3),
            "annotation 18 (image 3): image_id 3 is none of the file's (1 such",
        ),
        (
            changed("annotations", category_id=3),
            "annotation 18 (image 42): category_id 3 is none of the file's",
        ),
        (changed("annotations", category_id="2"), "annotation 18 (image 42): category_id is '2'"),
        (changed("annotations", category_id=2.5), "annotation 18 (image 42): category_id is 2.5"),
        (changed("annotations", bbox=[1, 2, 3]), "annotation 18 (image 42): bbox is [1, 2, 3]"),
        (changed("annotations", bbox=[1, 2, 3, "4"]), "annotation 18 (image 42): bbox is [1, 2, 3, '4']"),
        (changed("annotations", bbox=None), "annotation 18 (image 42): bbox is None"),
        (changed("annotations", area="big"), "annotation 18 (image 42): area is 'big'"),
        (changed("images", width=0), "image 7: height 50 and width 0 must be positive"),
        (
            changed("images", neg_category_ids=[2, 77]),
            "image 7: neg_category_ids has the unknown category id 77",
        ),
        (changed("categories", frequency="x"), "category 2: frequency 'x' must be r, c or f"),
        (changed("categories", name=5), "category 2: name 5 must be a string; image_count"),
    ],
)
def test_bad_files_are_named_with_the_record(load, tmp_path, change, message):
    content = document()
    change(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(content)
    assert str(error.value).startswith(f"{tmp_path / 'train.json'}: ")


@pytest.mark.parametrize("content", ["", '{"images": [{"id": 1', "[]", "\x00\xff"])
def test_what_is_no_annotation_file(load, content):
    with pytest.raises(ValueError, match=r"train\.json: (not valid JSON|no list of 'images')"):
        load(content)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_annotations(tmp_path / "none.json")


def test_same_categories(load):
    def check(first, second):
        check_same_categories(first.categories, first.path, second.categories, second.path)

    first = load(document())
    check(first, load(document()))
    renamed = document()
    renamed["categories"][0]["name"] = "lion"
    with pytest.raises(ValueError, match=r"label 2 is category 9 \(cat\) .* but 9 \(lion\)"):
        check(first, load(renamed))
    fewer = document()
    del fewer["categories"][2]
    with pytest.raises(ValueError, match=r"3 categories, .* has 2"):
        check(first, load(fewer))


def with_boxes(load, *boxes):
    """All boxes in image 42, of 200 x 100 pixels."""
    content = document()
    content["annotations"] = [
        {"id": 17 + n, "image_id": 42, "category_id": 2, "bbox": box} for n, box in enumerate(boxes)
    ]
    return load(content)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([3, 4, 0, 9], "box [3, 4, 0, 9] has no area; remove it or pass data.drop_invalid=true"),
        ([3, 4, 9, -1], "box [3, 4, 9, -1] has no area"),
        ([200, 4, 0.5, 9], "box [200, 4, 0.5, 9] has no area"),  # nothing left once clipped
        ([300, 4, 9, 9], "box [300, 4, 9, 9] has no area"),
        ([150, 4, 1e-6, 9], "box [150, 4, 1e-06, 9] has no area"),  # 150 + 1e-6 is 150 in float32
        ([math.nan, 4, 9, 9], "box [nan, 4, 9, 9] is not finite"),
        ([1, 4, math.inf, 9], "box [1, 4, inf, 9] is not finite"),
    ],
)
def test_boxes_without_area(load, box, reason):
    annotations = with_boxes(load, [1, 1, 5, 5], box, [2, 2, 6, 6])
    with pytest.raises(
        ValueError, match=re.escape(f"{annotations.path}: annotation 18 (image 42): {reason}")
    ):
        checked_for_training(annotations, drop_invalid=False)
    kept, counts = checked_for_training(annotations, drop_invalid=True)
    assert kept.boxes_of(0).tolist() == [[1, 1, 6, 6], [2, 2, 8, 8]]
    assert kept.annotation_ids.tolist() == [17, 19]
    assert counts == counts_of(dropped=1)


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([-1, 0, 11, 10], [0, 0, 10, 10]),
        ([190, 90, 11, 11], [190, 90, 200, 100]),
        ([160.01, 1, 40.99, 9], [160.01, 1, 200, 10]),  # sums to a little over 201 in binary
    ],
)
def test_overflow_of_a_pixel_is_clipped_silently(load, box, clipped):
    annotations, counts = checked_for_training(with_boxes(load, box), drop_invalid=False)
    np.testing.assert_array_equal(annotations.boxes_of(0), np.array([clipped], dtype=np.float32))
    assert counts == counts_of()


def test_larger_overflow_is_an_error_or_clipped(load):
    annotations = with_boxes(load, [-1.5, 0, 11.5, 10], [1, 1, 5, 5])
    with pytest.raises(
        ValueError, match=r"annotation 17 \(image 42\): box .* leaves the image by more than 1"
    ):
        checked_for_training(annotations, drop_invalid=False)
    kept, counts = checked_for_training(annotations, drop_invalid=True)
    assert kept.boxes_of(0).tolist() == [[0, 0, 10, 10], [1, 1, 6, 6]]
    assert counts == counts_of(clipped=1)
    assert annotations.bboxes[0].tolist() == [-1.5, 0, 11.5, 10]  # the metric still sees the file's


@pytest.mark.parametrize("drop_invalid", [False, True])
def test_boxes_of_another_form_are_refused_whatever_is_dropped(load, drop_invalid):
    """In an image of 200 x 100: ten boxes as corners, which leave it as x, y, width, height; fractions."""
    corners = [[150.0, 20 + n, 190, 90] for n in range(10)]
    odd = [[9.0, 9, 9, 50], [math.nan, 1, 2, 3]]  # of no width, and not finite
    with pytest.raises(ValueError, match=r"10 of 11 boxes leave .* x1, y1, x2, y2;"):
        checked_for_training(with_boxes(load, *corners, *odd), drop_invalid=drop_invalid)
    with pytest.raises(ValueError, match=r"10 of 10 boxes leave .* x1, y1, x2, y2;"):
        checked_for_training(with_boxes(load, *corners), drop_invalid=drop_invalid)
    kept, _ = checked_for_training(with_boxes(load, *corners[:9]), drop_invalid=True)  # too few to tell
    assert len(kept.labels) == 9
    proper = [[10.0, 10, 50, 50]] * 10
    assert len(checked_for_training(with_boxes(load, *proper), drop_invalid=drop_invalid)[0].labels) == 10
    fractions = [[0.1, 0.2, 0.3, 1.0], [-1e-7, 0, 0.4, 1.0001], [0.1, math.inf, 0, 1]]
    with pytest.raises(ValueError, match=r"all boxes are within 0\.\.1, as fractions"):
        checked_for_training(with_boxes(load, *fractions), drop_invalid=drop_invalid)


def test_a_split_without_a_box_is_refused_even_with_empty_images(load):
    annotations = with_boxes(load, [1, 1, 5, 5])
    annotations.crowd[:] = True
    with pytest.raises(ValueError, match=r"no box is left to train on: 1 crowd box; correct the boxes"):
        checked_for_training(annotations, drop_invalid=True, empty_images=True)


def test_small_boxes_go_with_the_invalid_ones(load):
    """As in mmdetection: sides under a pixel, and areas that the file says are 0."""
    annotations = with_boxes(load, [1, 1, 0.9, 5], [1, 1, 5, 1.0], [2, 2, 6, 6])
    assert checked_for_training(annotations, drop_invalid=False)[1]["dropped boxes"] == 0
    annotations.areas[2] = 0
    kept, counts = checked_for_training(annotations, drop_invalid=True)
    assert kept.annotation_ids.tolist() == [18]
    assert counts["dropped boxes"] == 2


def test_images_that_no_box_is_left_in(load):
    """The file's only annotations are in image 42; with a box that is dropped, in none of the others."""
    annotations = with_boxes(load, [1, 1, 5, 5], [3, 3, 4, 4])
    kept, counts = checked_for_training(annotations, drop_invalid=False, empty_images=False)
    assert counts["empty images"] == len(annotations) - 1 > 0
    assert kept.image_ids.tolist() == [42]
    assert kept.offsets.tolist() == [0, 2]
    row = annotations.image_ids.tolist().index(42)
    assert kept.file_names.tolist() == [annotations.file_names[row]]
    assert kept.image_sizes.tolist() == [annotations.image_sizes[row].tolist()]
    for name in ("negatives", "not_exhaustive"):
        offsets, labels = getattr(annotations, name)
        own_offsets, own_labels = getattr(kept, name)
        assert own_labels.tolist() == labels[offsets[row] : offsets[row + 1]].tolist()
        assert own_offsets.tolist() == [0, len(own_labels)]


def test_crowds_are_left_out_and_their_boxes_not_judged(load):
    content = document()
    content["annotations"][2]["bbox"] = [0, 0, 0, 0]
    kept, counts = checked_for_training(load(content), drop_invalid=False)
    assert kept.annotation_ids.tolist() == [18, 17]
    assert kept.offsets.tolist() == [0, 1, 2]
    assert kept.labels_of(1).tolist() == [2]
    assert not kept.crowd.any()
    assert counts == counts_of(crowd=1)


def test_boxes_to_ignore_are_left_out_and_counted(load):
    content = document()
    content["annotations"][1]["ignore"] = 1
    content["annotations"][2]["ignore"] = True  # a crowd, too: counted as one
    kept, counts = checked_for_training(load(content), drop_invalid=False)
    assert kept.annotation_ids.tolist() == [17]
    assert counts == counts_of(crowd=1, ignored=1)


@pytest.mark.parametrize("value", ["0", "no", 2, [1]])
def test_a_flag_is_0_or_1(load, value):
    """Python takes "0" for true: a crowd that is none would never train, and count for nothing."""
    content = document()
    content["annotations"][0]["iscrowd"] = value
    with pytest.raises(ValueError, match=r"annotation 17 \(image 7\): iscrowd is .*; it must be 0 or 1"):
        load(content)


COORDINATE = st.one_of(
    st.floats(-300, 300), st.integers(-3, 203), st.sampled_from([math.nan, math.inf, -math.inf])
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("boxes") / "train.json"


@pytest.mark.filterwarnings("ignore:invalid value")  # inf - inf, on its way to being refused
@settings(max_examples=150)
@given(boxes=st.lists(st.lists(COORDINATE, min_size=4, max_size=4), min_size=1, max_size=6))
def test_kept_boxes_lie_in_their_image_with_area(scratch, boxes):
    content, boxes = document(), [*boxes, [10, 10, 20, 20]]  # one is left in any case
    content["annotations"] = [
        {"id": n, "image_id": 42, "category_id": 2, "bbox": box} for n, box in enumerate(boxes)
    ]
    scratch.write_text(json.dumps(content))
    kept, counts = checked_for_training(load_annotations(scratch), drop_invalid=True)
    x1, y1, x2, y2 = kept.boxes_of(0).T
    assert ((x1 >= 0) & (y1 >= 0) & (x2 <= 200) & (y2 <= 100) & (x2 > x1) & (y2 > y1)).all()
    assert len(kept.labels) + counts["dropped boxes"] == len(boxes)
    again, none = checked_for_training(kept, drop_invalid=False)
    assert none == counts_of()
    np.testing.assert_array_equal(again.bboxes, kept.bboxes)
