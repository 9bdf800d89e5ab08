"""The sub-networks of the tasks: two hidden layers each, and the last layers that predict."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clis.losses import at_least_float32


class TwoFC(nn.Module):
    """The paper's 2fc: pooled features [N, channels, 7, 7] to [N,D], ReLU after both layers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return features [N,D] of pooled [N, channels, 7, 7]."""
        return self.fc2(self.fc1(pooled.flatten(1)).relu_()).relu_()


class CosineLinear(nn.Linear):
    """A linear layer of unit vectors: `scale` times the cosine of input and weights, plus the bias.

    So the norm of a class's weights, which grows with its frequency, does not count. Source: mmdetection's
    NormedLinear, with its 1e-6 added to both norms.
    """

    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__(inputs, outputs)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Return scale cos(x, w_k) + b_k of features [N,D]: [N,outputs], float32 at least."""
        features, weight, bias = (at_least_float32(each) for each in (features, self.weight, self.bias))
        features, weight = (each / (each.norm(dim=1, keepdim=True) + 1e-6) for each in (features, weight))
        with torch.autocast(features.device.type, enabled=False):  # which would multiply in bfloat16
            return F.linear(self.scale * features, weight, bias)


def _last(inputs: int, outputs: int, std: float, cosine: float | None = None) -> nn.Linear:
    layer = nn.Linear(inputs, outputs) if cosine is None else CosineLinear(inputs, outputs, cosine)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class ClassificationHead(nn.Module):
    """2fc + fc-incls (or fc-imcls): features for the projection MLP, and logits."""

    def __init__(self, sub_network: TwoFC, num_logits: int, std: float, cosine: float | None) -> None:
        """Add the last layer, with random weights, to a sub-network.

        Args:
            std: of the last layer's first weights.
            cosine: scale of a cosine classifier, or None for a linear one.
        """
        super().__init__()
        self.sub_network = sub_network
        self.fc_cls = _last(sub_network.fc2.out_features, num_logits, std, cosine)


class Refinement(nn.Module):
    """PCB's refinement: the same heads once more, on RoI features that their own predictions have changed.

    features <- features * spatial + channel, where `spatial` has a value per bin, made from the box deltas,
    and `channel` one per channel, made from the class logits. Classification learns in every round, with
    weight 0.2, and the rest of 1 in the last; boxes, objectness and detections are those of the last round.
    Regions of the image-level stream and pasted instances that are contrasted pass through the first round
    alone.
    Source: He et al., arXiv 2201.02784; official code: megvii-research/PCB, with 3 rounds.
    """

    def __init__(
        self, rounds: int, *, num_logits: int, num_boxes: int, channels: int, pool_size: int
    ) -> None:
        """Build the layers of `spatial` and `channel`, and set the weight and stage of each round.

        Args:
            rounds: of the heads in all, 2 to 5.
            num_logits, num_boxes: outputs of the heads, per RoI.
            channels, pool_size: of the RoI features.
        """
        super().__init__()
        self.spatial, self.channel = (
            nn.Sequential(nn.Linear(inputs, 512), nn.ReLU(), nn.Linear(512, outputs))
            for inputs, outputs in ((4 * num_boxes, pool_size**2), (num_logits, channels))
        )
        weights = (*[0.2] * (rounds - 1), 1 - 0.2 * (rounds - 1))
        self.schedule = tuple((weight, place / (rounds - 1)) for place, weight in enumerate(weights))
        """Of each round: weight of the classification loss, and stage of its `Rows`."""

    def forward(self, pooled: Tensor, logits: Tensor, deltas: Tensor) -> Tensor:
        """Return the features of the next round, as pooled [N, channels, 7, 7].

        Args:
            logits: [N, num_logits] of this round.
            deltas: [N, num_boxes, 4] of this round.
        """
        spatial = self.spatial(deltas.flatten(1)).view(-1, 1, *pooled.shape[2:])
        return pooled * spatial + self.channel(logits)[:, :, None, None]


class LocalizationHead(nn.Module):
    """2fc + fc-loc: box deltas of `num_boxes` boxes (C, or 1 if class-agnostic), and objectness or None."""

    def __init__(self, sub_network: TwoFC, num_boxes: int, objectness: bool) -> None:
        super().__init__()
        self.sub_network = sub_network
        self.fc_box = _last(sub_network.fc2.out_features, 4 * num_boxes, std=0.001)
        self.fc_objectness = _last(sub_network.fc2.out_features, 1, std=0.01) if objectness else None

    def deltas(self, features: Tensor) -> Tensor:
        """Return box deltas [N, num_boxes, 4] of features [N,D], float32 at least."""
        return at_least_float32(self.fc_box(features).unflatten(1, (-1, 4)))
