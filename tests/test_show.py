"""`clis show`: what is drawn is what training takes, and what is not there yet is said."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from runs import BASELINE, CONFIG, SHORT

from clis.__main__ import main
from clis.commands import show, show_pictures
from clis.commands.show import draw_classes, measure_boxes, open_streams
from clis.commands.show_pictures import class_rows, draw_image, draw_mosaics
from clis.config_files import load_config
from clis.data.region_file import RegionSource
from clis.data.streams import make_streams
from clis.data.transforms import FILL
from clis.drawing import draw_caption, font_of, shorten, side_by_side
from clis.engine.region_search import find_regions

ALL_PASTED = "data.paste_max_cover=1"
FEW = ["--batch=2", "--limit=2", "--regions=1"]


def overrides(data, *more: str) -> list[str]:
    return [*SHORT, f"data.root={data}", *more]


def seen_of(data, *more: str, config: str = CONFIG):
    return open_streams(load_config(config, overrides(data, *more)), config)


@pytest.fixture
def marks(monkeypatch):
    """What is drawn on every picture, instead of pixels."""
    drawn: list = []
    monkeypatch.setattr(show_pictures, "draw_marks", lambda picture, marks, scale: drawn.append(list(marks)))
    return drawn


def test_the_samples_are_those_of_training(data, finished):
    """Every tensor of the first two steps, with the run's own region file."""
    config = load_config(CONFIG, overrides(data, f"output={finished}"))
    _, dataset, sampler = make_streams(config, finished / "regions.npy")
    seen = open_streams(config, CONFIG)
    assert seen.fill is None
    for step in range(2):
        for item in sampler.items(step):
            ours, theirs = seen.dataset.explain(item).sample, dataset[item]
            for field in dataclasses.fields(theirs):
                a, b = (getattr(sample, field.name) for sample in (ours, theirs))
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
            plan, explained = seen.dataset.plan(item), seen.dataset.explain(item)
            assert torch.equal(plan.regions, explained.plan.regions)  # also without pixels


def test_regions_of_a_rule_without_detector_are_those_of_the_file(data, tmp_path):
    """Found on the way before there is a file, and read from it afterwards."""
    options = ("regions.rule=center", f"output={tmp_path / 'run'}", ALL_PASTED)
    before = seen_of(data, *options)
    items = before.items(8)
    before.fill_items(items)
    find_regions(before.config, torch.device("cpu"), None)
    after = seen_of(data, *options)
    assert (before.fill is None, after.fill is None) == (False, True)
    assert "regions are found here by center" in before.notes[0]
    assert not any("regions" in note for note in after.notes)
    for item in items:
        a, b = (seen.dataset.explain(item).sample for seen in (before, after))
        assert torch.equal(a.regions, b.regions)
        assert torch.equal(a.image, b.image)
        assert len(a.pair_boxes) > 0


def test_mosaics_that_detection_is_trained_on_are_shown_as_mosaics(data, finished):
    options = ("clis.t=0", "clis.contrastive=false", f"output={finished}")
    as_regions, as_images = seen_of(data, *options), seen_of(data, *options, "clis.detect_mosaics=true")
    for item in as_images.items(2):
        a, b = (seen.dataset.explain(item).sample for seen in (as_regions, as_images))
        assert torch.equal(a.mosaics, b.mosaics)
        assert torch.equal(a.regions, b.regions)
    assert not any("detection is trained on the mosaics" in note for note in as_regions.notes)
    assert sum("detection is trained on the mosaics" in note for note in as_images.notes) == 1


def test_a_teachers_boxes_are_said_to_be_found_in_training(data, finished):
    options = ("clis.t=0", "clis.contrastive=false", "regions.rule=full", "start.from=unread.pt")
    seen = seen_of(data, *options, "teacher.momentum=1", f"output={finished / 'none'}")
    assert sum("a teacher finds boxes in the mosaics in training" in note for note in seen.notes) == 1


