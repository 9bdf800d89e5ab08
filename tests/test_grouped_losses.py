"""The losses for long tails: worked examples, and each against its formula written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import rows_of
from test_waits import Waits

from clis.data.categories import Category
from clis.losses import build_classification_loss, find_classification_loss
from clis.losses.gumbel import gumbel_cross_entropy

LOSSES = (
    "acsl",
    "acsl(threshold=0.5, rare=0.3, common=0.6, prior=0.4)",
    "bags",
    "bags(limits=(20, 60), ratio=0.7, objectness=false)",
    "balanced_softmax",
    "balanced_softmax(tau=0.5)",
    "drop",
    "drop(tail_images=10, gumbel=true)",
    "drop(tail_images=-1, prior=0)",
    "federated(classes=3)",
    "federated(classes=50, power=1)",
    "focal",
    "focal(gamma=2)",
    "gumbel",
    "loce",
    "logit_adjusted",
    "logit_adjusted(tau=0.5)",
)


def make_categories(images, instances=None, frequency=None):
    """Classes with these training images; three times as many instances, LVIS's groups by images."""
    groups = frequency or ["r" if n <= 10 else "c" if n <= 100 else "f" for n in images]
    return tuple(
        Category(id=i, name=f"class{i}", frequency=group, image_count=n, instance_count=count)
        for i, (n, count, group) in enumerate(zip(images, instances or [3 * n for n in images], groups))
    )


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# three classes and background, label 3, in one image
THREE = make_categories((100, 10, 1), (2000, 50, 5), "fcr")
LABELS = torch.tensor([0, 2, 3, 3])
Z = torch.tensor([[1, 0, -1, -2], [0, 1, 0.5, -1], [-1, -2, 0, 2], [-2, 0, -1, 1]], dtype=torch.float64)
# of bags: background, foreground; others, class 2; others, class 1; others; others, class 0
G = torch.tensor(
    [
        [-1, 2, 0, 1, 0.5, 0, 0.3, 0, 2],
        [0, 1, 0.2, 1.5, 0, 1, 0, 0.5, 0],
        [2, -1, 1, 0, 1, -1, 0, 1, -1],
        [1, 0.5, 0, 0, 0.5, 0.5, 0, 0, 0],
    ],
    dtype=torch.float64,
)

# six classes; four images, of which the second has background alone and the third none, in mixed order
SIX = make_categories((100, 7, 0, 30, 1000, 2))
IMAGES = [0, 3, 1, 0, 3, 0, 1, 3, 0, 3, 0, 3, 1, 0]
SIX_LABELS = torch.tensor([4, 3, 6, 0, 1, 1, 6, 6, 6, 4, 4, 6, 6, 6])


# --- worked examples ---


@pytest.mark.parametrize(
    ("text", "logits", "expected"),
    [
        ("bags", G, 1.2165681428),
        ("federated(classes=3, prior=0)", Z[:, :3], 0.8100865266),  # background is the third
        ("balanced_softmax", Z, 2.1302561159),
        ("logit_adjusted", Z, 1.3712130359),
        ("logit_adjusted(tau=0)", Z, 0.5780322797),
        ("focal", Z, 0.2374163238),  # that of Unbiased Teacher's official code
        ("gumbel(prior=0)", Z, 1.1913877846),
        ("drop(tail_images=-1, prior=0)", Z[:, :3], 1.5167075415),
    ],
)
def test_worked_examples(text, logits, expected):
    loss = build_classification_loss(text, THREE)
    assert loss.num_logits == logits.shape[1]
    assert loss(logits, LABELS, 4.0, rows_of([0] * 4)).item() == pytest.approx(expected, abs=1e-9)


def test_worked_example_of_the_equilibrium_loss():
    loss = build_classification_loss("loce", THREE)
    loss.mean_scores.copy_(torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64))
    assert loss(Z, LABELS, 4.0, rows_of([0] * 4)).item() == pytest.approx(1.9574100280, abs=1e-7)


