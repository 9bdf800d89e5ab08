"""The queue holds the last keys, the momentum copy follows its closed form, the loss is Eq. 1."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import fill
from hypothesis import given, settings
from hypothesis import strategies as st

from clis.config import CLISConfig
from clis.engine.describe import ContrastWatch
from clis.models.contrastive import ContrastiveRegularization, KeyQueue, normalize, similarities
from clis.models.heads import TwoFC

# --- KeyQueue ---


def numbered(first, count):
    """Keys that say their number in the order of pushing, and labels that do too."""
    numbers = torch.arange(first, first + count)
    return numbers[:, None].repeat(1, 2).float(), numbers % 7


@given(size=st.integers(1, 9), counts=st.lists(st.integers(0, 25), max_size=8), data=st.data())
@settings(max_examples=80)
def test_queue_holds_the_last_keys(size, counts, data):
    # pushes that do not divide the queue, exceed it, wrap around in the middle, or are empty
    queue, total = KeyQueue(size, 2), 0
    saved_after = data.draw(st.integers(0, len(counts)))
    for step, count in enumerate(counts):
        if step == saved_after:  # another queue goes on from the saved state
            state, queue = queue.state_dict(), KeyQueue(size, 2)
            queue.load_state_dict(state)
        queue.push(*numbered(total, count))
        total += count
    held = range(max(0, total - size), total)
    assert queue.pushed == total
    assert queue.filled().tolist() == [place < total for place in range(size)]
    for number in held:  # key number n lies at place n modulo the size
        assert queue.keys[number % size].tolist() == [number, number]
        assert queue.labels[number % size] == number % 7


def test_queue_has_no_gradient():
    queue, keys = KeyQueue(4, 2), torch.ones(3, 2, requires_grad=True)
    queue.push(keys * 2, torch.zeros(3, dtype=torch.int64))
    assert not queue.keys.requires_grad
    assert list(queue.parameters()) == []


# --- momentum copy ---

OPTIONS = {
    "embedding_dim": 5,
    "queue_size": 7,
    "momentum": 0.9,
    "temperature": 0.2,
    "pasted_view": "symmetric",
    "mask_same_class": False,
}


def make(full=False, **options):
    """A float64 regularization of a 12 -> 6 sub-network, with an empty or a full queue; the sub-network."""
    torch.manual_seed(0)
    sub_network = TwoFC(3 * 2 * 2, 6)
    contrastive = ContrastiveRegularization(sub_network, **OPTIONS | options)
    if full:
        fill(contrastive.queue)
    return contrastive.double(), sub_network.double()


def no_keys():
    return torch.zeros(0, OPTIONS["embedding_dim"]), torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999, 1.0])
def test_momentum_copy_equals_closed_form(momentum):
    contrastive, sub_network = make(momentum=momentum)
    tracked = [*sub_network.parameters(), *contrastive.instance_mlp.parameters()]
    copies = [*contrastive.momentum_sub_network.parameters(), *contrastive.momentum_mlp.parameters()]
    history = [[p.detach().clone() for p in tracked]]
    for copied, source in zip(copies, tracked):
        assert torch.equal(copied, source)
        assert copied.data_ptr() != source.data_ptr()
    for _ in range(6):
        with torch.no_grad():
            for p in tracked:
                p.add_(torch.randn_like(p))
        history.append([p.detach().clone() for p in tracked])
        contrastive.update(sub_network, *no_keys())
    # theta_n = m^n theta_0 + (1 - m) sum over j of m^(n - j) source_j
    for place, copied in enumerate(copies):
        expected = momentum**6 * history[0][place]
        for j in range(1, 7):
            expected = expected + (1 - momentum) * momentum ** (6 - j) * history[j][place]
        torch.testing.assert_close(copied.data, expected)
    assert not any(copied.requires_grad for copied in copies)


# --- loss and keys ---


def views(num_pairs=4):
    """Pooled regions and pasted boxes [P,3,2,2] with their labels."""
    generator = torch.Generator().manual_seed(1)
    regions, pasted = (
        torch.randn(num_pairs, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return regions, pasted, torch.arange(num_pairs) % 3


def run(contrastive, sub_network, num_pairs=4, normalizer=3.0):
    regions, pasted, labels = views(num_pairs)
    return contrastive(sub_network(regions), sub_network(pasted), regions, pasted, labels, normalizer)


def move_copy(contrastive):
    """A momentum copy that is not the source any more."""
    with torch.no_grad():
        for p in [*contrastive.momentum_sub_network.parameters(), *contrastive.momentum_mlp.parameters()]:
            p.add_(0.3 * torch.randn_like(p))


@pytest.mark.parametrize("mask_same_class", [False, True])
@pytest.mark.parametrize("pasted_view", ["symmetric", "momentum", "online"])
def test_loss_is_equation_1_of_both_views(pasted_view, mask_same_class):
    contrastive, sub_network = make(pasted_view=pasted_view, mask_same_class=mask_same_class)
    move_copy(contrastive)
    key_labels = torch.tensor([0, 1, 2, 0, 1])  # 5 of 7 places filled
    contrastive.queue.push(F.normalize(torch.randn(5, 5, dtype=torch.float64), dim=1), key_labels)
    regions, pasted, labels = views()
    loss = run(contrastive, sub_network).loss

    def key(view):
        return F.normalize(contrastive.momentum_mlp(contrastive.momentum_sub_network(view)), dim=1)

    f_i = F.normalize(contrastive.image_mlp(sub_network(regions)), dim=1)
    f_d = F.normalize(contrastive.instance_mlp(sub_network(pasted)), dim=1)
    terms = {
        "symmetric": [(f_i, key(pasted)), (f_d, key(regions))],
        "momentum": [(f_i, key(pasted))],
        "online": [(f_i, f_d)],
    }[pasted_view]
    expected = 0.0
    for queries, positives in terms:
        for query, positive, label in zip(queries.detach(), positives.detach(), labels):
            numerator = math.exp(query @ positive / 0.2)
            others = sum(
                math.exp(query @ contrastive.queue.keys[place] / 0.2)
                for place in range(5)
                if not (mask_same_class and key_labels[place] == label)
            )
            expected -= math.log(numerator / (numerator + others)) / len(terms)
    assert loss.item() == pytest.approx(expected / 3)


def test_keys_are_both_views_of_the_momentum_copy():
    contrastive, sub_network = make()
    move_copy(contrastive)
    _, keys, labels, _ = run(contrastive, sub_network)
    regions, pasted, _ = views()
    assert not keys.requires_grad
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    for first, view in ((0, pasted), (1, regions)):
        expected = F.normalize(contrastive.momentum_mlp(contrastive.momentum_sub_network(view)), dim=1)
        torch.testing.assert_close(keys[first::2], expected.detach())


@pytest.mark.parametrize("pasted_view", ["symmetric", "online", "momentum"])
def test_gradients_reach_all_but_the_momentum_copy(pasted_view):
    contrastive, sub_network = make(pasted_view=pasted_view, full=True)
    loss, keys, labels, _ = run(contrastive, sub_network)
    loss.backward()
    for name, p in [*contrastive.named_parameters(), *sub_network.named_parameters()]:
        if name.startswith("momentum_"):
            assert p.grad is None, name
        else:
            assert p.grad.abs().sum() > 0, name
    # one MLP for both tasks where the instance task's own would have no gradient
    assert (contrastive.image_mlp is contrastive.instance_mlp) == (pasted_view == "momentum")
    contrastive.update(sub_network, keys, labels)
    assert contrastive.queue.labels[0] == 0


def test_momentum_view_gives_the_instance_task_no_gradient():
    regions, pasted, labels = views()
    for pasted_view, expected in (("symmetric", True), ("online", True), ("momentum", False)):
        contrastive, sub_network = make(pasted_view=pasted_view, full=True)
        instance_features = sub_network(pasted).detach().requires_grad_()
        loss, *_ = contrastive(sub_network(regions), instance_features, regions, pasted, labels, 1.0)
        (gradient,) = torch.autograd.grad(loss, instance_features, allow_unused=True)
        assert (gradient is not None) == expected


def test_a_step_without_pairs():
    contrastive, sub_network = make(full=True)
    loss, keys, labels, _ = run(contrastive, sub_network, num_pairs=0, normalizer=1.0)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in sub_network.parameters())
    contrastive.update(sub_network, keys, labels)
    assert contrastive.queue.pushed == 7


def test_autocast_leaves_loss_and_keys_in_float32():
    contrastive, sub_network = (module.float() for module in make(full=True))
    regions, pasted, labels = views()
    regions, pasted = regions.float(), pasted.float()
    with torch.autocast("cpu", torch.bfloat16):
        features = sub_network(regions), sub_network(pasted)
        assert features[0].dtype == torch.bfloat16
        loss, keys, *_ = contrastive(*features, regions, pasted, labels, 1.0)
    exact, exact_keys, *_ = contrastive(
        sub_network(regions), sub_network(pasted), regions, pasted, labels, 1.0
    )
    assert loss.dtype == keys.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    torch.testing.assert_close(keys, exact_keys, atol=0.02, rtol=0)
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(8))  # unit length in float32, not in bfloat16


def test_state_dict_round_trip_goes_on_alike():
    contrastive, sub_network = make(momentum=0.5)
    _, keys, labels, _ = run(contrastive, sub_network)
    contrastive.update(sub_network, keys, labels)
    move_copy(contrastive)
    other = ContrastiveRegularization(TwoFC(12, 6), **OPTIONS | {"momentum": 0.5}).double()
    other.load_state_dict(contrastive.state_dict())
    assert torch.equal(run(other, sub_network)[0], run(contrastive, sub_network)[0])
    for module in (contrastive, other):
        module.update(sub_network, *run(module, sub_network)[1:3])
    for name, value in contrastive.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


# --- what is learned ---


def test_similarities_by_hand():
    """Two orthogonal axes; the second pair's views are opposite, so f_i of it is nearest to the first f_d."""
    f_i = torch.tensor([[1.0, 0], [0, 1]])
    f_d = torch.tensor([[0.6, 0.8], [0, -1.0]])
    mean_key = torch.tensor([0.5, -0.2])
    # similarities 0.6 and -1 of the pairs; 0 and 0.8 of the others
    assert similarities(f_i, f_d, mean_key) == pytest.approx(
        {
            "contrast_positive": -0.2,
            "contrast_other": 0.4,
            "contrast_queue": 0.15,
            "contrast_retrieval": 0.5,
        }
    )
    assert similarities(f_i[:1], f_d[:1], mean_key) == similarities(f_i[:0], f_d[:0], mean_key) == {}