def test_without_regions_mosaics_are_the_same_and_nothing_is_pasted(data, finished, tmp_path):
    """The file is not needed for scale, flip, place and cutout of an image."""
    without, with_them = seen_of(data, f"output={tmp_path}"), seen_of(data, f"output={finished}")
    assert f"{tmp_path}/regions.npy does not exist yet" in without.notes[0]
    assert f"`python -m clis regions {CONFIG}` makes it" in without.notes[0]
    items = without.items(4)
    without.fill_items(items)
    for item in items:
        a, b = (seen.dataset.explain(item).sample for seen in (without, with_them))
        assert torch.equal(a.mosaics, b.mosaics)
        assert (len(a.pair_boxes), len(b.pair_boxes) > 0) == (0, True)
    assert draw_classes(without, tmp_path, 1, 5, None) == []
    assert list(tmp_path.iterdir()) == []


def test_a_pair_has_one_number_in_both_pictures(data, finished, marks):
    seen = seen_of(data, f"output={finished}", ALL_PASTED)
    (item,) = seen.items(1)
    explained = seen.dataset.explain(item)
    draw_image(explained, seen.streams)
    draw_mosaics(explained, seen.streams)
    image, mosaic = marks
    sample, names = explained.sample, [category.name for category in seen.streams.categories]
    assert len(sample.pair_boxes) == 2
    num_truths = len(sample.boxes) - 2
    assert sum(not mark.dashed for mark in image) == num_truths
    for number in range(2):
        region = int(sample.pair_regions[number])
        name = names[int(sample.region_labels[region])]
        (pasted,) = [mark for mark in image if mark.text == f"pair {number + 1}: {name} (pasted)"]
        (original,) = [mark for mark in mosaic if mark.text.startswith(f"pair {number + 1}: {name} ")]
        assert list(pasted.box) == sample.pair_boxes[number].tolist()
        assert list(original.box) == sample.regions[region].tolist()
        assert pasted.dashed
        assert original.dashed
        assert pasted.color == original.color


def test_cutouts_are_drawn_around_gray_pixels(data, finished, marks):
    seen = seen_of(data, f"output={finished}")
    cutouts = 0
    for item in seen.items(8):
        explained = seen.dataset.explain(item)
        marks.clear()
        draw_mosaics(explained, seen.streams)
        (drawn,) = marks
        for mark in drawn:
            if mark.text == "cutout":
                x1, y1, x2, y2 = map(int, mark.box)
                assert (explained.sample.mosaics[0, :, y1:y2, x1:x2] == FILL).all()
                cutouts += 1
    assert cutouts > 4


def test_left_out_regions_and_fallbacks_say_so(data, finished, marks):
    """With min_region at the tile's side none is kept; one row is made a fallback by hand."""
    seen = seen_of(data, f"output={finished}", "data.min_region=32", "data.mosaic_scale=[0.5,0.9]")
    (item,) = seen.items(1)
    explained = seen.dataset.explain(item)
    row = int(explained.source_rows[0])
    regions = np.array(seen.streams.regions)
    regions["source"][row] = RegionSource.FALLBACK
    regions["score"][row] = 0.25
    draw_mosaics(explained, dataclasses.replace(seen.streams, regions=regions))
    texts = [mark.text for mark in marks[0] if mark.text != "cutout"]
    assert len(texts) == 4
    assert all(text.endswith("too small, left out") for text in texts)
    assert "0.25 (fallback)" in texts[0]


def test_rows_of_a_class_are_its_lowest_highest_and_some_between():
    """Scores 0.0, 0.1 ... 0.9 of rows 9 ... 0: the lowest two are rows 9 and 8, the highest 1 and 0."""
    own, scores = np.arange(10)[::-1], np.arange(10) / 10
    rows = class_rows(own, scores, 2, np.random.default_rng(0))
    assert rows["lowest"] == [9, 8]
    assert rows["highest"] == [1, 0]
    assert len(set(rows["random"])) == 2
    assert set(rows["random"]) <= set(range(2, 8))


@pytest.mark.parametrize("images", range(1, 12))
def test_no_image_of_a_class_is_drawn_twice_and_a_small_one_is_drawn_whole(images):
    rows = class_rows(np.arange(images), np.zeros(images), 3, np.random.default_rng(0))
    drawn = [row for kind in rows.values() for row in kind]
    assert len(drawn) == len(set(drawn)) == min(images, 9)


