"""What a classification loss is: the contract of the losses with the detector and its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """Where the rows of some logits come from. Letters: N rows, I images of the micro-batch."""

    images: Tensor
    """int64 [N] in 0..I-1."""
    num_images: int
    """I."""
    normalizer: float
    """Images of the global batch over the number of processes: what a mean over images is divided by."""
    uniform: Callable[[int], Tensor]
    """Draws n numbers in [0,1) per image, float64 [I,n]: a function of the image's seed alone, so the same
    on any number of processes and at every call."""
    stage: float = 1.0
    """Place of the logits among the refinement rounds of the head: 0 in the first, 1 in the last or only."""
    positive_fraction: float = 1.0
    """Largest share of objects among the rows: `model.roi.positive_fraction` of RoIs, and 1 of regions."""

    @classmethod
    def of_one_image(
        cls, count: int, normalizer: float = 1.0, seed: int = 0, device: torch.device | str = "cpu"
    ) -> Rows:
        """Describe rows that are all of one image, for a loss without a detector.

        Args:
            count: N.
            normalizer: see the field.
            seed: of what `uniform` draws.
        """

        def uniform(numbers: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return torch.rand(1, numbers, dtype=torch.float64, generator=generator).to(device)

        return cls(torch.zeros(count, dtype=torch.int64, device=device), 1, normalizer, uniform)

    def sum_per_image(self, values: Tensor) -> Tensor:
        """Add up the rows [N,K] of each image: [I,K]."""
        places = torch.arange(self.num_images, device=self.images.device)
        member = (self.images == places[:, None]).to(values.dtype)
        with torch.autocast(values.device.type, enabled=False):  # which would multiply in bfloat16
            return member @ values

    def mean_per_image(self, values: Tensor, weights: Tensor) -> Tensor:
        """Average over the rows of each image, then over the images of the global batch.

        So a mean whose number of rows is not known beforehand does not depend on how the batch is split.

        Args:
            values, weights: [N,K].

        Returns:
            [K]; an image whose weights add up to less than 1 is divided by 1.
        """
        means = self.sum_per_image(values * weights) / self.sum_per_image(weights).clamp(min=1)
        return means.sum(dim=0) / self.normalizer


class ClassificationLoss(nn.Module):
    """Base of the classification losses. C classes; K logits per row; background is label C.

    It is built from the categories and the options in the config's name, e.g. `eqlv2(gamma=10)`. A subclass
    sets `num_logits` and defines `forward` and `scores`; the rest has defaults. Buffers are state: `forward`
    reads them and never writes them, so a pass leaves no trace. What a step counts goes through `statistics`
    and `update`, once per accepted step and for the whole global batch; so the numbers of processes and
    micro-batches do not matter, and a skipped step changes nothing.
    """

    num_logits: int
    """K, the outputs of the last fc."""
    has_objectness = False
    """Whether the scores contain an objectness of the loss's own; not together with `clis.objectness`."""
    needs_objectness = False
    """Whether rows of background have no part in the loss; only together with `clis.objectness`."""
    softmax_scores = False
    """Whether the scores of a row are probabilities of exclusive classes: with that of background they add up
    to 1. `test.calibration` needs them."""

    def __init__(self, categories: Sequence[Any]) -> None:
        """Keep the number of classes; a subclass also sets `num_logits`.

        Args:
            categories: one object per class, its place is the label; those of a data set have `image_count`,
                `instance_count` and `frequency` of the training split.
        """
        super().__init__()
        self.num_classes = len(categories)

    def forward(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Compute the loss of sampled RoIs: a sum over rows, or means by `rows.mean_per_image`.

        Args:
            logits: [N,K], narrower than float32 under autocast.
            labels: int64 [N] in 0..C, background C.
            normalizer: RoIs sampled in the global batch, over the number of processes; divides a sum.
            rows: of the logits.

        Returns:
            One number, float32 at least; 0 for no rows.
        """
        raise NotImplementedError

    def image_level(self, logits: Tensor, labels: Tensor, normalizer: Tensor | float, rows: Rows) -> Tensor:
        """Compute the loss of regions of the image-level stream, which hold their class and no background.

        They are never counted in `statistics`. By default as `forward`.
        """
        return self(logits, labels, normalizer, rows)

    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores [N,C] in 0..1 that rank the detections, float32 at least, without background."""
        raise NotImplementedError

    def statistics(self, logits: Tensor, labels: Tensor, rows: Rows) -> Tensor:
        """Count what `update` needs: float64 of one shape, which adds up over images; by default nothing.

        Called without a gradient, on sampled RoIs alone; arguments as of `forward`.
        """
        return logits.new_zeros(0, dtype=torch.float64)

    def update(self, statistics: Tensor, progress: float) -> None:
        """Move the buffers after an accepted step; by default nothing.

        Args:
            statistics: of the global batch.
            progress: share of the training that is done, in 0..1.
        """

    def summary(self) -> dict[str, float]:
        """Return the values that describe the state in metrics.jsonl, by name; by default none."""
        return {}
