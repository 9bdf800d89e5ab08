"""The embedded benchmark: what is drawn, how classes are dealt, and what happens to folders."""

import dataclasses
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lvis import LVIS
from torchvision.io import read_image

from clis.__main__ import main
from clis.data.shapes import (
    IMAGE_LEVEL,
    VAL,
    ShapesSpec,
    category_entries,
    deal_classes,
    frequency_order,
    train_image_counts,
    val_image_counts,
    write_shapes,
)
from clis.data.shapes_drawing import (
    CLASS_NAMES,
    CLASSES,
    OUTLINES,
    TEXTURES,
    draw_gradient,
    draw_object,
    draw_scene,
    draw_studio,
)

SPEC = ShapesSpec(
    image_size=48, train_images=40, val_images=20, image_level_size=40, image_level_per_class=2, seed=3
)
NUM_IMAGES = 40 + 20 + 50 * 2
PALETTE = np.array([[0.2, 0.3, 0.4], [0.3, 0.3, 0.3]])


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "new" / "folder"
    write_shapes(folder, SPEC)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def load(folder: Path, split: str) -> dict:
    return json.loads((folder / f"{split}.json").read_text())


def label_of(name: str) -> int:
    return CLASS_NAMES.index(name)


# The plan


def test_default_tail_has_well_filled_frequency_groups():
    categories = category_entries(ShapesSpec())
    counts = np.array([c["image_count"] for c in categories])
    groups = "".join(c["frequency"] for c in categories)
    # Geometric from 303 images to 1 in 49 equal factors of 303 ** (1 / 49) = 1.124: 2745 of 2750 objects.
    assert (counts.max(), counts.min(), counts.sum()) == (303, 1, 2745)
    assert (groups.count("r"), groups.count("c"), groups.count("f")) == (21, 19, 10)
    assert counts[[g == "r" for g in groups]].max() == 10
    assert counts[[g == "c" for g in groups]].min() == 12
    assert counts[[g == "c" for g in groups]].max() == 94
    assert counts[[g == "f" for g in groups]].min() == 106


def test_ranks_spread_outlines_and_textures_evenly():
    order = frequency_order()
    assert sorted(order) == list(range(50))
    for block in order.reshape(5, 10):
        textures, outlines = zip(*(CLASSES[label] for label in block))
        assert sorted(outlines) == sorted(OUTLINES)
        assert sorted(textures) == sorted(2 * list(TEXTURES))
    counts = train_image_counts(ShapesSpec())
    assert (np.diff(counts[order]) <= 0).all()


@given(
    train_images=st.integers(40, 2000),
    mean=st.floats(1.5, 4),
    extra=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25)
def test_dealing_keeps_every_count_exactly(train_images, mean, extra, seed):
    max_objects = math.ceil(mean) + extra
    spec = ShapesSpec(train_images=train_images, mean_objects=mean, max_objects=max_objects)
    counts = train_image_counts(spec)
    scenes = deal_classes(counts, train_images, max_objects, np.random.default_rng(seed))
    assert len(scenes) == train_images
    assert all(1 <= len(scene) <= max_objects for scene in scenes)
    assert all(len(set(scene.tolist())) == len(scene) for scene in scenes)
    assert (np.bincount(np.concatenate(scenes), minlength=50) == counts).all()


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--seed -1: must be at least 0"):
        main(["shapes", str(tmp_path), "--seed=-1"])


# The drawings

R_HEART, MOON_GAP, MOON_BITE = 0.82, 0.62, 0.72


def moon_area() -> float:
    """Unit disk less its lens with a disk of radius 0.72 whose center is 0.62 away."""
    d, r = MOON_GAP, MOON_BITE
    sector = math.acos((d * d + 1 - r * r) / (2 * d)) + r * r * math.acos((d * d + r * r - 1) / (2 * d * r))
    kite = 0.5 * math.sqrt((1 + r - d) * (d + r - 1) * (d - r + 1) * (d + r + 1))
    return math.pi - (sector - kite)


