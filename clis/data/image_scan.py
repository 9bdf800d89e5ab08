"""Which images are in folders and tars, and where in them; nothing is unpacked."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from clis.atomic import atomic_write
from clis.text import counted, shortened

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
)  # fmt: skip
"""In upper or lower case, also followed by .gz; other files are counted and left out."""

MAX_BYTES = 2**30
"""A larger file or member, or one that unpacks to more, is not taken for an image and is never read."""

IS_FILE = -1
"""Position and size of an image that is a file of its own."""

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_HIDDEN = re.compile(r"\.(?!\.?$)|@eaDir$|__MACOSX$|(?:Thumbs\.db|desktop\.ini)$")
"""Names of files and folders that an operating system or a tool keeps for itself."""
LISTING_VERSION = 3
_MAX_HEADER = 2**24
# What tarfile lets through for a damaged or hostile tar: also malformed or too large numbers, truncated
# sparse maps, and endless headers of headers.
_DAMAGE = (tarfile.TarError, OSError, ValueError, IndexError, OverflowError, MemoryError, RecursionError)


class Container(NamedTuple):
    """A folder or a tar of images: of one class, which it is named after, or of mixed classes."""

    key: str
    """Place of its root among the roots and its name there; the same wherever the roots are."""
    path: str
    """Absolute; of the outer tar where this one is in a tar."""
    inner: str = ""
    """Name of this tar in the outer one."""
    start: int = IS_FILE
    """First byte of the tar in the file; -1 for a folder, as the next three."""
    end: int = IS_FILE
    file_size: int = IS_FILE
    mtime_ns: int = IS_FILE

    @property
    def is_folder(self) -> bool:
        """Whether this is a folder; otherwise it is a tar."""
        return self.start == IS_FILE

    @property
    def class_name(self) -> str:
        """Name of the folder, or of the tar without its suffix: the class, unless classes are mixed."""
        name = os.path.basename(self.inner or self.path)
        return name if self.is_folder else re.sub(r"\.tar$", "", name, flags=re.IGNORECASE)

    @property
    def name(self) -> str:
        """Name for messages: ``n01514668``, ``n01514668.tar``, ``outer.tar:n01514668.tar``."""
        return os.path.basename(self.path) + (f":{self.inner}" if self.inner else "")


class Listing(NamedTuple):
    """The k images of a container."""

    names: np.ndarray
    """uint8 [...], one after the other."""
    lengths: np.ndarray
    """int64 [k], as are the next two: bytes of each name."""
    positions: np.ndarray
    sizes: np.ndarray
    skipped: int = 0
    """Number of image names that are links in a tar, no regular files, or larger than `MAX_BYTES`."""
    others: Mapping[str, int] = MappingProxyType({})
    """Number of files that are no images by their suffix, which is the key; hidden ones are not counted."""

    def split_names(self) -> list[bytes]:
        """Return the k names."""
        ends = np.cumsum(self.lengths).tolist()
        names = self.names.tobytes()
        return [names[start:end] for start, end in zip([0, *ends], ends)]

    def select(self, keep: np.ndarray) -> Listing:
        """Return the images where the mask [k] is True."""
        names = self.names[np.repeat(keep, self.lengths)]
        return self._replace(
            names=names, lengths=self.lengths[keep], positions=self.positions[keep], sizes=self.sizes[keep]
        )


def find_containers(
    roots: Sequence[str | Path],
    is_class: Callable[[str], bool],
    parts: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Container]:
    """Find the folders and tars of the roots, in the order of the roots, then of the names.

    A root is a folder that holds them, or one tar. A tar whose name is neither a class nor a wnid, and whose
    first file is a tar, stands for the tars in it (ImageNet-22k is distributed this way).

    Args:
        is_class: whether a name is known to be a class, so that its tar need not be opened.
        parts: see `list_images`.
        say: called with a message before slow work.

    Raises:
        ValueError: there is no root, one is missing, a tar is compressed, a tar of tars is malformed, or
            something is named twice.
    """
    if not roots:
        raise ValueError(
            "no folder of image-level images is named; set data.image_level, or clis.s=0 for none"
        )
    containers = [
        container
        for place, root in enumerate(roots)
        for path in _entries(Path(root), say)
        for container in _expand(_container(place, path), is_class, parts, say)
    ]
    counts = Counter((container.path, container.inner, container.start) for container in containers)
    if repeated := [":".join(filter(None, place[:2])) for place, count in counts.items() if count > 1]:
        raise ValueError(
            f"{repeated[0]}: is named twice, so that its images would be drawn twice as often; name it, or "
            "the folder that it is in, once"
        )
    return containers


def level_hint(containers: Sequence[Container], label_of: Callable[[str], object]) -> str:
    """Say in which of the folders that are no classes themselves there are folders that are."""
    for container in containers:
        if container.is_folder:
            with contextlib.suppress(OSError), os.scandir(container.path) as entries:
                inner = sorted(
                    entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)
                )
                if own := [name for name in inner if label_of(name) is not None]:
                    return (
                        f". {container.path} has folders that do match ({shortened(own, 3)}): name it in "
                        "data.image_level instead"
                    )
    return ""


def list_images(container: Container, *, by_name: bool, parts: Path | None = None) -> Listing:
    """List the images of a container, sorted by name or, with `by_name` False, in their order in the tar.

    Args:
        parts: folder that keeps the listing of a tar for the next time, as long as path, size and time of
            the file stay the same; a damaged listing is made again.

    Raises:
        ValueError: a tar is malformed or truncated.
    """
    if container.is_folder:
        return _list_folder(Path(container.path))
    return _list_tar(container, is_image, by_name, parts)


def part_file(container: Container, *, by_name: bool, parts: Path) -> Path:
    """Return the file in which `list_images` keeps the listing of a tar."""
    return _part_file(container, is_image, by_name, parts)


def keep_listing(container: Container, *, by_name: bool, parts: Path) -> str | None:
    """List a tar for the next `list_images`; return what is wrong with the tar, if anything is."""
    try:
        list_images(container, by_name=by_name, parts=parts)
    except ValueError as error:
        return str(error)
    return None


def remove_other_parts(containers: Sequence[Container], *, by_name: bool, parts: Path) -> None:
    """Remove the listings of the images of other containers, and leftovers of interrupted writes."""
    if parts.exists():
        used = {part_file(container, by_name=by_name, parts=parts) for container in containers}
        for path in parts.iterdir():
            if path not in used and not path.name.endswith(f"{is_tar.__name__}.npz"):
                path.unlink()


def end_with_parent() -> None:
    """Make this process end together with its parent, and end silently at Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    parent = multiprocessing.parent_process()
    assert parent is not None  # it is for processes that multiprocessing has started

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _entries(root: Path, say: Callable[[str], None]) -> list[Path]:
    """Return the folders and tars of a root, sorted by name; say what else is in it."""
    if root.is_dir():
        paths = sorted(path for path in root.iterdir() if not is_hidden(path.name))
    elif root.exists():
        paths = [root]
    else:
        raise ValueError(
            f"{root}: no such folder or tar (of a config: data.image_level, relative to data.root)"
        )
    for path in paths:
        if path.name.lower().endswith(_COMPRESSED):
            raise ValueError(
                f"{path}: images cannot be read out of a compressed tar; unpack it to a plain .tar"
            )
    used: list[Path] = []
    others: list[str] = []
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"{path}: a link to {os.readlink(path)}, which does not exist; mount its disk, or remove it"
            )
        if path.suffix.lower() == ".tar" or path.is_dir():
            used.append(path)
        else:
            others.append(path.name)
    if others:
        say(
            f"{root}: {len(others)} files that are neither folders nor tars are left out: "
            f"{shortened(others, 5)}"
        )
    if not used and root.is_dir():
        images = sum(map(is_image, others))
        held = counted(images, "image") if images else counted(len(others), "other file")
        raise ValueError(
            (f"{root}: no class folder and no tar in it, but {held}" if others else f"{root}: is empty")
            + "; images belong in folders that are named "
            "after their class, and data.image_level names what holds these folders"
        )
    return used


