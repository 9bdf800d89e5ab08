"""Reads the images of a run, and reports those that it could not use."""

from __future__ import annotations

import functools
import io
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image  # torchvision needs Pillow

from clis.commands.check_report import SHOWN, Report
from clis.data.annotated_images import check_size, image_path
from clis.data.annotations import Annotations
from clis.data.image_level import ImageLevelIndex
from clis.data.images import ORIENTATION, EncodedImage, ImageError, open_image, read_bytes, unpacked
from clis.data.loader import image_loader
from clis.progress import Progress

IMAGES_AT_ONCE = 32
_MIRRORED = (
    "have an EXIF orientation of 2 to 4 (mirrored or upside down), which is not applied: whether boxes were "
    "drawn on the displayed pixels does not show in the size; look at them with `python -m clis show`"
)


@dataclass(frozen=True)
class Examined:
    """One image file as the run would read it."""

    problem: str | None
    """Why it cannot be used, naming it."""
    oddities: tuple[str, ...] = ()
    """Kinds of what is unusual and does no harm."""
    doubts: tuple[str, ...] = ()
    """Kinds of what may put boxes in the wrong place."""
    seconds: float = 0.0
    """Of reading and decoding."""
    num_bytes: int = 0


@dataclass(frozen=True)
class Stream:
    """The images of a stream that were read."""

    name: str
    images: int
    problems: list[str]
    """Of each that cannot be used: why, naming it."""
    seconds: float
    """Of reading and decoding one, on average."""
    num_bytes: float


@dataclass(frozen=True)
class ImageCheck:
    """Reads images as the run would, and adds what it finds to a report."""

    max_pixels: int
    """Of an image that may be decoded."""
    workers: int
    """Processes that read."""
    sample: int | None
    """Images of each stream that are read, spread evenly; None reads all."""
    report: Report

    def annotated(self, annotations: Annotations, folder: Path) -> Stream:
        """Read a split in its folder, as `_examine`; the sizes must be those of the annotations."""
        read = functools.partial(_examine_annotated_image, annotations, folder, self.max_pixels)
        return self._examine(annotations.path, read, len(annotations))

    def image_level(self, index: ImageLevelIndex) -> Stream:
        """Read the image-level stream, as `_examine`."""
        read = functools.partial(_examine_image_level, index, self.max_pixels)
        return self._examine("image-level", read, len(index))

    def judge(self, streams: Sequence[Stream], allowed: int, limit: str) -> None:
        """Report the images that cannot be used: as errors where all streams together have more than allowed.

        Args:
            allowed: images that the run may leave out, of these streams together.
            limit: says so in words.
        """
        bad = sum(len(stream.problems) for stream in streams)
        found = self.report.errors if bad > allowed else self.report.warnings
        for stream in streams:
            if stream.problems:
                first = "; ".join(stream.problems[:SHOWN]) + "; ..." * (len(stream.problems) > SHOWN)
                count = f"{len(stream.problems)} of {stream.images} images"
                found.append(f"{stream.name}: {count} cannot be used ({limit}): {first}")

    def _examine(self, name: str, read: Callable[[int], Examined], length: int) -> Stream:
        """Read the images of a stream; report what is odd about them, and list those that cannot be used."""
        rows: Sequence[int] = range(length)
        if self.sample is not None and self.sample < length:
            rows = np.linspace(0, length - 1, self.sample).astype(int).tolist()
        problems, seconds, num_bytes = [], 0.0, 0
        oddities: Counter[str] = Counter()
        doubts: Counter[str] = Counter()
        with Progress(f"check {Path(name).name}", len(rows)) as progress:
            for _, results in image_loader(read, rows, IMAGES_AT_ONCE, self.workers):
                for result in results:
                    if result.problem is not None:
                        problems.append(result.problem)
                    oddities.update(result.oddities)
                    doubts.update(result.doubts)
                    seconds, num_bytes = seconds + result.seconds, num_bytes + result.num_bytes
                progress.advance(len(results))
        self.report.listing += [f"{name}\t{problem}" for problem in problems]
        for kinds, said in ((oddities, self.report.notes), (doubts, self.report.warnings)):
            said += [f"{name}: {count} images {what}" for what, count in sorted(kinds.items())]
        return Stream(name, len(rows), problems, seconds / max(len(rows), 1), num_bytes / max(len(rows), 1))


def _examine_annotated_image(annotations: Annotations, folder: Path, max_pixels: int, row: int) -> Examined:
    path = image_path(folder, str(annotations.file_names[row]))

    def check(image: EncodedImage) -> tuple[str, ...]:
        check_size(image, annotations, row)
        return (_MIRRORED,) if image.orientation() in (2, 3, 4) else ()

    return _examine_image(lambda: read_bytes(path), str(path), max_pixels, check)


def _examine_image_level(index: ImageLevelIndex, max_pixels: int, row: int) -> Examined:
    return _examine_image(lambda: index.read(row), index.name(row), max_pixels)


def _examine_image(
    read: Callable[[], bytes],
    name: str,
    max_pixels: int,
    check: Callable[[EncodedImage], tuple[str, ...]] = lambda image: (),
) -> Examined:
    """Return what was found in an image; `check` may refuse one that can be decoded, and returns doubts."""
    began = time.perf_counter()
    try:
        data = read()
        image = open_image(data, name, max_pixels)
        image.decode()
        seconds = time.perf_counter() - began
        doubts = check(image)
    except ImageError as error:
        return Examined(str(error))
    return Examined(None, _oddities(data), doubts, seconds, len(data))


def _oddities(data: bytes) -> tuple[str, ...]:
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="(?i).*exif")  # Pillow only warns of data that are none
        try:
            with Image.open(io.BytesIO(unpacked(data))) as image:
                if image.mode != "RGB":
                    found.append(f"are {image.mode}, not RGB; they are converted")
                rotation = 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)
        except Exception:  # of many kinds, for data that was written by anybody
            return (*found, "have EXIF data that cannot be read; it is not used")
    if rotation != 1:
        found.append("have an EXIF rotation, which is not applied: boxes belong to the stored pixels")
    return tuple(found)
