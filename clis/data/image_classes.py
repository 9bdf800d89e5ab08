"""Matching of image-level classes to categories, and how far a set of images covers the categories."""

from __future__ import annotations

import codecs
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clis.data.categories import Category
from clis.text import counted, name_key, printable, shortened

_SYNSETS = Path(__file__).with_name("wnids.tsv")
GROUP_NAMES = {"r": "rare", "c": "common", "f": "frequent", "all": "all"}
_FEWEST = 10
"""Classes that the coverage names as those with the fewest images."""
_LISTS = {
    "without_images": ("category without images", "categories without images"),
    "unmatched": ("class matches no category and is left out", "classes match no category and are left out"),
    "empty": ("folder or tar without an image", "folders and tars without an image"),
}

NO_CATEGORY = -1
"""Label of images that are left out."""


def class_labels(categories: Sequence[Category], mapping: str | Path | None) -> Callable[[str], int | None]:
    """Return a function from the name of a class to its label, or None where it matches no category.

    The name is translated by the mapping, then taken as a category's name, its synset or the synset's WordNet
    3.0 id (wnid), else as a name in its `clis.text.name_key` form. A synset or wnid that two categories share
    matches neither. The function raises `ValueError` for a name that may mean two categories.

    Args:
        mapping: file of ``name<TAB>category`` lines; a header and lines that start with # are allowed.

    Raises:
        ValueError: the mapping is malformed.
    """
    translated = {} if mapping is None else _read_mapping(Path(mapping))
    synsets = _synsets()
    exact = (
        _unshared([synsets.get(category.synset, ("", False))[0] for category in categories])
        | _unshared([category.synset for category in categories])
        | _unshared([category.name for category in categories])
    )
    loosely: dict[str, list[int]] = {}
    for label, category in enumerate(categories):
        loosely.setdefault(name_key(category.name), []).append(label)
    aliases = {name_key(key): value for key, value in translated.items()}

    def label_of(given: str) -> int | None:
        name = translated.get(given, aliases.get(name_key(given), given))
        if name in exact:
            return exact[name]
        labels = loosely.get(name_key(name), [])
        if len(labels) > 1:
            meant = " or ".join(f"{categories[each].id} {categories[each].name!r}" for each in labels)
            raise ValueError(
                f"image-level class {printable(given)!r}: is category {meant} meant? Give them names that "
                "differ by more than case and spaces, or name the folder exactly"
            )
        return labels[0] if labels else None

    return label_of


def match_classes(
    names: Sequence[str],
    label_of: Callable[[str], int | None],
    categories: Sequence[Category],
    *,
    strict: bool,
    where: str,
    hint: Callable[[], str] = str,
) -> tuple[list[int | None], tuple[str, ...]]:
    """Match names to labels (None where one matches no category), and list the names without match, sorted.

    Args:
        hint: says what else may be wrong where no name matches.

    Raises:
        ValueError: a name matches no category and `strict`, or no name matches; `where` is named.
    """
    labels = [label_of(name) for name in names]
    unmatched = tuple(sorted({name for name, label in zip(names, labels) if label is None}))
    some_match = len(unmatched) < len(set(names))
    if not some_match or (unmatched and strict):
        expected = shortened([category.name for category in categories])
        raise ValueError(
            f"{where}: {len(unmatched)} of {len(set(names))} image-level classes match no category"
            + (f": {shortened(unmatched)}" if unmatched else "")
            + f"; name them by category ({expected}), WordNet synset or wnid, or give a mapping file "
            "(data.mapping)"
            + ("; data.drop_unmatched=true, or prepare without --strict, leaves them out" * some_match)
            + ("" if some_match else hint())
        )
    return labels, unmatched


def in_imagenet22k(categories: Sequence[Category]) -> np.ndarray:
    """Return which categories have a synset that is one of ImageNet-22k's 21,841 classes; bool [C].

    They are 997 of LVIS v1's 1203 (277 r, 390 c, 330 f), as in the paper, and 1024 of v0.5's 1230, for which
    the paper says 1023.
    """
    synsets = _synsets()
    return np.array([synsets.get(category.synset, ("", False))[1] for category in categories], dtype=bool)


