"""Asked to stop: SIGTERM and SIGINT let the step be finished and saved; a second signal ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from clis.cli import Preempted
from clis.distributed import barrier
from clis.engine.run_folder import RunFolder

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While it is entered, the first SIGTERM or SIGINT is only noted; a second one has its usual effect."""

    def __init__(self) -> None:
        self.received = False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def stop(folder: RunFolder, step: int) -> Preempted:
    """Note in the run folder that it stops on request, with `step` saved; return the exception to raise."""
    folder.mark_preempted(step)
    barrier()
    return Preempted(f"{folder}: stopped on request; step {step} saved, re-run the same command to resume")
