"""The image-level stream: class folders and class tars as one packed index, and the index's regions."""

from __future__ import annotations

import enum
import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clis.data.annotations import Category
from clis.data.images import ImageError, read_bytes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
"""In any case; other files are passed over, and so are hidden ones."""

_WNIDS = Path(__file__).with_name("wnids.tsv")
_IS_FILE = -1


class RegionSource(enum.IntEnum):
    """Where a region comes from."""

    PENDING = 0
    """Not made yet; only in unfinished files."""
    RULE = 1
    """The rule of the region file gave it."""
    FALLBACK = 2
    """The rule gave none: the centre box."""
    UNREADABLE = 3
    """The image could not be read; the box is empty."""


REGION_DTYPE = np.dtype([("box", np.float32, 4), ("score", np.float32), ("source", np.uint8)])
"""One region: xyxy in pixels of the stored image, score in [0, 1], `RegionSource`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageLevelIndex:
    """n image-level images, packed: a label each, and where the bytes lie.

    In the order of the roots as given, then of the class folders and tars, then of the names. It holds no
    open file, so that it can be sent to loader processes.
    """

    labels: np.ndarray
    """int64 [n]."""
    containers: tuple[str, ...]
    """Paths of the class folders and tars."""
    container: np.ndarray
    """int32 [n], place in `containers`."""
    names: np.ndarray
    """uint8 [...]: file names below their folder, or member names in their tar, one after the other."""
    name_offsets: np.ndarray
    """int64 [n + 1]: image i is called names[name_offsets[i]:name_offsets[i + 1]]."""
    positions: np.ndarray
    """int64 [n], first byte in the tar; -1 where the image is a file of its own."""
    sizes: np.ndarray
    """int64 [n], bytes in the tar; -1 where the image is a file of its own."""
    unmatched: tuple[str, ...]
    """Class folders and tars that match no category, sorted."""
    digest: str
    """SHA-256 of the labels and the locations below the roots; it ties a region file to its index."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def name(self, i: int) -> str:
        """What to call the image in messages: ``n01514668.tar:foo.JPEG`` or ``n01514668/foo.JPEG``."""
        between = "/" if self.positions[i] == _IS_FILE else ":"
        return os.path.basename(self._container(i)) + between + self._name(i)

    def read(self, i: int) -> bytes:
        """The stored bytes of the image; a tar is not unpacked.

        Raises:
            ImageError: the file or the tar cannot be read, or the tar is shorter than when it was indexed.
        """
        if self.positions[i] == _IS_FILE:
            return read_bytes(os.path.join(self._container(i), self._name(i)))
        position, size = int(self.positions[i]), int(self.sizes[i])
        try:
            data = os.pread(_open_tar(self._container(i)).fileno(), size, position)
        except OSError as error:
            what = f"{error.strerror or error}; check data.image_level"
            raise ImageError(f"{self._container(i)}: {what}") from error
        if len(data) < size:
            raise ImageError(f"{self.name(i)}: the tar has changed or is truncated; fetch it again")
        return data

    def _container(self, i: int) -> str:
        return self.containers[self.container[i]]

    def _name(self, i: int) -> str:
        return os.fsdecode(self.names[self.name_offsets[i] : self.name_offsets[i + 1]].tobytes())


# Fewer than a process may hold open. One handle serves forked processes too: pread has no shared position.
@lru_cache(maxsize=128)
def _open_tar(path: str) -> FileIO:
    return FileIO(path)


