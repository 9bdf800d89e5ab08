"""The runs of a study, and what they are known by: equal settings are one run for all studies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clis.config import DETECTOR_RULES, ONLINE_RULES, RESUMABLE, Config, data_path, scoped_keys
from clis.config_files import config_to_dict, flatten, load_config
from clis.config_scopes import Scope
from clis.engine.prerequisites import PlannedRun, passed_overrides, plan_run
from clis.engine.provenance import file_hash
from clis.engine.region_search import given_boxes

KEY_VERSION = 3
"""Of `run_key`; another one where a default, or what the code makes of equal settings, has changed."""


@dataclass(frozen=True)
class StudyRun:
    """One row with one seed, or a run that another one needs."""

    base: Path
    overrides: list[str]
    """All that make the plan's config of `base`."""
    plan: PlannedRun
    start: StudyRun | None
    """Whose weights it starts from, if that is to be trained."""
    detector: StudyRun | None
    """That finds the regions, if it is to be trained."""
    regions: str | None
    """What the region file is known by; None without image-level images."""
    key: str
    """What the run is known by."""

    @classmethod
    def load(cls, base: Path, overrides: Sequence[str]) -> StudyRun:
        """Load a run and those that it needs.

        Raises:
            FileNotFoundError, ValueError: a config cannot be read, or a run needs itself.
        """
        return cls._of(plan_run(load_config(base, overrides), str(base), overrides), base, list(overrides))

    @classmethod
    def _of(cls, plan: PlannedRun, base: Path, overrides: list[str]) -> StudyRun:
        config = plan.config

        def needed(run: PlannedRun | None, source: str | None) -> StudyRun | None:
            if run is None:
                return None
            return cls._of(run, Path(str(source)), passed_overrides(overrides, config, run.config))

        start, regions = needed(plan.start, config.start.from_), None
        detector = needed(plan.detector, config.regions.detector)
        if config.clis.s > 0:
            regions = _regions_key(config, None if detector is None else detector.key)
        key = run_key(config, regions, None if start is None else start.key)
        return cls(base, overrides, plan, start, detector, regions, key)


def run_key(config: Config, regions: str | None = None, start: str | None = None) -> str:
    """Return twelve letters that are equal for runs of the same settings, but for machine and places.

    Settings that have their default are left out, so that a new field keeps earlier runs known; a changed
    default does not, and needs another `KEY_VERSION`.

    Args:
        regions: what the region file is known by; it stands for the section.
        start: what the run that it starts from is known by; it stands for `start.from`.
    """
    values, defaults = (flatten(config_to_dict(each)) for each in (config, Config()))
    streams = config.clis.s > 0 or config.pretrain.epochs > 0
    silent = RESUMABLE if streams else (*RESUMABLE, *scoped_keys(Scope.IMAGE_LEVEL))
    changed = {
        key: value
        for key, value in values.items()
        if value != defaults[key] and key not in silent and not key.startswith("regions.")
    }
    if config.regions.rule in ONLINE_RULES and config.clis.s > 0:
        changed["regions.rule"] = config.regions.rule
    if start is not None:
        changed["start.from"] = start
    elif config.start.from_ is not None:
        changed["start.from"] = str(Path(config.start.from_).resolve())
    return _hashed([KEY_VERSION, changed, regions, _data_key(config)])


def _data_key(config: Config) -> str | None:
    """Return what the data are known by, wherever they lie: a hash of the annotations of both splits.

    None is the embedded benchmark; where an annotation file is missing, it is their folder.
    """
    if config.data.generate:
        return None
    found = [file_hash(data_path(config, name)) for name in (config.data.train, config.data.val)]
    return config.data.root if None in found else _hashed(found)


def _regions_key(config: Config, detector: str | None) -> str:
    """Return the key of a region file, as `run_key`: of the fields of scope `REGIONS` that have an effect."""
    searched, noisy = config.regions.rule in DETECTOR_RULES, config.data.label_noise > 0
    matters = {
        "regions.short_side": searched,
        "regions.max_size": searched,
        "data.label_noise": noisy,
        "train.seed": noisy,  # draws the noise
        "regions.detector": False,  # the detector's own key, or its path, stands for it
    }
    fields = [field for field in scoped_keys(Scope.REGIONS) if field not in matters]
    fields.sort(key=lambda field: not field.startswith("regions."))  # the order of keys already recorded
    fields += [field for field, does in matters.items() if does]
    values = flatten(config_to_dict(config))
    values["regions.short_side"].sort()  # the sizes are searched in any order
    values["regions.rule"] = config.regions.file_rule
    key = [*(values[field] for field in fields), _data_key(config)]
    if detector is not None:
        key.append(detector)
    elif searched and config.regions.detector is not None:
        key.append(str(Path(config.regions.detector).resolve()))
    elif config.regions.rule == "given" and not config.data.generate:
        key.append(file_hash(given_boxes(config)))
    return _hashed(key)


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