AREAS = {  # in units of half the side, from the textbook formulas
    "triangle": 3 * math.sqrt(3) / 4 * 1.25**2,
    "square": 1.76**2,
    "pentagon": 2.5 * math.sin(math.radians(72)) * 1.08**2,
    "star": 5 * 1.2 * 0.6 * math.sin(math.radians(36)),  # ten triangles from the center
    "cross": 2 * (2 * 0.8) - 0.8**2,  # two bars less what they share
    "ring": math.pi * (1 - 0.38**2),
    "heart": 2 * R_HEART**2 + math.pi * R_HEART**2 / 2,  # the square and two half disks
    "moon": moon_area(),
    "arrow": 1.08**2 + 0.8 * 0.92,  # a right-angled head and the shaft below it
    "disk": math.pi,
}


@pytest.mark.parametrize("outline", OUTLINES)
def test_outlines_have_their_area(outline):
    alpha, _ = draw_object(np.random.default_rng(0), label_of(f"plain_{outline}"), 120, PALETTE)
    assert alpha.sum() / 60**2 == pytest.approx(AREAS[outline], rel=0.01)


# Share of the second color on a disk: half; a disk of radius 0.34 in each unit cell; outside of radius 0.8.
SHARES = {"stripes": 0.5, "dots": math.pi * 0.34**2, "checks": 0.5, "rim": 1 - 0.8**2}


@pytest.mark.parametrize("texture", SHARES)
def test_textures_mix_two_distinct_colors(texture):
    for seed in range(5):
        alpha, color = draw_object(
            np.random.default_rng(seed), label_of(f"{texture}_disk"), 120, np.zeros((1, 3))
        )
        pixels = color[:, alpha == 1]
        channel = pixels[np.ptp(pixels, axis=1).argmax()]
        low, high = pixels[:, channel.argmin()], pixels[:, channel.argmax()]
        assert np.linalg.norm(high - low) > 0.35
        share = ((channel - channel.min()) / np.ptp(channel)).mean()
        assert min(abs(share - SHARES[texture]), abs(1 - share - SHARES[texture])) < 0.04


def test_plain_objects_have_one_color():
    alpha, color = draw_object(np.random.default_rng(0), label_of("plain_heart"), 40, PALETTE)
    assert (np.ptp(color[:, alpha > 0], axis=1) == 0).all()


@given(
    seed=st.integers(0, 2**32),
    labels=st.lists(st.integers(0, 49), min_size=1, max_size=4, unique=True),
    backdrop=st.sampled_from([draw_gradient, draw_studio]),
    size=st.sampled_from([48, 96]),
)
@settings(max_examples=60)
def test_boxes_are_tight_around_the_drawn_pixels(seed, labels, backdrop, size):
    scene = draw_scene(
        np.random.default_rng(seed),
        np.array(labels),
        image_size=size,
        object_size=(0.22, 0.9),
        backdrop=backdrop,
    )
    assert scene.masks.sum(0).max() == 1
    for mask, box in zip(scene.masks, scene.boxes):
        ys, xs = np.nonzero(mask)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    # The backdrop is drawn first, so the same generator gives it alone. What differs from it is an object:
    # nearly all of every mask, and nothing more than two pixels away from one (the sharpest tips reach that
    # much beyond their half-covered part).
    empty, _ = backdrop(np.random.default_rng(seed), size)
    changed = np.abs(scene.image - 255 * empty.clip(0, 1)).max(0) > 1
    near = np.zeros((size + 4, size + 4), bool)
    for dy in range(5):
        for dx in range(5):
            near[dy : dy + size, dx : dx + size] |= scene.masks.any(0)
    assert not (changed & ~near[2:-2, 2:-2]).any()
    for mask in scene.masks:
        assert (changed & mask).sum() > 0.95 * mask.sum()


def test_crowded_scenes_shrink_objects_until_they_fit():
    scene = draw_scene(
        np.random.default_rng(0),
        np.arange(8),
        image_size=64,
        object_size=(0.9, 1.0),
        backdrop=draw_gradient,
    )
    assert scene.masks.any((1, 2)).all()
    assert scene.masks.sum(0).max() == 1


# The files


def test_equal_specs_give_equal_bytes_and_seeds_differ(written, tmp_path):
    write_shapes(tmp_path / "again", SPEC)
    expected = contents(written)
    assert contents(tmp_path / "again") == expected
    write_shapes(tmp_path / "other", dataclasses.replace(SPEC, seed=4))
    other = contents(tmp_path / "other")
    assert other.keys() == expected.keys()
    assert not any(other[name] == expected[name] for name in expected)


