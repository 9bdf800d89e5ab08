"""``python -m clis status RUN_FOLDER...``: how far runs are, and whether somebody works on them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from clis.engine.at_work import QUIET, Process, last_sign
from clis.engine.describe import format_losses, format_metrics
from clis.engine.run_folder import RunFolder
from clis.engine.run_state import RunState
from clis.progress import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis status`: run folders."""
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[Path("runs")], metavar="RUN_FOLDER",
        help="run folders, or folders of some (default: runs)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Print of each run its process, step, speed, time left, last losses and last AP.

    Raises:
        FileNotFoundError, ValueError: a folder cannot be read; the others are printed first.
    """
    errors = []
    for folder in (run for path in arguments.folders for run in _runs_in(path)):
        try:
            text = describe(RunState.read(folder))
        except (OSError, ValueError) as error:
            errors.append(error)
        else:
            say(text)  # not above: a closed pipe is no error of a run
    if errors:
        raise errors[0] if len(errors) == 1 else ValueError("\n".join(map(str, errors)))


def _runs_in(path: Path) -> list[RunFolder]:
    """Return a run folder itself, and of another folder the run folders below it, if there are any."""
    below = [] if RunFolder(path).config.exists() else list(_runs_below(path))
    return below or [RunFolder(path)]


def _runs_below(path: Path) -> Iterator[RunFolder]:
    """List the run folders below a folder, also in linked folders, each once."""
    seen = {os.path.realpath(path)}
    for place, folders, files in os.walk(path, followlinks=True):
        if "config.yaml" in files:
            run = RunFolder(place)
            yield run
            needed = (run.detector.path, run.start.path)
            folders[:] = [name for name in folders if Path(place, name) in needed]
        inside = {os.path.realpath(os.path.join(place, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for real, name in inside.items() if real not in seen)
        seen.update(inside)


def describe(state: RunState) -> str:
    """Return what there is to say of a run, one line of what it is doing and lines of figures below it."""
    lines = [f"{state.folder}: {activity(state)}"]
    if state.result is None and state.records:
        lines.append(_progress(state))
        lines.append(f"losses at step {state.step}: {format_losses(_finite(state.records[-1]))}")
    if state.metrics is not None:
        step, metrics = state.metrics
        best = max(state.evaluations, key=lambda each: each[1]["AP"], default=(step, metrics))
        better = f"; the best so far is AP {100 * best[1]['AP']:.1f} after step {best[0]}" * (best[0] != step)
        lines.append(f"after step {step}: {format_metrics(metrics)}{better if state.result is None else ''}")
    elif state.result is None:
        every = state.config.train.eval_every
        lines.append(
            f"no evaluation yet; the first one is after step {every}"
            if every is not None and every < state.steps
            else "no evaluation before the end (train.eval_every)"
        )
    return "\n  ".join(lines)


def activity(state: RunState) -> str:
    """Return whether a process works on the run, at what, and how that is known."""
    process, age = Process.read(state.folder), last_sign(state.folder)
    sign = "no sign of life yet" if age is None else f"last sign of life {tqdm.format_interval(age)} ago"
    if state.result is not None:
        return "finished"
    if process is None:
        if state.preempted_step is not None:
            saved = f", step {state.preempted_step} saved" if state.preempted_step else ""
            return f"stopped on request{saved}; re-run the same command to resume"
        if age is not None and age < QUIET:
            return f"perhaps running: {sign}, no note of a process"
        return f"not running; {sign}"
    where = f"process {process.pid} on {process.host}"
    if process.ended is not None:
        stage, log = f", {process.stage}" if process.stage else "", state.folder.log.name
        return f"ended by {process.ended} ({where}{stage}); {log} has what came before; re-run to resume"
    lives = process.lives()
    if lives:
        return f"running ({where}), {process.stage}"
    if lives is False:
        return f"dead: {where} is gone without a word (killed?); {sign}; re-run the same command to resume"
    verdict = "running" if age is not None and age < QUIET else "probably dead"
    return f"{verdict} ({where}, not seen from here): {sign}; {process.stage}"


def _progress(state: RunState) -> str:
    """Return step, share, speed and time left."""
    text = f"step {state.step} of {state.steps} ({state.step / state.steps:.0%})"
    seconds = state.step_seconds
    if seconds is None:
        return text
    left = tqdm.format_interval(seconds * (state.steps - state.step))
    images = state.config.train.images_per_step / seconds
    return f"{text}, {images:.1f} images/s, {seconds:.2f} s a step, {left} of training left"


def _finite(record: dict[str, float | None]) -> dict[str, float]:
    return {name: float("nan") if value is None else value for name, value in record.items()}
