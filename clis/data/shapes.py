"""The embedded long-tailed benchmark: drawn scenes in LVIS form, image-level images of the same classes.

A class is an outline times a texture (10 x 5 = 50). Training scenes are long-tailed, validation scenes and
image-level images are balanced, and nothing is downloaded: the whole benchmark is a function of `ShapesSpec`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.io import encode_jpeg

from clis.atomic import exclusive
from clis.data.categories import frequency_group
from clis.data.shapes_drawing import (
    CLASS_NAMES,
    CLASSES,
    OUTLINES,
    TEXTURES,
    Scene,
    draw_gradient,
    draw_scene,
    draw_studio,
)
from clis.distributed import on_main
from clis.progress import Progress, say

FORMAT = "clis-shapes"
VERSION = 2
JPEG_QUALITY = 92
PLAN, TRAIN, VAL, IMAGE_LEVEL = range(4)  # second word of every random seed: [seed, stream, index]


@dataclass(frozen=True, kw_only=True)
class ShapesSpec:
    """Everything the benchmark depends on; equal specs give equal files.

    The scenes must have room for every class: `train_images` and `val_images` times `max_objects` objects.
    """

    seed: int = 0
    """Non-negative; moves every random choice but the frequency rank of a class, which is fixed."""
    image_size: int = 96
    """Side of a scene in pixels."""
    train_images: int = 1000
    """Training scenes; the long tail is as steep as this number allows."""
    val_images: int = 500
    """Validation scenes; every class is in the same number of them."""
    mean_objects: float = 2.75
    """Objects in a scene, on average."""
    max_objects: int = 4
    """Most objects in a scene; the fewest is one. A scene never holds two objects of a class."""
    object_size: tuple[float, float] = (0.22, 0.52)
    """Smallest and largest side of an object in a scene, as a fraction of the image side; crowded scenes
    scale theirs down until all fit."""
    image_level_size: int = 96
    """Side of an image-level image in pixels."""
    image_level_per_class: int = 40
    """Image-level images of each class."""
    image_level_object_size: tuple[float, float] = (0.5, 0.8)
    """As `object_size`, for the one object of an image-level image."""

    @property
    def num_images(self) -> int:
        """Number of images of all three kinds together."""
        return self.train_images + self.val_images + len(CLASSES) * self.image_level_per_class


def frequency_order() -> np.ndarray:
    """Order the labels from the most to the least frequent in training: int64 [50].

    Each block of ten ranks holds every outline once and every texture twice, so that of a rare class only the
    combination is rare.
    """
    order = []
    for block in range(len(TEXTURES)):
        for outline in np.random.default_rng(block).permutation(len(OUTLINES)):
            order.append(outline * len(TEXTURES) + (outline + block) % len(TEXTURES))
    return np.array(order)


def train_image_counts(spec: ShapesSpec) -> np.ndarray:
    """Return how many training images hold each label: int64 [50], geometric in the rank, at least 1.

    The most frequent class is in as many images as the planned number of objects allows.
    """
    exponents = 1 - np.arange(len(CLASSES)) / (len(CLASSES) - 1)
    heads = np.arange(1, max(1, spec.train_images) + 1)
    counts = np.rint(heads[:, None] ** exponents).astype(np.int64)
    affordable = counts.sum(1) <= spec.mean_objects * spec.train_images
    by_label = np.empty(len(CLASSES), np.int64)
    by_label[frequency_order()] = counts[max(0, affordable.sum() - 1)]
    return by_label


def val_image_counts(spec: ShapesSpec) -> np.ndarray:
    """Return how many validation images hold each label: int64 [50], all equal."""
    count = max(1, round(spec.mean_objects * spec.val_images / len(CLASSES)))
    return np.full(len(CLASSES), count)


def deal_classes(
    counts: np.ndarray, num_images: int, max_objects: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal classes to scenes so that label c is in exactly counts[c] scenes, at most once in each.

    Returns `num_images` int64 arrays of 1..max_objects distinct labels.
    """
    places = num_images * (max_objects - 1)  # beyond the one object that every scene has
    extra = rng.choice(places, counts.sum() - num_images, replace=False)
    sizes = 1 + np.bincount(extra % num_images, minlength=num_images)
    deck = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    scenes = np.split(deck, np.cumsum(sizes)[:-1])  # views: a swap in the deck shows in its scene
    owner = np.repeat(np.arange(num_images), sizes)
    for slot in range(len(deck)):
        scene = scenes[owner[slot]]
        while np.count_nonzero(scene == deck[slot]) > 1:
            other = rng.integers(len(deck))
            if deck[other] not in scene and deck[slot] not in scenes[owner[other]]:
                deck[slot], deck[other] = deck[other], deck[slot]
    return scenes


