"""Balanced group softmax: classes compete only with classes of about as many training instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.precision import at_least_float32


class BAGS(ClassificationLoss):
    """Balanced group softmax (Li et al., arXiv 2006.10408; official code: FishYuLi/BalancedGroupSoftmax).

    Classes with fewer than 10 training instances form a group, and so do those from 10, 100 and 1000 on. Each
    group has a softmax with one more logit, "others", for whatever is not in it; group 0 is background and
    foreground. The loss is the sum of the groups' mean cross-entropies: over all RoIs in group 0; elsewhere
    over the RoIs of the group and at most 8 times as many others, and 0 without any RoI of the group. The
    score is the softmax of the group times that of foreground.

    The official recipe trains only the last layer, from new weights on a finished baseline: 12 epochs, half
    the learning rate. It tests with `test.score_threshold=0`.

    What differs from the official code, and why:
    - It draws the others. Here all of them count, with the weight min(1, 8 own / others), which has the same
      expectation and needs no random numbers.
    - Means, and whether a group has a RoI, are those of an image, not of the images of a GPU: the same on any
      number of processes.
    - `objectness=False` leaves group 0 out, for a detector with L_obj (`clis.objectness`).

    Regions of the image-level stream are treated as the RoIs of an image, but take no part in group 0: the
    stream has no background, so that group would only learn to see objects everywhere.
    """

    places: Tensor
    """int64 [G,C+1]: column of each label in each group, 0 for others; background is last."""
    inside: Tensor
    """bool [G,C+1]: whether a label belongs to a group; group 0 has all."""
    order: Tensor
    """int64 [C]: place of each class when the groups' classes are joined."""

    def __init__(
        self,
        categories: Sequence[Any],
        *,
        limits: tuple[int, ...] = (10, 100, 1000),
        ratio: float = 8.0,
        objectness: bool = True,
    ) -> None:
        """Group the classes by their number of training instances.

        Args:
            categories: with `instance_count`.
            limits: least training instances of the groups beyond the first, ascending.
            ratio: most others for each RoI of a group.
            objectness: whether there is a group 0, and its factor in the score.
        """
        super().__init__(categories)
        if list(limits) != sorted(set(limits)):
            raise ValueError(f"limits={limits}: must ascend")
        if not ratio >= 0:
            raise ValueError(f"ratio={ratio:g}: must be at least 0")
        self.has_objectness, self.ratio = objectness, ratio
        instances = torch.tensor([each.instance_count for each in categories], dtype=torch.int64)
        group = torch.bucketize(instances, torch.tensor(limits, dtype=torch.int64), right=True)
        members = group == torch.arange(len(limits) + 1)[:, None]
        places, inside = (F.pad(each, (0, 1)) for each in (members.cumsum(dim=1) * members, members))
        if objectness:
            is_class = torch.arange(self.num_classes + 1)[None] < self.num_classes
            places, inside = torch.cat([is_class, places]), torch.cat([torch.ones_like(is_class), inside])
        self.sizes = (places.amax(dim=1) + 1).tolist()
        self.num_logits = sum(self.sizes)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("inside", inside, persistent=False)
        self.register_buffer("order", group.argsort(stable=True).argsort(), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Add up the groups' mean cross-entropies, by `Rows.mean_per_image`; `normalizer` is unused."""
        return self._means(logits, labels, rows).sum()

    def image_level(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Add up the mean cross-entropies of the groups of classes; `normalizer` is unused."""
        return self._means(logits, labels, rows)[int(self.has_objectness) :].sum()

    def scores(self, logits: Tensor) -> Tensor:
        """Return softmax within the group, times the foreground probability if there is a group 0; [N,C]."""
        parts = at_least_float32(logits).split(self.sizes, dim=1)
        scores = [part.softmax(dim=1)[:, 1:] for part in parts]
        if not self.has_objectness:
            return torch.cat(scores, dim=1)[:, self.order]
        foreground, *scores = scores
        return torch.cat(scores, dim=1)[:, self.order] * foreground

    def _means(self, logits: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Return the mean cross-entropy of each group [G]."""
        parts = at_least_float32(logits).split(self.sizes, dim=1)
        places = self.places[:, labels]
        terms = [F.cross_entropy(part, place, reduction="none") for part, place in zip(parts, places)]
        losses = torch.stack(terms, dim=1)
        return rows.mean_per_image(losses, self._weights(labels, rows).to(losses))

    def _weights(self, labels: Tensor, rows: Rows) -> Tensor:
        """Return the weight [N,G] of each RoI in the mean of each group."""
        inside = self.inside[:, labels].T
        own, others = rows.sum_per_image(inside.double()), rows.sum_per_image((~inside).double())
        share = (self.ratio * own / others.clamp(min=1)).clamp(max=1)
        return torch.where(inside, 1.0, share[rows.images])
