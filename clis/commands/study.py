"""``python -m clis study FILE``: rows of a table times seeds, side by side; what they share is made once."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clis.cli import Preempted
from clis.commands.study_record import FIGURES, Record
from clis.config import DETECTOR_RULES, RESUMABLE, Config, data_path, scoped_keys
from clis.config_files import (
    config_to_dict,
    find_config,
    flatten,
    load_config,
    merge_overrides,
    name_below,
    read_yaml,
)
from clis.config_scopes import Scope
from clis.data.shapes import generate_shapes
from clis.engine.preemption import StopRequest
from clis.engine.prerequisites import PlannedRun, plan_run, shared_overrides
from clis.engine.provenance import file_hash
from clis.engine.run_folder import RunFolder
from clis.engine.start import check_plan
from clis.progress import say

KEY_VERSION = 3
"""Of `run_key`; another one where a default, or what the code makes of equal settings, has changed."""
STUDY_KEYS = {"base", "seeds", "axis", "rows"}
"""Of a study file."""
POLL = 0.5
"""Seconds between two looks at what is running."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis study`."""
    parser.add_argument("file", type=find_config, help="a study, e.g. studies/components")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every row")
    parser.add_argument("--rows", nargs="+", default=(), metavar="NAME", help="run only these rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=(), help="run only these seeds, of every row")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, which share the CPUs")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), metavar="FOLDER")
    parser.add_argument(
        "--draw", action="store_true", help="run nothing; write table and figure of what is recorded"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the rows and seeds of a study that are missing, then print its table; or only draw it again."""
    if arguments.draw:
        say(str(draw_again(arguments.file, arguments.out, arguments.overrides)))
        return
    folder = run_study(
        arguments.file,
        arguments.out,
        rows=arguments.rows,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        overrides=arguments.overrides,
    )
    say((folder / "table.md").read_text() + f"{folder}/study.json, table.md")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    overrides: tuple[str, ...]
    """`key.path=value`, on the study's base config."""
    paper: tuple[float, ...] | None
    """The paper's AP, APr, APc, APf in percent, where it has the row."""
    paper_seconds: float | None = None
    """The paper's seconds a step on a V100, where it has them."""
    seeds: tuple[int, ...] | None = None
    """Of this row alone; None is the study's."""
    config: Path | None = None
    """In place of the study's base."""
    at: float | None = None
    """The row's place on the study's axis, for the figure alone."""


@dataclass(frozen=True)
class Study:
    """A study file: the base config, the seeds and the rows."""

    name: str
    """Of its folder below `--out`: the file's path below a folder ``studies``, or its own name."""
    base: Path
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    axis: str | None = None
    """What is varied, as a label of the figure's axis, on which rows have their places `at`."""

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read a study file: `base` (relative to it), `seeds`, `axis`, and `rows` with the fields of `Row`.

        A study `like` another takes from that one the keys, and of `rows` the whole rows, that it does not
        give itself.

        Raises:
            FileNotFoundError, ValueError: it is missing, or a key is unknown, missing or ill-typed.
        """
        values = _read_keys(path)
        _check_keys(values, STUDY_KEYS, {"base", "seeds", "rows"}, str(path))
        seeds = _read_seeds(values["seeds"], str(path))
        rows = tuple(_read_row(name, row or {}, path) for name, row in values["rows"].items())
        axis = values.get("axis")
        if axis is None and any(row.at is not None for row in rows):
            raise ValueError(f"{path}: rows have places `at`, and no `axis` says on what; add its label")
        return cls(name_below(path, "studies").as_posix(), values["base"], seeds, rows, axis)

    def run(self, row: Row, seed: int, overrides: Sequence[str]) -> StudyRun:
        """Load the run of a row and seed, with `overrides` that hold for all rows."""
        every = [*overrides, *row.overrides, f"train.seed={seed}"]
        return StudyRun.load(row.config or self.base, every)


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
        config, passed = plan.config, shared_overrides(overrides)
        start = detector = regions = None
        if plan.start is not None:
            start = cls._of(plan.start, Path(str(config.start.from_)), passed)
        if plan.detector is not None:
            detector = cls._of(plan.detector, Path(str(config.regions.detector)), passed)
        if config.clis.s > 0:
            regions = _regions_key(config, None if detector is None else detector.key)
        key = run_key(config, regions, None if start is None else start.key)
        return cls(base, overrides, plan, start, detector, regions, key)


def _read_keys(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the keys of a study file and of the one that it is like; paths become those of their files."""
    if path.resolve() in below:
        raise ValueError(f"{path}: like itself, directly or by others; name another study")
    values = read_yaml(path)
    _check_keys(values, STUDY_KEYS | {"like"}, set(), str(path))
    if "base" in values:
        values["base"] = _beside(path, values["base"])
    if not isinstance(values.get("rows", {}), Mapping):
        raise ValueError(f"{path}: rows is {values['rows']!r}; give a mapping of names to rows")
    if "rows" in values:
        values["rows"] = {str(name): row for name, row in values["rows"].items()}
    for row in values.get("rows", {}).values():
        if isinstance(row, dict) and "config" in row:
            row["config"] = _beside(path, row["config"])
    if "like" not in values:
        return values
    like = _read_keys(_beside(path, values.pop("like")), (*below, path.resolve()))
    if "rows" in values:
        values["rows"] = {**like.get("rows", {}), **values["rows"]}
    return {**like, **values}


def _read_row(name: str, values: Any, path: Path) -> Row:
    where = f"{path}: row {name}"
    _check_keys(values, {"at", "config", "overrides", "paper", "paper_seconds", "seeds"}, set(), where)
    seeds = _read_seeds(values["seeds"], where) if "seeds" in values else None
    overrides, paper = values.get("overrides", []), values.get("paper")
    if not isinstance(overrides, list) or not all(isinstance(each, str) for each in overrides):
        raise ValueError(f"{where}: overrides is {overrides!r}; give a list of key=value")
    for key in flatten(merge_overrides({}, overrides)):
        if key in (*RESUMABLE, "regions.file", "train.seed"):
            raise ValueError(
                f"{where}: {key} is not a row's to set: it changes no result, or all rows share it"
            )
    if paper is not None and not (isinstance(paper, list) and len(paper) == len(FIGURES)):
        raise ValueError(f"{where}: paper is {paper}; give {', '.join(FIGURES)}")
    paper, at = None if paper is None else tuple(paper), values.get("at")
    if at is not None and (isinstance(at, bool) or not isinstance(at, (int, float))):
        raise ValueError(f"{where}: at is {at!r}; give a number")
    return Row(name, tuple(overrides), paper, values.get("paper_seconds"), seeds, values.get("config"), at)


def _beside(path: Path, name: Any) -> Path:
    """Return the path of a file that a study names, relative to the working folder."""
    if not isinstance(name, str):
        raise ValueError(f"{path}: {name!r} is no path; base, like and config name files")
    return Path(os.path.relpath(path.parent / name))


def _read_seeds(seeds: Any, where: str) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"{where}: seeds is {seeds!r}; give a list of whole numbers")
    return tuple(seeds)


