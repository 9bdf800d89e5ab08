"""Adaptive class suppression: a sigmoid learns a negative only where it is too sure of it.

Source: Wang et al., Adaptive Class Suppression Loss, arXiv 2104.00885 (`ACSL`). C + 1 sigmoids, the last one
background's. A row of class y has weight 1 on y, and 1 on each other column whose probability is at least
0.7; the rest is 0. A background row has weight 1 on background and on frequent classes, and is a negative of
common classes in 10 % and of rare ones in 1 % of the cases. Sum of weight x cross-entropy / rows. Test score:
sigmoid.

Defaults: threshold 0.7, rare 0.01, common 0.1, prior 0.01; the original fine-tunes the last fc of a softmax
baseline for 12 epochs, from the baseline's weights (prior=0.5 then adds nothing to its logits).

What differs: the original draws which background rows count, on the CPU; here all of them do, by the draw's
expectation 0.1 and 0.01. Groups are by the categories' `frequency`, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.precision import at_least_float32
from clis.losses.sigmoid import binary_cross_entropy, one_hot, prior_logit


class ACSL(ClassificationLoss):
    """C + 1 sigmoids, background last; of the negatives the confident ones alone."""

    def __init__(
        self,
        categories: Sequence[Any],
        *,
        threshold: float = 0.7,
        rare: float = 0.01,
        common: float = 0.1,
        prior: float = 0.01,
    ) -> None:
        """
        Args:
            threshold: probability from which on a row of a class is a negative of others.
            rare, common: weight of background rows as negatives of such classes.
            prior: probability at which all columns start.
        """
        super().__init__(categories)
        self.num_logits = len(categories) + 1
        self.threshold, self.shift = threshold, prior_logit(prior)
        weights = [{"r": rare, "c": common}.get(each.frequency, 1.0) for each in categories]
        on_background = torch.tensor([*weights, 1.0], dtype=torch.float64)
        self.register_buffer("on_background", on_background, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        logits = at_least_float32(logits) + self.shift
        targets = one_hot(labels, self.num_logits)
        learned = (logits.detach().sigmoid() >= self.threshold) | targets
        is_background = (labels == self.num_classes)[:, None]
        weights = torch.where(is_background, self.on_background.to(logits), learned.to(logits))
        return binary_cross_entropy(logits, targets, weights, normalizer)

    def scores(self, logits: Tensor) -> Tensor:
        return (at_least_float32(logits)[:, :-1] + self.shift).sigmoid()
