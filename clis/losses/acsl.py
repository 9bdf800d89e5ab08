"""Adaptive class suppression loss: other classes are suppressed only where they score high."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clis.losses.binary import BinaryLoss
from clis.losses.contract import Rows


class ACSL(BinaryLoss):
    """Adaptive class suppression loss (Wang et al., arXiv 2104.00885; official code: CASIA-IVA-Lab/ACSL).

    Sigmoid cross-entropy of C classes and background, the score is s(z). RoIs of class y are positives of y,
    and negatives of those other columns that they give a probability of at least 0.7. Background is a
    negative of frequent classes, in 10 % of its RoIs of common ones and in 1 % of rare ones.

    The official recipe trains only the last layer, for 12 epochs, starting from a softmax baseline with its
    weights; `prior=0` then leaves their logits as they are (configs/shapes/acsl.yaml).

    What differs from the official code, and why:
    - It draws the background RoIs that count. Here all of them count, with the weights 0.1 and 0.01, which
      have the same expectation and need no random numbers.
    - The prior is a constant added to all logits instead of the start of the bias.

    Regions of the image-level stream are treated as RoIs of their class.
    """

    background_weights: Tensor

    def __init__(
        self,
        categories: Sequence[Any],
        *,
        threshold: float = 0.7,
        rare: float = 0.01,
        common: float = 0.1,
        prior: float = 0.01,
    ) -> None:
        """Set the weights of background by the frequency group of each class.

        Args:
            categories: with `frequency`.
            threshold: least probability at which an object is a negative of another class.
            rare, common: weights of background as a negative of such classes.
            prior: probability that all sigmoids start from; 0 is none, i.e. 1/2.
        """
        super().__init__(categories, prior=prior, background=True)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold:g}: must be between 0 and 1")
        self.threshold = threshold
        weights = [{"r": rare, "c": common}.get(each.frequency, 1.0) for each in categories]
        background_weights = torch.tensor([*weights, 1.0], dtype=torch.float64)
        self.register_buffer("background_weights", background_weights, persistent=False)

    def weights(self, z: Tensor, targets: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Keep positives, sure negatives, and background as far as the class's frequency group says."""
        sure = (z.sigmoid() >= self.threshold).to(z)
        is_object = (labels < self.num_classes)[:, None]
        return torch.where(is_object, sure.maximum(targets), self.background_weights.to(z))
