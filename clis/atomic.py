"""Files that a crash must not leave half-written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_PARTIAL = re.compile(r"\.(?P<stem>.+)\.\d+\.tmp(?P<suffix>(\.[^.]+)?)")
"""The temporary names of `atomic_write`."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which it replaces when the block ends without an error.

    Makes the folder. The temporary name keeps the suffix, for writers that would otherwise add their own.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with naming_file(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Put this file's name into errors of the system that name none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def link(path: Path, name: Path) -> None:
    """Give a file another name, in place of whatever has it."""
    with atomic_write(name) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


@contextlib.contextmanager
def exclusive(lock: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Let one process at a time into the block, by a lock file that is there as long as it is held.

    Where the file system has no locks, nobody waits.

    Args:
        on_wait: called once if another process is in it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                on_wait()
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
        if not is_stale(descriptor, lock):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def is_stale(descriptor: int, lock: Path) -> bool:
    """Return whether a lock file has been removed since it was opened, by the process that held it."""
    try:
        return not os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return True


def check_writable(path: str | Path) -> None:
    """Raise an error now if `atomic_write` could not write this file after the work for it; make no folder.

    Raises:
        IsADirectoryError: it is a folder.
        OSError: the folder cannot be made or written in.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file")
    trial = nearest_existing(path.parent) / f".{path.stem}.{os.getpid()}.tmp{path.suffix}"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); name another place") from error


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or the nearest above it that exists."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())


def remove_partial_files(folder: Path, is_own: Callable[[str], bool]) -> None:
    """Remove the temporary files that killed processes left in a folder, not below it.

    Args:
        is_own: whether a file of this name, once it is whole, would be the caller's; others are left alone.
    """
    for path in folder.glob(".*"):
        partial = _PARTIAL.fullmatch(path.name)
        if partial is not None and is_own(partial["stem"] + partial["suffix"]) and path.is_file():
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the new name itself to the disk, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
