"""Balanced group softmax: classes compete only with classes of about as many training instances.

Source: Li et al., Overcoming Classifier Imbalance for Long-tail Object Detection with Balanced Group Softmax,
arXiv 2006.10408 (`GSBBoxHeadWith0`). Classes form groups by their training instances, and each group has a
softmax of its own with one more logit, "others", for all that is not in the group; group 0 is background and
foreground. The loss is the sum over groups of the mean cross-entropy of the rows that count: all in group 0;
in a group its own rows and 8 times as many others, none where it has no row of its own. Test score: softmax
of the group, times that of foreground.

Defaults: limits 10, 100, 1000 (4 groups), ratio 8. The original trains the last fc alone, anew, on top of a
finished baseline, for 12 epochs at half the learning rate, and tests with score threshold 0.

What differs: the original draws its others; here every other row has the weight min(1, 8 own / others), the
draw's expectation. Means, and whether a group has a row, are per image instead of per GPU: the same on any
number of processes. With objectness=false, for `clis.objectness`, group 0 is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.precision import at_least_float32


class BAGS(ClassificationLoss):
    """Logits by group: background and foreground, then for each group others and its classes by label."""

    def __init__(
        self,
        categories: Sequence[Any],
        *,
        limits: tuple[int, ...] = (10, 100, 1000),
        ratio: float = 8.0,
        objectness: bool = True,
    ) -> None:
        """
        Args:
            limits: instances from which on a class is in the next group; ascending.
            ratio: others for each row of the group.
            objectness: have group 0.
        """
        super().__init__(categories)
        if list(limits) != sorted(set(limits)):
            raise ValueError(f"limits={limits}: must ascend")
        self.ratio, self.has_objectness = ratio, objectness
        instances = torch.tensor([each.instance_count for each in categories], dtype=torch.int64)
        group = torch.bucketize(instances, torch.tensor(limits, dtype=torch.int64), right=True)
        members = group == torch.arange(len(limits) + 1)[:, None]  # [G,C]
        # of each label, background last: the column within each group, 0 is others; and if it is in the group
        places = F.pad(members.cumsum(dim=1) * members, (0, 1))
        inside = F.pad(members, (0, 1))
        if objectness:
            is_class = torch.arange(self.num_classes + 1)[None] < self.num_classes
            places, inside = torch.cat([is_class, places]), torch.cat([torch.ones_like(is_class), inside])
        self.sizes = (places.amax(dim=1) + 1).tolist()
        self.num_logits = sum(self.sizes)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("inside", inside, persistent=False)
        order = group.argsort(stable=True).argsort()
        self.register_buffer("order", order, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        parts = at_least_float32(logits).split(self.sizes, dim=1)
        places = self.places[:, labels]
        losses = [F.cross_entropy(part, place, reduction="none") for part, place in zip(parts, places)]
        losses = torch.stack(losses, dim=1)
        return rows.mean_per_image(losses, self._weights(labels, rows).to(losses)).sum()

    def scores(self, logits: Tensor) -> Tensor:
        parts = at_least_float32(logits).split(self.sizes, dim=1)
        scores = [part.softmax(dim=1)[:, 1:] for part in parts]
        if not self.has_objectness:
            return torch.cat(scores, dim=1)[:, self.order]
        foreground, *scores = scores
        return torch.cat(scores, dim=1)[:, self.order] * foreground

    def _weights(self, labels: Tensor, rows: Rows) -> Tensor:
        """Weight of each row in the mean of each group, [N,G]: 1, and for others their share in the image."""
        inside = self.inside[:, labels].T
        own, others = rows.sum_per_image(inside.double()), rows.sum_per_image((~inside).double())
        share = (self.ratio * own / others.clamp(min=1)).clamp(max=1)
        return torch.where(inside, 1.0, share[rows.images])
