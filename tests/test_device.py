"""What holds on any device: CLIS_TEST_DEVICE=cuda pytest -m device.

The reference is the CPU, in float64: float32 of the device is compared with it on every device, the CPU too,
and float64 of a device other than the CPU to the last digits. CLIS_TEST_DEVICE=cpu:0 compares the CPU with
itself, which only shows that the tests run.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CATEGORIES, make_batch, normalizers_of, tiny_config
from runs import CONFIG, SHORT, records
from switches import SWITCHES, SWITCHES_AND_LOSSES, make_batches, steps
from torch import Tensor

from clis.commands import run_verb
from clis.config import LossConfig
from clis.data.batch import Batch
from clis.engine import train
from clis.engine.checkpoint import load_checkpoint, load_detector
from clis.engine.optim import autocast, make_optimizer, make_scaler
from clis.metric.detections import Detections
from clis.models import CLISDetector, ImageDetections, build_model

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for equal bits; read when cuBLAS starts
DEVICE = torch.device(os.environ.get("CLIS_TEST_DEVICE", "cpu"))
ON_CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="CLIS_TEST_DEVICE is no CUDA device")
ELSEWHERE = pytest.mark.skipif(str(DEVICE) == "cpu", reason="would compare the CPU with itself")
TYPES = [torch.float32, pytest.param(torch.float64, marks=ELSEWHERE)]
pytestmark = pytest.mark.device


@pytest.fixture(autouse=True, scope="module")
def _whole_float32() -> Iterator[None]:
    """Not TF32, which keeps ten bits of a factor: PyTorch's default for convolutions."""
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


def make_pair(dtype: torch.dtype, *overrides: str) -> tuple[CLISDetector, CLISDetector]:
    """The same detector in float64 on the CPU and in `dtype` on the device, with keys in its queue."""
    torch.manual_seed(0)
    model = build_model(tiny_config(*overrides), CATEGORIES)
    if model.contrastive is not None:
        queue = model.contrastive.queue
        queue.push(torch.nn.functional.normalize(torch.randn(7, queue.keys.shape[1])), torch.arange(7) % 5)
    return copy.deepcopy(model).double(), model.to(DEVICE, dtype)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "") -> None:
    """To the roundings of many sums, relative to the largest value of the tensor."""
    assert found.device.type == DEVICE.type, name
    largest = expected.abs().max().item() if expected.numel() else 0.0
    share = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        found.cpu().double(), expected.double(), rtol=10 * share, atol=share * largest + share / 100,
        msg=lambda message: f"{name}: {message}",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("overrides", SWITCHES_AND_LOSSES)
class TestTraining:
    def test_losses_and_gradients(self, overrides, dtype):
        reference, model = make_pair(dtype, *overrides)
        batch = make_batches()[0]
        values = []
        for each, its in ((reference, batch), (model, batch.to(DEVICE))):
            output = each.train()(its, normalizers_of(batch))
            sum(output.losses.values()).backward()
            values.append(output)
        expected, found = values
        assert found.losses.keys() == expected.losses.keys()
        for name, loss in expected.losses.items():
            assert_close(found.losses[name].detach(), loss.detach(), dtype, name)
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters()):
            assert (ours.grad is None) == (theirs.grad is None), name
            if theirs.grad is not None:
                assert_close(ours.grad, theirs.grad, dtype, name)
        for name, value in expected.pending.sums.items():
            assert_close(found.pending.sums[name], value, dtype, name)
        for name, value in expected.pending.rows.items():
            assert_close(found.pending.rows[name], value, dtype, name)

    def test_steps_and_all_that_is_kept(self, overrides, dtype):
        """Weights, the queue and the momentum copy behind two steps."""
        reference, model = make_pair(dtype, *overrides)
        before = {name: value.clone() for name, value in reference.state_dict().items()}
        expected = steps(reference.train(), make_batches(), *overrides)
        found = steps(model.train(), [batch.to(DEVICE) for batch in make_batches()], *overrides)
        for ours, theirs in zip(found, expected):
            assert ours == pytest.approx(theirs, rel=1e-3 if dtype == torch.float32 else 1e-8, abs=1e-6)
        for name, value in model.state_dict().items():
            assert_close(value, reference.state_dict()[name], dtype, name)
        if model.contrastive is not None:
            moved = [name for name, value in reference.state_dict().items() if not value.equal(before[name])]
            assert any(name.startswith("contrastive.queue.keys") for name in moved)
            assert any(name.startswith("contrastive.momentum_sub_network") for name in moved)


