"""Batches from loader processes arrive whole; a limit of the machine is named, and nothing hangs."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import textwrap

import pytest
import torch
from runs import REPOSITORY
from torch.utils.data import Dataset

from clis.cli import is_worker_death
from clis.data.sealed import LoaderError, Sealed, SealedLoader, allow_open_files, describe_limit

PROGRAM = """
    import resource, sys, torch
    from clis.data.loader import ImageDataset
    from clis.data.sealed import SealedLoader

    def read(row):
        return torch.full((3, 200, 200), row, dtype=torch.uint8)

    {before}
    try:
        batches = list(SealedLoader(ImageDataset(read, range(64)), 2, list, copy={copy}, batch_size=1))
    except OSError as error:
        print(f"{{type(error).__name__}}: {{error}}")
    else:
        print("loaded", len(batches))
"""


class Rows(Dataset):
    """A large tensor, a small one of another type and a word for each row."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int):
        return torch.full((99 + row,), row, dtype=torch.uint8), torch.tensor([row / 8]), f"row {row}"


def run(before: str, prefix: tuple[str, ...] = (), copy: bool = False) -> str:
    program = textwrap.dedent(PROGRAM.format(before=before, copy=copy))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [*prefix, sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_whole_and_in_order(workers):
    loader = SealedLoader(Rows(), workers, list, batch_size=2)
    for _ in range(2):  # an iteration more than once
        found = [row for batch in loader for row in batch]
        assert [word for *_, word in found] == [f"row {row}" for row in range(6)]
        for row, (large, small, _) in enumerate(found):
            assert torch.equal(large, torch.full((99 + row,), row, dtype=torch.uint8))
            assert torch.equal(small, torch.tensor([row / 8]))


def test_a_batch_is_one_open_file_and_keeps_its_layout():
    """Whatever the types, the order of memory and the number of tensors; none shares memory with another."""
    image = torch.arange(60, dtype=torch.uint8).view(4, 5, 3).permute(2, 0, 1)  # channels last
    sent = {
        "images": [image, image.flip(1)],
        "gap": torch.arange(12.0)[::3],
        "expanded": torch.tensor([1, 2]).expand(3, 2),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
        "number": torch.tensor(True),
        "words": ("a", 2),
    }
    before = len(os.listdir("/proc/self/fd"))
    sealed = Sealed(sent)
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # the block, a copy for the receiver, its socket
    found = sealed.open()
    assert found["words"] == ("a", 2)
    assert found["images"][0].stride() == image.stride()
    for name in ("gap", "expanded", "half", "none", "number"):
        assert torch.equal(found[name], sent[name])
        assert found[name].dtype == sent[name].dtype
    for arrived, original in zip(found["images"], sent["images"]):
        assert torch.equal(arrived, original)
    found["images"][0].zero_()
    assert torch.equal(found["images"][1], sent["images"][1])


def test_too_many_open_files_end_the_run():
    """64 images on their way need more than the 40 files that this process and its loaders may open."""
    said = run("resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))")
    assert said.startswith("LoaderError: a loader process cannot send its batch: no more than 40 files")
    assert "data.workers" in said


def test_copies_hold_no_open_files():
    """As those that wait for others of their shape must not."""
    assert run("resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))", copy=True) == "loaded 64"


def test_the_soft_limit_is_raised_first():
    """A shell's 40 do no harm where the hard limit is high."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert run(f"resource.setrlimit(resource.RLIMIT_NOFILE, (40, {limits[1]}))") == "loaded 64"
    allow_open_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= limits[0]


def test_a_full_shared_memory_ends_the_run():
    """1 MB of /dev/shm, as a container may have, and 2 MB of images on their way."""
    prefix = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    said = run("", prefix)
    assert said.startswith("LoaderError: a loader process cannot send its batch: /dev/shm (1 MB) is full")
    assert "--shm-size" in said


def test_a_process_that_is_gone_counts_as_a_lost_loader():
    """Its block can no longer be fetched: the socket that a batch names is closed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    process = context.Process(target=lambda: sender.send(Sealed(torch.zeros(9))))
    process.start()
    sealed = receiver.recv()
    process.join()
    with pytest.raises(RuntimeError) as caught:
        sealed.open()
    assert is_worker_death(caught.value)


def test_other_errors_stay_as_they_are():
    assert describe_limit(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert describe_limit(OSError("No space left on device: '/data/run/last.pt'")) is None
    assert issubclass(LoaderError, OSError)  # which a command reports in one line
