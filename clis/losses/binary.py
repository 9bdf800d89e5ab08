"""Losses of independent classes: one probability and one binary term for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.precision import at_least_float32


class Activation(NamedTuple):
    """What turns a logit into a probability."""

    probability: Callable[[Tensor], Tensor]
    """Of logits, in 0..1."""
    logit: Callable[[float], float]
    """Its inverse, of probabilities in (0,1)."""
    cross_entropy: Callable[[Tensor, Tensor], Tensor]
    """-log p of logits [N,K] where targets [N,K] are 1, and -log(1 - p) where they are 0."""

    def prior_logit(self, prior: float) -> float:
        """Return the logit whose probability is `prior`, in [0,1); 0, which stands for no prior, gives 0.

        Added to the logits, it does what the usual start of the bias does, without a head that knows its
        loss; and weight decay pulls the bias to the prior, not to a probability of 1/2.

        Raises:
            ValueError: `prior` is not in [0,1).
        """
        if not 0 <= prior < 1:
            raise ValueError(f"prior={prior:g}: must be at least 0, which switches it off, and below 1")
        return self.logit(prior) if prior > 0 else 0.0


SIGMOID = Activation(
    torch.sigmoid,
    lambda p: math.log(p / (1 - p)),
    functools.partial(F.binary_cross_entropy_with_logits, reduction="none"),
)


def one_hot(labels: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return [N,columns] with a 1 in the column of each row's label; no column, no 1 (background)."""
    return (labels[:, None] == torch.arange(columns, device=labels.device)).to(dtype)


class BinaryLoss(ClassificationLoss):
    """Base of weighted binary cross-entropies: a subclass says in `weights` which terms count, and how much.

    The score of a class is its probability. A column for background, if there is one, takes no part in it.
    """

    def __init__(
        self,
        categories: Sequence[Any],
        *,
        prior: float,
        background: bool = False,
        activation: Activation = SIGMOID,
    ) -> None:
        """Set C logits, one more with `background`, and the constant that is added to all of them.

        Args:
            prior: probability that all columns start from; 0 is none, i.e. that of a logit of 0.

        Raises:
            ValueError: `prior` is not in [0,1).
        """
        super().__init__(categories)
        self.num_logits = self.num_classes + background
        self.activation, self.shift = activation, activation.prior_logit(prior)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the weighted binary cross-entropy of logits [N,K], divided by `normalizer`."""
        z = self.shifted(logits)
        targets = one_hot(labels, self.num_logits, z.dtype)
        terms = self.activation.cross_entropy(z, targets)
        return (self.weights(z.detach(), targets, labels, rows) * terms).sum() / normalizer

    def weights(self, z: Tensor, targets: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Return the weight of each term; by default 1.

        Args:
            z: logits [N,K] with the prior, without a gradient.
            targets: 0 or 1, [N,K] in z's type.
            labels, rows: as of `forward`.

        Returns:
            What broadcasts with [N,K], in z's type.
        """
        return torch.ones_like(z[:, :1])

    def scores(self, logits: Tensor) -> Tensor:
        """Return the probability of each class, [N,C]."""
        return self.activation.probability(self.shifted(logits)[:, : self.num_classes])

    def shifted(self, logits: Tensor) -> Tensor:
        """Return the logits with the prior, float32 at least."""
        return at_least_float32(logits) + self.shift