def test_worked_example_of_groups():
    """Classes 0, 1, 2 with 2000, 50 and 5 instances are in the last, second and first group."""
    loss = build_classification_loss("bags", THREE)
    per_group = groups_by_hand(loss, G, LABELS, torch.zeros(4, dtype=torch.int64), THREE)
    assert per_group.tolist() == pytest.approx([0.221128, 0.640170, 0, 0, 0.355270], abs=1e-6)
    assert loss.scores(G)[0].tolist() == pytest.approx([0.839025, 0.359635, 0.696387], abs=1e-6)
    without = build_classification_loss("bags(objectness=false)", THREE)
    assert without.num_logits == 3 + 4
    found = without(G[:, 2:], LABELS, 4.0, rows_of([0] * 4))
    assert found.item() == pytest.approx(1.2165681428 - 0.221128, abs=1e-6)
    scores = without.scores(G[:, 2:])[0] * G[0, :2].softmax(0)[1]
    torch.testing.assert_close(scores, loss.scores(G)[0])


def test_scores_at_test():
    """Softmax without the training's shifts; sigmoids and Gumbel activations with the prior."""
    for text in ("balanced_softmax", "focal", "logit_adjusted", "loce"):
        found = build_classification_loss(text, THREE).scores(Z)
        torch.testing.assert_close(found, Z.softmax(dim=1)[:, :3])
    sigmoid = (Z + math.log(0.2 / 0.8)).sigmoid()[:, :3]
    for text, logits in (("acsl", Z), ("drop", Z[:, :3]), ("federated", Z[:, :3])):
        torch.testing.assert_close(
            build_classification_loss(f"{text}(prior=0.2)", THREE).scores(logits), sigmoid
        )
    activation = (-(-Z + math.log(-math.log(0.2))).exp()).exp()[:, :3]
    for text, logits in (("gumbel(prior=0.2)", Z), ("drop(gumbel=true, prior=0.2)", Z[:, :3])):
        torch.testing.assert_close(build_classification_loss(text, THREE).scores(logits), activation)
    start = build_classification_loss("gumbel", THREE).scores(torch.zeros(1, 4))
    torch.testing.assert_close(start, torch.full((1, 3), 0.0006))


# --- against the formulas ---


def groups_by_hand(
    loss, logits, labels, images, categories, limits=(10, 100, 1000), ratio=8, objectness=True
):
    """The groups' losses, averaged over the images 0..I-1 of which all rows are given."""
    number = [sum(category.instance_count >= limit for limit in limits) for category in categories]
    background, column, blocks = len(categories), 0, []
    if objectness:
        blocks.append((0, {background: 0, **dict.fromkeys(range(background), 1)}, None))
        column = 2
    for group in range(len(limits) + 1):
        members = [label for label in range(background) if number[label] == group]
        blocks.append((column, {label: 1 + place for place, label in enumerate(members)}, members))
        column += 1 + len(members)
    assert column == loss.num_logits
    totals = []
    for first, places, members in blocks:
        width = max(places.values(), default=0) + 1
        total = logits.new_zeros(())
        for image in range(int(images.max()) + 1):
            rows = [row for row in range(len(labels)) if images[row] == image]
            is_own = [members is None or int(labels[row]) in members for row in rows]
            own, others = sum(is_own), len(rows) - sum(is_own)
            value, weight_sum = logits.new_zeros(()), 0.0
            for row, mine in zip(rows, is_own):
                weight = 1.0 if mine else min(1.0, ratio * own / others)
                log_p = logits[row, first : first + width].log_softmax(dim=0)
                value = value - weight * log_p[places.get(int(labels[row]), 0)]
                weight_sum += weight
            total = total + value / max(weight_sum, 1.0)
        totals.append(total / (int(images.max()) + 1))
    return torch.stack(totals)


def plain_bags(loss, logits, labels, rows, options):
    return groups_by_hand(loss, logits, labels, rows.images, SIX, **options).sum()


