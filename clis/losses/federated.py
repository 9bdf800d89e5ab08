"""Federated loss: sigmoids of a few classes per image, for annotations that are not exhaustive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.precision import at_least_float32
from clis.losses.sigmoid import one_hot, prior_logit


class Federated(ClassificationLoss):
    """Federated loss (Zhou et al., CenterNet2, arXiv 2103.07461, and Detic, arXiv 2201.02605).

    Sigmoid cross-entropy of C classes without background, the score is s(z). Of each image only some classes
    count: those that its sampled RoIs have, background being one of them, and others up to 50 in all. The
    others are drawn without replacement, with probabilities proportional to n_j^0.5 for n_j training images.
    So an object that is present but not annotated seldom becomes a negative of its class.

    What differs from the official code, and why:
    - Classes are drawn per image, not per GPU, and from the image's seed: the same on any number of
      processes. Each class has an exponential waiting time of rate n_j^0.5, and the first ones are chosen.
    - The prior is a constant added to all logits instead of the start of the bias.

    Regions of the image-level stream have all classes, as Detic's image-level loss has: their label is that
    of the region, and the stream is balanced, so no class has too many negatives.
    """

    rates: Tensor

    def __init__(
        self, categories: Sequence[Any], *, classes: int = 50, power: float = 0.5, prior: float = 0.01
    ) -> None:
        """Set the rate n_j^power at which each class is drawn.

        Args:
            classes: that count in each image; more only if its RoIs have more.
            power: of the number of training images. Classes without any are never drawn.
            prior: probability that all sigmoids start from; 0 is none, i.e. 1/2.
        """
        super().__init__(categories)
        self.num_logits = self.num_classes
        if classes < 1:
            raise ValueError(f"classes={classes}: must be at least 1")
        self.classes, self.shift = classes, prior_logit(prior)
        counts = torch.tensor([each.image_count for each in categories], dtype=torch.float64)
        self.register_buffer("rates", torch.where(counts > 0, counts**power, 0), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the sigmoid cross-entropy over each image's `kept_classes`, divided by `normalizer`."""
        z = at_least_float32(logits) + self.shift
        targets = one_hot(labels, self.num_classes, z.dtype)
        weights = self.kept_classes(labels, rows).to(z)[rows.images]
        return F.binary_cross_entropy_with_logits(z, targets, weights, reduction="sum") / normalizer

    def image_level(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the sigmoid cross-entropy over all classes, divided by `normalizer`."""
        z = at_least_float32(logits) + self.shift
        targets = one_hot(labels, self.num_classes, z.dtype)
        return F.binary_cross_entropy_with_logits(z, targets, reduction="sum") / normalizer

    def scores(self, logits: Tensor) -> Tensor:
        """Return s(z_c) [N,C]."""
        return (at_least_float32(logits) + self.shift).sigmoid()

    def kept_classes(self, labels: Tensor, rows: Rows) -> Tensor:
        """Choose the classes that count in each image: bool [I,C]."""
        own = torch.zeros(rows.num_images * (self.num_classes + 1), dtype=torch.bool, device=labels.device)
        own.index_fill_(0, rows.images * (self.num_classes + 1) + labels, True)
        own = own.view(rows.num_images, self.num_classes + 1)
        left = self.classes - own.sum(dim=1, keepdim=True)
        own = own[:, :-1]
        waiting = -torch.log1p(-rows.uniform(self.num_classes)) / self.rates
        waiting = waiting.masked_fill(own | (self.rates == 0), math.inf)
        rank = waiting.argsort(dim=1, stable=True).argsort(dim=1)
        return own | ((rank < left) & waiting.isfinite())
