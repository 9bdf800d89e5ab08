"""Runs that another run needs first: the one that it starts from, and the detector that finds its regions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clis.config import DETECTOR_RULES, SCOPES, Config
from clis.config_files import flatten, load_config, merge_overrides
from clis.config_scopes import Scope
from clis.engine.run_folder import RunFolder, find_checkpoint


@dataclass(frozen=True)
class PlannedRun:
    """A run with those that it needs first, each None where the config names no config for it."""

    title: str
    config: Config
    start: PlannedRun | None
    """Whose weights it starts from."""
    detector: PlannedRun | None
    """That finds its regions."""

    def walk(self) -> Iterator[PlannedRun]:
        """Yield all runs, each after those that it needs."""
        for needed in (self.start, self.detector):
            if needed is not None:
                yield from needed.walk()
        yield self


def plan_run(
    config: Config, title: str, overrides: Sequence[str] = (), outer: Sequence[Path] = ()
) -> PlannedRun:
    """Plan a run and its prerequisites, and theirs.

    Args:
        overrides: of the config; some hold for the prerequisites too (`passed_overrides`).
        outer: config files of the runs that need this one.

    Raises:
        FileNotFoundError, ValueError: a config cannot be read, or a run needs itself.
    """

    def needed(key: str, role: str, source: str | None, each: Config | None) -> PlannedRun | None:
        if source is None or each is None:
            return None
        path = Path(source).resolve()
        if path in outer or each.output == config.output:
            raise ValueError(f"{key}={source}: this run needs itself; name another config, or a checkpoint")
        passed = _passed(overrides, config, each, RunFolder(each.output))
        return plan_run(each, f"{role}: {source}", passed, [*outer, path])

    return PlannedRun(
        title,
        config,
        start=needed("start.from", "run to start from", config.start.from_, start_config(config, overrides)),
        detector=needed(
            "regions.detector",
            "detector for the regions",
            config.regions.detector,
            detector_config(config, overrides),
        ),
    )


def start_config(config: Config, overrides: Sequence[str] = ()) -> Config | None:
    """Load the config that `start.from` names, if it names one by its config; see `detector_config`.

    With ``output=FOLDER`` its run folder is FOLDER/start, or that of the regions' detector if it is the same.
    """
    folder = RunFolder(config.output)
    same = config.start.from_ == config.regions.detector and detector_config(config, overrides) is not None
    own = folder.detector if same else folder.start
    return _config_of(config.start.from_, config, own, overrides)


def detector_config(config: Config, overrides: Sequence[str] = ()) -> Config | None:
    """Load the config of the detector that finds the regions, if the config names one by its config.

    Overrides hold for it as `passed_overrides` says; with ``output=FOLDER`` its folder is FOLDER/detector.
    """
    if config.clis.s == 0 or config.regions.rule not in DETECTOR_RULES:
        return None
    return _config_of(config.regions.detector, config, RunFolder(config.output).detector, overrides)


def passed_overrides(overrides: Sequence[str], config: Config, needed: Config) -> list[str]:
    """Select from the overrides of a config's run those that hold for a run that it needs.

    They are of shared fields, and where only the needed run has image-level images, of the fields of these.
    """
    passed = Scope.SHARED
    if config.clis.s == 0 and needed.clis.s > 0:
        passed |= Scope.IMAGE_LEVEL | Scope.REGIONS
    return [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in flatten(merge_overrides({}, overrides)).items()
        if SCOPES.get(key, Scope.OWN) & passed
    ]


def checkpoint_of(source: str, trained: Config | None) -> Path:
    """Return the checkpoint that a source names: of `trained`, if it is a config's run, else its own.

    Args:
        source: a checkpoint or a run folder; not read if there is a config.

    Raises:
        FileNotFoundError: it is a folder without a checkpoint.
    """
    return find_checkpoint(source) if trained is None else RunFolder(trained.output).last


def _config_of(
    source: str | None, config: Config, folder: RunFolder, overrides: Sequence[str]
) -> Config | None:
    if source is None or Path(source).suffix not in (".yaml", ".yml"):
        return None
    return load_config(source, _passed(overrides, config, load_config(source), folder))


def _passed(overrides: Sequence[str], config: Config, needed: Config, folder: RunFolder) -> list[str]:
    """Return the overrides of a needed run; `folder` is its own if that of the config's run was named."""
    passed = passed_overrides(overrides, config, needed)
    return [*passed, f"output={folder}"] if "output" in merge_overrides({}, overrides) else passed
