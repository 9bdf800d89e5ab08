"""The classification loss that a config names: one of ours, or a class in the user's module."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from clis.losses.cross_entropy import CrossEntropy

CLASSIFICATION_LOSSES: dict[str, type[nn.Module]] = {"cross_entropy": CrossEntropy}
"""Ours, by name. Any classification loss is an `nn.Module` that is built from the C categories alone: one
object a class, its place the label; those of a data set have training's `image_count` and `frequency`. It has

* `num_logits`: K, the outputs of the last fc;
* `forward(logits, labels, normalizer)`: for logits [N,K] (narrower than float32 under autocast) and labels
  int64 [N] in 0..C, background C, the sum over the rows divided by `normalizer`: one number, float32 at
  least, 0 for no rows. So the parts of a batch that is split over processes add up to the same;
* `scores(logits)`: for logits [N,K] the scores [N,C] in 0..1 that rank the detections, float32 at least.
"""

_NEEDED = "num_logits, forward(logits, labels, normalizer) and scores(logits): see docs/benchmark.md"


def find_classification_loss(name: str) -> type[nn.Module]:
    """The class that `loss.classification` names: one of `CLASSIFICATION_LOSSES`, or ``module:Class``.

    Such a module is imported, so code of it runs: from the working folder, which is put on Python's path for
    good, as `python -m` does (`python FILE` and torchrun have the file's folder there), or from the path.

    Raises:
        ValueError: an unknown name, a module that cannot be imported, or no such loss in it.
    """
    if name in CLASSIFICATION_LOSSES:
        return CLASSIFICATION_LOSSES[name]
    where = f"loss.classification={name}"
    module_name, colon, class_name = name.partition(":")
    if not colon:
        known = _nearest(name, CLASSIFICATION_LOSSES)
        raise ValueError(f"{where}: there is no such loss; {known} One of your own is written module:Class")
    words = [*module_name.split("."), class_name]
    if not all(word.isidentifier() for word in words) or module_name.endswith(".py"):
        raise ValueError(f"{where}: write module:Class, e.g. my_loss:Focal for the class Focal in my_loss.py")
    module = _import(module_name, where)
    source = getattr(module, "__file__", None) or module_name
    found = getattr(module, class_name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if _is_module_class(value)]
        raise ValueError(f"{where}: {source} has no class {class_name}; {_nearest(class_name, classes)}")
    if not _is_module_class(found):
        raise ValueError(f"{where}: {class_name} in {source} is no class of nn.Module with {_NEEDED}")
    for part in ("forward", "scores"):
        if getattr(found, part, None) in (None, nn.Module.forward):
            raise ValueError(f"{where}: {class_name} in {source} has no {part}; it needs {_NEEDED}")
    return found


def build_classification_loss(name: str, categories: Sequence[Any]) -> nn.Module:
    """The loss that `loss.classification` names, for C categories.

    It is tried on no rows, so that errors surface before training.

    Raises:
        ValueError: as `find_classification_loss`; or it cannot be built, or gives what it must not.
    """
    where = f"loss.classification={name}"
    found = find_classification_loss(name)
    try:
        loss = found(categories)
        logits = torch.zeros(0, loss.num_logits)
        value = loss(logits, torch.zeros(0, dtype=torch.int64), 1.0)
        is_sum = value.shape == () and value.item() == 0
        shape = tuple(loss.scores(logits).shape)
    except Exception as error:
        raise ValueError(
            f"{where}: built from {len(categories)} categories and tried on no rows, it fails with "
            f"{type(error).__name__}: {error}. It needs {_NEEDED}"
        ) from error
    if not is_sum:
        raise ValueError(
            f"{where}: forward gives {value.tolist()} for no rows; return one number, the sum over the rows "
            "divided by `normalizer`, which is 0 then"
        )
    if shape != (0, len(categories)):
        raise ValueError(
            f"{where}: scores gives the shape {shape} for no rows; it has to be {(0, len(categories))}, a "
            "column for each category and none for background"
        )
    return loss


def _is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _import(name: str, where: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except Exception as error:
        problem = f"importing {name} fails with {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            problem = (
                f"there is no module {error.name} in {folder} or on Python's path; call from the folder that "
                "it lies in, or name that folder in PYTHONPATH"
            )
        raise ValueError(f"{where}: {problem}") from error


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    like = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {like[0]}?" if like else f"known: {', '.join(known) or 'none'}."
