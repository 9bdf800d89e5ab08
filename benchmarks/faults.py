"""Killed at random moments and started again: does the run end as if nothing had happened?

    python benchmarks/faults.py [--processes 1 2] --data FOLDER [--kills 20] [--seed 0] [key=value ...]

FOLDER is a data root with the embedded benchmark (`python -m clis shapes FOLDER/shapes`). For baseline and
CLIS a short run is made once without a disturbance, then again with `kill -9` of the whole process group at
random moments (while it trains, saves, evaluates or writes), each start getting on by about one of `--kills`
parts; every second kill is of a single process of the group instead (a loader, or a worker under torchrun).
Compared bit for bit: weights, queue, momentum copy, optimizer, eval.json, and metrics.jsonl without its time
fields.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from clis.engine.checkpoint import load_checkpoint
from clis.engine.log import TIME_FIELDS

REPOSITORY = Path(__file__).resolve().parents[1]
SHORT = [
    "data.generate=null", "data.workers=1", "train.device=cpu", "train.steps=60", "train.save_every=7",
    "train.log_every=1", "train.eval_every=20", "optim.warmup_steps=10", "model.backbone.width=16",
]  # fmt: skip


def command(config: str, processes: int, overrides: Sequence[str]) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-backend=c10d"]
        start += ["--rdzv-endpoint=localhost:0"]
    script = [str(REPOSITORY / "train.py"), "--config", str(REPOSITORY / "configs" / "shapes" / config)]
    return [*start, *script, *SHORT, *overrides]


def start(arguments: Sequence[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def group(leader: int) -> list[int]:
    """Processes of the session that `leader` began, without the leader."""
    listing = subprocess.run(["ps", "-eo", "pid,sid"], capture_output=True, text=True).stdout
    pairs = [line.split() for line in listing.splitlines()[1:]]
    return [int(pid) for pid, session in pairs if int(session) == leader and int(pid) != leader]


def kill(process: subprocess.Popen, one: bool, generator: random.Random) -> None:
    """`one`: a single other process of the group, after which the start has to end by itself."""
    others = group(process.pid)
    if one and others:
        os.kill(generator.choice(others), signal.SIGKILL)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in group(process.pid):
        os.kill(pid, signal.SIGKILL)


def differences(folder: Path, reference: Path) -> list[str]:
    """What is not the same, bit for bit."""
    states = [load_checkpoint(each / "checkpoints" / "last.pt") for each in (folder, reference)]
    found = [key for key in states[1]["model"] if not torch.equal(*(state["model"][key] for state in states))]
    moments = [
        [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()] for state in states
    ]
    if len(moments[0]) != len(moments[1]) or not all(map(torch.equal, *moments)):
        found.append("optimizer")
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in TIME_FIELDS}
            for line in (each / "metrics.jsonl").read_text().splitlines()
        ]
        for each in (folder, reference)
    ]
    found += ["metrics.jsonl"] * (lines[0] != lines[1])
    evals = [(each / "eval.json").read_text() for each in (folder, reference)]
    return found + ["eval.json"] * (evals[0] != evals[1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="a new folder")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    print(
        "| run | processes | kills | steps kept at the kills | differences |\n|---|---|---|---|---|",
        flush=True,
    )
    for config in ("baseline.yaml", "clis.yaml"):
        for processes in arguments.processes:
            generator = random.Random(arguments.seed)
            folders = [arguments.out / f"{config}_{processes}" / name for name in ("reference", "run")]
            shared = [*arguments.overrides, f"data.root={arguments.data.resolve()}"]
            if config == "clis.yaml":  # all from the centre: regions of a detector are not the question here
                shared += ["regions.rule=center", "regions.detector=null"]
            commands = [command(config, processes, [*shared, f"output={folder}"]) for folder in folders]
            began = time.monotonic()
            process = start(commands[0])
            while not (folders[0] / "metrics.jsonl").exists() and process.poll() is None:
                time.sleep(0.05)
            startup = time.monotonic() - began
            if process.wait() != 0:
                raise RuntimeError(f"the undisturbed run failed: {' '.join(commands[0])}")
            part = (time.monotonic() - began - startup) / arguments.kills
            kept = []
            for number in range(arguments.kills):
                process = start(commands[1])
                time.sleep(startup + generator.uniform(-0.5, 2.5) * part)
                kill(process, number % 2 == 1, generator)
                last = folders[1] / "checkpoints" / "last.pt"
                kept.append(load_checkpoint(last)["step"] if last.exists() else 0)
            if start(commands[1]).wait() != 0:
                raise RuntimeError(f"the run failed after its kills: {' '.join(commands[1])}")
            found = ", ".join(differences(folders[1], folders[0])) or "none"
            steps = " ".join(map(str, kept))
            print(f"| {config} | {processes} | {arguments.kills} | {steps} | {found} |", flush=True)


if __name__ == "__main__":
    main()
