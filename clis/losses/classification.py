"""The classification loss that a config names: one of ours, or a class in the user's module."""

from __future__ import annotations

import functools
import importlib
import math
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clis.losses.acsl import ACSL
from clis.losses.bags import BAGS
from clis.losses.contract import ClassificationLoss, Rows
from clis.losses.cross_entropy import CrossEntropy
from clis.losses.drop import Drop
from clis.losses.efl import EFL
from clis.losses.eql import EQL
from clis.losses.eqlv2 import EQLv2
from clis.losses.federated import Federated
from clis.losses.focal import Focal
from clis.losses.gumbel import Gumbel
from clis.losses.loce import LOCE
from clis.losses.logit_adjusted import BalancedSoftmax, LogitAdjusted
from clis.losses.options import check_options, nearest, read_call
from clis.losses.seesaw import Seesaw

CLASSIFICATION_LOSSES: dict[str, type[ClassificationLoss]] = {
    "acsl": ACSL,
    "bags": BAGS,
    "balanced_softmax": BalancedSoftmax,
    "cross_entropy": CrossEntropy,
    "drop": Drop,
    "efl": EFL,
    "eql": EQL,
    "eqlv2": EQLv2,
    "federated": Federated,
    "focal": Focal,
    "gumbel": Gumbel,
    "loce": LOCE,
    "logit_adjusted": LogitAdjusted,
    "seesaw": Seesaw,
}
"""Ours, by name."""

_NEEDED = (
    "num_logits, forward(logits, labels, normalizer, rows) and scores(logits) of a subclass of "
    "clis.losses.ClassificationLoss: see docs/benchmark.md"
)


def find_classification_loss(text: str) -> functools.partial[ClassificationLoss]:
    """Find the loss that `loss.classification` names, as a function that builds it from the categories.

    The text is the name of one of `CLASSIFICATION_LOSSES`, or ``module:Class``, with options as in a call:
    ``seesaw``, ``eqlv2(gamma=10)``, ``my_loss:Focal(alpha=0.25)``; their values are Python literals. Such a
    module is imported, so its code runs: from the working folder, which stays on Python's path afterwards,
    as with `python -m` (`python FILE` and torchrun have the file's folder there), or from the path.

    Raises:
        ValueError: an unknown name or option, an option of the wrong type, a module that cannot be imported,
            or no such loss in it.
    """
    where = f"loss.classification={text}"
    name, options = read_call(text, where)
    found = CLASSIFICATION_LOSSES.get(name) or _find_in_module(name, where)
    check_options(options, found, where)
    return functools.partial(found, **options)


