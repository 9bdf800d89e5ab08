"""A run that starts from another one's weights, but for parts that start from scratch, and trains a part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clis.config import Config, StartConfig
from clis.data.categories import Category, check_same_categories
from clis.engine.checkpoint import TEACHER, load_checkpoint, saved_categories, weights_to_evaluate
from clis.engine.prerequisites import PlannedRun, checkpoint_of
from clis.engine.run_folder import RunFolder
from clis.losses import find_classification_loss
from clis.models import CLISDetector, build_model, find_calibration
from clis.models.weights import FROM_SCRATCH, load_state, shared_names


def starting_model(
    config: Config, categories: Sequence[Category], folder: RunFolder, start: Config | None
) -> CLISDetector:
    """Build a detector as it is before the first step.

    Its weights are those that `start.from` names, or its backbone's are `model.backbone.weights` or what the
    run's own pre-training made. A run with checkpoints is resumed from them and does not read the start.

    Args:
        folder: of the run.
        start: the config that `start.from` names; None where it names a checkpoint or nothing.

    Raises:
        FileNotFoundError, ValueError: the weights are missing or do not fit.
    """
    source = config.start.from_
    model = build_model(config, categories, pretrained=starting_weights(config, folder))
    if source is not None and not folder.has_begun:
        load_start(model, config.start, checkpoint_of(source, start))
    if config.start.train:
        train_only(model, config.start.train)
    return model


def starting_weights(config: Config, folder: RunFolder) -> bool | Path:
    """Return what the backbone starts from: `model.backbone.weights` (True), or this run's pre-trained ones.

    False with `start.from`, whose weights replace them.

    Raises:
        FileNotFoundError: the run's own pre-training is not finished.
    """
    if config.pretrain.epochs == 0:
        return config.start.from_ is None
    path = folder.pretraining.backbone
    if not path.exists():
        raise FileNotFoundError(f"{path}: the backbone is not pre-trained yet; run train.py on the config")
    return path


def check_plan(plan: PlannedRun) -> None:
    """Check what can be known of a run, and of those that it needs, without any data; see `check_run`."""
    for run in plan.walk():
        check_run(run)


def check_run(run: PlannedRun) -> None:
    """Check the names of a run's loss and calibration, and the weights that it starts from.

    Raises:
        FileNotFoundError, ValueError: a name is unknown, or the weights are missing or would not fit.
    """
    find_classification_loss(run.config.loss.classification)
    find_calibration(run.config.test.calibration, run.config.loss.classification)
    check_frozen_layers(run.config)
    check_start(run)


def check_frozen_layers(config: Config) -> None:
    """Check that no layer of a new run would be frozen at its random weights.

    Raises:
        ValueError: `model.backbone` freezes layers, and nothing gives them weights.
    """
    backbone = config.model.backbone
    given = backbone.weights is not None or config.pretrain.epochs > 0 or config.start.from_ is not None
    if given or backbone.trainable_layers == 5 or RunFolder(config.output).has_begun:
        return
    raise ValueError(
        f"model.backbone.weights=null: trainable_layers={backbone.trainable_layers} would freeze "
        f"{5 - backbone.trainable_layers} of 5 groups of layers at random weights; name weights, or set "
        f"{FROM_SCRATCH}"
    )


def check_start(run: PlannedRun) -> None:
    """Check that a new run will be able to load the weights that it starts from, before any are trained.

    Raises:
        FileNotFoundError, ValueError: they are missing, or would not fit.
    """
    start, folder = run.config.start, RunFolder(run.config.output)
    if (start.from_ is None and not start.train) or folder.has_begun:
        return
    if start.from_ is not None and run.start is None:
        checkpoint = checkpoint_of(start.from_, None)
        categories = saved_categories(load_checkpoint(checkpoint))
        model = build_model(run.config, categories, pretrained=False)
        load_start(model, start, checkpoint)
    else:
        model = build_model(run.config, _ANY_CLASSES, pretrained=False)
        if run.start is not None:
            other = run.start.config
            weights = build_model(other, _ANY_CLASSES, pretrained=False).state_dict()
            given = weights_to_evaluate(weights, other.teacher.momentum)
            _load_parts(model, start, given, run.start.title)
    if start.train:
        train_only(model, start.train)


def check_given_start(run: PlannedRun, model: CLISDetector) -> None:
    """Check that a new run's detector can be loaded from the checkpoint that it starts from, if there is one.

    Raises:
        FileNotFoundError, ValueError: as `load_start`.
    """
    source = run.config.start.from_
    if source is not None and run.start is None and not RunFolder(run.config.output).has_begun:
        load_start(model, run.config.start, checkpoint_of(source, None))


def load_start(model: CLISDetector, start: StartConfig, checkpoint: Path) -> None:
    """Load the tensors of another run's checkpoint, but for those that `start.fresh` names.

    It is strict: every tensor of the model and of the checkpoint is loaded or named. A momentum copy that
    starts from scratch starts as a copy of what it follows. The checkpoint may be of other
    classes if all that depends on them starts from scratch.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be read, a part of it is of other classes or
            another model, or a prefix matches nothing.
    """
    state, own = load_checkpoint(checkpoint), model.categories
    try:
        check_same_categories(saved_categories(state), str(checkpoint), own, "the training split")
    except ValueError as error:
        kept = [name for name in _parts_of_classes(model) if not _matches(name, start.fresh)]
        if kept:
            raise ValueError(
                f"{error}. To start from a detector of other classes, name in start.fresh what depends on "
                f"them: {', '.join(kept)}"
            ) from None
    momentum = state["config"].get("teacher", {}).get("momentum")  # checkpoints from before have no teacher
    _load_parts(model, start, weights_to_evaluate(state["model"], momentum), str(checkpoint))


def train_only(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze all parameters but those with a name that starts with one of the prefixes.

    A parameter of a shared module has several names. What is frozen already stays so.

    Raises:
        ValueError: a prefix matches no parameter, or nothing is left to train.
    """
    parameters = list(model.named_parameters(remove_duplicate=False))
    _check_prefixes("start.train", prefixes, [name for name, _ in parameters])
    trained = {id(parameter) for name, parameter in parameters if _matches(name, prefixes)}
    for _, parameter in parameters:
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
    if not any(parameter.requires_grad for _, parameter in parameters):
        raise ValueError(
            f"start.train: {', '.join(prefixes)} is frozen anyway, and nothing would be trained; name other "
            "parts, or raise model.backbone.trainable_layers"
        )