def write_shapes(
    folder: Path,
    spec: ShapesSpec = ShapesSpec(),
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Write the benchmark into `folder`, unless it already holds the one of an equal spec.

    Makes ``train.json`` and ``val.json`` (LVIS v1 form, exhaustively annotated, file names relative to
    `folder`), ``train/000001.jpg`` and so on, ``image_level/<class name>/000001.jpg`` and so on, the boxes of
    the latter in ``image_level_boxes.json`` (for `regions.boxes`, as an oracle), and finally ``shapes.json``,
    whose presence means that the rest is complete. A folder that this function left incomplete, or an earlier
    version of it wrote, is rewritten. `progress` is called after each image. Of several processes one writes
    it, and the others wait.

    Raises ValueError where `folder` holds anything that this function did not make, or the benchmark of
    another spec; nothing is changed then.
    """
    record = {"format": FORMAT, "version": VERSION, "spec": dataclasses.asdict(spec)}
    record = json.loads(json.dumps(record))  # as it reads back: tuples become lists
    folder = Path(folder)
    if _read_record(folder) == record:
        return

    def on_wait() -> None:
        say(f"{folder}: another process writes it; waiting for that")

    with exclusive(folder.with_name(f".{folder.name}.lock"), on_wait):
        there = _read_record(folder)
        if there == record:
            return
        if there is not None and there.get("version") == VERSION:
            raise ValueError(
                f"{folder}: holds the shapes benchmark of {_difference(there, record)}; name another folder "
                "(data.root=FOLDER in a config), or remove it"
            )
        unfinished = _claim_folder(folder)
        for _ in _write_images(folder, spec):
            progress()
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(unfinished, folder / "shapes.json")


def generate_shapes(folder: Path, spec: ShapesSpec | None = None) -> None:
    """Write the embedded benchmark on rank 0, if it does not exist yet; the other ranks wait."""
    made = spec or ShapesSpec()

    def write() -> None:
        with Progress(f"write {folder}", made.num_images) as progress:
            write_shapes(folder, made, progress.advance)

    on_main(write)


def _difference(there: dict, record: dict) -> str:
    """Say in which settings the benchmark that is there differs from the one to be written."""
    old, new = there.get("spec", {}), record["spec"]
    return ", ".join(f"{key} {old.get(key)}, not {new[key]}" for key in new if old.get(key) != new[key])


def _read_record(folder: Path) -> dict | None:
    """Read ``shapes.json``, or return None where this module has written none."""
    try:
        record = json.loads((folder / "shapes.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


OWN_PATHS = re.compile(
    r"(train|val)(\.json|/\d{6,}\.jpg)?"
    rf"|image_level(/({'|'.join(CLASS_NAMES)})(/\d{{6,}}\.jpg)?)?"
    r"|image_level_boxes\.json|shapes\.json(\.unfinished)?"
)


def _claim_folder(folder: Path) -> Path:
    """Empty a folder of what `write_shapes` made and leave its mark, later renamed to ``shapes.json``.

    The mark is written before the first file, so a folder without it, if not empty, is somebody else's.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the shapes benchmark")
    mark = folder / "shapes.json.unfinished"
    found = sorted(folder.rglob("*"), reverse=True)  # children before their folder
    ours = mark.exists() or _read_record(folder) is not None
    for path in found:
        if not ours or path.is_symlink() or not OWN_PATHS.fullmatch(path.relative_to(folder).as_posix()):
            raise ValueError(
                f"{path} was not made by the shapes benchmark, which therefore does not touch {folder};"
                " name a new folder, or move that file away"
            )
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for path in found:
        if path != mark:
            path.rmdir() if path.is_dir() else path.unlink()
    return mark


def _write_images(folder: Path, spec: ShapesSpec) -> Iterator[None]:
    """Write all images and the files of their boxes; yields after each image."""
    yield from _write_split(folder, spec, TRAIN, "train", train_image_counts(spec), spec.train_images)
    yield from _write_split(folder, spec, VAL, "val", val_image_counts(spec), spec.val_images)
    boxes = {}
    for label, name in enumerate(CLASS_NAMES):
        for i in range(spec.image_level_per_class):
            scene = draw_scene(
                np.random.default_rng([spec.seed, IMAGE_LEVEL, label * spec.image_level_per_class + i]),
                np.array([label]),
                image_size=spec.image_level_size,
                object_size=spec.image_level_object_size,
                backdrop=draw_studio,
            )
            file = f"{name}/{i + 1:06d}.jpg"
            _write_jpeg(folder / "image_level" / file, scene.image)
            boxes[file] = scene.boxes[0].tolist()
            yield
    (folder / "image_level_boxes.json").write_text(json.dumps(boxes))


def _write_split(
    folder: Path, spec: ShapesSpec, stream: int, split: str, counts: np.ndarray, num_images: int
) -> Iterator[None]:
    plan = deal_classes(
        counts, num_images, spec.max_objects, np.random.default_rng([spec.seed, PLAN, stream])
    )
    images: list[dict] = []
    annotations: list[dict] = []
    for i, labels in enumerate(plan):
        scene = draw_scene(
            np.random.default_rng([spec.seed, stream, i]),
            labels,
            image_size=spec.image_size,
            object_size=spec.object_size,
            backdrop=draw_gradient,
        )
        images.append(_image_entry(i + 1, f"{split}/{i + 1:06d}.jpg", spec.image_size, labels))
        annotations += _annotation_entries(i + 1, len(annotations) + 1, labels, scene)
        _write_jpeg(folder / images[-1]["file_name"], scene.image)
        yield
    content = {"categories": category_entries(spec), "images": images, "annotations": annotations}
    (folder / f"{split}.json").write_text(json.dumps(content))


def _image_entry(image_id: int, file_name: str, size: int, labels: np.ndarray) -> dict:
    return {
        "id": image_id,
        "file_name": file_name,
        "width": size,
        "height": size,
        "neg_category_ids": [c + 1 for c in range(len(CLASSES)) if c not in labels],
        "not_exhaustive_category_ids": [],
    }


def _annotation_entries(image_id: int, first_id: int, labels: np.ndarray, scene: Scene) -> list[dict]:
    entries = []
    for k, (x1, y1, x2, y2) in enumerate(scene.boxes.tolist()):
        entries.append(
            {
                "id": first_id + k,
                "image_id": image_id,
                "category_id": int(labels[k]) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(scene.masks[k].sum()),  # of the object, not of the box, as in LVIS
                "segmentation": [],
            }
        )
    return entries


def category_entries(spec: ShapesSpec) -> list[dict]:
    """Return the categories of both files; as in LVIS, counts and frequency are those of training."""
    entries = []
    for label, count in enumerate(train_image_counts(spec).tolist()):
        frequency = frequency_group(count)
        entry = {"id": label + 1, "name": CLASS_NAMES[label], "synset": "", "frequency": frequency}
        entries.append(entry | {"image_count": count, "instance_count": count})
    return entries


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_jpeg(torch.from_numpy(image), quality=JPEG_QUALITY).numpy().tobytes())
