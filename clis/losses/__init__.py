"""Losses as sums over a normalizer; the classification loss is chosen by name, or the user's own class."""

from clis.losses.box import l1_loss, objectness_loss
from clis.losses.classification import (
    CLASSIFICATION_LOSSES,
    build_classification_loss,
    find_classification_loss,
)
from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.contrastive import info_nce
from clis.losses.cross_entropy import CrossEntropy
from clis.losses.precision import at_least_float32

__all__ = [
    "CLASSIFICATION_LOSSES",
    "ClassificationLoss",
    "CrossEntropy",
    "Rows",
    "at_least_float32",
    "build_classification_loss",
    "find_classification_loss",
    "info_nce",
    "l1_loss",
    "objectness_loss",
]