def plain_softmax(loss, logits, labels, rows, shift):
    total = logits.new_zeros(())
    for row, label in zip(logits, labels):
        terms = [(value + add).exp() for value, add in zip(row, [*shift, 0.0])]
        total = total - (terms[label] / sum(terms)).log()
    return total / 14


def plain_focal(loss, logits, labels, rows, gamma):
    total = logits.new_zeros(())
    for row, label in zip(logits, labels):
        p = row[label].exp() / row.exp().sum()
        total = total - (1 - p) ** gamma * p.log()
    return total / 14


def plain_sigmoids(logits, labels, weight, activation):
    """Sum of weight(row, column) x binary cross-entropy / 14."""
    total = logits.new_zeros(())
    for row in range(len(labels)):
        for column in range(logits.shape[1]):
            p = activation(logits[row, column])
            value = p.log() if column == labels[row] else (1 - p).log()
            total = total - weight(row, column) * value
    return total / 14


def sigmoid_of(prior):
    return lambda z: 1 / (1 + (1 - prior) / prior * (-z).exp())


def gumbel_of(prior):
    return lambda z: (math.log(prior) * (-z).exp()).exp()


def plain_acsl(loss, logits, labels, rows, threshold, rare, common, prior):
    p = sigmoid_of(prior)

    def weight(row, column):
        if labels[row] == 6:
            return 1.0 if column == 6 else {"r": rare, "c": common, "f": 1.0}[SIX[column].frequency]
        return float(column == labels[row] or p(logits[row, column]) >= threshold)

    return plain_sigmoids(logits, labels, weight, p)


def plain_drop(loss, logits, labels, rows, tail, activation):
    is_tail = [category.image_count <= tail for category in SIX]
    share = {}
    for image in range(4):
        here = [int(label) for label, of in zip(labels, rows.images) if of == image and label < 6]
        share[image] = sum(is_tail[label] for label in here) / len(here) if here else 1.0

    def weight(row, column):
        if not is_tail[column] or column == labels[row]:
            return 1.0
        return share[int(rows.images[row])] if labels[row] == 6 else 0.0

    return plain_sigmoids(logits, labels, weight, activation)


def plain_federated(loss, logits, labels, rows, classes, power):
    """The races are run in turn: the next class is the one that finishes first of those left."""
    kept = {}
    for image, numbers in enumerate(rows.uniform(6).tolist()):
        present = {int(label) for label, of in zip(labels, rows.images) if of == image}
        finish = {
            label: -math.log(1 - numbers[label]) / category.image_count**power
            for label, category in enumerate(SIX)
            if category.image_count > 0 and label not in present
        }
        while len(present) < classes and finish:
            present.add(first := min(finish, key=finish.get))
            del finish[first]
        kept[image] = present
    return plain_sigmoids(
        logits, labels, lambda row, column: float(column in kept[int(rows.images[row])]), sigmoid_of(0.01)
    )


COUNTS = [max(1, category.image_count) for category in SIX]
CENTERED = [math.log(n) - sum(map(math.log, COUNTS)) / 6 for n in COUNTS]
PLAIN = {
    "acsl": (plain_acsl, (0.7, 0.01, 0.1, 0.01)),
    "acsl(threshold=0.5, rare=0.3, common=0.6, prior=0.4)": (plain_acsl, (0.5, 0.3, 0.6, 0.4)),
    "bags": (plain_bags, ({},)),
    "bags(limits=(20, 60), ratio=0.7, objectness=false)": (
        plain_bags,
        ({"limits": (20, 60), "ratio": 0.7, "objectness": False},),
    ),
    "balanced_softmax": (plain_softmax, ([math.log(n) for n in COUNTS],)),
    "balanced_softmax(tau=0.5)": (plain_softmax, ([0.5 * math.log(n) for n in COUNTS],)),
    "drop": (plain_drop, (100, sigmoid_of(0.001))),
    "drop(tail_images=10, gumbel=true)": (plain_drop, (10, gumbel_of(0.001))),
    "drop(tail_images=-1, prior=0)": (plain_drop, (-1, sigmoid_of(0.5))),
    "federated(classes=3)": (plain_federated, (3, 0.5)),
    "federated(classes=50, power=1)": (plain_federated, (50, 1.0)),
    "gumbel": (
        lambda loss, z, labels, rows: plain_sigmoids(z, labels, lambda *_: 1.0, gumbel_of(0.0006)),
        (),
    ),
    "loce": (plain_softmax, ([0.0] * 6,)),  # mean scores are the background's at the start
    "focal": (plain_focal, (1.5,)),
    "focal(gamma=2)": (plain_focal, (2,)),
    "logit_adjusted": (plain_softmax, (CENTERED,)),
    "logit_adjusted(tau=0.5)": (plain_softmax, ([0.5 * x for x in CENTERED],)),
}


