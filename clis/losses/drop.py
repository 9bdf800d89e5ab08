"""DropLoss: objects are no negatives of tail classes, and background is one only in part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.binary import SIGMOID, BinaryLoss
from clis.losses.contract import Rows
from clis.losses.gumbel import GUMBEL


class Drop(BinaryLoss):
    """DropLoss (Hsieh et al., arXiv 2104.06402); with the Gumbel activation as in kostas1515/GOL.

    Sigmoid cross-entropy of C classes without background, the score is s(z). RoIs of an object are no
    negatives of tail classes, as in EQL. Background is one with the probability m: the share of RoIs of tail
    classes among the RoIs of objects.

    What differs from the official code, and why:
    - It draws, for each background RoI and tail class, whether the negative counts. Here all count with the
      weight m, which has the same expectation and needs no random numbers.
    - m is that of the image, not of the images of a GPU: the same on any number of processes. Without an
      object it is 1, as in GOL.
    - A tail class has at most `tail_images` training images. The official limit is a share of the images,
      0.0011 in LVIS v1 and 0.00177 in v0.5: its rare and common classes.
    - The prior is a constant added to all logits instead of the start of the bias (in GOL -2, a probability
      of 0.0006).

    Regions of the image-level stream are objects, and treated as such.
    """

    is_tail: Tensor

    def __init__(
        self, categories: Sequence[Any], *, tail_images: int = 100, prior: float = 0.001, gumbel: bool = False
    ) -> None:
        """Mark the tail classes, those with few training images.

        Args:
            categories: with `image_count`.
            tail_images: most training images of a tail class; -1 is no tail class, so nothing is dropped.
            prior: probability that all activations start from; 0 is none.
            gumbel: take the activation exp(-exp(-z)), see `Gumbel`, instead of the sigmoid.
        """
        super().__init__(categories, prior=prior, activation=GUMBEL if gumbel else SIGMOID)
        is_tail = torch.tensor([each.image_count <= tail_images for each in categories], dtype=torch.bool)
        self.register_buffer("is_tail", is_tail, persistent=False)

    def weights(self, z: Tensor, targets: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Give negatives of tail classes the weight 0, or m for background."""
        weights = torch.where(self.is_tail, self._tail_weights(labels, rows).to(z)[:, None], 1.0)
        return weights.maximum(targets)

    def _tail_weights(self, labels: Tensor, rows: Rows) -> Tensor:
        """Return the weight [N] of each RoI as a negative of tail classes: 0, or m of its image."""
        is_object = labels < self.num_classes
        of_tail = F.pad(self.is_tail, (0, 1))[labels]
        tail, objects = rows.sum_per_image(torch.stack([of_tail, is_object], dim=1).double()).T
        share = torch.where(objects > 0, tail / objects.clamp(min=1), 1.0)
        return torch.where(is_object, 0.0, share[rows.images])
