"""`python -m clis check`: every kind of fault is found and named, and decides the exit code."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import BASELINE, CONFIG, REPOSITORY, SHORT

from clis.__main__ import main
from clis.commands.check import check
from clis.commands.check_report import Report
from clis.commands.prepare import prepare_image_level
from clis.config import Config
from clis.config_files import load_config

NUM_TRAIN = 40  # of the small benchmark, as the numbers below: 20 to validate, 100 image-level


@pytest.fixture
def root(data, tmp_path) -> Path:
    """A data root of one's own, to be damaged."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def config_of(root: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [*SHORT, f"data.root={root}", f"output={root.parent / 'run'}", *overrides])


def checked(root: Path, *overrides: str, workers: int = 0, sample: int | None = None) -> Report:
    return check(config_of(root, *overrides), workers=workers, sample=sample)


def change(root: Path, split: str, function) -> None:
    path = root / "shapes" / f"{split}.json"
    document = json.loads(path.read_text())
    function(document)
    path.write_text(json.dumps(document))


def photo(root: Path, split: str = "train", place: int = 0) -> Path:
    document = json.loads((root / "shapes" / f"{split}.json").read_text())
    return root / "shapes" / document["images"][place]["file_name"]


def saved(path: Path, mode: str = "RGB", **options) -> None:
    with Image.open(path) as image:
        image = image.convert(mode)
    image.save(path, "JPEG", **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sound_data_set_may_start(root, workers):
    report = checked(root, workers=workers)
    assert (report.errors, report.warnings, report.listing) == ([], [], [])
    notes = "\n".join(report.notes)
    assert f"train.json: {NUM_TRAIN} images" in notes
    assert "regions.npy: will be made, by" in notes
    assert "a step reads 4 instance-level + 16 image-level images" in notes


def test_counts_and_repeat_factors_of_the_groups(root):
    """Class 2 is in one image of three: r = sqrt(0.5 / (1 / 3)) = 1.22; class 1 in two, which is enough."""

    def shrink(document):
        keys = ("id", "file_name", "height", "width")
        document["images"] = [{key: image[key] for key in keys} for image in document["images"][:3]]
        names = ["one", "two"]
        document["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
        box = {"bbox": [1, 1, 9, 9]}
        rows = [(0, 1), (1, 1), (2, 2), (2, 2)]
        document["annotations"] = [
            {"id": n, "image_id": document["images"][i]["id"], "category_id": c, **box}
            for n, (i, c) in enumerate(rows, 1)
        ]

    change(root, "train", shrink)
    change(root, "val", shrink)
    baseline = [f"clis.{key}" for key in ("s=0", "t=0", "contrastive=false")]
    report = checked(root, *baseline, "data.repeat_threshold=0.5")
    assert report.errors == []
    assert "  2 rare classes, 4 boxes, repeat factors 1.00 to 1.22" in report.notes
    assert "  a pass is 4 images (repeat-factor, rounding ceil)" in report.notes


def test_images_that_cannot_be_used(root):
    """Missing, truncated, of another size; one image-level image is no image. Each is named once."""
    missing, truncated, other = (photo(root, place=place) for place in range(3))
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:300])
    with Image.open(other) as image:
        image.resize((30, 20)).save(other)
    broken = sorted((root / "shapes" / "image_level").rglob("*.jpg"))[0]
    broken.write_bytes(b"no image at all")
    photo(root, "val").unlink()
    report = checked(root)
    train, image_level, val = report.errors
    assert "train.json: 3 of 40 images cannot be used (data.max_bad_images allows 0 in all)" in train
    assert "30 x 20 pixels, but the annotations say 48 x 48" in train
    assert f"{missing}: No such file or directory" in train
    assert "image-level: 1 of 100 images" in image_level
    assert "val.json: 1 of 20 images cannot be used (validation needs all)" in val
    assert len(report.listing) == 5
    assert any(line.startswith("image-level\t") and broken.name in line for line in report.listing)
    # a run counts 3 + 1 in all; a baseline 3 in its training and 1 in its pre-training
    assert len(checked(root, "data.max_bad_images=3").errors) == 3
    baseline = ("clis.s=0", "clis.t=0", "clis.contrastive=false", "pretrain.epochs=1")
    assert len(checked(root, "data.max_bad_images=3", *baseline).errors) == 1
    report = checked(root, "data.max_bad_images=4")
    assert len(report.warnings) == 2
    assert [error.split(": ")[0].endswith("val.json") for error in report.errors] == [True]  # never replaced


