"""When a run saves and evaluates, and which of its checkpoints is the best."""

from __future__ import annotations

import json
import time
from pathlib import Path

from clis.config import Config
from clis.engine.checkpoint import link


class Schedule:
    """The steps at which something is due, from the config and the clock.

    Args:
        folder: the run folder, whose evaluations up to `first_step` count for the best.
    """

    def __init__(self, config: Config, folder: Path, first_step: int) -> None:
        self.train, self.folder = config.train, folder
        self.last_save = time.monotonic()
        self.best_ap = -1.0
        for path in sorted((folder / "evaluations").glob("step_*/eval.json")):
            if int(path.parent.name.removeprefix("step_")) <= first_step:
                self.best_ap = max(self.best_ap, json.loads(path.read_text())["AP"])

    def evaluation_folder(self, done: int) -> Path | None:
        """Where the evaluation behind this many steps goes, if there is one; not that of the last step."""
        every = self.train.eval_every
        if every is None or done % every != 0 or done == self.train.steps:
            return None
        return self.folder / "evaluations" / f"step_{done:08d}"

    def checkpoint_due(self, done: int) -> bool:
        evaluated = self.evaluation_folder(done) is not None
        return done % self.train.save_every == 0 or done == self.train.steps or evaluated

    def minutes_are_over(self) -> bool:
        """By this process's clock: one has to ask for all."""
        minutes = self.train.save_minutes
        return minutes is not None and time.monotonic() - self.last_save >= 60 * minutes

    def saved(self, path: Path, ap: float | None) -> None:
        """Notes the time, and makes the checkpoint ``best.pt`` if its AP is the highest so far."""
        self.last_save = time.monotonic()
        if ap is not None and ap > self.best_ap:
            self.best_ap = ap
            link(path, path.with_name("best.pt"))
