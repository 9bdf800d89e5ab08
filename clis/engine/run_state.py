"""What a run folder has of a run, finished or not."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clis.config import Config, data_path
from clis.config_files import (
    config_from_dict,
    config_to_dict,
    flatten,
    from_here,
    merge_overrides,
    read_yaml,
    resolve_data_root,
)
from clis.engine.run_folder import RunFolder

RECENT = 20
"""Records whose median is the present speed."""


@dataclass(frozen=True)
class RunState:
    """The settings, records and metrics of a run folder, as far as the run has come."""

    folder: RunFolder
    config: Config
    """With the reader's overrides, and the root of the data made absolute."""
    recipe: dict[str, Any]
    """The settings of config.yaml by dotted key, as the file has them."""
    records: list[dict[str, Any]]
    """Of training steps, by metrics.jsonl; a number that was not finite is None."""
    evaluations: list[tuple[int, dict[str, float]]]
    """Steps and metrics of the evaluations on the way, that at the end of a shorter training included."""
    result: dict[str, float] | None
    """The metrics of the finished run."""

    @classmethod
    def read(cls, folder: RunFolder, overrides: Sequence[str] = ()) -> RunState:
        """Read a run folder; settings that only another version has are in the recipe alone.

        Args:
            overrides: ``key=value`` for the config, e.g. where the data are now.

        Raises:
            FileNotFoundError: no run has begun there.
            ValueError: a file is damaged, or an override is no setting.
        """
        if not folder.config.exists():
            raise FileNotFoundError(f"{folder.config}: no such file; name run folders, e.g. runs/shapes/clis")
        values = from_here(read_yaml(folder.config), folder.path)
        recipe = flatten(values)
        known = _without(values, _unknown(recipe))
        config = config_from_dict(merge_overrides(known, overrides), source=str(folder.config))
        records = folder.read_metrics()
        evaluations = {record["step"]: _metrics(record) for record in records if "AP" in record}
        done = folder.steps_done
        for step, evaluation in folder.step_evaluations().items():
            if step <= done:  # that of a training which was then extended has no record
                evaluations.setdefault(step, evaluation.read_result())
        return cls(
            folder=folder,
            config=resolve_data_root(config),
            recipe=recipe,
            records=[record for record in records if "loss" in record],
            evaluations=sorted(evaluations.items()),
            result=folder.read_result() if folder.result.exists() else None,
        )

    @property
    def unknown(self) -> list[str]:
        """The dotted keys of the recipe that this version does not have."""
        return _unknown(self.recipe)

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
        every = self.every_evaluation
        return every[-1] if every else None

    @property
    def every_evaluation(self) -> list[tuple[int, dict[str, float]]]:
        """Steps and metrics of the evaluations on the way, then those of the finished run."""
        return self.evaluations + ([] if self.result is None else [(self.steps, self.result)])

    @property
    def evaluated(self) -> RunFolder | None:
        """The folder with the files of the last evaluation; None where there was none."""
        if self.result is not None:
            return self.folder
        return self.folder.evaluation(self.evaluations[-1][0]) if self.evaluations else None

    @property
    def source(self) -> dict[str, Any]:
        """Where the last evaluation comes from, as its eval.json says; empty in those of earlier versions."""
        folder = self.evaluated
        return folder.read_record() if folder is not None and folder.result.exists() else {}

    @property
    def step_seconds(self) -> float | None:
        """Seconds a step takes now: the median of the last records."""
        recent = [r["data_time"] + r["compute_time"] for r in self.records[-RECENT:] if "compute_time" in r]
        return statistics.median(recent) if recent else None

    @property
    def preempted_step(self) -> int | None:
        """The step that a run which stopped on request has saved, 0 for none, until it is resumed."""
        if not self.folder.preempted.exists():
            return None
        return int(json.loads(self.folder.preempted.read_text())["step"])

    def what_is_missing(self) -> str | None:
        """Say how far an unfinished run is and which metrics it has; None for a finished one."""
        if self.result is not None:
            return None
        text = f"not finished, step {self.step} of {self.steps}"
        if not self.evaluations:
            return f"{text}, no evaluation yet"
        return f"{text}; its metrics are those after step {self.evaluations[-1][0]}"


def check_same_data(states: Sequence[RunState], instead: str) -> None:
    """Refuse runs of different data, whose classes and images are not the same.

    Args:
        instead: what the user can do, for the message.

    Raises:
        ValueError: `data.train` or `data.val` of two runs are different files.
    """
    for state in states[1:]:
        for key in ("train", "val"):
            here, there = (
                data_path(each.config, getattr(each.config.data, key)).resolve()
                for each in (state, states[0])
            )
            if here != there:
                raise ValueError(
                    f"{state.folder} has data.{key} {here}, {states[0].folder} has {there}; {instead}, or "
                    f"pass data.root= or data.{key}= if they are copies"
                )


def _metrics(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step"}


def _unknown(recipe: dict[str, Any]) -> list[str]:
    known = flatten(config_to_dict(Config()))
    return [key for key in recipe if key not in known]


def _without(values: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Return nested values without settings of these dotted keys, and without sections of such alone."""
    kept = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            rest = _without(value, keys, f"{key}.")
            if rest or not value:
                kept[name] = rest
        elif key not in keys:
            kept[name] = value
    return kept
