"""How a command ends: errors that a user can fix in one line each, and an exit code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

EXIT_CODE = 75
"""Of a run, or a study, that stopped because it was asked to and can resume (sysexits.h: EX_TEMPFAIL)."""


class Preempted(Exception):
    """The run was asked to stop, has saved its state and can be resumed."""


class OutOfMemory(Exception):
    """Memory has run out; the message says where, and which settings need less."""


_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|bad_alloc|_ALLOC_FAILED|"
    r"could not create a memory|MemoryError",
    re.IGNORECASE,
)
"""What CUDA, PyTorch's allocator of the CPU, C++, cuBLAS, oneDNN and a loader process say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Check for the ways in which Python and PyTorch say that memory has run out."""
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def is_worker_death(error: BaseException) -> bool:
    """Check for what torch raises, anywhere in the main process, when a loader process is killed."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; an error that a user can fix is reported in one line, without a traceback.

    Exit codes: 0 done, 1 an error of this kind, 75 a training or study that was asked to stop and can resume,
    130 interrupted. With CLIS_DEBUG=1 the traceback is shown.
    """
    try:
        main()
    except Preempted as stop:
        print(stop, file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError, OutOfMemory) as error:
        died, full = is_worker_death(error), is_out_of_memory(error)
        if os.environ.get("CLIS_DEBUG") == "1" or (isinstance(error, RuntimeError) and not (died or full)):
            raise
        text = str(error).rstrip()
        if full and not isinstance(error, OutOfMemory):
            text = f"out of memory: {(text.splitlines() or ['no more is known'])[0]}"
        if died:
            text = f"a loader process ended ({text}); out of memory? Fewer data.workers need less. The same "
            text += "command resumes from the last checkpoint"
        if "Original Traceback" in text:  # from a loader process, whose traceback is in the message
            text = text.splitlines()[-1].partition(": ")[2]
        print(f"error: {text}\n(CLIS_DEBUG=1 shows the traceback)", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(1)