@pytest.mark.parametrize("text", LOSSES)
def test_loss_and_gradient_equal_the_formula(text):
    loss, rows = build_classification_loss(text, SIX), rows_of(IMAGES)
    logits = (2 * randn(14, loss.num_logits)).clamp(-1.9, 6).requires_grad_()  # inside Gumbel's limits
    plain, options = PLAIN[text]
    value, expected = loss(logits, SIX_LABELS, 14.0, rows), plain(loss, logits, SIX_LABELS, rows, *options)
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    ours, theirs = (torch.autograd.grad(each, logits)[0] for each in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert ours.abs().sum() > 0


# --- what holds for each ---


@pytest.mark.parametrize("text", LOSSES)
def test_the_host_waits_for_nothing(text, monkeypatch):
    loss, rows = build_classification_loss(text, SIX), rows_of(IMAGES)
    logits, waits = randn(14, loss.num_logits).requires_grad_(), Waits(monkeypatch)
    with waits:
        total = loss(logits, SIX_LABELS, 14.0, rows) + loss.image_level(logits, SIX_LABELS % 6, 14.0, rows)
        total.backward()
        loss.update(loss.statistics(logits.detach(), SIX_LABELS, rows), 0.5)
    assert sum(waits.counts.values()) == 0, waits.counts


# --- each its own ---


def test_groups_by_instances_and_their_options():
    """A class at a limit is in the next group; groups may be empty."""
    loss = build_classification_loss("bags", make_categories([1] * 5, [9, 10, 99, 100, 1000]))
    assert loss.sizes == [2, 2, 3, 2, 2]
    assert build_classification_loss("bags(limits=())", SIX).sizes == [2, 7]
    assert find_classification_loss("bags(limits=[5, 50])").keywords == {"limits": (5, 50)}
    assert build_classification_loss("bags", SIX).has_objectness
    assert not build_classification_loss("bags(objectness=false)", SIX).has_objectness
    with pytest.raises(ValueError, match=r"limits=\(100, 10\): must ascend"):
        build_classification_loss("bags(limits=(100, 10))", SIX)
    for wrong in ("10", "(10, 1.5)", "(True,)", "'x'"):
        with pytest.raises(ValueError, match=r"limits is .*; expected whole numbers, e\.g\. \(10, 100\)"):
            find_classification_loss(f"bags(limits={wrong})")


def test_priors_are_probabilities():
    for text in ("acsl", "drop", "drop(gumbel=true)", "federated", "gumbel"):
        call = text.replace(")", ", ") if "(" in text else f"{text}("
        for prior in (1, -0.1):
            with pytest.raises(ValueError, match=r"prior=.*: must be at least 0, which switches it off"):
                build_classification_loss(f"{call}prior={prior})", SIX)


def test_image_level_rows_have_a_prior_of_their_own():
    """Balanced rows without background: no shift by the long tail, and no class is masked."""
    logits, labels, rows = randn(14, 7), SIX_LABELS % 6, rows_of(IMAGES)
    for text in ("balanced_softmax", "logit_adjusted"):
        found = build_classification_loss(text, SIX).image_level(logits, labels, 7.0, rows)
        torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="sum") / 7)
    federated = build_classification_loss("federated(classes=1, prior=0)", SIX)
    found, targets = federated.image_level(logits[:, :6], labels, 7.0, rows), F.one_hot(labels, 6).double()
    expected = F.binary_cross_entropy_with_logits(logits[:, :6], targets, reduction="sum") / 7
    torch.testing.assert_close(found, expected)


