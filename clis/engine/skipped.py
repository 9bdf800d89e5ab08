"""Steps that are left out, since loss or gradient was not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from clis.config import TrainConfig
from clis.engine.run_folder import RunFolder


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

    def check(self, norm: float, what: Callable[[], str]) -> None:
        """Check the norm of a step's gradient, and count the step if it is not finite.

        float16 scaling expects some that are not finite, lowers its scale and does not count them. A loss
        that stays not finite shows in their number in a row, or in a scale below 1.

        Args:
            norm: of the step's gradient, the same on all processes.
            what: says which step was not finite, and what of it.

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
            raise self._error(f"{what()}; {self.in_a_row} such steps in a row, loss scale {scale:g}")
        self.total += 1
        if self.train.on_nonfinite == "stop" or self.total > self.train.max_skipped:
            raise self._error(what(), ", or train.on_nonfinite=skip")
        print(f"{what()}; left out, {self.total} of at most {self.train.max_skipped}", flush=True)

    def _error(self, what: str, more: str = "") -> FloatingPointError:
        saved = self.folder.saved_checkpoints()
        last = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
        return FloatingPointError(f"{what}; {last}; {self.advice}{more}")
