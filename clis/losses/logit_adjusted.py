"""Logit adjustment and balanced softmax: class frequencies as margins in training, none at test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import Rows
from clis.losses.cross_entropy import CrossEntropy
from clis.losses.precision import at_least_float32


class LogitAdjusted(CrossEntropy):
    """Logit adjustment (Menon et al., arXiv 2007.07314), the loss; officially tau = 1.

    Cross-entropy over C classes and background of z_j + tau (log n_j - m), where n_j is the number of
    training images of class j, at least 1, and m the mean of log n over the classes; the score is the softmax
    of z. The formula has no background: here its logit is untouched, and taking m off leaves the odds against
    background as they are on average.

    Training does not sample classes like their images: repeat factors and pasted instances flatten the long
    tail, so margins by images correct more than there is. With `counted`, n_j is the number of RoIs of class
    j that were sampled in all steps so far; the first step has no margins.

    Regions of the image-level stream have a plain cross-entropy and are never counted: that stream has no
    long tail.
    """

    centered = True
    """Whether m is taken off, which leaves background untouched."""
    counts: Tensor
    """float64 [C+1]: n of the classes, and of background."""

    def __init__(self, categories: Sequence[Any], *, tau: float = 1.0, counted: bool = False) -> None:
        """Set n to the training images of each class and 1 for background, or to 0 if it is to be counted.

        Args:
            categories: with `image_count`.
            tau: strength of the adjustment; 0 is none.
            counted: take n from the sampled RoIs of the training, not from its images.
        """
        super().__init__(categories)
        self.tau, self.counted = tau, counted
        images = [0 if counted else each.image_count for each in categories]
        counts = torch.tensor([*images, not counted], dtype=torch.float64)
        self.register_buffer("counts", counts, persistent=counted)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the softmax cross-entropy of the shifted logits, divided by `normalizer`."""
        z = at_least_float32(logits)
        return super().forward(z + self.shifts().to(z), labels, normalizer, rows)

    def image_level(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the plain softmax cross-entropy, divided by `normalizer`."""
        return super().forward(logits, labels, normalizer, rows)

    def shifts(self) -> Tensor:
        """Return what training adds to each logit, float64 [C+1]."""
        log_counts = self.counts.clamp(min=1).log()
        if self.centered:
            log_counts = F.pad(log_counts[:-1] - log_counts[:-1].mean(), (0, 1))
        return self.tau * log_counts

    def statistics(self, logits: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Count the RoIs of each class and background, [C+1], if they are wanted."""
        if not self.counted:
            return super().statistics(logits, labels, rows)
        ones = self.counts.new_ones(len(labels))
        return torch.zeros_like(self.counts).index_add_(0, labels, ones)

    def update(self, statistics: Tensor, progress: float) -> None:
        """Add the step's RoIs to n, if they are counted."""
        if self.counted:
            self.counts += statistics

    def summary(self) -> dict[str, float]:
        """Return median and minimum of n over the classes, if RoIs are counted."""
        if not self.counted:
            return {}
        of_classes = self.counts[:-1]
        return {
            "margin_count_median": of_classes.median().item(),
            "margin_count_min": of_classes.min().item(),
        }


class BalancedSoftmax(LogitAdjusted):
    """Balanced softmax (Ren et al., arXiv 2007.10740; official code: BalancedMetaSoftmax).

    Logit adjustment without m: cross-entropy of z_j + tau log n_j. Among classes it is the same, since a
    constant drops out of a softmax; against background it is not.

    - By images, background's logit is untouched. So training starts with background far below every class,
      and at test the odds against background are lower than in training by a factor of n_j: what has the
      probability 1/2 in training scores 2.5e-5 for a class of 40,000 images, below `test.score_threshold`.
    - With `counted`, background has the number of its own RoIs. So the first steps start at the frequencies
      of the RoIs, and at test the odds against background are higher than in training, by its number over
      n_j: scores are those of equally frequent classes and background, high throughout.

    What differs from the official code, and why:
    - The official detector has C sigmoids instead of this softmax, which is the paper's formula. It shifts
      their logits on foreground rows alone, by the log odds of the class's share of images.
    - No meta-learned sampler.
    """

    centered = False