def test_image_level_rows_say_nothing_about_background():
    """The stream has none: group 0 of BAGS gets no gradient from it, the groups of classes do."""
    loss = build_classification_loss("bags", SIX)
    logits = randn(14, loss.num_logits).requires_grad_()
    loss.image_level(logits, SIX_LABELS % 6, 14.0, rows_of(IMAGES)).backward()
    of_groups = [part.abs().sum().item() for part in logits.grad.split(loss.sizes, dim=1)]
    assert of_groups[0] == 0
    assert sum(each > 0 for each in of_groups[1:]) > 1


def test_others_are_drawn_by_the_root_of_their_images():
    """One class beside background: 2000 images draw classes of 100, 25, 4 and 0 images as 10 : 5 : 2 : 0."""
    loss = build_classification_loss("federated(classes=2)", make_categories((100, 25, 4, 0)))
    kept = loss.kept_classes(torch.full((2000,), 4), rows_of(range(2000)))
    assert (kept.sum(dim=1) == 1).all()
    shares = kept.double().mean(dim=0)
    expected = torch.tensor([10, 5, 2, 0], dtype=torch.float64) / 17
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / 2000).sqrt()).all()


def test_at_most_the_classes_that_have_images_are_kept():
    loss = build_classification_loss("federated", SIX)  # 50, but class 2 has none
    kept = loss.kept_classes(SIX_LABELS, rows_of(IMAGES))
    assert kept.tolist() == [[label != 2 for label in range(6)]] * 4
    few = build_classification_loss("federated(classes=1)", SIX).kept_classes(SIX_LABELS, rows_of(IMAGES))
    assert few.sum(dim=1).tolist() == [3, 0, 1, 3]  # background alone; no rows; more of its own than one


def test_focal_loss_of_certain_rows():
    """In float32 -log p is 0 for a certain row, where the weight has no slope, and p is 0 in a lost row."""
    logits = torch.tensor([[200.0, 0, 0, 0], [200.0, 0, 0, 0]], requires_grad=True)
    for text in ("focal(gamma=1)", "focal"):
        value = build_classification_loss(text, THREE)(logits, torch.tensor([0, 3]), 1.0, rows_of([0] * 2))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == 200
        assert gradient.tolist() == [[0, 0, 0, 0], [1, 0, 0, -1]]


def test_gumbel_is_exact_at_its_limits():
    """-log p = e^4 at -4, and -log(1 - p) = 10 + 2e-5 at 10; no gradient beyond."""
    logits = torch.tensor([[-4.0, 10.0, -9.0, 30.0]], requires_grad=True)
    value = gumbel_cross_entropy(logits, torch.tensor([[1, 0, 1, 0]]))
    expected = torch.tensor([math.exp(4), 10 + 2.27e-5] * 2)
    torch.testing.assert_close(value[0], expected, rtol=1e-6, atol=0)
    value.sum().backward()
    assert logits.grad[0, 2:].tolist() == [0, 0]


