"""Contrastive learning regularization (section III-B.3): projections, momentum copy, key queue."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clis.losses import at_least_float32, info_nce
from clis.models.heads import TwoFC


class ContrastiveOutput(NamedTuple):
    """What one batch of pairs gives."""

    loss: Tensor
    """L_con, a scalar."""
    keys: Tensor
    """[2P,E] of unit length, each pair's pasted view before its region."""
    labels: Tensor
    """int64 [2P] of the keys."""
    views: tuple[Tensor, Tensor]
    """f_i and f_d [P,E] of unit length, without a gradient."""


class KeyQueue(nn.Module):
    """The dictionary Q: the last `size` keys, first in first out, any number pushed at once.

    Buffers: keys [Q,E] of unit length, labels int64 [Q], and the number of keys pushed so far.
    """

    keys: Tensor
    labels: Tensor
    pushed: Tensor

    def __init__(self, size: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, embedding_dim))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("pushed", torch.tensor(0))

    def filled(self) -> Tensor:
        """Return where there is a key, bool [Q]."""
        return torch.arange(len(self.keys), device=self.keys.device) < self.pushed

    def num_filled(self) -> int:
        """Return the number of keys in the queue, at most Q."""
        return min(int(self.pushed), len(self.keys))

    def mean_key(self) -> Tensor:
        """Compute the mean [E] of the keys, 0 where there is none; its length is 1 where all are equal."""
        return self.keys.sum(dim=0) / self.pushed.clamp(1, len(self.keys))

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor) -> None:
        """Write keys [n,E] with their labels [n] over the oldest ones; of more than Q the last Q stay."""
        size, skipped = len(self.keys), max(0, len(keys) - len(self.keys))
        index = (self.pushed + torch.arange(skipped, len(keys), device=keys.device)) % size
        self.keys[index] = keys[skipped:].to(self.keys.dtype)
        self.labels[index] = labels[skipped:]
        self.pushed += len(keys)


