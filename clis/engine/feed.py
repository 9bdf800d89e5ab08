"""The batches of each step, and what the processes have to agree on before it, in one message."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from clis.data.batch import OnDevice, count_batches
from clis.distributed import all_reduce_sum
from clis.engine.bad_images import BadImages

B = TypeVar("B", bound=OnDevice)


@dataclass(frozen=True)
class StepInput(Generic[B]):
    """One step's input."""

    batches: list[B]
    """The micro-batches of this process, on the device."""
    counts: list[int]
    """Of the global batch, as `OnDevice.counts`."""
    stop: bool
    """Some process was asked to stop."""
    save: bool
    """Some process wants a checkpoint by its clock."""
    error: Exception | None
    """Why the step cannot be made: too many images cannot be read, here or on another process."""
    seconds: float
    """Waiting for the data."""


class Feed(Generic[B]):
    """Gives the input of one step after the other. A context manager, which ends the loader processes."""

    def __init__(
        self,
        loader: Iterable[B],
        kind: type[B],
        micro_batches: int,
        device: torch.device,
        max_bad_images: int,
    ) -> None:
        """Wrap the loader; its processes start with the first `take`.

        Args:
            loader: the micro-batches of this process, in order.
            kind: their class.
            micro_batches: number per step.
            max_bad_images: `data.max_bad_images`.
        """
        self.batches, self.kind = _iterated(loader), kind
        self.micro_batches, self.device = micro_batches, device
        self.bad_images = BadImages(max_bad_images)

    def __enter__(self) -> Feed[B]:
        return self

    def __exit__(self, *_: object) -> None:
        self.batches.close()

    def take(self, stop: bool, save: bool) -> StepInput[B]:
        """Load the next step's batches and exchange requests and counts; to be called on all processes.

        Args:
            stop: this process was asked to stop.
            save: this process wants a checkpoint by its clock.
        """
        began, bad = time.monotonic(), self.bad_images
        batches = bad.load(self.batches, self.micro_batches, self.device)
        counts = count_batches(batches, self.kind)
        is_bad = bool(bad.new) or bad.gone is not None
        message = torch.tensor([is_bad, stop, save, *counts], dtype=torch.int64)
        bad_images, stopping, saving, *counts = all_reduce_sum(message).tolist()
        error = bad.verdict() if bad_images else None
        return StepInput(batches, counts, stopping > 0, saving > 0, error, time.monotonic() - began)


def _iterated(loader: Iterable[B]) -> Generator[B, None, None]:
    """Iterate over a loader by a generator, which can be closed."""
    yield from loader