def build_index(
    roots: Sequence[str | Path],
    categories: Sequence[Category],
    mapping: str | Path | None = None,
    *,
    strict: bool = True,
) -> ImageLevelIndex:
    """Indexes the images of class folders and class tars.

    A root holds one folder or one uncompressed tar a class; both may have folders in them. The name of the
    class is translated by the mapping, then taken as a category's name, its synset or the synset's WordNet
    3.0 id (wnid), else as a name regardless of case and of spaces or underscores. What two categories share
    means neither.

    Args:
        categories: their places are the labels.
        mapping: file of ``name<TAB>category`` lines; a header and lines that start with # do no harm.
        strict: a class that matches no category is an error; otherwise it is left out and listed in
            `unmatched`.

    Raises:
        ValueError: a root is missing, a tar or the mapping is malformed, a class matches no category and
            `strict`, or no image is left.
    """
    label_of = _class_labels(categories, mapping)
    classes = [
        _Class(f"{place}/{path.name}", path, label_of(_class_name(path)))
        for place, root in enumerate(roots)
        for path in _class_paths(Path(root))
    ]
    matched = [found for found in classes if found.label is not None]
    unmatched = sorted({_class_name(found.path) for found in classes if found.label is None})
    if not matched or (unmatched and strict):
        where = ", ".join(str(root) for root in roots)
        expected = _shortened([category.name for category in categories])
        raise ValueError(
            f"{where}: {len(unmatched)} of {len(classes)} image-level classes match no category: "
            f"{_shortened(unmatched)}; name them by category ({expected}), WordNet synset or wnid, or give a "
            "data.mapping" + ("; data.drop_unmatched=true leaves them out" if matched else "")
        )
    return _pack(matched, tuple(unmatched))


def region_sidecar(index: ImageLevelIndex, rule: str, detector: str | None) -> dict[str, object]:
    """What the JSON beside a region file says of it: its index, the rule and the detector of the rule."""
    return {"index": index.digest, "images": len(index), "rule": rule, "detector": detector}


def load_regions(path: str | Path, index: ImageLevelIndex, rule: str) -> np.ndarray:
    """The regions of the index's images, in its order: `REGION_DTYPE` [n], memory-mapped.

    Raises:
        ValueError: the file was made for another index or by another rule, is unfinished, or has a region
            without area.
    """
    path = Path(path)
    made = json.loads(path.with_suffix(".json").read_text())
    regions = np.load(path, mmap_mode="r")
    if made["index"] != index.digest or regions.shape != (len(index),) or regions.dtype != REGION_DTYPE:
        raise ValueError(
            f"{path}: made for other image-level images than the {len(index)} of data.image_level; remove it "
            "to have it made again, or correct data.image_level, data.mapping or data.train"
        )
    if made["rule"] != rule:
        raise ValueError(
            f"{path}: made by the rule {made['rule']}, regions.rule is {rule}; name another regions.file"
        )
    x1, y1, x2, y2 = regions["box"].T
    without_area = ~((x2 > x1) & (y2 > y1)) & (regions["source"] != RegionSource.UNREADABLE)
    bad = without_area | (regions["source"] == RegionSource.PENDING)
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"{path}: row {first} ({index.name(first)}) is unfinished or has no area: {regions[first]} "
            f"({bad.sum()} such rows); remove the file to have it made again"
        )
    return regions


class _Class(NamedTuple):
    """A class folder or tar that was found."""

    key: str
    """Place of its root and its name there."""
    path: Path
    label: int | None


class _Listing(NamedTuple):
    """The k images of one class folder or tar, sorted by name."""

    names: bytes
    """One after the other."""
    lengths: np.ndarray
    """int64 [k], as are the next two: bytes of each name."""
    positions: np.ndarray
    sizes: np.ndarray


