"""What is due after a step: a pure function of the step, and a clock."""

from __future__ import annotations

import time
from dataclasses import dataclass

from clis.config import TrainConfig


@dataclass(frozen=True)
class Due:
    """What is due after a training step."""

    record: bool
    """Write a line of metrics.jsonl."""
    checkpoint: bool
    """Also before every evaluation: a run that is asked to stop may not have the time for one."""
    evaluation: bool
    """On the way; the evaluation after the last step is not part of the training."""


def due_after(done: int, train: TrainConfig) -> Due:
    """Return what is due after `done` steps."""
    last, every = done == train.steps, train.eval_every
    evaluation = every is not None and done % every == 0 and 0 < done < train.steps
    return Due(
        record=last or done % train.log_every == 0,
        checkpoint=last or done % train.save_every == 0 or evaluation,
        evaluation=evaluation,
    )


class SaveClock:
    """Whether the last checkpoint is older than `train.save_minutes`, by this process's clock."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.restart()

    def restart(self) -> None:
        """Start the time from now: a checkpoint was written."""
        self.began = time.monotonic()

    def is_over(self) -> bool:
        """Return whether `train.save_minutes` have passed; never where they are None."""
        return self.minutes is not None and time.monotonic() - self.began >= 60 * self.minutes
