"""The image files that a command is to look at, and where they are in an annotation file."""

from __future__ import annotations

import glob
import itertools
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clis.data.annotations import Annotations
from clis.data.categories import Category, check_same_categories
from clis.data.image_scan import is_hidden, is_image
from clis.data.images import FORMATS
from clis.data.streams import read_annotations
from clis.text import counted, printable

LONGEST = 200
"""Bytes of a picture's name, and of each of its folders: most systems allow 255, also for temporary names."""


@dataclass(frozen=True)
class ImageFile:
    """An image to look at."""

    path: Path
    name: str
    """Relative to the folder that was named, else the file's own name."""
    among: bool = False
    """Whether it was found in a folder or by a glob, and not named itself."""
    links: tuple[Path, ...] = ()
    """Other paths of the same file that were found."""

    def joined(self, other: ImageFile) -> ImageFile:
        """Return the file of two paths under its own name, which is not that of a link."""
        first, second = (other, self) if self.path.is_symlink() > other.path.is_symlink() else (self, other)
        links = (*first.links, second.path, *second.links)
        return replace(first, among=self.among and other.among, links=links)


def find_images(sources: Sequence[str], written: Sequence[Path]) -> tuple[list[ImageFile], int]:
    """List the image files of the sources: files as they are named, folders and globs sorted.

    Each file comes once, by its own name rather than by that of a link. Links to folders are followed; hidden
    files and folders are left out.

    Args:
        written: files and folders that the command writes, which are left out too: a picture is never taken
            for a photo, and no photo is written over.

    Returns:
        The files, and how many other files are in the folders, by their names no images.

    Raises:
        FileNotFoundError: a source does not exist, a glob matches nothing, or no image is found.
    """
    found: dict[Path, ImageFile] = {}
    own, num_own, num_others = {path.resolve() for path in written}, 0, 0
    for source in sources:
        if Path(source).exists():
            matches = [source]
        elif glob.has_magic(source):
            matches = sorted(glob.glob(source, recursive=True))
        else:
            matches = []
        if not matches:
            what = "matches no file" if glob.has_magic(source) else "no such file or folder"
            raise FileNotFoundError(f"{source}: {what}; name images, folders or globs")
        for path in map(Path, matches):
            is_folder = path.is_dir()
            for each in sorted(_files_below(path)) if is_folder else [path]:
                full = each.resolve()
                if not own.isdisjoint([full, *full.parents]):
                    num_own += 1
                elif is_folder and not is_image(each.name):
                    num_others += 1
                else:
                    name = str(each.relative_to(path)) if is_folder else each.name
                    file = ImageFile(each, name, is_folder or matches != [source])
                    found[full] = found[full].joined(file) if full in found else file
    if not found:
        only = f"the only images are in {written[0]}, where this command writes; name another --out"
        what = only if num_own else f"no {FORMATS} file found"
        raise FileNotFoundError(f"{', '.join(sources)}: {what}")
    return list(found.values()), num_others


def _files_below(folder: Path) -> Iterator[Path]:
    """List the files in and below a folder that are not hidden, also in linked folders, each folder once."""
    seen = {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, followlinks=True):
        inside = {name: os.path.realpath(os.path.join(here, name)) for name in folders if not is_hidden(name)}
        folders[:] = [name for name, real in inside.items() if real not in seen]
        seen.update(inside.values())
        yield from (Path(here, name) for name in names if not is_hidden(name))


@dataclass(frozen=True)
class Annotated:
    """Which images of an annotation file the image files are."""

    annotations: Annotations
    rows: list[int]
    """The place of each file."""

    def ids(self) -> list[int]:
        """Return the image id of each file."""
        return self.annotations.image_ids[self.rows].tolist()


def find_annotated(
    path: Path, files: Sequence[ImageFile], categories: Sequence[Category]
) -> tuple[Annotated, list[ImageFile]]:
    """Find image files in an annotation file, which need not have boxes, by the ends of their paths.

    Files of a folder or glob that are not in it are left out, since splits may share a folder. A path may be
    that of a link, or of what it links to. Names are understood as by training: with backslashes, a leading
    ``./``, and accents in either of Unicode's forms.

    Returns:
        Where the files are, and those that are left.

    Raises:
        ValueError: no file is in it, or not one that was named itself; two files would be one image, or a
            name is that of several images; or it is of other classes.
    """
    annotations = read_annotations(path, unlabeled=True)
    check_same_categories(categories, "the detector", annotations.categories, annotations.path)
    rows: dict[str, list[int]] = {}
    names = [_plain(name) for name in annotations.file_names]
    for row, name in enumerate(names):
        rows.setdefault(os.path.basename(name), []).append(row)
    found: list[int] = []
    kept: list[ImageFile] = []
    for file in files:
        paths = (*map(os.path.abspath, (file.path, *file.links)), file.path.resolve())
        full = {_plain(path) for path in paths}
        own = [
            row
            for row in {row for path in full for row in rows.get(os.path.basename(path), [])}
            if any(path.endswith(names[row]) for path in full)
        ]
        if not own and file.among:
            continue
        if len(own) != 1:
            what = "is none of its images" if not own else f"may be any of {len(own)} of its images"
            raise ValueError(f"{file.path}: {what} ({path}); leave --annotations out, or name other files")
        if own[0] in found:
            other = kept[found.index(own[0])].path
            raise ValueError(
                f"{file.path} and {other} would both be image {annotations.image_ids[own[0]]} of {path}, "
                "whose names are the ends of both; name one of them"
            )
        found.append(own[0])
        kept.append(file)
    if not kept:
        raise ValueError(
            f"{path}: none of {counted(len(files), 'given file')} is one of its images; leave "
            "--annotations out, or name the folder of its images"
        )
    return Annotated(annotations, found), kept


def _plain(path: object) -> str:
    """Return a path in a form that is equal for all ways to write it, with one slash before every part."""
    text = unicodedata.normalize("NFC", str(path).replace("\\", "/"))
    return posixpath.normpath("/" + text.lstrip("/"))


def picture_names(files: Sequence[ImageFile]) -> list[str]:
    """Return the file names of the pictures, each its own: as those of the files, but JPEGs.

    Names that no page could link to are made printable, long ones are cut.
    """
    taken: set[str] = set()
    names = []
    for file in files:
        stem = printable(Path(file.name).with_suffix("").as_posix()).replace("\\", "_")
        stem = "/".join(part.encode()[:LONGEST].decode(errors="ignore") for part in stem.split("/"))
        tries = (f"{stem}{'' if number == 1 else f'_{number}'}.jpg" for number in itertools.count(1))
        names.append(next(name for name in tries if name not in taken))
        taken.add(names[-1])
    return names
