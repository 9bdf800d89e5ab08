"""Equalization loss v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.binary import BinaryLoss, one_hot
from clis.losses.contract import Rows
from clis.losses.gradients import GradientRatio, gradient_sums
from clis.losses.pcb import make_pcb


class EQLv2(BinaryLoss):
    """EQL v2 (Tan et al., arXiv 2012.08548; official code: tztztztztz/eqlv2).

    Sigmoid cross-entropy of C classes and background. With the gradient ratio g of a class, its negatives
    weigh f = sigmoid(gamma (g - mu)) and its positives 1 + alpha (1 - f); background weighs 1. The score is
    s(z_c) (1 - s(z_background)). g starts at 100, so that the first step has weights of 1.

    A class with a share of positive RoIs above the prior has g above 1, so nothing happens: EQL v2 acts only
    on classes rarer than `prior`. metrics.jsonl has g, and the share of classes below mu.

    What differs from the official code, and why:
    - The prior is a constant added to all logits instead of the start of the bias.
    - One sum over all processes, divided by all RoIs; the official code divides by those of its own GPU.
    - The sums of gradients are saved (officially since 2022 only).
    - `objectness=False` leaves background out, for a detector with L_obj (`clis.objectness`).

    Regions of the image-level stream read the weights. They say nothing about background, since the stream
    has none, and its channel would only learn to be low on mosaics; so it takes no part there.
    """

    def __init__(
        self,
        categories: Sequence[Any],
        *,
        gamma: float = 12.0,
        mu: float = 0.8,
        alpha: float = 4.0,
        prior: float = 0.001,
        objectness: bool = True,
        pcb: float = 0.0,
        pcb_start: float = 2 / 3,
    ) -> None:
        """Set C logits, one more for background with `objectness`, and the gradient ratios at 100.

        Args:
            gamma, mu, alpha: of the weights, see above.
            prior: probability that all sigmoids start from; 0 is none, i.e. 1/2.
            objectness: whether there is a background channel, and its factor in the score.
            pcb, pcb_start: see `PairwiseClassBalance`.
        """
        super().__init__(categories, prior=prior, background=objectness)
        self.has_objectness = objectness
        self.gamma, self.mu, self.alpha = gamma, mu, alpha
        self.ratio = GradientRatio(self.num_classes)
        self.pcb = make_pcb(categories, pcb, pcb_start)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the weighted sigmoid cross-entropy of classes and background, divided by `normalizer`."""
        return self._sum(self.shifted(logits), labels, rows) / normalizer

    def image_level(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the weighted sigmoid cross-entropy of the classes alone, divided by `normalizer`."""
        return self._sum(self.shifted(logits)[:, : self.num_classes], labels, rows) / normalizer

    def scores(self, logits: Tensor) -> Tensor:
        """Return s(z_c) (1 - s(z_background)), or s(z_c) without a background channel; [N,C]."""
        probabilities = self.shifted(logits).sigmoid()
        classes, background = probabilities.tensor_split([self.num_classes], dim=1)
        return classes * (1 - background) if self.has_objectness else classes

    def statistics(self, logits: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Sum |dL/dz| of the classes before the division, [2,C] for positives and negatives; and PCB's."""
        z = self.shifted(logits)[:, : self.num_classes]
        targets, predicted = self._targets(labels, z, rows), z.sigmoid()
        gradients = self._weights(targets) * (predicted - targets).abs()
        counted = gradient_sums(gradients, targets)
        if self.pcb is None:
            return counted
        return torch.cat([counted.flatten(), self.pcb.statistics(predicted, labels).flatten()])

    def update(self, statistics: Tensor, progress: float) -> None:
        """Add the gradient sums of the step to those of the training, and move PCB's confusion matrix."""
        own, of_pcb = statistics.flatten().tensor_split([2 * self.num_classes])
        self.ratio.update(own.unflatten(0, (2, -1)))
        if self.pcb is not None:
            self.pcb.update(of_pcb.unflatten(0, (self.num_classes, -1)), progress)

    def summary(self) -> dict[str, float]:
        """Return median and minimum of g, the share of classes with g below mu, and PCB's values."""
        below = (self.ratio() < self.mu).double().mean().item()
        values = self.ratio.summary("eqlv2") | {"eqlv2_below_mu": below}
        return values if self.pcb is None else values | self.pcb.summary()

    def _sum(self, z: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        targets = self._targets(labels, z, rows)
        return F.binary_cross_entropy_with_logits(z, targets, self._weights(targets), reduction="sum")

    def _targets(self, labels: Tensor, z: Tensor, rows: Rows) -> Tensor:
        """Return the targets [N,K] of logits z [N,K]."""
        if self.pcb is None:
            return one_hot(labels, z.shape[1], z.dtype)
        return self.pcb.targets(labels, z.shape[1], z.dtype, rows.stage)

    def _weights(self, targets: Tensor) -> Tensor:
        """Return the weight of each term, [N,K] as the targets."""
        negative = torch.sigmoid(self.gamma * (self.ratio() - self.mu)).to(targets.dtype)
        negative = F.pad(negative, (0, targets.shape[1] - self.num_classes), value=1.0)  # background
        return negative + targets * (1 + self.alpha * (1 - negative) - negative)
