"""Checkpoints: plain tensors and dicts, written whole or not at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clis.atomic import atomic_write, link
from clis.cli import is_worker_death
from clis.config import Config
from clis.config_files import (
    config_from_dict,
    config_to_dict,
    from_here,
    merge_overrides,
    resolve_data_root,
)
from clis.data.categories import Category, check_same_categories
from clis.distributed import on_main, rank
from clis.engine.provenance import changed_files, provenance, training_files
from clis.engine.run_folder import RunFolder, find_checkpoint
from clis.engine.schedule import differences_after
from clis.models import CLISDetector, ImageClassifier, build_model
from clis.models.weight_files import first_names, read_content
from clis.models.weights import load_state
from clis.progress import say

FORMAT = 1

TEACHER = "teacher.model."
"""What the names of a teacher's weights begin with, beside those of the detector that it teaches."""


def detector_state(
    model: CLISDetector | ImageClassifier,
    config: Config,
    step: int = 0,
    record: Mapping[str, Any] | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Return the part of a checkpoint that evaluation, `load_detector` and the region search read.

    Args:
        folder: that the config's paths are relative to; a run may be resumed from another working folder.
        record: of the training (see `provenance`); None is one without data.
    """
    return {
        "format": FORMAT,
        "step": step,
        "config": config_to_dict(config, folder),
        "categories": [asdict(category) for category in model.categories],
        "model": model.state_dict(),
        "record": dict(record or provenance({})),
    }


def save_checkpoint(
    folder: RunFolder,
    step: int,
    model: CLISDetector | ImageClassifier,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: Config,
    skipped: int = 0,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``step_00000600.pt`` and ``last.pt`` of a run and remove all but the last `keep_last`.

    Raises:
        OSError: it could not be written (a full disk, a read-only folder); the earlier checkpoints are whole.
    """
    path = folder.checkpoint(step)
    state = detector_state(model, config, step, record, folder.path) | {
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "skipped": skipped,
    }
    try:
        with atomic_write(path) as temporary:
            torch.save(state, temporary)
        link(path, folder.last)
    except (OSError, RuntimeError) as error:  # torch's writer has RuntimeErrors for a full disk
        if is_worker_death(error):  # raised wherever the main process happens to be
            raise
        before = folder.saved_checkpoints()
        good = f"the last good one is {before[0]}" if before else "there is none from before"
        raise OSError(
            f"{path}: the checkpoint could not be written ({str(error).splitlines()[0]}); {good}. Make room "
            "or allow writing there, then re-run the same command"
        ) from error
    for old in folder.step_checkpoints()[: -config.train.keep_last]:
        old.unlink()
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, running no code: neither in it nor of a module that its config names.

    Args:
        path: the file, or the run folder whose last one it is.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated, or not one of ours.
    """
    path = find_checkpoint(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        state = read_content(path)
    except ValueError as error:
        if path.suffix in (".yaml", ".yml"):
            raise ValueError(f"{path}: a config; name a checkpoint, or a run folder") from None
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not a readable checkpoint (truncated or foreign?): {reason}") from None
    parts = {"step", "config", "categories", "model"}
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= parts:
        holds = f"it holds {first_names(state)}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(
            f"{path}: not a checkpoint of clis, format {FORMAT}: {holds}; `python -m clis convert` makes "
            "one of the weights of a Faster R-CNN"
        )
    return state


def saved_categories(state: dict[str, Any]) -> list[Category]:
    """Return the classes of a checkpoint, in the order of their labels."""
    return [Category(**category) for category in state["categories"]]


def saved_config(state: dict[str, Any], source: str, overrides: Sequence[str] = (), **values: Any) -> Config:
    """Return the config of a checkpoint, with its data root made absolute.

    Args:
        source: names the checkpoint in errors.
        overrides: ``key=value``, which change it last.
        values: settings of the top level, in place of its own.

    Raises:
        ValueError: it is of another version, or an override is wrong.
    """
    saved = config_to_dict(config_from_dict(state["config"], source=source))
    changed = merge_overrides(saved | values, overrides)
    return resolve_data_root(config_from_dict(changed, source="override"))


def load_last_checkpoint(folder: RunFolder) -> tuple[dict[str, Any], Path] | None:
    """Load the last readable checkpoint of a run and return it with its path, or None where there is none.

    One that is damaged is named, and the one before it used.

    Raises:
        ValueError: there are some, and none is readable.
    """
    problems = []
    for path in folder.saved_checkpoints():
        try:
            return load_checkpoint(path), path
        except ValueError as error:
            problems.append(str(error))
            say(f"WARNING: {error}; trying the checkpoint before it")
    if problems:
        raise ValueError(f"{'; '.join(problems)}; remove {folder.checkpoints} to start from scratch")
    return None


def check_same_files(folder: RunFolder, config: Config) -> None:
    """Check that annotations and regions are those that an unfinished run has been trained on so far.

    Raises:
        ValueError: they are others.
    """
    last = None if folder.is_finished(config) else load_last_checkpoint(folder)
    changed = [] if last is None else changed_files(last[0].get("record"), training_files(config))
    if last is not None and changed:
        raise ValueError(
            f"{last[1]}: {' and '.join(changed)} changed since this training began; restore the original "
            "files, or start over in another folder (output=FOLDER)"
        )


def resume(
    folder: RunFolder,
    model: CLISDetector | ImageClassifier,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: Config,
    within: Collection[str] | None = None,
) -> tuple[int, int]:
    """Load the last readable checkpoint of a run folder; return its step and skipped steps, or 0 and 0.

    Rank 0 decides which one that is; all processes call this.

    Args:
        within: sections and keys of the config that matter here; None is all of them.

    Raises:
        ValueError: it was trained by another config or for other categories.
    """
    loaded: list[dict[str, Any]] = []

    def load() -> tuple[Path, int] | None:
        folder.remove_partial_files()
        found = load_last_checkpoint(folder)
        if found is None:
            return None
        loaded.append(found[0])
        return found[1], found[0]["step"]

    last = on_main(load)
    if last is None:
        return 0, 0
    path, step = last
    state = loaded[0] if loaded else load_checkpoint(path)
    if state["step"] != step:
        raise ValueError(
            f"{path}: rank 0 reads step {step}, rank {rank()} step {state['step']}; its file system shows "
            "old files: re-run the same command"
        )
    trained = config_from_dict(from_here(state["config"], folder.path), source=str(path))
    differences = differences_after(trained, config, state["step"], within)
    if differences:
        raise ValueError(f"{path} is of another config: {'; '.join(differences[:5])}; remove it")
    check_same_categories(saved_categories(state), str(path), model.categories, "the training split")
    load_state(model, state["model"], str(path))
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    say(f"{path}: resumed, going on from step {state['step']}")
    return state["step"], state.get("skipped", 0)


def load_model(state: dict[str, Any], config: Config, source: str) -> CLISDetector:
    """Build the checkpoint's detector as `config` says, load its weights, and return the one to evaluate.

    Where its `loss.classification` is ``module:Class``, that module is imported, from the working folder or
    Python's path; no other code is run for a checkpoint.

    Raises:
        ValueError: the config is of another model, and the tensors that differ are named; or its
            classification loss cannot be found.
    """
    try:
        model = build_model(config, saved_categories(state), pretrained=False)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    load_state(model, state["model"], source)
    return model.tested


def weights_to_evaluate(weights: dict[str, Tensor], momentum: float | None) -> dict[str, Tensor]:
    """Return the state dict of the detector to evaluate, `CLISDetector.tested`, without a teacher beside it.

    Args:
        weights: state dict of a model that may have a teacher.
        momentum: its `teacher.momentum`.
    """
    taught = {key: value for key, value in weights.items() if not key.startswith(TEACHER)}
    if len(taught) == len(weights) or momentum == 1:
        return taught
    return {key.removeprefix(TEACHER): value for key, value in weights.items() if key.startswith(TEACHER)}


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> CLISDetector:
    """Load a trained detector, ready for `detect`, from its checkpoint alone.

    There are two exceptions. A checkpoint with a user-defined loss names its module, which is imported (see
    `load_model`); and `test.calibration=fracal` first has to measure the training annotations.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint` and `load_model`.
    """
    state = load_checkpoint(path)
    model = load_model(state, config_from_dict(state["config"], source=str(path)), str(path))
    return model.to(device).eval()
