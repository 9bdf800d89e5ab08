"""metrics.jsonl of run folders as TensorBoard event files (the extra ``[report]``)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clis.config import LossConfig
from clis.engine.run_folder import RunFolder
from clis.metric.lvis_eval import METRICS
from clis.progress import say

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

POLL = 5.0
"""Seconds between two looks at the runs that are followed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis tensorboard`."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="runs, also unfinished ones"
    )
    parser.add_argument("--follow", action="store_true", help="continue while the runs continue")


def run(arguments: argparse.Namespace) -> None:
    """Write the event files of run folders, once or while the runs continue."""
    write_events(arguments.folders, arguments.follow)


class EventFile:
    """The records of one run, written as events into the folder ``tensorboard`` of the run folder."""

    def __init__(self, folder: Path) -> None:
        """Find the records of a run; nothing is written before `update`.

        Raises:
            FileNotFoundError: the folder has no metrics.jsonl.
        """
        self.run = RunFolder(folder)
        self.folder = self.run.tensorboard
        if not self.run.metrics.exists():
            raise FileNotFoundError(
                f"{self.run.metrics}: no such file; name run folders, e.g. runs/shapes/clis"
            )
        self.writer: SummaryWriter | None = None
        self.written: list[dict[str, Any]] = []

    def update(self) -> int:
        """Write the new records, or all again where a resumed run has taken some back; return their number.

        Raises:
            ValueError: TensorBoard is not installed, or metrics.jsonl is damaged.
        """
        records = self.run.read_metrics()
        if self.writer is None or records[: len(self.written)] != self.written:
            self.writer, self.written = self._start_over(), []
        new = records[len(self.written) :]
        for record in new:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(_tag(name), value, record["step"])
        self.writer.flush()
        self.written = records
        return len(new)

    def _start_over(self) -> SummaryWriter:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError('TensorBoard is not installed: pip install -e ".[report]"') from None
        if self.writer is not None:
            self.writer.close()
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        return SummaryWriter(str(self.folder))


def write_events(folders: Sequence[Path], follow: bool) -> None:
    """Write the event files of the runs, and with `follow` continue until interrupted."""
    files = [EventFile(folder) for folder in folders]
    for file in files:
        say(f"{file.folder}: {file.update()} records; look at them with: tensorboard --logdir {file.folder}")
    while follow:
        time.sleep(POLL)
        for file in files:
            file.update()


def _tag(name: str) -> str:
    """Return the tag of a value; TensorBoard groups tags by the word before the slash."""
    if name == "loss" or name in LossConfig().weights:
        return f"loss/{'total' if name == 'loss' else name}"
    return f"{'evaluation' if name in METRICS or name.startswith('AR@') else 'run'}/{name}"
