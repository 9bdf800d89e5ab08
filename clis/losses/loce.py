"""LOCE's equilibrium loss: margins by how well each class is recognized at present."""

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
    """Equilibrium loss of LOCE (Feng et al., arXiv 2108.07507; official code: fcjian/LOCE).

    Cross-entropy over C classes and background of z_j + log s_j, where s_j is the mean probability that RoIs
    of class j give their own class; so classes that are badly recognized get a margin. The score is the
    softmax of z. s starts at 0.01, and a step with n objects of class j moves it to 0.9^n s_j + (1 - 0.9^n)
    times their mean; background has 0.01 throughout.

    The official recipe fine-tunes the last layers and the RPN of a softmax baseline for 6 epochs
    (configs/shapes/loce.yaml).

    What differs from the official code, and why:
    - The loss alone, without the memory of RoI features from which LOCE samples rare classes.
    - With rounds of refinement an image with the class counts once per round.
    - n counts images with the class instead of objects, whose RoIs are averaged first: a loss does not know
      which object a RoI belongs to.
    - s moves after the step, not before its loss, and counts all processes.

    Regions of the image-level stream have the same margins. They are never counted.
    """

    mean_scores: Tensor

    def __init__(
        self,
        categories: Sequence[Any],
        *,
        momentum: float = 0.9,
        start: float = 0.01,
        background: float = 0.01,
    ) -> None:
        """Start the mean score of every class at `start`.

        Args:
            momentum: of the mean scores, for each image with the class.
            start: first value of the mean scores.
            background: mean score of background.

        Raises:
            ValueError: `start` or `background` is not above 0, or `momentum` not in 0..1.
        """
        super().__init__(categories)
        for name, value in (("start", start), ("background", background)):
            if not value > 0:
                raise ValueError(f"{name}={value:g}: must be above 0")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum:g}: must be between 0 and 1")
        self.momentum, self.background = momentum, background
        self.register_buffer("mean_scores", torch.full((self.num_classes,), start, dtype=torch.float64))

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the softmax cross-entropy of z_j + log s_j, divided by `normalizer`."""
        z = at_least_float32(logits)
        margins = F.pad(self.mean_scores, (0, 1), value=self.background).log()
        return super().forward(z + margins.to(z), labels, normalizer, rows)

    def statistics(self, logits: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Add up over the images that have a class its mean score there, and count them: [2,C]."""
        own = at_least_float32(logits).softmax(dim=1).gather(1, labels[:, None]).squeeze(1).double()
        place = rows.images * self.num_logits + labels
        empty = own.new_zeros(rows.num_images * self.num_logits)
        totals = empty.index_add(0, place, own)
        counts = empty.index_add(0, place, torch.ones_like(own))
        both = torch.stack([totals / counts.clamp(min=1), (counts > 0).double()])
        return both.view(2, rows.num_images, self.num_logits).sum(dim=1)[:, :-1]

    def update(self, statistics: Tensor, progress: float) -> None:
        """Move s_j to 0.9^n s_j + (1 - 0.9^n) times the mean of the step, n being its images with class j."""
        total, count = statistics
        kept = self.momentum**count
        self.mean_scores.mul_(kept).add_((1 - kept) * total / count.clamp(min=1))

    def summary(self) -> dict[str, float]:
        """Return median and minimum of the mean scores s."""
        return {
            "mean_score_median": self.mean_scores.median().item(),
            "mean_score_min": self.mean_scores.min().item(),
        }