def test_everything_of_a_step_is_on_the_device():
    """Parameters, buffers, the optimizer's state, losses, counts and keys."""
    _, model = make_pair(torch.float32)
    config, batch = tiny_config("train.images_per_step=2"), make_batches()[0].to(DEVICE)
    optimizer, scaler = make_optimizer(model, config), make_scaler(config, DEVICE)
    (output,), _ = train.train_step(
        model.train(), model, optimizer, scaler, [batch], normalizers_of(batch), 0.01, 0.5, config
    )
    tensors = {
        **dict(model.named_parameters()), **dict(model.named_buffers()), **output.losses, **output.stats,
        **output.pending.sums, **output.pending.rows, "f_i": output.views[0], "f_d": output.views[1],
        **{f"momentum {i}": state["momentum_buffer"] for i, state in enumerate(optimizer.state.values())},
    }  # fmt: skip
    assert {name for name, tensor in tensors.items() if tensor.device.type != DEVICE.type} == set()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("overrides", [(), ("model.backbone.norm=folded",)], ids=" ".join)
def test_mixed_precision(precision, overrides):
    """Steps on one batch: the loss falls, what is kept stays float32, and float16 scales its gradient.

    Losses that no sampled proposal decides on are those of float32 to a hundredth.
    """
    config = tiny_config("train.images_per_step=2", f"train.precision={precision}", *overrides)
    _, model = make_pair(torch.float32, *overrides)
    batch = make_batch(2, seed=1)
    with torch.no_grad():
        expected = model.train()(batch.to(DEVICE), normalizers_of(batch)).losses
    optimizer, scaler = make_optimizer(model, config), make_scaler(config, DEVICE)
    assert scaler.is_enabled() == (precision == "float16")
    totals, norms = [], []
    for step in range(12):
        (output,), norm = train.train_step(
            model.train(),
            model,
            optimizer,
            scaler,
            [batch.to(DEVICE)],
            normalizers_of(batch),
            0.02,
            (step + 1) / 12,
            config,
        )
        totals.append(sum(config.loss.weights[name] * loss.item() for name, loss in output.losses.items()))
        norms.append(norm)
        if step == 0:
            for name in ("rpn_objectness", "rpn_box", "image_cls", "contrastive"):
                assert output.losses[name].item() == pytest.approx(expected[name].item(), rel=0.02), name
    accepted = [norm for norm in norms if np.isfinite(norm)]
    assert len(accepted) >= (12 if precision == "bfloat16" else 6)  # the scaler looks for its scale
    assert np.isfinite(totals).all()
    assert totals[-1] < totals[0]
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}
    assert all(value.isfinite().all() for value in floats)
    assert model.contrastive.queue.pushed == 7 + len(accepted) * 2 * len(batch.pair_boxes)
    with autocast(precision, DEVICE):
        (found,) = model.eval().detect([batch.images[0]])
    assert found.scores.dtype == torch.float32
    assert found.boxes.isfinite().all()


