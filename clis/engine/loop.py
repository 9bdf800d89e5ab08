"""The loop that all trainings share: resume, feed, log, save, stop. What a step does is its caller's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Generic, TypeVar

import torch

from clis.config import Config
from clis.data.batch import OnDevice
from clis.distributed import from_all, is_main, on_main, wrap_ddp
from clis.engine.checkpoint import resume, save_checkpoint
from clis.engine.describe import step_metrics
from clis.engine.feed import Feed, StepInput
from clis.engine.log import MetricsLog
from clis.engine.memory import memory_advice, reset_peak_memory
from clis.engine.optim import make_optimizer, make_scaler
from clis.engine.preemption import StopRequest, stop
from clis.engine.provenance import provenance, training_files
from clis.engine.run_folder import RunFolder
from clis.engine.schedule import SaveClock, due_after
from clis.engine.skipped import NotFinite, SkippedSteps
from clis.models import CLISDetector, ImageClassifier
from clis.progress import Progress, say

M = TypeVar("M", CLISDetector, ImageClassifier)
B = TypeVar("B", bound=OnDevice)


class Training(Generic[M]):
    """A training in its run folder, from where it was left: model, optimizer, and what a step needs."""

    def __init__(
        self,
        model: M,
        config: Config,
        folder: RunFolder,
        device: torch.device,
        advice: str,
        within: Collection[str] | None = None,
    ) -> None:
        """Make the optimizer, and load the last checkpoint if there is one.

        Args:
            advice: what to try where a loss or gradient is not finite.
            within: see `resume`.
        """
        self.model: M = model
        self.config, self.folder, self.device = config, folder, device
        self.optimizer, self.scaler = make_optimizer(model, config), make_scaler(config, device)
        first, skipped = resume(folder, model, self.optimizer, self.scaler, config, within)
        self.remaining = range(first, config.train.steps)
        """The steps to make, from 0 on."""
        self.skipped = SkippedSteps(skipped, self.scaler, folder, config.train, advice)
        self.network = wrap_ddp(model, device).train()
        """The model, or DDP around it."""
        self.log = MetricsLog(folder.metrics, first)
        self.record = provenance(training_files(config)) if is_main() else None
        """Where the training comes from; of rank 0. Made once: files may change while it runs."""
        self.clock = SaveClock(config.train.save_minutes)
        self.seconds: list[tuple[float, float]] = []
        """Of each step since the last record, waiting for data and computing."""
        self._began = 0.0

    @contextlib.contextmanager
    def run(
        self,
        loader: Iterable[B],
        kind: type[B],
        micro_batches: int,
        title: str,
        *,
        where: Callable[[int], str],
        less_memory: str,
        evaluate: Callable[[int], None] | None = None,
    ) -> Iterator[Iterator[tuple[int, StepInput[B]]]]:
        """Enter the training; the block takes the steps and their input, and calls `made` for each.

        After a step that the block has made, whatever is due follows: a checkpoint, an evaluation. On request
        all processes save and stop before the same step, or after the last.

        Args:
            loader, kind, micro_batches: see `Feed`.
            title: of the progress.
            where: says which step was being made, by the number of those before it.
            less_memory: settings by which a step needs less memory.
            evaluate: evaluates the model after a step, on the way.
        """
        reset_peak_memory(self.device)
        allowed = self.config.data.max_bad_images
        with (
            Feed(loader, kind, micro_batches, self.device, allowed) as feed,
            StopRequest() as request,
            Progress(title, self.remaining.stop, self.remaining.start) as self.progress,
            memory_advice(lambda: where(self.progress.done), less_memory),
        ):
            yield self._steps(feed, request, evaluate)

    def _steps(
        self, feed: Feed[B], request: StopRequest, evaluate: Callable[[int], None] | None
    ) -> Iterator[tuple[int, StepInput[B]]]:
        first, train = self.remaining.start, self.config.train
        if (
            evaluate is not None
            and due_after(first, train).evaluation
            and on_main(lambda: not self.log.has_evaluation(first))
        ):
            self._evaluate(first, request, evaluate)  # the run was stopped after this step's checkpoint
        for step in self.remaining:
            given = feed.take(request.received, self.clock.is_over())
            if given.error is not None:
                if step > first:
                    say(f"{given.error}; saving step {step}")  # said first: the disk may be the same
                    self.save(step)
                raise given.error
            if given.stop:
                if step > first:
                    self.save(step)
                raise stop(self.folder, step)
            self._began = time.monotonic()
            yield step, given
            done, due = step + 1, due_after(step + 1, train)
            if due.checkpoint or given.save:
                self.save(done)
            if due.evaluation and evaluate is not None:
                self._evaluate(done, request, evaluate)
        self._stop_if_asked(train.steps, request)

    def _evaluate(self, step: int, request: StopRequest, evaluate: Callable[[int], None]) -> None:
        """Evaluate after a step, which is saved: a stop need not wait for the evaluation."""
        self._stop_if_asked(step, request)
        with request.suspended():
            evaluate(step)

    def _stop_if_asked(self, step: int, request: StopRequest) -> None:
        """Stop after a step, which is saved, if any process was asked to."""
        if any(from_all(request.received)):
            raise stop(self.folder, step)

    def made(self, given: StepInput[B], norm: float, what: Callable[[], NotFinite]) -> None:
        """Note that a step was made, by the norm of its gradient; arguments and errors as `SkippedSteps`.

        Where it ends the run, the steps before it are saved: it has changed nothing but float16's scale.
        """
        self.seconds.append((given.seconds, time.monotonic() - self._began))
        done = self.progress.done

        def save() -> None:
            if done > self.remaining.start and not self.scaler.is_enabled():
                self.save(done)

        self.skipped.check(done, norm, what, save)

    def write(self, done: int, record: dict[str, float], norm: float, rate: float) -> None:
        """Write a record after `done` steps, with what every training logs: norm, rate, times, memory."""
        images = self.config.train.images_per_step
        times = step_metrics(self.device, norm, rate, self.seconds, images)
        self.seconds.clear()
        self.log.write({"step": done, **record, **times})

    def save(self, step: int) -> None:
        """Write the checkpoint of a step, on rank 0."""
        parts = self.model, self.optimizer, self.scaler, self.config
        on_main(lambda: save_checkpoint(self.folder, step, *parts, self.skipped.total, self.record))
        self.clock.restart()
