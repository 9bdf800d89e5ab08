"""What a run says: progress on the terminal, one JSON line a record in metrics.jsonl."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from clis.distributed import is_main
from clis.files import written_whole

TIME_FIELDS = ("data_time", "compute_time", "images_per_second", "peak_memory")
"""What differs from run to run in metrics.jsonl; all else is the same for the same config and seed."""
PLAIN_INTERVAL = 15.0
"""Seconds between lines where the output is not a terminal."""


def say(text: str) -> None:
    """Prints a line, from rank 0 alone."""
    if is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """Rate and time left of a loop, from rank 0: one live line on a terminal, plain lines otherwise.

    Use as a context manager and call `advance` as the work goes on; without a call it says nothing.
    """

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.start, self.done = label, total, start, start
        self.began = self.last_line = time.monotonic()
        self.text = ""
        self.bar: tqdm | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None and self.done > self.start:
            self._say()

    def advance(self, count: int = 1, text: str = "") -> None:
        """`count` more are done; `text`, if any, says how it stands."""
        self.done += count
        self.text = text or self.text
        if self.bar is None and is_main() and sys.stdout.isatty():  # not before: it may be nothing to do
            self.bar = tqdm(file=sys.stdout, dynamic_ncols=True, bar_format="{desc}")
        if self.bar is not None:
            self.bar.set_description_str(self._line(), refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self.last_line >= PLAIN_INTERVAL and self.done < self.total:
            self._say()

    def _say(self) -> None:
        self.last_line = time.monotonic()
        say(self._line())

    def _line(self) -> str:
        """With the losses of a step it fits 100 columns."""
        passed = time.monotonic() - self.began
        rate = (self.done - self.start) / max(passed, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        times = f"{clock(left)} left" if left else f"in {clock(passed)}"
        return f"{self.label} {self.done}/{self.total} {rate:.2f}/s {times} {self.text}".rstrip()


def clock(seconds: float) -> str:
    """``1h02``, or ``2:03`` for minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}" if minutes >= 60 else f"{minutes}:{second:02}"


class MetricsLog:
    """metrics.jsonl of a run folder: a record a line, appended; written by rank 0 alone."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Drops the records of steps after `resume_step`, which a resumed run will make again."""
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
        with written_whole(path) as temporary:
            temporary.write_text("".join(kept))

    def has_evaluation(self, step: int) -> bool:
        """Whether the record of the evaluation behind this step was kept; only rank 0 knows."""
        return is_main() and any(record["step"] == step and "AP" in record for record in self.kept)

    def write(self, record: Mapping[str, float | int]) -> None:
        """Appends a line; a number that is not finite (a skipped step's) becomes null: JSON has none."""
        if is_main():
            record = {name: value if math.isfinite(value) else None for name, value in record.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
