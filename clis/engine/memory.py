"""How much memory is used; running out of it is one line that says where, and which settings need less."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator

import torch

from clis.cli import OutOfMemory, is_out_of_memory


@contextlib.contextmanager
def memory_advice(where: Callable[[], str], settings: str) -> Iterator[None]:
    """Raise `OutOfMemory` where the block runs out of memory, of the device or of the machine.

    Args:
        where: called then; says what was being done.
        settings: what can be made smaller.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(f"{where()}: out of memory ({reason}). Less is needed with {settings}") from error


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use on a GPU since `reset_peak_memory`, or by this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on Linux


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory` of a GPU again: a run's stages share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
