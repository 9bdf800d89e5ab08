"""Who works on a run: one process at a time, its note and log in the run folder, and whether it lives."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
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
from clis.atomic import atomic_write, is_stale
from clis.cli import Preempted
from clis.distributed import is_main, on_main
from clis.engine.run_folder import RunFolder
from clis.progress import logged, note

QUIET = 15 * 60.0
"""Seconds without a record or a line of the log after which a process on another machine counts as dead."""

DYING = 3.0
"""Seconds that a process which was asked to end has to leave the folder."""


@dataclass(frozen=True)
class Process:
    """The process that works on a run, as it is in process.json."""

    pid: int
    host: str
    machine: str
    """Changes with the boot and with the container, both of which number their processes from scratch."""
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
def only_process(folder: RunFolder) -> Iterator[None]:
    """Keep other processes from working on a run folder in the block; all ranks of a run enter it together.

    The lock is one of POSIX: the system drops it when rank 0 dies, however it dies, and loader processes do
    not inherit it. Where a file system has no locks, the note of a process that lives serves as one.

    Raises:
        ValueError: another process works on it.
        OSError: the folder cannot be made or written to.
    """
    with _locked(folder.lock, folder, "pass output=ANOTHER_FOLDER"):
        yield


@contextlib.contextmanager
def only_maker(path: Path) -> Iterator[None]:
    """Keep other processes from making a file, such as a region file, in the block; as `only_process`."""
    with _locked(path.with_suffix(".lock"), RunFolder(path.parent), f"name another file than {path}"):
        yield


@contextlib.contextmanager
def _locked(lock: Path, folder: RunFolder, instead: str) -> Iterator[None]:
    descriptor = on_main(lambda: _lock(lock, folder, instead))
    try:
        yield
    finally:
        if is_main():
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
            os.close(descriptor)
            with contextlib.suppress(OSError):  # of a start that failed: nothing was written
                lock.parent.rmdir()


def _lock(lock: Path, folder: RunFolder, instead: str) -> int:
    """Return the descriptor of the locked file; closing it releases the lock."""
    until = time.monotonic() + DYING
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and time.monotonic() < until:
                time.sleep(0.1)  # another process has just removed the empty folder
                continue
            if folder.path.is_file():
                raise OSError(f"{folder}: is a file; name a folder") from error
            raise OSError(
                f"{folder}: cannot be written ({error.strerror}); allow writing there, or {instead}"
            ) from error
        locked = _try_lock(descriptor, folder)
        if locked and not is_stale(descriptor, lock):
            return descriptor
        os.close(descriptor)
        if not locked and time.monotonic() > until:
            raise ValueError(f"{folder}: {_worker(folder)}; wait until it ends, or {instead}")
        time.sleep(0.1)


def _try_lock(descriptor: int, folder: RunFolder) -> bool:
    """Try to lock the file; where the file system has no locks, go by the note in the folder."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        process = _noted(folder)
        return process is None or process.pid == os.getpid() or not process.lives()


def _noted(folder: RunFolder) -> Process | None:
    with contextlib.suppress(ValueError, OSError):
        return Process.read(folder)
    return None


def _worker(folder: RunFolder) -> str:
    """Say which process works on the folder."""
    process = _noted(folder)
    if process is None:
        return "another process is working on it"
    return f"process {process.pid} on {process.host} has been working on it since {process.since}"


@contextlib.contextmanager
def at_work(folder: RunFolder) -> Iterator[Callable[[str], None]]:
    """Note in an existing run folder that this process works on it, and log what is said, in the block.

    Where an error leaves the block, the note and the log have it. A stop on request marks the folder, since
    torchrun hides exit codes.

    Yields:
        A function that notes what the process does now, in words.
    """
    process = Process.current()
    process.write(folder)
    folder.clear_preempted()

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
            with contextlib.suppress(OSError):
                folder.mark_preempted()
            _clear(folder)
            raise
        except BaseException as error:
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            text = "an interruption (Ctrl-C)" if isinstance(error, KeyboardInterrupt) else text
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
