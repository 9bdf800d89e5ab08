"""What gpu.py runs, one part a process: python benchmarks/gpu_parts.py PART FOLDER DEVICE [--tiny].

Each result is a line of FOLDER/part_X.jsonl as soon as it is known. ``"ok": false`` in a line says that what
the line is about is not as promised.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import operator
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectors
import faults
import gpu
import inference
import loader
import numpy as np
import region_search
import step
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity
from torchvision.io import encode_jpeg

from clis import distributed
from clis.cli import is_out_of_memory, run_command
from clis.commands import run_verb
from clis.data.batch import Batch
from clis.data.categories import Category
from clis.data.loader import MicroBatches, train_loader
from clis.data.sampling import JointSampler, UniformSampler
from clis.data.shapes import write_shapes
from clis.engine.checkpoint import detector_state, load_detector
from clis.engine.optim import autocast, make_optimizer, make_scaler
from clis.engine.train import global_normalizers, train_step
from clis.models import CLISDetector, build_model

REPOSITORY = Path(__file__).resolve().parents[1]
PRECISIONS = {
    "float32": ("float32", False),
    "TF32": ("float32", True),
    "bfloat16": ("bfloat16", False),
    "float16": ("float16", False),
}
"""By name: `train.precision`, and whether float32 products may take TF32."""
CONFIG = str(REPOSITORY / "configs" / "shapes" / "clis.yaml")
FULL_CLIS = ("clis.s=16", "clis.t=2")
DETERMINISTIC = (
    "import sys, torch; torch.use_deterministic_algorithms(True); from clis.cli import run_command; "
    "from clis.commands import run_verb; run_command(lambda: run_verb('train', sys.argv[1:]))"
)
"""train.py with deterministic algorithms, for `python -c`."""


@dataclass(frozen=True)
class Scale:
    """How large the detectors, images and measurements are."""

    size: tuple[int, int] = detectors.SIZE
    mosaic: int = detectors.MOSAIC
    classes: int = step.CLASSES
    overrides: tuple[str, ...] = ()
    """Of the paper's recipe."""
    peer: tuple[tuple[str, int], ...] = ()
    """Options of torchvision's detector."""
    repeats: int = 8
    most_images: int = 1024
    workers: tuple[int, ...] = (8, 16)
    items: int = 320
    """Work items that the loader is timed with."""


TINY = Scale(
    size=(96, 128),
    mosaic=64,
    classes=20,
    overrides=(
        "model.backbone={name: resnet10, width: 16, fpn_channels: 32}", "model.roi.fc_dim=32",
        "model.rpn.proposals=50", "model.roi.samples=64", "clis.queue_size=512",
        "test={short_side: 96, max_size: 128}",
    ),
    peer=(
        ("min_size", 96), ("max_size", 128), ("rpn_post_nms_top_n_train", 50),
        ("rpn_post_nms_top_n_test", 50), ("box_batch_size_per_image", 16),
    ),
    repeats=1,
    most_images=2,
    workers=(1, 2),
    items=6,
)  # fmt: skip