def test_mean_scores_after_three_steps():
    """Two classes. Rows give their own class 0.8 and 0.4 (image 0, class 0), 0.5 (image 0, class 1) and 0.2
    (image 1, class 0); then class 1 alone with 0.5; then background alone."""
    loss = build_classification_loss("loce", make_categories((5, 5)))
    own = [(0, 0, 0.8), (0, 0, 0.4), (0, 1, 0.5), (1, 0, 0.2), (1, 2, 0.9)]
    steps = [own, [(0, 1, 0.5)], [(0, 2, 0.3)]]
    expected = [0.01, 0.01]
    for step, rows in enumerate(steps):
        images, labels, scores = zip(*rows)
        odds = torch.full((len(rows), 3), 0.5, dtype=torch.float64)
        p = torch.tensor(scores, dtype=torch.float64)
        odds = odds * (1 - p)[:, None]
        odds[range(len(rows)), labels] = p
        counted = loss.statistics(odds.log(), torch.tensor(labels), rows_of(images))
        loss.update(counted, (step + 1) / 3)
        if step == 0:  # class 0: two images, with 0.6 and 0.2; class 1: one
            expected = [0.81 * 0.01 + 0.19 * 0.4, 0.9 * 0.01 + 0.1 * 0.5]
        if step == 1:
            expected[1] = 0.9 * expected[1] + 0.1 * 0.5
        assert loss.mean_scores.tolist() == pytest.approx(expected, abs=1e-15)
    assert loss.summary() == {
        "mean_score_median": pytest.approx(min(expected)),  # the lower of two
        "mean_score_min": pytest.approx(min(expected)),
    }
    assert list(loss.state_dict()) == ["mean_scores"]  # saved, unlike what the categories give


@pytest.mark.parametrize(
    ("text", "shifts"),
    [
        # n = 4, 1, 0 and background's 16: the logs are 2, 0, 0 (of no RoI as of one) and 4, in units of log 2
        ("balanced_softmax(counted=true)", [2, 0, 0, 4]),
        ("balanced_softmax(counted=true, tau=0.5)", [1, 0, 0, 2]),
        # less their mean over the classes, 2 / 3; background has none
        ("logit_adjusted(counted=true)", [4 / 3, -2 / 3, -2 / 3, 0]),
    ],
)
def test_margins_by_the_rois_of_all_steps_so_far(text, shifts):
    """Not by training images: two steps, of which the second has the class 1 alone beside background."""
    loss = build_classification_loss(text, THREE)
    assert loss.shifts().tolist() == [0] * 4
    for labels in ([0, 0, 0, 0] + [3] * 10, [1] + [3] * 6):
        rows = rows_of([0] * len(labels))
        loss.update(loss.statistics(randn(len(labels), 4), torch.tensor(labels), rows), 0.5)
    assert loss.counts.tolist() == [4, 1, 0, 16]
    assert loss.summary() == {"margin_count_median": 1, "margin_count_min": 0}
    expected = math.log(2) * torch.tensor(shifts, dtype=torch.float64)
    torch.testing.assert_close(loss.shifts(), expected)

    # they are of training alone, and not of regions; the counts are saved
    shifted = F.cross_entropy(Z + expected, LABELS, reduction="sum") / 4
    torch.testing.assert_close(loss(Z, LABELS, 4.0, rows_of([0] * 4)), shifted)
    plain = F.cross_entropy(Z, LABELS % 3, reduction="sum") / 4
    torch.testing.assert_close(loss.image_level(Z, LABELS % 3, 4.0, rows_of([0] * 4)), plain)
    torch.testing.assert_close(loss.scores(Z), Z.softmax(dim=1)[:, :3])
    assert list(loss.state_dict()) == ["counts"]


def test_what_balanced_softmax_does_to_the_odds_against_background():
    """A class of 40,000 images that is even with background in training: by images it is 1 to 40,000 at test,
    and by RoIs, of which background has a million and the class a thousand, 1000 to 1."""
    (category,) = make_categories((40_000,))
    by_images = build_classification_loss("balanced_softmax", [category])
    by_rois = build_classification_loss("balanced_softmax(counted=true)", [category])
    by_rois.counts.copy_(torch.tensor([1e3, 1e6]))
    for loss, score in ((by_images, 1 / 40_001), (by_rois, 1000 / 1001)):
        assert loss.scores(-loss.shifts()[None]).item() == pytest.approx(score)


@pytest.mark.parametrize("text", [text for text in LOSSES if text != "loce"])
def test_what_the_categories_give_is_not_saved(text):
    assert not build_classification_loss(text, SIX).state_dict()
