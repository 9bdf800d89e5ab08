"""``python -m clis prepare image-level``: class tars, folders or mixed tars -> a prepared index, and what it covers."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clis.data.annotations import Category, load_annotations
from clis.data.image_classes import (
    MemberLabels,
    class_labels,
    coverage,
    describe_coverage,
    match_classes,
    shortened,
)
from clis.data.image_level import (
    HEADER,
    is_index,
    is_intact,
    mark_unfinished,
    open_index,
    read_header,
    write_index,
)
from clis.data.image_scan import Container, Listing, find_containers, list_images, part_file
from clis.engine.log import Progress, say

PARTS = "parts"
"""Folder in the index with the listings of tars. Without it, tars are scanned again."""

Labelled = tuple[int | np.ndarray, Listing]


def prepare_image_level(
    roots: Sequence[str | Path],
    annotations: str | Path,
    out: str | Path,
    *,
    mapping: str | Path | None = None,
    labels: str | Path | None = None,
    strict: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Writes the index of the images of `roots` into the folder `out`, for `data.image_level`; prints coverage.

    Listings of finished tars stay in ``out/parts``: after an interruption, and when some tars have changed,
    only the others are scanned. If nothing has changed, the index stays as it is.

    Args:
        roots: folders with a folder or a tar a class, or tars of class tars.
        annotations: file whose categories are the labels.
        mapping: see `clis.data.image_classes.class_labels`.
        labels: file of ``member name<TAB>class`` lines (see `MemberLabels`): the folders and tars of `roots` are
            of mixed classes. The index has them in the order of the bytes in the tar.
        strict: what matches no category is an error; by default it is left out and reported.
        workers: processes that scan tars; None is one a CPU.

    Returns:
        What `clis.data.image_classes.coverage` counts, with ``empty`` (names of containers without an image) and,
        with `labels`, ``members_without_label``, ``labels_without_member`` and lists of the first of them.

    Raises:
        ValueError: see `find_containers`, `class_labels`, `MemberLabels`; tars are damaged (all are named); no
            image is left; `out` is no place for an index.
    """
    out, roots = Path(out), [Path(root) for root in roots]
    _check_out(out, roots)
    categories = load_annotations(annotations).categories
    label_of = class_labels(categories, mapping)
    if not is_index(out):
        mark_unfinished(out)
    parts = out / PARTS
    where = ", ".join(map(str, roots))
    is_class = partial(_is_class, label_of) if labels is None else _is_anything
    containers = find_containers(roots, is_class, parts)
    notes: dict[str, Any] = {"unmatched": (), "empty": []}
    if labels is None:
        names = [container.class_name for container in containers]
        found, notes["unmatched"] = match_classes(names, label_of, categories, strict=strict, where=where)
        containers = [container for container, label in zip(containers, found) if label is not None]
        container_labels = [label for label in found if label is not None]
    ...