def test_sizes_are_square_roots_of_areas_as_the_network_sees_them(data, finished, monkeypatch):
    """Of the first image, 48 x 48 in the file and at training's only scale, so of the file's own boxes."""
    monkeypatch.setattr(show, "SIZED", 1)
    seen = seen_of(data, f"output={finished}", ALL_PASTED)
    (item,) = seen.items(1)
    sides, dropped = measure_boxes(seen)
    boxes = seen.annotations.boxes_of(item.instance)
    expected = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    np.testing.assert_allclose(sides["objects"], expected, rtol=1e-5)
    assert len(sides["pasted"]) == 2
    assert len(sides["regions in mosaics"]) == round(4 * (1 - dropped))


def test_a_shipped_name_has_a_folder_of_its_own(data, tmp_path, monkeypatch):
    """Both sets have a config called baseline."""
    monkeypatch.chdir(tmp_path)
    main(["show", "shapes/baseline", *overrides(data), *FEW])
    assert (tmp_path / "runs" / "show" / "shapes" / "baseline" / "step_1_image_1.png").exists()


def test_the_command_writes_pictures_and_a_page(data, finished, tmp_path, capsys):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    main(["show", CONFIG, *overrides(data, f"output={finished}"), f"--out={tmp_path}", *FEW])
    page = (tmp_path / "index.html").read_text()
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert len(pictures) == 2 + 2 + 2 + 2  # images, mosaics, classes, charts
    assert all(f'src="{name}"' in page for name in pictures)
    assert "2 of 50 classes" in page
    assert "index.html, with 8 pictures" in capsys.readouterr().out


def test_a_baseline_has_one_stream(data, tmp_path):
    pytest.importorskip("jinja2")
    main(["show", BASELINE, *overrides(data, f"output={tmp_path / 'run'}"), f"--out={tmp_path}", *FEW])
    page = (tmp_path / "index.html").read_text()
    assert "Dashed boxes" not in page
    assert "Coverage" not in page
    assert not (tmp_path / "run").exists()


def test_without_the_extra_the_pictures_are_written(data, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "clis.commands.show_charts", raising=False)
    monkeypatch.delattr("clis.commands.show_charts", raising=False)
    main(["show", CONFIG, *overrides(data, f"output={finished}"), f"--out={tmp_path}", *FEW])
    said = capsys.readouterr().out
    assert 'charts need matplotlib: pip install -e ".[report]"' in said
    assert 'no index.html: pages need Jinja2: pip install -e ".[report]"; the pictures are in' in said
    assert len(list(tmp_path.iterdir())) == 6


def test_classes_can_be_named(data, finished, tmp_path):
    name = seen_of(data, f"output={finished}").streams.categories[7].name
    arguments = ["show", CONFIG, *overrides(data, f"output={finished}"), f"--out={tmp_path}", *FEW]
    main([*arguments, f"--classes={name}"])
    assert [path.name for path in tmp_path.glob("class_*")] == ["class_0008.png"]
    with pytest.raises(ValueError, match=f"there is no class '{name}x'; did you mean {name}"):
        main([*arguments, f"--classes={name}x"])


def test_captions_and_rows_of_pictures():
    """Text longer than its picture ends in dots; pictures 10 and 20 wide with a gap of 5 are 35 wide."""
    font = font_of(20)
    assert shorten("region", font, 1000) == "region"
    short = shorten("region of a long name", font, 80)
    assert short.endswith("...")
    assert font.getlength(short) <= 80
    red, blue = Image.new("RGB", (10, 8), (255, 0, 0)), Image.new("RGB", (20, 16), (0, 0, 255))
    joined = np.asarray(side_by_side([red, blue], gap=5))
    assert joined.shape == (16, 35, 3)
    assert joined[7, 9].tolist() == [255, 0, 0]
    assert joined[8, 9].tolist() == joined[0, 12].tolist() == [255, 255, 255]
    assert joined[15, 34].tolist() == [0, 0, 255]
    captioned = np.asarray(draw_caption(Image.new("RGB", (99, 16), (0, 0, 255)), "one\ntwo", 14, lines=2))
    assert (captioned[:16] == [0, 0, 255]).all()
    rows = np.flatnonzero((captioned[16:] < 128).any(axis=(1, 2)))
    assert (np.diff(rows) > 1).sum() == 1  # two lines of text with white between them
