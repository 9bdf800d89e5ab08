"""Regions that are found but not complete yet: a file from each process, so that no two write to one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clis.atomic import naming_file
from clis.data.image_level import ImageLevelIndex
from clis.data.region_file import REGION_DTYPE, RegionSource

PART_DTYPE = np.dtype([("row", np.int64), ("region", REGION_DTYPE)])
"""A row of the index with its region, in the file of a process."""


class RegionParts:
    """A folder of files of `PART_DTYPE` records beside a region file, one from each process.

    A record is appended whole or, where a process dies, cut off at the end; that end is dropped. The folder's
    name has the hash of what the regions are made of, so that those of another recipe are never resumed.
    """

    def __init__(self, path: Path, length: int, recipe: Mapping[str, Any]) -> None:
        """Derive the folder's name from the recipe; nothing is written before `open`.

        Args:
            path: of the region file.
            length: images of the index.
            recipe: all that a region depends on.
        """
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        self.path, self.length = path, length
        self.folder = path.with_name(f"{path.stem}.partial-{digest}")

    def open(self, processes: int) -> None:
        """Make the folder with a file for each process, and remove those of other recipes."""
        remove_parts(self.path, keep=self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for process in range(processes):  # by one machine: a name that another makes may show late over NFS
            self._file(process).touch()

    @contextlib.contextmanager
    def writer(self, process: int) -> Iterator[Callable[[Sequence[int], np.ndarray], None]]:
        """Yield a function that appends rows of the index with their regions to this process's file."""
        with self._file(process).open("ab") as file:
            file.truncate(file.tell() // PART_DTYPE.itemsize * PART_DTYPE.itemsize)

            def write(rows: Sequence[int], regions: np.ndarray) -> None:
                records = np.empty(len(rows), dtype=PART_DTYPE)
                records["row"], records["region"] = rows, regions
                with naming_file(self._file(process)):
                    file.write(records.tobytes())
                    file.flush()

            yield write
            os.fsync(file.fileno())

    def read(self) -> np.ndarray:
        """Read all rows of the index, `REGION_DTYPE` [n]; what no part has, or has damaged, is pending.

        An image that one part could read and another could not, on another day, is readable.
        """
        table = np.zeros(self.length, dtype=REGION_DTYPE)
        for path in sorted(self.folder.glob("process_*.bin")):
            records = np.fromfile(path, dtype=PART_DTYPE)
            row, region = records["row"], records["region"]
            sound = (row >= 0) & (row < self.length) & np.isfinite(region["box"]).all(axis=1)
            sound &= (region["source"] > RegionSource.PENDING) & (region["source"] <= max(RegionSource))
            row, region = row[sound], region[sound]
            readable = region["source"] != RegionSource.UNREADABLE
            new = readable | (table["source"][row] == RegionSource.PENDING)
            table[row[new]] = region[new]
        return table

    def check_complete(self, table: np.ndarray, index: ImageLevelIndex) -> None:
        """Raise `ValueError` if a row is missing."""
        pending = np.flatnonzero(table["source"] == RegionSource.PENDING)
        if len(pending):
            raise ValueError(
                f"{self.folder}: {len(pending)} of {len(table)} regions are missing or damaged, the first of "
                f"{index.name(int(pending[0]))}; re-run the same command to make them"
            )

    def _file(self, process: int) -> Path:
        return self.folder / f"process_{process:05d}.bin"


def remove_parts(path: Path, keep: Path | None = None) -> None:
    """Remove the parts of every recipe beside the region file `path`, but for the folder `keep`.

    Nothing else is removed, whatever is called alike or has been put into these folders.
    """
    for folder in path.parent.glob(f"{path.stem}.partial-*"):
        if folder == keep or re.fullmatch(r"[0-9a-f]{12}", folder.name.rpartition("-")[2]) is None:
            continue
        for part in folder.glob("process_*.bin"):
            part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds somebody else's file
            folder.rmdir()