@dataclass
class Job:
    """One process: a training or a search for regions."""

    title: str
    command: list[str]
    done: Path
    """Is there when the job is done."""
    after: list[Job] = field(default_factory=list)
    """Jobs that have to be done before."""
    results: list[tuple[str, int]] = field(default_factory=list)
    """Rows and seeds whose figures it gives."""
    failed: bool = False
    seconds: float = 0.0


def run_study(
    path: Path,
    out: Path,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 2,
    overrides: Sequence[str] = (),
) -> Path:
    """Run what is not done yet and write ``study.json`` and ``table.md`` into out/NAME after every run.

    Runs are in out/runs under a name made of their config, so that equal rows of several studies are one run,
    and an interrupted run is resumed. What the study.json of another study in `out` has is not run again.

    Args:
        rows, seeds: only these; default all of the file. Seeds that are named hold for every row.
        jobs: processes at once, which share the CPUs.
        overrides: for every row, e.g. the number of steps in a trial.

    Returns:
        out/NAME.

    Raises:
        ValueError: unknown rows or classification losses; or a run failed, after the others are done.
        Preempted: asked to stop; what was running has saved its state.
    """
    study, out = Study.load(path), out.resolve()
    unknown = sorted(set(rows) - {row.name for row in study.rows})
    if unknown:
        raise ValueError(
            f"{path} has no row {', '.join(unknown)}; it has {', '.join(r.name for r in study.rows)}"
        )
    folder = out / study.name
    record = Record(study, folder, overrides)
    plan: dict[Path, Job] = {}
    chosen = [row for row in study.rows if not rows or row.name in rows]
    wanted = [(row, seed) for row in chosen for seed in seeds or row.seeds or study.seeds]
    for row, seed in sorted(wanted, key=lambda each: each[1]):  # a seed of all rows before the next
        if not record.has(row, seed) and not record.take(row, seed):
            _plan(study, row, seed, out, overrides, plan)
    say(f"{study.name}: {len(study.rows)} rows; {len(plan)} jobs to do, {jobs} at once")
    if record.outdated:
        say(f"recorded with other settings or data, and left out: {'; '.join(record.outdated)}")
    base = load_config(study.base, overrides)
    if plan and base.data.generate == "shapes":  # once, before processes that would all write it
        generate_shapes(data_path(base, "shapes"))
    for job in _work(list(plan.values()), jobs, out / "logs"):
        if job.failed:
            say(f"FAILED {job.title}, see {_log(job, out / 'logs')}")
            continue
        for name, seed in job.results:
            try:
                say(f"{name}, seed {seed}: {record.add(name, seed, RunFolder(job.done.parent))}")
            except (OSError, ValueError, KeyError) as error:  # a damaged run stops no other
                job.failed = True
                say(f"FAILED {name}, seed {seed}: {job.done.parent} cannot be read: {error}")
        if job.seconds:
            say(f"{job.title}: {tqdm.format_interval(job.seconds)}")
    record.write()
    record.draw()
    failed = [job.title for job in plan.values() if job.failed]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(plan)} jobs failed: {', '.join(failed)}; re-run the command to retry"
        )
    return folder


