"""What a GPU would refuse or wait for, shown on the CPU: nothing in training and detection mixes devices."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CATEGORIES, make_batch, normalizers_of, tiny_config
from pretended_device import DEVICE, OnDevice, PretendedDevice, on_host
from runs import OLD_TORCH
from switches import SWITCHES_AND_LOSSES, make_batches, steps
from torch import Tensor

from clis.config_files import config_from_dict
from clis.engine import train
from clis.engine.evaluate import _columns
from clis.engine.optim import make_optimizer
from clis.models import CLISDetector, build_model
from clis.resize import resize_image

pytestmark = pytest.mark.skipif(OLD_TORCH, reason="needs torch 2.11")


@pytest.mark.parametrize("overrides", SWITCHES_AND_LOSSES)
def test_a_training_step_mixes_no_devices(overrides, monkeypatch):
    """And gives what it gives on the CPU, bit for bit: the kernels are the same."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build_model(tiny_config(*overrides), CATEGORIES).train())
    expected = steps(models[0], make_batches(), *overrides)
    with PretendedDevice(monkeypatch) as device:
        model = device.place(models[1])
        moved = [batch.to(DEVICE) for batch in make_batches()]
        assert all(isinstance(image, OnDevice) for image in moved[0].images)
        device.copies.clear()
        records = steps(model, moved, *overrides)
        state = on_host(model.state_dict())
    assert records == expected
    assert not device.mixed
    assert not device.copies
    assert all(torch.equal(state[key], value) for key, value in models[0].state_dict().items())


def test_equal_bits_need_no_operator_that_has_none(monkeypatch):
    """Under deterministic algorithms RoIAlign on a device is matrix products, whose gradient has an order.

    Of the other operators those that PyTorch lists as without a fixed order on CUDA are not used.
    """
    torch.use_deterministic_algorithms(True)
    try:
        with PretendedDevice(monkeypatch) as device:
            model = device.place(build_model(tiny_config(), CATEGORIES).train())
            steps(model, [batch.to(DEVICE) for batch in make_batches()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert not device.mixed
    unordered = ("roi_align", "bilinear", "bicubic", "cumsum", "adaptive", "scatter", "histc", "aten.put_")
    assert [name for name in device.launches if any(word in name for word in unordered)] == []


def test_a_step_launches_few_operators(monkeypatch):
    """The paper's network and losses, one image and four mosaics; any sizes, for the number is the same.

    It was 2,778 with each batch norm folded, and each level's anchors decoded and looked up, on their own,
    and 1,836 with batch norms folded for each stream.
    """
    sizes = {"size": (64, 80), "regions": 16}
    config = config_from_dict(
        {"clis": {"queue_size": 64}, "model": {"backbone": {"width": 8}, "roi": {"fc_dim": 16}}}
    )
    model, batch = build_model(config, CATEGORIES).train(), make_batch(1, **sizes)
    batch = dataclasses.replace(batch, mosaics=batch.mosaics.expand(4, -1, -1, -1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with PretendedDevice(monkeypatch) as device:
        batch = batch.to(DEVICE)
        optimizer = make_optimizer(device.place(model), config)
        for _ in range(2):  # the first makes the optimizer's state
            device.launches.clear()
            device.waits.clear()
            train.train_step(
                model, model, optimizer, scaler, [batch], normalizers_of(batch), 1e-4, 0.5, config
            )
    assert sum(device.waits.values()) == 7
    assert sum(device.launches.values()) < 1570


def detectors(device: PretendedDevice, *overrides: str) -> tuple[CLISDetector, CLISDetector]:
    """The same on the CPU and on the device; the test's images have their size already."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        overrides = (*overrides, "test.short_side=64", "test.max_size=96")
        found.append(build_model(tiny_config(*overrides), CATEGORIES).eval())
    return found[0], device.place(found[1])


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, 64, side), dtype=torch.uint8, generator=generator) for side in (64, 80)]


def test_detection_mixes_no_devices_and_copies_nothing_but_the_images(monkeypatch):
    with PretendedDevice(monkeypatch) as device:
        plain, model = detectors(device)
        expected, found = plain.detect(images()), model.detect(images())
        rows = [_columns(row, each.boxes, each.scores, each.labels) for row, each in enumerate(found)]
        assert all(isinstance(each, OnDevice) for each in rows)
    assert not device.mixed
    assert Counter(way for way, _ in device.copies.elements()) == {"to the device": 2}
    for ours, theirs in zip(found, expected):
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(on_host(getattr(ours, name)), getattr(theirs, name))


def test_the_region_search_waits_for_no_single_image(monkeypatch):
    """For proposals (their NMS has a candidate's and a survivor's number), and then for all boxes at once."""
    labels = np.array([1, 4])
    with PretendedDevice(monkeypatch) as device:
        plain, model = detectors(device)
        expected = plain.rank_first(images(), torch.from_numpy(labels), 96)
        small = [image.to(DEVICE) for image in images()]
        device.copies.clear()
        found = model.rank_first(small, torch.from_numpy(labels), 96)
    assert not device.mixed
    assert not device.copies
    lines = Counter(line.split(":")[0] for _, line in device.waits.elements())
    assert set(lines) == {"/boxes.py"}, device.waits
    for (box, score), (other, other_score) in zip(found, expected):
        assert torch.equal(on_host(box), other)
        assert torch.equal(on_host(score), other_score)


@pytest.mark.parametrize(("size", "extent"), [((40, 56), None), ((96, 120), None), ((40, 56), (63.5, 79.2))])
@pytest.mark.parametrize("antialias", [True, False])
def test_resizing_on_a_device_is_a_level_away_from_the_cpus(size, extent, antialias, monkeypatch):
    """Computed in float32 there, since uint8 has kernels on the CPU alone."""
    image = images()[1]
    expected = resize_image(image, size, extent, antialias)
    with PretendedDevice(monkeypatch) as device:
        found = on_host(resize_image(image.to(DEVICE), size, extent, antialias))
    assert not device.mixed
    assert found.dtype == torch.uint8
    assert found.shape == expected.shape
    assert (found.int() - expected.int()).abs().max() <= 1


def test_the_pretended_device_tells_what_mixes(monkeypatch):
    with PretendedDevice(monkeypatch) as device:
        x = torch.arange(3.0).to(DEVICE)
        assert (x * 2 + torch.tensor(1.0)).device == DEVICE
        assert not device.mixed
        x[torch.tensor([0, 2])]
        x + torch.ones(3)
        float(x.sum())
        torch.ones(3, device=DEVICE).tolist()
        x[x > 1]
        torch.equal(x, x)
    assert [name for name, _ in device.mixed] == ["aten.index.Tensor", "aten.add.Tensor"]
    assert [name for name, _ in device.waits] == [
        "aten._local_scalar_dense.default", "tolist", "aten.index.Tensor", "aten.equal.default",
    ]  # fmt: skip
