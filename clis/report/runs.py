"""A run folder as the report reads it: whatever exists of it, and the names of what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clis.engine.run_folder import RunFolder
from clis.engine.run_state import RunState
from clis.metric.detections import Detections
from clis.text import printable


@dataclass(frozen=True)
class ReportRun:
    """One run, finished or not."""

    name: str
    state: RunState
    missing: list[str]
    """What the page cannot show of this run, one sentence each; more is added on the way."""

    def detections(self) -> Detections | None:
        """Read the detections of the last evaluation, or note that there are none."""
        folder = self.state.evaluated
        if folder is None:
            return None
        if not folder.detections.exists():
            self.missing.append(f"{folder.detections} does not exist: no classes, errors and pictures.")
            return None
        return Detections.load(folder.detections)


def read_run(folder: Path, name: str, overrides: Sequence[str]) -> ReportRun:
    """Read what exists of a run; errors as `RunState.read`."""
    state, missing = RunState.read(RunFolder(folder), overrides), []
    if state.unknown:
        listed = ", ".join(state.unknown)
        missing.append(f"config.yaml has settings of another version, shown in the recipe alone: {listed}.")
    if not state.records:
        missing.append("metrics.jsonl has no record yet: no curves.")
    if state.metrics is None:
        missing.append("The run is not finished and has no evaluation yet: no AP, classes, pictures.")
    elif state.result is None:
        step, _ = state.metrics
        missing.append(f"The run is not finished: figures and pictures are of the evaluation at step {step}.")
    return ReportRun(printable(name), state, missing)
