"""The embedded long-tailed benchmark: drawn scenes in LVIS form, image-level images of the same classes.

A class is an outline times a texture (10 x 5 = 50). Training scenes are long-tailed, validation scenes and
image-level images are balanced, and nothing is downloaded: the whole benchmark is a function of `ShapesSpec`.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
from clis.distributed import barrier, is_main
from clis.progress import Progress, say

FORMAT = "clis-shapes"
VERSION = 2
JPEG_QUALITY = 92
SUPERSAMPLING = 3
MAX_TILT = np.deg2rad(30)  # small networks should not have to learn full rotation invariance
RIM_WIDTH = 0.2  # of half the object's side
PLAN, TRAIN, VAL, IMAGE_LEVEL = range(4)  # second word of every random seed: [seed, stream, index]


@dataclass(frozen=True, kw_only=True)
class ShapesSpec:
    """Everything the benchmark depends on; equal specs give equal files.

    Raises ValueError where the scenes cannot hold every class or an object would be too small to tell.
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

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"ShapesSpec.seed is {self.seed}; use a non-negative integer")
        if not 1.5 <= self.mean_objects <= self.max_objects <= 8:
            raise ValueError(
                f"ShapesSpec.mean_objects is {self.mean_objects} and max_objects {self.max_objects};"
                " use 1.5 <= mean_objects <= max_objects <= 8"
            )
        self._check_object_size("object_size", self.image_size)
        self._check_object_size("image_level_object_size", self.image_level_size)
        if self.image_level_per_class < 1:
            raise ValueError(
                f"ShapesSpec.image_level_per_class is {self.image_level_per_class}; use at least 1"
            )
        self._check_room("train_images", train_image_counts(self))
        self._check_room("val_images", val_image_counts(self))

    def _check_object_size(self, name: str, image_size: int) -> None:
        smallest, largest = getattr(self, name)
        if not 10 / image_size <= smallest <= largest <= 1:
            raise ValueError(
                f"ShapesSpec.{name} is {smallest, largest} of {image_size} pixels;"
                " use 10 pixels <= smallest <= largest <= the whole image"
            )

    def _check_room(self, name: str, counts: np.ndarray) -> None:
        images = getattr(self, name)
        if not images <= counts.sum() <= self.max_objects * images:
            raise ValueError(
                f"ShapesSpec.{name} is {images}: too few for {len(CLASSES)} classes in scenes of 1 to"
                f" {self.max_objects} objects; use more images"
            )


# Outlines: the depth of a point below the outline, positive inside, in units of half the object's side; x
# points right and y down. Only the sign (the outline) and small values (the rim) need to be right.


def _regular(x: np.ndarray, y: np.ndarray, corners: int, radius: float) -> np.ndarray:
    normals = [(2 * k + 1) * math.pi / corners for k in range(corners)]  # of the edges, from upwards
    beyond = [math.sin(angle) * x - math.cos(angle) * y for angle in normals]
    return radius * math.cos(math.pi / corners) - np.maximum.reduce(beyond)


def _star(x: np.ndarray, y: np.ndarray, tip: float = 1.2, notch: float = 0.6) -> np.ndarray:
    step = 2 * math.pi / 5
    from_tip = np.arctan2(x, -y)
    from_tip -= step * np.rint(from_tip / step)
    along, across = np.hypot(x, y) * np.cos(from_tip), np.hypot(x, y) * np.abs(np.sin(from_tip))
    edge_along, edge_across = tip - notch * math.cos(step / 2), notch * math.sin(step / 2)
    return (edge_across * (tip - along) - edge_along * across) / math.hypot(edge_along, edge_across)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(1 - np.maximum(x, y), 0.4 - np.minimum(x, y))


