"""What losses with one sigmoid per class share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def prior_logit(prior: float) -> float:
    """Give the logit of a probability, in (0,1): added to logits, it is where all classes start."""
    if not 0 < prior < 1:
        raise ValueError(f"prior={prior}: must be between 0 and 1")
    return math.log(prior / (1 - prior))


def one_hot(labels: Tensor, num_columns: int) -> Tensor:
    """Compare labels int64 [N] with the columns: bool [N,K]; background without a column has none true."""
    return labels[:, None] == torch.arange(num_columns, device=labels.device)


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, normalizer: Tensor | float
) -> Tensor:
    """Sum the binary cross-entropy of logits [N,K] over rows and columns, divided by `normalizer`.

    Args:
        targets: bool [N,K].
        weights: [N,K] or None.
    """
    weights = None if weights is None else weights.to(logits)
    total = F.binary_cross_entropy_with_logits(logits, targets.to(logits), weights, reduction="sum")
    return total / normalizer
