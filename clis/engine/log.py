"""What a run says: progress on the terminal, one JSON line per record in metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from clis.atomic import atomic_write, naming_file
from clis.distributed import is_main

TIME_FIELDS = ("data_time", "compute_time", "images_per_second", "peak_memory")
"""What differs from run to run in metrics.jsonl; all else is the same for the same config and seed."""


class MetricsLog:
    """metrics.jsonl of a run folder: one record per line, appended; written by rank 0 alone."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Drop the records of steps after `resume_step`, which a resumed run will make again."""
        self.path = path
        if not is_main():
            return
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # cut off by a crash
                    break
                if record["step"] > resume_step:
                    break
                kept.append(line + "\n")
        self.kept = [json.loads(line) for line in kept[-2:]]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))

    def has_evaluation(self, step: int) -> bool:
        """Return whether the record of the evaluation after this step was kept; only rank 0 knows."""
        return is_main() and any(record["step"] == step and "AP" in record for record in self.kept)

    def write(self, record: Mapping[str, float | int]) -> None:
        """Append a line; a number that is not finite (a skipped step's) becomes null: JSON has none."""
        if is_main():
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
            with naming_file(self.path), self.path.open("a") as file:
                file.write(json.dumps(finite) + "\n")
