"""How often a training step makes the host wait for its device, counted by what it calls on the CPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import CATEGORIES, LOSSES, make_batch, normalizers_of, tiny_config
from pretended_device import is_wait
from torch.utils._python_dispatch import TorchDispatchMode

from clis.engine import train
from clis.engine.optim import make_optimizer
from clis.models import build_model


class Waits(TorchDispatchMode):
    """Counts operators whose result's shape or value the host needs, and copies of values to the device.

    `nonzero`, boolean indexing and NMS wait for a size, `item`, `int` and `bool` for a value; `tolist` and
    the constructors of tensors from Python values are counted by name, since they are not dispatched.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        for owner, name in ((torch.Tensor, "tolist"), (torch.Tensor, "new_tensor"), (torch, "tensor")):
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name, function):
        def call(*arguments, **options):
            self.counts[name] += 1
            return function(*arguments, **options)

        return call

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if is_wait(name := str(function), arguments):
            self.counts[name] += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    ("images", "norm", "loss"),
    [
        (1, "folded", "cross_entropy"),  # pools mosaics in windows
        (2, "folded", "cross_entropy"),
        (2, "group", "cross_entropy"),
        *((1, "group", loss) for loss in LOSSES),
    ],
)
def test_a_step_waits_seven_times_and_twice_for_each_further_image(images, norm, loss, monkeypatch):
    """For sampling and levels, for NMS of each image's proposals, and for the gradient's norm."""
    config = tiny_config(
        f"train.images_per_step={images}", f"model.backbone.norm={norm}", f"loss.classification={loss}",
        *LOSSES[loss],
    )  # fmt: skip
    model = build_model(config, CATEGORIES).train()
    optimizer, scaler = make_optimizer(model, config), torch.amp.GradScaler("cpu", enabled=False)
    batch = make_batch(images)

    def step() -> None:
        train.train_step(model, model, optimizer, scaler, [batch], normalizers_of(batch), 1e-4, 0.0, config)

    step()  # makes the optimizer's buffers
    waits = Waits(monkeypatch)
    with waits:
        step()
    assert waits.counts["tolist"] == 4  # RPN and RoI sampling, the levels of RoIs and regions
    assert waits.counts["tensor"] + waits.counts["new_tensor"] == 0
    assert sum(waits.counts.values()) == 7 + 2 * (images - 1), waits.counts
