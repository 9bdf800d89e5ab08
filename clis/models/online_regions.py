"""Regions that the detector chooses in every step among its own proposals, in place of pre-defined ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MOST_PROPOSALS = 128
"""Proposals of an image-level image that are considered, the best by objectness (Detic's number).

The four images of a mosaic share its proposals, `model.rpn.proposals`, so there may be fewer.
"""
LEAST_INSIDE = 0.5
"""A proposal belongs to an image if at least this share of its area lies inside it, not inside a neighbor."""

Score = Callable[[], Tensor]
"""Computes the score [R,P] of every proposal for the label of every image."""
Preference = Callable[[Tensor, Score], Tensor]
"""The criterion of a rule: from the areas [R,P] of the proposals and their scores to values [R,P]."""


def by_size(areas: Tensor, score: Score) -> Tensor:
    """Prefer the largest proposal: Detic's max-size loss (arXiv 2201.02605)."""
    return areas


def by_score(areas: Tensor, score: Score) -> Tensor:
    """Prefer the proposal that the detector scores highest for the image's label, as YOLO9000 does.

    With one label per image, our reading of DLWL's linear program, of which no code is public, has the same
    box if it may choose a single one; its losses are others.
    """
    return score()


PREFERENCES: dict[str, Preference] = {"max-size": by_size, "max-score": by_score}
"""The online rules of `regions.rule`."""


def choose_regions(
    proposals: Sequence[Tensor], images: Tensor, mosaics: Tensor, prefer: Preference, score: Score
) -> Tensor:
    """Choose a proposal of every image-level image, clipped to it, float32 [R,4] in pixels of the mosaics.

    An image without a proposal is chosen as a whole. The host does not wait for the device.

    Args:
        proposals: of each of the M mosaics, [n,4], the best first.
        images: [R,4], the extent of each image in its mosaic.
        mosaics: int64 [R], the mosaic of each image.
        prefer: a value of `PREFERENCES`.
        score: of proposals that are padded to the longest of `proposals`, P.
    """
    boxes = pad_sequence(list(proposals), batch_first=True)[mosaics]  # [R,P,4]; padding has no area
    low, high = images[:, None, :2], images[:, None, 2:]
    inside = torch.cat([boxes[..., :2].maximum(low), boxes[..., 2:].minimum(high)], dim=2)
    areas = _areas(inside)
    mine = (areas > 0) & (areas >= LEAST_INSIDE * _areas(boxes))
    mine &= mine.cumsum(dim=1) <= MOST_PROPOSALS
    # the last candidate is the whole image, if there is no proposal
    mine = torch.cat([mine, ~mine.any(dim=1, keepdim=True)], dim=1)
    values = F.pad(prefer(areas, score), (0, 1)).masked_fill(~mine, -torch.inf)
    best = values.argmax(dim=1, keepdim=True)
    return torch.cat([inside, images[:, None]], dim=1).take_along_dim(best[..., None], dim=1)[:, 0]


def scores_for(scores: Sequence[Tensor], labels: Tensor, mosaics: Tensor) -> Tensor:
    """Arrange the scores [n,C] of each mosaic's proposals for the label of every image: [R,P]."""
    return pad_sequence(list(scores), batch_first=True)[mosaics, :, labels]


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
