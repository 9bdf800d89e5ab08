"""Pre-defined regions: where in an image-level image the instance of its label is (section IV-A.3)."""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clis import boxes as box_ops
from clis.atomic import atomic_write
from clis.config import DETECTOR_RULES, Config, RegionsConfig, data_path
from clis.data.categories import check_same_categories
from clis.data.image_level import ImageLevelIndex, LabeledImages
from clis.data.images import ImageError, open_image
from clis.data.loader import batches_by_shape, image_loader
from clis.data.region_file import REGION_DTYPE, RegionSource, region_sidecar
from clis.data.streams import make_index, read_annotations
from clis.distributed import from_all, is_main, on_main, rank, world_size
from clis.engine.at_work import only_maker
from clis.engine.bad_images import check_bad_images
from clis.engine.checkpoint import load_detector
from clis.engine.memory import memory_advice
from clis.engine.optim import autocast
from clis.engine.prerequisites import checkpoint_of
from clis.engine.region_parts import RegionParts, remove_parts
from clis.engine.run_folder import regions_file
from clis.models import CLISDetector
from clis.progress import Progress, say
from clis.resize import padded_size, scale_boxes, shortest_size
from clis.text import counted, printable

SOURCE_WORDS = {
    "rule": "by the rule",
    "fallback": "center boxes where it gave none",
    "unreadable": "of images that cannot be read",
}
"""What the counts of each `RegionSource` are called in the output."""


def find_regions(config: Config, device: torch.device, detector: Config | None) -> None:
    """Make the region file of the config, if it does not exist yet.

    Args:
        detector: the config that `regions.detector` names; None where it names a checkpoint or nothing.
    """
    path = regions_file(config)
    if on_main(path.exists):
        if is_main():
            remove_parts(path)  # of a process that died before it could
        say(f"{path} already exists")
        return
    with only_maker(path):
        if on_main(path.exists):  # another process has just made it
            say(f"{path} already exists")
            return
        index = make_index(config, read_annotations(data_path(config, config.data.train)))
        if config.regions.rule not in DETECTOR_RULES:
            make_regions(config, index, None, path)
            return
        model = load_searcher(config, device, detector)
        status = detector_checkpoint(config, detector).stat()
        steps = None if detector is None else detector.train.steps
        make_regions(config, index, model, path, f"{status.st_size} {status.st_mtime_ns}", steps)


def load_searcher(config: Config, device: torch.device, detector: Config | None) -> CLISDetector:
    """Load the trained detector that finds the regions of the config; `detector` as for `find_regions`.

    Raises:
        FileNotFoundError, ValueError: it is not trained yet, none is named, or it has other classes.
    """
    annotations = read_annotations(data_path(config, config.data.train))
    checkpoint = detector_checkpoint(config, detector)
    if detector is not None and not checkpoint.exists():
        raise FileNotFoundError(
            f"{checkpoint}: the detector that finds the regions is not trained yet; train it first: "
            f"python train.py --config {config.regions.detector}"
        )
    model = load_detector(checkpoint, device)
    model.calibration = None  # it compares classes, and the search ranks boxes within one
    check_same_categories(model.categories, str(checkpoint), annotations.categories, annotations.path)
    return model


def detector_checkpoint(config: Config, detector: Config | None) -> Path:
    """Return the checkpoint that finds the regions; `detector` as for `find_regions`.

    Raises:
        ValueError: the config names none.
    """
    if config.regions.detector is None:
        raise ValueError(
            f"{regions_file(config)} does not exist, and the rule {config.regions.rule} makes it with a "
            "detector: name a checkpoint, a run folder or a config in regions.detector"
        )
    return checkpoint_of(config.regions.detector, detector)


