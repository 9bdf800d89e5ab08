"""Every loss equals its formula, written out row by row in float64."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CATEGORIES, LOSSES, rows_of
from runs import assert_same_state
from torch import Tensor

from clis.losses import (
    CLASSIFICATION_LOSSES,
    ClassificationLoss,
    CrossEntropy,
    at_least_float32,
    build_classification_loss,
    info_nce,
    l1_loss,
    objectness_loss,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=-1)


# --- classification ---


def test_cross_entropy_equals_formula():
    logits, labels = 3 * randn(20, 6), torch.arange(20) % 6  # 5 classes, background is 5
    expected = sum(
        -math.log(math.exp(row[label]) / sum(map(math.exp, row)))
        for row, label in zip(logits.tolist(), labels.tolist())
    )
    loss = CrossEntropy(range(5))
    assert loss.num_logits == 6
    assert loss(logits, labels, 7.0, rows_of([0] * 20)).item() == pytest.approx(expected / 7)


def test_cross_entropy_scores_leave_out_background_only():
    # odds 1 : 2 : 3 and 4 for the background, which is not renormalized away
    logits = torch.tensor([[1.0, 2, 3, 4]]).log()
    torch.testing.assert_close(CrossEntropy(range(3)).scores(logits), torch.tensor([[0.1, 0.2, 0.3]]))


def test_every_classification_loss_is_among_the_tested():
    assert {name.partition("(")[0] for name in LOSSES} == set(CLASSIFICATION_LOSSES)


@pytest.mark.parametrize("name", LOSSES)
class TestEveryClassificationLoss:
    """The interface, on rows of two images; and the contract of buffers: what moves them, and when."""

    LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 5, 5])
    ROWS = rows_of([0] * 5 + [1] * 3)

    def make(self, name: str, *, steps: int = 0) -> ClassificationLoss:
        """The loss after some steps, in which every class was seen."""
        loss = build_classification_loss(name, CATEGORIES)
        for step in range(steps):
            self.step(loss, step)
        return loss

    def step(self, loss: ClassificationLoss, step: int) -> None:
        logits = 2 * randn(8, loss.num_logits, seed=step)
        loss.update(loss.statistics(logits, self.LABELS, self.ROWS), (step + 1) / 10)

    def test_loss_and_scores(self, name):
        loss = self.make(name, steps=3)
        logits = randn(8, loss.num_logits).requires_grad_()
        for value in (
            loss(logits, self.LABELS, 8.0, self.ROWS),
            loss.image_level(logits[:5], self.LABELS[:5], 5.0, rows_of([0] * 5)),
        ):
            (gradient,) = torch.autograd.grad(value, logits)
            assert value.shape == ()
            assert value > 0
            assert gradient.isfinite().all()
            assert gradient.abs().sum() > 0
        scores = loss.scores(logits)
        assert scores.shape == (8, 5)
        assert ((scores >= 0) & (scores <= 1)).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_float32_at_least(self, name, dtype):
        loss = self.make(name, steps=3)
        logits = randn(8, loss.num_logits).to(dtype)

        def values(logits):
            loss_of_rois = loss(logits, self.LABELS, 8.0, self.ROWS)
            return (
                loss_of_rois,
                loss.image_level(logits, self.LABELS % 5, 8.0, self.ROWS),
                loss.scores(logits),
            )

        found, expected = values(logits), values(logits.double())
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = values(logits)
        for value, reference, other in zip(found, expected, under_autocast):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)
            assert torch.equal(value, other)
        assert loss.statistics(logits, self.LABELS, self.ROWS).dtype == torch.float64

    def test_no_rows_are_nothing(self, name):
        loss = self.make(name, steps=3)
        logits, labels = torch.zeros(0, loss.num_logits, requires_grad=True), self.LABELS[:0]
        for value in (
            loss(logits, labels, 8.0, rows_of([])),
            loss.image_level(logits, labels, 8.0, rows_of([])),
        ):
            value.backward()
            assert value.item() == 0
            assert logits.grad is not None
        assert loss.statistics(logits.detach(), labels, rows_of([])).abs().sum() == 0

    def test_only_update_moves_the_state(self, name):
        """So a pass leaves no trace, nor do rows of the image-level stream, nor a step that is left out."""
        loss = self.make(name, steps=3)
        before = {key: value.clone() for key, value in loss.state_dict().items()}
        logits = randn(8, loss.num_logits).requires_grad_()
        loss(logits, self.LABELS, 8.0, self.ROWS).backward()
        loss.image_level(logits, self.LABELS % 5, 8.0, self.ROWS).backward()
        loss.scores(logits)
        counted = loss.statistics(logits.detach(), self.LABELS, self.ROWS)
        assert_same_state(loss.state_dict(), before)
        self.step(loss, 3)
        moved = any(not torch.equal(loss.state_dict()[key], before[key]) for key in before)
        assert moved == (counted.numel() > 0)

    def test_adds_up_over_images(self, name):
        """However images are split into batches, also where the state has moved and an image has no rows."""
        loss = self.make(name, steps=3)
        logits, images = randn(8, loss.num_logits, seed=7), torch.tensor([0, 1, 1, 3, 3, 0, 0, 3])

        def values(first: int, last: int) -> list[Tensor]:
            """Of the images from `first` to before `last`."""
            mine = (images >= first) & (images < last)
            rows = rows_of((images[mine] - first).tolist(), 4, first, num_images=last - first)
            labels, z = self.LABELS[mine], logits.clone().requires_grad_()
            losses = loss(z[mine], labels, 8.0, rows), loss.image_level(z[mine], labels % 5, 8.0, rows)
            gradients = [torch.autograd.grad(each, z, retain_graph=True)[0] for each in losses]
            return [*losses, *gradients, loss.statistics(logits[mine], labels, rows)]

        for split in ((0, 1, 2, 3, 4), (0, 2, 4)):
            for whole, *parts in zip(values(0, 4), *(values(*ends) for ends in itertools.pairwise(split))):
                torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-12)

    def test_resumes_in_the_middle_of_its_accumulation(self, name):
        loss, resumed = self.make(name, steps=3), self.make(name)
        resumed.load_state_dict(loss.state_dict())
        for step in (3, 4, 5):
            self.step(loss, step)
            self.step(resumed, step)
        assert_same_state(resumed.state_dict(), loss.state_dict())
        assert resumed.summary() == loss.summary()

    def test_classes_without_training_images_divide_nothing_by_zero(self, name):
        """Also those that are never seen, and all of them before the first step."""
        none = [dataclasses.replace(each, image_count=0, instance_count=0) for each in CATEGORIES[3:]]
        loss = build_classification_loss(name, (*CATEGORIES[:3], *none))
        labels = torch.tensor([0, 1, 2, 0, 1, 5, 5, 5])
        for step in range(3):
            logits = (100 * randn(8, loss.num_logits, seed=step)).requires_grad_()
            value = loss(logits, labels, 8.0, self.ROWS)
            value.backward()
            loss.update(loss.statistics(logits.detach(), labels, self.ROWS), 1.0)
            state = [*loss.state_dict().values(), *map(torch.tensor, loss.summary().values())]
            for each in (value, logits.grad, loss.scores(logits), *state):
                assert each.isfinite().all()


# --- localization ---


def test_l1_equals_formula():
    deltas, targets = randn(9, 4), randn(9, 4, seed=1)
    expected = sum(abs(a - b) for a, b in zip(deltas.flatten().tolist(), targets.flatten().tolist()))
    assert l1_loss(deltas, targets, 5.0).item() == pytest.approx(expected / 5)


def test_objectness_equals_formula():
    logits, is_object = 4 * randn(15), torch.arange(15) % 3 == 0
    expected = 0.0
    for logit, positive in zip(logits.tolist(), is_object.tolist()):
        p = 1 / (1 + math.exp(-logit))
        expected -= math.log(p if positive else 1 - p)
    assert objectness_loss(logits, is_object, 4.0).item() == pytest.approx(expected / 4)


def test_objectness_is_stable_at_large_logits():
    # log(1 + exp(1000)) is 1000
    loss = objectness_loss(torch.tensor([1000.0, -1000.0]), torch.tensor([False, True]), 1.0)
    assert loss.item() == 2000


# --- contrastive ---


def plain_info_nce(queries, positives, negatives, mask, temperature):
    """Eq. 1 as it is printed, with a [P,Q] mask; summed over pairs."""
    total = 0.0
    for query, positive, taken in zip(queries, positives, mask):
        numerator = math.exp(float(query @ positive) / temperature)
        others = sum(math.exp(float(query @ key) / temperature) for key in negatives[taken])
        total += -math.log(numerator / (numerator + others))
    return total


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (6,)])
def test_info_nce_equals_equation_1(shape, temperature):
    queries, positives, negatives = unit(6, 8), unit(6, 8, seed=1), unit(30, 8, seed=2)
    mask = randn(*(shape or (1,)), 30, seed=3) > 0  # about half of the queue; for all pairs, or by pair
    expected = plain_info_nce(queries, positives, negatives, mask.expand(6, 30), temperature)
    mask = mask if shape else mask[0]
    loss = info_nce(queries, positives, negatives, mask, temperature, 3.0)
    assert loss.item() == pytest.approx(expected / 3)


def test_info_nce_by_hand():
    # q.p = 1, q.n = 0 and 1, tau = 1: -log(e / (e + 1 + e)); the third key would add 1 / e but is masked
    query, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    loss = info_nce(query, query, keys, torch.tensor([True, True, False]), 1.0, 1.0)
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 1 + math.e)))


@pytest.mark.parametrize("size", [0, 5])
def test_info_nce_with_an_empty_queue_is_zero(size):
    queries, positives = unit(3, 4).requires_grad_(), unit(3, 4, seed=1).requires_grad_()
    mask = torch.zeros(size, dtype=torch.bool)
    loss = info_nce(queries, positives, torch.zeros(size, 4, dtype=torch.float64), mask, 0.2, 1.0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(queries.grad, torch.zeros(3, 4, dtype=torch.float64))
    assert torch.equal(positives.grad, torch.zeros(3, 4, dtype=torch.float64))


def test_info_nce_does_not_overflow():
    # exp(1 / tau) = exp(10^4) is beyond every float; against one equal key the loss is log 2, against the
    # opposite positive 2 / tau
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    taken = torch.tensor([True])
    even = info_nce(query, query.detach(), query.detach(), taken, 1e-4, 1.0)
    worst = info_nce(query, -query.detach(), query.detach(), taken, 1e-4, 1.0)
    assert even.item() == pytest.approx(math.log(2), abs=1e-3)  # float32 at 10^4
    assert worst.item() == pytest.approx(2e4)
    worst.backward()
    torch.testing.assert_close(query.grad, torch.tensor([[2e4, 0.0]]))


def test_info_nce_gradient():
    queries, positives = unit(3, 4).requires_grad_(), unit(3, 4, seed=1).requires_grad_()
    negatives, mask = unit(5, 4, seed=2), randn(3, 5, seed=3) > 0
    torch.autograd.gradcheck(lambda q, p: info_nce(q, p, negatives, mask, 0.5, 2.0), (queries, positives))


# --- precision, empty input ---


def all_losses(dtype):
    """Each loss of its own random rows in `dtype`."""
    logits, deltas, unit_rows = randn(6, 4), randn(6, 4, seed=1), unit(6, 4, seed=2)
    logits, deltas, unit_rows = (x.to(dtype) for x in (logits, deltas, unit_rows))
    labels, everything = torch.arange(6) % 4, torch.ones(6, dtype=torch.bool)
    return {
        "cross_entropy": CrossEntropy(range(3))(logits, labels, 6.0, rows_of([0] * 6)),
        "l1": l1_loss(deltas, logits, 6.0),
        "objectness": objectness_loss(logits[:, 0], labels > 1, 6.0),
        "info_nce": info_nce(unit_rows, unit_rows.roll(1, 0), unit_rows.flip(0), everything, 0.2, 6.0),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_float32_at_least(dtype):
    # the value is that of the rounded input in float32, not a rounded one; autocast changes nothing
    losses = all_losses(dtype)
    with torch.autocast("cpu", dtype if dtype == torch.float16 else torch.bfloat16):
        under_autocast = all_losses(dtype)
    for name, loss in losses.items():
        assert loss.dtype == torch.promote_types(dtype, torch.float32), name
        assert torch.equal(loss, under_autocast[name]), name
    exact = all_losses(torch.float64)
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(dtype, 1e-5)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=tolerance), name


def test_at_least_float32_keeps_wider_types():
    kept = {t: at_least_float32(torch.ones(1, dtype=t)).dtype for t in (torch.float32, torch.float64)}
    assert kept == {torch.float32: torch.float32, torch.float64: torch.float64}


def test_nothing_costs_nothing_and_keeps_the_graph():
    logits, deltas, features = (torch.zeros(0, n, requires_grad=True) for n in (4, 4, 8))
    losses = (
        CrossEntropy(range(3))(logits, torch.zeros(0, dtype=torch.int64), 1.0, rows_of([])),
        l1_loss(deltas, torch.zeros(0, 4), 1.0),
        objectness_loss(logits[:, 0], torch.zeros(0, dtype=torch.bool), 1.0),
        info_nce(features, features, torch.zeros(5, 8), torch.ones(0, 5, dtype=torch.bool), 0.2, 1.0),
    )
    for loss in losses:
        assert loss.item() == 0
        assert loss.requires_grad