def test_what_is_odd_and_does_no_harm(root):
    """Gray and CMYK, an EXIF rotation, EXIF data that are none."""
    gray, cmyk, rotated, bad = (photo(root, place=place) for place in range(4))
    saved(gray, "L")
    saved(cmyk, "CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(rotated, exif=exif)
    saved(bad, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12")
    report = checked(root)
    assert report.errors == []
    notes = [note for note in report.notes if "train.json" in note and "images " in note]
    for what in (
        "1 images are L, not RGB", "1 images are CMYK, not RGB", "1 images have an EXIF rotation",
        "1 images have EXIF data that cannot be read",
    ):  # fmt: skip
        assert any(what in note for note in notes), what
    assert not any("EXIF" in warning for warning in report.warnings)


def test_orientations_that_sizes_cannot_tell(root):
    """Upside down, an image has the annotated size either way, and boxes may be in the wrong place."""
    exif = Image.Exif()
    exif[0x0112] = 3
    saved(photo(root, place=0), exif=exif)
    (warning,) = (each for each in checked(root).warnings if "EXIF" in each)
    assert "train.json: 1 images have an EXIF orientation of 2 to 4" in warning


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("bbox", [3, 4, 0, 9], r"annotation \d+ \(image \d+\): box \[3, 4, 0, 9\] has no area"),
        ("bbox", [3, 4, 90, 9], r"leaves the image by more than 1 px"),
        ("id", 2, r"annotation id 2 is used more than once"),
        ("image_id", -1, r"image_id -1 is none of the file's"),
    ],
)
def test_annotations_at_fault(root, field, value, error):
    change(root, "train", lambda document: document["annotations"][4].update({field: value}))
    report = checked(root)
    assert len(report.errors) == 1
    assert re.search(error, report.errors[0])
    if field == "bbox":
        report = checked(root, "data.drop_invalid=true")
        assert report.errors == []
        kind = "1 dropped box, of " if value[2] == 0 else "1 clipped box, of "
        assert any(f"train.json: {kind}" in warning for warning in report.warnings)


def test_counts_of_a_larger_file_are_said(root):
    """A part of LVIS keeps LVIS's counts and groups, which decide APr and the margins of some losses."""

    def claim(document):
        document["categories"][3] |= {"image_count": 500, "frequency": "f"}

    assert not any("image_count" in warning for warning in checked(root).warnings)
    change(root, "train", claim)
    said = [warning for warning in checked(root).warnings if "image_count" in warning]
    assert len(said) == 1
    assert re.search(r"image_count of 1 class is not the number of images .* \(.*: 500, here \d+\)", said[0])


def test_refused_boxes_are_not_described(root):
    """What would train is not known then: images without a box are left out, or train as background."""
    change(root, "train", lambda document: document["annotations"][4].update(bbox=[3, 4, 0, 9]))
    report = checked(root)
    assert len(report.errors) == 1
    assert not any("a pass is" in note or "without a box" in note for note in report.notes)