def test_mean_key_is_of_the_filled_places():
    queue = KeyQueue(6, 2)
    assert queue.mean_key().tolist() == [0, 0]
    queue.push(torch.tensor([[1.0, 0], [0, 1]]), torch.zeros(2, dtype=torch.int64))
    assert queue.mean_key().tolist() == [0.5, 0.5]
    queue.push(torch.tensor([[1.0, 0]] * 5), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(queue.mean_key(), torch.tensor([5 / 6, 1 / 6]))


def test_a_collapsed_contrast_is_told_once_from_step_100_on():
    def told(*rows):
        watch = ContrastWatch()
        looks = [(step, watch.look(step, record(*values))) for step, *values in rows]
        return [step for step, text in looks if text is not None]

    def record(positive, other, queue):
        return {"contrast_positive": positive, "contrast_other": other, "contrast_queue": queue}

    steps = range(20, 401, 20)
    assert told(*((step, 0.86, 0.83, -0.4) for step in steps)) == [100]
    assert told(*((step, 0.83, 0.51, -0.4) for step in steps)) == []  # learned
    assert told(*((step, 0.12, 0.11, -0.1) for step in steps)) == []  # not learned yet
    assert told(*((step, 0.75, 0.7, 0.1) for step in steps)) == []  # alike, and the keys with them
    resumed = range(300, 401, 20)  # sees five records before it says anything
    assert told(*((step, 0.9, 0.89, -0.2) for step in resumed)) == [380]
    assert told(*((step, 0.9, 0.89, -0.2) for step in range(1000, 9000, 1000))) == [5000]
    # alike at the start, then apart: the mean of 100 steps decides
    assert told(*((step, 0.9, 0.9 if step < 60 else 0.3, -0.4) for step in steps)) == []
    assert ContrastWatch().look(200, {"queue_filled": 7}) is None  # a batch without two pairs


def retrieval(pasted_view):
    """Share of 256 new pairs whose f_d is the nearest of all to their f_i, after a short training.

    Instances are a class prototype and a part of their own; the two views add noise, and what their scene
    has in common. Both views are also classified through the shared sub-network, as L_imcls and L_incls do.
    Shorter scales than the paper's: momentum 0.99, 4,096 keys, 32 pairs a step, beta 0.2.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    dim, classes, pairs, steps = 256, 200, 32, 1200

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    prototypes, scenes = normal(classes, dim), normal(2, dim) + normal(dim).abs()

    def draw(count):
        labels = torch.randint(classes, (count,), generator=generator)
        instances = prototypes[labels] + 0.7 * normal(count, dim)
        seen = [(0.3 * (instances + scene + 0.7 * normal(count, dim))).relu() for scene in scenes]
        return *(view[..., None, None] for view in seen), labels

    network, classifier = TwoFC(dim, 256), torch.nn.Linear(256, classes)
    options = {"embedding_dim": 128, "queue_size": 4096, "momentum": 0.99, "pasted_view": pasted_view}
    contrastive = ContrastiveRegularization(network, **OPTIONS | options)
    parameters = [p for each in (network, classifier, contrastive) for p in each.parameters()]
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.05, momentum=0.9)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1, 8 * (step + 1) / steps) * (0.1 if step > 0.8 * steps else 1)
        regions, pasted, labels = draw(pairs)
        f_i, f_d = network(regions), network(pasted)
        output = contrastive(f_i, f_d, regions, pasted, labels, pairs)
        loss = 0.2 * output.loss + 0.1 * F.cross_entropy(classifier(f_i), labels)
        loss = loss + F.cross_entropy(classifier(f_d), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        contrastive.update(network, output.keys, output.labels)
    regions, pasted, _ = draw(256)
    with torch.no_grad():
        f_i = normalize(contrastive.image_mlp(network(regions)))
        f_d = normalize(contrastive.instance_mlp(network(pasted)))
    return similarities(f_i, f_d, contrastive.queue.mean_key())["contrast_retrieval"]


@pytest.mark.slow
def test_the_default_tells_instances_apart_and_an_online_positive_does_not(one_thread):
    assert CLISConfig().pasted_view == "symmetric"
    assert retrieval(CLISConfig().pasted_view) > 0.8
    assert retrieval("online") < 0.2
