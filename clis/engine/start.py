"""A run that starts from another one's weights, but for parts that start from scratch, and trains a part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from clis.config import StartConfig
from clis.data.categories import Category, check_same_categories
from clis.engine.checkpoint import load_checkpoint
from clis.models import CLISDetector
from clis.models.weights import load_state


def load_start(model: CLISDetector, start: StartConfig, checkpoint: Path) -> None:
    """Load the tensors of another run's checkpoint, but for those that `start.fresh` names.

    It is strict: every tensor of the model and of the checkpoint is loaded or named. A momentum copy that
    starts from scratch starts as a copy of the sub-network that is loaded.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be read, is of other classes or another model, or
            a prefix matches nothing.
    """
    state = load_checkpoint(checkpoint)
    saved = [Category(**category) for category in state["categories"]]
    check_same_categories(saved, str(checkpoint), model.categories, "the training split")
    own, given = model.state_dict(), state["model"]
    _check_prefixes("start.fresh", start.fresh, [*own, *given])
    loaded = {key: value for key, value in given.items() if not _matches(key, start.fresh)}
    kept = {key: value for key, value in own.items() if _matches(key, start.fresh)}
    hint = "; name what starts from scratch, or is left behind, in start.fresh"
    load_state(model, loaded | kept, str(checkpoint), hint)
    if model.contrastive is not None and _matches("contrastive.momentum_sub_network", start.fresh):
        copied = model.contrastive.momentum_sub_network
        copied.load_state_dict(model.classification.sub_network.state_dict())


def train_only(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze all parameters but those with a name that starts with one of the prefixes.

    A parameter of a shared module has several names. What is frozen already stays so.

    Raises:
        ValueError: a prefix matches no parameter.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    _check_prefixes("start.train", prefixes, names)
    parameters = list(model.named_parameters(remove_duplicate=False))
    trained = {id(parameter) for name, parameter in parameters if _matches(name, prefixes)}
    for _, parameter in parameters:
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)


def _matches(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted name is one of the prefixes or lies below one."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def _check_prefixes(field: str, prefixes: Iterable[str], names: Sequence[str]) -> None:
    for prefix in prefixes:
        if not any(_matches(name, [prefix]) for name in names):
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(f"{field}: {prefix} matches no parameter; the parts are {parts}")