def make_regions(
    config: Config,
    index: ImageLevelIndex,
    detector: CLISDetector | None,
    path: Path,
    stamp: str = "",
    detector_steps: int | None = None,
) -> None:
    """Write `regions.npy`, one `REGION_DTYPE` row per image in the index's order, and its sidecar JSON.

    The processes share the images that are left and write what they find as `RegionParts`, so that an
    interrupted run resumes where it was, also on another number of processes; then rank 0 checks and joins
    them. An image without a box gets its center box, flagged as a fallback.

    Args:
        detector: finds the boxes for `category-rank-first` and `top-score`; None for the other rules.
        stamp: changes with the detector's weights; parts of another one are not resumed.
        detector_steps: of the detector's training, for the sidecar, if it is a config's.

    Raises:
        FileNotFoundError, ValueError: the boxes of the rule `given` cannot be read.
        ImageError: more images than `data.max_bad_images` cannot be read.
    """
    sidecar = region_sidecar(index, config.regions, detector_of(config))
    parts = RegionParts(path, len(index), {**sidecar, "stamp": stamp})

    def found_before() -> np.ndarray:
        parts.open(world_size())
        return parts.read()

    table = on_main(found_before)
    # what could not be read may have been restored
    pending = np.flatnonzero(np.isin(table["source"], (RegionSource.PENDING, RegionSource.UNREADABLE)))
    if len(pending) < len(index):
        say(f"{len(index) - len(pending)} of {len(index)} regions already exist")
    unreadable: list[str] = []
    mine, rule = pending[rank() :: world_size()], region_rule(config, index, detector)
    less = "a lower regions.images_per_batch, regions.short_side or regions.max_size"
    with (
        parts.writer(rank()) as write,
        Progress("regions", len(mine)) as progress,
        memory_advice(lambda: "search for regions", less),
    ):
        for rows, images in search_batches(config, index, mine.tolist(), detector):
            unreadable += [image for image in images if isinstance(image, str)]
            check_bad_images(unreadable, config.data.max_bad_images)
            write(rows, regions_of(rows, images, rule))
            progress.advance(len(rows))
    check_bad_images(list(chain(*from_all(unreadable))), config.data.max_bad_images)

    def join() -> None:
        table = parts.read()
        parts.check_complete(table, index)
        counts = Counter(RegionSource(source).name.lower() for source in table["source"].tolist())
        with atomic_write(path.with_suffix(".json")) as temporary:
            more = {"detector_steps": detector_steps, "counts": counts}
            temporary.write_text(json.dumps(sidecar | more, indent=1) + "\n")
        with atomic_write(path) as temporary:
            np.save(temporary, table)
        remove_parts(path)
        said = [f"{count} {words}" for name, words in SOURCE_WORDS.items() if (count := counts[name])]
        say(f"{path}: {counted(len(table), 'region')}, {', '.join(said)}")

    on_main(join)


def search_batches(
    config: Config, index: LabeledImages, rows: Sequence[int], detector: CLISDetector | None
) -> Iterator[tuple[list[int], list[ImageOfRow | str]]]:
    """Read the images of rows of the index, in batches of `regions.images_per_batch` of one padded size.

    An image that cannot be read is the message that says why, in a batch of its own.
    """
    size = config.regions.images_per_batch
    batches = image_loader(image_reader(config, index, detector), rows, size, config.data.workers)
    return batches_by_shape(batches, size, padded_sizes)


def given_boxes(config: Config) -> Path:
    """Return the path of the file of boxes of the rule ``given``."""
    return data_path(config, str(config.regions.boxes))


def detector_of(config: Config) -> str | None:
    """Return where the sidecar says that the boxes come from.

    That is the detector, or the path of the given file with its hash; None for rules that need neither.
    """
    if config.regions.rule == "given":
        path = given_boxes(config)
        return f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else str(path)
    return config.regions.detector if config.regions.rule in DETECTOR_RULES else None


class ImageOfRow(NamedTuple):
    """An image-level image, decoded at no more of its size than the search needs."""

    pixels: Tensor
    """uint8 [3,H,W]."""
    extent: tuple[float, float] | None
    """Height and width of `pixels` that the image fills, as from `EncodedImage.decode_reduced`."""
    size: tuple[int, int]
    """Height and width as stored."""
    sizes: list[tuple[int, int]]
    """Height and width of each size that it is looked at."""


