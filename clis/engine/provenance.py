"""Where a result comes from: the code, the libraries, the date and the hashes of the data."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision

import clis
from clis.config import Config, data_path
from clis.engine.run_folder import regions_file
from clis.progress import Progress

_CHUNK = 1 << 22
_SHOWN = 1 << 29
"""Bytes from which on hashing a file takes seconds and shows its progress."""


def provenance(files: Mapping[str, Path]) -> dict[str, Any]:
    """Return the version, commit (None where unknown), libraries and date, and the SHA-256 of files by name.

    A file that cannot be read has the hash None. A file is hashed once per process.
    """
    return {
        "version": clis.__version__,
        "commit": commit(),
        "torch": str(torch.__version__),  # of a class of its own, which a checkpoint must not hold
        "torchvision": torchvision.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "data": {name: {"file": str(path), "sha256": file_hash(path)} for name, path in files.items()},
    }


def changed_files(record: Mapping[str, Any] | None, files: Mapping[str, Path]) -> list[str]:
    """Name the files that are others now than in a record of `provenance`; those that it lacks pass."""
    known = (record or {}).get("data", {})
    changed = []
    for name, path in files.items():
        before, now = known.get(name, {}).get("sha256"), file_hash(path)
        if None not in (before, now) and before != now:
            changed.append(str(path))
    return changed


def training_files(config: Config) -> dict[str, Path]:
    """Return the files that determine what a run trains on, by what they are."""
    files = {"train": data_path(config, config.data.train)}
    return files | {"regions": regions_file(config)} if config.clis.s > 0 else files


def validation_files(config: Config) -> dict[str, Path]:
    """Return the files that determine what a detector is judged by, by what they are."""
    return {"val": data_path(config, config.data.val)}


@functools.cache
def commit() -> str | None:
    """Return the commit of the source tree, with ``-dirty`` after it where files differ from the commit.

    None where the package is not imported from a git checkout, or git does not answer.
    """
    tree = Path(clis.__file__).resolve().parents[1]
    if not (tree / ".git").exists():  # an installed package may lie within somebody else's checkout
        return None
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def file_hash(path: Path) -> str | None:
    """Return the SHA-256 of a file, hexadecimal, or None where it cannot be read."""
    try:
        status = path.stat()
        return _hash_of(str(path.resolve()), status.st_size, status.st_mtime_ns)
    except OSError:
        return None


@functools.lru_cache(maxsize=64)
def _hash_of(path: str, size: int, modified: int) -> str:
    """Hash a file of this size and time of modification, which tell it from what it was before."""
    digest, shown = hashlib.sha256(), contextlib.nullcontext()
    progress = Progress(f"hash {Path(path).name}, MiB", size >> 20)
    with open(path, "rb") as file, progress if size >= _SHOWN else shown:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if size >= _SHOWN:
                progress.advance(len(chunk) >> 20)
    return digest.hexdigest()
