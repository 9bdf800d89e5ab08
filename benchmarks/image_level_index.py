"""A prepared image-level index, simulated at any size: bytes on disk, time to open, memory, look-ups.

    python benchmarks/image_level_index.py [--images 1240000 ...] [--repeats 5] [--out FOLDER]
    python benchmarks/image_level_index.py --growth [--huge]      # 10^5, 10^6, 10^7 (and 10^8: 6 GB of disk)

997 tars of equally many images, which are not there themselves. Every measurement is a process of its own;
sizes take turns. *cold*: the index was dropped from the page cache before. Memory is from
/proc/self/smaps_rollup (Linux), in MB, as an increase: of the main process by opening the index and looking
up 20,000 random images; of each of four DataLoader processes over those of a loader that does the same
without an index. *private* is Private_Dirty, which a process alone holds and which cannot be dropped; *USS*
has Private_Clean as well: pages of the index in the page cache that no other process has touched yet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from clis.data.categories import Category
from clis.data.image_level import ImageLevelIndex, open_index, write_index
from clis.data.image_scan import Container, Listing
from clis.progress import Progress

TARS = 997
LOOKUPS = 20_000
WORKERS = 4
CATEGORIES = [Category(id=k + 1, name=f"category_{k}", frequency="f", image_count=1) for k in range(TARS)]


def simulate(folder: Path, images: int) -> None:
    """Writes the index, unless it is there: names as n02682922_12345.JPEG, 110 KB an image."""
    if (folder / "index.json").exists():
        return
    counts = np.diff(np.linspace(0, images, TARS + 1).astype(int))
    containers = [
        Container(f"0/n{k:08}.tar", f"/data/imagenet22k/n{k:08}.tar", "", 0, count << 17, count << 17, 1)
        for k, count in enumerate(counts.tolist())
    ]
    with Progress(f"simulate {images}", TARS) as progress:

        def listings() -> Iterator[tuple[int, Listing]]:
            for k, count in enumerate(counts.tolist()):
                numbers = range(1, count + 1)
                names = b"".join([b"n%08d_%d.JPEG" % (k, number) for number in numbers])
                digits = np.searchsorted(10 ** np.arange(1, 10), np.arange(1, count + 1), side="right") + 1
                rows = np.arange(count, dtype=np.int64)
                listing = Listing(
                    np.frombuffer(names, np.uint8), digits + len(b"n00000000_.JPEG"), (rows << 17) + 512,
                    110_000 + rows % 1000,
                )  # fmt: skip
                yield k, listing
                progress.advance()

        def notes() -> dict[str, Any]:
            return {"report": {"unmatched": []}}

        write_index(folder, containers, listings(), CATEGORIES, mixed=False, notes=notes)


def memory() -> np.ndarray:
    """MB that this process alone holds: private, USS."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
    dirty, clean = kilobytes["Private_Dirty"], kilobytes["Private_Clean"]
    return np.array([dirty, dirty + clean]) / 1024


def drop_cached(folder: Path) -> None:
    """Takes the files out of the page cache."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def look_up(index: ImageLevelIndex | None, images: int, seed: int) -> int:
    """Label and name of random images; without an index, the same loop."""
    total = 0
    for i in np.random.default_rng(seed).integers(images, size=LOOKUPS).tolist():
        total += i if index is None else int(index.labels[i]) + len(index.name(i))
    return total


class LookUps(Dataset[np.ndarray]):
    """Each item is a worker's look-ups; what it gives is the worker's memory behind them."""

    def __init__(self, index: ImageLevelIndex | None, images: int) -> None:
        self.index, self.images = index, images

    def __len__(self) -> int:
        return 4 * WORKERS

    def __getitem__(self, item: int) -> np.ndarray:
        look_up(self.index, self.images, item)
        return memory()


def memory_of_workers(index: ImageLevelIndex | None, images: int) -> np.ndarray:
    """MB [4, 2] of each, after four items: items go to the workers in turn."""
    loader = DataLoader(LookUps(index, images), batch_size=None, num_workers=WORKERS)
    return np.array(list(loader)[-WORKERS:])


def measure(folder: Path, images: int, cold: bool) -> dict[str, float | list]:
    """What a fresh process finds."""
    if cold:
        drop_cached(folder)
    before = memory()
    start = time.perf_counter()
    index = open_index(folder, CATEGORIES)
    len(index), index.labels[0], index.name(len(index) - 1)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    look_up(index, images, 99)
    seconds = (time.perf_counter() - start) / LOOKUPS
    main = memory() - before
    workers = memory_of_workers(index, images) - memory_of_workers(None, images)
    return {"open": opened, "look_up": seconds, "main": main.tolist(), "workers": workers.T.tolist()}


def compare(sizes: Sequence[int], repeats: int, out: Path) -> None:
    """Measures each size in turn, cold and warm, and prints a table."""
    for images in sizes:
        simulate(out / str(images), images)
    found: dict[tuple[int, bool], list[dict]] = {}
    with Progress("measurements", 2 * repeats * len(sizes)) as progress:
        for _ in range(repeats):
            for images in sizes:
                for cold in (True, False):
                    command = [sys.executable, __file__, "--child", str(images), "--out", str(out)]
                    result = subprocess.run(
                        command + ["--cold"] * cold, capture_output=True, text=True, check=True
                    )
                    found.setdefault((images, cold), []).append(json.loads(result.stdout.splitlines()[-1]))
                    progress.advance()
    heads = (
        "B/image", "+ names", "MB on disk", "ms cold", "ms warm", "us a look-up",
        "main private", "main USS", "worker priv.", "worker USS",
    )  # fmt: skip
    print(f"{'images':>11}" + "".join(f"{head:>14}" for head in heads))
    for images in sizes:
        files = {path.name: path.stat().st_size for path in (out / str(images)).iterdir()}
        names, total = files["names.npy"] / images, sum(files.values())
        warm_runs, cold_runs = found[images, False], found[images, True]
        cells = [
            f"{total / images - names:.1f}", f"{names:.1f}", f"{total / 1e6:.1f}",
            _spread(1e3 * run["open"] for run in cold_runs), _spread(1e3 * run["open"] for run in warm_runs),
            _spread(1e6 * run["look_up"] for run in warm_runs),
            *(_spread(run["main"][kind] for run in warm_runs) for kind in (0, 1)),
            *(_spread(value for run in warm_runs for value in run["workers"][kind]) for kind in (0, 1)),
        ]  # fmt: skip
        print(f"{images:>11}" + "".join(f"{cell:>14}" for cell in cells))
    print("times and memory: median/largest")


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.median(values):.1f}/{max(values):.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1_240_000])
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--huge", action="store_true", help="10^8 as well")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/image_level_index"))
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child is not None:
        print(json.dumps(measure(arguments.out / str(arguments.child), arguments.child, arguments.cold)))
        return
    sizes = [10**5, 10**6, 10**7] if arguments.growth else arguments.images
    compare(sizes + [10**8] * arguments.huge, arguments.repeats, arguments.out)


if __name__ == "__main__":
    main()