Rule = Callable[[list[int], list[ImageOfRow]], list[tuple[Tensor, float]]]
"""Rows of the index and their images to a box [4] and a score each; NaN where there is none."""


def image_reader(
    config: Config, index: LabeledImages, detector: CLISDetector | None
) -> Callable[[int], ImageOfRow | str]:
    """Make the function that reads a row's image for the sizes of the config, or says what is wrong with it.

    A detector whose resizing has no antialiasing would see other pixels in an image that was decoded at a
    part of its size; it gets whole ones.
    """
    whole = detector is not None and detector.test_config.resize != "pillow"
    return functools.partial(_read, index, search_sizes(config.regions), whole, config.data.max_pixels)


def _read(
    index: LabeledImages, searched: list[tuple[int, int]], whole: bool, max_pixels: int, row: int
) -> ImageOfRow | str:
    try:
        image = open_image(index.read(row), index.name(row), max_pixels)
        sizes = [shortest_size(image.size, *each) for each in searched]  # the largest first
        pixels, extent = (image.decode(), None) if whole else image.decode_reduced(sizes[0])
        return ImageOfRow(pixels, extent, image.size, sizes)
    except ImageError as error:
        return str(error)


def padded_sizes(image: ImageOfRow | str) -> tuple[tuple[int, int], ...] | None:
    """Return what is equal for images that fill their batches alike; None for an unreadable image."""
    if isinstance(image, str):
        return None
    return tuple(map(padded_size, image.sizes))


def regions_of(rows: list[int], images: list[ImageOfRow | str], rule: Rule) -> np.ndarray:
    """Find the regions of rows of the index, `REGION_DTYPE` [n]."""
    regions = np.zeros(len(rows), dtype=REGION_DTYPE)
    regions["source"] = RegionSource.UNREADABLE
    readable = {place: image for place, image in enumerate(images) if not isinstance(image, str)}
    if not readable:
        return regions
    found = rule([rows[place] for place in readable], list(readable.values()))
    for (place, image), (box, score) in zip(readable.items(), found):
        has_area = _has_area(box)
        if not has_area:
            box, score = center_box(image.size), 0.0
        source = RegionSource.RULE if has_area else RegionSource.FALLBACK
        regions[place] = (box.numpy(), score, source)
    return regions


def _has_area(box: Tensor) -> bool:
    return bool((box[2:] > box[:2]).all())  # also false for NaN


def region_rule(config: Config, index: LabeledImages, detector: CLISDetector | None) -> Rule:
    """Make the function that finds what `regions.rule` says, at the sizes of the section."""
    name = config.regions.file_rule
    if name == "center":
        return lambda rows, images: [(center_box(image.size), 1.0) for image in images]
    if name == "full":
        return lambda rows, images: [(_full_box(image.size), 1.0) for image in images]
    if name == "given":
        boxes = read_boxes(given_boxes(config), index)
        nothing = torch.full((4,), torch.nan)
        return lambda rows, images: [
            (box_ops.clip(boxes.get(image_key(index.location(row)), nothing), image.size), 1.0)
            for row, image in zip(rows, images)
        ]
    find = _top_score if name == "top-score" else _rank_first
    assert detector is not None  # the other rules need one
    return lambda rows, images: _best_over_sizes(config, detector, images, index.labels[rows], find)


def _rank_first(
    detector: CLISDetector, images: list[Tensor], labels: np.ndarray, max_size: int
) -> list[tuple[Tensor, Tensor]]:
    return detector.rank_first(images, torch.from_numpy(labels.astype(np.int64)), max_size)


