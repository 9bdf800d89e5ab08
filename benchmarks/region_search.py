"""The region search at the paper's size, images a second: at the test's size, and at a size of its own.

    python benchmarks/region_search.py FOLDER [--images 24] [--repeats 3] [--device cpu]

R50-FPN, random weights, 1203 classes, category-rank-first; FOLDER holds JPEGs, e.g. of ImageNet, or folders
of them. A turn reads and decodes the images in one loader process and finds their regions:

* as at test: short side 800, longest 1333, one image at a time;
* as the search: `regions.short_side` 400, `regions.max_size` 667, eight images of one padded size at a time;
* the same in bfloat16 (`train.precision`).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from detectors import make_detector, paper_config, print_ratios, take_turns

from clis.engine.region_search import region_rule, regions_of, search_batches

CLASSES = 1203
SEARCH = ("regions.short_side=400", "regions.max_size=667", "regions.images_per_batch=8")
VARIANTS = {
    "as at test": ("regions.short_side=800", "regions.max_size=1333", "regions.images_per_batch=1"),
    "as the search": SEARCH,
    "as the search, bfloat16": (*SEARCH, "train.precision=bfloat16"),
}


class Photographs:
    """`count` JPEG files, repeated if there are fewer, as an index of image-level images of class 0."""

    def __init__(self, folder: Path, count: int) -> None:
        files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
        self.paths = list(itertools.islice(itertools.cycle(files), count))
        self.labels = np.zeros(len(self.paths), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return str(self.paths[row])

    location = name

    def read(self, row: int) -> bytes:
        return self.paths[row].read_bytes()


def search(index: Photographs, device: str, *overrides: str) -> Callable[[], None]:
    config = paper_config("clis=off", "data.workers=1", *overrides)
    detector = make_detector(CLASSES, "clis=off", device=device).eval()
    rule = region_rule(config, index, detector)

    def run() -> None:
        for rows, images in search_batches(config, index, range(len(index)), detector):
            regions_of(rows, images, rule)

    return run


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    index = Photographs(arguments.folder, arguments.images)
    if len(index) == 0:
        parser.error(f"{arguments.folder}: no JPEG in it")
    runs = {name: search(index, arguments.device, *overrides) for name, overrides in VARIANTS.items()}
    seconds = take_turns(runs, arguments.repeats, arguments.device)
    print_ratios(seconds, "as at test")
    for name, values in seconds.items():
        print(f"| {name} | {len(index) / sorted(values)[len(values) // 2]:.2f} images a second |")


if __name__ == "__main__":
    main()
