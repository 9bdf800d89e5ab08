"""What the losses of independent sigmoids share: their targets and their prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def one_hot(labels: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return [N,columns] with a 1 in the column of each row's label; no column, no 1 (background)."""
    return (labels[:, None] == torch.arange(columns, device=labels.device)).to(dtype)


def prior_logit(prior: float) -> float:
    """Return the logit of a sigmoid that is `prior`, in [0,1); 0, which stands for no prior, gives 0.

    Added to the logits, it does what the usual start of the bias does, without a head that knows its loss;
    and weight decay pulls the bias to the prior, not to a probability of 1/2.

    Raises:
        ValueError: `prior` is not in [0,1).
    """
    if not 0 <= prior < 1:
        raise ValueError(f"prior={prior:g}: must be at least 0, which switches it off, and below 1")
    return math.log(prior / (1 - prior)) if prior > 0 else 0.0
