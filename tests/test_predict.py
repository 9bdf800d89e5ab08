"""`clis predict`: what it finds is what `evaluate` finds; files of all kinds, and bad input in one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clis.__main__ import main
from clis.cli import run_command
from clis.commands import predict as predict_command
from clis.commands.predict import Selection
from clis.commands.predict_files import ImageFile, find_annotated, find_images, picture_names
from clis.data.categories import Category
from clis.drawing import Mark, class_color, draw_marks, font_of, picture_of
from clis.metric.detections import Detections
from clis.models.roi import ImageDetections


@pytest.fixture(scope="module")
def photos(data, tmp_path_factory):
    """Five images: one as stored, one in a folder below, one to be turned, two that cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    first, second, third = sorted((data / "shapes" / "val").iterdir())[:3]
    (folder / "below").mkdir()
    shutil.copy(first, folder / "b.jpg")
    shutil.copy(second, folder / "below" / "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(third).crop((0, 0, 48, 30)).save(folder / "turned.png", exif=exif)
    (folder / "damaged.jpg").write_bytes(first.read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    return folder


def read(folder):
    predictions = json.loads((folder / "predictions.json").read_text())
    return predictions, json.loads((folder / "images.json").read_text())


def test_all_files_are_looked_at_and_unreadable_ones_named(finished, photos, tmp_path, capsys):
    main(
        ["predict", str(finished), str(photos), f"--out={tmp_path}", "--score=0", "--batch=2", "--device=cpu"]
    )
    said = capsys.readouterr().out
    assert "3 images, " in said
    assert "1 turned by their EXIF orientation" in said
    assert "left out: 1 other file in the folders, by name not " in said
    assert f"unreadable: {photos}/damaged.jpg: " in said
    assert "empty.png: the file is empty" in said
    assert "2 unreadable" in said
    predictions, document = read(tmp_path)
    images = {image["file_name"]: image for image in document["images"]}
    assert list(images) == ["b.jpg", "below/a.jpg", "damaged.jpg", "empty.png", "turned.png"]
    assert [image["id"] for image in images.values()] == [1, 2, 3, 4, 5]
    turned = images["turned.png"]  # stored 30 x 48 (height x width)
    assert (turned["height"], turned["width"], turned["turned"]) == (48, 30, True)
    assert "error" in images["empty.png"]
    assert {record["image_id"] for record in predictions} == {1, 2, 5}
    for name, image in images.items():
        if "error" not in image:
            assert (tmp_path / image["picture"]).is_file(), name
            boxes = np.array([r["bbox"] for r in predictions if r["image_id"] == image["id"]])
            assert (boxes[:, :2] + boxes[:, 2:] <= [image["width"] + 0.01, image["height"] + 0.01]).all()
    assert len(Detections.load(tmp_path / "predictions.json")) == len(predictions)


def test_the_page_shows_every_picture_and_escapes_names(finished, photos, tmp_path):
    pytest.importorskip("jinja2")
    shutil.copy(photos / "b.jpg", tmp_path / "<b>&#.jpg")
    main(["predict", str(finished), f"{tmp_path}/*.jpg", f"--out={tmp_path / 'out'}", "--score=0"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "&lt;b&gt;&amp;#.jpg" in page
    assert 'src="pictures/%3Cb%3E%26%23.jpg"' in page
    assert "<b>&#" not in page


def test_without_jinja_the_rest_is_written(finished, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    main(["predict", str(finished), str(photos / "b.jpg"), f"--out={tmp_path}"])
    assert 'no index.html: pages need Jinja2: pip install -e ".[report]"' in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.json", "pictures", "predictions.json"]


def test_with_annotations_the_result_is_that_of_the_evaluation(finished, data, tmp_path):
    """All detections of the run's own detections.npz, with the ids of the file."""
    val = data / "shapes" / "val"
    main(["predict", str(finished), str(val), f"--annotations={data}/shapes/val.json", "--score=0",
          "--top=300", f"--out={tmp_path}", "--no-pictures"])  # fmt: skip
    found = Detections.load(tmp_path / "predictions.json")
    expected = Detections.load(finished / "detections.npz")
    order = np.argsort(expected.image_id, kind="stable"), np.argsort(found.image_id, kind="stable")
    for name in ("image_id", "category_id"):
        np.testing.assert_array_equal(getattr(found, name)[order[1]], getattr(expected, name)[order[0]])
    np.testing.assert_allclose(found.bbox[order[1]], expected.bbox[order[0]], atol=1e-3)
    np.testing.assert_allclose(found.score[order[1]], expected.score[order[0]], atol=1e-6)
    assert not (tmp_path / "pictures").exists()


def test_score_top_and_classes_select():
    """Scores 0.9, 0.8, 0.5, 0.2 of labels 1, 0, 1, 1: at least 0.5 of class 1 are the first and third."""
    found = ImageDetections(
        torch.arange(16.0).view(4, 4), torch.tensor([0.9, 0.8, 0.5, 0.2]), torch.tensor([1, 0, 1, 1])
    )
    for selection, rows in (
        (Selection(0.0, 100), [0, 1, 2, 3]),
        (Selection(0.5, 100), [0, 1, 2]),
        (Selection(0.5, 2), [0, 1]),
        (Selection(0.5, 2, torch.tensor([1])), [0, 2]),
        (Selection(0.95, 2), []),
    ):
        boxes, scores, labels = selection.columns(found)
        assert scores.tolist() == found.scores[rows].tolist()
        assert boxes.tolist() == found.boxes[rows].tolist()
        assert labels.tolist() == found.labels[rows].tolist()


def test_sources_are_files_folders_and_globs_each_file_once(photos, tmp_path):
    def names(*sources, written=()):
        files, others = find_images([str(source) for source in sources], written)
        return [file.name for file in files], others

    every = ["b.jpg", "below/a.jpg", "damaged.jpg", "empty.png", "turned.png"]
    assert names(photos) == (every, 1)
    assert names(photos / "b.jpg", photos) == (every, 1)
    assert names(photos / "*.png") == (["empty.png", "turned.png"], 0)
    assert names(photos / "**" / "a.jpg") == (["a.jpg"], 0)
    assert names(photos / "notes.txt") == (["notes.txt"], 0)  # named: its bytes decide
    outside = [name for name in every if "/" not in name]
    assert names(photos, written=[photos / "below", photos / "notes.txt"]) == (outside, 0)
    assert names(photos / "**" / "*.jpg", written=[photos / "below"]) == (["b.jpg", "damaged.jpg"], 0)
    (photos / "alias.jpg").symlink_to("b.jpg")  # sorted before the photo, whose own name it would hide
    assert names(photos) == (every, 1)
    (first, *_), _ = find_images([str(photos)], [])
    assert first.links == (photos / "alias.jpg",)  # by which annotations may know it
    assert names(photos / "alias.jpg") == (["alias.jpg"], 0)
    (photos / "alias.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"the only images are in .*below, where this command writes"):
        names(photos / "below" / "a.jpg", written=[photos / "below"])


@pytest.mark.parametrize("out", [".", ".."])
def test_the_photos_folder_may_be_the_output_folder(finished, photos, tmp_path, out):
    """Run again, the command leaves out what it has written."""
    (tmp_path / "in").mkdir()
    shutil.copy(photos / "b.jpg", tmp_path / "in" / "b.jpg")
    out = tmp_path / "in" / out
    for _ in range(2):
        main(["predict", str(finished), str(tmp_path), f"--out={out}"])
        _, document = read(out)
        assert [image["file_name"] for image in document["images"]] == ["in/b.jpg"]


def test_nothing_of_an_earlier_result_stays_beside_the_new_one(finished, photos, tmp_path):
    command = ["predict", str(finished), f"--out={tmp_path}"]
    main([*command, str(photos)])
    (tmp_path / "pictures" / "mine.txt").write_text("kept")
    main([*command, str(photos / "b.jpg")])
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["b.jpg", "mine.txt"]
    document = json.loads((tmp_path / "images.json").read_text())
    document["images"].append({"picture": "../precious.jpg"})
    (tmp_path / "images.json").write_text(json.dumps(document))
    precious = tmp_path.parent / "precious.jpg"
    precious.write_text("kept")
    main([*command, str(photos / "turned.png"), "--no-pictures"])
    assert precious.exists()
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["images.json", "pictures/mine.txt", "predictions.json"]
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["mine.txt"]  # no empty folder


@pytest.mark.parametrize("name", ["images.json", "pictures/cat.jpg"])
def test_what_somebody_else_has_in_the_output_folder_is_not_replaced(finished, photos, tmp_path, name):
    own = tmp_path / "in" / name
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    shutil.copy(photos / "b.jpg", tmp_path / "in" / "cat.jpg")
    with pytest.raises(ValueError, match=rf"{name.split('/')[0]}: was not written by predict"):
        main(["predict", str(finished), str(tmp_path / "in"), f"--out={tmp_path / 'in'}"])
    assert own.read_bytes() == b"mine"


def test_an_interrupted_command_keeps_the_earlier_result(finished, photos, tmp_path, monkeypatch):
    command = ["predict", str(finished), str(photos / "b.jpg"), f"--out={tmp_path}"]
    main(command)
    before = read(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict_command, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert read(tmp_path) == before


def test_linked_folders_are_looked_into_and_hidden_ones_are_not(photos, tmp_path):
    """The second link leads back up; `find_images` ends all the same."""
    (tmp_path / "in" / ".thumbnails").mkdir(parents=True)
    shutil.copy(photos / "b.jpg", tmp_path / "in" / ".thumbnails" / "b.jpg")
    shutil.copy(photos / "b.jpg", tmp_path / "in" / "._b.jpg")
    (tmp_path / "in" / "linked").symlink_to(photos / "below")
    (tmp_path / "in" / "up").symlink_to(tmp_path / "in")
    files, others = find_images([str(tmp_path / "in")], [])
    assert ([file.name for file in files], others) == (["linked/a.jpg"], 0)


def test_the_ids_of_links_are_found_by_their_names_or_by_those_of_their_files(finished, data, tmp_path):
    """The first is a store whose files have other names, the second a folder that is linked."""
    val = data / "shapes" / "val"
    (tmp_path / "store").mkdir()
    (tmp_path / "val").mkdir()
    shutil.copy(val / "000002.jpg", tmp_path / "store" / "d41d8c")
    (tmp_path / "val" / "000002.jpg").symlink_to(tmp_path / "store" / "d41d8c")
    (tmp_path / "photos").symlink_to(val)
    annotations = f"--annotations={data}/shapes/val.json"
    photo = tmp_path / "photos" / "000001.jpg"
    main(["predict", str(finished), str(tmp_path / "val"), str(photo), annotations,
          f"--out={tmp_path / 'out'}", "--no-pictures"])  # fmt: skip
    _, document = read(tmp_path / "out")
    known = json.loads((data / "shapes" / "val.json").read_text())["images"]
    id_of = {image["file_name"]: image["id"] for image in known}
    expected = [id_of["val/000002.jpg"], id_of["val/000001.jpg"]]
    assert [image["id"] for image in document["images"]] == expected


def test_two_files_are_not_one_image(tmp_path):
    """The annotation file knows x.jpg, which both a/x.jpg and b/x.jpg may be."""
    document = {"images": [{"id": 7, "file_name": "x.jpg", "height": 5, "width": 5}], "annotations": []}
    (tmp_path / "val.json").write_text(json.dumps(document | {"categories": [{"id": 1, "name": "cat"}]}))
    categories = [Category(id=1, name="cat", frequency="r", image_count=0)]
    files = [ImageFile(tmp_path / name / "x.jpg", f"{name}/x.jpg") for name in ("a", "b")]
    assert find_annotated(tmp_path / "val.json", files[:1], categories)[0].ids() == [7]
    with pytest.raises(ValueError, match=r"b/x\.jpg and .*a/x\.jpg would both be image 7"):
        find_annotated(tmp_path / "val.json", files, categories)


def test_images_of_another_split_in_the_same_folder_are_left_out(finished, data, tmp_path, capsys):
    """But not a file that is named itself, and not all of them."""
    val = json.loads((data / "shapes" / "val.json").read_text())
    (tmp_path / "photos" / "val").mkdir(parents=True)
    for name in ("000001.jpg", "000002.jpg", "000003.jpg"):
        shutil.copy(data / "shapes" / "val" / name, tmp_path / "photos" / "val" / name)
    part = [image for image in val["images"] if image["file_name"] in ("val/000001.jpg", "val/000003.jpg")]
    (tmp_path / "part.json").write_text(json.dumps(val | {"images": part, "annotations": []}))
    options = [f"--annotations={tmp_path / 'part.json'}", f"--out={tmp_path / 'out'}", "--no-pictures"]
    command = ["predict", str(finished), *options]
    main([*command, str(tmp_path / "photos")])
    assert f"left out: 1 image not in {tmp_path}/part.json" in capsys.readouterr().out
    assert [image["id"] for image in read(tmp_path / "out")[1]["images"]] == [each["id"] for each in part]
    named = str(tmp_path / "photos" / "val" / "000002.jpg")
    for sources in ([named], [named, str(tmp_path / "photos")], [str(tmp_path / "photos"), named]):
        with pytest.raises(ValueError, match=r"000002\.jpg: is none of its images"):
            main([*command, *sources])
    others = val | {"images": val["images"][9:], "annotations": []}
    (tmp_path / "part.json").write_text(json.dumps(others))
    with pytest.raises(ValueError, match=r"none of 3 given files is one of its images"):
        main([*command, str(tmp_path / "photos")])


@pytest.mark.parametrize(
    "name", ["ph\\caf\u00e9.jpg", "./ph/caf\u00e9.jpg", "cafe\u0301.jpg", "{tmp}/ph/caf\u00e9.jpg"]
)
@pytest.mark.parametrize("on_disk", ["caf\u00e9.jpg", "cafe\u0301.jpg"])
def test_names_are_understood_as_by_training(tmp_path, name, on_disk):
    image = {"id": 7, "file_name": name.replace("{tmp}", str(tmp_path)), "height": 5, "width": 5}
    document = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "val.json").write_text(json.dumps(document))
    categories = [Category(id=1, name="cat", frequency="r", image_count=0)]
    file = ImageFile(tmp_path / "ph" / on_disk, on_disk)
    assert find_annotated(tmp_path / "val.json", [file], categories)[0].ids() == [7]
    with pytest.raises(ValueError, match=r"x\.jpg: is none of its images"):
        find_annotated(tmp_path / "val.json", [ImageFile(tmp_path / "x.jpg", "x.jpg")], categories)


def test_names_that_are_no_utf8_or_very_long(finished, photos, tmp_path, capsys):
    """Also those of unreadable files: what is said and every file can be written."""
    pytest.importorskip("jinja2")
    try:
        shutil.copy(photos / "b.jpg", os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (tmp_path / (250 * "n" + ".jpg")).write_bytes((photos / "b.jpg").read_bytes())
    with open(os.fsencode(tmp_path) + b"/bad\xe9.jpg", "wb") as file:
        file.write(b"no image")
    main(["predict", str(finished), str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert r"bad\udce9.jpg: not a JPEG" in capsys.readouterr().out
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert 'src="pictures/caf_udce9.jpg"' in page
    _, document = read(tmp_path / "out")
    pictures = [image["picture"] for image in document["images"] if "picture" in image]
    assert [(tmp_path / "out" / picture).is_file() for picture in pictures] == [True, True]


def test_a_place_that_cannot_be_written_is_known_before_the_work(finished, photos, monkeypatch):
    monkeypatch.setattr("clis.commands.predict.predict", None)
    with pytest.raises(OSError, match=r"b\.jpg"):
        main(["predict", str(finished), str(photos), f"--out={photos / 'b.jpg'}", "--no-pictures"])


def test_each_picture_has_a_name_of_its_own():
    files = [ImageFile(path=None, name=name) for name in ("a.png", "a.jpg", "x/a.jpg", "a_2.jpg", "b.tar.gz")]
    assert picture_names(files) == ["a.jpg", "a_2.jpg", "x/a.jpg", "a_2_2.jpg", "b.tar.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}/none.jpg"], "none.jpg: no such file or folder; name images"),
        (["{photos}/*.bmp"], r"bmp: matches no file"),
        (["{tmp}"], "no JPEG, PNG, WebP, GIF, BMP or TIFF file found"),
        (["{photos}/b.jpg", "--classes=dots_rign"], "there is no class 'dots_rign'; did you mean dots_ring"),
        (["{photos}/b.jpg", "--classes=,"], "--classes: name at least one class"),
        (["{photos}/b.jpg", "--score=30"], "--score 30.0: must be between 0 and 1"),
        (["{photos}/b.jpg", "--annotations={data}/shapes/val.json"], r"b.jpg: is none of its images \("),
        (["{photos}/b.jpg", "--annotations={tmp}/gone.json"], "^--annotations .*gone.json: no such file$"),
        (["{photos}/b.jpg", "model.rpn.anchor_scale=2"], "was trained with other settings: model.rpn.anc"),
        (["{photos}/empty.png"], "could not read any of 1 image"),
    ],
)
def test_bad_input_is_one_line(finished, photos, data, tmp_path, arguments, message):
    arguments = [text.format(photos=photos, tmp=tmp_path, data=data) for text in arguments]
    with pytest.raises((ValueError, OSError), match=message):
        main(["predict", str(finished), *arguments, f"--out={tmp_path / 'out'}"])


def test_a_checkpoint_that_is_not_there(tmp_path, photos, capsys):
    with pytest.raises(SystemExit):
        run_command(lambda: main(["predict", str(tmp_path), str(photos)]))
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no checkpoint in this folder")


def test_boxes_are_drawn_where_they_are():
    """A gray image enlarged ten times: the box's color is on its four sides, not inside or outside."""
    picture, scale = picture_of(torch.full((3, 80, 100), 128, dtype=torch.uint8), 1000, 1000)
    assert (picture.size, scale) == ((1000, 800), 10.0)
    draw_marks(picture, [Mark(box=(20, 30, 60, 50), color=(255, 0, 0))], scale)
    pixels = np.asarray(picture)
    for x, y in ((200, 400), (600, 400), (400, 300), (400, 500)):
        assert pixels[y, x].tolist() == [255, 0, 0]
    for x, y in ((400, 400), (180, 400), (400, 520)):
        assert pixels[y, x].tolist() == [128, 128, 128]
    rows, columns = np.nonzero((pixels != 128).any(axis=2))
    assert (rows.min() // 10, columns.min() // 10) == (29, 19)  # with the halo


def test_labels_do_not_hide_each_other_and_stay_inside():
    """Two boxes at the upper edge at one place: one label is below or inside where the other is not."""
    picture, scale = picture_of(torch.full((3, 300, 300), 128, dtype=torch.uint8), 600, 600)
    colors = [(255, 0, 0), (0, 0, 255)]
    marks = [Mark(box=(0, 0, 100, 100), text=name, color=color) for name, color in zip("ab", colors)]
    draw_marks(picture, marks, scale)
    pixels = np.asarray(picture).reshape(-1, 3).tolist()
    areas = [pixels.count(list(color)) for color in colors]
    assert min(areas) > 150  # each label's ground is seen


def test_names_are_drawn_in_a_font_that_has_them(monkeypatch):
    own = font_of(20, "plain_star 0.91")
    dejavu = Path(pytest.importorskip("matplotlib").get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    monkeypatch.setattr("clis.drawing.FONTS", ("none.ttf", str(dejavu)))
    assert font_of(20, "слон").getname() == font_of(20, "éléphant слон").getname() == ("DejaVu Sans", "Book")
    with pytest.warns(UserWarning, match="no font here has all characters of the labels"):
        assert font_of(20, "象") is own


def test_colors_of_classes_are_all_different():
    assert len({class_color(label) for label in range(1203)}) > 1000
    assert len({class_color(label) for label in range(100)}) == 100
