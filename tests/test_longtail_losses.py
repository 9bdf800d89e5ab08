"""The long-tail losses: official numbers, the plain formulas, and what they accumulate.

The numbers are those of the official implementations on the same logits, where these have a counterpart. What
all losses have in common is in test_losses.py.
"""

import dataclasses
import math

import pytest
import torch
from conftest import CATEGORIES, rows_of

from clis.losses import ClassificationLoss, build_classification_loss
from clis.losses.pcb import PairwiseClassBalance

LABELS = torch.tensor([0, 2, 3, 3])  # three classes, background is 3
ROWS = rows_of([0, 0, 0, 0])
THREE = tuple(
    dataclasses.replace(CATEGORIES[0], image_count=images, instance_count=instances)
    for images, instances in ((1000, 2000), (200, 50), (5, 5))
)
Z = torch.tensor([[1, 0, -1, -2], [0, 1, 0.5, -1], [-1, -2, 0, 2], [-2, 0, -1, 1]], dtype=torch.float64)
S = torch.tensor(  # Seesaw's: three classes, object, background
    [[1, 0, -1, 2, -1], [0, 1, 0.5, 1, 0], [-1, -2, 0, -1, 1], [-2, 0, -1, 0, 2]], dtype=torch.float64
)
CONFUSION = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.5, 0.3, 0.2]])


def build(name: str) -> ClassificationLoss:
    return build_classification_loss(name, THREE)


def close(found: torch.Tensor, expected: float | list, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance
    )


class TestOfficialNumbers:
    def test_cross_entropy(self):
        close(build("cross_entropy")(Z, LABELS, 4, ROWS), 0.5780322797)

    def test_eqlv2_at_the_start(self):
        """All weights are 1."""
        loss = build("eqlv2(prior=0)")
        close(loss(Z, LABELS, 4, ROWS), 1.7368023908)
        positive, negative = loss.statistics(Z, LABELS, ROWS)
        close(positive, [0.268941, 0, 0.377541])
        close(negative, [0.888144, 1.850262, 1.037883])

    def test_eqlv2_with_gradients(self):
        """Ratios 1, 1/2 and 1/10: negatives of the second class hardly count, of the third not at all."""
        loss = build("eqlv2(prior=0)")
        loss.ratio.sums.copy_(torch.tensor([[2, 1, 0.1], [2, 2, 1]]))
        close(loss(Z, LABELS, 4, ROWS), 1.1955914545)
        positive, negative = loss.statistics(Z, LABELS, ROWS)
        close(positive, [0.358416, 0, 1.887364])
        close(negative, [0.814275, 0.049211, 0.000233])
        close(loss.scores(Z)[0], [0.643914, 0.440399, 0.236883])
        summary = loss.summary()
        assert summary["eqlv2_ratio_median"] == pytest.approx(0.5)
        assert summary["eqlv2_ratio_min"] == pytest.approx(0.1)
        assert summary["eqlv2_below_mu"] == pytest.approx(2 / 3)

    def test_eql(self):
        """The third class is a tail class: it is no negative in the first row."""
        logits = Z[:, :3]
        close(build("eql(prior=0)")(logits, LABELS, 4, ROWS), 1.4383921196)
        close(build("eql(prior=0, tail_images=0)")(logits, LABELS, 4, ROWS), 1.5167075415)
        close(build("eql(prior=0)").scores(logits)[0], [0.731059, 0.5, 0.268941])

    def test_seesaw(self):
        loss, classes_only = build("seesaw"), build("seesaw(objectness=false)")
        for each in (loss, classes_only):
            each.counts.copy_(torch.tensor([100, 10, 1]))
        close(classes_only(S[:, :3], LABELS, 4, ROWS), 0.4665578206)
        close(loss(S, LABELS, 4, ROWS), 0.4665578206 + 0.1539262653)
        close(loss.scores(S)[0], [0.633691, 0.233122, 0.085761])
        close(classes_only.scores(S[:, :3])[0], [0.665241, 0.244728, 0.090031])
        assert loss.has_objectness
        assert not classes_only.has_objectness

    def test_seesaw_in_the_official_order(self):
        """mmdetection counts first: 101, 10, 2 where ours still has 100, 10, 1."""
        loss = build("seesaw")
        close(loss(S, LABELS, 4, ROWS), 0.5534904192 + 0.1539262653)  # 0, 0, 0, and 1, 0, 1, are the same
        loss.counts.copy_(torch.tensor([100, 10, 1]))
        loss.update(loss.statistics(S, LABELS, ROWS), 0.1)
        assert loss.counts.tolist() == [101, 10, 2]
        close(loss(S, LABELS, 4, ROWS), 0.4670307019 + 0.1539262653)

    def test_pcb_on_seesaw(self):
        """After the matrix has moved; the three values are those of the official rounds: 0, A / 2, A."""
        loss = build("seesaw(pcb=0.05, pcb_start=0)")
        loss.pcb.matrix.copy_(CONFUSION)
        loss.update(loss.statistics(S, LABELS, ROWS), 0.1)
        close(loss.pcb.matrix[0], [0.699652, 0.200447, 0.099900])
        loss.pcb.weight.fill_(1.0)
        close(loss.pcb.targets(LABELS, 3, torch.float64, 1.0)[0], [0.467521, 0.200466, 0.332013])
        loss.counts.copy_(torch.tensor([100, 10, 1]))
        loss.pcb.weight.fill_(0.05)
        rounds = [loss(S, LABELS, 4, dataclasses.replace(ROWS, stage=stage)) for stage in (0, 0.5, 1)]
        close(torch.stack(rounds), [0.6204841, 0.6342805, 0.6480769])
        close(torch.stack(rounds) @ torch.tensor([0.2, 0.2, 0.6]).double(), 0.6397991)

    def test_efl(self):
        """Ratios 1, 1/2 and 1/10 are gamma 2, 6 and 9.2. Divided by the positives, 2 of 4 rows."""
        loss, logits, rows = build("efl(prior=0)"), Z[:, :3], dataclasses.replace(ROWS, positive_fraction=0.5)
        close(loss(logits, LABELS, 4, rows), 1.1225054736 / 2)  # at the start, plain focal loss
        loss.ratio.sums.copy_(torch.tensor([[1, 1, 0.1], [1, 2, 1]]))
        close(loss(logits, LABELS, 4, rows), 0.6579347527 / 2)
        close(loss.image_level(logits, LABELS, 1, ROWS), 0.6579347527)
        positive, negative = loss.statistics(logits, LABELS, ROWS)
        close(positive, [0.013145, 0, 0.000456])
        close(negative, [0.266804, 1.160346, 0.021729])
        close(loss.scores(logits)[0], [0.731059, 0.5, 0.268941])