def _container(place: int, path: Path) -> Container:
    key, absolute = f"{place}/{path.name}", os.path.abspath(path)
    if path.is_dir():
        return Container(key, absolute)
    stat = path.stat()
    return Container(key, absolute, "", 0, stat.st_size, stat.st_size, stat.st_mtime_ns)


def _expand(
    container: Container, is_class: Callable[[str], bool], parts: Path | None, say: Callable[[str], None]
) -> Iterable[Container]:
    """Return the container itself, or the tars in it."""
    name = container.class_name
    if container.is_folder or is_class(name) or re.fullmatch(r"n\d{8}", name) or not _holds_tars(container):
        yield container
        return
    say(f"{container.path}: looking for the tars in it")
    listing = _list_tar(container, is_tar, True, parts)
    if listing.skipped:
        raise ValueError(
            f"{container.path}: {listing.skipped} of the tars in it are links or sparse, which cannot be "
            "read in place; unpack it"
        )
    for raw, start, size in zip(listing.split_names(), listing.positions.tolist(), listing.sizes.tolist()):
        inner = os.fsdecode(raw)
        if inner.endswith(_COMPRESSED):
            raise ValueError(
                f"{container.path}:{inner}: images cannot be read out of a compressed tar; unpack it to a "
                "plain .tar"
            )
        yield container._replace(key=f"{container.key}/{inner}", inner=inner, start=start, end=start + size)


