"""Seesaw loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.binary import one_hot
from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.pcb import make_pcb
from clis.losses.precision import at_least_float32


class Seesaw(ClassificationLoss):
    """Seesaw loss (Wang et al., arXiv 2008.10032; official code: mmdetection's SeesawLoss).

    Positives have a softmax over the C classes, with log(M_yj K_yj) added to z_j, where n_j counts the RoIs
    of class j so far and p_j is the softmax of z without a gradient:

    - mitigation M_yj = min(1, n_j / n_y)^p: rarer classes are punished less;
    - compensation K_yj = max(1, p_j / max(p_y, eps))^q: classes that are taken for y are punished more.

    All RoIs have a softmax over object and background; the score is the product of both.

    What differs from the official code, and why:
    - n counts up to the step before, over all processes, in float64; mmdetection counts each GPU's own RoIs,
      in float32 and before its loss, so that weights depend on the number of GPUs.
    - `objectness=False` leaves object and background out, for a detector with L_obj (`clis.objectness`).

    The official LVIS recipe has a cosine classifier too: `model.roi.cosine=20`.

    Regions of the image-level stream have a plain cross-entropy over the C classes: they are balanced, and
    all are objects. They are never counted.
    """

    softmax_scores = True
    counts: Tensor

    def __init__(
        self,
        categories: Sequence[Any],
        *,
        p: float = 0.8,
        q: float = 2.0,
        eps: float = 0.01,
        objectness: bool = True,
        pcb: float = 0.0,
        pcb_start: float = 2 / 3,
    ) -> None:
        """Start the counts of RoIs at 0; with `objectness`, two more logits tell object from background.

        Args:
            p, q: exponents of mitigation and compensation; 0 switches either off.
            eps: least p_y that p_j is divided by.
            objectness: whether there are two logits for object and background, and their factor in the score.
            pcb, pcb_start: see `PairwiseClassBalance`.

        Raises:
            ValueError: `eps` is not in (0,1].
        """
        super().__init__(categories)
        if not 0 < eps <= 1:
            raise ValueError(f"eps={eps:g}: must be above 0 and at most 1")
        self.has_objectness, self.needs_objectness = objectness, not objectness
        self.num_logits = self.num_classes + 2 * objectness
        self.p, self.q, self.log_eps = p, q, math.log(eps)
        self.register_buffer("counts", torch.zeros(self.num_classes, dtype=torch.float64))
        self.pcb = make_pcb(categories, pcb, pcb_start)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the softmax cross-entropy of z_j + log(M_yj K_yj), and that of object and background.

        Both are divided by `normalizer`. The first has no term for background rows, and `objectness=False`
        leaves the second out.
        """
        classes, objectness = self._split(logits)
        if self.pcb is None:
            targets = one_hot(labels, self.num_classes, classes.dtype)  # all 0 for background
        else:
            targets = self.pcb.targets(labels, self.num_classes, classes.dtype, rows.stage)
        loss = F.cross_entropy(classes + self._margins(classes.detach(), labels), targets, reduction="sum")
        if self.has_objectness:
            is_background = (labels == self.num_classes).long()
            loss = loss + F.cross_entropy(objectness, is_background, reduction="sum")
        return loss / normalizer

    def image_level(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Sum the plain softmax cross-entropy over the C classes, divided by `normalizer`."""
        return F.cross_entropy(self._split(logits)[0], labels, reduction="sum") / normalizer

    def scores(self, logits: Tensor) -> Tensor:
        """Return the softmax over the classes times the probability of an object, if there is one; [N,C]."""
        classes, objectness = self._split(logits)
        scores = classes.softmax(dim=1)
        return scores * objectness.softmax(dim=1)[:, :1] if self.has_objectness else scores

    def statistics(self, logits: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Count the RoIs of each class: [C,1], or in the last column of PCB's [C,C+1]."""
        if self.pcb is None:
            counts = self.counts.new_zeros(self.num_classes + 1)
            return counts.index_add_(0, labels, counts.new_ones(len(labels)))[: self.num_classes, None]
        return self.pcb.statistics(self._split(logits)[0].softmax(dim=1), labels)

    def update(self, statistics: Tensor, progress: float) -> None:
        """Add the step's RoIs of each class to the counts n, and move PCB's confusion matrix."""
        self.counts += statistics[:, -1]
        if self.pcb is not None:
            self.pcb.update(statistics, progress)

    def summary(self) -> dict[str, float]:
        """Return median and minimum of the counts n, and PCB's values."""
        values = {
            "seesaw_count_median": self.counts.median().item(), "seesaw_count_min": self.counts.min().item()
        }  # fmt: skip
        return values if self.pcb is None else values | self.pcb.summary()

    def _split(self, logits: Tensor) -> Sequence[Tensor]:
        """Return the logits of the classes and those of object and background, if there are any."""
        return at_least_float32(logits).tensor_split([self.num_classes], dim=1)

    def _margins(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return log(M K) [N,C] of class logits z [N,C]; 0 in the own class, anything for background."""
        own = labels.clamp(max=self.num_classes - 1)[:, None]
        log_p = z.log_softmax(dim=1)
        log_n = self.counts.clamp(min=1).log().to(z.dtype)
        mitigation = (log_n - log_n[own]).clamp(max=0)
        compensation = (log_p - log_p.gather(1, own).clamp(min=self.log_eps)).clamp(min=0)
        return self.p * mitigation + self.q * compensation