def build_classification_loss(text: str, categories: Sequence[Any]) -> ClassificationLoss:
    """Build the loss that `loss.classification` names, for C categories.

    Calls on an empty batch and on four rows make errors surface before training.

    Raises:
        ValueError: as `find_classification_loss`; or it cannot be built, or returns a wrong shape or value.
    """
    where = f"loss.classification={text}"
    build = find_classification_loss(text)
    try:
        loss = build(categories)
        logits, labels = torch.zeros(0, loss.num_logits), torch.zeros(0, dtype=torch.int64)
        rows = Rows.of_one_image(0)
        values = [loss(logits, labels, 1.0, rows), loss.image_level(logits, labels, 1.0, rows)]
        counted = loss.statistics(logits, labels, rows)
        counts_nothing = counted.dtype == torch.float64 and not counted.any()
        are_sums = all(value.shape == () and value.item() == 0 for value in values)
        shape = tuple(loss.scores(logits).shape)
    except ValueError as error:  # the value of an option
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{where}: built from {len(categories)} categories and tried on no rows, it fails with "
            f"{type(error).__name__}: {error}. It needs {_NEEDED}"
        ) from error
    if not are_sums:
        raise ValueError(
            f"{where}: it gives {', '.join(str(value.tolist()) for value in values)} for no rows; return one "
            "number, the sum over the rows divided by `normalizer`, which is 0 then"
        )
    if not counts_nothing:
        raise ValueError(
            f"{where}: statistics gives {counted.dtype} with {int(counted.count_nonzero())} values that are "
            "not 0 for no rows; return float64 that adds up over images, which is 0 then"
        )
    if shape != (0, len(categories)):
        raise ValueError(
            f"{where}: scores gives the shape {shape} for no rows; it has to be {(0, len(categories))}, a "
            "column for each category and none for background"
        )
    try:
        whole, half = _trial(loss, 1.0), _trial(loss, 2.0)
        scores = loss.scores(torch.linspace(-20, 20, 4 * loss.num_logits).view(4, -1))
    except Exception as error:
        raise ValueError(
            f"{where}: tried on a few rows, it fails with {type(error).__name__}: {error}"
        ) from error
    if not ((scores >= 0) & (scores <= 1)).all():
        low, high = scores.min().item(), scores.max().item()
        raise ValueError(
            f"{where}: scores gives {low:g} to {high:g} for logits of -20 to 20; return probabilities, 0..1"
        )
    for name, value, other_value in zip(("forward", "image_level"), whole, half):
        if torch.is_grad_enabled() and not value.requires_grad:
            raise ValueError(
                f"{where}: {name} gives a number without a gradient, so nothing would be learned; compute it "
                "from the logits without detach(), item() or torch.no_grad()"
            )
        one, other = value.item(), other_value.item()
        if not math.isclose(one, 2 * other, rel_tol=1e-3, abs_tol=1e-6):
            raise ValueError(
                f"{where}: {name} gives {one:g} for a few rows, and {other:g} where `normalizer` is twice as "
                "large; divide a sum over the rows by `normalizer`, or use `rows.mean_per_image`"
            )
    return loss


def _trial(loss: ClassificationLoss, normalizer: float) -> tuple[Tensor, Tensor]:
    """Return the loss of a few rows, of which one is background, and that of regions of the other classes."""
    logits, rows = torch.linspace(-1, 1, 4 * loss.num_logits).view(4, -1), Rows.of_one_image(4, normalizer)
    logits.requires_grad_(torch.is_grad_enabled())
    labels = torch.arange(4) % max(1, loss.num_classes)
    with_background = torch.cat([labels[:3], torch.tensor([loss.num_classes])])
    with torch.random.fork_rng(devices=[]):  # a loss may be random, and the training is to be as without this
        torch.manual_seed(0)
        boxes = loss(logits, with_background, normalizer, rows)
        regions = loss.image_level(logits, labels, normalizer, rows)
    return boxes, regions


def _find_in_module(name: str, where: str) -> type[ClassificationLoss]:
    module_name, colon, class_name = name.partition(":")
    if not colon:
        known = nearest(name, CLASSIFICATION_LOSSES)
        raise ValueError(f"{where}: there is no such loss; {known} One of your own is written module:Class")
    words = [*module_name.split("."), class_name]
    if not all(word.isidentifier() for word in words) or module_name.endswith(".py"):
        raise ValueError(f"{where}: write module:Class, e.g. my_loss:Focal for the class Focal in my_loss.py")
    module = _import(module_name, where)
    source = getattr(module, "__file__", None) or module_name
    found = getattr(module, class_name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if _is_loss(value)]
        raise ValueError(f"{where}: {source} has no class {class_name}; {nearest(class_name, classes)}")
    if not _is_loss(found):
        raise ValueError(f"{where}: {class_name} in {source} is not a loss; it needs {_NEEDED}")
    for part in ("forward", "scores"):
        if getattr(found, part) is getattr(ClassificationLoss, part):
            raise ValueError(f"{where}: {class_name} in {source} has no {part}; it needs {_NEEDED}")
    return found


def _is_loss(value: Any) -> bool:
    is_class = isinstance(value, type) and issubclass(value, ClassificationLoss)
    return is_class and value is not ClassificationLoss


def _import(name: str, where: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # SystemExit: of a script that is no module
        problem = f"importing {name} fails with {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            problem = (
                f"there is no module {error.name} in {folder} or on Python's path; call from the folder that "
                "it is in, or name that folder in PYTHONPATH"
            )
        raise ValueError(f"{where}: {problem}") from error
