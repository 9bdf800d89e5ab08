"""The recipe and the loop: end to end, resumed, accumulated, on two processes, and what goes wrong."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CATEGORIES,
    LOSSES,
    QUICK,
    global_counts,
    make_batch,
    make_sample,
    normalizers_of,
    tiny_config,
)
from runs import (
    BASELINE,
    CONFIG,
    REPOSITORY,
    SHORT,
    assert_same_state,
    assert_same_training,
    records,
    spawn,
)
from torch import nn

from clis.commands import run_verb
from clis.config import LossConfig, OptimConfig
from clis.config_files import config_from_dict, load_config, merge_overrides
from clis.data.batch import Batch, collate
from clis.data.images import ImageError
from clis.distributed import all_reduce_sum, wrap_ddp
from clis.engine import checkpoint, prerequisites, train
from clis.engine.checkpoint import load_checkpoint, load_detector, load_model, resume, save_checkpoint
from clis.engine.describe import contrast_state, format_losses, summarize_step
from clis.engine.log import MetricsLog
from clis.engine.optim import learning_rate, make_optimizer, make_scaler, split_batch
from clis.engine.run_folder import RunFolder
from clis.engine.skipped import SkippedSteps
from clis.metric.detections import Detections
from clis.metric.lvis_eval import METRICS
from clis.models import CLISDetector, build_model
from clis.progress import Progress

CLIS_LOSSES = [name for name in LossConfig().weights if name != "pseudo"]  # which is of a teacher


class TestRecipe:
    def test_leaves_what_the_readme_says(self, finished):
        for folder in (finished, finished / "detector"):
            metrics = RunFolder(folder).read_result()
            assert tuple(metrics) == (*METRICS[:-1], "AR@20")  # recall says its own limit of detections
            assert all(-1 <= value <= 1 for value in metrics.values())
            assert len(Detections.load(folder / "detections.npz")) > 0
            assert [record["step"] for record in records(folder)] == [1, 2, 3, 4]
            assert (folder / "checkpoints" / "last.pt").samefile(folder / "checkpoints" / "step_00000004.pt")
        regions = np.load(finished / "regions.npy")
        assert len(regions) == 100  # two images of each of the 50 classes
        counts = json.loads((finished / "regions.json").read_text())["counts"]
        assert sum(counts.values()) == 100

    def test_the_baseline_has_no_trace_of_clis(self, finished):
        baseline, clis = (
            load_checkpoint(folder / "checkpoints" / "last.pt")["model"]
            for folder in (finished / "detector", finished)
        )
        extra = {key.split(".")[0] for key in clis} - {key.split(".")[0] for key in baseline}
        assert extra == {"contrastive", "image_classification"}
        assert not any("objectness" in key and not key.startswith("rpn") for key in baseline)

    def test_a_second_call_does_nothing_again(self, finished, data, capsys):
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.pt")}
        run_verb("train", ["--config", CONFIG, *SHORT, f"data.root={data}", f"output={finished}"])
        assert "is already finished" in capsys.readouterr().out
        assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.pt")}

    def test_nor_one_whose_regions_and_detector_were_removed(self, finished, data, tmp_path, capsys):
        """To free the disk: nothing needs them any more."""
        shutil.copytree(finished, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "detector")
        for path in (tmp_path / "run").glob("regions.*"):
            path.unlink()
        run_verb("train", ["--config", CONFIG, *SHORT, f"data.root={data}", f"output={tmp_path}/run"])
        said = capsys.readouterr().out
        assert "1/1 " in said
        assert f"{tmp_path}/run is already finished" in said
        assert not (tmp_path / "run" / "detector").exists()

    def test_another_config_may_not_have_the_folder(self, finished, data):
        with pytest.raises(ValueError, match=r"belongs to another config: optim.lr: 0.04 != 0.5"):
            run_verb(
                "train",
                ["--config", CONFIG, *SHORT, f"data.root={data}", f"output={finished}", "optim.lr=0.5"],
            )

    def test_evaluate_needs_only_the_checkpoint(self, finished, capsys):
        checkpoint = finished / "checkpoints" / "last.pt"
        run_verb("evaluate", [str(checkpoint)])
        again = RunFolder(finished / "checkpoints" / "last").read_result()
        assert again == RunFolder(finished).read_result()
        assert "| APr |" in capsys.readouterr().out.replace("  ", " ")

    def test_readme_example_runs(self, finished, data, monkeypatch, tmp_path, capsys):
        """The README's library example, in a folder laid out as after its first command."""
        text = (REPOSITORY / "README.md").read_text()
        example = text.split("```python\n", 1)[1].split("```", 1)[0]
        (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
        (tmp_path / "data").symlink_to(data)
        (tmp_path / "runs" / "shapes").mkdir(parents=True)
        (tmp_path / "runs" / "shapes" / "clis").symlink_to(finished)
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("CLIS_DATA", raising=False)
        exec(compile(example, "README.md", "exec"), {})
        boxes, rare = capsys.readouterr().out.strip().rsplit("\n", 1)
        assert boxes.startswith("tensor(")
        assert float(rare) == RunFolder(finished).read_result()["APr"]

    def test_missing_regions_without_a_detector(self, data, tmp_path):
        with pytest.raises(ValueError, match=r"regions.npy does not exist.*regions.detector"):
            run_verb(
                "train",
                [
                    "--config",
                    CONFIG,
                    *SHORT,
                    f"data.root={data}",
                    f"output={tmp_path}",
                    "regions.detector=null",
                ],
            )


class TestResume:
    @pytest.mark.parametrize("crash_at", [3, 4])
    def test_a_resumed_run_is_the_uninterrupted_one(self, finished, data, tmp_path, monkeypatch, crash_at):
        """Stopped in step 3, right after a checkpoint, or in step 4, when step 3 is logged but not saved."""
        arguments = ["--config", CONFIG, *SHORT, f"data.root={data}", f"output={tmp_path / 'run'}"]
        arguments += [f"regions.file={finished / 'regions.npy'}"]
        reference = tmp_path / "reference"
        run_verb("train", [*arguments[:-2], f"output={reference}", arguments[-1]])
        step, calls = train.train_step, []

        def crash(*values):
            calls.append(1)
            if len(calls) == crash_at:
                raise KeyboardInterrupt
            return step(*values)

        monkeypatch.setattr(train, "train_step", crash)
        with pytest.raises(KeyboardInterrupt):
            run_verb("train", arguments)
        monkeypatch.undo()
        run_verb("train", arguments)
        assert_same_training(tmp_path / "run", reference)

    def test_processes_that_see_another_checkpoint_do_not_go_on(self, finished, monkeypatch):
        """Rank 0 has read step 5; this process finds step 4 in the file, as NFS may show it."""
        folder = RunFolder(finished)
        config = folder.read_config()
        categories = checkpoint.saved_categories(load_checkpoint(folder.last))
        model = build_model(config, categories)
        optimizer, scaler = make_optimizer(model, config), make_scaler(config, torch.device("cpu"))
        assert resume(folder, model, optimizer, scaler, config) == (4, 0)
        monkeypatch.setattr(checkpoint, "on_main", lambda load: (folder.last, 5))
        with pytest.raises(
            ValueError, match=r"last\.pt: rank 0 reads step 5, rank 0 step 4; its file system"
        ):
            resume(folder, model, optimizer, scaler, config)

    def test_metrics_of_lost_steps_are_dropped(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
        MetricsLog(path, resume_step=2).write({"step": 3, "loss": 0.5})
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'


class TestWhatARunSays:
    def test_its_effective_recipe(self, data, tmp_path, capsys):
        """2 steps of 4 images are 8 of the draws that a pass over the 40 images has with its repetitions."""
        run_verb(
            "train",
            ["--config", BASELINE, *SHORT, f"data.root={data}", f"output={tmp_path}", "train.steps=2"],
        )
        said = capsys.readouterr().out
        draws = int(re.search(r"repeat factors ceil, threshold 0.02: a pass is (\d+) images", said)[1])
        for part in (
            "40 instance-level images",
            f"2 steps of 4 images (1 process, 1 micro-batch): {8 / draws:.1f} passes over the",
            "lr 0.01 (optim.lr 0.04 x 4 / 16 images), 2 steps of warm-up, x 0.1 at 480, 560; float32",
            "M parameters trained, 0.0 M frozen or a momentum copy; classification loss cross_entropy",
            "on: gradient clipping",
            "off: TSS, objectness, image-level supervision, SS, pasting, CLR",
        ):
            assert part in said

    @pytest.fixture
    def clock(self, monkeypatch) -> list[float]:
        """The time, which goes on by hand alone."""
        now = [1e9]
        for name in ("clis.progress.time.time", "tqdm.std.time"):
            monkeypatch.setattr(name, lambda: now[0])
        for name in ("COLUMNS", "LINES"):
            monkeypatch.delenv(name, raising=False)
        return now

    def test_on_a_terminal_in_one_line_of_100_columns(self, clock, monkeypatch):
        """The full recipe, twelve hours to go, and losses as large as at its start."""

        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        losses = ["loss", *CLIS_LOSSES]
        monkeypatch.setattr(sys, "stdout", screen := Terminal())
        with Progress("train", total=90000, start=10800) as progress:
            clock[0] += 55.02  # 43,516 s to go
            progress.advance(100, text=format_losses(dict.fromkeys(losses, 12.345)))
            progress.bar.refresh()
        lines = [line.strip() for line in screen.getvalue().split("\r") if line.strip()]
        assert re.search(r"^train 10900/90000  1.82/s <12:05:\d\d, loss 12.3 rpn 12.3 .*con 12.3$", lines[-1])
        assert len(lines[-1]) <= 100

    def test_elsewhere_in_plain_lines(self, clock, capsys):
        """One when the interval is over, one at the end, with the mean rate and time of this run alone."""
        for total, expected in ((40, r"work 30/40  2\.00/s <00:05, loss 1\n"), (30, "")):
            with Progress("work", total=total, start=10) as progress:
                clock[0] += 10
                progress.advance(10, text="loss 2")
                assert capsys.readouterr().out == ""
                progress.last_line -= 15
                progress.advance(10, text="loss 1")
                assert re.fullmatch(expected, capsys.readouterr().out)
            last = rf"work 30/{total}  2\.00/s {'<00:05' if total == 40 else 'in 00:10'}, loss 1\n"
            assert re.fullmatch(last, capsys.readouterr().out)
        with Progress("nothing", total=0):
            pass
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("terminal", [True, False])
    def test_of_work_that_ends_early(self, clock, monkeypatch, terminal):
        """Of at most 6000 only 27 came: these are all, unless an error ended it."""
        monkeypatch.setattr(sys, "stdout", screen := io.StringIO())
        screen.isatty = lambda: terminal
        with Progress("pictures", total=6000, at_most=True) as progress:
            clock[0] += 10
            progress.advance(27)
        assert re.search(r"pictures 27/27  2\.70/s in 00:10$", screen.getvalue().strip())
        with contextlib.suppress(KeyError), Progress("pictures", total=6000, at_most=True) as progress:
            progress.advance(3)
            raise KeyError
        assert "3/3 " not in screen.getvalue()

    def test_in_json_that_others_can_read(self, tmp_path):
        """The gradient's norm of a step that was left out is no JSON number."""
        MetricsLog(tmp_path / "metrics.jsonl", 0).write({"step": 1, "loss": 0.5, "gradient_norm": math.nan})
        line = (tmp_path / "metrics.jsonl").read_text()
        assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": 0.5, "gradient_norm": None}

    def test_in_every_record(self, finished):
        record = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
        assert set(record) == {
            "step", "lr", "loss", *CLIS_LOSSES, "gradient_norm", "positive_rois", "pairs",
            "queue_filled", "queue_concentration", "contrast_positive", "contrast_other", "contrast_queue",
            "contrast_retrieval", "images_per_second", "data_time",
            "compute_time", "peak_memory",
        }  # fmt: skip
        assert record["queue_filled"] == 2 * sum(4 * r["pairs"] for r in records(finished))  # both views

    def test_to_tensorboard(self, tmp_path):
        """New records are added; where a resumed run took some back, its own are there instead."""
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        from clis.commands.tensorboard import EventFile

        def scalars(tag: str) -> list[tuple[int, float]]:
            events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
            return [(event.step, event.value) for event in events.Scalars(tag)]

        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 2.0, "lr": 0.5}\n{"step": 2, "loss": 1.0, "lr": null}\n{"st')
        file = EventFile(tmp_path)
        assert file.update() == 2
        path.write_text(path.read_text() + 'ep": 3, "loss": 0.5}\n{"step": 3, "AP": 0.25}\n')
        assert file.update() == 2
        assert scalars("loss/total") == [(1, 2.0), (2, 1.0), (3, 0.5)]
        assert scalars("run/lr") == [(1, 0.5)]
        assert scalars("evaluation/AP") == [(3, 0.25)]
        path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
        assert file.update() == 2
        assert scalars("loss/total") == [(1, 2.0), (2, 1.5)]
        path.write_text('{"step": 1, "los\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl: damaged"):
            file.update()


def batches_of(share: list[list[dict]]) -> list[Batch]:
    """Micro-batches from the options of `make_sample`."""
    return [collate([make_sample(**options) for options in micro]) for micro in share]


# eight items of a global batch: one without boxes and pairs, one that lost two regions; the second half of
# them, and so the second of two processes, has no pair at all
ITEMS = [
    {"seed": 1},
    {"seed": 2, "truths": 0, "pairs": 0},
    {"seed": 3, "regions": 2, "pairs": 1},
    {"seed": 4, "pairs": 2},
    *({"seed": seed, "pairs": 0} for seed in (5, 6, 7, 8)),
]
STEPS = 10


BY_KIND = [pytest.param(loss, marks=() if loss in QUICK else pytest.mark.slow) for loss in LOSSES]


def train_share(rank: int, processes: int, accumulation: int, folder: Path, loss: str) -> None:
    """Train a float64 model for a few steps on this process's share of ITEMS and save its end state."""
    torch.set_num_threads(1)
    config = tiny_config(
        f"train.images_per_step={len(ITEMS)}", "optim.clip_norm=5", "clis.momentum=0.9",
        f"loss.classification={loss}", *LOSSES[loss],
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(config, CATEGORIES).double()
    network = wrap_ddp(model, torch.device("cpu"))
    network.train()
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    share = len(ITEMS) // processes
    mine = ITEMS[rank * share : (rank + 1) * share]
    size = share // accumulation
    totals, counted = [], []
    for step in range(STEPS):
        items = [{**options, "seed": options["seed"] + 10 * step} for options in mine]
        micro = batches_of([items[i : i + size] for i in range(0, share, size)])
        normalizers = train.global_normalizers(global_counts(micro), config)
        outputs, _ = train.train_step(
            network, model, optimizer, scaler, micro, normalizers, 0.02, (step + 1) / STEPS, config
        )
        totals.append(summarize_step(outputs, config) | contrast_state(model, outputs))
        counted.append(all_reduce_sum(sum(output.pending.sums["classification"] for output in outputs)))
    state = {"model": model.state_dict(), "totals": totals, "counted": torch.stack(counted)}
    torch.save(state, folder / f"{loss} {processes}x{accumulation} {rank}.pt")


def train_shares(rank: int, folder: Path, losses: list[str]) -> None:
    """`train_share` of two processes with two micro-batches each."""
    for loss in losses:
        train_share(rank, 2, 2, folder, loss)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, request) -> Path:
    """The end states of two processes for every loss that is tested here."""
    folder = tmp_path_factory.mktemp("processes")
    tested = {
        item.callspec.params["loss"] for item in request.session.items if "two_processes" in item.fixturenames
    }
    spawn(folder, train_shares, folder, sorted(tested))
    return folder


@pytest.mark.parametrize("loss", BY_KIND)
def test_processes_and_accumulation_are_the_same_mathematics(loss, two_processes):
    """1 x 8 = 8 x 1 = 2 processes x 2 x 2, to 1e-9 in weights, queue, all that a loss counts, and losses."""
    for accumulation in (1, 8):
        train_share(0, 1, accumulation, two_processes, loss)
    expected = torch.load(two_processes / f"{loss} 1x1 0.pt")
    assert expected["model"]["contrastive.queue.pushed"] == 2 * STEPS * 5  # both views of five pairs a step
    assert expected["model"].get("classification_loss.pcb.weight", 1) > 0  # it is at work
    for name in ("1x8 0", "2x2 0", "2x2 1"):
        found = torch.load(two_processes / f"{loss} {name}.pt")
        for key, value in (expected["model"] | {"counted": expected["counted"]}).items():
            ours = found["counted"] if key == "counted" else found["model"][key]
            torch.testing.assert_close(ours, value, rtol=0, atol=1e-9, msg=f"{name} {key}")
        for ours, reference in zip(found["totals"], expected["totals"]):
            for key in reference:
                assert math.isclose(ours[key], reference[key], abs_tol=1e-9), (name, key)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_resumes_from_a_checkpoint(loss, tmp_path):
    """Bit for bit: three steps, or one, a checkpoint, and two in a model that started elsewhere."""
    config = tiny_config(f"loss.classification={loss}", *LOSSES[loss], "train.images_per_step=2")
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def start(seed: int) -> tuple[CLISDetector, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = build_model(config, CATEGORIES).train()
        return model, make_optimizer(model, config)

    def steps(model: CLISDetector, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            batch, done = make_batch(seed=2 * step), (step + 1) / 3
            given = ([batch], normalizers_of(batch), 0.02, done, config)
            train.train_step(model, model, optimizer, scaler, *given)

    uninterrupted, interrupted, resumed = start(0), start(0), start(1)
    steps(*uninterrupted, range(3))
    steps(*interrupted, range(1))
    save_checkpoint(RunFolder(tmp_path), 1, *interrupted, scaler, config)
    first, _ = resume(RunFolder(tmp_path), *resumed, scaler, config)
    steps(*resumed, range(first, 3))
    assert_same_state(resumed[0].state_dict(), uninterrupted[0].state_dict())


def test_torchrun_with_two_processes(finished, data, tmp_path):
    """The same command under torchrun: same images, so losses agree as far as float32 allows; one result."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-endpoint=localhost:0",
        "--rdzv-backend=c10d", str(REPOSITORY / "train.py"), "--config", CONFIG, *SHORT, f"data.root={data}",
        f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=tmp_path, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ours, alone = records(tmp_path / "run" / "detector"), records(finished / "detector")
    assert [r["step"] for r in ours] == [r["step"] for r in alone]
    assert ours[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-4)
    assert len(np.load(tmp_path / "run" / "regions.npy")) == 100
    detections = Detections.load(tmp_path / "run" / "detections.npz")
    assert len(np.unique(detections.image_id)) == 20


def test_learning_rate_is_a_function_of_the_step():
    """lr 0.02 for 16 images: 8 images take half; warm-up from a thousandth; a tenth after each decay."""
    optim = OptimConfig(lr=0.02, lr_images=16, warmup_steps=500, decay_steps=(60000, 80000))
    expected = {0: 1e-5, 250: 0.01 * (0.001 + 0.999 / 2), 500: 0.01, 59999: 0.01, 60000: 1e-3, 80000: 1e-4}
    for step, rate in expected.items():
        assert learning_rate(step, optim, images_per_step=8) == pytest.approx(rate, rel=1e-12)


def test_split_batch():
    config = tiny_config("train.images_per_step=16", "train.images_per_process=4")
    assert split_batch(config.train, 1) == (4, 4)
    assert split_batch(config.train, 8) == (2, 1)
    with pytest.raises(ValueError, match=r"images_per_step=16 is not a whole number .* on 3 processes"):
        split_batch(config.train, 3)


def spoil_loss(model: CLISDetector) -> None:
    nn.init.constant_(model.localization.fc_objectness.bias, math.inf)


def spoil_gradient(model: CLISDetector) -> None:
    """The loss stays finite; clipping would turn the infinite gradient into NaN weights."""
    model.rpn.objectness.bias.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(
    ("loss", "spoil", "named"),
    [
        ("cross_entropy", spoil_loss, "loss objectness on images 7"),
        *((loss, spoil_gradient, "the gradient, images 7") for loss in LOSSES),
    ],
)
def test_what_is_not_finite_is_named_and_changes_nothing(loss, spoil, named, tmp_path, capsys):
    config = tiny_config("train.images_per_step=1", f"loss.classification={loss}", *LOSSES[loss])
    model = build_model(config, CATEGORIES).train()
    optimizer, scaler = make_optimizer(model, config), torch.amp.GradScaler("cpu", enabled=False)
    first = collate([make_sample(seed=6)])
    train.train_step(model, model, optimizer, scaler, [first], normalizers_of(first), 0.1, 0.0, config)
    spoil(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    momentum = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    batches = [collate([make_sample(seed=7)])]
    outputs, norm = train.train_step(
        model, model, optimizer, scaler, batches, normalizers_of(batches[0]), 0.1, 0.0, config
    )
    assert not math.isfinite(norm)
    assert_same_state(model.state_dict(), before)  # weights, queue, momentum copy, the loss's state
    for state, expected in zip(optimizer.state.values(), momentum):
        assert torch.equal(state["momentum_buffer"], expected)

    def check(skipped: int, *overrides: str) -> None:
        config = tiny_config(*overrides).train
        steps = SkippedSteps(skipped - 1, scaler, RunFolder(tmp_path), config, train.ADVICE)
        steps.check(41, norm, lambda: train._not_finite(outputs, batches), lambda: saved.append(skipped))

    saved: list[int] = []

    with pytest.raises(FloatingPointError, match=rf"step 42: not finite: {named}; there is no checkpoint"):
        check(1)
    check(2, "train.on_nonfinite=skip", "train.max_skipped=2")
    assert "left out, 2 of at most 2" in capsys.readouterr().out
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000030.pt").touch()
    with pytest.raises(FloatingPointError, match=r"the last good checkpoint is .*step_00000030\.pt"):
        check(3, "train.on_nonfinite=skip", "train.max_skipped=2")
    assert saved == [1, 3]  # before an error, and only then


@pytest.mark.parametrize(("scale", "allowed", "steps"), [(2.0**16, 3, 4), (4.0, 10, 3)])
def test_a_loss_that_stays_infinite_ends_a_float16_run(scale, allowed, steps, tmp_path):
    """Scaling leaves out a few steps and continues; too many in a row, or a scale below 1, ends the run."""
    config = tiny_config("train.images_per_step=1", f"train.max_skipped={allowed}")
    model = build_model(config, CATEGORIES).train()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = make_optimizer(model, config)
    skipped = SkippedSteps(0, scaler, RunFolder(tmp_path), config.train, "try less")
    batch = collate([make_sample(seed=7)])

    def step() -> None:
        outputs, norm = train.train_step(
            model, model, optimizer, scaler, [batch], normalizers_of(batch), 0.001, 0.0, config
        )
        skipped.check(41, norm, lambda: train._not_finite(outputs, [batch]), lambda: None)

    hook = model.localization.fc_objectness.register_forward_hook(lambda *_: torch.full((16, 1), math.inf))
    for _ in range(steps - 1):
        step()
    hook.remove()
    step()  # one that is finite: the count in a row starts again
    assert (skipped.in_a_row, skipped.total) == (0, 0)
    spoil_loss(model)
    scaler.update(scale)
    for _ in range(steps - 1):
        step()
    with pytest.raises(
        FloatingPointError, match=rf"loss objectness on images 7; {steps} such steps in a row"
    ):
        step()


def test_overrides_of_clis_alone_do_not_reach_the_detector(tmp_path):
    """Nor those of the image-level stream, also in mapping form; a run folder that was asked for holds it."""
    overrides = [
        "clis={s: 8}",
        "loss.alpha=0.25",
        "train.steps=7",
        f"output={tmp_path}",
        "data.label_noise=0.2",
    ]
    overrides += ["data={flip: 0.25, paste_size: [9, 11], val: other.json}"]
    detector = prerequisites.detector_config(load_config(CONFIG, overrides), overrides)
    plain = prerequisites.detector_config(load_config(CONFIG, []))
    assert plain.loss.alpha != 0.25
    assert (detector.clis.s, detector.loss.alpha, detector.train.steps) == (0, plain.loss.alpha, 7)
    assert (detector.data.flip, detector.data.val) == (0.25, "other.json")
    assert (detector.data.paste_size, detector.data.label_noise) == (plain.data.paste_size, 0)
    assert detector.output == str(tmp_path / "detector")


class TestBadInput:
    def arguments(self, data: Path, output: Path, *more: str) -> list[str]:
        baseline = str(REPOSITORY / "configs" / "shapes" / "baseline.yaml")
        return ["--config", baseline, *SHORT, f"data.root={data}", f"output={output}", "train.steps=2", *more]

    @pytest.fixture
    def damaged(self, data, tmp_path) -> Path:
        """The benchmark with one truncated training image."""
        shutil.copytree(data / "shapes", tmp_path / "shapes")
        victim = sorted((tmp_path / "shapes" / "train").glob("*.jpg"))[0]
        victim.write_bytes(victim.read_bytes()[:400])
        annotations = json.loads((tmp_path / "shapes" / "train.json").read_text())
        # every image is the damaged one or its neighbor, so that each step meets it
        keep = {image["id"] for image in annotations["images"][:2]}
        annotations["images"] = annotations["images"][:2]
        annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] in keep]
        (tmp_path / "shapes" / "train.json").write_text(json.dumps(annotations))
        return tmp_path

    def test_a_truncated_image_stops_the_run_by_name(self, damaged, tmp_path):
        with pytest.raises(ImageError, match=r"max_bad_images allows 0; .*000001\.jpg"):
            run_verb("train", self.arguments(damaged, tmp_path / "run"))

    def test_or_is_replaced_up_to_a_number(self, damaged, tmp_path, capsys):
        run_verb("train", self.arguments(damaged, tmp_path / "run", "data.max_bad_images=8"))
        assert "replaced by the next of its stream" in capsys.readouterr().out

    def test_missing_annotations(self, tmp_path):
        with pytest.raises((ValueError, OSError), match=r"shapes/train\.json"):
            run_verb("train", self.arguments(tmp_path, tmp_path / "run"))

    def test_foreign_and_truncated_checkpoints(self, finished, tmp_path):
        path = finished / "checkpoints" / "last.pt"
        cut = tmp_path / "cut.pt"
        cut.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ValueError, match=r"cut\.pt: not a readable checkpoint"):
            load_detector(cut)
        foreign = tmp_path / "foreign.pt"
        torch.save({"weights": torch.zeros(3)}, foreign)
        with pytest.raises(ValueError, match=r"foreign\.pt: not a checkpoint of clis"):
            load_detector(foreign)
        torch.save({"format": 1, "model": {}}, foreign)
        with pytest.raises(ValueError, match=r"foreign\.pt: not a checkpoint of clis"):
            load_detector(foreign)
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            load_detector(tmp_path / "none.pt")

    def test_a_checkpoint_of_another_model_says_which_tensors_differ(self, finished):
        state = load_checkpoint(finished / "checkpoints" / "last.pt")
        values = merge_overrides(state["config"], ["model.roi.fc_dim=24"])
        with pytest.raises(
            ValueError, match=r"of another model: .*fc1\.weight is \[32, 784\], the model's is \[24"
        ):
            load_model(state, config_from_dict(values), "last.pt")

    def test_evaluation_refuses_a_config_that_contradicts_the_checkpoint(self, finished, tmp_path):
        """sampling_ratio fits the same weights, and would give other detections in silence."""
        checkpoint = str(finished / "checkpoints" / "last.pt")
        for override in ("model.roi.sampling_ratio=2", "clis.objectness=false"):
            with pytest.raises(
                ValueError, match=rf"last.pt was trained with other settings: {override.split('=')[0]}"
            ):
                run_verb("evaluate", [checkpoint, override])
        run_verb("evaluate", [checkpoint, "model.rpn.proposals=20", "test.nms_iou=0.6", f"output={tmp_path}"])

    def test_evaluation_never_writes_into_the_folder_of_a_training(self, finished):
        before = (finished / "eval.json").read_bytes()
        with pytest.raises(ValueError, match="is a training run's folder, whose results would be lost"):
            run_verb("evaluate", [str(finished), "test.nms_iou=0.9", f"output={finished}"])
        assert (finished / "eval.json").read_bytes() == before

    def test_a_run_does_not_go_on_from_the_checkpoint_of_another(self, data, tmp_path):
        run_verb("train", self.arguments(data, tmp_path / "a"))
        shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
        with pytest.raises(ValueError, match=r"last\.pt is of another config: optim\.lr: 0\.04 != 0\.01"):
            run_verb("train", self.arguments(data, tmp_path / "b", "optim.lr=0.01"))

    def test_commands_tell_errors_without_a_traceback(self, tmp_path):
        result = subprocess.run(
            [sys.executable, str(REPOSITORY / "train.py"), "--config", CONFIG, "train.stepz=3"],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert result.returncode == 1
        assert "did you mean train.steps?" in result.stderr
        assert "Traceback" not in result.stderr


def test_import_loads_what_is_asked_for():
    """`import clis` alone brings nothing along; the metric brings no torch and no lvis."""
    code = (
        "import sys; import clis; heavy = ('clis.models', 'numpy', 'torch', 'pycocotools', 'lvis', 'tqdm'); "
        "print([name for name in heavy if name in sys.modules]); "
        "clis.evaluate; print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["[]", "['numpy', 'pycocotools']"]


def test_the_embedded_configs_are_one_recipe():
    """CLIS and the baseline differ in the parts of CLIS alone."""
    clis, baseline = (
        load_config(REPOSITORY / "configs" / "shapes" / f"{name}.yaml") for name in ("clis", "baseline")
    )
    assert clis.model == baseline.model
    assert clis.optim == baseline.optim
    assert clis.train == baseline.train
    assert (baseline.clis.s, baseline.clis.t) == (0, 0)