def _holds_tars(container: Container) -> bool:
    """Check whether the first file of a tar is a tar; False if it cannot be read."""
    with contextlib.suppress(*_DAMAGE), _opened(container) as tar:
        for member in _members(tar, container.end):
            if member.isreg():
                return is_tar(member.name)
    return False


def is_image(name: str) -> bool:
    """Check whether a path names an image file, also a gzip'ed one; hidden files and folders do not count."""
    return name.lower().removesuffix(".gz").endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def is_tar(name: str) -> bool:
    """Check whether a path names a tar, also a compressed one; hidden files do not count."""
    return name.lower().endswith((".tar", *_COMPRESSED)) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Check whether a part of a path is a tool's own: .git, .ipynb_checkpoints, a Mac's ._foo.jpg."""
    return any(map(_HIDDEN.match, name.split("/")))


def _list_folder(path: Path) -> Listing:
    others: Counter[str] = Counter()
    seen = {os.path.realpath(path)}

    def images(folder: str, prefix: str) -> Iterator[tuple[str, int, int] | None]:
        # Not os.walk, which does not say what is a regular file; to ask for each takes long.
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not is_hidden(entry.name)]
        # By name, so that of two links to one folder all machines follow the same.
        for entry in sorted(found, key=lambda entry: entry.name):
            name = prefix + entry.name
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else ""
                if real not in seen:  # a link to a folder above would never end
                    seen.update({real} - {""})
                    yield from images(entry.path, f"{name}/")
            elif is_image(name):
                is_file = entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)
                yield (name, IS_FILE, IS_FILE) if is_file else None
            else:
                others[_suffix(name)] += 1

    return _listing(images(str(path), ""), by_name=True)._replace(others=others)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "none"


def _list_tar(
    container: Container, wanted: Callable[[str], bool], by_name: bool, parts: Path | None
) -> Listing:
    """List the members whose names are wanted, from `parts` if they are listed there."""
    if parts is None:
        return _scan_tar(container, wanted, by_name)
    file = _part_file(container, wanted, by_name, parts)
    damage = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
    with contextlib.suppress(*damage), np.load(file) as part:
        names, lengths, positions, sizes = (
            part[field] for field in ("names", "lengths", "positions", "sizes")
        )
        others = json.loads(str(part["others"]))
        return Listing(names, lengths, positions, sizes, int(part["skipped"]), others)
    listing = _scan_tar(container, wanted, by_name)
    with atomic_write(file) as temporary:
        values = listing._asdict() | {"others": json.dumps(dict(listing.others))}
        np.savez_compressed(temporary, **values)
    return listing


def _part_file(container: Container, wanted: Callable[[str], bool], by_name: bool, parts: Path) -> Path:
    what = repr((LISTING_VERSION, by_name, *container[1:]))
    return parts / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.{wanted.__name__}.npz"


def _scan_tar(container: Container, wanted: Callable[[str], bool], by_name: bool) -> Listing:
    largest = MAX_BYTES if wanted is is_image else container.end

    def place(member: tarfile.TarInfo) -> tuple[str, int, int] | None:
        plain = member.isreg() and not member.issparse() and member.size <= largest
        return (member.name, member.offset_data, member.size) if plain else None

    others: Counter[str] = Counter()

    def is_wanted(member: tarfile.TarInfo) -> bool:
        if not wanted(member.name) and not is_hidden(member.name):
            others[_suffix(member.name)] += 1
        return wanted(member.name)

    try:
        with _opened(container) as tar:
            members = (member for member in _members(tar, container.end) if not member.isdir())
            listing = _listing(map(place, filter(is_wanted, members)), by_name)
            _check_end(tar, container.end)
            return listing._replace(others=others)
    except _DAMAGE as error:
        where = container.path + (f":{container.inner}" if container.inner else "")
        what = str(error) or type(error).__name__
        raise ValueError(
            f"{where}: not a readable uncompressed tar ({what}); fetch or pack it again"
        ) from error


def _check_end(tar: tarfile.TarFile, end: int) -> None:
    """Raise an error unless there are only zeros from the last member to the end.

    tarfile takes a truncated or damaged header for the end, and does not look past the end mark; of tars that
    were written one after the other it sees only the first.
    """
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(min(tarfile.BLOCKSIZE, max(end - tar.offset, 0)))
    if block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"truncated or damaged: no header and no end at byte {tar.offset}")
    while block and not block.strip(b"\0"):
        block = tar.fileobj.read(min(_MAX_HEADER, end - tar.fileobj.tell()))
    if block:
        raise tarfile.ReadError(
            f"more data after the end mark at byte {tar.offset}, as of concatenated tars, which "
            "`tar --ignore-zeros` unpacks"
        )


class _Headers(io.BufferedReader):
    """A tar of which only headers are read; one that claims to be of gigabytes would fill the memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"damaged: a header of {size} bytes")
        return super().read(size)


