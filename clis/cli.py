"""How a command ends: errors that a user can fix in one line each, and an exit code."""

from __future__ import annotations

import io
import os
import re
import select
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from clis.text import wrapped

EXIT_CODE = 75
"""Of a run, or a study, that stopped because it was asked to and can resume (sysexits.h: EX_TEMPFAIL)."""


PATIENCE = 5.0
"""Seconds within which torchrun stops the other processes when one has ended."""


class Preempted(BaseException):
    """The run was asked to stop, has saved its state and can be resumed.

    Like KeyboardInterrupt it may be raised anywhere, and is no error that anything on the way should handle.
    """


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


_NO_SHARED_MEMORY = re.compile(r"creating shared memory segment|failed to extend /dev/shm")
"""What nccl says when /dev/shm is full."""


def is_shared_memory_full(error: BaseException) -> bool:
    """Check for what torch raises in a collective when nccl finds no room in /dev/shm."""
    return isinstance(error, RuntimeError) and _NO_SHARED_MEMORY.search(str(error)) is not None


_LOST = re.compile(
    r"Connection (closed|reset)|gloo.*([Tt]imed out|Broken pipe)|process group.*aborted|ncclRemoteError|"
    r"NCCL communicator was aborted|NCCL timeout in|NCCL operation timed out|collective operation timeout"
)
"""What gloo, nccl and its watchdog say of another process; other errors of nccl are of this one."""


def is_lost_process(error: BaseException) -> bool:
    """Check for what torch raises in a collective when another process of the group has ended."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def explain(error: BaseException) -> str | None:
    """Return one line for an error of torch or the system whose own message is unhelpful; None for others."""
    text = str(error).rstrip()
    if is_worker_death(error):
        return (
            f"a loader process ended ({text}); out of memory? Fewer data.workers need less. The same command "
            "resumes from the last checkpoint"
        )
    if is_shared_memory_full(error):
        return (
            f"nccl found no room in shared memory ({_line_with(_NO_SHARED_MEMORY, text)}): /dev/shm is full. "
            "Give the container more (docker run --shm-size 8g)"
        )
    if is_lost_process(error):
        return f"another process of this run has ended ({_line_with(_LOST, text)}); its own error says why"
    if isinstance(error, OutOfMemory):
        return text
    if is_out_of_memory(error):
        return f"out of memory: {(text.splitlines() or ['no more is known'])[0]}"
    return None


def _line_with(pattern: re.Pattern, text: str) -> str:
    return next(line for line in text.splitlines() if pattern.search(line))


def run_command(main: Callable[[], None]) -> None:
    """Run a command; an error that a user can fix is reported in one line, without a traceback.

    Exit codes: 0 done, 1 an error of this kind, 2 wrong arguments, 75 a training or study that was asked to
    stop and can resume, 130 interrupted, 141 nobody reads the output any more. With CLIS_DEBUG=1 the
    traceback is shown. What the terminal's encoding does not have is printed as a backslash escape. Under
    torchrun, rank 0 reports an error that all processes have.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        main()
        sys.stdout.flush()  # here, where a closed pipe is met with calm
    except Preempted as stop:
        print(wrapped(str(stop), sys.stderr), file=sys.stderr, flush=True)
        let_rank_0_speak()
        _leave(EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError, OutOfMemory) as error:
        if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
            _leave(141)
        let_rank_0_speak()
        explained = explain(error)
        unknown = isinstance(error, RuntimeError) and explained is None
        if os.environ.get("CLIS_DEBUG") == "1" or unknown:
            _leave_with_traceback()
            raise
        text = explained or str(error).rstrip()
        if "Original Traceback" in text:  # from a loader process, whose traceback is in the message
            text = text.splitlines()[-1].partition(": ")[2]
        text = f"error: {text}\n(CLIS_DEBUG=1 shows the traceback)"
        print(wrapped(text, sys.stderr), file=sys.stderr)
        _leave(1)
    except Exception:
        _leave_with_traceback()
        raise


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Print a warning of ours as the line that it is, and others with their place."""
    own = category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent)
    text = warnings.formatwarning(message, category, filename, lineno)
    print(f"WARNING: {message}" if own else text.rstrip(), file=sys.stderr)


def _leave(code: int) -> NoReturn:
    """End the process; under torchrun without what Python does at its end.

    There the other processes may be waiting for this one in a collective, and nccl would wait for them.
    """
    if _is_one_of_many():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave_with_traceback() -> None:
    """Under torchrun, print the traceback of the error that is handled, and end the process."""
    if _is_one_of_many():
        let_rank_0_speak()
        traceback.print_exc()
        _leave(1)


def _is_one_of_many() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_closed(stream: TextIO) -> bool:
    """Check whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def let_rank_0_speak() -> None:
    """Wait before an error is reported by a rank above 0, which torchrun stops once rank 0 has ended.

    So an error of all processes is reported once, and an error of one process by that one.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(PATIENCE)
