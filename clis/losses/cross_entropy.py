"""Softmax cross-entropy over C classes and background, the paper's classification loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.precision import at_least_float32


class CrossEntropy(ClassificationLoss):
    """L_incls and L_imcls: softmax over C + 1 logits, background last."""

    softmax_scores = True

    def __init__(self, categories: Sequence[Any]) -> None:
        super().__init__(categories)
        self.num_logits = len(categories) + 1

    def forward(
        self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows | None = None
    ) -> Tensor:
        """Sum over rows of logits [N,C+1] with labels int64 [N] in 0..C, divided by `normalizer`."""
        return F.cross_entropy(at_least_float32(logits), labels, reduction="sum") / normalizer

    def scores(self, logits: Tensor) -> Tensor:
        """Class probabilities [N,C] in 0..1, without background's."""
        return at_least_float32(logits).softmax(dim=1)[:, :-1]
