"""``python -m clis study FILE``: rows of a table times seeds, side by side; what they share is made once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from clis.commands.arguments import positive
from clis.config_files import find_config, load_config, name_below
from clis.data.streams import generate_data
from clis.engine.run_folder import RunFolder
from clis.progress import say
from clis.study.file import Study, check_overrides, overruled
from clis.study.jobs import Job, log_of, plan_row, work
from clis.study.record import Record
from clis.text import counted

_BEFORE = "; put key=value before --rows and --seeds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis study`."""
    parser.add_argument("file", type=find_config, help="a study, e.g. studies/components")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="change a field in every row that does not set it itself",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", default=(), metavar="NAME", help="run only these rows")
    parser.add_argument(
        "--seeds", nargs="+", type=_seed, default=(), help="run only these seeds, of every row"
    )
    parser.add_argument(
        "--jobs", type=positive, default=2, help="runs at once, which share the CPUs (default 2)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/studies"), metavar="FOLDER",
        help="folder of all studies, each in a folder of its name (default runs/studies)",
    )  # fmt: skip
    parser.add_argument(
        "--draw", action="store_true", help="run nothing; write table and figure of what is recorded"
    )


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed" + _BEFORE * ("=" in text))
    return int(text)


def run(arguments: argparse.Namespace) -> None:
    """Run the rows and seeds of a study that are missing, then print its table; or only draw it again."""
    if arguments.draw:
        if arguments.rows or arguments.seeds:
            raise ValueError(
                "--draw draws all that is recorded; leave --rows and --seeds out (python -m clis plot "
                f"{arguments.out / name_below(arguments.file, 'studies')} --rows NAME ... draws some rows)"
            )
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
    files = [name for name in ("study.json", "table.md", "figure.png") if (folder / name).exists()]
    say((folder / "table.md").read_text() + f"{folder}/{', '.join(files)}")


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
        overrides: for every row, e.g. the number of steps in a trial; what a row sets itself stays.

    Returns:
        out/NAME.

    Raises:
        ValueError: unknown rows or classification losses, or an override of what the study sets itself; or a
            run failed, after the others are done.
        Preempted: asked to stop; what was running has saved its state.
    """
    check_overrides(overrides)
    study, out = Study.load(path), out.resolve()
    unknown = sorted(set(rows) - {row.name for row in study.rows})
    if unknown:
        raise ValueError(
            f"{path} has no row {', '.join(map(repr, unknown))}; it has "
            + ", ".join(repr(row.name) for row in study.rows)
            + _BEFORE * any("=" in name for name in unknown)
        )
    folder = out / study.name
    record = Record(study, folder, overrides)
    plan: dict[Path, Job] = {}
    chosen = [row for row in study.rows if not rows or row.name in rows]
    wanted = [(row, seed) for row in chosen for seed in seeds or row.seeds or study.seeds]
    for row, seed in sorted(wanted, key=lambda each: each[1]):  # a seed of all rows before the next
        if not record.has(row, seed) and not record.take(row, seed):
            plan_row(study, row, seed, out, overrides, plan)
    say(f"{study.name}: {len(study.rows)} rows; {counted(len(plan), 'job')} to do, {jobs} at once")
    for key, names in overruled(chosen, overrides).items():
        say(f"WARNING: {key} stays as it is in rows that set it themselves: {', '.join(names)}")
    if record.outdated:
        say(f"recorded of other settings, data or rows, and left out: {'; '.join(record.outdated)}")
    base = load_config(study.base, overrides)
    if plan:
        generate_data(base)  # once, before processes that would all write them
    _work_off(list(plan.values()), record, jobs, out / "logs")
    record.write()
    record.draw()
    failed = [job.title for job in plan.values() if job.failed]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(plan)} jobs failed: {', '.join(failed)}; re-run the command to retry"
        )
    return folder


def _work_off(plan: Sequence[Job], record: Record, at_once: int, logs: Path) -> None:
    """Run the jobs and record their figures; what fails is marked, and the others go on."""
    for job in work(plan, at_once, logs):
        if job.failed:
            before = [each.title for each in job.after if each.failed]
            say(
                f"NOT RUN {job.title}: {before[0]} failed"
                if before
                else f"FAILED {job.title}, see {log_of(job, logs)}"
            )
            continue
        for name, seed in job.results:
            try:
                say(f"{name}, seed {seed}: {record.add(name, seed, RunFolder(job.done.parent))}")
            except (OSError, ValueError, KeyError) as error:  # a damaged run stops no other
                job.failed = True
                say(f"FAILED {name}, seed {seed}: {job.done.parent} cannot be read: {error}")
        if job.seconds:
            say(f"{job.title}: {tqdm.format_interval(job.seconds)}")


def draw_again(path: Path, out: Path, overrides: Sequence[str] = ()) -> Path:
    """Write table and figure of what out/NAME/study.json has recorded; return the path of the last.

    Raises:
        FileNotFoundError: nothing is recorded.
        ValueError: it was recorded with other overrides, or runs of it with other settings or data.
    """
    study = Study.load(path)
    record = Record(study, out / study.name, overrides)
    if not record.path.exists():
        raise FileNotFoundError(
            f"{record.path}: no such file; --out is the folder above the study's own (default runs/studies)"
        )
    if record.outdated:
        raise ValueError(
            f"{record.path}: recorded of other settings, data or rows than the study has now: "
            f"{'; '.join(record.outdated)}; draw it with those, or run the study, which leaves them out"
        )
    record.write()
    return record.draw()
