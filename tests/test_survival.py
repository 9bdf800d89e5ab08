"""A run that is stopped, killed or damaged goes on to the same end."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import CATEGORIES, global_counts, make_sample, tiny_config
from runs import BASELINE, CONFIG, REPOSITORY, SHORT, assert_same_training, records, spawn

import clis
from clis.atomic import atomic_write
from clis.cli import EXIT_CODE, Preempted, run_command
from clis.commands import run_verb
from clis.data import images
from clis.data.batch import collate
from clis.data.images import ImageError
from clis.distributed import choose_device, on_main, wrap_ddp
from clis.engine import train
from clis.engine.bad_images import BadImages
from clis.engine.checkpoint import load_checkpoint, load_last_checkpoint, save_checkpoint
from clis.engine.optim import make_optimizer
from clis.engine.preemption import ECHO
from clis.engine.run_folder import RunFolder
from clis.engine.skipped import NotFinite, SkippedSteps
from clis.models import build_model

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import faults
import gpu

STEPS = 30
COMMAND = [sys.executable, str(REPOSITORY / "train.py")]
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0", str(REPOSITORY / "train.py"),
]  # fmt: skip


def arguments_of(data: Path, output: Path, *more: str) -> list[str]:
    longer = [f"train.steps={STEPS}", "train.save_every=4", "train.keep_last=2"]
    return ["--config", BASELINE, *SHORT, *longer, f"data.root={data}", f"output={output}", *more]


STARTED: list[subprocess.Popen] = []


def start(arguments: list[str], launcher: list[str] = COMMAND, **options) -> subprocess.Popen:
    """The command in a process group of its own, with one thread for each process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [*launcher, *arguments], env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_outlives_its_test() -> Iterator[None]:
    """A training that a failed test left would take the time of those after it."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            gpu.kill_family(process)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until metrics.jsonl has the step."""
    until = time.monotonic() + 600
    while not (folder / "metrics.jsonl").exists() or len(records(folder)) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory) -> Path:
    """The uninterrupted run, by the same command as the others."""
    folder = tmp_path_factory.mktemp("reference")
    process = start(arguments_of(data, folder, "data.workers=1"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_asked_to_stop_it_finishes_the_step_and_goes_on(number, data, reference, tmp_path):
    """The whole group gets the signal, loader process included, as from a terminal or a batch system."""
    arguments = arguments_of(data, tmp_path, "data.workers=1")
    process = start(arguments)
    wait_for_step(tmp_path, 5, process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE, output
    assert "Traceback" not in output
    step = json.loads(RunFolder(tmp_path).preempted.read_text())["step"]
    assert 5 <= step < STEPS
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == step == len(records(tmp_path))
    process = start(arguments)
    output, _ = process.communicate(timeout=300)
    assert f"going on from step {step}" in output
    assert not RunFolder(tmp_path).preempted.exists()
    assert_same_training(tmp_path, reference)


@pytest.mark.slow
def test_a_later_signal_ends_at_once(data, tmp_path):
    """While a process is stuck in a step, the first changes nothing, nor does its echo: batch systems ask all
    processes, and torchrun asks its own again."""
    script = (
        "import sys, time; from clis.cli import run_command\n"
        "from clis.commands import run_verb; from clis.engine import train\n"
        "def stuck(*_): print('in the step', flush=True); time.sleep(60)\n"
        "train.train_step = stuck; run_command(lambda: run_verb('train', sys.argv[1:]))"
    )
    process = start(arguments_of(data, tmp_path), [sys.executable, "-c", script])
    while "in the step" not in process.stdout.readline():
        assert process.poll() is None
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
    time.sleep(ECHO + 3)  # a busy machine may have handled the first one late
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=50) == EXIT_CODE  # less than it is stuck for


@pytest.mark.slow
def test_under_torchrun_both_processes_stop_at_the_same_step(data, tmp_path):
    steps = 60  # passing it on takes a while
    arguments = arguments_of(data, tmp_path, f"train.steps={steps}")
    process = start(arguments, TORCHRUN)
    wait_for_step(tmp_path, 5, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    process.communicate(timeout=120)
    assert process.returncode != 0
    step = json.loads(RunFolder(tmp_path).preempted.read_text())["step"]  # torchrun hides the exit code
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == step < steps
    process = start(arguments, TORCHRUN)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert [record["step"] for record in records(tmp_path)] == list(range(1, steps + 1))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_anywhere_it_ends_the_same(processes, tmp_path):
    """A short form of the benchmark: each kind of `kill -9` once, for baseline and CLIS."""
    script = str(REPOSITORY / "benchmarks" / "faults.py")
    arguments = [f"--processes={processes}", f"--kills={3 + processes}", f"--out={tmp_path}"]
    result = subprocess.run(
        [sys.executable, script, *arguments, "model.roi.fc_dim=32", "model.backbone.fpn_channels=16"],
        capture_output=True, text=True, timeout=2400,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in result.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["baseline.yaml", "clis.yaml"]
    for row in rows:
        assert row[5] == "none"
        assert len(row[4].split()) >= 2 + processes  # one may come too late


def test_a_process_that_ended_by_itself_is_no_kill():
    """Between the listing of a run's processes and the kill, some of them or all may end."""
    ended, living = (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)
    )
    ended.communicate(timeout=30)
    assert faults.kill_one([ended.pid, living.pid], random.Random(0))
    assert living.wait(timeout=30) == -signal.SIGKILL
    assert not faults.kill_one([ended.pid, living.pid], random.Random(0))


@pytest.mark.slow
def test_a_killed_process_is_started_again_by_torchrun(data, tmp_path):
    launcher = [*TORCHRUN[:4], "--max-restarts=2", *TORCHRUN[4:]]
    process = start(arguments_of(data, tmp_path, "train.steps=60"), launcher)
    wait_for_step(tmp_path, 10, process)
    listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    children = [line.split() for line in listing.splitlines()]
    victim = next(int(pid) for pid, parent, *_ in children if parent == str(process.pid))
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "going on from step" in output
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 61))
    assert (tmp_path / "eval.json").exists()


def test_a_killed_loader_process_is_one_clear_error(data, tmp_path):
    process = start(arguments_of(data, tmp_path, "data.workers=1", "train.steps=500"))
    wait_for_step(tmp_path, 3, process)
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    pairs = [line.split() for line in listing.splitlines()]
    for pid, parent in pairs:
        if parent == str(process.pid):
            os.kill(int(pid), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: a loader process ended" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_go_away_leave_a_checkpoint_to_go_on_from(workers, data, reference, tmp_path):
    """The folder of the training images is renamed in mid-run, as a disk is unmounted, and comes back."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    arguments = arguments_of(root, tmp_path / "run", f"data.workers={workers}", "train.save_every=1000")
    process = start(arguments)
    wait_for_step(tmp_path / "run", 5, process)
    (root / "shapes" / "train").rename(root / "elsewhere")
    output, _ = process.communicate(timeout=120)
    step = len(records(tmp_path / "run"))
    assert process.returncode == 1, output
    assert "Traceback" not in output
    told = output[output.index("error: ") :]
    assert "could not be read; the last: " in told
    assert "No such file or directory" in told
    assert "; restore the images and re-run the same command to resume\n" in told
    assert f"; saving step {step}\n" in output
    (root / "elsewhere").rename(root / "shapes" / "train")
    output, _ = start(arguments).communicate(timeout=600)
    assert f"going on from step {step}" in output
    assert_same_training(tmp_path / "run", reference)


class TestCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path) -> RunFolder:
        """Two checkpoints of a small model, of steps 1 and 2."""
        self.config = tiny_config("train.keep_last=2")
        self.model = build_model(self.config, [])
        folder = RunFolder(tmp_path)
        for step in (1, 2):
            self.save(folder, step)
        return folder

    def save(self, folder: RunFolder, step: int) -> Path:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return save_checkpoint(
            folder, step, self.model, make_optimizer(self.model, self.config), scaler, self.config
        )

    def test_a_damaged_one_gives_way_to_the_one_before(self, folder, capsys):
        path = folder.checkpoint(2)
        path.write_bytes(path.read_bytes()[:-1000])  # last.pt is the same file
        state, used = load_last_checkpoint(folder)
        assert (state["step"], used.name) == (1, "step_00000001.pt")
        assert "WARNING" in (said := capsys.readouterr().out)
        assert "last.pt: not a readable checkpoint" in said

    def test_without_any_readable_one_nothing_starts_over_in_silence(self, folder):
        for path in folder.checkpoints.glob("*.pt"):
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"last\.pt: not a readable .*; remove .* to start"):
            load_last_checkpoint(folder)
        assert load_last_checkpoint(RunFolder(folder.path / "none")) is None

    def test_old_ones_go_and_names_are_in_order(self, folder):
        self.save(folder, 10)
        assert [path.name for path in folder.saved_checkpoints()] == ["last.pt", "step_00000002.pt"]

    def test_a_full_disk_is_told_and_loses_nothing(self, folder):
        """A limit on the size of files stands in for it."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"step_00000003\.pt: .*last good one is .*last\.pt"):
                self.save(folder, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert load_last_checkpoint(folder)[0]["step"] == 2
        assert len(list(folder.checkpoints.iterdir())) == 3  # no half file is left

    def test_a_read_only_folder_is_told(self, folder, monkeypatch):
        def denied(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(torch, "save", denied)
        with pytest.raises(OSError, match=r"could not be written .*Permission denied.* Make room or"):
            self.save(folder, 3)
        assert load_last_checkpoint(folder)[0]["step"] == 2

    def test_a_loader_lost_during_a_save_is_not_taken_for_a_full_disk(self, folder, monkeypatch):
        """torch raises it wherever the main process happens to be."""

        def lost(*_: object) -> None:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

        monkeypatch.setattr(torch, "save", lost)
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            self.save(folder, 3)
        assert load_last_checkpoint(folder)[0]["step"] == 2

    def test_loading_an_untrusted_one_runs_no_code(self, tmp_path):
        class Malicious:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'harm'}",)

        for name, save in (
            ("torch.pt", lambda path: torch.save({"format": 1, "model": Malicious()}, path)),
            ("pickle.pt", lambda path: path.write_bytes(pickle.dumps(Malicious()))),
        ):
            save(tmp_path / name)
            with pytest.raises(ValueError, match=rf"{name}: not a readable checkpoint"):
                load_checkpoint(tmp_path / name)
        assert not (tmp_path / "harm").exists()


@pytest.mark.slow
def test_evaluations_on_the_way_leave_the_training_alone(data, reference, tmp_path):
    process = start(arguments_of(data, tmp_path, "data.workers=1", "train.eval_every=10"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    evaluations = [record for record in records(tmp_path) if "AP" in record]
    assert [record["step"] for record in evaluations] == [10, 20]
    training = [record for record in records(tmp_path) if "AP" not in record]
    assert training == records(reference)
    best = load_checkpoint(tmp_path / "checkpoints" / "best.pt")["step"]
    aps = {record["step"]: record["AP"] for record in evaluations}
    assert best == max(aps, key=lambda step: (aps[step], -step))  # the first of equal ones
    saved = {path.name for path in (tmp_path / "checkpoints").glob("step_*.pt")}
    assert saved == {"step_00000028.pt", "step_00000030.pt"}


def test_saves_by_the_clock(data, tmp_path):
    """So few minutes are over at every step."""
    more = ["train.save_every=1000", "train.save_minutes=1e-9", "train.steps=3", "train.keep_last=10"]
    run_verb("train", arguments_of(data, tmp_path, *more))
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert names == [f"step_{step:08d}.pt" for step in (1, 2, 3)]


def test_a_skipped_step_is_counted_over_restarts(data, tmp_path, monkeypatch, capsys):
    """Steps 2 and 3 have no finite gradient; one is allowed, and the restart remembers it."""
    step = train.train_step
    calls = []

    def spoiled(network, model, *rest):
        calls.append(1)
        if len(calls) not in (2, 3):
            return step(network, model, *rest)
        kept = model.rpn.objectness.bias.detach().clone()
        model.rpn.objectness.bias.data.fill_(float("nan"))
        result = step(network, model, *rest)
        model.rpn.objectness.bias.data.copy_(kept)
        return result

    monkeypatch.setattr(train, "train_step", spoiled)
    more = ["train.on_nonfinite=skip", "train.max_skipped=1", "train.steps=4", "train.save_every=1"]
    with pytest.raises(FloatingPointError, match=r"step 3: not finite: .*checkpoint is .*last\.pt"):
        run_verb("train", arguments_of(data, tmp_path, *more))
    assert "step 2: not finite" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["skipped"] == 1
    calls[:] = [1, 1]
    with pytest.raises(FloatingPointError, match="step 3"):
        run_verb("train", arguments_of(data, tmp_path, *more))
    monkeypatch.undo()
    run_verb("train", arguments_of(data, tmp_path, *more))
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]


def one_rank_spoiled(rank: int, folder: Path) -> None:
    """Two processes; rank 1's item has a loss that is not finite."""
    config = tiny_config("train.images_per_step=2")
    torch.manual_seed(0)
    model = build_model(config, CATEGORIES)
    network = wrap_ddp(model, torch.device("cpu"))
    network.train()
    optimizer, scaler = make_optimizer(model, config), torch.amp.GradScaler("cpu", enabled=False)
    batch = collate([make_sample(seed=rank)])
    if rank == 1:
        forward = model.forward

        def infinite(*values):
            output = forward(*values)
            output.losses["box"] = output.losses["box"] + float("inf")  # its gradient is finite
            return output

        model.forward = infinite
    normalizers = train.global_normalizers(global_counts([batch]), config)
    _, norm = train.train_step(network, model, optimizer, scaler, [batch], normalizers, 0.1, 0.0, config)
    (folder / f"norm_{rank}").write_text(str(norm))


@pytest.mark.slow
def test_all_processes_find_the_same_gradient_not_finite(tmp_path):
    spawn(tmp_path, one_rank_spoiled, tmp_path)
    norms = [(tmp_path / f"norm_{rank}").read_text() for rank in (0, 1)]
    assert norms == ["nan", "nan"]


def found_on_rank_1(rank: int, folder: Path) -> None:
    """What rank 1 alone has met is said by both: rank 0 is the one that is heard."""
    config = tiny_config("train.on_nonfinite=stop").train
    steps = SkippedSteps(0, torch.amp.GradScaler("cpu", enabled=False), RunFolder(folder), config, "advice")
    own = NotFinite([], ["11", "34"]) if rank == 0 else NotFinite(["loss box on images 37"], ["28", "37"])
    with pytest.raises(FloatingPointError, match="step 3: not finite: loss box on images 37; "):
        steps.check(2, float("nan"), lambda: own, lambda: None)
    with pytest.raises(FloatingPointError, match="the gradient, images 11, 34, 28, 37; "):
        steps.check(2, float("nan"), lambda: own._replace(losses=[]), lambda: None)

    bad = BadImages(allowed=1)
    bad.new = ["a.jpg: cut off"]  # met by both
    assert bad.verdict() is None
    bad.new = ["b.jpg: cut off"] if rank == 1 else []
    assert str(bad.verdict()).startswith(
        "unreadable images: 2, and data.max_bad_images allows 1; the last: b."
    )
    bad.new, bad.gone = [], ImageError("c.jpg: no such file") if rank == 1 else None
    assert str(bad.verdict()).startswith("c.jpg: no such file; restore")


@pytest.mark.slow
def test_what_one_process_has_met_is_said_by_rank_0(tmp_path):
    spawn(tmp_path, found_on_rank_1, tmp_path)


class Local(ValueError):
    """Cannot be sent: it needs two arguments and holds a file."""

    def __init__(self, text: str, file: object) -> None:
        super().__init__(text)
        self.file = file


def failing_on_rank_0(rank: int, folder: Path) -> None:
    def fail() -> None:
        raise Local("no good", sys.stdin)

    with pytest.raises(Local if rank == 0 else RuntimeError, match="no good"):
        on_main(fail)


@pytest.mark.slow
def test_an_error_that_cannot_be_sent_is_raised_on_all_processes(tmp_path):
    spawn(tmp_path, failing_on_rank_0, tmp_path)


@pytest.mark.parametrize(
    ("function", "call", "step", "more"),
    [
        ("train_step", 2, 2, []),
        ("train_step", 2, 2, ["train.eval_every=2"]),
        ("train_step", 4, 4, []),
        ("evaluate_detector", 1, 2, ["train.eval_every=2"]),
        ("evaluate_detector", 1, 4, []),
    ],
)
def test_asked_to_stop_anywhere(function, call, step, more, data, tmp_path, monkeypatch):
    """In a step it ends after that, before any evaluation; in an evaluation, whichever, at once."""
    work, calls = getattr(train, function), []

    def asked(*values):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*values)

    def not_due(*values):
        raise AssertionError("an evaluation was begun")

    arguments = arguments_of(data, tmp_path, "train.steps=4", *more)
    with monkeypatch.context() as patch:
        if function == "train_step":
            patch.setattr(train, "evaluate_detector", not_due)
        patch.setattr(train, function, asked)
        with pytest.raises(Preempted, match="stopped on request"):
            run_verb("train", arguments)
    assert json.loads(RunFolder(tmp_path).preempted.read_text())["step"] == step == len(records(tmp_path))
    assert not RunFolder(tmp_path).result.exists()
    run_verb("train", arguments)
    assert RunFolder(tmp_path).result.exists()
    assert not RunFolder(tmp_path).preempted.exists()


def test_asked_to_stop_while_an_image_is_decoded(data, tmp_path, monkeypatch):
    """The search for regions ends, and takes the image for no unreadable one; then it is finished."""
    decode, calls = images.EncodedImage._decode_jpeg, []

    def asked(image):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(image)

    path = tmp_path / "regions.npy"
    arguments = [CONFIG, *SHORT, f"data.root={data}", "regions.rule=center", f"regions.file={path}"]
    arguments += ["data.max_bad_images=100", "regions.images_per_batch=4"]
    with monkeypatch.context() as patch:
        patch.setattr(images.EncodedImage, "_decode_jpeg", asked)
        with pytest.raises(Preempted, match="stopped on request"):
            run_verb("regions", arguments)
    assert not path.exists()
    run_verb("regions", arguments)
    assert json.loads(path.with_suffix(".json").read_text())["counts"] == {"rule": 100}


def test_what_a_stopped_run_names_helps(data, tmp_path, monkeypatch, capsys):
    """Step 3 is not finite: both steps before it are saved, and `train.on_nonfinite=skip` resumes there."""
    step, calls = train.train_step, []

    def spoiled(*values):
        calls.append(1)
        outputs, norm = step(*values)
        return outputs, float("nan") if len(calls) == 3 else norm

    monkeypatch.setattr(train, "train_step", spoiled)
    arguments = arguments_of(data, tmp_path, "train.steps=4", "train.save_every=1000")
    with pytest.raises(FloatingPointError, match=r"train\.on_nonfinite=skip"):
        run_verb("train", arguments)
    assert load_checkpoint(tmp_path)["step"] == 2
    calls[:] = [1, 1]
    run_verb("train", [*arguments, "train.on_nonfinite=skip"])
    said = capsys.readouterr().out
    assert "going on from step 2" in said
    assert "step 3: not finite" in said
    assert "step 3: not finite" in RunFolder(tmp_path).log.read_text()


def test_the_evaluation_at_the_end_of_a_training_that_is_extended_may_be_the_best(
    data, tmp_path, monkeypatch
):
    aps = iter([0.1, 0.3, 0.25])

    def evaluate(detector, config, folder, training):
        metrics = {"AP": next(aps), "APr": 0.0, "APc": 0.0, "APf": 0.0}
        with atomic_write(folder.result) as temporary:
            temporary.write_text(json.dumps(metrics))
        return metrics

    monkeypatch.setattr(train, "evaluate_detector", evaluate)
    arguments = arguments_of(data, tmp_path, "train.eval_every=3", "optim.decay_steps=[]")
    run_verb("train", [*arguments, "train.steps=4"])
    run_verb("train", [*arguments, "train.steps=5"])
    assert load_checkpoint(RunFolder(tmp_path).best)["step"] == 4


def test_a_full_disk_is_named(tmp_path):
    path = tmp_path / "there" / "a.json"
    with pytest.raises(OSError, match=r"No space left on device: .*there/a\.json"), atomic_write(path):
        raise OSError(28, "No space left on device")


def test_exit_codes(capsys):
    def preempted() -> None:
        raise Preempted("runs/x: asked to stop")

    with pytest.raises(SystemExit) as stop:
        run_command(preempted)
    assert stop.value.code == EXIT_CODE == 75
    assert "asked to stop" in capsys.readouterr().err


FAILING = """
import sys, time, torch
import torch.distributed as dist
from clis.cli import run_command
from clis.distributed import barrier, is_main, on_main, process_group

dist.destroy_process_group = lambda: time.sleep(600)  # as nccl's, which waits for the other process

def main():
    with process_group(torch.device("cpu")):
        barrier()
        if sys.argv[1] == "a mistake on one":
            if is_main():
                {}["key"]
            barrier()  # where the other waits
        elif sys.argv[1] == "an error on one":
            if is_main():
                raise ValueError("the disk is full")
            barrier()
        else:
            on_main(lambda: {}["key"])

run_command(main)
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("an error on one", "error: the disk is full"),
        ("a mistake on one", "KeyError: 'key'"),
        ("a mistake on rank 0", "KeyError: 'key'"),
    ],
)
def test_what_fails_on_one_process_is_reported_and_ends_them_all(what, said, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    process = start([what], [*TORCHRUN[:-1], str(tmp_path / "failing.py")])
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert said in output


def test_warnings_of_ours_are_one_line(capsys):
    """Those of others have their place."""

    def warn() -> None:
        warnings.warn_explicit("the cache is damaged", UserWarning, str(Path(clis.__file__)), 1)
        warnings.warn_explicit("of another", UserWarning, "elsewhere.py", 7)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run_command(warn)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "WARNING: the cache is damaged"
    assert said[1].startswith("elsewhere.py:7: UserWarning: of another")


def test_a_process_that_fails_ends_although_its_loaders_outlive_signals(data, tmp_path):
    """The error is raised with a batch on its way, and its traceback is kept, as pytest keeps it."""
    script = (
        "import sys; from clis.commands import run_verb; from clis.data import sealed\n"
        "from clis.engine import train; sealed.GRACE = 600\n"
        "def fail(*_): raise ValueError('in the step')\n"
        "train.train_step = fail\n"
        "try: run_verb('train', sys.argv[1:])\n"
        "except ValueError as error: kept = error"
    )
    process = start(arguments_of(data, tmp_path, "data.workers=2"), [sys.executable, "-c", script])
    output, _ = process.communicate(timeout=300)  # less than the loaders' grace
    assert process.returncode == 0, output


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("killed", ["in the evaluation", "behind its file"])
def test_an_evaluation_that_was_cut_off_is_made_again(killed, data, reference, tmp_path, monkeypatch):
    """Step 10 is saved in front of it; record and best.pt are there in the end, and no step is made again."""
    arguments = arguments_of(data, tmp_path, "train.eval_every=10")
    evaluate = train.evaluate_detector

    def cut_off(detector, config, folder, training):
        if killed == "behind its file":
            evaluate(detector, config, folder, training)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "evaluate_detector", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_verb("train", arguments)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 10
    (tmp_path / "checkpoints" / ".step_00000010.1.tmp.pt").write_bytes(b"of a process that was killed")
    monkeypatch.undo()
    run_verb("train", arguments)
    evaluations = [record["step"] for record in records(tmp_path) if "AP" in record]
    assert evaluations == [10, 20]
    assert [r for r in records(tmp_path) if "AP" not in r] == records(reference)
    aps = {record["step"]: record["AP"] for record in records(tmp_path) if "AP" in record}
    best = load_checkpoint(tmp_path / "checkpoints" / "best.pt")["step"]
    assert best == max(aps, key=lambda step: (aps[step], -step))
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("name", ["xpu", "meta", "0", "gpu"])
def test_a_device_that_is_not_there_is_refused(name):
    """torch knows the names of some, and fails with the first tensor."""
    if name == "xpu" and torch.xpu.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=rf"train\.device={name}: cannot be used here; use auto, cpu, cuda"):
        choose_device(name)


def test_each_process_has_a_device_of_its_own(monkeypatch):
    """Of the devices that it sees; some launchers show each process its own alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for count, shown, device in ((4, "0,1,2,3", "cuda:3"), (1, "5", "cuda:0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert choose_device("auto") == choose_device("cuda") == torch.device(device)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ValueError, match=r"8 processes were started on this machine, .* --nproc_per_node 1"):
        choose_device("auto")
    with pytest.raises(ValueError, match=r"train\.device=cuda:0: the same device for 8 processes"):
        choose_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert choose_device("cuda:1") == torch.device("cuda:1")