def test_annotations_that_are_hardly_meant(root):
    """Boxes of a pixel, one file behind two images, training images in validation, uncounted truths."""
    photos = json.loads((root / "shapes" / "train.json").read_text())["images"]

    def spoil(document):
        document["images"][1]["file_name"] = document["images"][0]["file_name"]
        for annotation in document["annotations"]:
            annotation["bbox"] = [0.1, 0.2, 1.3, 1.4]

    def overlap(document):
        document["images"][2]["file_name"] = photos[3]["file_name"]
        document["annotations"][0]["id"] = 0
        document["annotations"][1]["area"] = -1

    before = checked(root)
    change(root, "train", spoil)
    change(root, "val", overlap)
    warnings = "\n".join(set(checked(root).warnings) - set(before.warnings))
    assert "train.json: no box has a side of 2 px, the largest is 1.3 x 1.4" in warnings
    assert "train.json: 1 image files are used more than once" in warnings
    assert "val.json: 1 of 20 validation images are training images too" in warnings
    assert re.search(
        r"val\.json: 1 of \d+ ground truths do not count: they have the annotation id 0", warnings
    )
    assert re.search(r"val\.json: 1 of \d+ ground truths do not count: they have an `area`", warnings)


def test_what_is_described_is_what_is_trained_on(root):
    """Every box of one class is a crowd, which never trains: the class has none, and the count is less."""
    before = json.loads((root / "shapes" / "train.json").read_text())
    crowd = before["categories"][0]
    num_crowd = sum(a["category_id"] == crowd["id"] for a in before["annotations"])

    def gather(document):
        for annotation in document["annotations"]:
            annotation["iscrowd"] = int(annotation["category_id"] == crowd["id"])

    change(root, "train", gather)
    report = checked(root)
    left = len(before["annotations"]) - num_crowd
    assert any(f"40 images, {left} boxes" in note for note in report.notes)
    assert any(f"classes without a box: {crowd['name']}" in warning for warning in report.warnings)


def test_a_damaged_index_is_found(root, tmp_path):
    """One label of another class: it opens, and nothing but its digest shows it."""
    prepare_image_level([root / "shapes" / "image_level"], root / "shapes" / "train.json", tmp_path / "index")
    labels = np.load(tmp_path / "index" / "labels.npy")
    labels[0] = (labels[0] + 1) % 50
    np.save(tmp_path / "index" / "labels.npy", labels)
    report = checked(root, f"data.image_level=[{tmp_path / 'index'}]")
    assert any("index: damaged; remove it" in error for error in report.errors)


def test_classes_without_boxes_or_images(root):
    folder = sorted((root / "shapes" / "image_level").iterdir())[0]
    shutil.rmtree(folder)

    gone = json.loads((root / "shapes" / "train.json").read_text())["categories"][7]

    def leave_out(document):
        document["annotations"] = [a for a in document["annotations"] if a["category_id"] != gone["id"]]

    change(root, "train", leave_out)
    report = checked(root)
    assert report.errors == []
    assert any(f"1 classes without a box: {gone['name']}" in warning for warning in report.warnings)
    assert any(folder.name in note and "without images" in note for note in report.notes)


def test_names_of_lvis(root):
    """v1's val holds images of train2017; v0.5 has names with a prefix that the files do not have."""
    shapes = root / "shapes"
    moved, renamed = photo(root, "val", 0), photo(root, "val", 1)

    def as_lvis(document):
        first, second = document["images"][:2]
        del first["file_name"]
        first["coco_url"] = f"http://images.cocodataset.org/train2017/{moved.name}"
        second["file_name"] = f"COCO_val2014_{renamed.name}"
        second["neg_category_ids"] = []

    change(root, "val", as_lvis)
    (shapes / "train2017").mkdir()
    moved.rename(shapes / "train2017" / moved.name)
    renamed.rename(shapes / renamed.name)
    report = checked(root)
    assert report.errors == []
    notes = "\n".join(report.notes)
    assert f"1 of 20 images are in {shapes}/train2017" in notes
    assert "1 names are read without COCO_val2014_" in notes


