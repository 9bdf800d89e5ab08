"""LOCE's equilibrium loss: margins by how sure the detector is of each class at present.

Source: Feng et al., Exploring Classification Equilibrium in Long-Tailed Object Detection, arXiv 2108.07507
(`EquilibriumLoss`, `LoceRoIHead`). Softmax cross-entropy of z_j + log s_j over C classes and background,
where s_j is the mean probability that rows of class j give to j: a class that is hard to recognize (s_j
small) gets a margin. Sum / rows. Test score: the softmax of z_j.

State: s_j, from 0.01 on; after each step s_j <- a s_j + (1 - a) mean with a = 0.9^n, for the n objects of j
in the step. Background's s is 0.01 throughout.

What differs: the loss alone, not the memory of RoI features that LOCE adds. n counts images with the class
instead of objects, and the mean is over an image's rows first: rows do not tell which object they match. The
state moves after the step instead of before its loss. The original fine-tunes the heads of a softmax
baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import Rows
from clis.losses.cross_entropy import CrossEntropy
from clis.losses.precision import at_least_float32


class LOCE(CrossEntropy):
    """Cross-entropy with the log of each class's mean score as a margin."""

    def __init__(
        self,
        categories: Sequence[Any],
        *,
        momentum: float = 0.9,
        start: float = 0.01,
        background: float = 0.01,
    ) -> None:
        """
        Args:
            momentum: of the mean scores, for each image that has the class.
            start: of the mean scores.
            background: its mean score, constant.
        """
        super().__init__(categories)
        self.momentum, self.background = momentum, background
        self.register_buffer("mean_scores", torch.full((self.num_classes,), start, dtype=torch.float64))

    def forward(
        self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows | None = None
    ) -> Tensor:
        logits = at_least_float32(logits)
        margins = F.pad(self.mean_scores, (0, 1), value=self.background).log()
        return super().forward(logits + margins.to(logits), labels, normalizer)

    def statistics(self, logits: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Mean scores of each class, added up over the images that have it, and how many do: [2,C]."""
        own = at_least_float32(logits).softmax(dim=1).gather(1, labels[:, None]).squeeze(1).double()
        place = rows.images * self.num_logits + labels
        empty = own.new_zeros(rows.num_images * self.num_logits)
        totals = empty.index_add(0, place, own)
        counts = empty.index_add(0, place, torch.ones_like(own))
        both = torch.stack([totals / counts.clamp(min=1), (counts > 0).double()])
        return both.view(2, rows.num_images, self.num_logits).sum(dim=1)[:, :-1]

    def update(self, statistics: Tensor, progress: float) -> None:
        total, count = statistics
        kept = self.momentum**count
        self.mean_scores.mul_(kept).add_((1 - kept) * total / count.clamp(min=1))

    def summary(self) -> dict[str, float]:
        return {
            "mean_score_least": self.mean_scores.min().item(),
            "mean_score_median": self.mean_scores.median().item(),
        }
