"""Pre-defined regions: where the instance that an image-level image is labelled with lies (IV-A.3)."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clis import boxes as box_ops
from clis.config import IMAGE_LEVEL_FIELDS, Config, data_path, load_config, merge_overrides
from clis.data.annotations import check_same_categories
from clis.data.image_level import ImageLevelIndex
from clis.data.images import ImageError, decode_image
from clis.data.loader import image_loader
from clis.data.regions import REGION_DTYPE, RegionSource, region_sidecar
from clis.distributed import barrier, is_main, rank, world_size
from clis.engine.bad_images import check_bad_images
from clis.engine.checkpoint import load_detector
from clis.engine.log import Progress, say
from clis.engine.streams import make_index, read_annotations, regions_file
from clis.files import written_whole
from clis.models import CLISDetector, ImageDetections

DETECTOR_RULES = ("category-rank-first", "top-score")
"""The rules of `regions.rule` that a detector applies."""

FLUSH_EVERY = 256
"""Images after which finished rows are forced to the disk, so that an interrupted run goes on from there."""

Rule = Callable[[list[int], list[Tensor]], list[tuple[Tensor, float]]]
"""Rows of the index and their images to a box [4] and a score each; the box is NaN where there is none."""


def detector_config(config: Config, overrides: Sequence[str] = ()) -> Config | None:
    """The config of the detector that finds the regions, if the config names one by its config.

    Overrides hold for it too, but for those of clis, loss, regions, pretrain and the image-level stream. With
    ``output=FOLDER`` its run folder is FOLDER/detector.
    """
    source = config.regions.detector
    if config.clis.s == 0 or config.regions.rule not in DETECTOR_RULES or source is None:
        return None
    if Path(source).suffix not in (".yaml", ".yml"):
        return None
    passed = detector_overrides(overrides)
    if any(_section(override) == "output" for override in overrides):
        passed.append(f"output={Path(config.output, 'detector')}")
    return load_config(source, passed)


def detector_overrides(overrides: Sequence[str]) -> list[str]:
    """Those of a run's overrides that hold for the detector of its regions too."""
    passed = []
    for override in overrides:
        section = _section(override)
        if section == "data":
            fields = merge_overrides({}, [override])["data"]
            passed += [
                f"data.{name}={json.dumps(value, ensure_ascii=False)}"
                for name, value in fields.items()
                if name not in IMAGE_LEVEL_FIELDS
            ]
        elif section not in ("clis", "loss", "regions", "pretrain", "output"):
            passed.append(override)
    return passed


def _section(override: str) -> str:
    return override.partition("=")[0].strip().split(".")[0]


def find_regions(config: Config, device: torch.device, detector: Config | None = None) -> None:
    """Makes the region file of the config, if it is not there, by `detector` or `regions.detector`."""
    path = regions_file(config)
    if path.exists():
        say(f"{path} is there already")
        return
    annotations = read_annotations(data_path(config, config.data.train))
    index = make_index(config, annotations)
    if config.regions.rule not in DETECTOR_RULES:
        make_regions(config, index, None, path)
        return
    detector = detector or detector_config(config)
    checkpoint = detector_checkpoint(config, detector)
    model = load_detector(checkpoint, device)
    check_same_categories(model.categories, str(checkpoint), annotations.categories, annotations.path)
    make_regions(config, index, model, path)


def detector_checkpoint(config: Config, detector: Config | None) -> Path:
    """The checkpoint that finds the regions: of `detector` if it is to be trained, else `regions.detector`'s.

    Raises:
        ValueError: the config names none.
    """
    source = config.regions.detector if detector is None else detector.output
    if source is None:
        raise ValueError(
            f"{regions_file(config)} does not exist, and the rule {config.regions.rule} makes it with a "
            "detector: name a checkpoint, a run folder or a config in regions.detector"
        )
    return Path(source) if Path(source).suffix == ".pt" else Path(source, "checkpoints", "last.pt")


def make_regions(config: Config, index: ImageLevelIndex, detector: CLISDetector | None, path: Path) -> None:
    """Writes `regions.npy`, one `REGION_DTYPE` row an image in the index's order, and its sidecar JSON.

    Every process takes a share of the images. Rows are kept in a partial file beside it, so that an
    interrupted run goes on where it was. An image without a box gets its centre box, flagged as a fallback.

    Args:
        detector: finds the boxes for `category-rank-first` and `top-score`; None for the other rules.

    Raises:
        FileNotFoundError, ValueError: the boxes of the rule `given` cannot be read.
        ImageError: more images than `data.max_bad_images` cannot be read.
    """
    sidecar = region_sidecar(index, config.regions.rule, detector_of(config))
    partial = path.with_name(path.stem + ".partial.npy")
    if is_main():
        _open_partial(partial, sidecar, len(index))
    barrier()
    table = np.load(partial, mmap_mode="r+")
    pending = np.flatnonzero(table["source"] == RegionSource.PENDING)
    barrier()  # all have the same list before anyone writes a row
    if len(pending) < len(index):
        say(f"{len(index) - len(pending)} of {len(index)} regions are there already")
    mine = pending[rank() :: world_size()]
    rule = _rule(config, index, detector)
    loader = image_loader(
        functools.partial(_read, index), mine, config.regions.images_per_batch, config.data.workers
    )
    unreadable = []
    with Progress("regions", len(mine)) as progress:
        for rows, images in loader:
            unreadable += [image for image in images if isinstance(image, str)]
            check_bad_images(unreadable, config.data.max_bad_images)
            _fill(table, rows, images, rule)
            progress.advance(len(rows))
            if progress.done // FLUSH_EVERY > (progress.done - len(rows)) // FLUSH_EVERY:
                table.flush()
    table.flush()
    barrier()
    if is_main():
        _check_complete(partial)
        counts = Counter(RegionSource(source).name.lower() for source in np.load(partial)["source"].tolist())
        with written_whole(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(sidecar | {"counts": counts}, indent=1) + "\n")
        partial.replace(path)
        partial.with_suffix(".json").unlink()
        say(f"{path}: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}")
    barrier()