class MemberLabels:
    """A label file of mixed tars: lines of ``member name<TAB>class``.

    Blank lines and lines that start with # are skipped. Names are kept as 64-bit hashes, 21 bytes per line:
    among 10^8 names, some two share a hash with a probability of 3 in 10,000.
    """

    def __init__(self, path: str | Path, label_of: Callable[[str], int | None]) -> None:
        """Read the label file.

        Args:
            label_of: see `class_labels`.

        Raises:
            ValueError: a line does not have two columns, a member has two lines, or there is no line.
        """
        self.path = Path(path)
        known: dict[bytes, int] = {}

        def rows() -> Iterator[tuple[int, int, int]]:
            for line, (name, class_name) in _read_rows(self.path, 2):
                if class_name not in known:
                    label = label_of(os.fsdecode(class_name))
                    known[class_name] = NO_CATEGORY if label is None else label
                yield _hash(name), line, known[class_name]

        row_dtype = np.dtype([("name", np.uint64), ("line", np.int64), ("label", np.int32)])
        table = np.fromiter(rows(), dtype=row_dtype)
        if not len(table):
            raise ValueError(f"{self.path}: no line of member name, tab, class in it")
        table = table[np.argsort(table["name"], kind="stable")]
        self._names, self._lines, self._labels = (
            np.ascontiguousarray(table[column]) for column in ("name", "line", "label")
        )
        repeated = np.flatnonzero(self._names[1:] == self._names[:-1])
        if len(repeated):
            first, second = self._lines[repeated[0] : repeated[0] + 2]
            raise ValueError(
                f"{self.path}, line {second}: the member of line {first} again ({len(repeated)} such lines); "
                "leave one line a member"
            )
        self._used = np.zeros(len(table), dtype=bool)
        self.class_names = [os.fsdecode(class_name) for class_name in known]
        """The classes of the file."""
        self.without_label = 0
        """Members so far that have no line."""
        self.without_label_names: list[str] = []
        """The first of them."""

    def take(self, names: Sequence[bytes], container: str) -> np.ndarray:
        """Return the labels of a container's members: int32 [len(names)], -1 without a line or category.

        Raises:
            ValueError: a member of the file was taken before, by this container or another.
        """
        hashes = np.array([_hash(name) for name in names], dtype=np.uint64)
        rows = np.searchsorted(self._names, hashes).clip(max=len(self._names) - 1)
        found = self._names[rows] == hashes
        members = np.flatnonzero(found)
        taken, first, counts = np.unique(rows[found], return_index=True, return_counts=True)
        again = self._used[taken] | (counts > 1)
        if again.any():
            name = printable(os.fsdecode(names[members[first[np.argmax(again)]]]))
            raise ValueError(
                f"{container}: member {name} is there twice, or in an earlier tar too; {self.path} gives "
                "labels by name, so every image needs a name of its own"
            )
        self._used[taken] = True
        self.without_label += len(names) - len(members)
        for place in np.flatnonzero(~found)[: _FEWEST - len(self.without_label_names)]:
            self.without_label_names.append(f"{container}:{os.fsdecode(names[place])}")
        return np.where(found, self._labels[rows], NO_CATEGORY).astype(np.int32)

    @property
    def any_used(self) -> bool:
        """Whether a member was taken."""
        return bool(self._used.any())

    @property
    def without_member(self) -> np.ndarray:
        """Numbers of the lines whose member was not taken, ascending: int64."""
        return np.sort(self._lines[~self._used])

    def report(self) -> dict[str, Any]:
        """Count what did not match: ``members_without_label``, ``labels_without_member``; name the first."""
        lines = self.without_member
        return {
            "members_without_label": self.without_label,
            "first_members_without_label": self.without_label_names,
            "labels_without_member": len(lines),
            "first_lines_without_member": lines[:_FEWEST].tolist(),
        }


def coverage(categories: Sequence[Category], counts: np.ndarray) -> dict[str, Any]:
    """Measure how far image-level images cover the categories, in numbers that JSON can hold.

    Args:
        counts: int64 [C], images of each label.

    Returns:
        ``images``; ``groups``: for ``r``, ``c``, ``f`` and ``all`` the numbers of ``classes``, of those
        ``with_images``, of those ``in_imagenet22k`` and of those that are both (``both``), and the ``min``,
        ``median`` and ``max`` images per class among the classes that have some (None where none has);
        ``fewest``: names and counts of the classes with the fewest images; ``without_images``: names.
    """
    counts = np.asarray(counts)
    frequencies = np.array([category.frequency for category in categories])
    in_22k = in_imagenet22k(categories)
    groups = {}
    for group in GROUP_NAMES:
        inside = (frequencies == group) | (group == "all")
        some = counts[inside & (counts > 0)]
        groups[group] = {
            "classes": int(inside.sum()),
            "with_images": len(some),
            "in_imagenet22k": int((inside & in_22k).sum()),
            "both": int((inside & in_22k & (counts > 0)).sum()),
            "min": int(some.min()) if len(some) else None,
            "median": float(np.median(some)) if len(some) else None,
            "max": int(some.max()) if len(some) else None,
        }
    order = np.argsort(counts, kind="stable")
    fewest = order[counts[order] > 0][:_FEWEST]
    return {
        "images": int(counts.sum()),
        "groups": groups,
        "fewest": [(categories[label].name, int(counts[label])) for label in fewest],
        "without_images": [categories[label].name for label in np.flatnonzero(counts == 0).tolist()],
    }


