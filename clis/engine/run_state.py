"""What a run folder says of a run, finished or not."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from clis.config import Config
from clis.engine.run_folder import RunFolder

RECENT = 20
"""Records whose median is the present speed."""


@dataclass(frozen=True)
class RunState:
    """The records of a run folder, as far as the run has come."""

    folder: RunFolder
    config: Config
    records: list[dict[str, Any]]
    """Of training steps, by metrics.jsonl; a number that was not finite is None."""
    evaluations: list[tuple[int, dict[str, float]]]
    """Steps and metrics of the evaluations on the way."""
    result: dict[str, float] | None
    """The metrics of the finished run."""

    @classmethod
    def read(cls, folder: RunFolder) -> RunState:
        """Read a run folder.

        Raises:
            FileNotFoundError: no run has begun there.
            ValueError: a file is damaged.
        """
        if not folder.config.exists():
            raise FileNotFoundError(f"{folder.config}: no such file; name run folders, e.g. runs/shapes/clis")
        records = folder.read_metrics()
        return cls(
            folder=folder,
            config=folder.read_config(),
            records=[record for record in records if "loss" in record],
            evaluations=[(record["step"], _metrics(record)) for record in records if "AP" in record],
            result=folder.read_result() if folder.result.exists() else None,
        )

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.train.steps

    @property
    def step(self) -> int:
        """The last step that there is a record of."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def metrics(self) -> tuple[int, dict[str, float]] | None:
        """The last evaluation, its step first; None where there was none."""
        if self.result is not None:
            return self.steps, self.result
        return self.evaluations[-1] if self.evaluations else None

    @property
    def step_seconds(self) -> float | None:
        """Seconds a step takes now: the median of the last records."""
        recent = [r["data_time"] + r["compute_time"] for r in self.records[-RECENT:] if "compute_time" in r]
        return statistics.median(recent) if recent else None

    @property
    def preempted_step(self) -> int | None:
        """The step that a run which stopped on request has saved, until it is resumed."""
        if not self.folder.preempted.exists():
            return None
        return int(json.loads(self.folder.preempted.read_text())["step"])

    def what_is_missing(self) -> str | None:
        """Say how far an unfinished run is and which metrics it has; None for a finished one."""
        if self.result is not None:
            return None
        text = f"{self.folder}: not finished, step {self.step} of {self.steps}"
        if not self.evaluations:
            return f"{text}, no evaluation yet"
        return f"{text}; its metrics are those after step {self.evaluations[-1][0]}"


def _metrics(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step"}
