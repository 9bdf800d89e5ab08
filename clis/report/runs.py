"""A run folder as the report reads it: whatever exists of it, and the names of what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clis.config import Config, data_path
from clis.config_files import (
    config_from_dict,
    config_to_dict,
    flatten,
    merge_overrides,
    read_yaml,
    resolve_data_root,
)
from clis.engine.run_folder import RunFolder
from clis.metric.detections import Detections
from clis.metric.lvis_eval import METRICS


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """One run, finished or not."""

    name: str
    folder: RunFolder
    config: Config
    """With the overrides, and the root of the data made absolute."""
    recipe: dict[str, Any]
    """The settings of config.yaml by dotted key, as the file has them."""
    records: list[dict[str, Any]]
    figures: dict[str, float] | None
    """Fractions by name, of the last evaluation that there is; None without any."""
    evaluated_step: int | None
    """The step of that evaluation, where it is not the final one."""
    results: RunFolder
    """The folder that holds its detections."""
    record: dict[str, Any]
    """Where that evaluation comes from, as its eval.json says; empty in those of earlier versions."""
    missing: list[str] = field(default_factory=list)
    """What the page cannot show of this run, one sentence each; more is added on the way."""

    @property
    def finished(self) -> bool:
        """Whether the final evaluation is there."""
        return self.figures is not None and self.evaluated_step is None

    @property
    def step(self) -> int:
        """The last step that the log has, 0 before the first."""
        steps = [record["step"] for record in self.records]
        return self.config.train.steps if self.finished else max(steps, default=0)

    def detections(self) -> Detections | None:
        """Read the detections of the evaluation, or note that there are none."""
        if self.figures is None:
            return None
        if not self.results.detections.exists():
            self.missing.append(f"{self.results.detections} does not exist: no classes, errors and pictures.")
            return None
        return Detections.load(self.results.detections)


def read_run(folder: Path, name: str, overrides: Sequence[str]) -> ReportRun:
    """Read what exists of a run.

    Raises:
        FileNotFoundError: it is no run folder.
        ValueError: its config, with the overrides, or its log is damaged.
    """
    run = RunFolder(folder)
    if not run.config.exists():
        raise FileNotFoundError(f"{run.config}: no such file; name run folders, as in `output` of a config")
    values = read_yaml(run.config)
    recipe = flatten(values)
    values, unknown = _known(values)
    config = resolve_data_root(config_from_dict(merge_overrides(values, overrides), source=str(run.config)))
    missing = []
    if unknown:
        listed = ", ".join(unknown)
        missing.append(f"config.yaml has settings of another version, shown in the recipe alone: {listed}.")
    records = run.read_metrics()
    if not records:
        missing.append("metrics.jsonl has no record yet: no curves.")
    results, step = _last_evaluation(run, records)
    figures, record = None, {}
    if results.result.exists():
        read = results.read_result()
        record = results.read_record()
        names = (*METRICS, *(name for name in read if name.startswith("AR@")))
        figures = {key: read[key] for key in dict.fromkeys(names) if key in read}
    if figures is None:
        missing.append("The run is not finished and has no eval.json of any step: no AP, classes, pictures.")
    elif step is not None:
        missing.append(f"The run is not finished: figures and pictures are of the evaluation at step {step}.")
    return ReportRun(
        name=name, folder=run, config=config, recipe=recipe, records=records, figures=figures,
        evaluated_step=step, results=results, record=record, missing=missing,
    )  # fmt: skip


def _known(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that this version has, and the dotted keys of the others."""
    known = flatten(config_to_dict(Config()))
    unknown = [key for key in flatten(values) if key not in known]
    for key in unknown:
        *sections, last = key.split(".")
        section = values
        for each in sections:
            section = section[each]
        del section[last]
    return values, unknown


def _last_evaluation(run: RunFolder, records: Sequence[dict[str, Any]]) -> tuple[RunFolder, int | None]:
    """Return the folder of the final evaluation, or of the last one on the way with its step."""
    if not run.result.exists():
        for record in reversed(records):
            if "AP" in record and run.evaluation(record["step"]).result.exists():
                return run.evaluation(record["step"]), record["step"]
    return run, None


def check_same_data(runs: Sequence[ReportRun]) -> None:
    """Refuse runs of different data, whose classes and images are not the same.

    Raises:
        ValueError: `data.train` or `data.val` of two runs are different files.
    """
    first = runs[0]
    for run in runs[1:]:
        for key in ("train", "val"):
            here, there = (data_path(each.config, getattr(each.config.data, key)) for each in (run, first))
            if here.resolve() != there.resolve():
                raise ValueError(
                    f"{run.folder} has data.{key} {here}, {first.folder} has {there}; make "
                    f"a report for each, or pass data.root= or data.{key}= if they are copies"
                )
