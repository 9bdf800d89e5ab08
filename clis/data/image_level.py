"""The image-level images as one packed index, in memory or memory-mapped from a prepared folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from tarfile import BLOCKSIZE, HeaderError, nti  # type: ignore[attr-defined]  # the stubs lack nti
from typing import Any, Protocol

import numpy as np

from clis.atomic import atomic_write
from clis.data.categories import Category
from clis.data.image_classes import class_labels, describe_others, match_classes
from clis.data.image_scan import (
    IMAGE_SUFFIXES,
    Container,
    Listing,
    find_containers,
    level_hint,
    list_images,
)
from clis.data.images import SHORTAGES, ImageError, read_bytes
from clis.data.mapped import map_array
from clis.progress import say
from clis.text import name_key, printable, shortened

FORMAT = 1
"""Version of a prepared index; other versions are rejected."""
HEADER = "index.json"
"""The file by which a folder is known as a prepared index; `finished` is false while arrays are written."""

_COLUMNS = {
    "labels": "<i4",
    "container": "<i4",
    "names": "|u1",
    "name_offsets": "<i8",
    "positions": "<i8",
    "sizes": "<i8",
}
"""The arrays of an index and their types, in memory and on disk."""

_AGAIN = "run `python -m clis prepare image-level` again"


class LabeledImages(Protocol):
    """Encoded images with labels and names, by row: what a search for regions needs of an index."""

    @property
    def labels(self) -> np.ndarray:
        """Whole numbers [n]."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Return the name of an image for messages."""
        ...

    def location(self, row: int) -> str:
        """Return the name of an image as other files have it, which may not be printable."""
        ...

    def read(self, row: int) -> bytes:
        """Return the encoded bytes of an image; raises `ImageError` where they cannot be read."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageLevelIndex:
    """n image-level images, packed: their labels and where their bytes are; 32 bytes per image plus its name.

    The order is that of the given roots, then of the class folders and tars, then of the names (mixed tars:
    of the bytes in the tar). The index holds no open file, so it can be sent to loader processes. One opened
    from disk is memory-mapped, and is sent as the name of its folder: its pages are shared.
    """

    labels: np.ndarray
    """int32 [n]."""
    containers: tuple[Container, ...]
    """The folders and tars."""
    container: np.ndarray
    """int32 [n], place in `containers`."""
    names: np.ndarray
    """uint8 [...]: file names below their folder, or member names in their tar, one after the other."""
    name_offsets: np.ndarray
    """int64 [n + 1]: image i is called names[name_offsets[i]:name_offsets[i + 1]]."""
    positions: np.ndarray
    """int64 [n], first byte in the file of the tar; -1 where the image is a file of its own."""
    sizes: np.ndarray
    """int64 [n], bytes in the tar; -1 where the image is a file of its own."""
    image_counts: np.ndarray
    """int64 [C], images of each label."""
    unmatched: tuple[str, ...]
    """Classes that match no category, sorted."""
    digest: str
    """SHA-256 of the labels and the locations below the roots; it ties a region file to its index."""
    mixed: bool = False
    """Whether the tars have mixed classes, indexed in their order, so that blocks of neighbors make sense."""
    folder: Path | None = None
    """Folder that it was opened from; None for an index in memory."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __repr__(self) -> str:
        some = int((self.image_counts > 0).sum())
        where = f"{len(self.containers)} folders and tars"
        return f"<ImageLevelIndex: {len(self)} images of {some} classes in {where}>"

    def name(self, i: int) -> str:
        """Return the image's `location` for messages."""
        return printable(self.location(i))

    def location(self, i: int) -> str:
        """Return where the image is in its root: ``n01514668.tar:foo.JPEG`` or ``n01514668/foo.JPEG``."""
        container = self._container(i)
        return container.name + ("/" if container.is_folder else ":") + self._name(i)

    def read(self, i: int) -> bytes:
        """Return the stored bytes of the image; a tar is not unpacked.

        Raises:
            ImageError: the file or the tar cannot be read, or the tar has changed in size since it was
                indexed, or has another member at this place.
        """
        container = self._container(i)
        if container.is_folder:
            return read_bytes(os.path.join(container.path, self._name(i)))
        position, size = int(self.positions[i]), int(self.sizes[i])
        try:
            tar = _open_tar(container.path, container.file_size).fileno()
            data = os.pread(tar, BLOCKSIZE + size, position - BLOCKSIZE)  # with the member's header
        except OSError as error:
            if error.errno in SHORTAGES:
                raise
            what = f"{error.strerror or error}; check data.image_level, or {_AGAIN} if it was moved"
            raise ImageError(f"{container.path}: {what}") from error
        if len(data) < BLOCKSIZE + size or not _is_header_of(data[:BLOCKSIZE], self._name(i), size):
            raise ImageError(f"{self.name(i)}: the tar has changed; fetch it again, or {_AGAIN}")
        return data[BLOCKSIZE:]

    def read_ahead(self, first: int, last: int) -> None:
        """Ask the system to load the bytes of the images first..last - 1 into memory, one request per tar.

        This is a hint: it does nothing for folders, without `posix_fadvise`, or after an error.
        """
        containers = self.container[first:last]
        starts = first + np.concatenate([[0], np.flatnonzero(np.diff(containers)) + 1]).astype(int)
        for start, end in zip(starts, [*starts[1:], last]):
            container, last_one = self._container(start), end - 1
            if container.is_folder or not hasattr(os, "posix_fadvise"):
                continue
            position = int(self.positions[start])
            length = int(self.positions[last_one] + self.sizes[last_one]) - position
            with contextlib.suppress(OSError, ImageError):  # reading will say what is wrong
                descriptor = _open_tar(container.path, container.file_size).fileno()
                os.posix_fadvise(descriptor, position, length, os.POSIX_FADV_WILLNEED)

    def _container(self, i: int) -> Container:
        return self.containers[self.container[i]]

    def _name(self, i: int) -> str:
        return os.fsdecode(self.names[self.name_offsets[i] : self.name_offsets[i + 1]].tobytes())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.folder is None else {"folder": self.folder, "digest": self.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["folder"] is not None:
            opened = open_index(state["folder"])
            if opened.digest != state["digest"]:
                raise ValueError(f"{state['folder']}: prepared again while it was in use; restart the run")
            state = opened.__dict__
        self.__dict__.update(state)


# Fewer than a process may hold open. One handle serves forked processes too: pread has no shared position.
@lru_cache(maxsize=128)
def _open_tar(path: str, size: int) -> FileIO:
    file = FileIO(path)
    if (now := os.fstat(file.fileno()).st_size) != size:
        file.close()
        raise ImageError(
            f"{path}: the tar has changed: {now} bytes, but {size} when it was indexed; fetch it again, or "
            f"{_AGAIN}"
        )
    return file


def _is_header_of(header: bytes, name: str, size: int) -> bool:
    """Check whether this block precedes the member: a tar may have been repacked to the same size.

    Names of over 100 bytes are partly stored elsewhere, and are not compared.
    """
    encoded = os.fsencode(name)
    stored, prefix = (header[part].partition(b"\0")[0] for part in (slice(100), slice(345, 500)))
    elsewhere = len(encoded) > 100 or not encoded.isascii()
    try:
        return (elsewhere or encoded in (stored, prefix + b"/" + stored)) and nti(header[124:136]) == size
    except HeaderError:
        return False


def match_containers(
    roots: Sequence[str | Path],
    categories: Sequence[Category],
    mapping: str | Path | None = None,
    *,
    strict: bool = True,
    parts: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Container], list[int], tuple[str, ...]]:
    """Find the class folders and class tars of the roots; no image is looked at.

    Arguments and errors as `build_index`.

    Args:
        parts: see `find_containers`.
        say: called with a message before slow work.

    Returns:
        Those that match a category, their labels, and the names of those that match none.
    """
    label_of = class_labels(categories, mapping)
    containers = find_containers(roots, lambda name: label_of(name) is not None, parts, say)
    names = [container.class_name for container in containers]
    where = ", ".join(map(str, roots))
    found, unmatched = match_classes(
        names, label_of, categories, strict=strict, where=where, hint=lambda: level_hint(containers, label_of)
    )
    pairs = [(container, label) for container, label in zip(containers, found) if label is not None]
    return [container for container, _ in pairs], [label for _, label in pairs], unmatched