def _top_score(
    detector: CLISDetector, images: list[Tensor], labels: np.ndarray, max_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the best detection, whatever its class."""
    return [
        (each.boxes[0], each.scores[0])
        if len(each.boxes)
        else (each.boxes.new_full((4,), torch.nan), each.scores.new_zeros(()))
        for each in detector.detect_resized(images, max_size)
    ]


def _best_over_sizes(
    config: Config,
    detector: CLISDetector,
    images: Sequence[ImageOfRow],
    labels: np.ndarray,
    find: Callable[[CLISDetector, list[Tensor], np.ndarray, int], list[tuple[Tensor, Tensor]]],
) -> list[tuple[Tensor, float]]:
    """Return the box [4] of each image, in its stored pixels, and score that are best over `short_side`.

    Args:
        find: the rule, for images that have their size: boxes in their pixels, and scores.
    """
    best: list[tuple[Tensor, float]] = []
    for short_side, max_size in search_sizes(config.regions):
        sizes = [detector.resized_size(image.size, short_side, max_size) for image in images]
        resized = [detector.resize(image.pixels, size, image.extent) for image, size in zip(images, sizes)]
        with autocast(config.train.precision, resized[0].device):
            found = find(detector, resized, labels, max_size)
        boxes, scores = (torch.stack(column).cpu() for column in zip(*found))  # one wait for all
        stored = [
            (scale_boxes(box, size, image.size), float(score))
            for box, score, size, image in zip(boxes, scores, sizes, images)
        ]
        best = [max(pair, key=_rank) for pair in zip(best, stored)] if best else stored
    return best


def _rank(found: tuple[Tensor, float]) -> tuple[bool, float]:
    """Return the sort key that puts a box above none, then goes by the score."""
    box, score = found
    return _has_area(box), score


def search_sizes(regions: RegionsConfig) -> list[tuple[int, int]]:
    """Return short side and longest side of each size that the detector looks at, largest first."""
    largest = max(regions.short_side)
    return [(side, round(regions.max_size * side / largest)) for side in sorted(regions.short_side)[::-1]]


def read_boxes(path: Path, index: LabeledImages) -> dict[str, Tensor]:
    """Read a file as `regions.boxes` names one: a box, float32 [4], xyxy, by `image_key` of its image.

    Raises:
        FileNotFoundError, ValueError: it is missing, not a JSON file of boxes, or of none of these images.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of boxes")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {{image: [x1, y1, x2, y2]}} is needed, not a {type(values).__name__}")
    boxes = {}
    for name, box in values.items():
        try:
            corners = torch.tensor(box, dtype=torch.float32).reshape(4)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{path}: {name}: [x1, y1, x2, y2] is needed, not {box!r}") from None
        x1, y1, x2, y2 = corners.tolist()
        if not (x2 > x1 and y2 > y1):
            raise ValueError(f"{path}: {name}: the box {box} has no area; remove it or correct it")
        if image_key(name) in boxes:
            raise ValueError(f"{path}: {name} is there twice, in two forms of the name; remove one")
        boxes[image_key(name)] = corners
    keys = (image_key(index.location(row)) for row in range(len(index)))
    images = Counter(key for key in keys if key in boxes)
    if not images:
        raise ValueError(f"{path}: no box of data.image_level's images; they are called e.g. {index.name(0)}")
    name, most = images.most_common(1)[0]
    if most > 1:
        raise ValueError(
            f"{path}: {most} images of data.image_level are called {printable(name)}, so the box is "
            "ambiguous; rename all but one of them, or their folders"
        )
    return boxes


def image_key(name: str) -> str:
    """Return the form of an image's name that does not depend on how a system writes accents or folders."""
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def center_box(size: tuple[int, int]) -> Tensor:
    """Return the central box [4] of half the area of an image of `size`, in its proportions."""
    full = _full_box(size)
    return full[[2, 3, 2, 3]] * torch.tensor([0.5 - 0.125**0.5] * 2 + [0.5 + 0.125**0.5] * 2)


def _full_box(size: tuple[int, int]) -> Tensor:
    return torch.tensor([0, 0, size[1], size[0]], dtype=torch.float32)
