"""The data at full size: what a first start, every later start and a loader worker cost.

    python benchmarks/annotation_cache.py FILE [--repeats 3] [--config configs/lvis_v1/baseline_r50.yaml]

FILE is an annotation file of LVIS form, e.g. lvis_v1_train.json. Every measurement is a process of its own,
and the kinds take turns. *Private* memory is Private_Clean + Private_Dirty of /proc/self/smaps_rollup
(Linux): pages of a mapped file count as long as no second process has touched them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "lvis_v1" / "baseline_r50.yaml"
WORKERS = 4
ITEMS = 20_000
"""Work items that the workers share."""
EVERY = 500
"""Work items of a batch; a worker looks at its memory once a batch."""

Figures = dict[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the streams of the later starts")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child is None:
        compare(arguments)
    else:
        figures = CHILDREN[arguments.child](arguments)
        print(json.dumps(figures | {"peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))


def child(kind: str, arguments: argparse.Namespace, cache: str) -> Figures:
    """The figures of one measurement in a process of its own, with this folder as CLIS_CACHE.

    A child's peak memory on Linux is never below its parent's: so nothing big is imported above.
    """
    command = [sys.executable, __file__, str(arguments.file), "--child", kind]
    command += ["--config", str(arguments.config)]
    finished = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"CLIS_CACHE": cache}, check=False
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{kind}: {finished.stderr}")
    figures = json.loads(finished.stdout.splitlines()[-1])
    print(f"  {kind}: {figures}", file=sys.stderr, flush=True)
    return figures


def compare(arguments: argparse.Namespace) -> None:
    """The table of an annotation file: reading it without a cache beside json.load, then later starts."""
    runs: dict[str, list[Figures]] = {kind: [] for kind in CHILDREN}
    with tempfile.TemporaryDirectory() as kept:
        child("start", arguments, kept)  # makes the cache of the later starts
        for _ in range(arguments.repeats):
            for kind in runs:
                with tempfile.TemporaryDirectory() as empty:
                    runs[kind].append(child(kind, arguments, kept if kind == "start" else empty))
    print(
        f"{arguments.file.name}, {arguments.file.stat().st_size / 1e9:.2f} GB\n\n| what | | |\n|---|---|---|"
    )
    for kind, text in (("json", "json.load alone"), ("first", "first: load_annotations without a cache")):
        seconds, peak = (_spread(_column(runs[kind], name)) for name in ("CPU s", "peak GB"))
        print(f"| {text} | {seconds} CPU s | peak {peak} GB |")
    for name in ("CPU s", "peak GB"):
        ratios = [a / b for a, b in zip(_column(runs["first"], name), _column(runs["json"], name))]
        print(f"| first / json.load, {name} | {_spread(ratios)} | |")
    for name in runs["start"][0]:
        print(f"| every later start: {name} | {_spread(_column(runs['start'], name))} | |")


def _column(runs: Sequence[Figures], name: str) -> list[float]:
    return [figures[name] for figures in runs]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} .. {max(values):.3g})"


def measure_json(arguments: argparse.Namespace) -> Figures:
    """json.load of the file, all of it as objects."""
    with open(arguments.file, "rb") as file:
        return _cpu_seconds(lambda: json.load(file))


def measure_first(arguments: argparse.Namespace) -> Figures:
    """The same file to arrays, and these to the cache."""
    from clis.data.annotations import load_annotations

    return _cpu_seconds(lambda: load_annotations(arguments.file))


def _cpu_seconds(work: Callable[[], object]) -> Figures:
    began = time.process_time()
    result = work()  # held, so that freeing it does not count
    seconds = time.process_time() - began
    del result
    return {"CPU s": seconds}


def measure_start(arguments: argparse.Namespace) -> Figures:
    """The streams of a training by the baseline from the cache, and workers that read its annotations."""
    import torch

    from clis.config_files import load_config
    from clis.data.streams import make_streams
    from clis.engine.run_folder import regions_file

    file = arguments.file.resolve()
    config = load_config(str(arguments.config), [f"data.root={file.parent}", f"data.train={file.name}"])
    before, began, cpu_began = private_megabytes(), time.perf_counter(), time.process_time()
    _, dataset, sampler = make_streams(config, regions_file(config))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    after = private_megabytes()
    torch.set_num_threads(1)
    bare = worker_megabytes(dataset, sampler, lambda annotations, row: None)
    reading = worker_megabytes(dataset, sampler, read_row)
    return {
        "seconds to the streams": seconds,
        "CPU s to the streams": cpu_seconds,
        "MB private, the imports alone": before,
        "MB private, more with the streams": after - before,
        f"MB private, a worker of {WORKERS} that reads nothing (the largest)": max(bare),
        f"MB private, a worker of {WORKERS} that reads {ITEMS // WORKERS} items (the largest)": max(reading),
        "MB private, more in a worker for the reading": max(reading) - max(bare),
    }


def private_megabytes() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def read_row(annotations: Any, row: int) -> float:
    """All that a work item takes from the annotations."""
    taken = annotations.boxes_of(row).sum() + annotations.labels_of(row).sum() + annotations.image_ids[row]
    return float(taken + annotations.image_sizes[row].sum() + len(annotations.file_names[row]))


def worker_megabytes(dataset: Any, sampler: Any, read: Callable[[Any, int], object]) -> list[float]:
    """Private memory of each loader worker at its largest, with `read` for the work of an item."""
    from torch.utils.data import DataLoader, Dataset

    class Rows(Dataset):
        def __getitem__(self, row: int) -> None:
            read(dataset.annotations, row)

    def look(_: object) -> tuple[int, float]:
        return os.getpid(), private_megabytes()

    steps = range(-(-ITEMS // len(sampler.items(0))))
    rows = [item.instance for step in steps for item in sampler.items(step)][:ITEMS]
    batches = [rows[first : first + EVERY] for first in range(0, ITEMS, EVERY)]
    largest: dict[int, float] = {}
    for process, megabytes in DataLoader(Rows(), batch_sampler=batches, num_workers=WORKERS, collate_fn=look):
        largest[process] = max(largest.get(process, 0.0), megabytes)
    return list(largest.values())


CHILDREN: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "json": measure_json,
    "first": measure_first,
    "start": measure_start,
}


if __name__ == "__main__":
    main()
