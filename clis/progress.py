"""What a person sees while waiting: lines and progress on the terminal, from rank 0 alone."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from clis.distributed import is_main

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
