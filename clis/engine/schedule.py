"""When a run saves and evaluates, and which of its checkpoints is the best."""

from __future__ import annotations

import json
import time
from pathlib import Path

from clis.config import Config
from clis.engine.checkpoint import checkpoint_name, link


class Schedule:
    """The steps at which something is due, from the config and the clock, in the run folder `folder`."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.train, self.folder = config.train, folder
        self.last_save = time.monotonic()

    def evaluation_due(self, done: int) -> bool:
        """Behind so many steps; that of the last step is no part of the training."""
        every = self.train.eval_every
        return every is not None and done % every == 0 and 0 < done < self.train.steps

    def evaluation_folder(self, done: int) -> Path:
        return self.folder / "evaluations" / f"step_{done:08d}"

    def checkpoint_due(self, done: int) -> bool:
        """Also in front of every evaluation: a run that is asked to stop may not have its time left."""
        saved = done % self.train.save_every == 0 or done == self.train.steps
        return saved or self.evaluation_due(done)

    def record_due(self, done: int) -> bool:
        return done % self.train.log_every == 0 or done == self.train.steps

    def minutes_are_over(self) -> bool:
        """By this process's clock: one has to ask for all."""
        minutes = self.train.save_minutes
        return minutes is not None and time.monotonic() - self.last_save >= 60 * minutes

    def saved(self) -> None:
        self.last_save = time.monotonic()

    def evaluated(self, done: int, ap: float) -> None:
        """Makes the checkpoint of this step ``best.pt`` if no evaluation before it has its AP."""
        before = [
            json.loads(path.read_text())["AP"]
            for path in (self.folder / "evaluations").glob("step_*/eval.json")
            if int(path.parent.name.removeprefix("step_")) < done
        ]
        if ap > max(before, default=-1.0):
            checkpoints = self.folder / "checkpoints"
            link(checkpoints / checkpoint_name(done), checkpoints / "best.pt")
