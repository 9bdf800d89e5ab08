"""Balanced softmax and logit adjustment: class frequencies as margins in training, none at test."""

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
    """Balanced softmax (Ren et al., arXiv 2007.10740; official code: BalancedMetaSoftmax).

    Cross-entropy over C classes and background of z_j + log n_j, where n_j is the number of training images
    of class j, at least 1; the score is the softmax of z. The formula has no background: here its logit is
    untouched. So training starts with background far below every class, and at test the odds against
    background are lower than in training by a factor of n_j.

    What differs from the official code, and why:
    - The official detector has C sigmoids instead of this softmax, which is the paper's formula. It shifts
      their logits on foreground rows alone, by the log odds of the class's share of images.
    - No meta-learned sampler.

    Regions of the image-level stream have a plain cross-entropy: that stream has no long tail.
    """

    shift: Tensor

    def __init__(self, categories: Sequence[Any]) -> None:
        super().__init__(categories)
        counts = torch.tensor([max(1, each.image_count) for each in categories], dtype=torch.float64)
        self.register_buffer("shift", F.pad(counts.log(), (0, 1)), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the softmax cross-entropy of z_j + log n_j, divided by `normalizer`."""
        z = at_least_float32(logits)
        return super().forward(z + self.shift.to(z), labels, normalizer, rows)

    def image_level(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the plain softmax cross-entropy, divided by `normalizer`."""
        return super().forward(logits, labels, normalizer, rows)


class LogitAdjusted(BalancedSoftmax):
    """Logit adjustment (Menon et al., arXiv 2007.07314), the loss; officially tau = 1.

    Cross-entropy of z_j + tau (log n_j - m), where m is the mean of log n over the classes; all else as in
    balanced softmax. Among classes, tau = 1 is balanced softmax, since a constant drops out of a softmax.
    Taking m off leaves the odds against background as they are on average.
    """

    def __init__(self, categories: Sequence[Any], *, tau: float = 1.0) -> None:
        """Set the shifts tau (log n_j - m); background has none.

        Args:
            tau: strength of the adjustment; 0 is none.
        """
        super().__init__(categories)
        log_counts = self.shift[:-1]
        self.shift = F.pad(tau * (log_counts - log_counts.mean()), (0, 1))
