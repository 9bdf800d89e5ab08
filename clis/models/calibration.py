"""Calibration: class probabilities are corrected for the long tail after training, at test."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clis.losses import ClassificationLoss, find_classification_loss
from clis.losses.options import check_options, nearest, read_call


class Calibration(nn.Module):
    """Reweight the class probabilities, keep the background's, and renormalize.

    Built from the categories and the options in the config's name, e.g. `norcal(gamma=0.6)`.
    """

    weights: Tensor | None
    """[C], above 0; None until `measure` is called."""

    def __init__(self, weights: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weights", weights, persistent=False)

    def measure(self, num_images: int, centers: Tensor, labels: Tensor) -> None:
        """Set the weights from the training annotations, where the categories do not suffice.

        Args:
            num_images: of the training split.
            centers: float64 [A,2], x and y of the boxes' centers, 0..1 over the image.
            labels: int64 [A].
        """

    def forward(self, scores: Tensor) -> Tensor:
        """Calibrate class probabilities [N,C], whose sum is at most 1: the rest is background.

        Raises:
            ValueError: the weights are not measured yet.
        """
        if self.weights is None:
            raise ValueError(
                "test.calibration needs the training annotations (data.train), which evaluate.py reads; "
                "from a checkpoint alone, call `detector.calibration.measure` or set test.calibration=null"
            )
        background = (1 - scores.sum(dim=1, keepdim=True)).clamp(min=0)
        weighted = scores * self.weights.to(scores)
        return weighted / (weighted.sum(dim=1, keepdim=True) + background)


class NorCal(Calibration):
    """Divide by the power gamma of the number of training images, at least 1.

    Source: Pan et al., On Model Calibration for Long-Tailed Object Detection and Instance Segmentation, arXiv
    2107.02170 (`CalibrationROIHeads`: method gamma, on exponentials, by image counts, normalized). There
    gamma is 0 by default, which changes nothing, and is tuned on held-out training images.
    """

    def __init__(self, categories: Sequence[Any], *, gamma: float = 0.6) -> None:
        counts = torch.tensor([max(1, each.image_count) for each in categories], dtype=torch.float64)
        super().__init__(counts**-gamma)


class FRACAL(Calibration):
    """Multiply by (I / (C n))^(1 / ln 10) and divide by the fractal dimension to a power.

    Source: Alexandridis et al., Fractal Calibration for long-tailed object detection, arXiv 2410.11774
    (`Shared2FCFracalBBoxHead`: variant base10, fractal_l 2). n of the I training images have the class, at
    least 1. The first factor is a shift of the logits by log10 (I / n) - log10 C, in a softmax to the base e.
    The fractal dimension, 1 to 2, says how evenly a class is spread over the image.
    """

    def __init__(self, categories: Sequence[Any], *, power: float = 2.0) -> None:
        super().__init__(None)
        self.power = power
        self.counts = torch.tensor([max(1, each.image_count) for each in categories], dtype=torch.float64)

    def measure(self, num_images: int, centers: Tensor, labels: Tensor) -> None:
        """Set the weights (I / (C n))^(1 / ln 10) / D^power, D being the classes' fractal dimensions."""
        dimensions = fractal_dimensions(centers, labels, len(self.counts))
        shift = (num_images / (len(self.counts) * self.counts)).log10()
        self.weights = shift.exp() / dimensions**self.power


def fractal_dimensions(centers: Tensor, labels: Tensor, num_classes: int, finest: int = 64) -> Tensor:
    """Estimate the dimension of each class's box centers by counting cells: float64 [C] in 1..2.

    It is the slope of a line through (log G, log of the cells that have a center), for grids of G x G cells,
    G up to `finest`, that have no more cells than the class has boxes. Classes of fewer than 4 boxes have 1.

    Args:
        centers: [A,2] in 0..1.
        labels: int64 [A].
    """
    boxes = labels.bincount(minlength=num_classes)
    sides = torch.arange(1, finest + 1)
    cells = torch.zeros(finest, num_classes, dtype=torch.float64)
    for row, side in zip(cells, sides.tolist()):
        x, y = (centers * side).long().clamp(0, side - 1).T
        occupied = torch.zeros(num_classes, side, side, dtype=torch.bool)
        occupied[labels, y, x] = True
        row.copy_(occupied.sum(dim=(1, 2)))
    used = (sides[:, None] ** 2 <= boxes).double()
    log_side, log_cells = sides.double().log()[:, None], cells.clamp(min=1).log()
    total = used.sum(dim=0).clamp(min=1)
    from_mean = used * (log_side - (used * log_side).sum(dim=0) / total)
    slope = (from_mean * log_cells).sum(dim=0) / from_mean.square().sum(dim=0)
    return torch.where(boxes < 4, 1.0, slope.clamp(min=1))


CALIBRATIONS: dict[str, type[Calibration]] = {"fracal": FRACAL, "norcal": NorCal}
"""Ours, by name."""


def find_calibration(text: str | None, loss: str) -> functools.partial[Calibration] | None:
    """Find the calibration that `test.calibration` names, as a function that builds it from the categories.

    Args:
        text: the name of one of `CALIBRATIONS`, with options as in a call; None is none.
        loss: `loss.classification`, whose scores are to be calibrated.

    Raises:
        ValueError: an unknown name or option, an option of the wrong type, or scores that are no softmax.
    """
    if text is None:
        return None
    where = f"test.calibration={text}"
    name, options = read_call(text, where)
    if name not in CALIBRATIONS:
        raise ValueError(f"{where}: there is no such calibration; {nearest(name, CALIBRATIONS)}")
    check_options(options, CALIBRATIONS[name], where)
    built = find_classification_loss(loss).func
    if not (isinstance(built, type) and issubclass(built, ClassificationLoss) and built.softmax_scores):
        raise ValueError(
            f"{where}: it needs scores from a softmax over classes and background, which those of "
            f"loss.classification={loss} are not; set test.calibration=null"
        )
    return functools.partial(CALIBRATIONS[name], **options)
