"""Groceries-LT, the benchmark of real photographs, from a clone of its repository (docs/groceries.md).

    URL=https://github.com/aleksandar-aleksandrov/groceries-object-detection-dataset
    git clone $URL clone
    git -C clone checkout 0130c6cdbc9f8d278d8b9da5d07d97bcb6647d90
    python benchmarks/groceries.py build clone data/groceries
    python benchmarks/groceries.py verify data/groceries

The repository has boxes for the photographs of the Freiburg Groceries Dataset, one class a photograph, as
PNGs of 224 x 224 pixels with a gray border and VOC's XML. groceries_photos.tsv says which photograph goes
where, and how large it is without the border; groceries_classes.tsv has, for each class, a hash of its boxes
and the mean color of its photographs, so that a set is known to be the one of our figures.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, encode_jpeg

from clis.atomic import atomic_write
from clis.data.categories import frequency_group
from clis.models.weight_files import first_names
from clis.progress import Progress, say

REPOSITORY = "https://github.com/aleksandar-aleksandrov/groceries-object-detection-dataset"
COMMIT = "0130c6cdbc9f8d278d8b9da5d07d97bcb6647d90"
"""Where the repository has its photographs in dataset/train and dataset/val."""
TABLES = Path(__file__).parent
SIDE = 224
"""Of the repository's images, border included."""
JPEG_QUALITY = 85
HELD_BACK = 5
"""The tuning split validates on one in this many training photographs of each class."""
COLOR_TOLERANCE = 1.0
"""Of 255: other versions of the JPEG library round otherwise."""
SPLITS = ("train", "val", "image_level")

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in the photograph without its border."""


@dataclass(frozen=True)
class Photo:
    """A line's entry of groceries_photos.tsv; the size is without the border."""

    category: str
    split: str
    number: int
    width: int
    height: int
    boxes: str = ""
    """The first digits of `box_digest`, where the width of the border is odd: see `without_border`."""

    @property
    def stem(self) -> str:
        """The repository's name in lower case."""
        return f"{self.category}{self.number:04d}"

    @property
    def file(self) -> str:
        """The name of the photograph below the benchmark's images or image_level folder."""
        return f"{self.category}/{self.stem}.jpg" if self.split == "image_level" else f"{self.stem}.jpg"


def read_photos(path: Path = TABLES / "groceries_photos.tsv") -> list[Photo]:
    """Read which photograph goes where, by class, split and number."""
    with open(path, encoding="utf-8", newline="") as file:
        photos = [
            Photo(row["class"], row["split"], int(number), int(row["width"]), int(row["height"]), boxes)
            for row in csv.DictReader(file, delimiter="\t")
            for number, _, boxes in (entry.partition(":") for entry in row["numbers"].split())
        ]
    return sorted(photos, key=lambda photo: (photo.category, SPLITS.index(photo.split), photo.number))


def build(clone: Path, folder: Path, photos: Sequence[Photo]) -> None:
    """Write photographs without border, annotations in LVIS form, the boxes of the image-level ones.

    Raises:
        FileNotFoundError: the clone, or a photograph or its boxes in it, is not there.
        FileExistsError: the folder already holds a benchmark.
        ValueError: two files of one name differ, or a file is not as the repository has it.
    """
    if (folder / "train.json").exists():
        raise FileExistsError(f"{folder} already holds a benchmark: verify it, or name another folder")
    images, annotations = find_files(clone, photos)
    boxes: dict[Photo, list[Box]] = {}
    with Progress("groceries", len(photos)) as progress:
        for photo in photos:
            image, boxes[photo] = without_border(
                decode(images[photo.stem]), read_boxes(annotations[photo.stem]), photo
            )
            with atomic_write(path_of(folder, photo)) as temporary:
                encode_jpeg(image, JPEG_QUALITY).numpy().tofile(temporary)
            progress.advance()
    hidden = {photo.file: boxes[photo] for photo in boxes if photo.split == "image_level"}
    write_json(folder / "image_level_boxes.json", hidden)
    write_json(folder / "oracle_regions.json", {name: max(each, key=area) for name, each in hidden.items()})
    train = {photo: each for photo, each in boxes.items() if photo.split == "train"}
    held_back = set(hold_back(train))
    kept = {photo: each for photo, each in train.items() if photo not in held_back}
    write_json(folder / "tuning_train.json", lvis_form(kept, kept))
    write_json(folder / "tuning_val.json", lvis_form({photo: train[photo] for photo in held_back}, kept))
    val = {photo: each for photo, each in boxes.items() if photo.split == "val"}
    write_json(folder / "val.json", lvis_form(val, train))
    write_json(folder / "train.json", lvis_form(train, train))  # last: it says that the benchmark is whole


