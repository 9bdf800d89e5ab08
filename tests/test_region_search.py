"""Pre-defined regions: what each rule writes, what an interruption leaves, and shares of processes."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_config
from runs import CONFIG, SHORT, spawn
from torch import Tensor
from torchvision.io import write_jpeg, write_png

from clis.__main__ import main
from clis.commands import region_scan
from clis.config import Config, RegionsConfig
from clis.data import loader
from clis.data.categories import Category
from clis.data.image_level import ImageLevelIndex, build_index
from clis.data.images import ImageError
from clis.data.region_file import REGION_DTYPE, RegionSource, load_regions, mean_scores
from clis.engine import region_search
from clis.engine.region_parts import PART_DTYPE, RegionParts
from clis.engine.region_search import center_box, image_key, make_regions, read_boxes
from clis.models import ImageDetections
from clis.resize import resize_image, shortest_size

CATEGORIES = [
    Category(id=id_, name=name, frequency="r", image_count=1)
    for id_, name in enumerate(("bird", "cat", "dog"))
]
CLASSES = ("cat", "bird", "dog", "cat", "bird", "dog", "cat")
NUM_IMAGES = 3 * len(CLASSES)
RANK_FIRST = "category-rank-first"


def write_images(root: Path) -> Path:
    """Images of height 20 + n and width 30 + 2n, in which every pixel is n, their number."""
    for number in range(NUM_IMAGES):
        path = root / CLASSES[number % len(CLASSES)] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = torch.full((3, 20 + number, 30 + 2 * number), number, dtype=torch.uint8)
        write_png(image, str(path))
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def index(root) -> ImageLevelIndex:
    return build_index([root], CATEGORIES)


def numbers_of(index: ImageLevelIndex) -> list[int]:
    """The number that is written in each image, by row; not the row, since rows are sorted by class."""
    return [int(Path(index.name(row)).stem) for row in range(len(index))]


def config_of(*overrides: str) -> Config:
    """At 16 pixels all images have one padded size, so that they keep their order."""
    return tiny_config(
        "data.workers=0", "regions.images_per_batch=4", "regions.detector=some.pt", "regions.short_side=16",
        "regions.max_size=32", *overrides
    )  # fmt: skip


def box_of(number: int) -> list[float]:
    return [number / 4, 1.0, number / 4 + 5, 7.5]


class Detector:
    """Finds `box_of` the number in the pixels, with a score that tells number and label; resizes nothing."""

    test_config = Config().test

    def __init__(self, broken: dict[int, list[float]] | None = None, interrupt_after: int | None = None):
        self.broken = broken or {}
        self.interrupt_after = interrupt_after
        self.asked: list[tuple[int, int]] = []
        self.batches = 0

    def resized_size(self, size: tuple[int, int], short_side: int, max_size: int) -> tuple[int, int]:
        return size

    def resize(self, image: Tensor, size: tuple[int, int], extent: None) -> Tensor:
        return image

    def rank_first(self, images: list[Tensor], labels: Tensor, max_size: int) -> list[tuple[Tensor, Tensor]]:
        if self.batches == self.interrupt_after:
            raise KeyboardInterrupt
        self.batches += 1
        assert len(images) == len(labels) <= 4
        found = []
        for image, label in zip(images, labels.tolist()):
            number = int(image[0, 0, 0])
            self.asked.append((number, label))
            box = torch.tensor(self.broken.get(number, box_of(number)))
            found.append((box, torch.tensor((8 * label + number) / 64)))
        return found


class OrderedDetector(Detector):
    """Finds two boxes, best first, or none in images with an odd number."""

    def detect_resized(self, images: list[Tensor], max_size: int) -> list[ImageDetections]:
        found = []
        for image in images:
            number = int(image[0, 0, 0])
            boxes = torch.tensor([box_of(number), [0.0, 0.0, 20.0, 20.0]])[: 0 if number % 2 else 2]
            found.append(
                ImageDetections(
                    boxes, torch.tensor([0.5, 0.25])[: len(boxes)], torch.zeros(len(boxes)).long()
                )
            )
        return found


def counts_of(path: Path) -> dict[str, int]:
    return json.loads(path.with_suffix(".json").read_text())["counts"]


class TestRules:
    def test_category_rank_first_asks_for_each_images_own_label(self, index, tmp_path):
        path, detector = tmp_path / "run" / "regions.npy", Detector()
        make_regions(config_of(), index, detector, path, detector_steps=7)
        numbers = numbers_of(index)
        names = [CLASSES[number % len(CLASSES)] for number in numbers]
        labels = [[category.name for category in CATEGORIES].index(name) for name in names]
        assert detector.asked == list(zip(numbers, labels))
        table = load_regions(path, index, config_of().regions)
        assert table["box"].tolist() == [box_of(number) for number in numbers]
        assert table["score"].tolist() == [(8 * label + n) / 64 for label, n in zip(labels, numbers)]
        assert (table["source"] == RegionSource.RULE).all()
        note = json.loads(path.with_suffix(".json").read_text())
        assert note == {
            "index": index.digest,
            "images": NUM_IMAGES,
            "rule": RANK_FIRST,
            "short_side": [16],
            "max_size": 32,
            "detector": "some.pt",
            "detector_steps": 7,
            "counts": {"rule": NUM_IMAGES},
        }
        assert sorted(p.name for p in path.parent.iterdir()) == ["regions.json", "regions.npy"]

    @pytest.mark.parametrize(
        "broken", [[math.nan] * 4, [3.0, 2.0, 3.0, 9.0], [3.0, 9.0, 8.0, 9.0], [8.0, 2.0, 3.0, 9.0]]
    )
    def test_a_box_without_area_becomes_the_center_box(self, index, tmp_path, broken):
        """NaN is what `rank_first` gives without an RoI; then no width, no height, corners the other way."""
        path = tmp_path / "regions.npy"
        make_regions(config_of(), index, Detector(broken={5: broken, 20: broken}), path)
        table, numbers = load_regions(path, index, config_of().regions), numbers_of(index)
        for row, number in enumerate(numbers):
            if number in (5, 20):
                height, width = 20 + number, 30 + 2 * number
                half = math.sqrt(0.5) / 2  # sides of sqrt(1/2): half the area
                expected = [s * (0.5 + sign * half) for sign in (-1, 1) for s in (width, height)]
                assert table["box"][row].tolist() == pytest.approx(expected, rel=1e-6)
                assert (table["score"][row], table["source"][row]) == (0, RegionSource.FALLBACK)
            else:
                assert table["box"][row].tolist() == box_of(number)
        assert counts_of(path) == {"rule": NUM_IMAGES - 2, "fallback": 2}

    def test_top_score_takes_the_first_detection_of_any_class(self, index, tmp_path):
        path = tmp_path / "regions.npy"
        make_regions(config_of("regions.rule=top-score"), index, OrderedDetector(), path)
        table = load_regions(path, index, config_of("regions.rule=top-score").regions)
        for row, number in enumerate(numbers_of(index)):
            if number % 2:
                assert (table["score"][row], table["source"][row]) == (0, RegionSource.FALLBACK)
            else:
                assert table["box"][row].tolist() == box_of(number)
                assert (table["score"][row], table["source"][row]) == (0.5, RegionSource.RULE)
        assert counts_of(path) == {"rule": 11, "fallback": 10}

    @pytest.mark.parametrize(
        ("asked", "rule"), [("center", "center"), ("full", "full"), ("max-size", "full")]
    )
    def test_rules_without_a_detector(self, index, tmp_path, asked, rule):
        path = tmp_path / "regions.npy"
        without_pasting = ("clis.t=0", "clis.contrastive=false")
        make_regions(config_of(f"regions.rule={asked}", *without_pasting), index, None, path)
        table = load_regions(path, index, RegionsConfig(rule=rule))
        row = numbers_of(index).index(10)  # 30 high, 50 wide
        # 50 * (0.5 -+ 0.353553), 30 * (0.5 -+ 0.353553)
        expected = {"center": [7.32233, 4.39340, 42.67767, 25.60660], "full": [0, 0, 50, 30]}[rule]
        assert table["box"][row].tolist() == pytest.approx(expected, abs=1e-4)
        assert (table["score"] == 1).all()
        note = json.loads(path.with_suffix(".json").read_text())
        # a detector that the rule did not ask has no part in the file
        assert (note["rule"], note["detector"], note["counts"]) == (rule, None, {"rule": NUM_IMAGES})

    def test_given_boxes_are_looked_up_by_name_and_clipped(self, index, tmp_path):
        """Of image 4 none is given, that of 5 lies outside, and image 6 (26 x 42) is smaller than its box."""
        boxes = {index.name(row): box_of(number) for row, number in enumerate(numbers_of(index))}
        del boxes["bird/04.png"]
        boxes |= {"dog/05.png": [100, 100, 120, 130], "cat/06.png": [2, -3, 99, 20]}
        (tmp_path / "boxes.json").write_text(json.dumps(boxes))
        given = ["regions.rule=given", f"regions.boxes={tmp_path}/boxes.json"]
        make_regions(config_of(*given), index, None, tmp_path / "regions.npy")
        table = load_regions(tmp_path / "regions.npy", index, RegionsConfig(rule="given"))
        for row, number in enumerate(numbers_of(index)):
            if number in (4, 5):
                assert (table["score"][row], table["source"][row]) == (0, RegionSource.FALLBACK)
            else:
                assert table["source"][row] == RegionSource.RULE
                expected = [2, 0, 42, 20] if number == 6 else box_of(number)
                assert table["box"][row].tolist() == expected

    def test_names_of_boxes_in_another_form_are_found(self, index, tmp_path):
        """As a program on Windows or macOS writes them: backslashes, decomposed accents."""
        assert image_key("cafe\u0301\\1.jpg") == image_key("caf\u00e9/1.jpg") == "caf\u00e9/1.jpg"
        boxes = {index.name(row).replace("/", "\\"): [1, 2, 8, 9] for row in range(len(index))}
        (tmp_path / "boxes.json").write_text(json.dumps(boxes))
        given = ["regions.rule=given", f"regions.boxes={tmp_path}/boxes.json"]
        make_regions(config_of(*given), index, None, tmp_path / "regions.npy")
        table = load_regions(tmp_path / "regions.npy", index, RegionsConfig(rule="given"))
        assert (table["box"] == [1, 2, 8, 9]).all()

    @pytest.mark.parametrize("name", ["a\u200cb.png", "a\u3000b.png", "a\u00a0b.png"])
    def test_names_that_terminals_do_not_print(self, root, tmp_path, name):
        """A zero-width non-joiner, as in Persian, and wide spaces: escaped in messages, not in the file."""
        (root / "cat" / "00.png").rename(root / "cat" / name)
        index = build_index([root], CATEGORIES)
        (tmp_path / "boxes.json").write_text(json.dumps({f"cat/{name}": [1, 2, 8, 9]}))
        boxes = read_boxes(tmp_path / "boxes.json", index)
        assert [image_key(index.location(row)) in boxes for row in range(len(index))].count(True) == 1

    def test_a_name_of_images_in_two_roots(self, root, tmp_path):
        (tmp_path / "other").mkdir()
        shutil.copytree(root / "cat", tmp_path / "other" / "cat")
        index = build_index([root, tmp_path / "other"], CATEGORIES)
        (tmp_path / "boxes.json").write_text('{"cat/00.png": [1, 2, 8, 9]}')
        with pytest.raises(ValueError, match=r"2 images of data\.image_level are called cat/00\.png"):
            read_boxes(tmp_path / "boxes.json", index)

    def test_boxes_of_another_file_do_not_go_on_with_a_partial_one(self, index, tmp_path, monkeypatch):
        """Interrupted after 8 of 21 images, the file edited: all regions are of the new boxes."""
        path, given = tmp_path / "boxes.json", ["regions.rule=given", f"regions.boxes={tmp_path}/boxes.json"]
        names = [index.name(row) for row in range(len(index))]
        path.write_text(json.dumps({name: [1, 1, 9, 9] for name in names}))
        find, calls = region_search.regions_of, []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return find(*arguments)

        monkeypatch.setattr(region_search, "regions_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_regions(config_of(*given), index, None, tmp_path / "regions.npy")
        path.write_text(json.dumps({name: [2, 2, 8, 8] for name in names}))
        make_regions(config_of(*given), index, None, tmp_path / "regions.npy")
        table = load_regions(tmp_path / "regions.npy", index, RegionsConfig(rule="given"))
        assert (table["box"] == [2, 2, 8, 8]).all()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, r"boxes\.json: no such file of boxes"),
            ("{", r"boxes\.json: not valid JSON"),
            ("[]", r"boxes\.json: \{image: .*\} is needed, not a list"),
            ('{"cat/00.png": [1, 2, 3]}', r"cat/00\.png: \[x1, y1, x2, y2\] is needed, not \[1, 2, 3\]"),
            ('{"cat/00.png": "all"}', r"cat/00\.png: .* is needed, not 'all'"),
            ('{"cat/00.png": [3, 4, 3, 9]}', r"cat/00\.png: the box \[3, 4, 3, 9\] has no area"),
            ('{"cat/00.png": [1, 2, 3, 4], "cat\\\\00.png": [1, 2, 3, 4]}', "is there twice, in two forms"),
            (
                '{"00.png": [3, 4, 5, 9]}',
                r"no box of data\.image_level's images; .* called e\.g\. bird/",
            ),
        ],
    )
    def test_wrong_files_of_given_boxes(self, index, tmp_path, text, message):
        if text is not None:
            (tmp_path / "boxes.json").write_text(text)
        config = config_of("regions.rule=given", f"regions.boxes={tmp_path}/boxes.json")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make_regions(config, index, None, tmp_path / "regions.npy")

    def test_center_box_has_half_the_area_and_the_images_proportions(self):
        x1, y1, x2, y2 = center_box((30, 80)).tolist()
        assert (x2 - x1) * (y2 - y1) == pytest.approx(30 * 80 / 2, rel=1e-6)
        assert (x2 - x1) / (y2 - y1) == pytest.approx(80 / 30, rel=1e-6)
        assert (x1 + x2, y1 + y2) == pytest.approx((80, 30))


class TestInterruption:
    @pytest.mark.parametrize("batches", [0, 1, 5])
    def test_a_second_run_asks_only_for_the_rest(self, index, tmp_path, batches):
        """21 images in batches of 4: after 5 of them one is left."""
        whole, path = tmp_path / "whole" / "regions.npy", tmp_path / "cut" / "regions.npy"
        make_regions(config_of(), index, Detector(), whole)
        first, second = Detector(interrupt_after=batches), Detector()
        with pytest.raises(KeyboardInterrupt):
            make_regions(config_of(), index, first, path)
        assert len(first.asked) == 4 * batches
        assert not path.exists()
        make_regions(config_of(), index, second, path)
        assert [number for number, _ in first.asked + second.asked] == numbers_of(index)
        for suffix in (".npy", ".json"):
            assert path.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
        assert len(list(path.parent.iterdir())) == 2

    @pytest.mark.parametrize("change", ["rule", "detector", "images", "sizes"])
    def test_what_another_rule_began_is_made_anew(self, index, root, tmp_path, change):
        path = tmp_path / "regions.npy"
        with pytest.raises(KeyboardInterrupt):
            make_regions(config_of(), index, Detector(interrupt_after=2), path)
        if change == "rule":
            make_regions(config_of("regions.rule=full"), index, None, path)
            assert load_regions(path, index, RegionsConfig(rule="full"))["box"][:, :2].max() == 0
            return
        if change == "images":
            (root / "bird" / "01.png").unlink()
            index = build_index([root], CATEGORIES)
        detector = Detector()
        other = {"detector": ["regions.detector=other.pt"], "sizes": ["regions.short_side=20"]}
        config = config_of(*other.get(change, []))
        make_regions(config, index, detector, path)
        assert [number for number, _ in detector.asked] == numbers_of(index)
        assert len(load_regions(path, index, config.regions)) == len(index)
        if change == "sizes":
            with pytest.raises(ValueError, match=r"regions\.short_side=\[20\], this run has \[400\]"):
                load_regions(path, index, RegionsConfig())


class TestBadInput:
    @pytest.fixture
    def damaged(self, root) -> ImageLevelIndex:
        """Images 1 (bird) and 9 (dog) are cut off."""
        for name in ("bird/01.png", "dog/09.png"):
            (root / name).write_bytes((root / name).read_bytes()[:50])
        return build_index([root], CATEGORIES)

    def test_an_unreadable_image_stops_the_run_by_name(self, damaged, tmp_path):
        path = tmp_path / "regions.npy"
        with pytest.raises(
            ImageError, match=r"unreadable image-level images: 1, .*max_bad_images allows 0.*bird/01\.png"
        ):
            make_regions(config_of(), damaged, Detector(), path)
        with pytest.raises(
            ImageError, match=r"unreadable image-level images: 2, .*max_bad_images allows 1.*dog/09\.png"
        ):
            make_regions(config_of("data.max_bad_images=1"), damaged, Detector(), path)
        assert not path.exists()

    def test_or_is_marked_and_left_out(self, damaged, tmp_path):
        path, detector = tmp_path / "regions.npy", Detector()
        make_regions(config_of("data.max_bad_images=2"), damaged, detector, path)
        table = load_regions(path, damaged, config_of().regions)
        for row, number in enumerate(numbers_of(damaged)):
            if number in (1, 9):
                assert table["source"][row] == RegionSource.UNREADABLE
                assert table["box"][row].tolist() == [0, 0, 0, 0]
            else:  # the others of its batch still have their own boxes
                assert table["box"][row].tolist() == box_of(number)
        assert counts_of(path) == {"rule": NUM_IMAGES - 2, "unreadable": 2}
        assert not {1, 9} & {number for number, _ in detector.asked}

    def test_a_batch_of_unreadable_images_asks_nothing(self, root, tmp_path):
        for path in (root / "bird").iterdir():
            path.write_bytes(b"not an image")
        index = build_index([root], CATEGORIES)
        path = tmp_path / "regions.npy"
        make_regions(config_of("data.max_bad_images=6"), index, Detector(), path)
        assert counts_of(path) == {"rule": NUM_IMAGES - 6, "unreadable": 6}

    def test_a_file_of_other_images_is_refused(self, index, root, tmp_path):
        path = tmp_path / "regions.npy"
        make_regions(config_of(), index, Detector(), path)
        (root / "cat" / "00.png").rename(root / "cat" / "99.png")
        renamed = build_index([root], CATEGORIES)
        assert len(renamed) == len(index)
        with pytest.raises(ValueError, match=r"regions\.npy: made for other image-level images than the 21"):
            load_regions(path, renamed, config_of().regions)


class Resizing(Detector):
    """Really resizes; finds the whole image, with a score that is highest at a short side of 64."""

    def __init__(self):
        super().__init__()
        self.batches: list[list[tuple[int, ...]]] = []
        self.sides = []

    def resized_size(self, size: tuple[int, int], short_side: int, max_size: int) -> tuple[int, int]:
        return shortest_size(size, short_side, max_size)

    def resize(self, image: Tensor, size: tuple[int, int], extent: tuple[float, float] | None) -> Tensor:
        return resize_image(image, size, extent)

    def rank_first(self, images: list[Tensor], labels: Tensor, max_size: int) -> list[tuple[Tensor, Tensor]]:
        self.batches.append([tuple(image.shape[1:]) for image in images])
        self.sides.append(max_size)
        found = []
        for image in images:
            height, width = image.shape[1:]
            near = -abs(min(height, width) - 64.0)
            # at the best size the left half, in its pixels
            box = [0.0, 0, width / 2, height] if near == 0 else [0.0, 0, width, height]
            found.append((torch.tensor(box), torch.tensor(near)))
        return found


class TestSizes:
    def photographs(self, folder: Path) -> ImageLevelIndex:
        """Eight JPEGs, half of them upright."""
        for number in range(8):
            path = folder / "cat" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (300, 400) if number % 2 else (400, 300)
            write_jpeg(torch.full((3, *size), 30 * number, dtype=torch.uint8), str(path))
        return build_index([folder], CATEGORIES)

    def test_the_best_score_over_the_sizes_counts_in_stored_pixels(self, tmp_path):
        index, detector = self.photographs(tmp_path / "images"), Resizing()
        config = config_of("regions.short_side=[32,64,96]", "regions.max_size=144")
        make_regions(config, index, detector, tmp_path / "regions.npy")
        table = load_regions(tmp_path / "regions.npy", index, config.regions)
        for row in range(8):
            height, width = (300, 400) if int(Path(index.name(row)).stem) % 2 else (400, 300)
            # 64 px of a reduced decoding: exact to a pixel of it
            assert table["box"][row].tolist() == pytest.approx([0, 0, width / 2, height], rel=0.01)
            assert table["score"][row] == 0
        assert set(detector.sides) == {144, 96, 48}  # the limit of the longer side goes with the size

    def test_waiting_images_are_few(self):
        """60 shapes in turn, batches of 4: few images wait, and every image comes once."""
        given = ((list(range(i, i + 4)), [each % 60 for each in range(i, i + 4)]) for i in range(0, 600, 4))
        taken, most, done = [], 0, []

        def counted():
            for rows, images in given:
                taken.extend(rows)
                yield rows, images

        for rows, images in loader.batches_by_shape(counted(), 4, lambda image: image):
            assert len(set(images)) == 1
            assert [row % 60 for row in rows] == images
            done += rows
            most = max(most, len(taken) - len(done))
        assert sorted(done) == list(range(600))
        assert most <= 4 * loader.MOST_WAITING + 4

    @pytest.mark.parametrize(
        ("resize", "whole"), [("pillow", False), ("opencv", True), ("torchvision", True)]
    )
    def test_only_antialiasing_sees_reduced_images(self, tmp_path, resize, whole):
        index = self.photographs(tmp_path / "images")
        detector = make_model(f"test.resize={resize}")
        image = region_search.image_reader(config_of(), index, detector)(0)
        assert (tuple(image.pixels.shape[1:]) == image.size) is whole

    def test_batches_are_of_one_shape(self, tmp_path):
        index, detector = self.photographs(tmp_path / "images"), Resizing()
        config = config_of("regions.short_side=96", "regions.max_size=144")
        make_regions(config, index, detector, tmp_path / "regions.npy")
        assert sorted(map(tuple, detector.batches)) == [((96, 128),) * 4, ((128, 96),) * 4]


class TestScan:
    @pytest.fixture
    def scanned(self, tmp_path, monkeypatch):
        """Scan eight photographs with the detector that likes a short side of 64."""
        index = TestSizes().photographs(tmp_path / "images")
        names = {"make_index": index, "read_annotations": None, "load_searcher": Resizing()}
        for name, value in names.items():
            monkeypatch.setattr(region_scan, name, lambda *_, value=value: value)

        def scan(*overrides: str, **options) -> None:
            region_scan.scan_sizes(config_of(*overrides), torch.device("cpu"), **options)

        return scan

    def test_the_size_of_the_highest_score_is_named(self, scanned, tmp_path, capsys):
        """The truth is the left half, which the detector finds at 64; elsewhere it finds the whole."""
        boxes = {f"cat/{n}.jpg": [0, 0, 200, 300] if n % 2 else [0, 0, 150, 400] for n in range(8)}
        (tmp_path / "boxes.json").write_text(json.dumps(boxes))
        scanned(sizes=[96, 64, 40], images=4, boxes=tmp_path / "boxes.json")
        said = capsys.readouterr().out
        assert "4 of 8 images" in said
        rows = [
            line.split("|")[1:-1]
            for line in said.splitlines()
            if line.startswith("| ") and "short" not in line
        ]
        figures = [[float(cell) for cell in row] for row in rows]
        # 16 of the config's pixels to 32 at most: the limit of the longer side goes with the size
        assert [row[:3] for row in figures] == [[40, 80, -24], [64, 128, 0], [96, 192, -32]]
        assert [row[4] for row in figures] == [0.5, pytest.approx(1, abs=0.02), 0.5]
        assert "highest with regions.short_side=64 regions.max_size=128" in said

    def test_without_sizes_fractions_of_the_tests_are_tried(self, scanned, capsys):
        scanned("test.short_side=128", "test.max_size=256")
        said = capsys.readouterr().out
        assert [f"| {size} " in said for size in (32, 48, 64, 80, 96, 128, 160)] == [True] * 7
        assert "IoU" not in said

    def test_what_cannot_be_scanned(self, scanned):
        with pytest.raises(ValueError, match=r"regions\.rule=full needs no detector"):
            scanned("regions.rule=full")
        with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such file of boxes"):
            scanned(boxes=Path("nowhere.json"))

    def test_boxes_of_other_images_than_those_looked_at(self, scanned, tmp_path):
        (tmp_path / "boxes.json").write_text(json.dumps({"cat/3.jpg": [0, 0, 9, 9]}))
        with pytest.raises(ValueError, match=r"no box of the 2 images that are looked at; raise --images"):
            scanned(images=2, boxes=tmp_path / "boxes.json")

    def test_a_miss_counts_as_the_center_box_that_the_search_would_give(
        self, scanned, tmp_path, monkeypatch, capsys
    ):
        """No size finds anything; the center box has half of the image's area."""

        def nothing(self, images, labels, max_size):
            return [(torch.full((4,), math.nan), torch.tensor(0.0)) for _ in images]

        monkeypatch.setattr(Resizing, "rank_first", nothing)
        (tmp_path / "boxes.json").write_text(json.dumps({"cat/0.jpg": [0, 0, 300, 400]}))
        scanned(sizes=[64], boxes=tmp_path / "boxes.json")
        row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("| 64 "))
        assert (row[1:6:2], row[9]) == (["64", "128", "0.0000"], "0.500")

    def test_images_that_cannot_be_read_are_left_out(self, scanned, tmp_path, capsys):
        """At 64 the score is 0, elsewhere below: an image that counted as 0 would raise the mean of -32."""
        (tmp_path / "images" / "cat" / "0.jpg").write_bytes(b"no image")
        with pytest.raises(
            ImageError, match=r"unreadable image-level images: 1, and data.max_bad_images allows 0"
        ):
            scanned(sizes=[64, 96])
        capsys.readouterr()
        boxes = {f"cat/{n}.jpg": [0, 0, 200, 300] if n % 2 else [0, 0, 150, 400] for n in range(8)}
        (tmp_path / "boxes.json").write_text(json.dumps(boxes))
        scanned("data.max_bad_images=1", sizes=[64, 96], boxes=tmp_path / "boxes.json")
        said = capsys.readouterr().out
        assert said.count("left out: cat/0.jpg: ") == 1
        rows = [line.split() for line in said.splitlines() if line.startswith(("| 64 ", "| 96 "))]
        assert [row[5] for row in rows] == ["0.0000", "-32.0000"]
        assert float(rows[1][9]) == 0.5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--scan", "64,x"], "'x' is not a size"),
            (["--scan", "0"], "'0' is not a size"),
            (["--images", "7"], "--images is for a scan: add --scan"),
            (["--boxes", "a.json"], "--boxes is for a scan: add --scan"),
        ],
    )
    def test_the_command_line_at_fault(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            main(["regions", CONFIG, *arguments])

    def test_the_command(self, finished, data, capsys):
        detector = f"regions.detector={finished}/detector"
        main(["regions", CONFIG, *SHORT, f"data.root={data}", detector, "--scan", "24,48", "--images", "10"])
        assert "10 of 100 images" in (said := capsys.readouterr().out)
        assert "| 24 " in said
        assert "| 48 " in said


def test_mean_scores_leave_out_what_the_rule_did_not_give():
    """Class 0: (.2 + .6) / 2 without its fallback; class 1 has a fallback alone, class 2 nothing."""
    regions = np.zeros(4, REGION_DTYPE)
    regions["score"] = [0.2, 0, 0.6, 0]
    regions["source"] = [RegionSource.RULE, RegionSource.FALLBACK, RegionSource.RULE, RegionSource.FALLBACK]
    means, counts = mean_scores(np.array([0, 0, 0, 1]), regions, 3)
    np.testing.assert_allclose(means, [0.4, -1, -1], rtol=1e-6)
    assert counts.tolist() == [2, 0, 0]


def test_a_search_that_two_processes_began_is_finished_by_one(index, tmp_path):
    """Rows of both are kept; nothing is asked again."""
    whole, path = tmp_path / "whole" / "regions.npy", tmp_path / "cut" / "regions.npy"
    make_regions(config_of(), index, Detector(), whole)
    with pytest.raises(KeyboardInterrupt):
        make_regions(config_of(), index, Detector(interrupt_after=2), path)
    (part,) = path.parent.glob("regions.partial-*/process_00000.bin")
    records = np.fromfile(part, dtype=PART_DTYPE)
    records[::2].tofile(part.with_name("process_00001.bin"))
    records[1::2].tofile(part)
    detector = Detector()
    make_regions(config_of(), index, detector, path)
    assert len(detector.asked) == NUM_IMAGES - 8
    assert path.read_bytes() == whole.read_bytes()


def test_a_retrained_detector_does_not_resume_the_search_of_the_old_one(index, tmp_path):
    path = tmp_path / "regions.npy"
    with pytest.raises(KeyboardInterrupt):
        make_regions(config_of(), index, Detector(interrupt_after=2), path, stamp="before")
    detector = Detector()
    make_regions(config_of(), index, detector, path, stamp="after")
    assert len(detector.asked) == NUM_IMAGES
    assert sorted(p.name for p in path.parent.glob("regions*")) == ["regions.json", "regions.npy"]


def test_a_record_that_was_cut_off_is_made_again(index, tmp_path):
    """A machine dies within a record; another one has a row whose bytes are torn."""
    whole, path = tmp_path / "whole" / "regions.npy", tmp_path / "cut" / "regions.npy"
    make_regions(config_of(), index, Detector(), whole)
    with pytest.raises(KeyboardInterrupt):
        make_regions(config_of(), index, Detector(interrupt_after=3), path)
    (part,) = path.parent.glob("regions.partial-*/*.bin")
    data = bytearray(part.read_bytes())
    size = PART_DTYPE.itemsize
    assert len(data) == 12 * size
    data[5 * size - 1] = 77  # the source of the fifth record: no such source
    part.write_bytes(data[:-7])
    (part.parent / "process_00009.bin").write_bytes(b"\xff" * size)  # no such row
    detector = Detector()
    make_regions(config_of(), index, detector, path)
    assert len(detector.asked) == NUM_IMAGES - 12 + 2
    for suffix in (".npy", ".json"):
        assert path.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
    assert len(list(path.parent.iterdir())) == 2


def test_unreadable_images_of_an_interrupted_search_still_count(index, root, tmp_path):
    """Two bad images where one is allowed: the same command fails again, and makes no file."""
    for name in ("bird/01.png", "dog/09.png"):
        (root / name).write_bytes((root / name).read_bytes()[:50])
    damaged, path = build_index([root], CATEGORIES), tmp_path / "regions.npy"
    for _ in range(2):
        with pytest.raises(ImageError, match=r"images: 2, .*max_bad_images allows 1"):
            make_regions(config_of("data.max_bad_images=1"), damaged, Detector(), path)
    assert not path.exists()


def test_images_that_were_restored_are_searched(index, root, tmp_path):
    """Those that could not be read are looked at again; the others are not."""
    images = [root / name for name in ("bird/01.png", "dog/09.png")]
    kept = [path.read_bytes() for path in images]
    for path in images:
        path.write_bytes(path.read_bytes()[:50])
    path = tmp_path / "regions.npy"
    with pytest.raises(ImageError, match="images: 2"):
        make_regions(config_of("data.max_bad_images=1"), index, Detector(), path)
    for image, data in zip(images, kept):
        image.write_bytes(data)
    detector = Detector()
    make_regions(config_of(), index, detector, path)
    assert {1, 9} <= {number for number, _ in detector.asked}
    assert len(detector.asked) < NUM_IMAGES
    assert counts_of(path) == {"rule": NUM_IMAGES}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_image_that_one_part_could_read_is_readable(order, tmp_path):
    parts = RegionParts(tmp_path / "regions.npy", 1, {})
    parts.open(2)
    for process, source in zip(order, (RegionSource.UNREADABLE, RegionSource.RULE)):
        region = np.zeros(1, REGION_DTYPE)
        region["source"] = source
        with parts.writer(process) as write:
            write([0], region)
    assert parts.read()["source"].tolist() == [RegionSource.RULE]


def search_damaged_share(rank: int, folder: Path) -> None:
    index = build_index([folder / "images"], CATEGORIES)
    with pytest.raises(ImageError, match=r"images: 2, and data\.max_bad_images allows 1"):
        make_regions(config_of("data.max_bad_images=1"), index, Detector(), folder / "regions.npy")


@pytest.mark.slow
def test_unreadable_images_of_all_processes_count(index, root, tmp_path):
    """One bad image for each of two processes, where one is allowed in all."""
    for name in map(index.name, (0, 7)):  # processes take rows in turns
        (root / name).write_bytes((root / name).read_bytes()[:50])
    spawn(tmp_path, search_damaged_share, tmp_path)
    assert not (tmp_path / "regions.npy").exists()


def search_share(rank: int, folder: Path) -> None:
    """Rank 1 takes its time once the parts are read, so that rank 0 would be far ahead if it did not wait."""
    read = RegionParts.read

    def slow_read(parts):
        table = read(parts)
        time.sleep(1)
        return table

    if rank == 1:
        RegionParts.read = slow_read
    index = build_index([folder / "images"], CATEGORIES)
    detector = Detector()
    make_regions(config_of(), index, detector, folder / "two" / "regions.npy")
    (folder / f"asked_{rank}.json").write_text(json.dumps([number for number, _ in detector.asked]))


def test_two_processes_make_the_file_of_one(index, tmp_path):
    make_regions(config_of(), index, Detector(), tmp_path / "one" / "regions.npy")
    spawn(tmp_path, search_share, tmp_path)
    asked = [json.loads((tmp_path / f"asked_{rank}.json").read_text()) for rank in (0, 1)]
    assert asked == [numbers_of(index)[0::2], numbers_of(index)[1::2]]
    for name in ("regions.npy", "regions.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
