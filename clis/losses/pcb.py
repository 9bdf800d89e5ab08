"""The pairwise class balance regularizer: classes share the target with those that are taken for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.99
MAX_CLASSES = 5000
"""Beyond, the confusion matrix and what a step counts for it take more than 200 MB each."""


class PairwiseClassBalance(nn.Module):
    """PCB (He et al., arXiv 2201.02784; official code: megvii-research/PCB).

    Row i of the matrix M is the mean prediction over the C classes of the RoIs labeled i, a moving average
    with momentum 0.99 over the steps in which i occurs, normalized to sum 1. The target of a RoI of class y
    becomes (1 - A) e_y + A m_y, where m_y is column y of M over its sum: "what is it that gets predicted as
    y?". A is 0 until `start`, a share of the training.

    Official A: 0.05 with Seesaw, 0.4 with cross-entropy, 0.2 with EQL v2; start 2/3 (after epoch 16 of 24).

    What differs, and why:
    - M moves after the step, not before its loss, so that processes and micro-batches do not matter.
    - Officially A also waits until every class has been seen, so one class without a usable box would switch
      PCB off for good. Here the row of such a class stays empty.
    - The soft part is a cross-entropy for all losses. With cross-entropy the official code has a KL
      divergence, which has the same gradient.
    - With EQL v2 the official code normalizes neither rows nor columns, so that targets depend on how sure
      the sigmoids are, not on which classes are confused; here both are normalized for all losses.
    - Officially the head has three rounds of refinement, over which A grows: 0, A / 2, A.
      `model.roi.refinement_rounds=3` does the same (regions of the image-level stream pass only through the
      first round, so they have no soft targets then); without rounds the weight is A. The rounds of a step
      move M together, officially each by itself.
    """

    matrix: Tensor
    weight: Tensor

    def __init__(self, categories: Sequence[Any], weight: float, start: float) -> None:
        """Start with an empty confusion matrix [C,C] and targets that are not softened.

        Args:
            categories: one object per class.
            weight: A, in (0,1].
            start: share of the training, in [0,1], after which the targets are softened.

        Raises:
            ValueError: `weight` or `start` is out of range, or there are more than `MAX_CLASSES` classes.
        """
        super().__init__()
        count = len(categories)
        if not 0 < weight <= 1:
            raise ValueError(f"pcb={weight:g}: must be in 0..1; 0 switches it off")
        if not 0 <= start <= 1:
            raise ValueError(f"pcb_start={start:g}: must be a share of the training, in 0..1")
        if count > MAX_CLASSES:
            raise ValueError(
                f"pcb={weight:g} keeps a confusion matrix of {count} x {count} classes, and at most "
                f"{MAX_CLASSES} classes fit into memory: set pcb=0"
            )
        self.final_weight, self.start = weight, start
        self.register_buffer("matrix", torch.zeros(count, count, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    def targets(self, labels: Tensor, columns: int, dtype: torch.dtype, stage: float) -> Tensor:
        """Return the softened targets [N,columns] of labels 0..C at a stage of `Rows`.

        Background has its one-hot row where there is a column for it, else zeros.
        """
        count = len(self.matrix)
        table = torch.eye(count + 1, columns, dtype=self.matrix.dtype, device=labels.device)
        tiny = torch.finfo(self.matrix.dtype).tiny  # a class that nothing was ever predicted as has no target
        taken_for = self.matrix / self.matrix.sum(dim=0).clamp(min=tiny)
        table[:count, :count].lerp_(taken_for.T, self.weight * stage)
        return table.to(dtype)[labels]

    def statistics(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Sum predictions [N,C] of RoIs by label, and count these: float64 [C,C+1]."""
        count = len(self.matrix)
        rows = torch.cat([predictions, torch.ones_like(predictions[:, :1])], dim=1)
        return rows.new_zeros(count + 1, count + 1).index_add_(0, labels, rows)[:count].double()

    def update(self, statistics: Tensor, progress: float) -> None:
        """Move the matrix by the statistics of a step, and set the weight of the next one."""
        sums, counts = statistics[:, :-1], statistics[:, -1:]
        moved = MOMENTUM * self.matrix + (1 - MOMENTUM) * sums / counts.clamp(min=1)
        self.matrix.copy_(torch.where(counts > 0, moved / moved.sum(dim=1, keepdim=True), self.matrix))
        self.weight.fill_(self.final_weight if progress >= self.start else 0.0)

    def summary(self) -> dict[str, float]:
        """Return the weight of the next step, and how many classes have not been seen yet."""
        unseen = (self.matrix.sum(dim=1) == 0).sum()
        return {"pcb_weight": self.weight.item(), "pcb_unseen": unseen.item()}


def make_pcb(categories: Sequence[Any], weight: float, start: float) -> PairwiseClassBalance | None:
    """Build the regularizer, or None for weight 0."""
    return PairwiseClassBalance(categories, weight, start) if weight != 0 else None
