"""Equalized focal loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.binary import BinaryLoss, one_hot
from clis.losses.contract import Rows
from clis.losses.gradients import GradientRatio, gradient_sums


class EFL(BinaryLoss):
    """Equalized focal loss (Li et al., arXiv 2201.02593; official code: ModelTC/EOD), on sampled RoIs.

    **Not what the paper's Table I has in this row**: that is a one-stage detector (the figures are those of
    the official model zoo), and no official recipe has EFL on RoIs. Focal losses are known to be weak there:
    in the ablations of BAGS (arXiv 2006.10408) focal loss halves the AP of cross-entropy.

    A focal loss over C sigmoids without background, the score is s(z). With the gradient ratio g of a class,
    clamped to 0..1, its focusing parameter is gamma_j = gamma + scale (1 - g), and a term is

        a_t (gamma_j / gamma) (1 - p_t)^gamma_j (-log p_t),

    with a_t = alpha for positives and 1 - alpha for negatives. gamma_j carries no gradient. g starts at 1,
    which is plain focal loss.

    What differs from the official code, and why:
    - It divides by the number of positives, which here would depend on how a batch is split: RoIs times
      `Rows.positive_fraction` is the number that sampling aims at. Regions of the image-level stream are all
      positive, so they are divided by their number.
    - Gradients are computed by their formula, not by a hook, and before the division by that constant,
      which leaves g as it is.
    - The prior is a constant added to all logits instead of the start of the bias.
    """

    def __init__(
        self,
        categories: Sequence[Any],
        *,
        gamma: float = 2.0,
        scale: float = 8.0,
        alpha: float = 0.25,
        prior: float = 0.001,
    ) -> None:
        """Check and keep the factors of the terms.

        Args:
            gamma, scale, alpha: of the terms, see above; `gamma` above 0.
            prior: probability that all sigmoids start from; 0 is none, i.e. 1/2.

        Raises:
            ValueError: `gamma` is not above 0.
        """
        super().__init__(categories, prior=prior)
        if not gamma > 0:
            raise ValueError(f"gamma={gamma:g}: must be above 0")
        self.gamma, self.scale, self.alpha = gamma, scale, alpha
        self.ratio = GradientRatio(self.num_classes)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the focal terms, divided by the rows that can be positive."""
        log_p, modulation, _, _ = self._terms(logits, labels)
        return -(modulation * log_p).sum() / (normalizer * rows.positive_fraction)

    def statistics(self, logits: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Sum |dL/dz| before the division, [2,C] for positives and negatives."""
        log_p, modulation, gamma, targets = self._terms(logits, labels)
        rest = -log_p.expm1()  # 1 - p_t
        return gradient_sums(modulation * (rest - gamma * (1 - rest) * log_p), targets)

    def update(self, statistics: Tensor, progress: float) -> None:
        """Add the gradient sums [2,C] of the step to those of the training."""
        self.ratio.update(statistics)

    def summary(self) -> dict[str, float]:
        """Return median and minimum of the gradient ratios g."""
        return self.ratio.summary("efl")

    def _terms(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log p_t [N,C], the factors of -log p_t [N,C], gamma_j [C] and one-hot targets [N,C]."""
        z = self.shifted(logits)
        targets = one_hot(labels, self.num_classes, z.dtype)
        gamma = (self.gamma + self.scale * (1 - self.ratio().clamp(0, 1))).to(z.dtype)
        z_t = torch.where(targets > 0, z, -z)  # p_t is its sigmoid
        log_p = F.logsigmoid(z_t)
        log_rest = log_p - z_t  # log(1 - p_t), and never -inf
        weight = gamma / self.gamma
        weights = torch.where(targets > 0, self.alpha * weight, (1 - self.alpha) * weight)
        return log_p, weights * (gamma * log_rest).exp(), gamma, targets