class Run:
    """One part: where it runs, how large, and where its rows go."""

    def __init__(self, key: str, out: Path, device: str, tiny: bool) -> None:
        self.work, self.device, self.tiny = out.resolve() / gpu.WORK, device, tiny
        self.work.mkdir(parents=True, exist_ok=True)
        self.scale = TINY if tiny else Scale()
        self.rows = out.resolve() / f"part_{key}.jsonl"
        self.is_cuda = device.startswith("cuda")

    def row(self, name: str, **figures: Any) -> None:
        """Write a result."""
        line = json.dumps({"row": name, **figures})
        with self.rows.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def overrides(self, *more: str) -> tuple[str, ...]:
        return (*self.scale.overrides, *more)

    def batch(self, s: int, t: int, images: int = 1) -> Batch:
        scale = self.scale
        return detectors.make_batch(s, t, scale.classes, self.device, images, scale.size, scale.mosaic)

    def detector(self, *overrides: str) -> CLISDetector:
        return detectors.make_detector(self.scale.classes, *self.overrides(*overrides), device=self.device)

    def milliseconds(self, variant: Callable[[], object], repeats: int | None = None) -> dict[str, float]:
        """The median time of a variant, its least and its most, and the peak of memory in GB.

        On the CPU the peak is that of the process so far.
        """
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        variant()
        seconds = detectors.take_turns({"": variant}, repeats or self.scale.repeats, self.device)[""]
        peak = torch.cuda.max_memory_allocated() if self.is_cuda else 1e3 * detectors._peak_kilobytes()
        figures = [1e3 * each(seconds) for each in (statistics.median, min, max)]
        return dict(zip(("ms", "least", "most"), figures)) | {"peak GB": peak / 1e9}

    def in_turns(self, variants: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
        """Time variants in turns; return the figures of each, with its ratios to those before it.

        The peak of memory is of one run beyond what lies there before it, all models among it; on the CPU it
        is that of the process so far. A ratio is the median of those of the turns, with least and most.
        """
        figures: dict[str, dict[str, Any]] = {}
        for name, variant in variants.items():
            variant()  # optimizers and caches are made in the first run
            before = 0
            if self.is_cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            variant()
            peak = torch.cuda.max_memory_allocated() if self.is_cuda else 1e3 * detectors._peak_kilobytes()
            figures[name] = {"peak GB": (peak - before) / 1e9}
        seconds = detectors.take_turns(variants, self.scale.repeats, self.device)
        for place, (name, own) in enumerate(seconds.items()):
            times = [1e3 * each(own) for each in (statistics.median, min, max)]
            figures[name] |= dict(zip(("ms", "least", "most"), times)) | {"images/s": 1e3 / times[0]}
            for other in list(seconds)[:place]:
                ratios = [value / reference for value, reference in zip(own, seconds[other])]
                figures[name][f"to {other}"] = [each(ratios) for each in (statistics.median, min, max)]
        return figures

    def free(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 convolutions and matrix products may take TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# a ------------------------------------------------------------------------------------------------------


def device_tests(run: Run) -> None:
    """The tests marked device; `--tiny` leaves out the many of every switch, which pytest runs anyway.

    Counted as they end, so that a part that is cut off reports those that it finished.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-v",
        "-m",
        "device",
    ]
    command += ["tests/test_device.py", *(["-k", "not TestTraining"] if run.tiny else [])]
    environment = {**os.environ, "CLIS_TEST_DEVICE": run.device, "PYTHONUNBUFFERED": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut off"))
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    ended: dict[str, str] = {}
    reasons: dict[str, str] = {}
    try:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if (found := re.match(r"(tests/.*) (PASSED|FAILED|ERROR|SKIPPED)", line)) is not None:
                ended[found[1]] = found[2]
            elif (found := re.match(r"(?:FAILED|ERROR) (tests/.*?) - (.*)", line)) is not None:
                reasons[found[1]] = found[2]
    finally:
        process.kill()
        counts = Counter(ended.values())
        bad = [name for name, outcome in ended.items() if outcome in ("FAILED", "ERROR")]
        whole = process.wait() == 0
        what = "" if whole or bad else "cut off, or not started: see the log (is pytest installed?)"
        run.row(
            "tests", ok=whole and not bad, passed=counts["PASSED"], failed=len(bad),
            skipped=counts["SKIPPED"], what=what,
        )  # fmt: skip
        for name in bad:
            run.row(name.rpartition("::")[2], ok=False, what=reasons.get(name, ""))


# b ------------------------------------------------------------------------------------------------------


def first_command(run: Run) -> None:
    """`python train.py --config configs/shapes/clis.yaml`, stage by stage."""
    folder, words = run.work / "first", [f"train.device={run.device}", "data.workers=4"]
    if run.tiny:
        words += [*small_words(run), "data.workers=1", "train.steps=4", "train.eval_every=null"]
    else:
        words += [f"data.root={run.work / 'data'}"]
    command = [sys.executable, "train.py", "--config", "configs/shapes/clis.yaml", *words, f"output={folder}"]
    began = stage_began = time.monotonic()
    stage = "start"
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout or ():
        print(line, end="", flush=True)
        if (found := re.match(r"\d+/\d+ (.*)", line)) is not None:
            run.row(f"stage: {stage}", seconds=time.monotonic() - stage_began)
            stage, stage_began = found[1], time.monotonic()
    run.row(f"stage: {stage}", seconds=time.monotonic() - stage_began)
    if process.wait() != 0:
        raise RuntimeError(f"the command failed with {process.returncode}")
    for name, each in (("baseline", folder / "detector"), ("CLIS", folder)):
        metrics = json.loads((each / "eval.json").read_text())
        records = [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        times = {
            key: 1e3 * statistics.mean(record[key] for record in records if key in record)
            for key in ("compute_time", "data_time")
        }
        figures = {key: 100 * max(0, metrics[key]) for key in ("AP", "APr", "APc", "APf")}
        run.row(
            name, **figures, **{"step ms": times["compute_time"], "waiting ms": times["data_time"]},
            **{"peak GB": records[-1].get("peak_memory")},
        )  # fmt: skip
    run.row("all", seconds=time.monotonic() - began)


def small_words(run: Run) -> list[str]:
    """A small form of the embedded benchmark, written once, and a short recipe for it."""
    data = run.work / "small"
    if not (data / "shapes").exists():
        write_shapes(data / "shapes", faults.DATA)
    return [*faults.SHORT, f"data.root={data}", f"train.device={run.device}"]


# c ------------------------------------------------------------------------------------------------------


def paper_size(run: Run) -> None:
    """Steps and inference of ours and of torchvision's detector in both layouts, in turns, by precision."""
    for what, prepare in (("step", steps_at_the_papers_size), ("inference", inference_at_the_papers_size)):
        variants = prepare(run)
        for name, (precision, allowed) in PRECISIONS.items():
            ours_alone = run.tiny and name == "float16"  # torchvision's takes ten times as long on a CPU
            tried = {
                who: make(precision)
                for who, make in variants.items()
                if not (ours_alone and who.startswith("torchvision"))
            }
            with tf32(allowed):
                for who, figures in run.in_turns(tried).items():
                    run.row(f"{what}, {who}, {name}", **figures)
            del tried
        del variants
        run.free()


def steps_at_the_papers_size(run: Run) -> dict[str, Callable[[str], Callable[[], object]]]:
    """Training steps by the detector, each made for a precision."""
    plain = run.batch(0, 0)

    def torchvision(layout: torch.memory_format) -> Callable[[str], Callable[[], object]]:
        peer = detectors.make_peer(run.scale.classes, run.device, **dict(run.scale.peer))
        return lambda precision: step.torchvision_step(run.device, layout, precision, peer, plain)

    def ours(overrides: Sequence[str], batch: Batch) -> Callable[[str], Callable[[], object]]:
        model = run.detector(*overrides)
        return lambda precision: step.our_step(
            run.device, *run.overrides(*overrides, f"train.precision={precision}"), model=model, batch=batch
        )

    return {
        "torchvision": torchvision(torch.contiguous_format),
        "torchvision in channels_last": torchvision(torch.channels_last),
        "baseline": ours(("clis=off",), plain),
        "CLIS": ours(FULL_CLIS, run.batch(16, 2)),
    }


def inference_at_the_papers_size(run: Run) -> dict[str, Callable[[str], Callable[[], object]]]:
    """Inference on peaked scores by the detector, each made for a precision."""
    classes, plain = run.scale.classes, run.batch(0, 0)

    def under_autocast(detect: Callable[[], object]) -> Callable[[str], Callable[[], object]]:
        def of_precision(precision: str) -> Callable[[], object]:
            def inferred() -> object:
                with autocast(precision, torch.device(run.device)):
                    return detect()

            return inferred

        return of_precision

    def torchvision(layout: torch.memory_format) -> Callable[[], object]:
        return inference.torchvision_inference(
            inference.PEAKED, run.device, layout, classes, plain, **dict(run.scale.peer)
        )

    def ours(*overrides: str) -> Callable[[], object]:
        return inference.our_inference(
            inference.PEAKED, run.device, *run.overrides(*overrides), classes=classes, batch=plain
        )

    made = {
        "torchvision": torchvision(torch.contiguous_format),
        "torchvision in channels_last": torchvision(torch.channels_last),
        "baseline": ours("clis=off"),
        "CLIS": ours("clis.s=0", "clis.t=0", "clis.contrastive=false"),
    }
    return {who: under_autocast(detect) for who, detect in made.items()}


# d ------------------------------------------------------------------------------------------------------


def paper_tables(run: Run) -> None:
    """Seconds a step by s and t, beside those of the paper's V100s, and of every classification loss.

    Each takes turns with s = 0, or with cross-entropy.
    """
    paper = {**step.PAPER["s"], **step.PAPER["t"]}

    def of_parts(s: int, t: int) -> Callable[[str], Callable[[], object]]:
        overrides, batch = step.parts(s, t), run.batch(s, t)
        model = run.detector(*overrides)
        return lambda precision: step.our_step(
            run.device, *run.overrides(*overrides, f"train.precision={precision}"), model=model, batch=batch
        )

    reference = of_parts(0, 0)
    for (s, t), paper_seconds in paper.items():
        variant = reference if (s, t) == (0, 0) else of_parts(s, t)
        row: dict[str, Any] = {}
        for name in ("float32", "TF32", "bfloat16"):
            precision, allowed = PRECISIONS[name]
            both = {"s=0": reference(precision)}
            if variant is not reference:
                both["own"] = variant(precision)
            with tf32(allowed):
                figures = list(run.in_turns(both).values())[-1]
            row |= {f"{name} ms": figures["ms"], f"{name} to s=0": figures.get("to s=0", 1.0)}
            del both
        paper_row = {"paper's V100 ms": 1e3 * paper_seconds, "paper's to s=0": paper_seconds / paper[0, 0]}
        run.row(step._pair(s, t), **row, **paper_row)
        del variant
        run.free()
    del reference

    batch = run.batch(0, 0)

    def of_loss(options: Sequence[str]) -> Callable[[], object]:
        overrides = ("clis=off", *options)
        model = run.detector(*overrides)
        return step.our_step(run.device, *run.overrides(*overrides), model=model, batch=batch)

    (first, options), *others = step.LOSSES.items()
    cross_entropy = of_loss(options)
    for name, options in others:
        with tf32(False):
            figures = run.in_turns({first: cross_entropy, name: of_loss(options)})
        row = {f"float32 to {first}": figures[name][f"to {first}"], f"{first} ms": figures[first]["ms"]}
        run.row(f"loss: {name}", **{"float32 ms": figures[name]["ms"]}, **row)
        run.free()


# e ------------------------------------------------------------------------------------------------------


def equal_bits(run: Run) -> None:
    """Trainings with deterministic algorithms: short ones, twice and resumed; steps at the paper's size."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
    words = [*small_words(run), "train.steps=30", "regions.rule=center", "regions.detector=null"]
    folders = {name: run.work / "bits" / name for name in ("reference", "again", "resumed")}
    start = [sys.executable, "-c", DETERMINISTIC, "--config", CONFIG]
    commands = {name: [*start, *words, f"output={folder}"] for name, folder in folders.items()}
    began = time.monotonic()
    logs = {name: folder.with_suffix(".log") for name, folder in folders.items()}
    processes = {name: faults.start(command, logs[name]) for name, command in commands.items()}
    stopped = faults.Run(folders["resumed"])
    if faults.wait_until(lambda: stopped.step() >= 12, processes["resumed"]):
        processes["resumed"].send_signal(signal.SIGTERM)
    codes = {name: process.wait() for name, process in processes.items()}
    at = stopped.step()
    if codes["resumed"] == 75:  # stopped on request, and saved
        faults.run_to_the_end(commands["resumed"], logs["resumed"])
    if codes["reference"] != 0:
        raise RuntimeError(logs["reference"].read_text()[-600:])
    seconds = time.monotonic() - began
    reference = faults.Run(folders["reference"])
    for name, title in (("again", "two runs of 30 steps"), ("resumed", "a resumed run beside them")):
        found = faults.differences(faults.Run(folders[name]), reference)
        what = ", ".join(found) or "equal: weights, queue, momentum copy, optimizer, metrics, results"
        more = {"stopped at": at} if name == "resumed" else {}
        run.row(
            title,
            ok=not found and (name != "resumed" or codes[name] == 75),
            what=what,
            seconds=seconds,
            **more,
        )
    paper_size_bits(run)


def paper_size_bits(run: Run) -> None:
    """Hash the gradients, which SGD's momentum holds, and the whole model after a few steps."""
    batch, states, figures = run.batch(16, 2), [], {}
    config = detectors.paper_config(
        *run.overrides(*FULL_CLIS), "train.images_per_step=1", "optim.clip_norm=1"
    )
    for deterministic in (False, True, True):
        model = run.detector(*FULL_CLIS).train()
        optimizer, scaler = make_optimizer(model, config), make_scaler(config, torch.device(run.device))
        normalizers = global_normalizers(batch.counts, config)
        variant = functools.partial(
            train_step, model, model, optimizer, scaler, [batch], normalizers, 1e-3, 0.5, config
        )
        torch.use_deterministic_algorithms(deterministic)
        try:
            figures[deterministic] = run.milliseconds(variant, repeats=2)
        finally:
            torch.use_deterministic_algorithms(False)
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        for place, moments in enumerate(optimizer.state.values()):
            state[f"momentum {place}"] = moments["momentum_buffer"].cpu()
        states.append(state)
        del model, optimizer, variant
        run.free()
    _, one, other = states
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    run.row(
        "the paper's size, two trainings", ok=not different,
        what=f"different: {', '.join(different[:5])}" if different else "equal weights, queue and gradients",
        **{"ms without": figures[False]["ms"]}, **figures[True],
    )  # fmt: skip


# f ------------------------------------------------------------------------------------------------------


FAILURE = "it fails as it should"
ENDED = 120.0
"""Seconds within which all processes have to end when one fails."""


def processes(run: Run) -> None:
    """Under torchrun: one process with nccl, two where there are two GPUs; two with gloo on the CPU."""
    count = min(2, torch.cuda.device_count()) if run.is_cuda else 2
    small_words(run)  # the data, once

    def start(part: str, **options: Any) -> subprocess.CompletedProcess:
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0", str(Path(__file__)), part, str(run.rows.parent), run.device,
            *(["--tiny"] if run.tiny else []),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=REPOSITORY, env=environment, **options)

    start("f-process", check=True)
    if count == 1:
        run.row("one process fails", what="not tried: it needs two GPUs")
        return
    began = time.monotonic()
    try:
        failed = start("f-failing", capture_output=True, text=True, timeout=ENDED)
        ok = failed.returncode != 0 and FAILURE in failed.stderr
    except subprocess.TimeoutExpired:  # torchrun was killed, and its processes hang
        subprocess.run(["pkill", "-9", "-f", "gpu_parts.py f-failing"], check=False)
        ok = False
    what = "the error is reported, and every process ends"
    run.row("one process fails", ok=ok, what=what, seconds=time.monotonic() - began)


def failing_process(run: Run) -> None:
    """The last process fails where the others wait for it in a reduction on the device."""
    device = distributed.choose_device("auto" if run.is_cuda else run.device)

    def fail() -> None:
        with distributed.process_group(device):
            dist.all_reduce(torch.ones(2, device=device))
            if distributed.rank() == distributed.world_size() - 1:
                raise ValueError(FAILURE)
            total = torch.ones(2, device=device)
            dist.all_reduce(total)
            total.tolist()

    run_command(fail)


def one_of_the_processes(run: Run) -> None:
    """What each process of part f does."""
    run.rows = run.rows.with_name("part_f.jsonl")
    device = distributed.choose_device("auto" if run.is_cuda else run.device)
    if int(os.environ["WORLD_SIZE"]) == 1:  # which is without a group elsewhere
        dist.init_process_group("cpu:gloo,cuda:nccl" if run.is_cuda else "gloo")
    with distributed.process_group(device):
        _collectives(run, device)
        _ddp(run, device)
        _train_on_all(run)
    if dist.is_initialized():
        dist.destroy_process_group()


def _collectives(run: Run, device: torch.device) -> None:
    rank, size = distributed.rank(), distributed.world_size()
    rows = torch.arange(3.0, device=device).repeat(rank + 1, 1) + rank
    expected = torch.cat([torch.arange(3.0).repeat(other + 1, 1) + other for other in range(size)])
    gathered = distributed.gather_rows(rows.cpu())
    checks = {
        "all_gather_rows": torch.equal(distributed.all_gather_rows(rows).cpu(), expected),
        "no rows": len(distributed.all_gather_rows(rows[:0])) == 0,
        "gather_rows": rank > 0 or torch.equal(gathered, expected),
        "all_reduce_sum": distributed.all_reduce_sum(torch.ones(2, device=device)).tolist() == [size] * 2,
        "on the CPU": distributed.all_reduce_sum(torch.ones(2, dtype=torch.int64)).tolist() == [size] * 2,
        "from_all": distributed.from_all(rank) == list(range(size)),
        "from_main": distributed.from_main({"rank": rank}) == {"rank": 0},
    }
    distributed.barrier()
    keys = torch.zeros(64, 128, device=device)  # of two pairs an image on sixteen GPUs: both views
    gradient = torch.zeros(1_000_000 if run.tiny else 62_000_000, device=device)
    times = {
        "gather of keys, ms": run.milliseconds(lambda: distributed.all_gather_rows(keys))["ms"],
        f"sum of {4 * len(gradient) / 1e6:.0f} MB, ms": run.milliseconds(lambda: dist.all_reduce(gradient))[
            "ms"
        ],
    }
    wrong = [name for name, right in checks.items() if not right]
    if distributed.is_main():
        what = ", ".join(wrong) or ", ".join(checks)
        run.row(
            "collectives", ok=not wrong, processes=size, backend=str(dist.get_backend()), what=what, **times
        )


def _ddp(run: Run, device: torch.device) -> None:
    """The gradient in DDP beside that without it: the mean over equal batches is that of each."""
    batch, gradients = run.batch(16, 2).to(device), []
    for wrapped in (False, True):
        torch.manual_seed(0)
        config = detectors.paper_config(
            *run.overrides(*FULL_CLIS), f"train.images_per_step={distributed.world_size()}"
        )
        model = build_model(config, range(run.scale.classes)).to(device).train()
        detectors.draw_dense(model)
        network: nn.Module = model
        if wrapped and distributed.world_size() > 1:
            network = distributed.wrap_ddp(model, device)
        elif wrapped:  # which wrap_ddp leaves out for one process
            network = DistributedDataParallel(model, device_ids=[device] if run.is_cuda else None)
        normalizers = global_normalizers([each * distributed.world_size() for each in batch.counts], config)
        output = network(batch, normalizers)
        sum(config.loss.weights[name] * loss for name, loss in output.losses.items()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    plain, reduced = (torch.cat([each.flatten() for each in found]) for found in gradients)
    apart = ((reduced - plain).norm() / plain.norm()).item()
    if distributed.is_main():
        run.row(
            "DDP", ok=apart < 1e-3, what=f"its gradient is {apart:.1e} of the norm away from a single one's"
        )


def _train_on_all(run: Run) -> None:
    """A short training with its evaluation, by the command's own functions."""
    folder = run.work / "processes"
    words = [*small_words(run), "train.steps=8", "train.eval_every=4", "regions.rule=center"]
    device = "auto" if run.is_cuda else run.device
    began = time.monotonic()
    run_verb(
        "train",
        ["--config", CONFIG, *words, "regions.detector=null", f"train.device={device}", f"output={folder}"],
    )
    if distributed.is_main():
        images = len(set(np.load(folder / "detections.npz")["image_id"].tolist()))
        run.row(
            "training and evaluation", ok=images == faults.DATA.val_images, seconds=time.monotonic() - began,
            what=f"{faults.Run(folder).step()} steps, detections of {images} images",
        )  # fmt: skip


# g ------------------------------------------------------------------------------------------------------


def exported(run: Run) -> None:
    """`python -m clis export` on the device: the program's detections beside the detector's."""
    overrides = run.overrides(
        "clis.s=0", "clis.t=0", "clis.contrastive=false", f"model.roi.fc_cls_std={inference.PEAKED}"
    )
    categories = [
        Category(id=i + 1, name=f"class{i}", frequency="f", image_count=1) for i in range(run.scale.classes)
    ]
    torch.manual_seed(0)
    config = detectors.paper_config(*overrides)
    model = build_model(config, categories)
    detectors.draw_dense(model)
    checkpoint, out = run.work / "exported.pt", run.work / "exported.pt2"
    torch.save(detector_state(model, config), checkpoint)
    began = time.monotonic()
    size = [str(side) for side in run.scale.size]
    run_verb(
        "export",
        [str(checkpoint), str(out), "--candidates", "10000", "--size", *size, "--device", run.device],
    )
    seconds = time.monotonic() - began
    program = torch.export.load(out).module()
    detector = load_detector(checkpoint, run.device).to(memory_format=torch.contiguous_format)
    image = run.batch(0, 0).images[0]
    boxes, scores, labels = program(image)
    expected = detector.detect([image])[0]
    same = torch.equal(labels, expected.labels) and torch.allclose(boxes, expected.boxes, atol=0.01)
    run.row(
        "program", ok=same and torch.allclose(scores, expected.scores, atol=1e-5), detections=len(boxes),
        **{"export s": seconds, "program ms": run.milliseconds(lambda: program(image))["ms"]},
        **{"detector ms": run.milliseconds(lambda: detector.detect([image]))["ms"]},
    )  # fmt: skip


# h ------------------------------------------------------------------------------------------------------

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemsetAsync", "cudaMemcpyAsync")
WAITS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "torchvision::nms",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
)


def launches_and_loader(run: Run) -> None:
    images_per_second = profiled_steps(run)
    root = run.work / "photographs"
    write_photographs(root, 8 if run.tiny else 64)
    dataset = loader.make_dataset(root)
    index = loader.image_level_index(dataset)
    streams = UniformSampler(len(dataset.annotations), 1), UniformSampler(len(index), 2)
    items = run.scale.items
    sampler = JointSampler(*streams, 1, loader.S, seed=3)
    for workers in run.scale.workers:
        ahead = 2 * workers  # what is loaded before the first is asked for
        batches = MicroBatches(sampler, range(items + ahead), 0, 1, 1)
        iterator = iter(train_loader(dataset, batches, workers, run.is_cuda))
        for _ in range(ahead):
            next(iterator).to(torch.device(run.device))
        began = time.monotonic()
        for batch in iterator:
            batch.to(torch.device(run.device))
        rate = items / (time.monotonic() - began)
        run.row(
            f"loader, {workers} workers", **{"images/s": rate, "cores": os.cpu_count()},
            **{f"of the {name} step's": rate / value for name, value in images_per_second.items()},
        )  # fmt: skip
    photographs = region_search.Photographs(root / "imagenet_mini", 4 if run.tiny else 512)
    sizes = ("regions.short_side=64", "regions.max_size=96") if run.tiny else ()
    for name in ("TF32", "bfloat16"):
        precision, allowed = PRECISIONS[name]
        words = (*region_search.SEARCH, *sizes, f"data.workers={run.scale.workers[0]}")
        with tf32(allowed):
            search = region_search.search(photographs, run.device, *words, f"train.precision={precision}")
            (seconds,) = detectors.take_turns({"": search}, 1, run.device)[""]
        run.row(f"region search, {name}", ms=1e3 * seconds, **{"images/s": len(photographs) / seconds})
        del search
        run.free()


def profiled_steps(run: Run) -> dict[str, float]:
    """Launches, waits and the GPU's busy time of a CLIS step, and its images a second by precision."""
    batch, rates = run.batch(16, 2), {}
    model = run.detector(*FULL_CLIS)
    for name in ("float32", "TF32", "bfloat16"):
        precision, allowed = PRECISIONS[name]
        overrides = run.overrides(*FULL_CLIS, f"train.precision={precision}")
        with tf32(allowed):
            variant = step.our_step(run.device, *overrides, model=model, batch=batch)
            milliseconds = run.milliseconds(variant)["ms"]
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.is_cuda else [])]
            with torch.profiler.profile(activities=activities) as profile:
                variant()
                if run.is_cuda:
                    torch.cuda.synchronize()
        rates[name] = 1e3 / milliseconds
        averages = profile.key_averages()
        time_of = operator.attrgetter("self_device_time_total" if run.is_cuda else "self_cpu_time_total")
        for order in (operator.attrgetter("count"), time_of):
            print(f"{name}: how often, ms, what")
            for event in sorted(averages, key=order, reverse=True)[:40]:
                print(f"{event.count:6} {time_of(event) / 1e3:8.2f} {event.key[:90]}")
        counts = {event.key: event.count for event in averages}

        def counted(*starts: str, counts: dict[str, int] = counts) -> int:
            return sum(count for key, count in counts.items() if key.startswith(starts))

        busy = busy_milliseconds(profile) if run.is_cuda else None
        run.row(
            f"step, {name}", ms=milliseconds,
            **{"operators": counted("aten::", "torchvision::"), "launches": counted(*LAUNCHES)},
            **{key.split(":")[-1]: counts.get(key, 0) for key in WAITS},
            **{"to the host": counted("Memcpy DtoH")},
            **{"GPU busy ms": busy, "GPU idle": None if busy is None else max(0.0, 1 - busy / milliseconds)},
        )  # fmt: skip
    return rates


