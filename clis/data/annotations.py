"""Instance-level annotations: LVIS v1, LVIS v0.5 and COCO-form JSON files as packed arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """One annotation file, packed: N images, A annotations, C classes.

    Annotations are grouped by image, in file order within an image; images are in file order. Labels are
    0..C-1 in ascending order of the category id.
    """

    path: str
    categories: tuple[Category, ...]
    image_ids: np.ndarray
    """int64 [N]."""
    image_sizes: np.ndarray
    """int32 [N, 2], height and width."""
    file_names: np.ndarray
    """str [N], relative to the image folder (see `image_file_name`)."""
    offsets: np.ndarray
    """int64 [N + 1]: the annotations of image i are the rows offsets[i]:offsets[i + 1] of the next five."""
    annotation_ids: np.ndarray
    """int64 [A]."""
    labels: np.ndarray
    """int64 [A]."""
    bboxes: np.ndarray
    """float64 [A, 4], x y w h as in the file, so that the metric sees the file's own digits."""
    areas: np.ndarray
    """float64 [A], the file's ``area`` (w * h where the file has none)."""
    crowd: np.ndarray
    """bool [A], COCO's ``iscrowd``; never in LVIS."""
    federated: bool
    """True where the file has LVIS's neg_category_ids / not_exhaustive_category_ids; False means every image
    is annotated exhaustively for every class."""
    negatives: tuple[np.ndarray, np.ndarray]
    """Labels known to be absent, as (offsets int64 [N + 1], labels int64 [...]); empty where not federated."""
    not_exhaustive: tuple[np.ndarray, np.ndarray]
    """Labels not exhaustively annotated, in the same form."""
