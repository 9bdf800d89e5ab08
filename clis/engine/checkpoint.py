"""Checkpoints: plain tensors and dicts, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from clis.config import Config, config_from_dict, config_to_dict
from clis.data.annotations import Category
from clis.files import written_whole
from clis.models import CLISDetector, build_model
from clis.models.backbone import load_state

FORMAT = 1


def save_checkpoint(
    folder: Path,
    step: int,
    model: CLISDetector,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: Config,
    keep_last: int,
) -> Path:
    """Writes ``step_00000600.pt`` and ``last.pt`` into `folder` and removes all but the last `keep_last`."""
    path = folder / f"step_{step:08d}.pt"
    state = {
        "format": FORMAT,
        "step": step,
        "config": config_to_dict(config),
        "categories": [asdict(category) for category in model.categories],
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    with written_whole(path) as temporary:
        torch.save(state, temporary)
    with written_whole(folder / "last.pt") as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
    for old in sorted(folder.glob("step_*.pt"))[:-keep_last]:
        old.unlink()
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; no code in it is run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a readable checkpoint (truncated or foreign?): {first_line}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of clis, format {FORMAT}")
    return state


def load_model(state: dict[str, Any], config: Config, source: str) -> CLISDetector:
    """The checkpoint's detector, built as `config` says.

    Raises:
        ValueError: the config is of another model; names the tensors that differ.
    """
    categories = [Category(**category) for category in state["categories"]]
    model = build_model(config, categories, pretrained=False)
    load_state(model, state["model"], source)
    return model


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> CLISDetector:
    """A trained detector, ready for `detect`, from nothing but its checkpoint.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`.
    """
    state = load_checkpoint(path)
    model = load_model(state, config_from_dict(state["config"], source=str(path)), str(path))
    return model.to(device).eval()
