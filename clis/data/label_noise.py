"""Wrong labels for a share of the image-level images, as in images from a search engine."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from clis.data.image_level import ImageLevelIndex


def with_wrong_labels(index: ImageLevelIndex, share: float, seed: int) -> ImageLevelIndex:
    """Return the index with wrong labels for a share of its images, each of another class that has images.

    Every image is drawn independently, so the share holds on average. The digest changes, too: regions found
    with the right labels are not those of the wrong ones. The labels are in memory, and a loader process that
    is not forked is sent the whole index, even a prepared one.

    Args:
        share: in [0, 1].
        seed: non-negative; selects the images and their labels.

    Raises:
        ValueError: all images are of one class.
    """
    present = np.flatnonzero(index.image_counts)
    if len(present) < 2:
        raise ValueError("data.label_noise needs image-level images of two classes at least")
    generator = np.random.default_rng([seed, len(index)])
    wrong = generator.random(len(index)) < share
    steps = generator.integers(1, len(present), len(index))
    place = np.searchsorted(present, index.labels)
    labels = np.where(wrong, present[(place + steps) % len(present)], index.labels).astype(np.int32)
    return dataclasses.replace(
        index,
        labels=labels,
        image_counts=np.bincount(labels, minlength=len(index.image_counts)),
        digest=hashlib.sha256(f"{index.digest} {share!r} {seed}".encode()).hexdigest(),
        folder=None,
    )
