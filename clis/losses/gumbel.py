"""Gumbel optimized loss: the activation exp(-exp(-z)) in place of the sigmoid.

Source: Alexandridis et al., Long-tailed Instance Segmentation using Gumbel Optimized Loss, arXiv 2207.10936
(`GumbelCE`; with DropLoss see clis/losses/drop.py). Of z the activation rises doubly exponentially from 0 and
is as slow as the sigmoid towards 1, so that classes that are nearly always absent are easier to keep low.
Binary cross-entropy of C + 1 columns, the last one background's, with z between -4 and 10 (no gradient
beyond); sum / rows. Test score: the activation.

Defaults: prior exp(-exp(2)), about 0.0006, which is the original's bias of -2.

What differs: the original starts the last fc at the constant 0.001 (here `model.roi.fc_cls_std`) and tests
with NMS at 0.3 (`test.nms_iou`). It limits a GPU's mean loss to 20, beyond which it has no gradient: here it
has none. The prior is a constant on the logits, not the bias' start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.precision import at_least_float32
from clis.losses.sigmoid import one_hot


def gumbel(logits: Tensor) -> Tensor:
    """The activation exp(-exp(-z)), in 0..1."""
    return (-(-logits).exp()).exp()


def gumbel_logit(prior: float) -> float:
    """Give the logit whose activation is `prior`, in (0,1)."""
    if not 0 < prior < 1:
        raise ValueError(f"prior={prior}: must be between 0 and 1")
    return -math.log(-math.log(prior))


def gumbel_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy [N,K] of activations; targets bool [N,K]."""
    surprise = (-logits.clamp(-4, 10)).exp()  # -log p
    return surprise.where(targets, -(-(-surprise).expm1()).log())


class Gumbel(ClassificationLoss):
    """C + 1 Gumbel activations, background last."""

    def __init__(self, categories: Sequence[Any], *, prior: float = 0.0006) -> None:
        """
        Args:
            prior: probability at which all columns start.
        """
        super().__init__(categories)
        self.num_logits = len(categories) + 1
        self.shift = gumbel_logit(prior)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        targets = one_hot(labels, self.num_logits)
        return gumbel_cross_entropy(at_least_float32(logits) + self.shift, targets).sum() / normalizer

    def scores(self, logits: Tensor) -> Tensor:
        return gumbel(at_least_float32(logits)[:, :-1] + self.shift)
