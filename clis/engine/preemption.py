"""Asked to stop: SIGTERM and SIGINT let a step be finished and saved; a later signal ends at once."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from clis.cli import Preempted
from clis.distributed import barrier
from clis.engine.run_folder import RunFolder

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 2.0
"""Seconds within which another signal is the same request: batch systems ask every process, and torchrun asks
its own once more."""


class StopRequest:
    """While it is entered, the first SIGTERM or SIGINT is only noted; a later one has its usual effect."""

    def __init__(self) -> None:
        self.received = False
        self.since = 0.0
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let SIGTERM have its usual effect in the block: for long work with nothing to save."""
        number = signal.SIGTERM
        if number in self.previous:
            signal.signal(number, self.previous[number])
        try:
            yield
        finally:
            if number in self.previous:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self.since = True, time.monotonic()
        elif time.monotonic() - self.since > ECHO:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Let SIGTERM end the block with `Preempted` wherever no `StopRequest` is entered.

    For work that has nothing to save, or saves as it goes.
    """
    until = -math.inf

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal until
        if time.monotonic() > until:
            until = time.monotonic() + ECHO
            raise Preempted("stopped on request; re-run the same command to resume")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def stop(folder: RunFolder, step: int) -> Preempted:
    """Return the exception for the end of a run on request, with `step` saved, on all processes."""
    barrier()
    saved = f"step {step} is saved" if folder.has_begun else "no step was completed"
    return Preempted(f"{folder}: stopped on request; {saved}, re-run the same command to resume")