def test_file_i_is_a_function_of_seed_split_and_i(written):
    val = load(written, "val")
    i = 7
    drawn = [a for a in val["annotations"] if a["image_id"] == i + 1]
    scene = draw_scene(
        np.random.default_rng([SPEC.seed, VAL, i]),
        np.array([a["category_id"] - 1 for a in drawn]),
        image_size=48,
        object_size=SPEC.object_size,
        backdrop=draw_gradient,
    )
    assert val["images"][i]["file_name"] == "val/000008.jpg"
    decoded = read_image(str(written / "val/000008.jpg")).numpy()
    assert decoded.shape == (3, 48, 48)
    assert np.abs(decoded.astype(int) - scene.image).mean() < 12  # JPEG blurs colors, as little as this
    xywh = np.array([a["bbox"] for a in drawn])
    assert (xywh[:, :2] == scene.boxes[:, :2]).all()
    assert (xywh[:, 2:] == scene.boxes[:, 2:] - scene.boxes[:, :2]).all()
    assert [a["area"] for a in drawn] == scene.masks.sum((1, 2)).tolist()


@pytest.mark.parametrize("split", ["train", "val"])
def test_classes_are_in_as_many_images_as_planned(written, split):
    content = load(written, split)
    images_of = [set() for _ in CLASSES]
    for annotation in content["annotations"]:
        images_of[annotation["category_id"] - 1].add(annotation["image_id"])
    planned = train_image_counts(SPEC) if split == "train" else val_image_counts(SPEC)
    assert [len(images) for images in images_of] == planned.tolist()
    # Both files describe training, as in LVIS.
    assert [c["image_count"] for c in content["categories"]] == train_image_counts(SPEC).tolist()
    assert [c["name"] for c in content["categories"]] == list(CLASS_NAMES)


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_are_sound_lvis(written, split):
    content = load(written, split)
    images, annotations = content["images"], content["annotations"]
    assert [c["id"] for c in content["categories"]] == list(range(1, 51))
    assert len({i["id"] for i in images}) == len(images)
    assert len({a["id"] for a in annotations}) == len(annotations)
    on_disk = {p.relative_to(written).as_posix() for p in (written / split).iterdir()}
    assert {i["file_name"] for i in images} == on_disk
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        assert min(x, y) >= 0
        assert max(x + w, y + h) <= 48
        assert 0 < annotation["area"] <= w * h
    lvis = LVIS(str(written / f"{split}.json"))  # the public reader finds the same
    for image in images:
        found = lvis.load_anns(lvis.get_ann_ids(img_ids=[image["id"]]))
        positive = {a["category_id"] for a in found}
        assert positive.isdisjoint(image["neg_category_ids"])
        assert positive.union(image["neg_category_ids"]) == set(range(1, 51))
        assert image["not_exhaustive_category_ids"] == []
        assert (image["width"], image["height"]) == (48, 48)


def test_image_level_folders_are_full(written):
    folders = sorted((written / "image_level").iterdir())
    assert [f.name for f in folders] == sorted(CLASS_NAMES)
    assert all(sorted(p.name for p in f.iterdir()) == ["000001.jpg", "000002.jpg"] for f in folders)
    assert read_image(str(folders[0] / "000001.jpg")).shape == (3, 40, 40)


def test_boxes_of_image_level_images_are_tight(written):
    """One for each image, inside it; that of an image drawn again is its scene's, which is tight."""
    boxes = json.loads((written / "image_level_boxes.json").read_text())
    names = [f"{name}/{number:06}.jpg" for name in CLASS_NAMES for number in (1, 2)]
    assert list(boxes) == names
    for name in names:
        x1, y1, x2, y2 = boxes[name]
        assert 0 <= x1 < x2 <= 40
        assert 0 <= y1 < y2 <= 40
    spec, label = SPEC, CLASS_NAMES.index("dots_ring")
    scene = draw_scene(
        np.random.default_rng([spec.seed, IMAGE_LEVEL, 2 * label + 1]),
        np.array([label]),
        image_size=spec.image_level_size,
        object_size=spec.image_level_object_size,
        backdrop=draw_studio,
    )
    drawn = read_image(str(written / "image_level" / "dots_ring" / "000002.jpg"))
    assert np.abs(drawn.numpy().astype(int) - scene.image).mean() < 8  # the same image, but for JPEG
    assert boxes["dots_ring/000002.jpg"] == scene.boxes[0].tolist()


