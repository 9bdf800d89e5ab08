"""Who works on a run: a note of the process and the log in the run folder, and whether it still lives."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import clis
from clis.atomic import atomic_write
from clis.cli import Preempted
from clis.distributed import is_main
from clis.engine.run_folder import RunFolder
from clis.progress import logged, note

QUIET = 15 * 60.0
"""Seconds without a record or a line of the log after which a process on another machine counts as dead."""


@dataclass(frozen=True)
class Process:
    """The process that works on a run, as it is in process.json."""

    pid: int
    host: str
    machine: str
    """Changes with the boot and with the container, in both of which process numbers begin anew."""
    started: str | None
    """When the system started it, in the system's own unit: another process may get the same number."""
    since: str
    """Date and time, ISO 8601."""
    stage: str = ""
    """What it is doing, in words."""
    ended: str | None = None
    """The error that ended it; None while it runs. A process that ends well leaves no note."""

    @classmethod
    def current(cls) -> Process:
        """Describe the calling process."""
        pid, now = os.getpid(), datetime.datetime.now().astimezone()
        return cls(pid, socket.gethostname(), _machine(), _start(pid), now.isoformat("T", "seconds"))

    @classmethod
    def read(cls, folder: RunFolder) -> Process | None:
        """Read the note of a run folder; None where there is none.

        Raises:
            ValueError: the file is not one of ours.
        """
        try:
            return cls(**json.loads(folder.process.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder.process}: damaged ({error}); remove it") from None

    def write(self, folder: RunFolder) -> None:
        """Write the note on rank 0; one that cannot be written ends no run."""
        with contextlib.suppress(OSError):
            if is_main():
                with atomic_write(folder.process) as temporary:
                    temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def lives(self) -> bool | None:
        """Return whether it lives; None where that cannot be seen from this machine."""
        if self.ended is not None:
            return False
        if self.machine != _machine():
            return None
        if self.started is not None:
            return _start(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it is there, and another user's
            return True
        return True


@contextlib.contextmanager
def at_work(folder: RunFolder) -> Iterator[Callable[[str], None]]:
    """Note in an existing run folder that this process works on it, and log what is said, in the block.

    Where an error leaves the block, the note and the log have it.

    Yields:
        A function that notes what the process does now, in words.
    """
    process = Process.current()
    process.write(folder)

    def now(stage: str) -> None:
        nonlocal process
        process = replace(process, stage=stage)
        process.write(folder)

    with logged(folder.log):
        note(f"clis {clis.__version__}, process {process.pid} on {process.host}: {shlex.join(sys.argv)}")
        try:
            yield now
        except Preempted as stop:
            note(str(stop))
            _clear(folder)
            raise
        except BaseException as error:
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            note(f"ended by {text}")
            replace(process, ended=text).write(folder)
            raise
    _clear(folder)


def last_sign(folder: RunFolder) -> float | None:
    """Return how many seconds ago the run last wrote a record, a line of its log or a checkpoint, if ever."""
    times = [
        path.stat().st_mtime
        for path in (folder.metrics, folder.log, folder.last, folder.result)
        if path.exists()
    ]
    return max(0.0, time.time() - max(times)) if times else None


def _clear(folder: RunFolder) -> None:
    if is_main():
        with contextlib.suppress(OSError):  # it ends no run, as one that cannot be written
            folder.process.unlink(missing_ok=True)


def _machine() -> str:
    """Identify this machine, its boot and the space of its process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start(pid: int) -> str | None:
    """Return when a process was started, in the system's own unit; None if unknown or if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]  # man 5 proc: fields 3 and 22
    return None if state == "Z" else started