def build_index(
    roots: Sequence[str | Path],
    categories: Sequence[Category],
    mapping: str | Path | None = None,
    *,
    strict: bool = True,
) -> ImageLevelIndex:
    """Index the images of class folders and class tars, in memory.

    A root holds one folder or one uncompressed tar per class, or is a tar of class tars; both may contain
    folders.

    Args:
        categories: their places are the labels.
        mapping: see `clis.data.image_classes.class_labels`, which translates the names of folders and tars.
        strict: a class that matches no category is an error; otherwise it is left out and listed in
            `unmatched`.

    Raises:
        ValueError: a root is missing, a tar or the mapping is malformed, a class matches no category and
            `strict`, or no image is left.
    """
    containers, labels, unmatched = match_containers(roots, categories, mapping, strict=strict, say=say)
    where = ", ".join(map(str, roots))
    left_out: Counter[str] = Counter()
    skipped = 0

    def listed() -> Iterator[Listing]:
        nonlocal skipped
        for container in containers:
            listing = list_images(container, by_name=True)
            left_out.update(listing.others)
            skipped += listing.skipped
            yield listing

    chunks: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    for chunk in _columns(zip(labels, listed())):
        for name, array in chunk.items():
            chunks[name].append(array)
    arrays = {name: np.concatenate(chunks[name], dtype=dtype) for name, dtype in _COLUMNS.items()}
    if left_out:
        say(f"{where}: {describe_others(left_out)}")
    if skipped:
        say(f"{where}: {skipped} images are left out, since they are links in a tar or no regular files")
    _refuse_empty(len(arrays["labels"]), containers)
    return ImageLevelIndex(
        **arrays,
        containers=tuple(containers),
        image_counts=np.bincount(arrays["labels"], minlength=len(categories)),
        unmatched=unmatched,
        digest=_digest(containers, arrays),
        mixed=False,
        folder=None,
    )


