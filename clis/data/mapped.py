"""Arrays mapped from their files, whose pages all processes share."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np


def map_array(path: str | Path) -> np.ndarray:
    """Map the array of an .npy file, read-only; all processes that map it share its pages."""
    return np.asarray(np.load(path, mmap_mode="r"))  # plain: memmap's subclass slows every slice


@dataclass(frozen=True)
class MappedFile:
    """Stand-in for a mapped array on its way to another process, which maps it as well: no copy is sent."""

    path: str
    checksum: int
    """CRC-32 of some of the array's bytes: the file may have been replaced since it was mapped."""

    @classmethod
    def replace(cls, array: np.ndarray) -> np.ndarray | MappedFile:
        """Return the array's file if the array is all of what `map_array` returned, else the array."""
        if not isinstance(array.base, np.memmap):
            return array
        return cls(str(array.base.filename), _some_checksum(array))

    def open(self) -> np.ndarray:
        """Map the array.

        Raises:
            ValueError: the file no longer exists, or is a different one.
        """
        try:
            array = map_array(self.path)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{self.path}: gone or damaged ({error}); start again") from error
        if _some_checksum(array) != self.checksum:
            raise ValueError(f"{self.path}: has changed since it was opened; start again")
        return array


def _some_checksum(array: np.ndarray) -> int:
    rows = np.linspace(0, max(len(array) - 1, 0), min(len(array), 1000)).astype(np.int64)
    return zlib.crc32(repr((array.shape, array.dtype)).encode() + array[rows].tobytes())
