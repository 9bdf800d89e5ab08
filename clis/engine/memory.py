"""Running out of memory: one line that says where, and which settings need less."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

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
