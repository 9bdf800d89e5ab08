"""Steps that are left out, since loss or gradient was not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from clis.config import TrainConfig
from clis.distributed import from_all
from clis.engine.run_folder import RunFolder
from clis.progress import say
from clis.text import shortened


class NotFinite(NamedTuple):
    """What was not finite in a step of this process."""

    losses: Sequence[str]
    """Of some images, in words; empty where it shows in the gradient alone, or on another process."""
    images: Sequence[str]
    """All of the step."""


class SkippedSteps:
    """Counts the steps that changed nothing, and ends a run that may not leave out another one."""

    def __init__(
        self, total: int, scaler: torch.amp.GradScaler, folder: RunFolder, train: TrainConfig, advice: str
    ) -> None:
        """Start from the number of steps that the run has skipped so far.

        Args:
            total: those of the run so far.
            advice: settings that may help.
        """
        self.total, self.in_a_row = total, 0
        self.scaler, self.folder, self.train, self.advice = scaler, folder, train, advice

    def check(self, done: int, norm: float, what: Callable[[], NotFinite], save: Callable[[], None]) -> None:
        """Check the norm of a step's gradient, and count a step that is not finite; all processes call this.

        float16 scaling expects some that are not finite, lowers its scale and does not count them. A loss
        that stays not finite shows in their number in a row, or in a scale below 1.

        Args:
            done: steps before it.
            norm: of the step's gradient, the same on all processes.
            what: says what of it was not finite.
            save: called before an error that ends the run.

        Raises:
            FloatingPointError: the step may not be left out.
        """
        self.in_a_row = 0 if math.isfinite(norm) else self.in_a_row + 1
        if self.in_a_row == 0:
            return
        if self.scaler.is_enabled():
            scale = self.scaler.get_scale()
            if self.in_a_row <= self.train.max_skipped and scale >= 1:
                return
            save()
            text = _describe(done, what())
            raise self._error(f"{text}; {self.in_a_row} such steps in a row, loss scale {scale:g}")
        text = _describe(done, what())
        if self.train.on_nonfinite == "stop" or self.total == self.train.max_skipped:
            save()
            stops = self.train.on_nonfinite == "stop"
            raise self._error(text, ", or train.on_nonfinite=skip" if stops else ", or train.max_skipped")
        self.total += 1
        say(f"{text}; left out, {self.total} of at most {self.train.max_skipped}")

    def _error(self, what: str, more: str = "") -> FloatingPointError:
        saved = self.folder.saved_checkpoints()
        last = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
        return FloatingPointError(f"{what}; {last}; {self.advice}{more}")


def _describe(done: int, own: NotFinite) -> str:
    """Say what was not finite in a step after `done` others, of all processes."""
    found = from_all(own)
    losses = [loss for each in found for loss in each.losses]
    images = [image for each in found for image in each.images]
    return f"step {done + 1}: not finite: {'; '.join(losses) or f'the gradient, images {shortened(images)}'}"