def _pack(classes: Sequence[_Class], unmatched: tuple[str, ...]) -> ImageLevelIndex:
    listings = [_list_folder(path) if path.is_dir() else _list_tar(path) for _, path, _ in classes]
    counts = [len(listing.lengths) for listing in listings]
    if not sum(counts):
        raise ValueError(f"{classes[0].path}: no {', '.join(IMAGE_SUFFIXES)} file in it or any other class")
    arrays = {
        "labels": np.repeat(np.array([label for _, _, label in classes], dtype=np.int64), counts),
        "container": np.repeat(np.arange(len(classes), dtype=np.int32), counts),
        "names": np.frombuffer(b"".join(listing.names for listing in listings), dtype=np.uint8),
        "name_offsets": np.cumsum(np.concatenate([[0], *(listing.lengths for listing in listings)])),
        "positions": np.concatenate([listing.positions for listing in listings]),
        "sizes": np.concatenate([listing.sizes for listing in listings]),
    }
    return ImageLevelIndex(
        **arrays,
        containers=tuple(os.path.abspath(path) for _, path, _ in classes),
        unmatched=unmatched,
        digest=_digest([key for key, _, _ in classes], arrays),
    )


def _listing(images: Iterable[tuple[str, int, int]]) -> _Listing:
    """From name, position and size of each image."""
    images = sorted((os.fsencode(name), position, size) for name, position, size in images)
    numbers = np.array([(len(name), *place) for name, *place in images], dtype=np.int64).reshape(-1, 3)
    return _Listing(b"".join(name for name, _, _ in images), *numbers.T)


def _list_folder(path: Path) -> _Listing:
    walk = os.walk(path, onerror=_raise)
    files = (os.path.join(folder, name) for folder, _, names in walk for name in names if _is_image(name))
    return _listing((os.path.relpath(file, path), _IS_FILE, _IS_FILE) for file in files)


def _raise(error: OSError) -> None:
    """os.walk alone would pass over a folder that it may not read."""
    raise error


def _list_tar(path: Path) -> _Listing:
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            listing = _listing(
                (member.name, member.offset_data, member.size)
                for member in tar
                if member.isreg() and not member.issparse() and _is_image(member.name)
            )
            # tarfile takes a header that is cut off or damaged for the end.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
            return listing
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path}: no readable uncompressed tar ({error}); fetch it again") from error


def _is_image(name: str) -> bool:
    name = name.rpartition("/")[2]
    # Hidden ones are a Mac's metadata: ._foo.jpg.
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _class_paths(root: Path) -> list[Path]:
    """The class folders and tars of a root, sorted by name."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; correct data.image_level or data.root")
    paths = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    for path in paths:
        if path.name.endswith((".tar.gz", ".tgz")):
            raise ValueError(
                f"{path}: images cannot be read out of a compressed tar; unpack it to a plain .tar"
            )
    return [path for path in paths if path.suffix == ".tar" or path.is_dir()]


def _class_name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _class_labels(categories: Sequence[Category], mapping: str | Path | None) -> Callable[[str], int | None]:
    """From the name of a class to its label; None where it matches no category."""
    translated = {} if mapping is None else _read_table(Path(mapping))
    wnid_of = _read_table(_WNIDS)
    exact = (
        _unshared([wnid_of.get(category.synset, "") for category in categories])
        | _unshared([category.synset for category in categories])
        | _unshared([category.name for category in categories])
    )
    loose = _unshared([_loose(category.name) for category in categories])

    def label_of(name: str) -> int | None:
        name = translated.get(name, name)
        return exact.get(name, loose.get(_loose(name)))

    return label_of


def _unshared(keys: Sequence[str]) -> dict[str, int]:
    """Key -> label, for one key a label; without empty keys and keys that two labels share."""
    counts = Counter(keys)
    return {key: label for label, key in enumerate(keys) if key and counts[key] == 1}


def _loose(name: str) -> str:
    return name.casefold().replace(" ", "_")


def _read_table(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != 2 or not all(columns):
            raise ValueError(f"{path}, line {number}: {line!r} is not two columns with a tab between them")
        key, value = columns
        if table.setdefault(key, value) != value:
            raise ValueError(f"{path}, line {number}: {key} means {value!r} here and {table[key]!r} above")
    return table


def _shortened(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _digest(keys: Sequence[str], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256("\0".join(keys).encode("utf-8", "surrogateescape"))
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
