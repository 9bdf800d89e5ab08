"""Killed at random moments and started again: does the run end as if nothing had happened?

    python benchmarks/faults.py [--processes 1 2] [--kills 20] [--seed 0] [--out FOLDER] [key=value ...]

For baseline and CLIS a short run on a small form of the embedded benchmark is made once without a
disturbance, then again with `kill -9` at random steps all along it, each followed by the same command. The
kinds of kills take turns: the whole process group within a step, while a checkpoint is written, or during an
evaluation; a single loader process, and a single worker of torchrun, after which the run has to end by
itself. Compared bit for bit: weights, queue, momentum copy, optimizer, eval.json, and metrics.jsonl without
its time fields. Exits with 1 if anything differs.
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
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from clis.data.shapes import ShapesSpec, write_shapes
from clis.engine.checkpoint import load_checkpoint
from clis.engine.log import TIME_FIELDS
from clis.engine.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = ShapesSpec(
    image_size=48, train_images=200, val_images=40, image_level_size=48, image_level_per_class=4
)
STEPS_PER_KILL = 8
EVAL_EVERY = 10
SHORT = [
    "data.generate=null", "data.workers=1", "train.device=cpu", "train.save_every=7", "train.log_every=1",
    f"train.eval_every={EVAL_EVERY}", "optim.warmup_steps=10", "model.backbone.width=16",
    "data.short_sides=[48,64]", "data.mosaic_size=64", "data.paste_size=[10,24]", "test.short_side=48",
]  # fmt: skip
PATIENCE = 600
"""Seconds for a start to reach its kill, or to end by itself after one."""


def command(config: str, processes: int, overrides: Sequence[str]) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-backend=c10d"]
        start += ["--rdzv-endpoint=localhost:0"]
    script = [str(REPOSITORY / "train.py"), "--config", str(REPOSITORY / "configs" / "shapes" / config)]
    return [*start, *script, *SHORT, *overrides]


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        return subprocess.Popen(
            arguments, env=environment, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
        )


def run_to_the_end(arguments: Sequence[str], log: Path) -> None:
    if start(arguments, log).wait() != 0:
        raise RuntimeError(f"the run failed: {' '.join(arguments)}\n{log.read_text()[-3000:]}")


def generations(leader: int) -> list[list[int]]:
    """Children of the process, their children, and so on, as far as they live."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True).stdout
    columns = [line.split() for line in listing.splitlines()]
    pairs = [(int(pid), int(parent)) for pid, parent, state in columns if not state.startswith("Z")]
    found = [[leader]]
    while found[-1]:
        found.append([pid for pid, parent in pairs if parent in found[-1]])
    return found[1:-1]


def kill_one(pids: Sequence[int], generator: random.Random) -> bool:
    """Kills one of the processes; False if all have ended since they were listed."""
    for pid in generator.sample(pids, len(pids)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it ended by itself, as the loaders of a run that ends do
            continue
        return True
    return False


def wait_until(happened: Callable[[], bool], process: subprocess.Popen) -> bool:
    """Looks every millisecond; False if the run ended first."""
    until = time.monotonic() + PATIENCE
    while not happened():
        if process.poll() is not None:
            return False
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"nothing happened for {PATIENCE} s: {process.args!r}")
        time.sleep(0.001)
    return True


class Run:
    """A run folder as one sees it from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self) -> list[dict]:
        """metrics.jsonl without its time fields; a line that is being written is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [{k: v for k, v in json.loads(line).items() if k not in TIME_FIELDS} for line in lines]

    def step(self) -> int:
        records = self.records()
        return records[-1]["step"] if records else 0

    def temporaries(self) -> set[str]:
        """Checkpoints that are being written, or were when their process was killed."""
        return {path.name for path in (self.folder / "checkpoints").glob(".*.tmp*")}

    def is_evaluating(self) -> bool:
        """Between the step before an evaluation and its record, or after the last step."""
        records = self.records()
        return bool(records) and records[-1]["step"] % EVAL_EVERY == 0 and "AP" not in records[-1]


def disturb(
    arguments: Sequence[str], run: Run, kind: str, step: int, generator: random.Random, log: Path
) -> bool:
    """Starts the run and kills it at the step, or at its next if it is beyond; False if it ended first."""
    step = max(step, run.step() + 1)
    leftovers = run.temporaries()
    process = start(arguments, log)
    moments = {"save": lambda: run.temporaries() - leftovers, "evaluation": run.is_evaluating}
    happens = moments.get(kind, lambda: True)
    if not wait_until(lambda: run.step() >= step and bool(happens()), process):
        return False
    if kind != "save":
        time.sleep(generator.uniform(0, 0.4))
    family = generations(process.pid)
    if not family:
        process.wait()
        return False
    if kind in ("step", "save", "evaluation"):
        os.killpg(process.pid, signal.SIGKILL)
    elif not kill_one(family[-1 if kind == "loader" else 0], generator):
        process.wait()
        return False
    wait_until(lambda: process.poll() is not None, process)
    for pid in (pid for generation in family for pid in generation):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return True


def differences(run: Run, reference: Run) -> list[str]:
    """What is not the same, bit for bit."""
    states = [load_checkpoint(each.folder / "checkpoints" / "last.pt") for each in (run, reference)]
    found = [key for key in states[1]["model"] if not torch.equal(*(state["model"][key] for state in states))]
    moments = [
        [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()] for state in states
    ]
    if len(moments[0]) != len(moments[1]) or not all(map(torch.equal, *moments)):
        found.append("optimizer")
    found += ["metrics.jsonl"] * (run.records() != reference.records())
    evals = [RunFolder(each.folder).read_result() for each in (run, reference)]
    return found + ["eval.json"] * (evals[0] != evals[1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="a new folder")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--configs", nargs="+", default=["baseline.yaml", "clis.yaml"])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    write_shapes(arguments.out / "shapes", DATA)
    print(
        "| run | processes | killed in | steps at the kills | differences |\n|---|---|---|---|---|",
        flush=True,
    )
    different = False
    for config in arguments.configs:
        for processes in arguments.processes:
            generator = random.Random(arguments.seed)
            reference, run = (
                Run(arguments.out / f"{config.removesuffix('.yaml')}_{processes}" / name)
                for name in ("reference", "run")
            )
            shared = [f"train.steps={STEPS_PER_KILL * arguments.kills}", *arguments.overrides]
            shared += [f"data.root={arguments.out.resolve()}"]
            if config == "clis.yaml":  # all from the center: regions of a detector are not the question here
                shared += ["regions.rule=center", "regions.detector=null"]
            commands = [
                command(config, processes, [*shared, f"output={each.folder}"]) for each in (reference, run)
            ]
            log = run.folder.with_name("output.txt")
            run_to_the_end(commands[0], log)
            steps = reference.step()
            kinds = ("step", "save", "evaluation", "loader", "worker")[: 5 if processes > 1 else 4]
            killed = []
            for number in range(arguments.kills):
                kind = kinds[number % len(kinds)]
                step = int((number + generator.random()) / arguments.kills * steps)
                if disturb(commands[1], run, kind, step, generator, log):
                    killed.append((kind, run.step()))
            run_to_the_end(commands[1], log)
            found = differences(run, reference)
            different |= bool(found)
            counts = ", ".join(f"{count} {kind}" for kind, count in Counter(k for k, _ in killed).items())
            places = " ".join(str(step) for _, step in killed)
            print(
                f"| {config} | {processes} | {counts} | {places} | {', '.join(found) or 'none'} |", flush=True
            )
    sys.exit(different)


if __name__ == "__main__":
    main()
