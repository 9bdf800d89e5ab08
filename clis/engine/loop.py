"""What every training does around its steps: batches, times, checkpoints, requests to stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import torch

from clis.cli import Preempted
from clis.config import Config
from clis.data.batch import OnDevice, count_batches
from clis.distributed import all_reduce_sum, barrier, is_main
from clis.engine.bad_images import BadImages
from clis.engine.checkpoint import saved_checkpoints
from clis.engine.preemption import StopRequest, write_preempted_marker
from clis.engine.schedule import Schedule
from clis.progress import Progress, say

B = TypeVar("B", bound=OnDevice)


class Loop(Generic[B]):
    """Gives each step with its micro-batches; `end_step` saves where it is due, and stops if asked to.

    What the processes have to agree on for that (images that cannot be read, a request to stop, the clock)
    and what they count of their batches travels in one message a step. A context manager.
    """

    def __init__(
        self,
        label: str,
        config: Config,
        schedule: Schedule,
        steps: range,
        loader: Iterable[B],
        accumulation: int,
        device: torch.device,
        save: Callable[[int], None],
        kind: type[B],
    ) -> None:
        """
        Args:
            label: what the progress is called.
            steps: those that are left.
            loader: their micro-batches on this process, in order.
            accumulation: micro-batches a step.
            save: writes the checkpoint of a step; called on all processes.
            kind: class of the micro-batches.
        """
        self.schedule, self.steps, self.save, self.kind = schedule, steps, save, kind
        self.accumulation, self.device = accumulation, device
        self.bad_images = BadImages(config.data.max_bad_images)
        self.batches = _iterated(loader)
        self.stop = StopRequest()
        self.progress = Progress(label, steps.stop, steps.start)
        self.exits = contextlib.ExitStack()
        self.saving = self.stopping = False
        self.counts: list[int] = []
        """Of the step's global batch, as `OnDevice.counts`."""
        self.began = self.loaded = 0.0
        self.times: list[tuple[float, float]] = []  # waiting for data and computing, since the last record

    def __enter__(self) -> Loop[B]:
        self.exits.enter_context(contextlib.closing(self.batches))  # ends the loader processes in any case
        self.exits.enter_context(self.stop)
        self.exits.enter_context(self.progress)
        return self

    def __exit__(self, *error: object) -> None:
        self.exits.__exit__(*error)

    def __iter__(self) -> Iterator[tuple[int, list[B]]]:
        """Steps with their micro-batches on the device.

        Raises:
            ImageError: too many images cannot be read; the step before is saved.
        """
        for step in self.steps:
            self.began, bad = time.monotonic(), self.bad_images
            batches = bad.load(self.batches, self.accumulation, self.device)
            minutes_over = is_main() and self.schedule.minutes_are_over()
            wishes = [len(bad.new), bad.gone is not None, self.stop.received, minutes_over]
            counts = count_batches(batches, self.kind)
            message = all_reduce_sum(torch.tensor([*wishes, *counts])).tolist()
            new, gone, self.stopping, self.saving, *self.counts = message
            if (reason := bad.verdict(new, gone, step)) is not None:
                if step > self.steps.start:
                    say(f"{reason}; saving step {step}")  # said first: the disk may be the same
                    self.save(step)
                raise reason from bad.gone
            self.loaded = time.monotonic()
            yield step, batches

    def computed(self) -> None:
        """The step is computed: what follows is none of its time."""
        self.times.append((self.loaded - self.began, time.monotonic() - self.loaded))

    def seconds(self) -> list[float]:
        """Waiting for data and computing, in seconds a step, on average since the last call."""
        means = [sum(column) / len(self.times) for column in zip(*self.times)]
        self.times.clear()
        return means

    def end_step(self, done: int, text: str = "") -> None:
        """Behind step `done`, counted from 1; `text`, if any, says how the training stands.

        Raises:
            Preempted: the run was asked to stop; the step is saved.
        """
        self.progress.advance(text=text)
        if self.schedule.checkpoint_due(done) or self.saving or self.stopping:
            self.save(done)
        if self.stopping and done < self.steps.stop:
            folder = self.schedule.folder
            write_preempted_marker(folder, done)
            barrier()
            raise Preempted(f"{folder}: asked to stop; step {done} is saved, the same command goes on")


class SkippedSteps:
    """Steps that changed nothing, since loss or gradient was not finite; says when a run may not go on."""

    def __init__(
        self, total: int, scaler: torch.amp.GradScaler, folder: Path, config: Config, advice: str
    ) -> None:
        """
        Args:
            total: those of the run so far.
            advice: settings that may help.
        """
        self.total, self.in_a_row = total, 0
        self.scaler, self.folder, self.train, self.advice = scaler, folder, config.train, advice

    def check(self, norm: float, what: Callable[[], str]) -> None:
        """Takes note of a step.

        float16 scaling expects some that are not finite, lowers its scale and does not count them. A loss
        that stays so shows in their number in a row, or in a scale below 1.

        Args:
            norm: of the step's gradient, the same on all processes.
            what: says which step was not finite, and what of it.

        Raises:
            FloatingPointError: the step may not be left out.
        """
        self.in_a_row = 0 if math.isfinite(norm) else self.in_a_row + 1
        if self.in_a_row == 0:
            return
        if self.scaler.is_enabled():
            scale = self.scaler.get_scale()
            if self.in_a_row <= self.train.max_skipped and scale >= 1:
                return
            raise self._error(f"{what()}; {self.in_a_row} such steps in a row, loss scale {scale:g}")
        self.total += 1
        if self.train.on_nonfinite == "stop" or self.total > self.train.max_skipped:
            raise self._error(what(), ", or train.on_nonfinite=skip")
        print(f"{what()}; left out, {self.total} of at most {self.train.max_skipped}", flush=True)

    def _error(self, what: str, more: str = "") -> FloatingPointError:
        saved = saved_checkpoints(self.folder / "checkpoints")
        last = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
        return FloatingPointError(f"{what}; {last}; {self.advice}{more}")


def _iterated(loader: Iterable[B]) -> Generator[B, None, None]:
    yield from loader
