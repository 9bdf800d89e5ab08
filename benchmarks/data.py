"""The data at scale: `python benchmarks/data.py PART ...` runs one of the benchmarks beside this file.

python benchmarks/data.py annotations FILE     annotation_cache.py: first start, later starts, workers
python benchmarks/data.py index [--growth]     image_level_index.py: a prepared index of any size
python benchmarks/data.py sampler              sampler.py: draws and steps at any size
"""

from __future__ import annotations

import importlib
import sys

PARTS = {"annotations": "annotation_cache", "index": "image_level_index", "sampler": "sampler"}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        sys.exit(__doc__)
    importlib.import_module(PARTS[sys.argv[1]]).main(sys.argv[2:])


if __name__ == "__main__":
    main()