def images() -> list[Tensor]:
    """Of the size of the test, so that nothing is resized."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, 64, side), dtype=torch.uint8, generator=generator) for side in (64, 80)]


SIZE = ("test.short_side=64", "test.max_size=96", "model.roi.fc_cls_std=0.5")  # scores that are far apart


def assert_same_detections(found: ImageDetections, expected: ImageDetections, dtype: torch.dtype) -> None:
    assert torch.equal(found.labels.cpu(), expected.labels)
    assert_close(found.boxes, expected.boxes, dtype, "boxes")
    assert_close(found.scores, expected.scores, dtype, "scores")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("overrides", SWITCHES, ids=" ".join)
def test_detections(overrides, dtype):
    reference, model = make_pair(dtype, *overrides, *SIZE)
    for found, expected in zip(model.eval().detect(images()), reference.eval().detect(images())):
        assert len(expected.boxes) == 20
        assert_same_detections(found, expected, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_boxes_of_the_region_search(dtype):
    reference, model = make_pair(dtype, *SIZE)
    labels = torch.tensor([1, 4])
    expected = reference.eval().rank_first(images(), labels, 96)
    small = [image.to(DEVICE) for image in images()]
    for (box, score), (other, other_score) in zip(model.eval().rank_first(small, labels, 96), expected):
        assert_close(box, other, dtype, "box")
        assert_close(score, other_score, dtype, "score")


class TestBatch:
    def tensors(self, batch: Batch) -> list[Tensor]:
        values = [getattr(batch, name) for name in batch.__dataclass_fields__]
        flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
        return [each for each in flat if isinstance(each, Tensor)]

    @pytest.fixture(params=["all", "few"])
    def batch(self, request) -> Batch:
        """Images with the channels last, as they are decoded; and one batch that lacks most."""
        batch = make_batch(2) if request.param == "all" else make_batch(1, truths=0, regions=0, pairs=0)
        batch.images[0] = batch.images[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        return batch

    def assert_moved(self, moved: Batch, batch: Batch) -> None:
        for ours, theirs in zip(self.tensors(moved), self.tensors(batch)):
            assert ours.device.type == DEVICE.type
            assert torch.equal(ours.cpu(), theirs)
            assert ours.stride() == theirs.stride()
        assert (moved.seeds, moved.image_ids, moved.counts) == (batch.seeds, batch.image_ids, batch.counts)

    def test_moves_as_a_whole(self, batch):
        self.assert_moved(batch.to(DEVICE), batch)

    @ON_CUDA
    def test_moves_from_pinned_memory(self, batch):
        pinned = batch.pin_memory()
        assert all(tensor.is_pinned() for tensor in self.tensors(pinned) if tensor.numel())
        self.assert_moved(pinned.to(DEVICE), batch)  # `cpu()` waits for the copies, which do not block


@pytest.fixture(scope="module")
def trained(finished, data, tmp_path_factory) -> Path:
    """The whole recipe on the device, with a loader process and so, on CUDA, with pinned memory."""
    if str(DEVICE) == "cpu":
        return finished
    folder = tmp_path_factory.mktemp("device") / "clis"
    run_verb("train", [*arguments(data, folder, DEVICE), "data.workers=1"])
    return folder


def arguments(data: Path, folder: Path, device: torch.device | str, *more: str) -> list[str]:
    return [
        "--config", CONFIG, *SHORT, f"data.root={data}", f"output={folder}", f"train.device={device}", *more
    ]  # fmt: skip


class TestCommands:
    @ELSEWHERE
    def test_a_training_begins_as_on_the_cpu(self, trained, finished):
        """CLIS's regions come from different weights by then."""
        ours, theirs = (records(folder / "detector")[0] for folder in (trained, finished))
        assert ours == pytest.approx(theirs, rel=0.05, abs=1e-3)  # a proposal may be another by rounding
        assert [record["step"] for record in records(trained)] == [1, 2, 3, 4]
        assert (trained / "eval.json").exists()
        assert len(load_regions_of(trained)) == 100

    @ELSEWHERE
    def test_a_checkpoint_finds_the_same_on_both(self, trained):
        path = trained / "checkpoints" / "last.pt"
        here, there = load_detector(path), load_detector(path, DEVICE)
        assert {value.device.type for value in load_checkpoint(path)["model"].values()} == {"cpu"}
        for found, expected in zip(there.detect(images()), here.detect(images())):
            assert found.boxes.device.type == DEVICE.type
            best, other = found.scores.max().item(), expected.scores.max().item()
            assert best == pytest.approx(other, rel=0.02)  # the images are resized: a level of 255 apart

    @ELSEWHERE
    @pytest.mark.parametrize("here", ["cpu", "device"])
    def test_a_run_resumes_on_the_other(self, here, trained, finished, data, tmp_path):
        """From the checkpoint of step 2 that the other device has left."""
        source, device = (finished, DEVICE) if here == "device" else (trained, "cpu")
        run = tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True)
        shutil.copy(source / "checkpoints" / "step_00000002.pt", run / "checkpoints")
        shutil.copy(source / "metrics.jsonl", run)
        shutil.copy(source / "regions.npy", run)
        shutil.copy(source / "regions.json", run)
        run_verb("train", arguments(data, run, device))
        ours, theirs = records(run), records(source)
        assert ours[:2] == theirs[:2]
        for name in ("loss", *LossConfig().weights):
            assert ours[2][name] == pytest.approx(theirs[2][name], rel=0.05, abs=1e-3)
        assert load_checkpoint(run / "checkpoints" / "last.pt")["step"] == 4

    @ELSEWHERE
    def test_evaluation(self, finished, tmp_path):
        """Of one checkpoint on both, with images that are resized on the device."""
        found = []
        for device in ("cpu", str(DEVICE)):
            folder = tmp_path / device.replace(":", "")
            checkpoint = str(finished / "checkpoints" / "last.pt")
            run_verb(
                "evaluate",
                [checkpoint, f"train.device={device}", "test.images_per_batch=4", f"output={folder}"],
            )
            detections = Detections.load(folder / "detections.npz")
            best = [detections.score[detections.image_id == i].max() for i in np.unique(detections.image_id)]
            found.append((best, json.loads((folder / "eval.json").read_text())["AP"]))
        assert found[1][0] == pytest.approx(found[0][0], rel=0.05)
        assert found[1][1] == pytest.approx(found[0][1], abs=0.02)

    @ELSEWHERE
    def test_region_search(self, finished, data, tmp_path):
        """By the same detector on both devices."""
        tables = []
        for device in ("cpu", str(DEVICE)):
            folder = tmp_path / device.replace(":", "")
            detector = finished / "detector" / "checkpoints" / "last.pt"
            words = arguments(data, folder, device, f"regions.detector={detector}")
            run_verb("regions", [words[1], *words[2:]])
            tables.append(load_regions_of(folder))
        # Boxes of almost equal score may swap when a pixel differs by one level of 255.
        scores = [table["score"] for table in tables]
        np.testing.assert_allclose(scores[1], scores[0], rtol=0.1)
        assert np.isclose(scores[1], scores[0], rtol=0.02).mean() > 0.95
        assert (tables[1]["box"][:, 2:] > tables[1]["box"][:, :2]).all()
        assert np.array_equal(tables[1]["source"], tables[0]["source"])