def write_index(
    folder: Path,
    containers: Sequence[Container],
    labeled: Iterable[tuple[int | np.ndarray, Listing]],
    categories: Sequence[Category],
    mixed: bool,
    notes: Callable[[], dict[str, Any]],
) -> None:
    """Write an index that `open_index` opens: one ``.npy`` file per array, in pieces, and `HEADER` last.

    After an error an earlier index in the folder is as it was.

    Args:
        labeled: the images of each container, and one label for all or one for each (int32 [k]).
        mixed: see `ImageLevelIndex`.
        notes: called after the last of `labeled`; returns more for the header: ``report`` with ``unmatched``,
            and whatever the caller keeps.

    Raises:
        ValueError: there is no image.
    """
    counts = np.zeros(len(categories), dtype=np.int64)
    with contextlib.ExitStack() as stack:
        append = {
            name: stack.enter_context(_appending(folder / f"{name}.npy", dtype))
            for name, dtype in _COLUMNS.items()
        }
        for chunk in _columns(labeled):
            if "labels" in chunk:
                counts += np.bincount(chunk["labels"], minlength=len(categories))
            for name, array in chunk.items():
                append[name](array)
        _refuse_empty(counts.sum(), containers)
        mark_unfinished(folder)  # now the arrays replace those of an earlier index
    arrays = {name: map_array(folder / f"{name}.npy") for name in _COLUMNS}
    header = {
        "format": FORMAT,
        "finished": True,
        "digest": _digest(containers, arrays),
        "lengths": {name: len(array) for name, array in arrays.items()},
        "image_counts": counts.tolist(),
        "categories": [(category.id, category.name) for category in categories],
        "containers": containers,
        "mixed": mixed,
    }
    _write_header(folder, header | notes())


def mark_unfinished(folder: Path) -> None:
    """Mark the folder as an index that is being prepared and cannot be opened yet."""
    _write_header(folder, {"format": FORMAT, "finished": False})


def is_index(folder: str | Path) -> bool:
    """Check whether the folder is a prepared index, also unfinished or damaged, and not a root of images.

    A file of somebody else may be called `HEADER`, too.
    """
    try:
        header = json.loads(Path(folder, HEADER).read_bytes())
    except OSError:
        return False
    except ValueError:
        return True
    return isinstance(header, dict) and {"format", "finished"} <= header.keys()


def is_index_file(name: str) -> bool:
    """Check whether a file of a prepared index is called so."""
    return name in (HEADER, *(f"{column}.npy" for column in _COLUMNS))


def read_header(folder: str | Path) -> dict[str, Any]:
    """Read the `HEADER` of a prepared index.

    Raises:
        ValueError: it is damaged, has another format, or belongs to an unfinished index.
    """
    path = Path(folder, HEADER)
    try:
        header = json.loads(path.read_text())
        form, finished = header["format"], header["finished"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); {_AGAIN}") from error
    if form != FORMAT:
        raise ValueError(f"{path}: format {form}, this version reads {FORMAT}; {_AGAIN}")
    if not finished:
        raise ValueError(f"{folder}: this index is not finished; {_AGAIN}, which resumes it")
    return header


def open_index(folder: str | Path, categories: Sequence[Category] | None = None) -> ImageLevelIndex:
    """Open a prepared index; only the ends of its arrays are read.

    Args:
        categories: what the labels must stand for; None accepts those that the index names.

    Raises:
        ValueError: the index is damaged, unfinished or of other categories.
    """
    folder = Path(folder).absolute()
    header = read_header(folder)
    try:
        if categories is not None:
            _check_categories(folder, header["categories"], categories)
        arrays = {name: _mapped(folder, name, header["lengths"][name]) for name in _COLUMNS}
        if arrays["name_offsets"][[0, -1]].tolist() != [0, len(arrays["names"])]:
            raise ValueError(f"{folder}: name_offsets.npy and names.npy do not fit; {_AGAIN}")
        return ImageLevelIndex(
            **arrays,
            containers=tuple(Container(*fields) for fields in header["containers"]),
            image_counts=np.array(header["image_counts"], dtype=np.int64),
            unmatched=tuple(header["report"]["unmatched"]),
            mixed=header["mixed"],
            digest=header["digest"],
            folder=folder,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / HEADER}: damaged ({error!r}); {_AGAIN}") from error


