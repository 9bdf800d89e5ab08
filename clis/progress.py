"""Messages and progress on the terminal while a person waits, printed by rank 0 only."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from clis.distributed import is_main
from clis.text import wrapped

PLAIN_INTERVAL = 15.0
"""Seconds between lines where the output is not a terminal."""

_LINE = "{desc} {n}/{total} {rate_noinv_fmt} <{remaining}{postfix}"
"""With tqdm's sign for the time left; with the losses of a step it fits 100 columns."""
_LAST_LINE = "{desc} {n}/{total} {rate_noinv_fmt} in {elapsed}{postfix}"


_logs: list[Path] = []
"""Files that what is said is appended to: the last one gets it."""


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Append what is said in the block to a file too, with the time of day."""
    _logs.append(path)
    try:
        yield
    finally:
        _logs.pop()


def say(text: str) -> None:
    """Print a line on rank 0 only, and note it in the log."""
    if is_main():
        tqdm.write(wrapped(text, sys.stdout), file=sys.stdout)
        sys.stdout.flush()
        note(text)


def note(text: str) -> None:
    """Append a text to the innermost log, if there is one, on rank 0 only; a log that fails ends no run.

    The outer logs are touched: whoever looks at them sees that the work goes on.
    """
    if not _logs or not is_main():
        return
    stamp = time.strftime("%Y-%m-%d %H:%M:%S  ")
    log = _logs[-1]
    with (
        contextlib.suppress(OSError),
        log.open("a", encoding="utf-8", errors="backslashreplace") as file,  # names of files may be any bytes
    ):
        file.write(stamp + text.replace("\n", "\n" + " " * len(stamp)) + "\n")
    for outer in _logs[:-1]:
        with contextlib.suppress(OSError):
            os.utime(outer)


class Progress:
    """Rate and time left of a loop, on rank 0 only: tqdm's line on a terminal, plain lines otherwise.

    The log has plain lines in both cases.

    Use as a context manager and call `advance` as the work progresses; without a call it prints nothing.

    Args:
        at_most: the work may end before the total is reached; what is done by then is reported as the total.
    """

    def __init__(self, label: str, total: int, start: int = 0, *, at_most: bool = False) -> None:
        self.at_most = at_most
        self.label, self.total, self.start, self.done = label, total, start, start
        self.began = self.last_line = time.time()
        self.text = ""
        self.bar: tqdm | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        ended = kind is None and self.done > self.start
        if ended and self.at_most:
            self.total = self.done
        if self.bar is not None:
            if ended:
                self.bar.total, self.bar.bar_format = self.total, self._format()
            self.bar.close()
        if ended:
            self._say()

    def advance(self, count: int = 1, text: str = "") -> None:
        """Count `count` more as done; `text`, if any, describes the state."""
        self.done += count
        self.text = text or self.text
        if self.bar is None and is_main() and sys.stdout.isatty():  # not before: there may be nothing to do
            self.bar = tqdm(
                desc=self.label, total=self.total, initial=self.start, unit="", bar_format=_LINE,
                smoothing=0, file=sys.stdout, dynamic_ncols=True,  # the mean rate, as in plain lines
            )  # fmt: skip
            self.bar.start_t = self.began
        if self.bar is not None:
            self.bar.bar_format = self._format()
            self.bar.set_postfix_str(self.text, refresh=False)
            self.bar.update(count)
        if time.time() - self.last_line >= PLAIN_INTERVAL and self.done < self.total:
            self._say()

    def _say(self) -> None:
        self.last_line = time.time()
        line = tqdm.format_meter(
            self.done, self.total, self.last_line - self.began, bar_format=self._format(),
            prefix=self.label, postfix=self.text, unit="", initial=self.start,
        )  # fmt: skip
        if self.bar is None:
            say(line)
        else:
            note(line)

    def _format(self) -> str:
        return _LINE if self.done < self.total else _LAST_LINE
