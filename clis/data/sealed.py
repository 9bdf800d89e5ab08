"""How a batch travels from a loader process to the main one: packed there, unpacked here, errors in the open.

By default a loader process packs what it sends in a thread of its own. If that fails, since /dev/shm is full
or no file may be opened, the batch is lost and the main process waits for it forever. Here the process packs
it itself, so that the error reaches the main process like any other; and all tensors of a batch share one
block of memory, so that a batch on its way is one open file and not one for each tensor.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from clis.progress import say

GRACE = 30
"""Seconds that a loader process lives on after SIGTERM, so that the step can be finished."""
MEMORY_PER_WORKER = 64 << 20
"""Free bytes of /dev/shm per loader process below which a run warns: a few batches at the paper's size."""

_SHARED = Path("/dev/shm")
_ALIGNMENT = 64


class LoaderError(OSError):
    """A loader process cannot send what it has read; the message names the limit and what helps."""


class Sealed:
    """A batch that a loader process has packed: tensors in one block of shared memory, the rest as bytes."""

    def __init__(self, batch: Any) -> None:
        """Pack it now, in this thread, so that an error is this process's.

        Raises:
            RuntimeError, OSError: there is no shared memory or no open file left.
        """
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(batch)
        self.rest = buffer.getvalue()
        block = torch.empty(pickler.size, dtype=torch.uint8)
        for tensor, place in zip(pickler.tensors, pickler.places):
            place.of(block).copy_(tensor)
        self.places = pickler.places
        self.block = bytes(ForkingPickler.dumps(block))  # copied to shared memory here

    def open(self, copy: bool = False) -> Any:
        """Unpack it; the tensors are views of the block, or copies, which do not keep it.

        Raises:
            RuntimeError: the process that packed it, from which the block is fetched, is gone.
        """
        unpickler = _Unpickler(io.BytesIO(self.rest))
        try:
            block = pickle.loads(self.block)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            raise RuntimeError("DataLoader worker ended while its batch was on its way") from error
        tensors = [place.of(block) for place in self.places]
        unpickler.tensors = [tensor.clone() for tensor in tensors] if copy else tensors
        return unpickler.load()

    def pin_memory(self) -> Any:
        """Unpack it into pinned memory; `DataLoader` calls this method by its name."""
        batch = self.open()
        return batch.pin_memory() if hasattr(batch, "pin_memory") else batch


class _Place(NamedTuple):
    """Where a tensor is in the block."""

    first: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements: images have their channels last in memory."""

    def of(self, block: Tensor) -> Tensor:
        """Return the tensor as a view of the block."""
        last = self.first + math.prod(self.shape) * self.dtype.itemsize
        return block[self.first : last].view(self.dtype).as_strided(self.shape, self.strides)


class _Pickler(pickle.Pickler):
    """Pickle all but the tensors, which it collects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.places: list[_Place] = []
        self.size = 0

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        dense = torch.empty_like(value)  # of the same strides, but for gaps and overlaps
        self.tensors.append(value)
        self.places.append(_Place(self.size, value.dtype, tuple(value.shape), dense.stride()))
        self.size += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Unpickle with these tensors in their places."""

    tensors: Sequence[Tensor]

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


class SealedLoader:
    """A `DataLoader` whose processes seal what they send, and whose errors name the limit that was met."""

    def __init__(
        self,
        dataset: Dataset[Any],
        workers: int,
        collate: Callable[[Sequence[Any]], Any],
        pin: bool = False,
        copy: bool = False,
        **options: Any,
    ) -> None:
        """Load in `workers` processes (0: in this one).

        Args:
            pin: into pinned memory.
            copy: what a process sends, for batches that are kept for long: each holds a file open otherwise.
            options: `batch_size` or `batch_sampler` of the `DataLoader`.
        """
        self.workers, self.copy = workers, copy
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=_Sealing(collate),
            pin_memory=pin,
            worker_init_fn=_outlive_signals,
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        if self.workers:
            allow_open_files()
            warn_of_little_memory(self.workers)
        batches = iter(self.loader)
        try:
            for batch in batches:
                yield batch.open(self.copy) if isinstance(batch, Sealed) else batch
        except (RuntimeError, OSError) as error:
            if (limit := describe_limit(error)) is None:
                raise
            raise LoaderError(limit) from error
        finally:
            # An error's traceback would keep the processes until the program ends, which then waits for them.
            getattr(batches, "_shutdown_workers", lambda: None)()


class _Sealing:
    """Collates, and seals the batch where a loader process has to send it."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Any:
        batch = self.collate(samples)
        return batch if get_worker_info() is None else Sealed(batch)


def describe_limit(error: BaseException) -> str | None:
    """Say which limit of the machine a loader's error has met and what helps; None for other errors."""
    text = str(error)
    if "Too many open files" in text or "items of ancdata" in text:  # the latter where one is received
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"a loader process cannot send its batch: no more than {soft} files may be open. Raise the "
            f"limit (ulimit -n {max(4096, 8 * soft)}), or lower data.workers"
        )
    shared = "shared memory" in text or "shm" in text
    if "Bus error" in text or (shared and any(each in text for each in ("No space left", "Cannot allocate"))):
        size = f" ({shutil.disk_usage(_SHARED).total >> 20} MB)" if _SHARED.exists() else ""
        return (
            f"a loader process cannot send its batch: {_SHARED}{size} is full. Give the container more "
            "(docker run --shm-size 8g), or lower data.workers; data.workers=0 needs none"
        )
    return None


def allow_open_files() -> None:
    """Raise the soft limit of open files to the hard one, up to 2^16: every batch on its way has some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # forbidden in some containers
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@functools.cache
def warn_of_little_memory(workers: int) -> None:
    """Print a warning, once, if /dev/shm has little room for the batches of `workers` processes."""
    free = shutil.disk_usage(_SHARED).free if _SHARED.exists() else None
    if free is not None and free < workers * MEMORY_PER_WORKER:
        say(
            f"WARNING: {_SHARED} has {free >> 20} MB free for the batches of {workers} loader processes "
            "(data.workers); if it fills up, the run ends. docker run --shm-size 8g gives more"
        )


def _outlive_signals(worker: int) -> None:
    """Outlive signals to the whole process group; the main process answers them and still needs the batches.

    SIGTERM is also how an exiting main process ends its loaders, and waits for them: so not forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