# --- the plain formulas, row by row; 5 classes, background is 5 ---


def plain_eqlv2(row, label, state):
    """gamma 12, mu 0.8, alpha 4; a background channel at the end."""
    total = 0.0
    for channel, z in enumerate(row):
        p = 1 / (1 + torch.exp(-z))
        f = 1.0 if channel == 5 else 1 / (1 + math.exp(-12 * (state[0][channel] / state[1][channel] - 0.8)))
        total -= (1 + 4 * (1 - f)) * p.log() if channel == label else f * (1 - p).log()
    return total


def plain_eql(row, label, state):
    total = 0.0
    for channel, z in enumerate(row):
        p = 1 / (1 + torch.exp(-z))
        if channel == label:
            total -= p.log()
        elif label == 5 or CATEGORIES[channel].image_count > 100:
            total -= (1 - p).log()
    return total


def plain_efl(row, label, state):
    total = 0.0
    for channel, z in enumerate(row):
        p = 1 / (1 + torch.exp(-z))
        gamma = 2 + 8 * (1 - min(1, state[0][channel] / state[1][channel]))
        p_t, a_t = (p, 0.25) if channel == label else (1 - p, 0.75)
        total -= a_t * gamma / 2 * (1 - p_t) ** gamma * p_t.log()
    return total


def plain_seesaw(row, label, state):
    objectness = row[5:].exp() / row[5:].exp().sum()
    if label == 5:
        return -objectness[1].log()
    p = row[:5].detach().exp() / row[:5].detach().exp().sum()
    below = 0.0
    for j in range(5):
        mitigation = min(1, state[j] / state[label]) ** 0.8
        compensation = max(1, p[j] / max(p[label], 0.01)) ** 2
        below += (1 if j == label else mitigation * compensation) * row[j].exp()
    return -(row[label].exp() / below).log() - objectness[0].log()


def plain_pcb(row, label, state):
    """Cross-entropy whose target is by half what gets predicted as the label."""
    log_p = (row.exp() / row.exp().sum()).log()
    if label == 5:
        return -log_p[5]
    column = [state[i][label] for i in range(5)]
    return -log_p[label] / 2 - sum(share / sum(column) * log_p[i] for i, share in enumerate(column)) / 2


