"""Box arithmetic equals torchvision's or values worked out by hand; lazy NMS equals NMS over everything."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder, Matcher

from clis import boxes as box_ops
from clis.boxes import IGNORED, NEGATIVE, ROI_STDS, RPN_STDS


def random_boxes(count, seed, extent=500.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * extent
    size = (0.02 + 0.3 * torch.rand(count, 2, generator=generator, dtype=dtype)) * extent
    return torch.cat([corner, corner + size], dim=1)


# --- encode, decode, clip ---


def test_encode_by_hand():
    # 10 x 20 centered on (5, 10) moves to 10 x 40 centered on (10, 20): half a side on, twice as tall
    box, target = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 0, 15, 40]])
    torch.testing.assert_close(
        box_ops.encode(box, target, RPN_STDS), torch.tensor([[0.5, 0.5, 0, math.log(2)]])
    )
    torch.testing.assert_close(
        box_ops.encode(box, target, ROI_STDS), torch.tensor([[5.0, 5.0, 0, 5 * math.log(2)]])
    )


@pytest.mark.parametrize("stds", [RPN_STDS, ROI_STDS])
def test_coder_equals_torchvision(stds):
    boxes, targets = random_boxes(200, seed=0), random_boxes(200, seed=1)
    reference = BoxCoder(weights=tuple(1 / std for std in stds for _ in range(2)))
    deltas = box_ops.encode(boxes, targets, stds)
    torch.testing.assert_close(deltas, reference.encode_single(targets, boxes))
    # within the limits of growth: theirs has none to shrinkage
    noisy = deltas + 0.1 * torch.randn(
        200, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    expected = reference.decode_single(noisy, boxes)
    torch.testing.assert_close(box_ops.decode(boxes, noisy, stds), expected)


@pytest.mark.parametrize("stds", [RPN_STDS, ROI_STDS])
def test_decode_without_a_limit_to_shrinkage_equals_torchvision(stds):
    boxes = random_boxes(200, seed=0)
    deltas = 30 * torch.randn(200, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert (deltas[:, 2:] * stds[1] < math.log(0.016)).any()
    expected = BoxCoder(weights=tuple(1 / std for std in stds for _ in range(2))).decode_single(deltas, boxes)
    torch.testing.assert_close(box_ops.decode(boxes, deltas, stds, shrink_limit=0.0), expected)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20)
def test_decode_inverts_encode(seed):
    boxes, targets = random_boxes(20, seed), random_boxes(20, seed + 1)
    decoded = box_ops.decode(boxes, box_ops.encode(boxes, targets, ROI_STDS), ROI_STDS)
    torch.testing.assert_close(decoded, targets)


def test_decode_limits_growth_and_shrinkage():
    box = torch.tensor([[0.0, 0, 16, 16]])
    # 1000 / 16 = 62.5 times the size or its inverse, whatever the delta
    grown = box_ops.decode(box, torch.tensor([[0.0, 0, 1e6, 1e6]]), RPN_STDS)
    torch.testing.assert_close(grown, torch.tensor([[8.0 - 500, 8 - 500, 8 + 500, 8 + 500]]))
    shrunk = box_ops.decode(box, torch.tensor([[0.0, 0, -1e6, -1e6]]), RPN_STDS)
    torch.testing.assert_close(shrunk, torch.tensor([[8 - 0.128, 8 - 0.128, 8 + 0.128, 8 + 0.128]]))


def test_decode_takes_deltas_of_many_classes():
    boxes, deltas = random_boxes(6, seed=3), torch.randn(6, 4, 4, dtype=torch.float64)
    together = box_ops.decode(boxes[:, None], deltas, ROI_STDS)
    for label in range(4):
        torch.testing.assert_close(together[:, label], box_ops.decode(boxes, deltas[:, label], ROI_STDS))


def test_clip_takes_height_first():
    boxes = torch.tensor([[-5.0, -6, 300, 300], [10, 20, 30, 40]])
    expected = torch.tensor([[0.0, 0, 200, 100], [10, 20, 30, 40]])
    torch.testing.assert_close(box_ops.clip(boxes, (100, 200)), expected)


# --- match ---


def test_match_by_hand():
    iou = torch.tensor(
        [
            [0.80, 0.70, 0.50, 0.29, 0.30, 0.10],
            [0.75, 0.10, 0.60, 0.10, 0.10, 0.05],
        ]
    )
    # the higher of two, exactly at the positive bound, between (x2: 0.30 is not below the bound), below
    expected = [0, 0, IGNORED, NEGATIVE, IGNORED, NEGATIVE]
    assert box_ops.match(iou, 0.7, 0.3, low_quality=False).tolist() == expected


def test_low_quality_matches_by_hand():
    iou = torch.tensor(
        [
            [0.45, 0.45, 0.10, 0.00, 0.00],  # its best IoU is reached twice: both boxes
            [0.00, 0.00, 0.90, 0.35, 0.00],  # has a box; the other between the bounds stays ignored
            [0.00, 0.00, 0.00, 0.00, 0.29],  # its best box is below the negative bound: none
        ]
    )
    assert box_ops.match(iou, 0.7, 0.3, low_quality=True).tolist() == [0, 0, 1, IGNORED, NEGATIVE]
    # a box that is the best of two ground truths goes to the last, even against a higher IoU (mmdetection)
    iou = torch.tensor([[0.6, 0.2], [0.5, 0.1]])
    assert box_ops.match(iou, 0.7, 0.3, low_quality=True).tolist() == [1, NEGATIVE]


@pytest.mark.parametrize("low_quality", [False, True])
def test_match_equals_torchvision(low_quality):
    generator = torch.Generator().manual_seed(0)
    iou = torch.rand(7, 300, generator=generator) ** 2
    ours = box_ops.match(iou, 0.7, 0.3, low_quality)
    theirs = Matcher(0.7, 0.3, allow_low_quality_matches=low_quality)(iou)
    assert Matcher.BELOW_LOW_THRESHOLD == NEGATIVE
    assert Matcher.BETWEEN_THRESHOLDS == IGNORED
    assert ours.tolist() == theirs.tolist()


def test_match_without_truth_or_boxes():
    assert box_ops.match(torch.zeros(0, 3), 0.7, 0.3, low_quality=True).tolist() == [NEGATIVE] * 3
    for num_truths in (0, 2):
        matches = box_ops.match(torch.zeros(num_truths, 0), 0.7, 0.3, low_quality=True)
        assert matches.dtype == torch.int64
        assert matches.tolist() == []


# --- sample ---


def draw(matches, samples, fraction, seed=0):
    matches = torch.tensor(matches, dtype=torch.int64)
    ((positive, negative),) = box_ops.sample([matches], samples, fraction, [seed])
    return positive.tolist(), negative.tolist()


@given(
    matches=st.lists(st.sampled_from([IGNORED, NEGATIVE, 0, 1, 2]), max_size=40),
    samples=st.integers(1, 30),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=100)
def test_sample_draws_what_it_should(matches, samples, fraction, seed):
    positive, negative = draw(matches, samples, fraction, seed)
    num_positive = sum(m >= 0 for m in matches)
    assert len(positive) == min(num_positive, int(samples * fraction))
    # negatives fill what positives leave
    assert len(negative) == min(matches.count(NEGATIVE), samples - len(positive))
    assert all(matches[i] >= 0 for i in positive)
    assert all(matches[i] == NEGATIVE for i in negative)
    assert len({*positive, *negative}) == len(positive) + len(negative)
    assert (positive, negative) == draw(matches, samples, fraction, seed)


def test_sample_is_uniform():
    counts = torch.zeros(20)
    for seed in range(2000):
        positive, negative = draw([0] * 10 + [NEGATIVE] * 10, samples=6, fraction=0.5, seed=seed)
        counts[positive + negative] += 1
    # each is drawn with probability 0.3: 600 of 2000, standard deviation 20.5
    assert ((counts - 600).abs() < 5 * 20.5).all()


def test_images_of_a_batch_are_sampled_apart():
    matches = [torch.tensor([0, NEGATIVE] * 9), torch.zeros(0, dtype=torch.int64), torch.full((5,), NEGATIVE)]
    together = box_ops.sample(matches, 8, 0.5, [7, 8, 9])
    for each, seed, (positive, negative) in zip(matches, [7, 8, 9], together):
        assert draw(each.tolist(), 8, 0.5, seed) == (positive.tolist(), negative.tolist())


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
def test_random_order_is_an_order_that_neighbors_do_not_show_in(seed):
    order = box_ops.random_order(20_000, seed, torch.device("cpu"))
    assert order.min() >= 0
    assert len(order.unique()) == 20_000
    rank = order.argsort().argsort().double()
    # correlation of independent ranks: 0 with a standard deviation of 0.007
    for shift in (1, 2, 3, 64):
        pairs = torch.stack([rank[:-shift], rank[shift:]])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.035
    other = box_ops.random_order(20_000, seed ^ 1, torch.device("cpu")).argsort().argsort().double()
    assert abs(torch.corrcoef(torch.stack([rank, other]))[0, 1]) < 0.035
    # any place is as likely as another to be first: 200 bins of 100 places, the 2,000 first
    hits = torch.bincount(torch.nonzero(rank < 2000).squeeze(1) // 100, minlength=200).double()
    assert 1.5**-1 < hits.var() / 9 < 1.5  # binomial: 100 * 0.1 * 0.9


def test_rows_by_group():
    groups = torch.tensor([2, 0, 2, 3, 0])
    assert [rows.tolist() for rows in box_ops.rows_by_group(groups, 5)] == [[1, 4], [], [0, 2], [3], []]
    assert [len(rows) for rows in box_ops.rows_by_group(groups[:0], 2)] == [0, 0]


# --- NMS ---


def whole_nms(scores, boxes, groups, iou_threshold, k, score_threshold=-math.inf):
    """NMS over all candidates in float64, plainly."""
    scores, boxes, groups = scores.numpy(), boxes.double().numpy(), groups.numpy()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept, kept_of = [], {}
    for i in sorted(np.flatnonzero(scores > score_threshold).tolist(), key=lambda i: (-scores[i], i)):
        others = kept_of.setdefault(int(groups[i]), [])
        low, high = np.maximum(boxes[i, :2], boxes[others, :2]), np.minimum(boxes[i, 2:], boxes[others, 2:])
        shared = (high - low).clip(min=0).prod(axis=1)
        if (shared / (area[i] + area[others] - shared) <= iou_threshold).all():
            kept.append(i)
            others.append(i)
    return kept[:k]


def lazy_nms(scores, boxes, groups, iou_threshold, k, score_threshold=-math.inf):
    """What `nms_top_k` keeps, and how many candidates it looked at."""
    looked_at = []

    def candidates(index):
        looked_at.append(len(index))
        return boxes[index], groups[index]

    kept = box_ops.nms_top_k(scores, candidates, iou_threshold, k, score_threshold)
    return kept.tolist(), max(looked_at)


def detector_like(num_rois, num_classes, seed, extent=500.0):
    """Candidates of a detector, class by class of every RoI; boxes differ a little between classes."""
    generator = torch.Generator().manual_seed(seed)
    rois = random_boxes(num_rois, seed, extent, torch.float32)
    jitter = extent / 50 * torch.rand(num_rois, num_classes, 4, generator=generator)
    groups = torch.arange(num_classes).repeat(num_rois)
    return (rois[:, None] + jitter).reshape(-1, 4), groups, generator


@pytest.mark.parametrize("levels", [1, 2, 40, None])
@pytest.mark.parametrize("k", [1, 300, 1000])
def test_lazy_nms_is_exact_under_ties(levels, k):
    # near-uniform scores, as of a fresh classifier, quantized to `levels` different values
    boxes, groups, generator = detector_like(num_rois=60, num_classes=100, seed=k)
    scores = torch.rand(len(boxes), generator=generator)
    scores = 0.01 + 1e-6 * (scores if levels is None else (scores * levels).floor())
    kept, looked_at = lazy_nms(scores, boxes, groups, 0.5, k)
    assert kept == whole_nms(scores, boxes, groups, 0.5, k)
    assert len(kept) == k
    assert looked_at < len(scores)


@pytest.mark.parametrize(("num_rois", "num_classes", "extent"), [(60, 300, 1333.0), (15, 1203, 4000.0)])
def test_lazy_nms_is_exact_with_many_classes_and_large_coordinates(num_rois, num_classes, extent):
    boxes, groups, generator = detector_like(num_rois, num_classes, seed=5, extent=extent)
    # as in LVIS the background takes most: products of small probabilities, many of them equal
    scores = (torch.rand(len(boxes), generator=generator).pow(8) * 1000).floor() / 1000
    kept, _ = lazy_nms(scores, boxes, groups, 0.5, 300, score_threshold=1e-4)
    assert kept == whole_nms(scores, boxes, groups, 0.5, 300, score_threshold=1e-4)


def test_lazy_nms_is_exact_for_small_objects_of_late_classes():
    # classes set apart by 2000 px reach 2.4 million, where float32 knows quarters of a pixel
    groups, generator = torch.arange(1203).repeat(4), torch.Generator().manual_seed(0)
    corner = 1990 + 3 * torch.rand(len(groups), 2, generator=generator)
    boxes = torch.cat([corner, corner + 5], dim=1)
    boxes[0, :2] = 0
    scores = torch.rand(len(groups), generator=generator)
    kept, _ = lazy_nms(scores, boxes, groups, 0.5, len(groups))
    assert kept == whole_nms(scores, boxes, groups, 0.5, len(groups))
    assert 1203 < len(kept) < len(groups)


def test_lazy_nms_goes_on_until_nothing_is_left():
    # 3000 equal boxes in 3 groups leave 3, more than 1024 candidates deep
    groups = torch.arange(3000) // 1000
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(3000, 1)
    scores = torch.linspace(1, 0.5, 3000)
    kept, looked_at = lazy_nms(scores, boxes, groups, 0.5, 5)
    assert kept == [0, 1000, 2000]
    assert looked_at == 3000


@given(data=st.data(), k=st.integers(1, 12), threshold=st.sampled_from([-math.inf, 0.0, 0.5, 1.0]))
@settings(max_examples=60)
def test_lazy_nms_is_exact_on_small_grids(data, k, threshold):
    # whole coordinates: an IoU exactly at the threshold (0.5) happens and does not suppress
    sides = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 4), st.integers(1, 4))
    rows = data.draw(st.lists(st.tuples(sides, st.integers(0, 2), st.integers(0, 3)), max_size=25))
    boxes = torch.tensor([[x, y, x + w, y + h] for (x, y, w, h), _, _ in rows], dtype=torch.float32)
    groups, scores = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (1, 2))
    boxes, scores = boxes.reshape(-1, 4), scores / 2
    kept, _ = lazy_nms(scores, boxes, groups, 0.5, k, threshold)
    assert kept == whole_nms(scores, boxes, groups, 0.5, k, threshold)


def test_small_boxes_neither_survive_nor_suppress():
    # best first: 9 x 20 is too small; without the rule it would suppress the 10 x 20 (IoU 0.9)
    boxes = torch.tensor([[0.0, 0, 9, 20], [0, 0, 10, 20], [50, 50, 90, 60], [50, 50, 90, 59.9]])
    scores, group = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.zeros(4, dtype=torch.int64)
    kept = {
        size: box_ops.nms_top_k(scores, lambda i: (boxes[i], group[i]), 0.5, 4, min_size=size).tolist()
        for size in (0.0, 10.0)
    }
    assert kept == {0.0: [0, 2], 10.0: [1, 2]}


def test_score_threshold_is_exclusive():
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6], [9, 9, 10, 10]])
    scores, groups = torch.tensor([0.25, 0.5, 0.75]), torch.zeros(3, dtype=torch.int64)
    assert lazy_nms(scores, boxes, groups, 0.5, 3, score_threshold=0.25)[0] == [2, 1]
    assert lazy_nms(scores, boxes, groups, 0.5, 3, score_threshold=0.75)[0] == []
