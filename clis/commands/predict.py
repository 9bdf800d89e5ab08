"""``python -m clis predict``: a detector's findings in anyone's photos, as pictures, JSON and a page."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clis.atomic import atomic_write, check_writable
from clis.commands.arguments import class_labels, positive, split_overrides
from clis.commands.predict_files import Annotated, ImageFile, find_annotated, find_images, picture_names
from clis.config import Config
from clis.data.annotated_images import check_size
from clis.data.categories import Category
from clis.data.images import FORMATS, ImageError, open_image, read_bytes, read_photo
from clis.data.loader import batches_by_shape, image_loader
from clis.distributed import choose_device
from clis.drawing import Mark, class_color, draw_marks, picture_of
from clis.engine.evaluate import load_for_inference
from clis.engine.optim import autocast
from clis.engine.run_folder import find_checkpoint
from clis.metric.detections import Detections
from clis.models import CLISDetector
from clis.models.roi import ImageDetections
from clis.pages import MissingExtra, render
from clis.progress import Progress, say
from clis.resize import image_size
from clis.text import counted, printable

PICTURES, PREDICTIONS, IMAGES, PAGE = "pictures", "predictions.json", "images.json", "index.html"
NAMED = 10
"""Unreadable files that are named on the terminal; images.json has them all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis predict`."""
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="a run folder (its last.pt) or a checkpoint")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE",
        help="an image file, a folder with all below it, or a glob; key=value changes the detector's config, "
        "e.g. data.root=/datasets for a calibration that measures the training annotations",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("runs/predict"), metavar="FOLDER",
        help="folder for pictures, page and JSON files (default runs/predict)",
    )  # fmt: skip
    parser.add_argument("--score", type=float, default=0.3, help="minimum score (default 0.3)")
    parser.add_argument(
        "--top", type=positive, default=100, metavar="N", help="best N per image (default 100)"
    )
    parser.add_argument("--classes", metavar="NAME,NAME,...", help="keep these classes alone")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: CUDA if available)")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="images at once (default 1)")
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE",
        help="take the image ids of this LVIS or COCO-form file, so that `clis score` can judge the result",
    )  # fmt: skip
    parser.add_argument("--no-pictures", action="store_true", help="write the JSON files alone")


def run(arguments: argparse.Namespace) -> None:
    """Detect objects in images, and write what is found as JSON, pictures and a page.

    Raises:
        FileNotFoundError, ValueError: an argument is wrong, or no image can be read.
    """
    if not 0 <= arguments.score <= 1:
        raise ValueError(f"--score {arguments.score}: must be between 0 and 1")
    out, stored = arguments.out, arguments.annotations is not None
    if stored and not arguments.annotations.exists():
        raise FileNotFoundError(f"--annotations {arguments.annotations}: no such file")
    sources, overrides = split_overrides(arguments.sources, "source")
    files, others = find_images(sources, [out / name for name in (PICTURES, PREDICTIONS, IMAGES, PAGE)])
    checkpoint = find_checkpoint(arguments.run)
    detector, config = load_for_inference(checkpoint, choose_device(arguments.device, "--device "), overrides)
    labels = None
    if arguments.classes is not None:
        labels = torch.tensor(class_labels(arguments.classes, detector.categories))
    selection = Selection(arguments.score, arguments.top, labels)
    known = None
    if stored:
        known, kept = find_annotated(arguments.annotations, files, detector.categories)
        if len(kept) < len(files):
            absent = counted(len(files) - len(kept), "image")
            say(f"left out: {absent} not in {arguments.annotations}")
        files = kept
    pictures = None if arguments.no_pictures else out / PICTURES
    old = claim_folder(out, {"checkpoint": str(checkpoint)})  # if this is impossible, say so before the work
    photos = predict(detector, config, files, selection, arguments.batch, known, pictures)
    written = write_results(out, photos, detector.categories, checkpoint, stored)
    if pictures is not None:
        facts = {"detector": printable(str(checkpoint)), "score": f"at least {arguments.score:g}"}
        facts["boxes"] = f"at most {arguments.top} per image"
        if arguments.classes:
            facts["classes"] = arguments.classes
        try:
            written.append(write_page(out, photos, detector.categories, facts))
        except MissingExtra as error:
            say(f"no {PAGE}: {error}")
    remove_old(old | {out / PAGE}, [*written, *(out / PICTURES / str(photo.picture) for photo in photos)])
    _say_summary(photos, others)
    say(", ".join(map(str, [*written, *([pictures] if pictures else [])])))


@dataclass(frozen=True)
class Selection:
    """Which of a detector's findings are kept."""

    score: float
    top: int
    labels: Tensor | None = None
    """int64 [n]; None is all classes."""

    def columns(self, found: ImageDetections) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return boxes, scores and labels of the findings that are kept."""
        keep = found.scores >= self.score
        if self.labels is not None:
            keep &= torch.isin(found.labels, self.labels.to(found.labels.device))
        rows = keep.nonzero()[: self.top, 0]
        boxes, scores, labels = (
            each[rows].cpu().numpy() for each in (found.boxes, found.scores, found.labels)
        )
        return boxes, scores, labels


@dataclass(frozen=True, kw_only=True)
class Photo:
    """An image and what was found in it."""

    id: int
    name: str
    path: str
    error: str | None = None
    """Why it could not be read; then there is nothing else."""
    size: tuple[int, int] = (0, 0)
    """Height and width that the boxes refer to."""
    turned: bool = False
    """Turned or mirrored as its EXIF orientation says."""
    boxes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """float32 [n,4] xyxy, best first."""
    scores: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    picture: str | None = None
    """Its picture, relative to the output folder."""


def predict(
    detector: CLISDetector,
    config: Config,
    files: Sequence[ImageFile],
    selection: Selection,
    batch: int = 1,
    known: Annotated | None = None,
    pictures: Path | None = None,
) -> list[Photo]:
    """Detect objects in image files, which are read on the way, and draw a picture of each.

    Args:
        config: the detector's, for its precision and the number of loader processes.
        batch: the most images at once; only those of one padded size share a batch.
        known: the images in an annotation file, whose boxes are in pixels of the stored images: EXIF
            orientations are not applied, and sizes have to agree. None numbers the images from 1 and applies
            the orientations.
        pictures: folder of the pictures; None draws none.

    Returns:
        All images in their order, unreadable ones with an error.
    """
    ids = range(1, len(files) + 1) if known is None else known.ids()
    photos = [
        Photo(id=number, name=printable(file.name), path=printable(str(file.path)))
        for number, file in zip(ids, files)
    ]
    targets = picture_names(files)
    read = functools.partial(_read, files, known, config.data.max_pixels)
    loader = image_loader(read, range(len(files)), batch, config.data.workers if len(files) > batch else 0)
    shape_of, device = functools.partial(_shape_of, detector), next(detector.parameters()).device
    with Progress("predict", len(files)) as progress:
        for rows, images in batches_by_shape(loader, batch, shape_of):
            readable = [image for image in images if not isinstance(image, str)]
            if not readable:  # it is alone in its batch
                error = printable(str(images[0]))
                photos[rows[0]] = dataclasses.replace(photos[rows[0]], error=error)
                progress.advance()
                continue
            with autocast(config.train.precision, device):  # as `run_detector`
                results = detector.detect([pixels for pixels, _ in readable])
            for row, (pixels, turned), found in zip(rows, readable, results, strict=True):
                boxes, scores, labels = selection.columns(found)
                photos[row] = photo = dataclasses.replace(
                    photos[row], size=image_size(pixels), turned=turned,
                    boxes=boxes, scores=scores, labels=labels,
                    picture=None if pictures is None else targets[row],
                )  # fmt: skip
                if pictures is not None:
                    draw_photo(pixels, photo, detector.categories, pictures / targets[row])
            progress.advance(len(rows))
    return photos


def draw_photo(pixels: Tensor, photo: Photo, categories: Sequence[Category], path: Path) -> None:
    """Write a picture of an image with its boxes, the best on top, as a JPEG."""
    picture, scale = picture_of(pixels)
    marks = [
        Mark(box=box, text=f"{categories[label].name} {score:.2f}", color=class_color(label))
        for box, score, label in zip(photo.boxes.tolist(), photo.scores.tolist(), photo.labels.tolist())
    ]
    draw_marks(picture, marks, scale)
    with atomic_write(path) as temporary:
        picture.save(temporary, quality=90)


def claim_folder(out: Path, info: Mapping[str, str]) -> set[Path]:
    """Note in a folder that its results are those of this command; nothing of somebody else is replaced.

    Returns:
        The pictures of an earlier result, which stays until the new one is whole.

    Raises:
        ValueError: files or pictures of these names are there, and `IMAGES` does not say whose they are.
        OSError: it cannot be written.
    """
    check_writable(out / PREDICTIONS)
    there = [path for name in (PICTURES, PREDICTIONS, IMAGES, PAGE) if (path := out / name).exists()]
    try:
        earlier = json.loads((out / IMAGES).read_bytes())
        own = "checkpoint" in earlier["info"]
        named = {out / each["picture"] for each in earlier["images"] if "picture" in each}
        below = (out / PICTURES).resolve()  # the file may have been edited: nothing else is ever removed
        pictures = {path for path in named if below in path.resolve().parents}
    except (OSError, ValueError, KeyError, TypeError):
        own, pictures = False, set()
    if there and not own:
        raise ValueError(
            f"{there[0]}: was not written by predict, which would replace it; name another --out"
        )
    if not own:
        _write_images(out, {"info": info, "images": []})
    return pictures


def remove_old(files: Collection[Path], new: Collection[Path]) -> None:
    """Remove files of an earlier result that are not in the new one, and the folders that become empty."""
    for path in {*files} - {*new}:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something is in it
            for folder in path.parents:
                folder.rmdir()


def _write_images(out: Path, document: Mapping[str, Any]) -> None:
    with atomic_write(out / IMAGES) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")


def write_results(
    out: Path, photos: Sequence[Photo], categories: Sequence[Category], checkpoint: Path, stored: bool
) -> list[Path]:
    """Write predictions.json (an LVIS result file) and images.json, what its ids stand for; return the paths.

    Args:
        stored: boxes are in pixels of the stored images, else of the images as they are displayed.
    """
    counts = [len(photo.scores) for photo in photos]
    boxes = np.concatenate([photo.boxes for photo in photos])
    ids = np.array([category.id for category in categories])
    Detections(
        image_id=np.repeat([photo.id for photo in photos], counts),
        category_id=ids[np.concatenate([photo.labels for photo in photos])],
        bbox=np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
        score=np.concatenate([photo.scores for photo in photos]),
    ).to_json(out / PREDICTIONS)
    boxes_are_of = "as stored" if stored else "as displayed, turned by their EXIF orientation"
    document = {
        "info": {"checkpoint": str(checkpoint), "boxes": f"x y w h in pixels of the images {boxes_are_of}"},
        "images": [_image_record(photo) for photo in photos],
        "categories": [{"id": category.id, "name": category.name} for category in categories],
    }
    _write_images(out, document)
    return [out / PREDICTIONS, out / IMAGES]


def write_page(
    out: Path, photos: Sequence[Photo], categories: Sequence[Category], facts: Mapping[str, str]
) -> Path:
    """Write the page of all pictures with what was found in them.

    Raises:
        MissingExtra: Jinja2 is not installed.
    """
    found = Counter(label for photo in photos for label in photo.labels.tolist())
    text = render(
        "predict.html.j2",
        facts=facts,
        photos=[photo for photo in photos if photo.error is None],
        unreadable=[photo for photo in photos if photo.error is not None],
        classes=[(categories[label].name, count) for label, count in found.most_common()],
        names=[category.name for category in categories],
        folder=PICTURES,
    )
    with atomic_write(out / PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out / PAGE


def _read(
    files: Sequence[ImageFile], known: Annotated | None, max_pixels: int, row: int
) -> tuple[Tensor, bool] | str:
    """Read an image, and whether it was turned; or say why it cannot be used."""
    path = files[row].path
    try:
        if known is None:
            return read_photo(path, max_pixels)
        image = open_image(read_bytes(path), str(path), max_pixels)
        check_size(image, known.annotations, known.rows[row])
        return image.decode(), False
    except ImageError as error:
        return str(error)


def _shape_of(detector: CLISDetector, image: tuple[Tensor, bool] | str) -> tuple[int, ...] | None:
    return None if isinstance(image, str) else detector.canvas_of(image_size(image[0]))


def _image_record(photo: Photo) -> dict[str, Any]:
    record: dict[str, Any] = {"id": photo.id, "file_name": photo.name, "path": photo.path}
    if photo.error is not None:
        return record | {"error": photo.error}
    record |= {"height": photo.size[0], "width": photo.size[1], "turned": photo.turned}
    return record if photo.picture is None else record | {"picture": f"{PICTURES}/{photo.picture}"}


def _say_summary(photos: Sequence[Photo], others: int) -> None:
    read = [photo for photo in photos if photo.error is None]
    bad = [photo for photo in photos if photo.error is not None]
    boxes = sum(len(photo.scores) for photo in read)
    classes = {label for photo in read for label in photo.labels.tolist()}
    say(
        f"{counted(len(read), 'image')}, {counted(boxes, 'box', 'boxes')} of "
        f"{counted(len(classes), 'class', 'classes')}"
    )
    if turned := sum(photo.turned for photo in read):
        say(f"{turned} turned by their EXIF orientation; boxes are in the images as displayed")
    if others:
        say(f"left out: {counted(others, 'other file')} in the folders, by name not {FORMATS}")
    for photo in bad[:NAMED]:
        say(f"unreadable: {photo.error}")
    if bad:
        say(f"{len(bad)} unreadable" + (f"; {IMAGES} names all of them" if len(bad) > NAMED else ""))
    if not read:
        raise ValueError(f"could not read any of {counted(len(photos), 'image')}")