def test_settings_that_cannot_run(root, finished):
    """Weights that are not there, regions of other images, a run folder of another config."""
    norm = ["model.backbone={norm: folded, weights: resnet18.pth, name: resnet18}"]
    report = checked(root, *norm)
    assert any("resnet18.pth: backbone weights are missing" in error for error in report.errors)
    shutil.rmtree(sorted((root / "shapes" / "image_level").iterdir())[0])
    report = checked(root, f"regions.file={finished / 'regions.npy'}", "regions.detector=null")
    assert any("made for other image-level images" in error for error in report.errors)
    report = checked(root, "regions.detector=null")
    assert any("makes it with a detector: name a checkpoint" in error for error in report.errors)
    report = checked(root, "regions.detector=no_such_run")
    assert any("no_such_run: no such checkpoint" in error for error in report.errors)
    report = checked(root, "data.shuffle_block=8")
    assert any("data.shuffle_block is for tars of mixed classes" in error for error in report.errors)
    (root.parent / "run").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(finished / name, root.parent / "run")
    report = checked(root, "optim.lr=0.5")
    assert any("belongs to another config: optim.lr: 0.04 != 0.5" in error for error in report.errors)


def test_image_level_images_of_a_run_that_is_needed_first(root):
    """MosaicOS's own last stage has none, its middle one has."""

    def report_of() -> Report:
        given = [*SHORT, f"data.root={root}", f"output={root.parent / 'run'}"]
        return check(
            load_config(REPOSITORY / "configs" / "shapes" / "mosaicos.yaml", given), given, workers=0
        )

    report = report_of()
    assert report.errors == []
    assert any("regions.npy: will be made, by" in note for note in report.notes)
    broken = sorted((root / "shapes" / "image_level").rglob("*.jpg"))[0]
    broken.write_bytes(b"no image at all")
    (error,) = report_of().errors
    assert "image-level: 1 of 100 images cannot be used (data.max_bad_images allows 0 in all)" in error
    shutil.rmtree(root / "shapes" / "image_level")
    (error,) = report_of().errors
    assert "image_level: no such folder or tar" in error


def test_folders_and_weights_are_checked_before_the_benchmark_is_written(tmp_path):
    """A file in the place of a folder stands for one that cannot be written."""
    root, file = tmp_path / "data", tmp_path / "file"
    file.touch()
    generate = "data.generate=shapes"
    report = checked(root, generate)
    assert report.errors == []
    assert "the embedded benchmark will be written" in report.notes[-1]
    (error,) = checked(root, generate, f"output={file}/run").errors
    assert error.startswith(f"{file}/run: nothing can be written there")
    (error,) = checked(root, generate, f"data.root={file}/data").errors
    assert error.startswith(f"{file}/data/shapes: nothing can be written there")
    assert error.endswith("another data.root=")
    report = checked(root, generate, "model.backbone={norm: folded, weights: resnet18.pth, name: resnet18}")
    assert any("resnet18.pth: backbone weights are missing" in error for error in report.errors)
    assert not root.exists()


def test_what_training_refuses_is_found(root, finished):
    """A ground truth of negative size, a detector of other classes, a detector's backbone without weights."""
    state = torch.load(finished / "detector" / "checkpoints" / "last.pt")
    state["categories"][0]["name"] = "another"
    torch.save(state, root.parent / "other.pt")
    report = checked(root, f"regions.detector={root.parent / 'other.pt'}")
    assert [error for error in report.errors if "other.pt" in error and "another" in error] == report.errors
    assert len(report.errors) == 1
    detector = root.parent / "detector.yaml"
    detector.write_text(f"base: {BASELINE}\nmodel: {{backbone: {{weights: gone.pth}}}}\n")
    report = checked(root, f"regions.detector={detector}")
    assert ["gone.pth: backbone weights are missing" in error for error in report.errors] == [True]
    change(root, "val", lambda document: document["annotations"][0].update(bbox=[3, 4, -5, 9]))
    assert any("val.json" in error for error in checked(root).errors)


def test_the_detectors_run_folder_is_the_one_that_the_run_would_use(root, finished):
    """output=FOLDER puts it into FOLDER/detector; one that is there is of another learning rate."""
    folder = root.parent / "run"
    (folder / "detector").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(finished / "detector" / name, folder / "detector")
    overrides = [*SHORT, f"data.root={root}", f"output={folder}", "optim.lr=0.5"]
    report = check(load_config(CONFIG, overrides), overrides, workers=0)
    assert [error.split(":")[0] for error in report.errors] == [
        f"{folder / 'detector'} belongs to another config"
    ]


