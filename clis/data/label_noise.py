"""Wrong labels for a share of the image-level images, as a stream from a search engine has them."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from clis.data.image_level import ImageLevelIndex


def with_wrong_labels(index: ImageLevelIndex, share: float, seed: int) -> ImageLevelIndex:
    """The index with other labels for a share of its images, each another class that has images.

    Every image is drawn on its own, so that the share holds on average. The digest is another one: regions by
    the right label are not those by the wrong one. The labels are in memory, and a loader process that is not
    forked is sent all of the index, also of a prepared one.

    Args:
        share: in [0, 1].
        seed: non-negative; which images, and which labels.

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
