"""The data pipeline as a whole, on marked pixels; loaders, shares of processes, and images that fail."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MOSAIC, make_sample, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from image_sets import tar_of
from PIL import Image
from plain_sample import plain_sample
from torch import Tensor
from torchvision.io import write_png

from clis.commands.prepare import prepare_image_level
from clis.data.annotations import checked_for_training, load_annotations
from clis.data.batch import Batch, Sample, collate
from clis.data.image_level import build_index, open_index
from clis.data.images import ImageError, decode_image, read_image
from clis.data.loader import (
    MAX_REPLACEMENTS,
    MicroBatches,
    TwoStreamDataset,
    first_readable,
    train_loader,
)
from clis.data.mapped import map_array
from clis.data.region_file import REGION_DTYPE, RegionSource
from clis.data.sampling import BlockSampler, JointSampler, UniformSampler, WorkItem

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
GROUND = (20, 20, 20)
RED = (250, 0, 0)
CLASSES = ("red", "cold", "warm", "pale")

# instance-level images: height, width, xyxy of the red marks; the third has none
INSTANCES = (
    (60, 80, [(10, 20, 40, 50)]),
    (90, 50, [(4, 6, 30, 40), (10, 50, 45, 85)]),
    (64, 64, []),
)
# image-level images in the order of the index: class folder, height, width, xyxy and color of the mark
SOURCES = (
    ("cold", 40, 60, (10, 5, 45, 30), (0, 250, 0)),
    ("cold", 50, 50, (0, 0, 30, 50), (0, 0, 250)),
    ("pale", 70, 40, (5, 20, 35, 60), (250, 0, 250)),
    ("pale", 30, 80, (20, 2, 60, 28), (250, 250, 250)),
    ("warm", 45, 45, (9, 9, 40, 40), (250, 250, 0)),
    ("warm", 64, 48, (8, 10, 48, 50), (0, 250, 250)),
)
COLOURS = tuple(color for *_, color in SOURCES)
LABELS = tuple(CLASSES.index(name) for name, *_ in SOURCES)


def write_image(path: Path, height: int, width: int, boxes: list[tuple], color: tuple) -> None:
    """A dark image with rectangles of one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = torch.tensor(GROUND, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    for x1, y1, x2, y2 in boxes:
        image[:, y1:y2, x1:x2] = torch.tensor(color, dtype=torch.uint8)[:, None, None]
    write_png(image, str(path))


def write_data(root: Path) -> Path:
    images, annotations = [], []
    for row, (height, width, boxes) in enumerate(INSTANCES):
        name = f"{row}.png"
        write_image(root / "train" / name, height, width, boxes, RED)
        images.append({"id": 100 + row, "file_name": name, "height": height, "width": width})
        for x1, y1, x2, y2 in boxes:
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": 100 + row, "category_id": 1, "bbox": box}
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "train.json").write_text(json.dumps(document))
    for i, (name, height, width, box, color) in enumerate(SOURCES):
        write_image(root / "folders" / name / f"{i}.png", height, width, [box], color)
    return root


def make_dataset(root: Path, *overrides: str) -> TwoStreamDataset:
    """s = 8, t = 2 on canvases of 64; the region of every image-level image is exactly its mark."""
    config = tiny_config(
        "clis.s=8", f"data.mosaic_size={MOSAIC}", "data.min_region=6", "data.short_sides=[48,64]",
        "data.max_size=96", "data.paste_size=[8,24]", *overrides,
    )  # fmt: skip
    annotations, _ = checked_for_training(load_annotations(root / "train.json"), drop_invalid=False)
    index = build_index([root / "folders"], annotations.categories)
    assert index.labels.tolist() == list(LABELS)
    regions = np.zeros(len(index), dtype=REGION_DTYPE)
    regions["box"] = [box for *_, box, _ in SOURCES]
    regions["source"] = RegionSource.RULE
    return TwoStreamDataset(config.data, config.clis, annotations, root / "train", index, regions)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def items(count: int = 24, s: int = 8) -> list[WorkItem]:
    sampler = JointSampler(UniformSampler(len(INSTANCES), 1), UniformSampler(len(SOURCES), 2), count, s, 3)
    return sampler.items(0)