def test_class_folders_are_scanned_once(root, capsys):
    """With wrong labels too, and what the scan leaves out is said once."""
    (root / "shapes" / "image_level" / "notes.txt").touch()
    for noise in (0, 0.5):
        assert checked(root, f"data.label_noise={noise}").errors == []
        assert capsys.readouterr().out.count("left out: notes.txt") == 1


def test_a_sample_is_spread_over_the_stream(root):
    """Of 40 images the first, the last and two between."""
    for place in (0, 13, 26, 39):
        photo(root, place=place).unlink()
    report = checked(root, sample=4)
    assert "4 of 4 images cannot be used" in report.errors[0]


def test_a_sample_is_enough_for_what_training_refuses_at_its_start(root, tmp_path):
    """Outside of the sample, a validation image and a folder of the prepared index are missing."""
    photo(root, "val", place=7).unlink()
    classes = root / "shapes" / "image_level"
    prepare_image_level([classes], root / "shapes" / "train.json", tmp_path / "index")
    moved = sorted(classes.iterdir())[7]
    moved.rename(tmp_path / moved.name)
    overrides = (f"data.image_level=[{tmp_path / 'index'}]", "data.max_bad_images=100")
    folders, val = checked(root, *overrides, sample=2).errors
    assert (
        f"1 of 50 folders and tars that it was prepared from have moved or changed, the first is {moved}"
        in folders
    )
    assert "val.json: 1 of 20 images cannot be used" in val


def test_the_command_says_it_by_its_exit_code(root, tmp_path, capsys, monkeypatch):
    arguments = ["check", CONFIG, *SHORT, f"data.root={root}", f"output={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--workers=0"])
    assert stop.value.code == 0
    assert "The run may start." in capsys.readouterr().out
    photo(root).unlink()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--workers=0", f"--list={tmp_path / 'bad.txt'}"])
    assert stop.value.code == 1
    assert "The run cannot start; fix the errors above." in capsys.readouterr().out
    assert photo(root).name in (tmp_path / "bad.txt").read_text()
    change(root, "train", lambda document: document["images"][0].update(file_name="\udcff.jpg"))
    monkeypatch.setattr(Report, "say", lambda self: None)  # pytest's output takes UTF-8 only
    with pytest.raises(SystemExit):
        main([*arguments, "--workers=0", f"--list={tmp_path / 'bytes.txt'}"])
    assert "shapes/\\udcff.jpg: No such file" in (tmp_path / "bytes.txt").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [("--sample=0", "'0' is not a number above 0"), ("--workers=-1", "'-1' is not a number of at least 0")],
)
def test_wrong_numbers_are_told_before_anything_is_read(option, message, capsys):
    with pytest.raises(SystemExit):
        main(["check", CONFIG, option])
    assert message in capsys.readouterr().err


def test_gzip_in_a_tar_is_looked_into(root):
    """As in ImageNet-22k: the image inside is judged, not its wrapping."""
    folder = sorted((root / "shapes" / "image_level").iterdir())[0]
    image = Image.fromarray(np.zeros((40, 40), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    packed = gzip.compress(buffer.getvalue())
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        member = tarfile.TarInfo("gray.JPEG")
        member.size = len(packed)
        tar.addfile(member, io.BytesIO(packed))
    shutil.rmtree(folder)
    report = checked(root)
    assert report.errors == []
    assert any("image-level: 1 images are L" in note for note in report.notes)


def test_boxes_as_fractions_and_a_batch_for_more_processes(root):
    """Fractions of the image cannot be trained on; 6 images by 4 may be for two processes, so it warns."""

    def as_fractions(document: dict) -> None:
        for each in document["annotations"]:
            each["bbox"] = [side / 48 for side in each["bbox"]]

    report = checked(root, "train.images_per_step=6", "train.images_per_process=4")
    assert not report.errors
    assert any("train.images_per_process=4 on one process" in warning for warning in report.warnings)
    change(root, "train", as_fractions)
    assert any("all boxes are within 0..1" in error for error in checked(root).errors)
