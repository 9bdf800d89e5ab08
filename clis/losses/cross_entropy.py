"""Softmax cross-entropy over C classes and background, the paper's classification loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.pcb import make_pcb
from clis.losses.precision import at_least_float32


class CrossEntropy(ClassificationLoss):
    """L_incls and L_imcls: softmax over C + 1 logits, background last.

    With PCB, rows of both streams have the softened targets; the predictions that it compares are the softmax
    over the C classes, as in the official code.
    """

    softmax_scores = True

    def __init__(self, categories: Sequence[Any], *, pcb: float = 0.0, pcb_start: float = 2 / 3) -> None:
        """Set C + 1 logits, and PCB if its weight is not 0.

        Args:
            pcb, pcb_start: see `PairwiseClassBalance`; officially 0.4.
        """
        super().__init__(categories)
        self.num_logits = len(categories) + 1
        self.pcb = make_pcb(categories, pcb, pcb_start)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum over rows of logits [N,C+1] with labels int64 [N] in 0..C, divided by `normalizer`."""
        z = at_least_float32(logits)
        targets = labels
        if self.pcb is not None:
            targets = self.pcb.targets(labels, self.num_logits, z.dtype, rows.stage)
        return F.cross_entropy(z, targets, reduction="sum") / normalizer

    def scores(self, logits: Tensor) -> Tensor:
        """Return the softmax probabilities of the classes, [N,C] in 0..1, without background's."""
        return at_least_float32(logits).softmax(dim=1)[:, :-1]

    def statistics(self, logits: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Count what PCB needs, from the softmax over the C classes; nothing without PCB."""
        if self.pcb is None:
            return super().statistics(logits, labels, rows)
        return self.pcb.statistics(at_least_float32(logits)[:, :-1].softmax(dim=1), labels)

    def update(self, statistics: Tensor, progress: float) -> None:
        """Move PCB's confusion matrix, if there is one."""
        if self.pcb is not None:
            self.pcb.update(statistics, progress)

    def summary(self) -> dict[str, float]:
        """Return PCB's values; none without PCB."""
        return {} if self.pcb is None else self.pcb.summary()
