"""Equalization loss, version 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clis.losses.binary import BinaryLoss
from clis.losses.contract import Rows


class EQL(BinaryLoss):
    """Equalization loss (Tan et al., arXiv 2003.05176; official code: tztztztztz/eql.detectron2).

    Sigmoid cross-entropy of C classes without background, the score is s(z). RoIs of an object are no
    negatives of tail classes, so that the many objects of frequent classes do not push rare ones down;
    background still is negative for all classes.

    What differs from the official code, and why:
    - A tail class has at most `tail_images` training images. The official limit is a share of the images,
      0.00177 in LVIS v0.5, i.e. 100 of the 56,740 that have boxes: LVIS's rare and common classes. A number
      stays that where only the size of the data set differs.
    - The prior is a constant added to all logits instead of the start of the bias.

    Regions of the image-level stream are objects, and treated as such.
    """

    is_tail: Tensor

    def __init__(self, categories: Sequence[Any], *, tail_images: int = 100, prior: float = 0.001) -> None:
        """Mark the tail classes, those with few training images.

        Args:
            categories: with `image_count`.
            tail_images: most training images of a tail class.
            prior: probability that all sigmoids start from; 0 is none, i.e. 1/2.
        """
        super().__init__(categories, prior=prior)
        is_tail = torch.tensor([each.image_count <= tail_images for each in categories], dtype=torch.bool)
        self.register_buffer("is_tail", is_tail, persistent=False)

    def weights(self, z: Tensor, targets: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Leave out objects as negatives of tail classes."""
        is_object = (labels < self.num_classes)[:, None]
        return torch.where(is_object & self.is_tail, targets, 1.0)
