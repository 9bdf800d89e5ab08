"""InfoNCE, Eq. 1 of the paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clis.losses.precision import at_least_float32


def info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    negative_mask: Tensor,
    temperature: float,
    normalizer: Tensor | float,
) -> Tensor:
    """Compute InfoNCE (Eq. 1), summed over the pairs and divided by `normalizer`.

    Of a pair: -log(exp(q.p / tau) / (exp(q.p / tau) + sum over negatives of exp(q.n / tau))).

    Args:
        queries, positives: [P,E] of unit length, f_i and f_d.
        negatives: [Q,E] of unit length.
        negative_mask: bool [Q] or [P,Q], true where a negative takes part.
        temperature: tau, above 0.
        normalizer: divides the sum.

    Logits and logsumexp are float32 or wider, also under autocast: the paper met NaN at beta = 0.1.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, positives, negatives = map(at_least_float32, (queries, positives, negatives))
        positive = (queries * positives).sum(dim=1, keepdim=True) / temperature
        negative = (queries @ negatives.T / temperature).masked_fill(~negative_mask, -math.inf)
        # as log(1 + sum of exp(n - p)), which loses no digits where p is large
        gaps = torch.cat([torch.zeros_like(positive), negative - positive], dim=1)
        return gaps.logsumexp(dim=1).sum() / normalizer
