"""Losses as sums over a normaliser; the one dict from which the classification loss is chosen by name."""

from clis.losses.box import l1_loss, objectness_loss
from clis.losses.contrastive import info_nce
from clis.losses.cross_entropy import CrossEntropy
from clis.losses.precision import at_least_float32

CLASSIFICATION_LOSSES = {"cross_entropy": CrossEntropy}

__all__ = [
    "CLASSIFICATION_LOSSES",
    "CrossEntropy",
    "at_least_float32",
    "info_nce",
    "l1_loss",
    "objectness_loss",
]