def _heart(x: np.ndarray, y: np.ndarray, half: float = 0.82, middle: float = 0.08) -> np.ndarray:
    """Join a square on its corner with a disk on each upper edge."""
    x, y = np.abs(x), y - middle
    square = (half - x - np.abs(y)) / math.sqrt(2)
    return np.maximum(square, half / math.sqrt(2) - np.hypot(x - half / 2, y + half / 2))


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    head = np.minimum((1 + y - x) / math.sqrt(2), 0.08 - y)
    shaft = np.minimum(np.minimum(0.4 - x, 1 - y), y + 0.6)
    return np.maximum(head, shaft)


OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "triangle": lambda x, y: _regular(x, y, 3, 1.25),
    "square": lambda x, y: 0.88 - np.maximum(np.abs(x), np.abs(y)),
    "pentagon": lambda x, y: _regular(x, y, 5, 1.08),
    "star": _star,
    "cross": _cross,
    "ring": lambda x, y: np.minimum(1 - np.hypot(x, y), np.hypot(x, y) - 0.38),
    "heart": _heart,
    "moon": lambda x, y: np.minimum(1 - np.hypot(x, y), np.hypot(x - 0.62, y) - 0.72),
    "arrow": _arrow,
    "disk": lambda x, y: 1 - np.hypot(x, y),
}


def _fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)  # several times as fast as x % 1


# Textures: where the second color shows, from shifted coordinates and the depth below the outline.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda x, y, depth: np.zeros(x.shape, bool),
    "stripes": lambda x, y, depth: _fraction(y / 0.55) < 0.5,
    "dots": lambda x, y, depth: np.hypot(_fraction(x / 0.6) - 0.5, _fraction(y / 0.6) - 0.5) < 0.34,
    "checks": lambda x, y, depth: (_fraction(x / 0.84) < 0.5) ^ (_fraction(y / 0.84) < 0.5),
    "rim": lambda x, y, depth: depth < RIM_WIDTH,
}

