"""The processes of a study: trainings and searches for regions, each after those that it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clis.cli import Preempted
from clis.engine.preemption import StopRequest
from clis.engine.run_folder import RunFolder
from clis.engine.start import check_plan
from clis.study.file import Row, Study
from clis.study.runs import StudyRun

POLL = 0.5
"""Seconds between two looks at what is running."""


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


def plan_row(
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
    title = f"regions by {run.plan.config.regions.file_rule}, seed {seed}"
    return plan.setdefault(file, Job(title, command, file, after))


def work(jobs: Sequence[Job], at_once: int, logs: Path) -> Iterator[Job]:
    """Run the jobs, each when those before it are done, and yield them as they end.

    Raises:
        Preempted: on SIGTERM or SIGINT, when the running jobs, which are stopped too, have ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, ended = list(jobs), set()
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}  # what the user sets is kept
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
                        with log_of(job, logs).open("ab") as file:
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


def log_of(job: Job, logs: Path) -> Path:
    """Return the file in `logs` with what a job has said, named after its run or its regions."""
    folder = job.done.parent
    return logs / f"{folder.name if job.done == RunFolder(folder).result else job.done.stem}.txt"
