"""Asked to stop: SIGTERM and SIGINT let the step be finished and saved; a second signal ends at once."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from types import FrameType

from clis.atomic import atomic_write
from clis.distributed import is_main

MARKER = "preempted.json"
"""In the run folder of such a run, with its step, until it goes on: torchrun hides exit codes."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While it is entered, the first SIGTERM or SIGINT is only noted; a second one has its usual effect."""

    def __init__(self) -> None:
        self.received = False
        self.previous: dict[signal.Signals, object] = {}

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


def write_preempted_marker(folder: Path, step: int) -> None:
    """Leaves `MARKER` in the run folder, from rank 0."""
    if is_main():
        with atomic_write(folder / MARKER) as temporary:
            temporary.write_text(json.dumps({"step": step}) + "\n")


def clear_preempted_marker(folder: Path) -> None:
    if is_main():
        (folder / MARKER).unlink(missing_ok=True)
