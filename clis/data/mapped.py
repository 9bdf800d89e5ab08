"""Arrays that are the pages of their file, for all processes together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


def map_array(path: str | Path) -> np.ndarray:
    """The array of an .npy file, read-only, its pages shared by all processes that map it."""
    return np.asarray(np.load(path, mmap_mode="r"))  # plain: memmap's subclass slows every slice


@dataclass(frozen=True)
class MappedFile:
    """Stands for a mapped array on its way to another process, which maps it as well: no copy is sent."""

    path: str

    @classmethod
    def replace(cls, array: np.ndarray) -> np.ndarray | MappedFile:
        """The array's file, if it is all of what `map_array` gave, else the array."""
        return cls(str(array.base.filename)) if isinstance(array.base, np.memmap) else array
