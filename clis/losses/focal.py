"""Softmax focal loss: rows that are already right weigh less, Unbiased Teacher's classification loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import Rows
from clis.losses.cross_entropy import CrossEntropy
from clis.losses.precision import at_least_float32


class Focal(CrossEntropy):
    """(1 - p)^gamma times -log p, where p is the softmax probability of the row's class or of background.

    The focal loss (arXiv 1708.02002) of a softmax over C + 1 logits, without its alpha and summed over RoIs,
    as in the official code of Unbiased Teacher (arXiv 2102.09480). The scores at test are those of
    `CrossEntropy`. `efl` is focal loss of sigmoids, equalized over the classes.
    """

    def __init__(self, categories: Sequence[Any], *, gamma: float = 1.5) -> None:
        """Set C + 1 logits.

        Args:
            gamma: of the weight (1 - p)^gamma, at least 1; below, its slope at p = 1 is infinite.
        """
        super().__init__(categories)
        if not gamma >= 1:
            raise ValueError(f"gamma={gamma:g}: must be at least 1")
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum over rows of logits [N,C+1] with labels int64 [N] in 0..C, divided by `normalizer`."""
        costs = F.cross_entropy(at_least_float32(logits), labels, reduction="none")  # -log p
        return ((1 - (-costs).exp()) ** self.gamma * costs).sum() / normalizer
