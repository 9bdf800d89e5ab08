"""Gumbel optimized loss: another activation in place of the sigmoid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clis.losses.binary import Activation, BinaryLoss


def gumbel(z: Tensor) -> Tensor:
    """Return the Gumbel activation exp(-exp(-z)), in 0..1."""
    return (-(-z).exp()).exp()


def gumbel_cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy [N,K] of activations; targets [N,K] are 0 or 1."""
    surprise = (-z.clamp(-4, 10)).exp()  # -log p
    return surprise.where(targets > 0, -(-(-surprise).expm1()).log())


GUMBEL = Activation(gumbel, lambda p: -math.log(-math.log(p)), gumbel_cross_entropy)


class Gumbel(BinaryLoss):
    """Gumbel optimized loss (Alexandridis et al., arXiv 2207.10936; official code: kostas1515/GOL, GumbelCE).

    Binary cross-entropy of C classes and background with the activation p = exp(-exp(-z)), which is also the
    score. It falls to 0 much faster than the sigmoid, as fits classes that are nearly always absent. z is
    limited to -4..10, without a gradient beyond.

    With DropLoss, which is the paper's best: `drop(gumbel=true)`.

    What differs from the official code, and why:
    - The prior is a constant added to all logits instead of the start of the bias, -2, which is a probability
      of 0.0006. The last layer starts from random weights (`model.roi.fc_cls_std`), not from 0.001
      throughout.
    - The official code limits the mean loss of a GPU to 20, which switches off its gradient; not so here.

    The official recipe tests with `test.nms_iou=0.3`. Regions of the image-level stream are treated as RoIs.
    """

    def __init__(self, categories: Sequence[Any], *, prior: float = 0.0006) -> None:
        """Set C + 1 logits and the constant that is added to them.

        Args:
            prior: probability that all activations start from; 0 is none, i.e. 1/e.
        """
        super().__init__(categories, prior=prior, background=True, activation=GUMBEL)