def is_intact(index: ImageLevelIndex) -> bool:
    """Check whether the arrays are those that the digest was computed from; reads everything."""
    return index.digest == _digest(index.containers, {name: getattr(index, name) for name in _COLUMNS})


def check_containers(index: ImageLevelIndex) -> None:
    """Check that the folders and tars of an index are where they were when it was made.

    Raises:
        ValueError: some are gone, or tars have another size; the message names the first.
    """
    gone = []
    for container in index.containers:
        path = Path(container.path)
        try:
            there = path.is_dir() if container.is_folder else path.stat().st_size == container.file_size
        except OSError:
            there = False
        if not there:
            gone.append(container.path)
    if gone:
        raise ValueError(
            f"{index.folder}: {len(gone)} of {len(index.containers)} folders and tars that it was prepared "
            f"from have moved or changed, the first is {gone[0]}; {_AGAIN} with their new place"
        )


def _columns(labeled: Iterable[tuple[int | np.ndarray, Listing]]) -> Iterator[dict[str, np.ndarray]]:
    """Yield pieces of the arrays `_COLUMNS`, one per container."""
    end = 0
    yield {"name_offsets": np.zeros(1, dtype=np.int64)}
    for place, (labels, listing) in enumerate(labeled):
        offsets = end + np.cumsum(listing.lengths)
        yield {
            "labels": np.broadcast_to(np.int32(labels), len(listing.lengths)),
            "container": np.full(len(listing.lengths), place, dtype=np.int32),
            "names": listing.names,
            "name_offsets": offsets,
            "positions": listing.positions,
            "sizes": listing.sizes,
        }
        end = offsets[-1] if len(offsets) else end


def _refuse_empty(images: int, containers: Sequence[Container]) -> None:
    if not images:
        raise ValueError(
            f"{containers[0].path}: no {', '.join(IMAGE_SUFFIXES)} file in it, or in any other folder or tar "
            "that counts"
        )


@contextlib.contextmanager
def _appending(path: Path, dtype: str) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends to an .npy file; the header, of fixed length, is corrected at the end."""
    length = 0
    with atomic_write(path) as temporary, temporary.open("wb") as file:

        def write_start() -> None:
            shape = {"descr": dtype, "fortran_order": False, "shape": (length,)}
            np.lib.format.write_array_header_1_0(file, shape)

        def append(array: np.ndarray) -> None:
            nonlocal length
            file.write(np.ascontiguousarray(array, dtype=dtype).data)
            length += len(array)

        write_start()
        yield append
        file.seek(0)
        write_start()


def _mapped(folder: Path, name: str, length: int) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        array = map_array(path)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: missing, truncated or damaged ({error}); {_AGAIN}") from error
    if array.shape != (length,) or array.dtype != np.dtype(_COLUMNS[name]):
        raise ValueError(f"{path}: not the {length} values of {HEADER}; {_AGAIN}")
    return array


def _write_header(folder: Path, header: dict[str, Any]) -> None:
    with atomic_write(folder / HEADER) as temporary:
        temporary.write_text(json.dumps(header) + "\n")


def _check_categories(folder: Path, made_for: list[list], categories: Sequence[Category]) -> None:
    theirs = {(id_, name_key(name)): (id_, name) for id_, name in made_for}
    ours = {(category.id, name_key(category.name)): (category.id, category.name) for category in categories}
    if theirs.keys() != ours.keys():
        only = [
            f"{len(some)} only in {where} ({shortened([f'{id_} {name}' for id_, name in sorted(some)], 3)})"
            for some, where in (
                ([theirs[key] for key in theirs.keys() - ours.keys()], "the index"),
                ([ours[key] for key in ours.keys() - theirs.keys()], "the annotations"),
            )
            if some
        ]
        raise ValueError(
            f"{folder}: this index is of other categories than the annotations: {', '.join(only)}; {_AGAIN} "
            "with --annotations of this data set"
        )


def _digest(containers: Sequence[Container], arrays: dict[str, np.ndarray]) -> str:
    keys = "\0".join(container.key for container in containers)
    digest = hashlib.sha256(keys.encode("utf-8", "surrogateescape"))
    for name in sorted(arrays):
        dtype = "<i8" if name == "labels" else _COLUMNS[name]
        for start in range(0, len(arrays[name]), 1 << 20):
            digest.update(np.ascontiguousarray(arrays[name][start : start + (1 << 20)], dtype=dtype).data)
    return digest.hexdigest()
