"""The balance of positive and negative gradients per class, which EQL v2 and EFL are steered by."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GradientRatio(nn.Module):
    """G+ and G-, summed over the whole training: how strongly the logit of each class was pulled up and down.

    The ratio of a class is G+ / (G- + 1e-10), and 100 before anything was counted, as in the official code.
    """

    sums: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2, num_classes, dtype=torch.float64))

    def forward(self) -> Tensor:
        """Return the ratio of each class, float64 [C]."""
        positive, negative = self.sums
        return torch.where(self.sums.sum(dim=0) > 0, positive / (negative + 1e-10), 100.0)

    def update(self, statistics: Tensor) -> None:
        """Add the sums [2,C] of a step."""
        self.sums += statistics

    def summary(self, name: str) -> dict[str, float]:
        """Return the median and minimum ratio, for the log."""
        ratio = self()
        return {f"{name}_ratio_median": ratio.median().item(), f"{name}_ratio_min": ratio.min().item()}


def gradient_sums(gradients: Tensor, targets: Tensor) -> Tensor:
    """Sum absolute gradients [N,C] over the rows, split by targets [N,C] in 0..1; float64 [2,C]."""
    parts = gradients * targets, gradients * (1 - targets)
    return torch.stack([part.sum(dim=0) for part in parts]).double()
