"""Processes started by torchrun: rank, gather, reduce, DDP. Everything is a no-op on one process."""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clis.text import counted

T = TypeVar("T")

TIMEOUT = timedelta(hours=3)
"""For a collective: the others wait while rank 0 evaluates, or for the slowest share of the regions."""


def rank() -> int:
    """Return this process's number among all processes, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process has rank 0."""
    return rank() == 0


def choose_device(name: str, given: str = "train.device=") -> torch.device:
    """Return the device of this name; `auto` is this process's CUDA device where there is one, else the CPU.

    Args:
        given: what the user writes before the name, for errors.

    Raises:
        ValueError: the name is not a device's, or the machine does not have the device.
    """
    if name != "auto" and not name.startswith("cuda"):
        try:
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # a name may be known, and the device not be there
        except Exception:  # torch's modules have errors of many kinds
            raise ValueError(f"{given}{name}: cannot be used here; use auto, cpu, cuda or cuda:0") from None
        return device
    if not torch.cuda.is_available():
        if name == "auto":
            return torch.device("cpu")
        raise ValueError(f"{given}{name}: this machine has no CUDA device; use {given}cpu")
    device = _cuda_device(name, torch.cuda.device_count(), given)
    torch.cuda.set_device(device)
    return device


def _cuda_device(name: str, count: int, given: str) -> torch.device:
    """Return the device named ``cuda:0``, or this process's own of the `count` that it sees."""
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ":" in name:
        if here > 1:
            raise ValueError(f"{given}{name}: the same device for {here} processes; use cuda")
        return torch.device(name)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    own = count == 1 and shown != "" and "," not in shown  # some launchers show each process its own alone
    index = 0 if own else local
    if index >= count:
        raise ValueError(
            f"{here} processes were started on this machine, which has {counted(count, 'CUDA device')}: "
            f"start one for each (torchrun --nproc_per_node {count})"
        )
    return torch.device("cuda", index)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started (nccl on CUDA, gloo else) for the length of the block.

    After an error the group is left as it is; `clis.cli.run_command` ends the process then.
    """
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        yield
        return
    store, place, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = _own_names(store, place, size)
    # gloo also on CUDA: what has to be gathered and need not be on the device travels from CPU to CPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=place, world_size=size, timeout=TIMEOUT)
    yield
    dist.destroy_process_group()  # not after an error: nccl would wait for processes that wait for this one


def _own_names(store: dist.Store, place: int, size: int) -> dist.Store:
    """Return the store under a new name that these processes agree on.

    torchrun's c10d store outlives a restart, and with it the addresses of processes that are gone. The number
    of restarts cannot serve as the name: every node has its own, and it does not change when a node joins or
    leaves. So each process asks with a word of its own, and an answer to one that is gone is heard by nobody.
    """
    if place > 0:
        question = uuid.uuid4().hex
        store.set(f"question_{place}", question)
        name = store.get(f"answer_{question}").decode()  # waits for it
        store.set(f"{name}_heard_{place}", "")
        return dist.PrefixStore(name, store)
    name, unheard = uuid.uuid4().hex, set(range(1, size))
    until = time.monotonic() + TIMEOUT.total_seconds()
    while unheard:
        if time.monotonic() > until:
            raise RuntimeError(f"processes {sorted(unheard)} of {size} have not come within {TIMEOUT}")
        for other in unheard:
            if store.check([f"question_{other}"]):
                store.set(f"answer_{store.get(f'question_{other}').decode()}", name)
        time.sleep(0.02)
        unheard = {other for other in unheard if not store.check([f"{name}_heard_{other}"])}
    return dist.PrefixStore(name, store)


def barrier() -> None:
    """Wait until all processes have reached this call; does nothing on one process."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """Run the block on rank 0 of each machine before its other ranks, which find the files that it wrote.

    All processes must come here. An error in the first rank does not hold up the others.
    """
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, the same on each. Changes `values` in place and returns it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def from_main(value: T) -> T:
    """Return the value of rank 0 on all ranks; what the others pass does not matter."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone and return its result on all ranks; its error is raised on all, too."""
    outcome: tuple[T | None, Exception | None] = (None, None)
    own: Exception | None = None
    if is_main():
        try:
            outcome = function(), None
        except Exception as error:
            own, outcome = error, (None, _sendable(error))
    value, failure = from_main(outcome)
    if failure is not None:
        raise own or failure
    return value  # type: ignore[return-value]  # there is one, or there was an error


def _sendable(error: Exception) -> Exception:
    """Return the error if other processes can read it, else one that says what it was."""
    with contextlib.suppress(Exception):
        if isinstance(error, OSError | ValueError) and pickle.loads(pickle.dumps(error)) is not None:
            return error
    return RuntimeError(f"on rank 0: {type(error).__name__}: {error}")


def from_all(value: T) -> list[T]:
    """Return the values of all ranks, in their order, on each."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate rows [n,...] of all ranks, in the order of the ranks; n may differ."""
    if not dist.is_initialized():
        return rows
    padded, counts = _padded(rows)
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts)])


def gather_rows(rows: Tensor) -> Tensor:
    """Gather rows as `all_gather_rows`, but on rank 0 only; the others get theirs back.

    Rows on the CPU travel from CPU to CPU (gloo), even where CUDA uses nccl.
    """
    if not dist.is_initialized():
        return rows
    padded, counts = _padded(rows)
    gathered = [torch.empty_like(padded) for _ in counts] if is_main() else None
    dist.gather(padded, gathered)
    return rows if gathered is None else torch.cat([part[:count] for part, count in zip(gathered, counts)])


def _padded(rows: Tensor) -> tuple[Tensor, list[int]]:
    """Pad rows to the longest rank's number; return them and the number of each rank."""
    lengths = torch.zeros(world_size(), dtype=torch.int64)
    lengths[rank()] = len(rows)
    counts = all_reduce_sum(lengths).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded, counts


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model in DDP, which does not synchronize its buffers; one process gets the model itself."""
    if world_size() == 1:
        return model
    # the queue is the same on all ranks by construction: 59 MB that need not travel each step
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync_buffers: False}
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, **options)


@contextlib.contextmanager
def no_sync(network: nn.Module, local: bool) -> Iterator[None]:
    """Keep the gradients of the block from being synchronized between processes yet, if `local`."""
    if local and isinstance(network, DistributedDataParallel):
        with network.no_sync():
            yield
    else:
        yield
