"""Contrastive learning regularization (section III-B.3): projections, momentum copy, key queue."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clis.losses import at_least_float32, info_nce
from clis.models.heads import TwoFC


class KeyQueue(nn.Module):
    """The dictionary Q: the last `size` keys, first in first out, any number pushed at once.

    Buffers: keys [Q,E] of unit length, labels int64 [Q], and the number of keys pushed so far. `noise` starts
    full of random keys that belong to no class (label -1).
    """

    def __init__(self, size: int, embedding_dim: int, init: str = "empty") -> None:
        super().__init__()
        noise = init == "noise"
        keys = (
            F.normalize(torch.randn(size, embedding_dim), dim=1)
            if noise
            else torch.zeros(size, embedding_dim)
        )
        self.register_buffer("keys", keys)
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("pushed", torch.tensor(size if noise else 0))

    def filled(self) -> Tensor:
        """bool [Q], true where there is a key."""
        return torch.arange(len(self.keys), device=self.keys.device) < self.pushed

    def num_filled(self) -> int:
        return min(int(self.pushed), len(self.keys))

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor) -> None:
        """Adds keys [n,E] with their labels [n] over the oldest ones; of more than Q the last Q stay."""
        size, skipped = len(self.keys), max(0, len(keys) - len(self.keys))
        index = (self.pushed + torch.arange(skipped, len(keys), device=keys.device)) % size
        self.keys[index] = keys[skipped:].to(self.keys.dtype)
        self.labels[index] = labels[skipped:]
        self.pushed += len(keys)


class ContrastiveRegularization(nn.Module):
    """f_i and f_d of pasted pairs against the queue, and the momentum copy that makes the queue's keys.

    Each task has an MLP (one fc, E outputs). With `pasted_view="momentum"` f_d comes from the momentum copy
    and both tasks share one MLP, for the instance task's own would get no gradient.
    """

    def __init__(
        self,
        sub_network: TwoFC,
        *,
        embedding_dim: int,
        queue_size: int,
        queue_init: str,
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
        self.queue = KeyQueue(queue_size, embedding_dim, queue_init)

    def forward(
        self,
        image_features: Tensor,
        instance_features: Tensor,
        pooled_regions: Tensor,
        pooled_pasted: Tensor,
        labels: Tensor,
        normalizer: Tensor | float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L_con of P pairs, and their keys for `update`.

        Args:
            image_features: [P,D], the regions through the image-classification sub-network.
            instance_features: [P,D], the pasted boxes through the instance-classification sub-network.
            pooled_regions, pooled_pasted: [P, channels, 7, 7], RoIAlign of both views.
            labels: int64 [P].
            normalizer: number of pairs in the global batch.

        Returns:
            The loss; keys [2P,E], each pair's pasted view before its region; their labels [2P].
        """
        keys = self.make_keys(pooled_pasted, pooled_regions)
        queries = normalize(self.image_mlp(image_features))
        if self.pasted_view == "online":
            positives = normalize(self.instance_mlp(instance_features))
        else:
            positives = keys[0::2]
        mask = self.queue.filled().expand(len(queries), -1)
        if self.mask_same_class:
            mask = mask & (self.queue.labels != labels[:, None])
        loss = info_nce(queries, positives, self.queue.keys, mask, self.temperature, normalizer)
        return loss, keys, labels.repeat_interleave(2)

    @torch.no_grad()
    def make_keys(self, pooled_pasted: Tensor, pooled_regions: Tensor) -> Tensor:
        """Keys [2P,E] of both views by the momentum copy."""
        views = torch.stack([pooled_pasted, pooled_regions], dim=1).flatten(0, 1)
        return normalize(self.momentum_mlp(self.momentum_sub_network(views)))

    @torch.no_grad()
    def update(self, sub_network: TwoFC, keys: Tensor, labels: Tensor) -> None:
        """After the optimizer's step: move the momentum copy, then push the global batch's keys."""
        for copied, source in (
            (self.momentum_sub_network, sub_network),
            (self.momentum_mlp, self.instance_mlp),
        ):
            for old, new in zip(copied.parameters(), source.parameters()):
                old.lerp_(new, 1 - self.momentum)
        self.queue.push(keys, labels)


def normalize(features: Tensor) -> Tensor:
    """Unit length, in float32 or wider."""
    return F.normalize(at_least_float32(features), dim=1)