def plain_eqlv2_pcb(row, label, state):
    """As `plain_eqlv2`, with a target t of which half is what gets predicted as the label."""
    (positive, negative), matrix = state
    column = [matrix[i][label] if label < 5 else 0 for i in range(5)]
    total = 0.0
    for channel, z in enumerate(row):
        p = 1 / (1 + torch.exp(-z))
        f = 1 / (1 + math.exp(-12 * (positive[channel] / negative[channel] - 0.8)))
        t = 0.5 * (channel == label) + 0.5 * column[channel] / max(sum(column), 1e-9)
        weight = (1 + 4 * (1 - f)) * t + f * (1 - t)
        total -= weight * (t * p.log() + (1 - t) * (1 - p).log())
    return total


def uniform(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RATIO = 0.1 + uniform(2, 5, seed=1)
COUNTS = torch.tensor([1000.0, 100, 30, 5, 1], dtype=torch.float64)
PCB = {"pcb.matrix": uniform(5, 5, seed=2) / 2.5, "pcb.weight": torch.tensor(0.5)}


@pytest.mark.parametrize(
    ("name", "plain", "buffers"),
    [
        ("eqlv2(prior=0)", plain_eqlv2, {"ratio.sums": RATIO}),
        ("eql(prior=0)", plain_eql, {}),
        ("efl(prior=0)", plain_efl, {"ratio.sums": RATIO}),
        ("seesaw", plain_seesaw, {"counts": COUNTS}),
        ("cross_entropy(pcb=1)", plain_pcb, PCB),
        ("eqlv2(prior=0, pcb=1, objectness=false)", plain_eqlv2_pcb, {"ratio.sums": RATIO} | PCB),
    ],
)
def test_value_and_gradient_of_the_plain_formula(name, plain, buffers):
    loss = build_classification_loss(name, CATEGORIES)
    for buffer, value in buffers.items():
        loss.get_buffer(buffer).copy_(value)
    states = [value.tolist() for value in buffers.values() if value.ndim > 0]
    state = states[0] if len(states) == 1 else states
    logits = (6 * uniform(12, loss.num_logits, seed=3) - 3).requires_grad_()
    labels = torch.arange(12) % 6
    expected = sum(plain(row, label, state) for row, label in zip(logits, labels.tolist())) / 7
    value = loss(logits, labels, 7.0, rows_of([0] * 12))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["eqlv2", "efl", "eql"])
def test_a_prior_is_a_constant_that_is_added_to_the_logits(name):
    plain, loss = (build(call) for call in (f"{name}(prior=0)", f"{name}(prior=0.01)"))
    logits = uniform(4, loss.num_logits, seed=4)
    shifted = logits + math.log(0.01 / 0.99)
    for function in ("forward", "image_level", "statistics"):
        rest = (LABELS, ROWS) if function == "statistics" else (LABELS, 4, ROWS)
        found, expected = getattr(loss, function)(logits, *rest), getattr(plain, function)(shifted, *rest)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss.scores(logits), plain.scores(shifted))
    default = build(name).scores(torch.zeros(1, loss.num_logits))
    close(default, [[0.001 * (0.999 if name == "eqlv2" else 1)] * 3], 1e-8)


@pytest.mark.parametrize("name", ["eqlv2", "eqlv2(objectness=false)", "efl"])
def test_statistics_are_the_gradient_of_the_loss(name):
    """By central differences of the loss, each entry alone: |dL/dz|, of positives and of the others."""
    loss = build_classification_loss(name, CATEGORIES)
    loss.ratio.sums.copy_(RATIO)
    logits, labels = 8 * uniform(7, loss.num_logits, seed=5) - 4, torch.tensor([0, 1, 2, 3, 4, 5, 5])
    rows, step = rows_of([0] * 7), 1e-5
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        for j in range(5):
            moved = torch.zeros_like(logits)
            moved[i, j] = step
            difference = loss(logits + moved, labels, 1.0, rows) - loss(logits - moved, labels, 1.0, rows)
            expected[0 if j == label else 1, j] += (difference / (2 * step)).abs()
    torch.testing.assert_close(loss.statistics(logits, labels, rows), expected, rtol=1e-7, atol=1e-8)