def test_progress_counts_every_image_once_and_a_second_call_does_nothing(tmp_path):
    seen = []
    write_shapes(tmp_path, SPEC, progress=lambda: seen.append(1))
    assert len(seen) == NUM_IMAGES == SPEC.num_images
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    write_shapes(tmp_path, SPEC, progress=lambda: pytest.fail("drew again"))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def interrupter() -> Callable[[], None]:
    """Progress that is interrupted in the middle of val."""
    images = itertools.count(1)

    def interrupt() -> None:
        if next(images) == 50:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.slow
def test_processes_that_write_it_at_once_wait_for_each_other(written, tmp_path):
    """Without a lock the second would take the first one's files for those of a dead process."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_shapes, args=(tmp_path / "new", SPEC)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert contents(tmp_path / "new") == contents(written)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_an_interrupted_folder_is_completed(written, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path, SPEC, progress=interrupter())
    assert (tmp_path / "train.json").exists()
    assert not (tmp_path / "shapes.json").exists()
    write_shapes(tmp_path, SPEC)
    assert contents(tmp_path) == contents(written)


def as_of_an_earlier_version(folder):
    record = json.loads((folder / "shapes.json").read_text())
    (folder / "shapes.json").write_text(json.dumps(record | {"version": 1}))


def test_an_earlier_version_is_replaced_without_leftovers(written, tmp_path):
    write_shapes(tmp_path, dataclasses.replace(SPEC, train_images=50, image_level_per_class=3))
    as_of_an_earlier_version(tmp_path)
    with pytest.raises(KeyboardInterrupt):  # a folder being replaced must not pass for complete
        write_shapes(tmp_path, SPEC, progress=interrupter())
    assert not (tmp_path / "shapes.json").exists()
    write_shapes(tmp_path, SPEC)
    assert contents(tmp_path) == contents(written)


def test_the_benchmark_of_another_seed_is_left_alone(tmp_path):
    """Runs may be reading it, and a config that draws the benchmark names the same folder by default."""
    write_shapes(tmp_path, SPEC)
    own = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds the shapes benchmark of seed 3, not 9; name another folder"):
        write_shapes(tmp_path, dataclasses.replace(SPEC, seed=9))
    assert contents(tmp_path) == own


@pytest.mark.parametrize("name", ["train.json", "train/000001.jpg", "notes.txt", "shapes.json"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"precious": 1}')
    with pytest.raises(ValueError, match="was not made by the shapes benchmark"):
        write_shapes(tmp_path, SPEC)
    assert contents(tmp_path) == {name: b'{"precious": 1}'}


def test_foreign_files_stop_a_replacement_before_anything_is_lost(tmp_path):
    write_shapes(tmp_path, SPEC)
    own = contents(tmp_path)
    for name in ("notes.txt", "train/photo.jpg", "image_level/cat/000001.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
        write_shapes(tmp_path, SPEC)  # complete as it is
        as_of_an_earlier_version(tmp_path)
        mine = contents(tmp_path)
        with pytest.raises(ValueError, match="move that file away"):
            write_shapes(tmp_path, SPEC)
        assert contents(tmp_path) == mine
        (tmp_path / "shapes.json").write_bytes(own["shapes.json"])
        (tmp_path / name).unlink()


def test_links_are_foreign(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "shapes"
    outside.mkdir()
    (outside / "000001.jpg").write_text("precious")
    folder.mkdir()
    (folder / "shapes.json.unfinished").touch()
    (folder / "train").symlink_to(outside, target_is_directory=True)
    with pytest.raises(ValueError, match="was not made"):
        write_shapes(folder, SPEC)
    assert (outside / "000001.jpg").read_text() == "precious"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="is a file"):
        write_shapes(tmp_path / "file", SPEC)