class ContrastiveRegularization(nn.Module):
    """f_i and f_d of pasted pairs against the queue, and the momentum copy that makes the queue's keys.

    Each task has an MLP (one fc, E outputs). Eq. 1 writes the positive of f_i as f_d and does not say which
    encoder makes it. We read it as a key of the momentum copy, as the negatives are (MoCo, arXiv 1911.05722),
    and take both tasks' features as queries: the loss is the mean of Eq. 1 for (f_i, key_d) and for
    (f_d, key_i), so that both MLPs learn. `pasted_view` has the other readings:

    * ``symmetric``: the mean of both, the default;
    * ``momentum``: (f_i, key_d) alone. Both tasks share one MLP, since the instance task's own would get no
      gradient;
    * ``online``: (f_i, f_d), both with a gradient. Every negative comes from the lagging copy and the
      positive does not, so moving all online features away from the copy solves the loss without telling two
      instances apart: retrieval stays near chance.
    """

    def __init__(
        self,
        sub_network: TwoFC,
        *,
        embedding_dim: int,
        queue_size: int,
        momentum: float,
        temperature: float,
        pasted_view: str,
        mask_same_class: bool,
    ) -> None:
        super().__init__()
        features = sub_network.fc2.out_features
        self.momentum, self.temperature = momentum, temperature
        self.pasted_view, self.mask_same_class = pasted_view, mask_same_class
        self.instance_mlp = nn.Linear(features, embedding_dim)
        self.image_mlp = (
            self.instance_mlp if pasted_view == "momentum" else nn.Linear(features, embedding_dim)
        )
        self.momentum_sub_network = copy.deepcopy(sub_network).requires_grad_(False)
        self.momentum_mlp = copy.deepcopy(self.instance_mlp).requires_grad_(False)
        self.queue = KeyQueue(queue_size, embedding_dim)

    def forward(
        self,
        image_features: Tensor,
        instance_features: Tensor,
        pooled_regions: Tensor,
        pooled_pasted: Tensor,
        labels: Tensor,
        normalizer: Tensor | float,
    ) -> ContrastiveOutput:
        """Compute L_con of P pairs, and their keys for `update`.

        Args:
            image_features: [P,D], the regions through the image-classification sub-network.
            instance_features: [P,D], the pasted boxes through the instance-classification sub-network.
            pooled_regions, pooled_pasted: [P, channels, 7, 7], RoIAlign of both views.
            labels: int64 [P].
            normalizer: number of pairs, see `Normalizers`.
        """
        keys = self.make_keys(pooled_pasted, pooled_regions)
        key_d, key_i = keys[0::2], keys[1::2]
        f_i = normalize(self.image_mlp(image_features))
        f_d = normalize(self.instance_mlp(instance_features))
        terms = {
            "symmetric": ((f_i, key_d), (f_d, key_i)),
            "momentum": ((f_i, key_d),),
            "online": ((f_i, f_d),),
        }[self.pasted_view]
        mask = self.queue.filled().expand(len(labels), -1)
        if self.mask_same_class:
            mask = mask & (self.queue.labels != labels[:, None])
        losses = [
            info_nce(query, positive, self.queue.keys, mask, self.temperature, normalizer * len(terms))
            for query, positive in terms
        ]
        return ContrastiveOutput(
            torch.stack(losses).sum(), keys, labels.repeat_interleave(2), (f_i.detach(), f_d.detach())
        )

    @torch.no_grad()
    def make_keys(self, pooled_pasted: Tensor, pooled_regions: Tensor) -> Tensor:
        """Make keys [2P,E] of both views by the momentum copy, each pair's pasted view before its region."""
        views = torch.stack([pooled_pasted, pooled_regions], dim=1).flatten(0, 1)
        return normalize(self.momentum_mlp(self.momentum_sub_network(views)))

    @torch.no_grad()
    def update(self, sub_network: TwoFC, keys: Tensor, labels: Tensor) -> None:
        """Move the momentum copy after the optimizer's step, then push the global batch's keys."""
        for name, original in self.originals(sub_network).items():
            for old, new in zip(self.get_submodule(name).parameters(), original.parameters()):
                old.lerp_(new, 1 - self.momentum)
        self.queue.push(keys, labels)

    def originals(self, sub_network: TwoFC) -> dict[str, nn.Module]:
        """Return what the parts of the momentum copy follow, by the names of these parts."""
        return {"momentum_sub_network": sub_network, "momentum_mlp": self.instance_mlp}


def normalize(features: Tensor) -> Tensor:
    """Scale features [n,E] to unit length, in float32 or wider."""
    return F.normalize(at_least_float32(features), dim=1)


@torch.no_grad()
def similarities(f_i: Tensor, f_d: Tensor, mean_key: Tensor) -> dict[str, float]:
    """Measure whether L_con tells instances apart; empty for fewer than two pairs.

    Args:
        f_i, f_d: [P,E] of unit length, both views of the pairs of the global batch.
        mean_key: [E] of the queue.

    Returns:
        contrast_positive: mean similarity of f_i and f_d of a pair.
        contrast_other: of f_i to the f_d of the other pairs.
        contrast_queue: of f_i to the keys of the queue.
        contrast_retrieval: share of the pairs whose f_d is the most similar of all to f_i; 1 / P is chance.
    """
    pairs = len(f_i)
    if pairs < 2:
        return {}
    similarity = f_i @ f_d.T
    own = similarity.diagonal()
    nearest = similarity.argmax(dim=1) == torch.arange(pairs, device=f_i.device)
    return {
        "contrast_positive": own.mean().item(),
        "contrast_other": ((similarity.sum() - own.sum()) / (pairs * (pairs - 1))).item(),
        "contrast_queue": (f_i @ mean_key).mean().item(),
        "contrast_retrieval": nearest.double().mean().item(),
    }
