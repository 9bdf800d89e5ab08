"""Processes and nodes that come and go: the same images in the same steps, the same figures."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from runs import BASELINE, CONFIG, REPOSITORY, SHORT, assert_same_training, records

from clis.commands import run_verb
from clis.distributed import _own_names
from clis.engine.run_folder import RunFolder
from clis.metric.detections import Detections

FLOAT64 = (
    "import sys; from clis.commands import run_verb; from clis.engine import start, train\n"
    "build = start.build_model\n"
    "start.build_model = lambda *values, **options: build(*values, **options).double()\n"
    "if sys.argv[1] != '-': # raises in front of this step\n"
    "    step, left = train.train_step, [int(sys.argv[1])]\n"
    "    def limited(*values):\n"
    "        left[0] -= 1\n"
    "        if left[0] < 0: raise ValueError('taken away')\n"
    "        return step(*values)\n"
    "    train.train_step = limited\n"
    "run_verb('train', sys.argv[2:])"
)
"""The command in float64, ended by an error before a step of its own."""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **more}


def torchrun(processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


@pytest.mark.slow
@pytest.mark.parametrize("ways", [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on_in_the_same_steps(ways, finished, data, tmp_path):
    """20 steps in float64, of which the last 13 on the other number of processes: every loss to 1e-9."""
    script = tmp_path / "float64.py"
    script.write_text(FLOAT64)
    common = [
        "--config", CONFIG, *SHORT, "train.steps=20", f"regions.file={finished / 'regions.npy'}",
        "regions.detector=null", f"data.root={data}", "train.images_per_process=2", "train.save_every=7",
    ]  # fmt: skip

    def run(processes: int, stop: str, folder: Path) -> int:
        launcher = [sys.executable] if processes == 1 else torchrun(processes)
        command = [*launcher, str(script), stop, *common, f"output={folder}"]
        return subprocess.run(command, env=environment(), timeout=300, capture_output=True).returncode

    assert run(1, "-", tmp_path / "whole") == 0
    first, second = ways
    assert run(first, "7", tmp_path / "parts") != 0
    assert len(records(tmp_path / "parts")) == 7
    assert run(second, "-", tmp_path / "parts") == 0
    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert [record["step"] for record in parts] == list(range(1, 21))
    for ours, expected in zip(parts, whole):
        assert ours == pytest.approx(expected, abs=1e-9, rel=0)


class Node:
    """A torchrun agent with one process, in a session of its own."""

    def __init__(self, address: str, port: int, folder: Path, name: str, arguments: list[str]) -> None:
        self.log = folder / f"{name}.txt"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1",
            "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test",
            "--rdzv-conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=5",
            f"--local-addr={address}", str(REPOSITORY / "train.py"), *arguments,
        ]  # fmt: skip
        shared = environment(GLOO_SOCKET_IFNAME="lo", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=shared, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
            )

    def workers(self) -> list[int]:
        listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
        pairs = [line.split() for line in listing.splitlines()[1:]]
        return [int(pid) for pid, parent in pairs if parent == str(self.process.pid)]

    def kill(self) -> None:
        """The agent and its worker, if they are there."""
        workers = self.workers()
        self.process.kill()
        self.process.wait()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def says(self, text: str) -> int:
        """How often."""
        return self.log.read_text().count(text)


@pytest.mark.slow
def test_two_nodes_of_which_one_fails_leaves_and_comes_back(data, tmp_path):
    """Two agents on two loopback addresses, no hand anywhere; the node that joins costs no step."""
    steps, run = 900, tmp_path / "run"
    arguments = ["--config", BASELINE, *SHORT, f"data.root={data}", f"output={run}"]
    arguments += [f"train.steps={steps}", "train.save_every=10"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def wait_for(happened) -> None:
        until = time.monotonic() + 600
        while not happened():
            assert first.process.poll() is None, first.log.read_text()
            assert time.monotonic() < until, first.log.read_text()
            time.sleep(0.02)

    def done() -> int:
        return len(records(run)) if (run / "metrics.jsonl").exists() else 0

    first = Node("127.0.0.1", port, tmp_path, "first", arguments)
    time.sleep(1)  # the first holds the rendezvous
    second = Node("127.0.0.2", port, tmp_path, "second", arguments)
    try:
        wait_for(lambda: first.says("2 processes,") == 1)
        wait_for(lambda: done() >= 15)
        os.kill(second.workers()[0], signal.SIGKILL)
        wait_for(lambda: first.says("2 processes,") == 2)
        wait_for(lambda: done() >= 40)
        alone = first.says("1 process,")
        second.kill()
        wait_for(lambda: first.says("1 process,") == alone + 1)
        asked = first.says("stopped on request")
        second = Node("127.0.0.2", port, tmp_path, "again", arguments)
        wait_for(lambda: first.says("2 processes,") == 3)
        assert first.process.wait(timeout=1200) == 0
        assert second.process.wait(timeout=60) == 0
        assert first.says("stopped on request") == asked + 1
    finally:
        for node in (first, second):
            node.kill()
    saved = re.findall(r"stopped on request; step (\d+) is saved", first.log.read_text())[-1]
    assert first.says(f"going on from step {saved}\n") == 1
    assert [record["step"] for record in records(run)] == list(range(1, steps + 1))
    assert (run / "eval.json").exists()


def agree(store: dist.Store, size: int) -> list[dist.Store]:
    """`size` places that agree at the same time, each with a connection of its own."""
    found: dict[int, dist.Store] = {}

    def take(place: int) -> None:
        found[place] = _own_names(store.clone(), place, size)

    threads = [threading.Thread(target=take, args=(place,), daemon=True) for place in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return [found[place] for place in range(size)]


def test_processes_never_see_what_those_before_them_left_in_the_store():
    """Three places, then two of which the third had asked and was killed: the same store, new names."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    before = agree(server, 3)
    before[1].set("address", "of a process that is gone")
    server.set("question_1", "of another that was killed before its answer")
    now = agree(server, 2)
    assert not now[1].check(["address"])
    now[0].set("address", "new")
    assert now[1].get("address") == b"new"
    assert before[2].get("address") == b"of a process that is gone"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_evaluation_on_two_processes_has_each_image_once(finished, data, tmp_path):
    """19 images, which two processes cannot halve: the same detections as by one, bit for bit."""
    document = json.loads((data / "shapes" / "val.json").read_text())
    left_out = document["images"].pop()["id"]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != left_out]
    (tmp_path / "val.json").write_text(json.dumps(document))
    common = [str(finished / "checkpoints" / "last.pt"), "test.images_per_batch=1"]
    common += [f"data.val={tmp_path / 'val.json'}"]
    run_verb("evaluate", [*common, f"output={tmp_path / 'one'}"])
    command = [*torchrun(2), str(REPOSITORY / "evaluate.py"), *common, f"output={tmp_path / 'two'}"]
    subprocess.run(command, check=True, env=environment(), timeout=600)
    one, two = (Detections.load(tmp_path / name / "detections.npz") for name in ("one", "two"))
    assert len(one) > 100
    for column in ("image_id", "category_id", "score", "bbox"):
        np.testing.assert_array_equal(getattr(one, column), getattr(two, column), err_msg=column)
    evals = [RunFolder(tmp_path / name).read_result() for name in ("one", "two")]
    assert evals[0] == evals[1]


def test_two_runs_are_the_same_for_any_number_of_loader_processes(finished, data, tmp_path):
    for workers in (0, 1, 3):
        arguments = ["--config", CONFIG, *SHORT, f"data.root={data}", f"output={tmp_path / str(workers)}"]
        arguments += [f"regions.file={finished / 'regions.npy'}", f"data.workers={workers}"]
        torch.manual_seed(workers)  # what others drew before changes nothing
        run_verb("train", [*arguments, "regions.detector=null"])
    for workers in (1, 3):
        assert_same_training(tmp_path / str(workers), tmp_path / "0")
