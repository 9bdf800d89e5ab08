"""Class folders and tars whose images are their own names, and annotation files of their categories."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from clis.data.categories import Category
from clis.data.image_level import ImageLevelIndex


def category(id_: int, name: str, synset: str = "", frequency: str = "r") -> Category:
    return Category(id=id_, name=name, synset=synset, frequency=frequency, image_count=1)


CATEGORIES = [
    category(1, "aerosol_can", "aerosol.n.02"),
    category(2, "Traffic Light"),
    category(5, "bird"),
]


def write_annotations(path: Path, categories: Sequence[Category] = CATEGORIES) -> Path:
    """An LVIS-form file of these categories with one image and one box."""
    records = [
        {"id": c.id, "name": c.name, "synset": c.synset, "frequency": c.frequency, "image_count": 1}
        for c in categories
    ]
    image = {"id": 1, "height": 10, "width": 10, "file_name": "1.jpg"}
    box = {"id": 1, "image_id": 1, "category_id": categories[0].id, "bbox": [1, 1, 5, 5]}
    path.write_text(json.dumps({"images": [image], "annotations": [box], "categories": records}))
    return path


def write_folder(path: Path, *names: str) -> None:
    for name in names:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"bytes of {name}".encode())


def tar_of(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """An uncompressed tar with these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def write_tar(path: Path, *names: str, kind: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of({name: f"bytes of {name}".encode() for name in names}, kind))


def found(index: ImageLevelIndex) -> list[tuple[str, int]]:
    """Name and label of every image."""
    return [(index.name(i), int(index.labels[i])) for i in range(len(index))]