_ANY_CLASSES = [
    Category(id=number, name=f"class {number}", frequency="r", image_count=1, instance_count=1)
    for number in (1, 2)
]
"""Whether weights fit does not depend on the number of classes, if it is the same."""


def _parts_of_classes(model: CLISDetector) -> Iterator[str]:
    """Name the parts of a detector whose weights and state are of its classes, and of no others."""
    yield "classification.fc_cls"
    if model.image_classification not in (None, model.classification):
        yield "image_classification.fc_cls"
    if model.localization.fc_box.out_features > 4:
        yield "localization.fc_box"
    if model.refinement is not None:
        yield "refinement"
    if model.classification_loss.state_dict():
        yield "classification_loss"
    if model.contrastive is not None and model.contrastive.mask_same_class:
        yield "contrastive.queue"


def _load_parts(model: CLISDetector, start: StartConfig, given: dict[str, Tensor], source: str) -> None:
    """Load `given` but for `start.fresh`, which holds for all names of a tensor that both models share."""
    teacher = {key: value for key, value in model.state_dict().items() if key.startswith(TEACHER)}
    own = {key: value for key, value in model.state_dict().items() if key not in teacher}
    _check_prefixes("start.fresh", start.fresh, [*own, *given])
    loaded = {key: value for key, value in given.items() if not _matches(key, start.fresh)}
    kept = {key: value for key, value in own.items() if _matches(key, start.fresh)}
    if model.teacher is not None and kept:
        raise ValueError(
            f"start.fresh: {', '.join(start.fresh)} would also start from scratch in the teacher, which "
            "labels images from the first step; first train a detector that has it, and start from that"
        )
    for names in shared_names(model):
        fresh, others = [name for name in names if name in kept], [name for name in names if name in loaded]
        shared_there = all(any(_same(given, name, other) for other in others) for name in fresh)
        if fresh and others and shared_there:  # it starts from scratch by its other names, too
            kept |= {name: own[name] for name in others}
            loaded = {key: value for key, value in loaded.items() if key not in others}
        elif others:  # by its other names the checkpoint does not have it, or has a tensor of its own
            absent = [name for name in names if name not in given and name not in kept]
            kept |= dict.fromkeys([*fresh, *absent], loaded[others[0]])
    hint = "; name what starts from scratch, or is left behind, in start.fresh"
    load_state(model, loaded | kept | teacher, source, hint)
    if model.contrastive is not None:
        for name, original in model.contrastive.originals(model.classification.sub_network).items():
            if _matches(f"contrastive.{name}", start.fresh):
                model.contrastive.get_submodule(name).load_state_dict(original.state_dict())
    if model.teacher is not None:
        model.teacher.restart(model)


def _same(state: dict[str, Tensor], name: str, other: str) -> bool:
    return name in state and torch.equal(state[name], state[other])


def _matches(name: str, prefixes: Iterable[str]) -> bool:
    """Return whether a dotted name is one of the prefixes or is below one."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def _check_prefixes(field: str, prefixes: Iterable[str], names: Sequence[str]) -> None:
    for prefix in prefixes:
        if not any(_matches(name, [prefix]) for name in names):
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(f"{field}: {prefix} matches no parameter; the parts are {parts}")
