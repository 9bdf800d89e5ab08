"""Contents of annotation files, cached as .npy files that every process maps into its memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clis.data.mapped import map_array
from clis.data.records import Packed

FORMAT = 5
"""Version of the cache folders; those of another version are stale. Raise it when their content changes."""

_INDEX = "index.json"
_BLOCK = 1 << 20
_ABANDONED = 3600.0
"""Seconds after which a temporary folder counts as abandoned."""
_UNUSED = 30 * 86400.0
"""Seconds without use after which the cache of an earlier file of the name is removed."""


def cached(source: str | Path, form: str, build: Callable[[], Packed]) -> Packed:
    """Return what `build` makes of the file `source`, from the cache if that was made from the same file.

    The arrays are memory-mapped and read-only. The same file is one with the same inode, size and times. What
    is made of another file of this name has a folder of its own, since other machines may map it: their disks
    may have different files there, and the cache be in a home folder that they share. A damaged cache is made
    again, with a warning; one that cannot be written is skipped, also with a warning.

    Args:
        form: a name for what `build` makes, which names its folder; one file may be cached in several forms.
    """
    source = Path(source).resolve()
    stamp = _stamp(source)
    folder = cache_folder(source) / f"{form}-{_text_checksum(stamp):08x}"
    packed = _open(folder, stamp)
    if packed is not None:
        return packed
    packed = build()
    try:
        _write(folder, stamp, packed)
    except OSError as error:
        warnings.warn(  # the same text for all forms, so that it is shown once
            f"{_root()}: the annotation cache cannot be written ({error.strerror}); {source} is read again "
            "at every start and each process holds a copy of its own; set CLIS_CACHE to a folder that can be "
            "written",
            stacklevel=1,
        )
        return packed
    return _open(folder, stamp) or packed  # another process may be replacing it at this moment


def cache_folder(source: str | Path) -> Path:
    """Return the folder of this annotation file's cache, whether or not it exists."""
    source = Path(source).resolve()
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    return _root() / f"{source.stem}-{digest}"


def _root() -> Path:
    if os.environ.get("CLIS_CACHE"):
        return Path(os.environ["CLIS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "clis")


def _stamp(source: Path) -> dict[str, Any]:
    status = source.stat()
    kept = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
    return {"format": FORMAT, "path": str(source), **{name: getattr(status, name) for name in kept}}


def _open(folder: Path, stamp: dict[str, Any]) -> Packed | None:
    """Open the cache if there is one, complete and with this stamp."""
    if not folder.is_dir():
        return None
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if index["checksum"] != _text_checksum(index["content"]):
            raise ValueError(f"checksum of {_INDEX}")
        content = index["content"]
        if content["stamp"] != stamp:
            return None
        arrays = {}
        for name, checksum in content["arrays"].items():
            path = folder / f"{name}.npy"
            if checksum != _file_checksum(path):
                raise ValueError(f"checksum of {path.name}")
            arrays[name] = map_array(path)
        with contextlib.suppress(OSError):  # it may be somebody else's
            os.utime(folder / _INDEX)  # which says that it is in use
        return arrays, content["values"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{folder}: the annotation cache is damaged ({error}); made again", stacklevel=3)
        return None


def _write(folder: Path, stamp: dict[str, Any], packed: Packed) -> None:
    """Put a complete folder in place of any old one; checksums reveal what a crash of the machine damages."""
    arrays, values = packed
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    old = temporary.with_suffix(".old")
    try:
        temporary.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        checksums = {name: _file_checksum(temporary / f"{name}.npy") for name in arrays}
        content = {"stamp": stamp, "arrays": checksums, "values": values}
        text = json.dumps({"checksum": _text_checksum(content), "content": content})
        (temporary / _INDEX).write_text(text, encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its cache is as good
                raise
    finally:
        for left in (temporary, old, *_left_behind(folder.parent)):
            shutil.rmtree(left, ignore_errors=True)


def _left_behind(folder: Path) -> list[Path]:
    """Return what killed processes have left of a file's caches, and those that are no longer used."""
    written = [path for end in ("tmp", "old") for path in folder.glob(f".*.{end}")]
    dated = [(path, path, _ABANDONED) for path in written]
    dated += [(path, path / _INDEX, _UNUSED) for path in folder.glob("[!.]*")]
    left = []
    for path, touched, after in dated:
        with contextlib.suppress(OSError):  # another process has just removed it
            if time.time() - touched.stat().st_mtime > after:
                left.append(path)
    return left


def _file_checksum(path: Path) -> int:
    """Compute the CRC-32. Reads, does not map: mapped pages would count as the process's memory."""
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _text_checksum(content: object) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