def test_statistics_of_soft_targets_are_the_gradient_too():
    """A target t of PCB is between 0 and 1: |dL/dz| counts as positive by t, as negative by 1 - t."""
    loss = build_classification_loss("eqlv2(objectness=false, pcb=0.5, pcb_start=0)", CATEGORIES)
    loss.ratio.sums.copy_(RATIO)
    loss.pcb.matrix.copy_(uniform(5, 5, seed=3).softmax(dim=1))
    loss.pcb.weight.fill_(0.5)
    logits = (8 * uniform(7, 5, seed=5) - 4).requires_grad_()
    labels, rows = torch.tensor([0, 1, 2, 3, 4, 5, 5]), rows_of([0] * 7)
    (gradient,) = torch.autograd.grad(loss(logits, labels, 1.0, rows), logits)
    targets = loss.pcb.targets(labels, 5, logits.dtype, 1.0)
    assert ((targets > 0.01) & (targets < 0.99)).any()
    expected = [(gradient.abs() * part).sum(dim=0) for part in (targets, 1 - targets)]
    counted = loss.statistics(logits.detach(), labels, rows)[:10].unflatten(0, (2, 5))
    torch.testing.assert_close(counted, torch.stack(expected))


class TestAccumulation:
    def test_gradients_over_three_steps_by_hand(self):
        """At logits 0 every |s - t| is 1/2, and with weights 1 so is the gradient.

        Step 1: class 0 is positive once in two rows, 1 never. G+ = 1/2, 0; G- = 1/2, 1. Then g = 1, 0, so f =
        sigmoid(2.4) and sigmoid(-9.6). Step 2, the same rows: class 0 gains (1 + 4 (1 - f)) / 2 and f / 2,
        class 1 gains f. In step 3 there is no row.
        """
        loss = build_classification_loss("eqlv2(prior=0)", THREE[:2])
        logits, labels, rows = torch.zeros(2, 3), torch.tensor([0, 2]), rows_of([0, 0])
        loss.update(loss.statistics(logits, labels, rows), 0.1)
        close(loss.ratio.sums, [[0.5, 0], [0.5, 1]])
        loss.update(loss.statistics(logits, labels, rows), 0.2)
        f, g = 1 / (1 + math.exp(-2.4)), 1 / (1 + math.exp(9.6))
        expected = [[0.5 + (1 + 4 * (1 - f)) / 2, 0], [0.5 + f / 2, 1 + g]]
        close(loss.ratio.sums, expected)
        loss.update(loss.statistics(logits[:0], labels[:0], rows_of([])), 0.3)
        close(loss.ratio.sums, expected)

    def test_efl_over_two_steps_by_hand(self):
        """At logits 0: p = 1/2, and with gamma 2 a slope of (1/2)^2 (1/2 + 2 / 2 log 2), times 1/4 or 3/4."""
        loss = build_classification_loss("efl(prior=0)", THREE[:2])
        logits, labels, rows = torch.zeros(2, 2), torch.tensor([0, 2]), rows_of([0, 0])
        loss.update(loss.statistics(logits, labels, rows), 0.1)
        slope = (0.5 + math.log(2)) / 4
        close(loss.ratio.sums, [[slope / 4, 0], [slope * 3 / 4, slope * 3 / 2]])
        # g = 1/3 and 0: gamma 2 + 8 * 2/3 and 10
        loss.update(loss.statistics(logits, labels, rows), 0.2)
        slopes = [gamma / 2 * 0.5**gamma * (0.5 + gamma / 2 * math.log(2)) for gamma in (22 / 3, 10)]
        positive, negative = slope / 4 + slopes[0] / 4, slope * 3 / 4 + slopes[0] * 3 / 4
        close(loss.ratio.sums, [[positive, 0], [negative, slope * 3 / 2 + slopes[1] * 3 / 2]])

    def test_seesaw_counts_rois_not_regions(self):
        loss = build("seesaw(objectness=false)")
        logits = torch.zeros(6, 3)
        for labels in ([0, 0, 2, 3, 3, 3], [3, 3, 3, 3, 3, 3], [1, 1, 1, 0, 3, 3]):
            loss.update(loss.statistics(logits, torch.tensor(labels), ROWS), 0.1)
            loss.image_level(logits, torch.tensor([2] * 6), 6, ROWS)
        assert loss.counts.tolist() == [3, 3, 1]
        assert loss.summary() == {"seesaw_count_median": 3, "seesaw_count_min": 1}

    def test_pcb_over_three_steps_by_hand(self):
        """Mean predictions .75, .25 of class 0; then .25, .75 of class 1 alone; then uniform ones of both."""
        pcb = PairwiseClassBalance(THREE[:2], 0.4, 0.5)
        pcb.update(pcb.statistics(torch.tensor([[1.0, 0], [0.5, 0.5]]), torch.tensor([0, 0])), 0.4)
        close(pcb.matrix, [[0.75, 0.25], [0, 0]])
        assert pcb.summary() == {"pcb_weight": 0, "pcb_unseen": 1}
        pcb.update(pcb.statistics(torch.tensor([[0.25, 0.75]]), torch.tensor([1])), 0.49)
        close(pcb.matrix, [[0.75, 0.25], [0.25, 0.75]])
        assert pcb.summary() == {"pcb_weight": 0, "pcb_unseen": 0}  # every class was seen, but too early
        # RoIs of background, which is label 2, do not count
        predictions = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1, 0]])
        pcb.update(pcb.statistics(predictions, torch.tensor([0, 1, 2])), 0.5)
        close(pcb.matrix, [[0.7475, 0.2525], [0.2525, 0.7475]])
        assert pcb.summary() == {"pcb_weight": pytest.approx(0.4), "pcb_unseen": 0}
        targets = pcb.targets(torch.tensor([0, 2]), 3, torch.float64, 1.0)
        close(targets, [[0.6 + 0.4 * 0.7475, 0.4 * 0.2525, 0], [0, 0, 1]])

    def test_pcb_does_not_wait_for_a_class_that_never_occurs(self):
        """Class 2 has a training image, but no RoI: a crowd, or an image that is not in this file."""
        pcb = PairwiseClassBalance(THREE, 0.4, 2 / 3)
        predictions = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2]])
        pcb.update(pcb.statistics(predictions, torch.tensor([0, 1])), 1.0)
        assert pcb.summary() == {"pcb_weight": pytest.approx(0.4), "pcb_unseen": 1}
        targets = pcb.targets(torch.tensor([0, 1, 2]), 4, torch.float64, 1.0)
        # column 0 is .6, .2 and nothing; column 2 is .2, .2 and nothing
        close(targets, [[0.9, 0.1, 0, 0], [0.1, 0.9, 0, 0], [0.2, 0.2, 0.6, 0]])

    def test_official_ratio_before_the_first_step(self):
        for name in ("eqlv2", "efl"):
            assert build(name).ratio().tolist() == [100, 100, 100]