def is_color(image: Tensor, color: tuple[int, int, int], tolerance: int = 90) -> Tensor:
    """bool [H,W]: this color; what differs from it by 250 in a channel is not, nor is gray or the ground."""
    return ((image.int() - torch.tensor(color)[:, None, None]).abs() <= tolerance).all(dim=0)


def extent(mask: Tensor) -> Tensor:
    """xyxy of the True pixels; [4]."""
    rows, columns = torch.nonzero(mask.any(1)).squeeze(1), torch.nonzero(mask.any(0)).squeeze(1)
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def filled(boxes: Tensor, height: int, width: int, grow: float = 0.0) -> Tensor:
    """bool [H,W]: pixels whose center is in one of the boxes, each grown by `grow` pixels."""
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    inside = torch.zeros(height, width, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.tolist():
        inside |= (x > x1 - grow) & (x < x2 + grow) & (y > y1 - grow) & (y < y2 + grow)
    return inside


def fields_of(value: Sample | Batch) -> dict:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def assert_same(a: Sample | Batch, b: Sample | Batch) -> None:
    """Bitwise equal in every field."""
    for name, ours in fields_of(a).items():
        theirs = getattr(b, name)
        ours, theirs = (list(v) if isinstance(v, (list, tuple)) else [v] for v in (ours, theirs))
        assert len(ours) == len(theirs), name
        for x, y in zip(ours, theirs):
            same = (x.dtype == y.dtype and torch.equal(x, y)) if isinstance(x, Tensor) else x == y
            assert same, name


class TestMarks:
    """What the boxes name is what lies in them, after resizing, flipping, mosaic and pasting."""

    def test_ground_truth_boxes_hold_their_marks(self, root):
        dataset = make_dataset(root)
        for item in items():
            sample = dataset[item]
            height, width = sample.image.shape[1:]
            truths = sample.boxes[: len(sample.boxes) - len(sample.pair_boxes)]
            assert len(truths) == len(INSTANCES[item.instance][2])
            assert sample.labels[: len(truths)].tolist() == [0] * len(truths)
            red = is_color(sample.image, RED, tolerance=110)
            assert not (red & ~filled(truths, height, width, grow=1)).any()
            # all red but for the edge, which resizing blurs, and for what was pasted over it
            inner = filled(truths, height, width, grow=-2) & ~filled(sample.pair_boxes, height, width)
            assert red[inner].all()

    @pytest.mark.parametrize(("cutout", "surroundings"), [(0, "null"), (1, "null"), (0, "1.5"), (0, "1")])
    def test_regions_hold_their_marks(self, root, cutout, surroundings):
        """Without cutout a region ends where its mark ends, to a pixel of blur, or is too small and gone.

        Also of images that are cropped to what surrounds their region, those that are pasted among them.
        """
        dataset = make_dataset(root, f"data.cutout={cutout}", f"data.mosaic_surroundings={surroundings}")
        tile, num_kept = MOSAIC // 2, 0
        for item in items():
            sample = dataset[item]
            centers = (sample.regions[:, :2] + sample.regions[:, 2:]) / 2
            places = [
                4 * int(mosaic) + 2 * int(y // tile) + int(x // tile)
                for mosaic, (x, y) in zip(sample.region_mosaics, centers)
            ]
            assert places == sorted(set(places))
            num_kept += len(places)
            for place, source in enumerate(item.image_level):
                top, left = tile * (place % 4 // 2), tile * (place % 2)
                view = sample.mosaics[place // 4][:, top : top + tile, left : left + tile]
                mark = is_color(view, COLOURS[source])
                if place not in places:
                    shown = extent(mark) if mark.any() else torch.zeros(4)
                    assert cutout or (shown[2:] - shown[:2]).min() < 6 + 1
                    continue
                row = places.index(place)
                assert sample.region_labels[row] == LABELS[source]
                region = sample.regions[row] - torch.tensor([left, top, left, top])
                assert not (mark & ~filled(region[None], tile, tile, grow=1)).any()
                if not cutout:
                    torch.testing.assert_close(extent(mark), region, rtol=0, atol=1)
        assert num_kept > 100  # of 192: the loop above has seen many

    def test_a_pair_shows_its_region_twice(self, root):
        dataset = make_dataset(root, "data.cutout=0")
        num_pairs = 0
        for item in items():
            sample = dataset[item]
            height, width = sample.image.shape[1:]
            pairs = len(sample.pair_boxes)
            num_pairs += pairs
            assert pairs <= 2
            assert len(set(sample.pair_regions.tolist())) == pairs
            assert torch.equal(sample.boxes[len(sample.boxes) - pairs :], sample.pair_boxes)
            own_labels = sample.region_labels[sample.pair_regions]
            assert torch.equal(sample.labels[len(sample.labels) - pairs :], own_labels)
            for place, (box, region) in enumerate(zip(sample.pair_boxes, sample.pair_regions)):
                x, y = ((sample.regions[region, :2] + sample.regions[region, 2:]) / 2).long().tolist()
                color = sample.mosaics[sample.region_mosaics[region], :, y, x].tolist()
                source = COLOURS.index(tuple(color))
                assert source in item.image_level
                assert LABELS[source] == own_labels[place]
                later = filled(sample.pair_boxes[place + 1 :], height, width)
                own = filled(box[None], height, width) & ~later
                assert own.any()
                assert is_color(sample.image, tuple(color), tolerance=0)[own].all()
        assert num_pairs > 24  # of at most 48

    def test_pairs_only_come_from_kept_regions(self, root):
        """No region fills its tile where its image just fits, so none is kept and none may be pasted."""
        dataset = make_dataset(root, f"data.min_region={MOSAIC // 2}", "data.mosaic_scale=[0.5,1]")
        for item in items(4):
            sample = dataset[item]
            assert len(sample.mosaics) == 2
            assert (len(sample.regions), len(sample.pair_boxes)) == (0, 0)
            assert len(sample.boxes) == len(INSTANCES[item.instance][2])


def plain(dataset: TwoStreamDataset, item: WorkItem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, boxes, mosaics and regions of the item, by the plain form."""
    annotations, index = dataset.annotations, dataset.index
    return plain_sample(
        dataset.data,
        dataset.clis.t,
        read_image(dataset.image_folder / annotations.file_names[item.instance]),
        torch.from_numpy(annotations.boxes_of(item.instance)),
        [
            (decode_image(index.read(i), index.name(i)), torch.from_numpy(dataset.regions["box"][i].copy()))
            for i in item.image_level
        ],
        np.random.default_rng(item.seed),
    )


def difference(a: Tensor, b: Tensor) -> Tensor:
    assert a.shape == b.shape
    return (a.int() - b.int()).abs().float()


def write_photographs(root: Path, seed: int = 0) -> Path:
    """JPEGs much larger than their targets, with smooth colors and one box each: instances and folders."""
    generator = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(9):
        height, width = (int(side) for side in generator.integers(130, 500, 2))
        noise = generator.integers(256, size=(9, 9, 3), dtype=np.uint8)
        path = root / ("train" if i < 3 else f"folders/{CLASSES[i % 4]}") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((width, height), Image.BICUBIC).save(path, quality=90)
        if i < 3:
            images.append({"id": 100 + i, "file_name": path.name, "height": height, "width": width})
            box = [width * 0.2, height * 0.3, width * 0.5, height * 0.4]
            annotations.append({"id": i + 1, "image_id": 100 + i, "category_id": 1 + i, "bbox": box})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "train.json").write_text(json.dumps(document))
    return root


def make_photographs(
    root: Path, annotations: Path, images: Path, *overrides: str, mapping: Path | None = None
) -> TwoStreamDataset:
    """Image-level images below `root`, whose regions have random corners."""
    config = tiny_config("clis.s=8", "clis.t=4", *overrides)
    loaded, _ = checked_for_training(load_annotations(annotations), drop_invalid=True)
    index = build_index([root], loaded.categories, mapping, strict=False)
    generator = np.random.default_rng(0)
    regions = np.zeros(len(index), dtype=REGION_DTYPE)
    for i in range(len(index)):
        height, width = decode_image(index.read(i), index.name(i)).shape[1:]
        corners = generator.uniform(0.05, 0.45, 4) * [width, height, width, height]
        regions["box"][i] = [*corners[:2], width - corners[2], height - corners[3]]
    return TwoStreamDataset(config.data, config.clis, loaded, images, index, regions)


class TestPlainForm:
    """Planned, and decoded at reduced size, a sample is what the plain form makes of whole images."""

    @staticmethod
    def assert_agrees(dataset: TwoStreamDataset, item: WorkItem, mean: float) -> None:
        """The very same boxes; pixels but for rounding where nothing is reduced, `mean` levels a mosaic."""
        sample = dataset[item]
        image, boxes, mosaics, regions = plain(dataset, item)
        torch.testing.assert_close(sample.boxes, boxes, rtol=1e-6, atol=1e-5)
        pasted = len(boxes) - len(sample.pair_boxes)
        assert torch.equal(sample.boxes[pasted:], boxes[pasted:])
        torch.testing.assert_close(sample.regions, regions, rtol=1e-6, atol=1e-5)
        assert difference(sample.image, image).mean() <= mean / 2
        assert difference(sample.mosaics, mosaics).mean(dim=(1, 2, 3)).max() <= mean

    def test_of_small_images(self, root):
        """PNGs of 30 to 80 pixels: never reduced, so what is left is rounding."""
        dataset = make_dataset(root, "clis.t=4")
        for item in items():
            self.assert_agrees(dataset, item, mean=0.5)
            image, _, mosaics, _ = plain(dataset, item)
            assert difference(dataset[item].image, image).max() <= 1
            assert difference(dataset[item].mosaics, mosaics).max() <= 1

    def test_of_large_jpegs(self, tmp_path):
        """Tiles of 32 pixels of photographs of 130 to 500: mosaics are made at 1/8 to 1/2."""
        root = write_photographs(tmp_path)
        overrides = [f"data.mosaic_size={MOSAIC}", "data.min_region=4", "data.short_sides=[48,200]"]
        overrides += ["data.max_size=256", "data.paste_size=[8,64]"]
        dataset = make_photographs(root / "folders", root / "train.json", root / "train", *overrides)
        sampler = JointSampler(UniformSampler(3, 1), UniformSampler(6, 2), 24, 8, 3)
        for item in sampler.items(0):
            self.assert_agrees(dataset, item, mean=2)

    @pytest.mark.skipif(not SHARED.exists(), reason="sample data is not here")
    def test_of_photographs(self):
        """The paper's sizes on COCO and ImageNet."""
        coco, imagenet = SHARED / "coco_mini", SHARED / "imagenet_mini"
        files = imagenet / "folders", coco / "train.json", coco / "images"
        dataset = make_photographs(*files, mapping=imagenet / "wnid_to_category.tsv")
        sampler = JointSampler(
            UniformSampler(len(dataset.annotations), 1), UniformSampler(len(dataset.index), 2), 3, 8, 3
        )
        for item in sampler.items(0):
            self.assert_agrees(dataset, item, mean=2)


class TestSample:
    @pytest.mark.parametrize(("s", "t"), [(4, 4), (8, 0), (12, 1)])
    def test_s_over_4_mosaics_and_at_most_t_pairs(self, root, s, t):
        dataset = make_dataset(root, f"clis.s={s}", f"clis.t={t}", "clis.contrastive=false")
        for item in items(6, s):
            sample = dataset[item]
            assert sample.mosaics.shape == (s // 4, 3, MOSAIC, MOSAIC)
            assert len(sample.regions) <= s
            assert len(sample.pair_boxes) <= t

    def test_without_image_level_images_the_rest_is_empty(self, root):
        dataset = make_dataset(root, "clis.s=0", "clis.t=0", "clis.contrastive=false")
        dataset.index = dataset.regions = None
        expected = {
            "mosaics": ((0, 3, MOSAIC, MOSAIC), torch.uint8),
            "regions": ((0, 4), torch.float32),
            "region_labels": ((0,), torch.int64),
            "region_mosaics": ((0,), torch.int64),
            "pair_boxes": ((0, 4), torch.float32),
            "pair_regions": ((0,), torch.int64),
        }
        # row 2 has no boxes at all
        samples = [dataset[WorkItem(instance=row, image_level=(), seed=5)] for row in (0, 2)]
        for value in (*samples, collate(samples)):
            for name, (shape, dtype) in expected.items():
                assert (getattr(value, name).shape, getattr(value, name).dtype) == (shape, dtype), name
        assert (samples[1].boxes.shape, samples[1].boxes.dtype) == ((0, 4), torch.float32)
        assert (samples[1].labels.shape, samples[1].labels.dtype) == ((0,), torch.int64)
        assert collate(samples).pair_images.dtype == torch.int64

    def test_a_mosaic_becomes_the_image_and_its_regions_the_ground_truth(self, root):
        four = ("clis.s=4", "clis.t=0", "clis.contrastive=false")
        with_mosaic, detected = (
            make_dataset(root, *four, f"clis.detect_mosaics={on}") for on in ("false", "true")
        )
        for item in items(6, s=4):
            given, sample = with_mosaic[item], detected[item]
            assert len(given.regions) > 0
            assert torch.equal(sample.image, given.mosaics[0])
            assert torch.equal(sample.boxes, given.regions)
            assert torch.equal(sample.labels, given.region_labels)
            batch = collate([sample, sample])
            assert batch.counts == (0, 0)  # no regions to classify, no pairs
            assert batch.mosaics.shape == (0, 3, MOSAIC, MOSAIC)

    def test_an_image_without_boxes_has_its_pasted_ones(self, root):
        sample = make_dataset(root)[WorkItem(instance=2, image_level=tuple(range(4)) * 2, seed=1)]
        assert len(sample.boxes) == len(sample.pair_boxes) == 2

    def test_is_a_function_of_the_item(self, root):
        """Whatever was drawn before, and in another process."""
        dataset = make_dataset(root)
        first, *others = items(6)
        expected = dataset[first]
        for other in others:
            dataset[other]
        assert_same(dataset[first], expected)
        assert_same(pickle.loads(pickle.dumps(dataset))[first], expected)
        another_seed = dataset[dataclasses.replace(first, seed=first.seed + 1)]
        assert not torch.equal(another_seed.mosaics, expected.mosaics)


class TestBatches:
    def test_workers_change_nothing(self, root):
        """Two steps of micro-batches; two processes load the same bits in the same order as this one."""
        dataset = make_dataset(root)
        sampler = JointSampler(UniformSampler(3, 1), UniformSampler(6, 2), images_per_step=4, s=8, seed=3)
        alone, parallel = (
            list(train_loader(dataset, MicroBatches(sampler, range(2), 0, 1, 2), workers, pin=False))
            for workers in (0, 2)
        )
        assert len(alone) == len(parallel) == 4
        for ours, theirs in zip(alone, parallel):
            assert_same(ours, theirs)
        assert [seed for batch in alone for seed in batch.seeds] == [
            item.seed for step in range(2) for item in sampler.items(step)
        ]

    @given(
        processes=st.integers(1, 4),
        accumulation=st.integers(1, 3),
        at_once=st.integers(1, 3),
        first_step=st.integers(0, 4),
    )
    def test_shares_of_processes_are_the_global_batch(self, processes, accumulation, at_once, first_step):
        images_per_step = processes * accumulation * at_once
        sampler = JointSampler(UniformSampler(11, 1), UniformSampler(7, 2), images_per_step, 4, 3)

        def of_rank(rank: int, first: int) -> list[list[WorkItem]]:
            return list(MicroBatches(sampler, range(first, 5), rank, processes, at_once))

        shares = [of_rank(rank, 0) for rank in range(processes)]
        for share in shares:
            assert [len(batch) for batch in share] == [at_once] * (5 * accumulation)
        for step in range(5):
            mine = slice(step * accumulation, (step + 1) * accumulation)
            joined = [item for share in shares for batch in share[mine] for item in batch]
            assert joined == sampler.items(step)
        for rank, share in enumerate(shares):
            assert of_rank(rank, first_step) == share[first_step * accumulation :]

    def test_collate_counts_rows_through(self):
        """Samples with 1, 0 and 2 mosaics; 3, 0 and 2 regions; 2, 0 and 1 pairs."""
        first = make_sample(1, regions=3, pairs=2)
        empty = make_sample(2, truths=0, regions=0, pairs=0)
        empty = dataclasses.replace(empty, mosaics=empty.mosaics[:0], unreadable=("gone.jpg",))
        third = make_sample(3, size=(40, 50), regions=2, pairs=1)
        third = dataclasses.replace(
            third,
            mosaics=third.mosaics.repeat(2, 1, 1, 1),
            region_mosaics=torch.tensor([0, 1]),
            pair_regions=torch.tensor([1]),
        )
        batch = collate([first, empty, third])
        # one mosaic and three regions lie before those of the third sample
        assert batch.region_mosaics.tolist() == [0, 0, 0, 1, 2]
        assert batch.pair_regions.tolist() == [0, 1, 3 + 1]
        assert batch.pair_images.tolist() == [0, 0, 2]
        assert torch.equal(batch.mosaics, torch.cat([first.mosaics, third.mosaics]))
        assert torch.equal(batch.regions, torch.cat([first.regions, third.regions]))
        assert torch.equal(batch.pair_boxes[2], third.pair_boxes[0])
        assert torch.equal(batch.images[2], third.image)
        assert [len(boxes) for boxes in batch.boxes] == [4, 0, 3]
        assert (batch.seeds, batch.image_ids, batch.unreadable) == ([1, 2, 3], [1, 2, 3], ("gone.jpg",))

    def test_to_moves_every_tensor_and_keeps_the_rest(self):
        batch = collate([make_sample(1), dataclasses.replace(make_sample(2), unreadable=("gone.jpg",))])
        assert_same(batch.to(torch.device("cpu")), batch)
        moved = fields_of(batch.to(torch.device("meta")))  # a device whose tensors cannot be mistaken
        for name, before in fields_of(batch).items():
            pairs = zip(before, moved[name]) if isinstance(before, list) else [(before, moved[name])]
            for old, new in pairs:
                if isinstance(old, Tensor):
                    assert new.device.type == "meta", name
                    assert (new.shape, new.dtype) == (old.shape, old.dtype), name
                else:
                    assert new == old, name


class TestBadImages:
    @pytest.fixture
    def data(self, tmp_path) -> Path:
        return write_data(tmp_path)

    @staticmethod
    def cut(path: Path, length: int = 60) -> None:
        """By default behind the header, so that only decoding shows it."""
        path.write_bytes(path.read_bytes()[:length])

    @pytest.mark.parametrize("length", [0, 10, 60])
    def test_an_instance_level_image_is_replaced_by_the_next(self, data, length):
        self.cut(data / "train" / "1.png", length)
        self.cut(data / "train" / "2.png")
        sample = make_dataset(data)[WorkItem(instance=1, image_level=(0, 1, 2, 3), seed=9)]
        # 2 is cut too, so the stream goes on from its beginning
        assert sample.image_id == 100
        assert [path.rpartition("train/")[2][:5] for path in sample.unreadable] == ["1.png", "2.png"]
        wanted = make_dataset(data)[WorkItem(instance=0, image_level=(0, 1, 2, 3), seed=9)]
        assert_same(dataclasses.replace(sample, unreadable=()), wanted)

    @pytest.mark.parametrize("length", [0, 10, 60])
    def test_an_image_level_image_takes_its_region_and_label_along(self, data, length):
        """Image 3 (pale) is replaced by image 4 (warm)."""
        self.cut(data / "folders" / "pale" / "3.png", length)
        dataset = make_dataset(data, "data.cutout=0")
        sample = dataset[WorkItem(instance=0, image_level=(3, 3, 3, 3), seed=2)]
        assert len(sample.unreadable) == 4
        assert all("pale/3.png" in message for message in sample.unreadable)
        assert set(sample.region_labels.tolist()) == {CLASSES.index("warm")}
        wanted = dataset[WorkItem(instance=0, image_level=(4, 4, 4, 4), seed=2)]
        assert_same(dataclasses.replace(sample, unreadable=()), wanted)

    def test_damaged_pixels_and_headers_together(self, data):
        """Images 0 and 2 of the image-level stream, one of each kind, and the instance-level image."""
        self.cut(data / "folders" / "cold" / "0.png")
        self.cut(data / "folders" / "pale" / "2.png", 10)
        self.cut(data / "train" / "0.png")
        dataset = make_dataset(data)
        sample = dataset[WorkItem(instance=0, image_level=(0, 1, 2, 3), seed=5)]
        assert [Path(message.split(": ")[0]).name for message in sample.unreadable] == [
            "0.png",
            "0.png",
            "2.png",
        ]
        wanted = dataset[WorkItem(instance=1, image_level=(1, 1, 3, 3), seed=5)]
        assert_same(dataclasses.replace(sample, unreadable=()), wanted)

    def test_a_jpeg_that_ends_early(self, tmp_path):
        """Its header is sound, and it is wanted at reduced size."""
        root = write_photographs(tmp_path)
        arguments = (root / "folders", root / "train.json", root / "train", f"data.mosaic_size={MOSAIC}")
        dataset = make_photographs(*arguments)
        (broken,) = (path for path in (root / "folders").rglob("*.jpg") if path.name in dataset.index.name(2))
        broken.write_bytes(broken.read_bytes()[:-200])
        sample = dataset[WorkItem(instance=0, image_level=(0, 1, 2, 4), seed=5)]
        (message,) = sample.unreadable
        assert message.startswith(f"{dataset.index.name(2)}: ")
        wanted = dataset[WorkItem(instance=0, image_level=(0, 1, 3, 4), seed=5)]
        assert_same(dataclasses.replace(sample, unreadable=()), wanted)

    def test_another_size_than_the_annotation_says_is_told(self, data):
        """The boxes would lie elsewhere: 60 x 80 became 80 x 60, as a viewer that rotates leaves it."""
        write_image(data / "train" / "0.png", 80, 60, [], RED)
        sample = make_dataset(data)[WorkItem(instance=0, image_level=(0, 1, 2, 3), seed=9)]
        assert sample.image_id == 101
        (message,) = sample.unreadable
        assert "0.png: 60 x 80 pixels, but the annotations say 80 x 60" in message
        assert "(image 100 of " in message

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize(("stream", "images"), [("train", 3), ("folders", 6)])
    def test_a_stream_that_is_gone_is_an_error(self, data, stream, images, workers):
        dataset = make_dataset(data)  # indexed while the images were there
        for path in (data / stream).rglob("*.png"):
            path.unlink()
        sampler = JointSampler(UniformSampler(3, 1), UniformSampler(6, 2), images_per_step=2, s=8, seed=3)
        loader = train_loader(dataset, MicroBatches(sampler, range(1), 0, 1, 2), workers, pin=False)
        with pytest.raises(ImageError, match=rf"(^|: ){images} images in a row .*{stream}.*\.png"):
            next(iter(loader))

    @pytest.mark.parametrize(("images", "tried"), [(1, "1 image"), (1000, f"{MAX_REPLACEMENTS} images")])
    def test_each_image_is_tried_once(self, images, tried):
        def read(image: int) -> None:
            raise ImageError(f"{image}.png: gone")

        unreadable: list[str] = []
        with pytest.raises(ImageError, match=f"^{tried} in a row could not be read; the last: "):
            first_readable(read, images - 1, images, unreadable)
        assert len(set(unreadable)) == len(unreadable) == min(images, MAX_REPLACEMENTS)


class TestShards:
    """Tars of mixed classes with a label file, drawn block by block."""

    ORDER = (3, 0, 5, 1, 4, 2)
    """The images of SOURCES as they lie in two tars, three in each."""

    @pytest.fixture
    def shards(self, root, tmp_path) -> TwoStreamDataset:
        for number, own in enumerate((self.ORDER[:3], self.ORDER[3:])):
            files = {f"{i}.png": (root / "folders" / SOURCES[i][0] / f"{i}.png").read_bytes() for i in own}
            (tmp_path / "shards").mkdir(exist_ok=True)
            (tmp_path / "shards" / f"{number}.tar").write_bytes(tar_of(files))
        lines = [f"{i}.png\t{name}\n" for i, (name, *_) in enumerate(SOURCES)]
        (tmp_path / "labels.tsv").write_text("".join(lines))
        options = {"labels": tmp_path / "labels.tsv"}
        prepare_image_level([tmp_path / "shards"], root / "train.json", tmp_path / "index", **options)
        dataset = make_dataset(root, "data.shuffle_block=4")
        dataset.index = open_index(tmp_path / "index", dataset.annotations.categories)
        dataset.regions = dataset.regions[list(self.ORDER)]
        return dataset

    def test_the_same_batches_come_out(self, root, shards):
        place = {image: row for row, image in enumerate(self.ORDER)}
        for item in items(6):
            moved = dataclasses.replace(item, image_level=tuple(place[i] for i in item.image_level))
            assert_same(collate([shards[moved]]), collate([make_dataset(root)[item]]))

    def test_a_block_is_read_in_one_go_from_each_of_its_tars(self, shards, monkeypatch):
        """Blocks of 4 of 6 images: the first has the first tar and one image of the second."""
        asked = []
        monkeypatch.setattr(
            os, "posix_fadvise", lambda _, start, length, advice: asked.append((start, length))
        )
        sampler = BlockSampler(6, 4, seed=0)
        drawn = [sampler.draw(k) for k in range(6)]
        for k in range(0, 6, 2):
            shards[WorkItem(instance=0, image_level=tuple(drawn[k : k + 2] * 4), seed=k)]
        index = shards.index
        spans = {
            block: [(int(index.positions[a]), int(index.positions[b] + index.sizes[b] - index.positions[a]))]
            for block, a, b in (("first tar", 0, 2), ("one image", 3, 3), ("last block", 4, 5))
        }
        first, last = spans["first tar"] + spans["one image"], spans["last block"]
        assert asked == (first + last if drawn[0] < 4 else last + first)


def test_a_process_that_is_not_forked_is_sent_no_regions(root, tmp_path):
    """It maps their file; 100,000 of them would be 2 MB."""
    dataset = make_dataset(root)
    regions = np.zeros(100_000, REGION_DTYPE)
    regions[: len(dataset.regions)] = dataset.regions
    np.save(tmp_path / "regions.npy", regions)
    dataset.regions = map_array(tmp_path / "regions.npy")
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000
    item = items(1)[0]
    assert_same(pickle.loads(sent)[item], make_dataset(root)[item])