def find_files(clone: Path, photos: Sequence[Photo]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Find the PNG and the XML of every photograph, in dataset/train and dataset/val before anywhere else."""
    if not clone.is_dir():
        raise FileNotFoundError(f"{clone}: no such folder; make it by `git clone {REPOSITORY} {clone}`")
    found: dict[str, dict[str, Path]] = {".png": {}, ".xml": {}}
    final = (clone / "dataset" / "train", clone / "dataset" / "val")
    wanted = {photo.stem for photo in photos}
    paths = sorted(clone.rglob("*"), key=lambda path: (not any(map(path.is_relative_to, final)), path))
    for path in paths:
        files = found.get(path.suffix.lower())
        if files is None or path.stem.lower() not in wanted:
            continue
        other = files.setdefault(path.stem.lower(), path)
        if other is path or any(map(other.is_relative_to, final)):
            continue  # earlier versions may lie elsewhere
        if other.read_bytes() != path.read_bytes():
            raise ValueError(
                f"{path} and {other} differ; check out the commit that our set is of: git checkout {COMMIT}"
            )
    for suffix, files in found.items():
        missing = [photo.stem for photo in photos if photo.stem not in files]
        if missing:
            raise FileNotFoundError(
                f"{clone} has no {suffix} of {len(missing)} photographs ({first_names(missing)});"
                f" check out the commit that our set is of: git checkout {COMMIT}"
            )
    return found[".png"], found[".xml"]


def decode(path: Path) -> Tensor:
    """Decode a PNG of the repository as RGB, uint8 [3, 224, 224]."""
    try:
        image = decode_image(str(path), ImageReadMode.RGB)
    except RuntimeError as error:
        raise ValueError(f"{path}: not readable as an image ({error})") from None
    if image.shape != (3, SIDE, SIDE):
        raise ValueError(f"{path} has {image.shape[2]} x {image.shape[1]} pixels, not {SIDE} x {SIDE}")
    return image


def without_border(image: Tensor, boxes: Sequence[Box], photo: Photo) -> tuple[Tensor, list[Box]]:
    """Cut a photograph of known size, and its boxes, out of its border.

    The photograph is in the middle. Where the border's width is odd there are two middles, and both occur:
    the boxes tell which one it is.
    """
    places = list(
        itertools.product(middles(image.shape[2] - photo.width), middles(image.shape[1] - photo.height))
    )
    cut = {place: [moved(box, place, photo) for box in boxes] for place in places}
    ours = [place for place in places if photo.boxes and box_digest(cut[place]).startswith(photo.boxes)]
    left, top = place = (ours or places)[0]  # where none are our boxes, verify names the class
    return image[:, top : top + photo.height, left : left + photo.width].contiguous(), cut[place]


def middles(border: int) -> list[int]:
    """Return where what is in the middle may start, for the width of the border on both sides together."""
    return sorted({border // 2, border - border // 2})


def moved(box: Box, place: tuple[int, int], photo: Photo) -> Box:
    """Move a box to a photograph that starts at `place`, and clip it."""
    (left, top), (x1, y1, x2, y2) = place, box
    x1, x2 = (min(max(x - left, 0.0), float(photo.width)) for x in (x1, x2))
    y1, y2 = (min(max(y - top, 0.0), float(photo.height)) for y in (y1, y2))
    return x1, y1, x2, y2


def box_digest(boxes: Iterable[Box]) -> str:
    """Hash the sorted boxes of a photograph."""
    return hashlib.sha256(";".join(sorted(box_text(box) for box in boxes)).encode()).hexdigest()


def box_text(box: Sequence[float]) -> str:
    """Write the corners of a box, as they are hashed."""
    return " ".join(f"{value:g}" for value in box)


def read_boxes(path: Path) -> list[Box]:
    """Read the boxes of a photograph with its border."""
    try:
        boxes = []
        for each in ElementTree.parse(path).getroot().iter("object"):
            x1, y1, x2, y2 = (
                float(each.findtext(f"bndbox/{name}", "")) for name in ("xmin", "ymin", "xmax", "ymax")
            )
            boxes.append((x1, y1, x2, y2))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: not boxes in VOC's form ({error})") from None
    if not boxes:
        raise ValueError(f"{path}: has no boxes; restore it by: git checkout {COMMIT} -- .")
    return boxes


def area(box: Box) -> float:
    """Measure a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def hold_back(photos: Iterable[Photo]) -> list[Photo]:
    """Choose the last fifth of each class's photographs, which a recipe may be tuned on.

    Neighboring numbers often show one shelf: a block of them keeps shelves together.
    """
    by_class = defaultdict(list)
    for photo in photos:
        by_class[photo.category].append(photo)
    return [photo for each in by_class.values() for photo in each[len(each) - len(each) // HELD_BACK :]]


def lvis_form(
    photos: Mapping[Photo, Sequence[Box]], counted: Mapping[Photo, Sequence[Box]]
) -> dict[str, Any]:
    """Make annotations in LVIS v1 form, with the frequencies of the photographs `counted`.

    A class that a photograph has no box of is listed as a negative of it.
    """
    names = sorted({photo.category for photo in [*photos, *counted]})
    ids = {name: place + 1 for place, name in enumerate(names)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for photo, boxes in sorted(photos.items(), key=lambda item: item[0].file):
        images.append(
            {
                "id": len(images) + 1, "file_name": photo.file, "width": photo.width, "height": photo.height,
                "not_exhaustive_category_ids": [],
                "neg_category_ids": [ids[name] for name in names if name != photo.category],
            }
        )  # fmt: skip
        annotations += [
            {
                "id": len(annotations) + k, "image_id": len(images), "category_id": ids[photo.category],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "area": area(box),
                "segmentation": [],
            }
            for k, box in enumerate(boxes, start=1)
        ]  # fmt: skip
    categories = []
    for name in names:
        of_class = [boxes for photo, boxes in counted.items() if photo.category == name]
        categories.append(
            {
                "id": ids[name], "name": name, "synonyms": [name], "synset": "",
                "frequency": frequency_group(len(of_class)),
                "image_count": len(of_class), "instance_count": sum(map(len, of_class)),
            }
        )  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": categories}


def write_json(path: Path, content: Any) -> None:
    """Write a file of the benchmark."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def verify(folder: Path, photos: Sequence[Photo]) -> list[str]:
    """List how a benchmark differs from the one of our figures: missing photographs, boxes, colors.

    The files that are made of these, oracle_regions.json and tuning_*.json, are not looked at.
    """
    missing = [photo.file for photo in photos if not path_of(folder, photo).is_file()]
    if missing:
        return [f"{len(missing)} photographs are missing: {first_names(missing)}"]
    with open(TABLES / "groceries_classes.tsv", encoding="utf-8", newline="") as file:
        ours = {row["class"]: row for row in csv.DictReader(file, delimiter="\t")}
    boxes, colors = box_hashes(folder), mean_colors(folder, photos)
    differences = []
    for name in sorted(ours):
        if boxes.get(name) != ours[name]["sha256"]:
            differences.append(f"{name}: other boxes, sizes or splits than in our set")
        difference = np.abs(colors[name] - np.array(ours[name]["color"].split(), dtype=float)).max()
        if difference > COLOR_TOLERANCE:
            differences.append(f"{name}: the mean color differs by {difference:.1f} of 255 from our set's")
    return differences


def path_of(folder: Path, photo: Photo) -> Path:
    """Name the file of a photograph in a benchmark's folder."""
    return folder / ("image_level" if photo.split == "image_level" else "images") / photo.file


def mean_colors(folder: Path, photos: Sequence[Photo]) -> dict[str, np.ndarray]:
    """Average the red, green and blue of each class's photographs, which count alike; 0 to 255."""
    colors = defaultdict(list)
    with Progress("colors", len(photos)) as progress:
        for photo in photos:
            image = decode_image(str(path_of(folder, photo)), ImageReadMode.RGB)
            colors[photo.category].append(image.float().mean(dim=(1, 2)).numpy())
            progress.advance()
    return {name: np.mean(each, axis=0) for name, each in colors.items()}


def box_hashes(folder: Path) -> dict[str, str]:
    """Hash the sorted lines of each class's boxes."""
    lines = defaultdict(list)
    for category, line in box_lines(folder):
        lines[category].append(line)
    return {
        name: hashlib.sha256("\n".join(sorted(each)).encode()).hexdigest() for name, each in lines.items()
    }


def box_lines(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield class and line of every box: split, file, size (but of image-level photographs), corners."""
    for split in ("train", "val"):
        document = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
        names = {each["id"]: each["name"] for each in document["categories"]}
        images = {each["id"]: each for each in document["images"]}
        for each in document["annotations"]:
            x, y, width, height = each["bbox"]
            image = images[each["image_id"]]
            place = f"{split} {image['file_name']} {image['width']} {image['height']}"
            yield names[each["category_id"]], f"{place} {box_text((x, y, x + width, y + height))}"
    for file, boxes in json.loads((folder / "image_level_boxes.json").read_text(encoding="utf-8")).items():
        for box in boxes:
            yield file.split("/")[0], f"image_level {file} {box_text(box)}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("build", help="make the benchmark of a clone of the repository")
    making.add_argument("clone", type=Path)
    making.add_argument("folder", type=Path)
    verbs.add_parser("verify", help="compare a benchmark with ours").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    photos = read_photos()
    try:
        if arguments.verb == "build":
            build(arguments.clone, arguments.folder, photos)
        differences = verify(arguments.folder, photos)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for each in differences:
        say(each)
    if differences:
        sys.exit(f"{arguments.folder} is not the set of our figures")
    say(f"{arguments.folder}: {len(photos)} photographs, their boxes as in the set of our figures")


if __name__ == "__main__":
    main()
