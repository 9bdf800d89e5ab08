"""Losses of the localization task, as sums over a normalizer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clis.losses.precision import at_least_float32


def l1_loss(deltas: Tensor, targets: Tensor, normalizer: Tensor | float) -> Tensor:
    """Compute L_loc and RPN's box loss: |deltas - targets| summed over [N,4] and divided by `normalizer`."""
    return F.l1_loss(at_least_float32(deltas), at_least_float32(targets), reduction="sum") / normalizer


def objectness_loss(logits: Tensor, is_object: Tensor, normalizer: Tensor | float) -> Tensor:
    """Compute L_obj and RPN's: binary cross-entropy of logits [N], summed and divided by `normalizer`."""
    logits = at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(logits, is_object.to(logits), reduction="sum") / normalizer