def _check_complete(partial: Path) -> None:
    pending = int((np.load(partial, mmap_mode="r")["source"] == RegionSource.PENDING).sum())
    if pending:
        raise ValueError(
            f"{partial}: {pending} regions are missing, which happens where several machines write to one "
            "file over a network; the same command on one machine makes the missing ones"
        )


def detector_of(config: Config) -> str | None:
    """What the sidecar says that the boxes come from: the detector, the given file by its hash, or None."""
    if config.regions.rule == "given":
        path = data_path(config, config.regions.boxes)
        return f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else str(path)
    return config.regions.detector if config.regions.rule in DETECTOR_RULES else None


def _open_partial(partial: Path, sidecar: dict[str, object], length: int) -> None:
    """An all-pending table, unless there is one of the same index, rule and detector to go on with."""
    note = partial.with_suffix(".json")
    if partial.exists() and note.exists() and json.loads(note.read_text()) == sidecar:
        return
    with written_whole(partial) as temporary:
        np.save(temporary, np.zeros(length, dtype=REGION_DTYPE))
    with written_whole(note) as temporary:
        temporary.write_text(json.dumps(sidecar))


def _read(index: ImageLevelIndex, row: int) -> Tensor | str:
    """The image, or what is wrong with it."""
    try:
        return decode_image(index.read(row), index.name(row))
    except ImageError as error:
        return str(error)


def _fill(table: np.ndarray, rows: list[int], images: list[Tensor | str], rule: Rule) -> None:
    """Writes the rows' regions; the source last, since it marks a row as done."""
    readable = [place for place, image in enumerate(images) if not isinstance(image, str)]
    found = {}
    if readable:
        boxes = rule([rows[place] for place in readable], [images[place] for place in readable])
        found = dict(zip(readable, boxes))
    for place, row in enumerate(rows):
        if place not in found:
            table[row] = (0.0, 0.0, RegionSource.UNREADABLE)
            continue
        box, score = found[place]
        has_area = bool((box[2:] > box[:2]).all())  # also false for NaN
        if not has_area:
            box, score = center_box(images[place]), 0.0
        source = RegionSource.RULE if has_area else RegionSource.FALLBACK
        table[row] = (box.cpu().numpy(), float(score), source)


def _rule(config: Config, index: ImageLevelIndex, detector: CLISDetector | None) -> Rule:
    name = config.regions.rule
    if name == "center":
        return lambda rows, images: [(center_box(image), 1.0) for image in images]
    if name == "full":
        return lambda rows, images: [(_full_box(image), 1.0) for image in images]
    if name == "given":
        boxes, nothing = read_given_boxes(config, index), torch.full((4,), torch.nan)
        return lambda rows, images: [
            (box_ops.clip(boxes.get(index.name(row), nothing), tuple(image.shape[1:])), 1.0)
            for row, image in zip(rows, images)
        ]
    if name == "top-score":
        return lambda rows, images: [_top_score(found) for found in detector.detect(images)]
    return lambda rows, images: detector.rank_first(images, torch.from_numpy(index.labels[rows].astype(int)))


def read_given_boxes(config: Config, index: ImageLevelIndex) -> dict[str, Tensor]:
    """The file of the rule ``given``: a box, float32 [4], xyxy, by the name of its image.

    Raises:
        FileNotFoundError, ValueError: it is missing, not a JSON file of boxes, or of none of these images.
    """
    path = data_path(config, config.regions.boxes)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; regions.boxes names it")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {{image: [x1, y1, x2, y2]}} is needed, not a {type(values).__name__}")
    boxes = {}
    for name, box in values.items():
        try:
            boxes[name] = torch.tensor(box, dtype=torch.float32).reshape(4)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{path}: {name}: [x1, y1, x2, y2] is needed, not {box!r}") from None
        x1, y1, x2, y2 = boxes[name].tolist()
        if not (x2 > x1 and y2 > y1):
            raise ValueError(f"{path}: {name}: the box {box} has no area; remove it or mend it")
    if not any(index.name(row) in boxes for row in range(len(index))):
        raise ValueError(f"{path}: no box of data.image_level's images; they are called e.g. {index.name(0)}")
    return boxes


def center_box(image: Tensor) -> Tensor:
    """The central box of half the area, sides in the image's proportions; [4]."""
    full = _full_box(image)
    return full[[2, 3, 2, 3]] * torch.tensor([0.5 - 0.125**0.5] * 2 + [0.5 + 0.125**0.5] * 2)


def _full_box(image: Tensor) -> Tensor:
    return torch.tensor([0, 0, image.shape[2], image.shape[1]], dtype=torch.float32)


def _top_score(found: ImageDetections) -> tuple[Tensor, float]:
    if len(found.boxes) == 0:
        return torch.full((4,), torch.nan), 0.0
    return found.boxes[0], float(found.scores[0])