def busy_milliseconds(profile: torch.profiler.profile) -> float:
    """How long at least one kernel or copy ran on the GPU."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    )
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e3


def write_photographs(root: Path, count: int) -> None:
    """JPEGs of about the size of COCO's and ImageNet's, in the folders that loader.py reads."""
    generator = torch.Generator().manual_seed(0)

    def write(path: Path, height: int, width: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = torch.rand(1, 3, height // 16, width // 16, generator=generator)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
        grain = 0.12 * (torch.rand(3, height, width, generator=generator) - 0.5)
        pixels = (255 * (smooth + grain)).clamp(0, 255).to(torch.uint8)
        path.write_bytes(encode_jpeg(pixels, quality=85).numpy().tobytes())

    if root.exists():
        return
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number in range(count):
        name = f"{number:06}.jpg"
        write(root / "coco_mini" / "images" / name, 480, 640)
        images.append({"id": number + 1, "file_name": name, "height": 480, "width": 640})
        for place in range(10):
            box = [40.0 * place, 30.0 * place, 80.0, 60.0]
            box_of = {"image_id": number + 1, "category_id": place % 4 + 1, "iscrowd": 0}
            box_id = len(annotations) + 1
            annotations.append({"id": box_id, "bbox": box, "area": box[2] * box[3], **box_of})
    categories = [{"id": label + 1, "name": f"class{label}"} for label in range(4)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (root / "coco_mini" / "train.json").write_text(text)
    lines = ["wnid\tcategory"]
    for label in range(4):
        lines.append(f"n0000000{label}\tclass{label}")
        for number in range(count):
            write(root / "imagenet_mini" / "folders" / f"n0000000{label}" / f"{number}.jpg", 375, 500)
    (root / "imagenet_mini" / "wnid_to_category.tsv").write_text("\n".join(lines) + "\n")


# i ------------------------------------------------------------------------------------------------------


def largest_batches(run: Run) -> None:
    """Images a process by doubling, until they do not fit or the next doubling takes too long."""
    for name in ("bfloat16", "float32"):
        precision, allowed = PRECISIONS[name]
        overrides = run.overrides(*FULL_CLIS, f"train.precision={precision}")
        model = run.detector(*FULL_CLIS)

        def make(
            images: int, overrides: tuple[str, ...] = overrides, model: CLISDetector = model
        ) -> Callable[[], object]:
            return step.our_step(run.device, *overrides, model=model, batch=run.batch(16, 2, images))

        with tf32(allowed):
            _doubled(run, name, make)
        del model, make
        run.free()
    detector = run.detector(*FULL_CLIS, f"model.roi.fc_cls_std={inference.PEAKED}").eval()

    def detect(images: int) -> Callable[[], object]:
        batch = run.batch(0, 0, images).images
        return lambda: detector.detect(batch)

    with tf32(True):
        _doubled(run, "inference, TF32", detect, most=16)


def _doubled(run: Run, name: str, make: Callable[[int], Callable[[], object]], most: int = 1024) -> None:
    images, budget = 1, 6.0
    run.free()
    while images <= min(most, run.scale.most_images):
        began = time.monotonic()
        try:
            figures = run.milliseconds(make(images), repeats=2)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            run.row(f"{name}, {images} images", what="does not fit")
            return
        finally:
            run.free()
        figures["images/s"] = 1e3 * images / figures["ms"]
        run.row(f"{name}, {images} image{'s' * (images > 1)}", **figures)
        if run.is_cuda and 2 * (time.monotonic() - began) > budget:
            return
        images *= 2


PARTS: dict[str, Callable[[Run], None]] = {
    "a": device_tests,
    "b": first_command,
    "c": paper_size,
    "d": paper_tables,
    "e": equal_bits,
    "f": processes,
    "f-process": one_of_the_processes,
    "f-failing": failing_process,
    "g": exported,
    "h": launches_and_loader,
    "i": largest_batches,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("device")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, value in gpu.environment(
        arguments.out
    ).items():  # for what a part starts, if gpu.py did not start it
        os.environ[name] = value
    PARTS[arguments.part](Run(arguments.part, arguments.out, arguments.device, arguments.tiny))


if __name__ == "__main__":
    main()
