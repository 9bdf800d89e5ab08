"""What is due after a step, a pure function of the step; a clock; and how far two schedules are the same."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from clis.config import Config, TrainConfig
from clis.config_files import config_differences


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


def differences_after(
    before: Config, now: Config, done: int, within: Collection[str] | None = None
) -> list[str]:
    """List the settings by which a run that has made `done` steps cannot be resumed with another config.

    Another number of steps and other decay steps may be fine: the learning rate is a function of the step, so
    those made are the same if each change is of later ones. A loss that depends on the share of the training
    that is done would have been another one.

    Args:
        within: sections and keys that matter, and may not change at all; None is all of them.
    """
    differences = config_differences(before, now, within)
    keys = {difference.partition(":")[0] for difference in differences}
    earlier, later = before.optim.decay_steps, now.optim.decay_steps
    moved = [step for step in (*earlier, *later) if earlier.count(step) != later.count(step)]
    by_share = "pcb" in now.loss.classification or ":" in now.loss.classification  # ":": a user's own loss
    longer = within is None and keys <= {"train.steps", "optim.decay_steps"} and not by_share
    longer = longer and now.train.steps >= done > 0
    return [] if longer and all(step >= done for step in moved) else differences


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
