"""DropLoss: tail classes are not suppressed by objects of other classes, and by background only in part.

Source: Hsieh et al., DropLoss for Long-Tail Instance Segmentation, arXiv 2104.06402; with the Gumbel
activation `DropLoss` of arXiv 2207.10936. C sigmoids. Negatives of tail classes, which have at most 100
training images, have weight 0 on foreground rows (EQL). On background rows they are kept with the probability
m, the share of rows of tail classes among the foreground rows. Sum of weight x cross-entropy / rows. Test
score: the activation.

Defaults: lambda 0.0011 to 0.00177 of LVIS' training images, which is the rare and common classes: `tail` 100;
prior 0.001. tail=0 drops nothing.

What differs: the original draws for each background row and class; here all have the draw's expectation m. m
is the image's, not that of a GPU's images: the same on any number of processes. Where an image has no
foreground row, m is 1 (as in the original: nothing is dropped). The prior is a constant on the logits, not
the bias' start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.gumbel import gumbel, gumbel_cross_entropy, gumbel_logit
from clis.losses.precision import at_least_float32
from clis.losses.sigmoid import binary_cross_entropy, one_hot, prior_logit


class Drop(ClassificationLoss):
    """C sigmoids or Gumbel activations, with fewer negatives of tail classes."""

    def __init__(
        self, categories: Sequence[Any], *, tail: int = 100, prior: float = 0.001, gumbel: bool = False
    ) -> None:
        """
        Args:
            tail: most training images of a tail class.
            prior: probability at which all classes start.
            gumbel: the activation exp(-exp(-z)) instead of the sigmoid.
        """
        super().__init__(categories)
        self.num_logits = len(categories)
        self.gumbel, self.shift = gumbel, gumbel_logit(prior) if gumbel else prior_logit(prior)
        is_tail = torch.tensor([each.image_count <= tail for each in categories], dtype=torch.bool)
        self.register_buffer("is_tail", is_tail & (tail > 0), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        logits = at_least_float32(logits) + self.shift
        targets = one_hot(labels, self.num_classes)
        dropped = self.is_tail & ~targets
        weights = torch.where(dropped, self._kept(labels, rows)[:, None], 1.0)
        if self.gumbel:
            return (weights.to(logits) * gumbel_cross_entropy(logits, targets)).sum() / normalizer
        return binary_cross_entropy(logits, targets, weights, normalizer)

    def scores(self, logits: Tensor) -> Tensor:
        logits = at_least_float32(logits) + self.shift
        return gumbel(logits) if self.gumbel else logits.sigmoid()

    def _kept(self, labels: Tensor, rows: Rows) -> Tensor:
        """Weight [N] of the rows as negatives of tail classes: 0 for foreground, m for background."""
        is_foreground = labels < self.num_classes
        of_tail = F.pad(self.is_tail, (0, 1))[labels]
        tail, foreground = rows.sum_per_image(torch.stack([of_tail, is_foreground], dim=1).double()).T
        share = torch.where(foreground > 0, tail / foreground.clamp(min=1), 1.0)
        return torch.where(is_foreground, 0.0, share[rows.images])
