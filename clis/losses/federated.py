"""Federated loss: sigmoids of a few classes per image, for annotations that are not exhaustive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clis.losses.binary import BinaryLoss, one_hot
from clis.losses.contract import Rows


class Federated(BinaryLoss):
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
        super().__init__(categories, prior=prior)
        if classes < 1:
            raise ValueError(f"classes={classes}: must be at least 1")
        self.classes = classes
        counts = torch.tensor([each.image_count for each in categories], dtype=torch.float64)
        self.register_buffer("rates", torch.where(counts > 0, counts**power, 0), persistent=False)

    def weights(self, z: Tensor, targets: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Keep the `kept_classes` of each row's image."""
        return self.kept_classes(labels, rows).to(z)[rows.images]

    def image_level(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the sigmoid cross-entropy over all classes, divided by `normalizer`."""
        z = self.shifted(logits)
        return self.activation.cross_entropy(z, one_hot(labels, self.num_logits, z.dtype)).sum() / normalizer

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