@contextlib.contextmanager
def _opened(container: Container) -> Iterator[tarfile.TarFile]:
    """Open the tar at its place in the file; positions are those in the file."""
    with _Headers(io.FileIO(container.path)) as file:
        file.seek(container.start)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            yield tar


def _members(tar: tarfile.TarFile, end: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members in constant memory; raise an error for one that ends after `end`.

    Otherwise a truncated tar inside a tar would be read on into the next one.
    """
    while (member := tar.next()) is not None:
        if member.size < 0 or member.offset_data + member.size > end:
            raise tarfile.ReadError(f"truncated: {member.name} ends after byte {end}")
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # not public, but the one way to drop them


def _listing(found: Iterable[tuple[str, int, int] | None], by_name: bool) -> Listing:
    """Make a listing from name, position and size of each image; None is one that is skipped."""
    images, skipped = [], 0
    for image in found:
        if image is None:
            skipped += 1
        else:
            images.append((os.fsencode(image[0]), *image[1:]))
    if by_name:
        images.sort()
    numbers = np.array([(len(name), *place) for name, *place in images], dtype=np.int64).reshape(-1, 3)
    names = b"".join(name for name, _, _ in images)
    lengths, positions, sizes = np.ascontiguousarray(numbers.T)
    return Listing(np.frombuffer(names, dtype=np.uint8), lengths, positions, sizes, skipped)