def draw_again(path: Path, out: Path, overrides: Sequence[str] = ()) -> Path:
    """Write table and figure of what out/NAME/study.json has recorded; return the figure's path.

    Raises:
        FileNotFoundError: nothing is recorded.
        ValueError: it was recorded with other overrides, or runs of it with other settings or data.
    """
    study = Study.load(path)
    record = Record(study, out / study.name, overrides)
    if not record.path.exists():
        raise FileNotFoundError(f"{record.path}: no such file; name the folder of the study in --out")
    if record.outdated:
        raise ValueError(
            f"{record.path}: recorded with other settings or data than the study has now: "
            f"{'; '.join(record.outdated)}; run the study, or draw it with those"
        )
    record.write()
    return record.draw()


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
    key = [*(values[field] for field in fields), _data_key(config)]
    if detector is not None:
        key.append(detector)
    elif searched and config.regions.detector is not None:
        key.append(str(Path(config.regions.detector).resolve()))
    return _hashed(key)


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _plan(
    study: Study, row: Row, seed: int, out: Path, overrides: Sequence[str], plan: dict[Path, Job]
) -> None:
    """Add the job of a row and seed, and of what it needs, to those that are planned already."""
    run = study.run(row, seed, overrides)
    check_plan(run.plan)  # a typo is reported before any work starts
    _plan_training(run, f"training of {row.name}, seed {seed}", out, plan).results.append((row.name, seed))


def _plan_training(run: StudyRun, title: str, out: Path, plan: dict[Path, Job]) -> Job:
    """Add the training of a run, after those that it needs."""
    folder, after, more = out / "runs" / run.key, [], []
    seed = run.plan.config.train.seed
    if run.start is not None:
        after.append(_plan_training(run.start, f"training to start from, seed {seed}", out, plan))
        more.append(f"start.from={out / 'runs' / run.start.key}")
    if run.regions is not None:
        file = out / "regions" / f"{run.regions}.npy"
        after.append(_plan_regions(run, file, out, plan))
        more.append(f"regions.file={file}")
    command = [sys.executable, "-m", "clis", "train", "--config", str(run.base), *run.overrides, *more]
    job = Job(title, [*command, f"output={folder}"], RunFolder(folder).result, after)
    return plan.setdefault(folder, job)


def _plan_regions(run: StudyRun, file: Path, out: Path, plan: dict[Path, Job]) -> Job:
    """Add the search of a run's regions, after the training of their detector."""
    after, more, seed = [], [f"regions.file={file}"], run.plan.config.train.seed
    if run.detector is not None:
        after.append(_plan_training(run.detector, f"detector of the regions, seed {seed}", out, plan))
        more.append(f"regions.detector={out / 'runs' / run.detector.key}")
    command = [sys.executable, "-m", "clis", "regions", str(run.base), *run.overrides, *more]
    title = f"regions by {run.plan.config.regions.rule}, seed {seed}"
    return plan.setdefault(file, Job(title, command, file, after))


def _work(jobs: Sequence[Job], at_once: int, logs: Path) -> Iterator[Job]:
    """Run the jobs, each when those before it are done, and yield them as they end.

    Raises:
        Preempted: on SIGTERM or SIGINT, when the running jobs, which are stopped too, have ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, ended = list(jobs), set()
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with StopRequest() as stop:
        try:
            while waiting or running:
                if stop.received:
                    raise Preempted(
                        "stopped on request; what was running is saved, re-run the same command to resume"
                    )
                for job in [job for job in waiting if all(id(before) in ended for before in job.after)]:
                    failed = any(before.failed for before in job.after)
                    if failed or job.done.exists():
                        waiting.remove(job)
                        job.failed = failed
                        ended.add(id(job))
                        yield job
                    elif len(running) < at_once:
                        waiting.remove(job)
                        with _log(job, logs).open("ab") as file:
                            # a session of its own: a terminal's Ctrl-C is for us alone, and reaches a run
                            # once, as SIGTERM; a second signal would end it unsaved
                            process = subprocess.Popen(
                                job.command,
                                env=environment,
                                stdout=file,
                                stderr=subprocess.STDOUT,
                                start_new_session=True,
                            )
                        running[process] = (job, time.monotonic())
                for process, (job, began) in list(running.items()):
                    if process.poll() is not None:
                        del running[process]
                        job.seconds = time.monotonic() - began
                        job.failed = process.returncode != 0 or not job.done.exists()
                        ended.add(id(job))
                        yield job
                time.sleep(POLL)
        finally:
            for process in running:  # asked to stop, they save and can be resumed
                process.terminate()
            for process in running:
                process.wait()


def _log(job: Job, logs: Path) -> Path:
    folder = job.done.parent
    return logs / f"{folder.name if job.done == RunFolder(folder).result else job.done.stem}.txt"


def _check_keys(values: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: a mapping of {', '.join(sorted(known))} is needed, not {values!r}")
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key}; known: {', '.join(sorted(known))}")
    for key in sorted(needed - set(values)):
        raise ValueError(f"{where}: {key} is missing")