class TestImageLevel:
    """Regions hold their class: no background logit takes part in their loss."""

    LABELS = torch.tensor([0, 2, 1, 1])

    @pytest.mark.parametrize(("name", "logits"), [("eqlv2", Z), ("seesaw", S)])
    def test_objectness_has_no_gradient(self, name, logits):
        logits = logits.clone().requires_grad_()
        build(name).image_level(logits, self.LABELS, 4, ROWS).backward()
        assert (logits.grad[:, :3] != 0).all()
        assert (logits.grad[:, 3:] == 0).all()

    def test_seesaw_is_plain_cross_entropy(self):
        loss = build("seesaw")
        loss.counts.copy_(torch.tensor([100, 10, 1]))
        expected = torch.nn.functional.cross_entropy(S[:, :3], self.LABELS)
        torch.testing.assert_close(loss.image_level(S, self.LABELS, 4, ROWS), expected)

    def test_eqlv2_reads_its_weights(self):
        loss, without = build("eqlv2"), build("eqlv2(objectness=false)")
        for each in (loss, without):
            each.ratio.sums.copy_(torch.tensor([[2, 1, 0.1], [2, 2, 1]]))
        found = loss.image_level(Z, self.LABELS, 4, ROWS)
        torch.testing.assert_close(found, without(Z[:, :3], self.LABELS, 4, ROWS))
        assert found > build("eqlv2").image_level(Z, self.LABELS, 4, ROWS)  # positives weigh up to 5

    def test_efl_divides_by_regions_which_are_all_positive(self):
        """Of RoIs only `positive_fraction` of the rows can be: a quarter of them is four times the loss."""
        loss, logits, rois = build("efl"), Z[:, :3], dataclasses.replace(ROWS, positive_fraction=0.25)
        of_regions = loss.image_level(logits, self.LABELS, 4, ROWS)
        torch.testing.assert_close(loss(logits, self.LABELS, 4, rois), 4 * of_regions)
