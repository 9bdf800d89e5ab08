"""The benchmark of real photographs: from a miniature of its repository, and the set of our figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY
from torchvision.io import decode_image, encode_jpeg, write_png

from clis.commands import run_verb
from clis.config_files import load_config
from clis.engine.run_folder import RunFolder
from clis.metric.lvis_eval import METRICS

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import groceries
from groceries import Photo

CONFIGS = REPOSITORY / "configs" / "groceries"
SHARED = REPOSITORY.parent / "shared" / "data"

needs_data = pytest.mark.skipif(
    not all((SHARED / name).exists() for name in ("groceries", "weights")), reason="sample data is not here"
)
GRAY = 150


def put(clone: Path, photo: Photo, left: int, top: int, boxes: list[tuple[int, ...]]) -> torch.Tensor:
    """Writes a photograph as the repository has it; returns its pixels without the border."""
    below = clone / "dataset" / ("val" if photo.split == "val" else "train")
    generator = torch.Generator().manual_seed(photo.number)
    pixels = torch.randint(0, 100, (3, 1, 1), generator=generator).expand(3, photo.height, photo.width)
    image = torch.full((3, 224, 224), GRAY)
    image[:, top : top + photo.height, left : left + photo.width] = pixels
    name = photo.stem.upper()
    for kind in ("images", "annotations"):
        (below / kind / photo.category).mkdir(parents=True, exist_ok=True)
    write_png(image.to(torch.uint8), str(below / "images" / photo.category / f"{name}.png"))
    form = "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
    objects = "".join(form.format(*box) for box in boxes)
    path = below / "annotations" / photo.category / f"{name}.xml"
    path.write_text(f"<annotation><filename>{name}.png</filename>{objects}</annotation>")
    return pixels


@pytest.fixture
def clone(tmp_path):
    """Two classes, one of a single training photograph; of odd borders the boxes tell which middle it is."""
    digests = {
        1: groceries.box_digest([(0, 10, 73, 100 + 10), (150 - 27, 1, 169, 50)]),
        2: groceries.box_digest([(60, 60 - 49, 90, 100 - 49)]),
        3: groceries.box_digest([(10, 30 - 28, 20, 40 - 28), (5, 60 - 28, 105, 160 - 28)]),
    }
    photos = [Photo("red_tea", "train", number, 224, 224) for number in range(12)]
    photos += [
        Photo("jam", "train", 1, 169, 224, digests[1][:4]),
        Photo("jam", "val", 2, 224, 127, digests[2][:4]),
        Photo("jam", "image_level", 3, 224, 169, digests[3][:4]),
        Photo("red_tea", "val", 40, 170, 224),
        Photo("red_tea", "image_level", 41, 126, 224),
    ]
    starts = {1: (27, 0), 2: (0, 49), 3: (0, 28), 40: (27, 0), 41: (49, 0)}
    boxes = {
        "jam0001": [(27, 10, 100, 110), (150, 1, 224, 50)],  # the second goes on into the border
        "jam0003": [(10, 30, 20, 40), (5, 60, 105, 160)],
    }
    folder = tmp_path / "clone"
    pixels = {
        photo.stem: put(
            folder,
            photo,
            *(starts[photo.number] if photo.width < 224 or photo.height < 224 else (0, 0)),
            boxes=boxes.get(photo.stem, [(60, 60, 90, 100)]),
        )
        for photo in photos
    }
    return folder, photos, pixels


def test_a_miniature_of_the_repository_becomes_the_benchmark(clone, tmp_path):
    folder, photos, pixels = clone
    made = tmp_path / "made"
    groceries.build(folder, made, photos)

    for photo in photos:
        image = decode_image(str(groceries.path_of(made, photo)))
        expected = pixels[photo.stem]
        assert image.shape == expected.shape
        # An even color survives JPEG but for rounding; a row of the border left in would be 50 and more away.
        assert (image.int() - expected).abs().max() <= 4
    train = json.loads((made / "train.json").read_text())
    assert [each["file_name"] for each in train["images"]][:2] == ["jam0001.jpg", "red_tea0000.jpg"]
    fields = ("name", "image_count", "instance_count", "frequency")
    assert [tuple(each[field] for field in fields) for each in train["categories"]] == [
        ("jam", 1, 2, "r"),
        ("red_tea", 12, 12, "c"),
    ]
    # 27 columns to the left are cut off; x2 = 224 is beyond the photograph's 27 + 169 columns.
    assert [each["bbox"] for each in train["annotations"][:2]] == [[0, 10, 73, 100], [123, 1, 46, 49]]
    assert train["images"][0]["neg_category_ids"] == [2]
    val = json.loads((made / "val.json").read_text())
    assert val["annotations"][0]["bbox"] == [60, 60 - 49, 30, 40]
    assert val["categories"] == train["categories"]  # the frequencies are those of training
    assert json.loads((made / "image_level_boxes.json").read_text())["jam/jam0003.jpg"] == [
        [10, 2, 20, 12],
        [5, 32, 105, 132],
    ]
    assert json.loads((made / "oracle_regions.json").read_text())["jam/jam0003.jpg"] == [5, 32, 105, 132]
    # A fifth of 12 photographs is 2, of 1 none; the frequencies are of what is left.
    held_back = json.loads((made / "tuning_val.json").read_text())
    assert [each["file_name"] for each in held_back["images"]] == ["red_tea0010.jpg", "red_tea0011.jpg"]
    tuning = json.loads((made / "tuning_train.json").read_text())
    assert [each["image_count"] for each in tuning["categories"]] == [1, 10]
    assert len(tuning["images"]) == 11


def test_a_benchmark_is_never_overwritten(clone, tmp_path):
    folder, photos, _ = clone
    groceries.build(folder, tmp_path / "made", photos)
    with pytest.raises(FileExistsError, match="already holds a benchmark"):
        groceries.build(folder, tmp_path / "made", photos)


def test_what_a_clone_lacks_is_named(clone, tmp_path):
    folder, photos, _ = clone
    (folder / "dataset/train/annotations/jam/JAM0003.xml").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no \.xml of 1 photographs \(jam0003\).*git checkout 0130c6c"
    ):
        groceries.build(folder, tmp_path / "made", photos)
    with pytest.raises(FileNotFoundError, match="git clone https"):
        groceries.build(tmp_path / "nowhere", tmp_path / "made", photos)


def test_two_different_photographs_of_one_name_are_refused(clone, tmp_path):
    folder, photos, _ = clone
    other = folder / "dataset" / "images" / "JAM0001.png"
    other.parent.mkdir()
    original = folder / "dataset/train/images/jam/JAM0001.png"
    other.write_bytes(original.read_bytes())
    groceries.build(folder, tmp_path / "made", photos)  # equal ones are not
    other.write_bytes(encode_jpeg(torch.zeros(3, 224, 224, dtype=torch.uint8)).numpy().tobytes())
    groceries.build(
        folder, tmp_path / "again", photos
    )  # an earlier version beside dataset/train counts for nothing
    for place in ("docs", "app"):  # no photographs of ours
        (folder / place).mkdir()
        (folder / place / "logo.png").write_text(f"of {place}")
    groceries.build(folder, tmp_path / "beside_others", photos)
    (folder / "dataset" / "train").rename(folder / "dataset" / "other")
    with pytest.raises(ValueError, match=r"JAM0001\.png and .*JAM0001\.png differ"):
        groceries.build(folder, tmp_path / "third", photos)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "not boxes in VOC's form"),
        ("<annotation></annotation>", "has no boxes; restore it"),
        (
            "<annotation><object><bndbox><xmin>one</xmin></bndbox></object></annotation>",
            "not boxes in VOC's form",
        ),
        (
            "<annotation><object><bndbox><xmin>1</xmin></bndbox></object></annotation>",
            "not boxes in VOC's form",
        ),
    ],
)
def test_a_damaged_file_is_named(clone, tmp_path, text, message):
    folder, photos, _ = clone
    path = folder / "dataset/train/annotations/jam/JAM0003.xml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"JAM0003\.xml: {message}"):
        groceries.build(folder, tmp_path / "made", photos)


def test_the_table_puts_every_photograph_into_one_split():
    photos = groceries.read_photos()
    assert Counter(photo.split for photo in photos) == {"train": 1575, "val": 500, "image_level": 2868}
    assert max(Counter((photo.category, photo.number) for photo in photos).values()) == 1
    assert set(Counter(photo.category for photo in photos if photo.split == "val").values()) == {20}


@needs_data
def test_the_hashes_are_of_the_set_at_hand(tmp_path):
    data, photos = SHARED / "groceries", groceries.read_photos()
    for name in ("train.json", "val.json", "image_level_boxes.json"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    for name in ("images", "image_level"):
        (tmp_path / name).symlink_to(data / name)
    assert groceries.verify(tmp_path, photos) == []

    document = json.loads((tmp_path / "val.json").read_text())
    document["annotations"][0]["bbox"][0] += 1
    (tmp_path / "val.json").write_text(json.dumps(document))
    assert groceries.verify(tmp_path, photos) == ["beans: other boxes, sizes or splits than in our set"]


def test_without_the_photographs_the_recipe_says_how_to_get_them(tmp_path):
    run = subprocess.run(
        [
            sys.executable, REPOSITORY / "train.py", "--config", CONFIGS / "clis.yaml",
            f"data.root={tmp_path}", f"output={tmp_path / 'run'}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode != 0
    assert re.search(r"groceries/train\.json: no such .*benchmarks/groceries\.py builds", run.stderr)
    assert "Traceback" not in run.stderr


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "clis"])
def test_the_recipe_runs(name, tmp_path):
    data = SHARED / "groceries"
    document = json.loads((data / "val.json").read_text())
    images = document["images"][::25]
    ids = {image["id"] for image in images}
    document["annotations"] = [each for each in document["annotations"] if each["image_id"] in ids]
    (tmp_path / "val.json").write_text(json.dumps(document | {"images": images}))
    arguments = [
        "train.steps=2", "train.images_per_step=2", "train.images_per_process=2", "train.device=cpu",
        "model.backbone.weights=weights/resnet18_pqf.pt", "data.image_level_share=0.02",
        f"data.root={SHARED}", f"data.val={tmp_path / 'val.json'}", f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    run_verb("train", ["--config", str(CONFIGS / f"{name}.yaml"), *arguments])
    assert tuple(RunFolder(tmp_path / "run").read_result()) == METRICS


def test_the_recipes_freeze_stem_and_first_stage():
    for path in sorted(CONFIGS.glob("*.yaml")):
        backbone = load_config(path).model.backbone
        assert (backbone.norm, backbone.trainable_layers) == ("folded", 3)  # of stages 2, 3 and 4