CLASSES: tuple[tuple[str, str], ...] = tuple(
    (texture, outline) for outline in OUTLINES for texture in TEXTURES
)
"""(texture, outline) of each label."""
CLASS_NAMES: tuple[str, ...] = tuple(f"{texture}_{outline}" for texture, outline in CLASSES)
"""Name of each label, e.g. ``stripes_star``; the category id is the label + 1."""


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


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One drawn image with N objects."""

    image: np.ndarray
    """uint8 [3, S, S], RGB."""
    boxes: np.ndarray
    """int64 [N, 4], xyxy in pixels, x2 and y2 exclusive: tight around each mask."""
    masks: np.ndarray
    """bool [N, S, S], pixels of which the object covers at least half; no two overlap."""


def draw_scene(
    rng: np.random.Generator,
    labels: np.ndarray,
    *,
    image_size: int,
    object_size: tuple[float, float],
    backdrop: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]],
) -> Scene:
    """Draw one object of each label in `labels` (int [N], 0..49) on a backdrop, all of them wholly visible.

    `object_size` is the range of an object's side as a fraction of `image_size`; `backdrop` is
    `draw_gradient` or `draw_studio`.
    """
    image, palette = backdrop(rng, image_size)
    sides = np.sort(rng.uniform(*object_size, len(labels)))[::-1]  # the largest is placed first
    sides = sides * min(1, np.sqrt(0.6 / (sides**2).sum())) * image_size
    masks = np.zeros((len(labels), image_size, image_size), bool)
    boxes = np.zeros((len(labels), 4), np.int64)
    for k in range(len(labels)):
        alpha, color = _place_object(rng, labels[k], sides[k], palette, np.any(masks[:k], axis=0), boxes[:k])
        image += alpha * (color - image)
        masks[k] = alpha >= 0.5
        boxes[k] = _tight_box(masks[k])
    return Scene(image=np.rint(255 * image.clip(0, 1)).astype(np.uint8), boxes=boxes, masks=masks)


def draw_object(
    rng: np.random.Generator, label: int, side: float, palette: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one object with a random tilt, texture phase and two colors unlike `palette`, [K, 3] in 0..1.

    `side` is the side, in pixels, of the square in which the upright outline is drawn. Returns the coverage,
    [h, w] in 0..1 and trimmed to the object, and its color, [3, h, w] in 0..1.
    """
    texture, outline = CLASSES[label]
    pixels = int(np.ceil(1.5 * side)) + 1
    line = ((np.arange(pixels * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - pixels / 2) * (2 / side)
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)
    along, across = (np.cos(tilt) * line).astype(np.float32), (np.sin(tilt) * line).astype(np.float32)
    x, y = along[None, :] + across[:, None], along[:, None] - across[None, :]
    depth = OUTLINES[outline](x, y)
    shift_x, shift_y = rng.uniform(0, 1, 2).tolist()  # Python floats keep x and y in float32
    inside = depth > 0
    alpha = _average(inside)
    share = _average(inside & TEXTURES[texture](x + shift_x, y + shift_y, depth)) / np.maximum(alpha, 1e-6)
    first = _contrasting_color(rng, palette)
    second = _contrasting_color(rng, np.vstack([palette, first]))
    x1, y1, x2, y2 = _tight_box(alpha > 0)
    color = first[:, None, None] + (second - first)[:, None, None] * share
    return alpha[y1:y2, x1:x2], color[:, y1:y2, x1:x2]


def _average(samples: np.ndarray) -> np.ndarray:
    """Average the SUPERSAMPLING x SUPERSAMPLING boolean samples of each pixel."""
    samples, n = samples.view(np.uint8), SUPERSAMPLING
    none = np.zeros_like(samples[::n, ::n])
    return sum((samples[i::n, j::n] for i in range(n) for j in range(n)), start=none) / n**2


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _contrasting_color(rng: np.random.Generator, others: np.ndarray, contrast: float = 0.6) -> np.ndarray:
    """Draw a color that differs from all `others` [K, 3]; brightness counts twice, as JPEG blurs chroma."""
    candidates = rng.uniform(0, 1, (64, 3))
    difference = candidates[:, None] - others
    brightness = np.abs(difference @ np.array([0.299, 0.587, 0.114]))
    nearest = (np.sqrt((difference**2).sum(2)) / 2 + brightness).min(1)
    enough = np.flatnonzero(nearest >= contrast)
    return candidates[enough[0] if len(enough) else nearest.argmax()]


def _place_object(
    rng: np.random.Generator,
    label: int,
    side: float,
    palette: np.ndarray,
    occupied: np.ndarray,
    boxes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an object where there is room, shrinking it until there is: `draw_object` on the full canvas."""
    size = len(occupied)
    while True:
        patch, patch_color = draw_object(rng, label, side, palette)
        height, width = patch.shape
        for _ in range(40 if max(height, width) <= size else 0):
            top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
            window = np.s_[..., top : top + height, left : left + width]
            box = np.array([left, top, left + width, top + height])
            if not (occupied[window] & (patch > 0)).any() and not _covers(box, boxes):
                alpha, color = np.zeros((size, size)), np.zeros((3, size, size))
                alpha[window], color[window] = patch, patch_color
                return alpha, color
        side *= 0.9


def _covers(box: np.ndarray, boxes: np.ndarray, share: float = 0.15) -> bool:
    """Check whether `box` and any of `boxes` share more than `share` of the smaller one."""
    overlap = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    smaller = np.minimum(np.prod(box[2:] - box[:2]), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    return bool((np.prod(overlap.clip(0), axis=1) > share * smaller).any())


def draw_gradient(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the backdrop of a scene: a two-color gradient with faint blobs and lines.

    Returns the image, float64 [3, size, size] in 0..1, and its two main colors, [2, 3].
    """
    palette = _related_colors(rng)
    across = _ramp(rng, size)
    mix = (across - across.min()) / np.ptp(across)
    image = palette[0][:, None, None] + (palette[1] - palette[0])[:, None, None] * mix
    for _ in range(rng.integers(3, 7)):
        image += _faint(rng, 0.12) * _blob(rng, size)
    for _ in range(rng.integers(2, 5)):
        image += _faint(rng, 0.12) * (np.abs(_ramp(rng, size) - rng.uniform(-0.6, 0.6)) < 0.015)
    return image + rng.normal(0, 0.01, image.shape), palette


def draw_studio(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the backdrop of an image-level image: one color, waves or noise, with a few larger blobs.

    Returns the same as `draw_gradient`.
    """
    palette = _related_colors(rng)
    style = rng.integers(3)
    if style == 0:
        mix = np.zeros((size, size))
    elif style == 1:
        mix = 0.5 + 0.5 * np.sin(_ramp(rng, size) * rng.uniform(20, 60))
    else:
        mix = rng.uniform(0, 1, (size, size))
    image = palette[0][:, None, None] + (palette[1] - palette[0])[:, None, None] * mix
    for _ in range(rng.integers(1, 4)):
        image += _faint(rng, 0.2) * _blob(rng, size)
    return image, palette


def _related_colors(rng: np.random.Generator) -> np.ndarray:
    """Draw two colors of a backdrop, [2, 3], near enough that an object can differ from both."""
    first = rng.uniform(0.1, 0.9, 3)
    return np.stack([first, (first + rng.normal(0, 0.15, 3)).clip(0, 1)])


def _faint(rng: np.random.Generator, strength: float) -> np.ndarray:
    return rng.uniform(-strength, strength, (3, 1, 1))


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the signed distance, [size, size] in image sides, to a random line through the middle."""
    line = (np.arange(size) + 0.5) / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    return np.cos(angle) * line[None, :] + np.sin(angle) * line[:, None]


def _blob(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a soft spot of random place and extent, [size, size] in 0..1."""
    line = (np.arange(size) + 0.5) / size
    middle, extent = rng.uniform(0, 1, 2), rng.uniform(0.04, 0.15, 2)
    profile = np.exp(-(((line - middle[:, None]) / extent[:, None]) ** 2))
    return profile[0][None, :] * profile[1][:, None]


def write_shapes(
    folder: Path,
    spec: ShapesSpec = ShapesSpec(),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the benchmark into `folder`, unless it already holds the one of an equal spec.

    Makes ``train.json`` and ``val.json`` (LVIS v1 form, exhaustively annotated, file names relative to
    `folder`), ``train/000001.jpg`` and so on, ``image_level/<class name>/000001.jpg`` and so on, the boxes of
    the latter in ``image_level_boxes.json`` (for `regions.boxes`, as an oracle), and finally ``shapes.json``,
    whose presence means that the rest is complete. A folder that this function left incomplete or wrote from
    another spec is rewritten. `progress` gets the number of images done and to do, after each image. Of
    several processes one writes it, and the others wait.

    Raises ValueError where `folder` holds anything that this function did not make; nothing is changed then.
    """
    record = {"format": FORMAT, "version": VERSION, "spec": dataclasses.asdict(spec)}
    record = json.loads(json.dumps(record))  # as it reads back: tuples become lists
    folder = Path(folder)
    if _read_record(folder) == record:
        return

    def on_wait() -> None:
        say(f"{folder}: another process writes it; waiting for that")

    with exclusive(folder.with_name(f".{folder.name}.lock"), on_wait):
        if _read_record(folder) == record:
            return
        unfinished = _claim_folder(folder)
        for done, _ in enumerate(_write_images(folder, spec), start=1):
            if progress is not None:
                progress(done, spec.num_images)
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(unfinished, folder / "shapes.json")


def generate_shapes(folder: Path, spec: ShapesSpec | None = None) -> None:
    """Write the embedded benchmark on rank 0, if it does not exist yet; the other ranks wait."""
    spec = spec or ShapesSpec()
    if is_main():
        with Progress(f"write {folder}", spec.num_images) as progress:
            write_shapes(folder, spec, lambda *_: progress.advance())
    barrier()


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
