"""The classes of an annotation file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clis.text import name_key, shortened


@dataclass(frozen=True, kw_only=True)
class Category:
    """One class; its label is its place in `Annotations.categories`."""

    id: int
    name: str
    synset: str = ""
    """WordNet synset as in LVIS, e.g. ``aerosol.n.02``; empty where the file has none."""
    frequency: str
    """``r``, ``c`` or ``f``: 1-10, 11-100 or more than 100 training images (LVIS)."""
    image_count: int
    """Training images that hold the class."""
    instance_count: int = 0
    """Its boxes in training; 0 in checkpoints from before it was counted."""


def frequency_group(image_count: int) -> str:
    """Return LVIS's group for a number of training images: ``r`` up to 10, ``c`` up to 100, else ``f``."""
    return "r" if image_count <= 10 else "c" if image_count <= 100 else "f"


def check_same_categories(
    first: Sequence[Category], first_source: str, second: Sequence[Category], second_source: str
) -> None:
    """Raise an error unless each label stands for the same category id and name in both.

    Raises:
        ValueError: they differ; the message names the sources.
    """
    if len(first) != len(second):
        alone = [_only_in(first, second, first_source), _only_in(second, first, second_source)]
        raise ValueError(
            f"{first_source} has {len(first)} categories, {second_source} has {len(second)}; they must be of "
            f"one data set{''.join(alone)}"
        )
    for label, (a, b) in enumerate(zip(first, second)):
        if (a.id, name_key(a.name)) != (b.id, name_key(b.name)):
            raise ValueError(
                f"label {label} is category {a.id} ({a.name}) in {first_source} but {b.id} ({b.name}) in "
                f"{second_source}; they must be of one data set"
            )


def _only_in(categories: Sequence[Category], others: Sequence[Category], source: str) -> str:
    """Name the categories that others do not have, by id and name; empty if there is none."""
    known = {(each.id, name_key(each.name)) for each in others}
    names = [f"{each.id} {each.name}" for each in categories if (each.id, name_key(each.name)) not in known]
    return f"; only in {source}: {shortened(names, 5)}" if names else ""


def image_class_pairs(
    rows: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each image with each class that it has a box of once: two arrays int64 [k], sorted by image.

    Args:
        rows: int64 [A], the image of each box.
        labels: int64 [A], its class, below `num_classes`.
    """
    pairs = np.sort(rows * num_classes + labels)
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # np.unique from NumPy 2.3 on takes three times as long
    images, classes = np.divmod(pairs, num_classes)
    return images, classes