def describe_coverage(covered: dict[str, Any]) -> str:
    """Format the coverage as a table and some lines for the terminal; long lists are shortened.

    Args:
        covered: from `coverage`; also what a report on classes, folders and members adds to it (see
            `clis.commands.prepare`).
    """
    groups = covered["groups"]
    lines = [f"{'':10}{'classes':>9}{'with images':>13}{'images a class: min':>21}{'median':>9}{'max':>9}"]
    for group, name in GROUP_NAMES.items():
        row = groups[group]
        low, middle, high = ("-" if row[k] is None else f"{row[k]:g}" for k in ("min", "median", "max"))
        lines.append(f"{name:10}{row['classes']:>9}{row['with_images']:>13}{low:>21}{middle:>9}{high:>9}")
    every = groups["all"]
    if every["in_imagenet22k"]:
        parts = ", ".join(f"{groups[group]['in_imagenet22k']} {group}" for group in "rcf")
        lines.append(
            f"{every['in_imagenet22k']} of {every['classes']} classes are in ImageNet-22k ({parts}), "
            f"you have {every['both']} of them"
        )
    lines.append("fewest images: " + shortened([f"{name} {count}" for name, count in covered["fewest"]]))
    for key, what in _LISTS.items():
        if names := covered.get(key):
            lines.append(f"{counted(len(names), *what)}: {shortened(names)}")
    if skipped := covered.get("skipped"):
        names = shortened(covered["skipped_in"])
        lines.append(
            f"{skipped} images are left out, since they are links in a tar, no regular files or larger than "
            f"1 GiB: in {names}"
        )
    if others := covered.get("others"):
        lines.append(describe_others(others))
    if missing := covered.get("members_without_label"):
        names = shortened(covered["first_members_without_label"])
        lines.append(f"{missing} images of the tars have no label: {names}")
    if missing := covered.get("labels_without_member"):
        numbers = shortened([str(line) for line in covered["first_lines_without_member"]])
        lines.append(f"{missing} lines of the label file have no image in the tars: lines {numbers}")
    return "\n".join(lines)


def describe_others(others: Mapping[str, int]) -> str:
    """Say how many files were left out because their suffix is none of an image."""
    most_first = sorted(others.items(), key=lambda item: -item[1])
    counts = shortened([f"{suffix} {count}" for suffix, count in most_first])
    return f"{sum(others.values())} files are left out, since their suffix is none of an image: {counts}"


def _hash(name: bytes) -> int:
    # `tar cf x.tar ./folder` gives its members names that start with ./
    name = name.removeprefix(b"./")
    if not name.isascii():  # a Mac's tar has decomposed accents, and a label file seldom
        name = os.fsencode(unicodedata.normalize("NFC", os.fsdecode(name)))
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _unshared(keys: Sequence[str]) -> dict[str, int]:
    """Map each key to its label, without empty keys and keys that two labels share."""
    counts = Counter(keys)
    return {key: label for label, key in enumerate(keys) if key and counts[key] == 1}


def _synsets() -> dict[str, tuple[str, bool]]:
    """Map each synset to its wnid and whether it is in ImageNet-22k."""
    rows = (map(os.fsdecode, row) for _, row in _read_rows(_SYNSETS, 3))
    return {synset: (wnid, flag == "1") for synset, wnid, flag in rows}


def _read_mapping(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    alike: dict[str, tuple[str, str]] = {}
    for line, row in _read_rows(path, 2):
        key, value = map(os.fsdecode, row)
        above, meant = alike.setdefault(name_key(key), (key, value))
        if name_key(meant) != name_key(value):
            alias = f" ({above})" * (above != key)
            raise ValueError(f"{path}, line {line}: {key} means {value!r} here and {meant!r} above{alias}")
        table.setdefault(key, value)
    return table


def _read_rows(path: Path, columns: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the number and the columns of each line; in bytes, as file names need not be UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{path}: the text is UTF-16; save it as UTF-8")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip() or line.startswith(b"#"):
                continue
            row = [column.strip() for column in line.split(b"\t")]
            if len(row) != columns or not all(row):
                text = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
                raise ValueError(
                    f"{path}, line {number}: {text!r} is not {('two', 'three')[columns - 2]} columns with a "
                    "tab between them"
                )
            yield number, row
