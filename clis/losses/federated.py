"""Federated loss: sigmoid cross-entropy of a few classes of an image, for annotations that are not
exhaustive.

Source: Zhou et al., CenterNet2 (arXiv 2103.07461) and Detic (arXiv 2201.02605); `get_fed_loss_inds` there,
`USE_FED_LOSS` in detectron2. C sigmoids, no background column. Of each image those classes are kept that its
sampled RoIs have (background counts as one) and others up to 50 in all, drawn without replacement with
probability proportional to image_count^0.5; the rest have weight 0, so that an object that is there but not
annotated is seldom learned as a negative. Sum over rows and kept classes / rows. Test score: sigmoid.

Defaults: classes 50, power 0.5, prior 0.01.

What differs: classes are drawn per image, not per GPU of 8 images, and by the image's own seed: the same on
any number of processes. The first to finish of exponential races of these rates are a draw without
replacement. The prior is a constant on the logits, not the bias' start. Detic's image loss has no such mask,
nor has ours for the image-level stream: its label is known for the region, and its classes are balanced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.precision import at_least_float32
from clis.losses.sigmoid import binary_cross_entropy, one_hot, prior_logit


class Federated(ClassificationLoss):
    """C sigmoids; of each image its own classes and some others."""

    def __init__(
        self, categories: Sequence[Any], *, classes: int = 50, power: float = 0.5, prior: float = 0.01
    ) -> None:
        """
        Args:
            classes: kept of each image, more if its RoIs have more.
            power: of `image_count`, the weight by which others are drawn; those without images never are.
            prior: probability at which all classes start.
        """
        super().__init__(categories)
        self.num_logits = len(categories)
        self.classes, self.shift = classes, prior_logit(prior)
        counts = torch.tensor([each.image_count for each in categories], dtype=torch.float64)
        self.register_buffer("rates", torch.where(counts > 0, counts**power, 0), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        kept = self.kept_classes(labels, rows)[rows.images]
        return self._sum(logits, labels, kept, normalizer)

    def image_level(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        return self._sum(logits, labels, None, normalizer)

    def scores(self, logits: Tensor) -> Tensor:
        return (at_least_float32(logits) + self.shift).sigmoid()

    def kept_classes(self, labels: Tensor, rows: Rows) -> Tensor:
        """Choose the classes that count in each image: bool [I,C]."""
        own = torch.zeros(rows.num_images, self.num_classes + 1, dtype=torch.bool, device=labels.device)
        own[rows.images, labels] = True
        left = self.classes - own.sum(dim=1, keepdim=True)
        own = own[:, :-1]
        races = -torch.log1p(-rows.uniform(self.num_classes)) / self.rates
        races = races.masked_fill(own | (self.rates == 0), math.inf)
        rank = races.argsort(dim=1, stable=True).argsort(dim=1)
        return own | ((rank < left) & races.isfinite())

    def _sum(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None, normalizer: Tensor | float
    ) -> Tensor:
        targets = one_hot(labels, self.num_classes)
        return binary_cross_entropy(at_least_float32(logits) + self.shift, targets, weights, normalizer)
