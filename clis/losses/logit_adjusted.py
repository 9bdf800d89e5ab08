"""Balanced softmax and logit adjustment: training takes the softmax of z_j + tau log n_j, inference of z_j.

Sources: Ren et al., Balanced Meta-Softmax, arXiv 2007.10740 (`BalancedMetaSoftmax`); Menon et al., Long-tail
learning via logit adjustment, arXiv 2007.07314 (tau = 1). n_j are the training images of class j, at least 1.

Over classes alone the two are the same for tau = 1, since a constant drops out of a softmax. They differ
where background takes part, of which neither formula knows; here its logit is untouched. Balanced softmax
adds log n_j as printed, so that training starts with background behind every class, and all odds against
background are lower at inference by the geometric mean of n_j. Logit adjustment takes log n_j less its mean
over the classes, which leaves these odds as they are on average.

What differs: BALMS' own detector has C sigmoids instead of the softmax, whose logits it shifts on foreground
rows alone, by the log odds of the share of images; and it learns a sampler. The image-level stream has no
long tail: its rows take the softmax of z_j, which is the adjustment by a uniform prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import Rows
from clis.losses.cross_entropy import CrossEntropy
from clis.losses.precision import at_least_float32


class BalancedSoftmax(CrossEntropy):
    """Cross-entropy of z_j + log n_j; softmax of z_j at test."""

    def __init__(self, categories: Sequence[Any]) -> None:
        super().__init__(categories)
        counts = torch.tensor([max(1, each.image_count) for each in categories], dtype=torch.float64)
        self.register_buffer("shift", F.pad(counts.log(), (0, 1)), persistent=False)

    def forward(
        self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows | None = None
    ) -> Tensor:
        logits = at_least_float32(logits)
        return super().forward(logits + self.shift.to(logits), labels, normalizer)

    def image_level(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        return super().forward(logits, labels, normalizer)


class LogitAdjusted(BalancedSoftmax):
    """Cross-entropy of z_j + tau (log n_j - mean of log n); softmax of z_j at test."""

    def __init__(self, categories: Sequence[Any], *, tau: float = 1.0) -> None:
        super().__init__(categories)
        log_counts = self.shift[:-1]
        self.shift = F.pad(tau * (log_counts - log_counts.mean()), (0, 1))