def load_regions_of(folder: Path) -> np.ndarray:
    return np.load(folder / "regions.npy")


@ON_CUDA
def test_a_step_waits_at_most_twelve_times():
    """As CUDA counts it, for one image: tests/test_waits.py counts the calls on the CPU."""
    _, model = make_pair(torch.float32)
    config, batch = tiny_config("train.images_per_step=1"), make_batch(1).to(DEVICE)
    optimizer, scaler = make_optimizer(model, config), make_scaler(config, DEVICE)

    def step() -> None:
        train.train_step(
            model.train(), model, optimizer, scaler, [batch], normalizers_of(batch), 0.01, 0.5, config
        )

    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "synchronizing" in str(each.message)]
    assert 1 <= len(waits) <= 12, [f"{each.filename}:{each.lineno}" for each in waits]


@pytest.mark.parametrize("overrides", [(), ("model.backbone.norm=folded",)], ids=" ".join)
def test_equal_bits_with_deterministic_algorithms(overrides):
    """Two trainings from one start; an operator without such an algorithm is an error."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            _, model = make_pair(torch.float32, *overrides)
            said = steps(model.train(), [batch.to(DEVICE) for batch in make_batches()], *overrides)
            found.append((said, model.state_dict()))
    finally:
        torch.use_deterministic_algorithms(was)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
