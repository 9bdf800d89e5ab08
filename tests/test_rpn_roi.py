"""Anchors, proposals, RoIs and detections equal torchvision's, a plain reference or hand-made values."""

import math

import pytest
import torch
from conftest import random_boxes, tiny_config
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image, nms, roi_align
from torchvision.ops.poolers import LevelMapper

from clis import boxes as box_ops
from clis.config import RoIConfig, RPNConfig
from clis.models.backbone import STRIDES
from clis.models.roi import RoIPooler, sample_rois, select_detections
from clis.models.roi_align import roi_align_by_products
from clis.models.rpn import RPN, cell_anchors, grid_anchors
from clis.models.windows import windows

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pyramid(channels, height, width, images=1, seed=0):
    """Random float64 features P2-P6 of images of height x width."""
    random = generator(seed)
    return [
        torch.randn(
            images,
            channels,
            math.ceil(height / s),
            math.ceil(width / s),
            generator=random,
            dtype=torch.float64,
        )
        for s in STRIDES
    ]


# --- anchors ---


def make_anchors(config, stride, height, width):
    return grid_anchors(cell_anchors(config, stride), height, width, (stride, stride))


def test_anchors_by_hand():
    # side 8 * 16 = 128; the ratio 1/2 is sqrt(2) wider and sqrt(2) flatter: 181.02 x 90.51
    anchors = make_anchors(RPNConfig(), stride=16, height=2, width=3)
    first = [[-90.51, -45.25, 90.51, 45.25], [-64, -64, 64, 64], [-45.25, -90.51, 45.25, 90.51]]
    assert anchors.shape == (2 * 3 * 3, 4)
    torch.testing.assert_close(anchors[:3], torch.tensor(first), atol=0.01, rtol=0)
    # the cell of row 1, column 2 is the sixth: 32 to the right, 16 down
    shift = torch.tensor([32.0, 16, 32, 16])
    torch.testing.assert_close(anchors[15:], anchors[:3] + shift)
    sides = anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(sides.prod(dim=1), torch.full((18,), 128.0**2))
    torch.testing.assert_close((sides[:, 1] / sides[:, 0]).reshape(6, 3), torch.tensor([[0.5, 1, 2]] * 6))


def test_anchors_equal_torchvision():
    sizes, ratios = tuple((8 * stride,) for stride in STRIDES), ((0.5, 1.0, 2.0),) * 5
    shapes = [(-(-96 // s), -(-128 // s)) for s in STRIDES]
    images = ImageList(torch.zeros(1, 3, 96, 128), [(96, 128)])
    expected = AnchorGenerator(sizes, ratios)(images, [torch.zeros(1, 1, *shape) for shape in shapes])[0]
    ours = torch.cat([make_anchors(RPNConfig(), s, *shape) for s, shape in zip(STRIDES, shapes)])
    # theirs are rounded to whole pixels, and their last level strides 96 // 2 = 48, not 64
    last = 3 * shapes[-1][0] * shapes[-1][1]
    torch.testing.assert_close(ours[:-last], expected[:-last], atol=0.5, rtol=0)


@pytest.mark.parametrize("size", [(96, 128), (160, 32), (416, 800)])
def test_rounded_anchors_on_the_grid_are_torchvisions(size):
    config = RPNConfig(round_anchors=True, anchor_spacing="grid")
    features = [torch.zeros(1, 2, *(-(-side // stride) for side in size)) for stride in STRIDES]
    sizes = tuple((8 * stride,) for stride in STRIDES)
    images = ImageList(torch.zeros(1, 3, *size), [size])
    expected = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)(images, features)[0]
    assert torch.equal(torch.cat(RPN(2, config).anchors(features)), expected)
    nominal = torch.cat(RPN(2, RPNConfig(round_anchors=True)).anchors(features))
    assert not torch.equal(nominal, expected)  # P6 has an odd grid of P5 below it


def test_anchors_do_not_depend_on_the_sizes_before():
    """They are cut out of the largest grid so far: smaller and wider maps, another type, inference mode."""
    rpn = RPN(2, RPNConfig())
    for height, width in ((96, 64), (64, 64), (32, 160), (96, 160), (96, 64)):
        features = pyramid(2, height, width)
        with torch.inference_mode(height == 32):
            found = torch.cat(rpn.anchors(features))
        assert torch.equal(found, torch.cat(RPN(2, RPNConfig()).anchors(features)))
        assert not rpn.anchors(features)[0].is_inference()
    exact = torch.cat(rpn.double().anchors(features))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), found)


def test_rpn_output_belongs_to_its_anchor():
    torch.manual_seed(0)
    rpn, features = RPN(4, RPNConfig()).double(), pyramid(4, 64, 96, images=2)
    (objectness, deltas), anchors = rpn(features), rpn.anchors(features)
    for level, feature in enumerate(features):
        hidden = rpn.conv(feature).relu()
        logits, moves = rpn.objectness(hidden), rpn.deltas(hidden)
        height, width = feature.shape[2:]
        for image, y, x, ratio in [(0, 0, 0, 0), (1, height - 1, width - 1, 2), (1, height // 2, 0, 1)]:
            row = (y * width + x) * 3 + ratio
            assert objectness[level][image, row] == logits[image, ratio, y, x]
            assert torch.equal(deltas[level][image, row], moves[image, 4 * ratio : 4 * ratio + 4, y, x])
            center = (anchors[level][row, :2] + anchors[level][row, 2:]) / 2
            expected = torch.tensor([x, y]) * STRIDES[level]
            torch.testing.assert_close(center, expected.double(), atol=1e-3, rtol=0)


# --- proposals ---


def random_levels(config, height, width, seed=0):
    """Random predictions of one image, of every level: leaves logits [1,n], deltas [1,n,4]; anchors [n,4]."""
    random, objectness, deltas, anchors = generator(seed), [], [], []
    for stride in STRIDES:
        anchors.append(make_anchors(config, stride, math.ceil(height / stride), math.ceil(width / stride)))
        shape = (1, len(anchors[-1]))
        objectness.append(torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_())
        move = 0.5 * torch.randn(*shape, 4, generator=random, dtype=torch.float64)
        deltas.append(move.requires_grad_())
    return objectness, deltas, anchors


@pytest.mark.parametrize("training", [True, False])
def test_proposals_equal_plain_reference(training):
    config = RPNConfig(pre_nms_train=50, pre_nms_test=20, proposals=40, anchor_scale=3, nms_iou=0.2)
    levels = random_levels(config, 64, 96)
    found = RPN(4, config).train(training).propose(*levels, [(60, 90)])[0]  # in a batch padded to 64 x 96

    candidates = []
    for level, (logits, deltas, anchors) in enumerate(zip(*levels)):
        order = logits[0].argsort(descending=True)[: 50 if training else 20]
        boxes = box_ops.decode(anchors[order], deltas[0, order], box_ops.RPN_STDS)
        boxes = clip_boxes_to_image(boxes, (60, 90))
        group = torch.full((len(order), 1), level)
        candidates.append(torch.cat([boxes, logits[0, order, None], group], dim=1))
    candidates = torch.cat(candidates).detach()
    candidates = candidates[(candidates[:, 2] > candidates[:, 0]) & (candidates[:, 3] > candidates[:, 1])]
    boxes, scores, group = candidates[:, :4], candidates[:, 4], candidates[:, 5]
    torch.testing.assert_close(found, boxes[batched_nms(boxes, scores, group, config.nms_iou)[:40]])


def test_no_proposal_without_area():
    objectness, deltas, anchors = random_levels(RPNConfig(), 64, 64)
    moved = [torch.full_like(x, 50.0) for x in deltas]  # 50 widths to the right, 50 heights down
    assert RPN(4, RPNConfig()).propose(objectness, moved, anchors, [(64, 64)])[0].shape == (0, 4)


def test_proposals_are_larger_than_min_size():
    levels = random_levels(RPNConfig(anchor_scale=1), 64, 64)
    sides = {}
    for size in (0.0, 6.0):
        config = RPNConfig(anchor_scale=1, min_size=size, nms_iou=1.0, proposals=10_000)
        found = RPN(4, config).eval().propose(*levels, [(64, 64)])[0]
        sides[size] = (found[:, 2:] - found[:, :2]).amin(dim=1).sort().values
    assert sides[0.0].min() < 3
    assert 0 < len(sides[6.0]) == (sides[0.0] > 6).sum()


def test_proposals_shrink_as_far_as_the_limit():
    objectness, deltas, anchors = random_levels(RPNConfig(), 64, 64)
    shrunk = [torch.full_like(x, -9.0) * torch.tensor([0, 0, 1, 1]) for x in deltas]
    for limit in (0.016, 0.0):
        config = RPNConfig(shrink_limit=limit, nms_iou=1.0, proposals=10_000)
        found = RPN(4, config).eval().propose(objectness, shrunk, anchors, [(64, 64)])[0]
        widest = (found[:, 2:] - found[:, :2]).max().item()
        # of P5's anchors of 256 px; P6's one of 512 is centered on the corner, half of it outside
        assert widest == pytest.approx(256 * math.sqrt(2) * max(limit, math.exp(-9)), rel=1e-3)


# --- losses of the RPN ---


@pytest.mark.parametrize("size", [(64, 96), (20, 12)])  # the latter has levels of a single cell
def test_predictions_at_anchors_are_those_of_the_maps(size):
    """Values and every gradient, at all anchors in any order, some of them twice, of either image."""
    torch.manual_seed(0)
    rpn = RPN(4, RPNConfig()).double()
    nn.init.normal_(rpn.conv.bias)  # padding differs from a cell whose features are zero
    features = [feature.requires_grad_() for feature in pyramid(4, *size, images=2)]
    num_anchors = sum(len(anchors) for anchors in rpn.anchors(features))
    chosen = torch.cat([torch.randperm(num_anchors, generator=generator()), torch.arange(7)])
    images = torch.randint(2, chosen.shape, generator=generator(1))
    hidden = [rpn.conv(feature).relu() for feature in features]
    maps = [torch.cat([rpn.objectness(h).permute(0, 2, 3, 1).flatten(1) for h in hidden], 1)]
    maps.append(torch.cat([rpn.deltas(h).permute(0, 2, 3, 1).reshape(2, -1, 4) for h in hidden], 1))
    expected = [x[images, chosen] for x in maps]
    found = rpn.predict_at(features, images, chosen)
    wanted, gradients = [], []
    for logits, deltas in (expected, found):
        loss = logits.sin().sum() + (deltas * torch.linspace(-1, 1, deltas.numel()).view_as(deltas)).sum()
        wanted.append([logits, deltas])
        gradients.append(torch.autograd.grad(loss, [*features, *rpn.parameters()]))
    torch.testing.assert_close(*wanted)
    torch.testing.assert_close(*gradients)
    for plain, alone in zip(maps, (torch.cat(x, 1) for x in rpn(features))):
        torch.testing.assert_close(plain, alone)


def test_gradients_of_windows_are_the_same_bits_on_many_threads():
    """Windows that overlap nearly everywhere; indexing adds their gradients in the order of the threads."""
    threads = torch.get_num_threads()
    feature = torch.randn(2, 64, 12, 12, generator=generator()).requires_grad_()
    images = torch.randint(2, (600,), generator=generator(1))
    y, x = (torch.randint(12, (600, 1), generator=generator(i)) + torch.arange(-1, 2) for i in (2, 3))
    weights = torch.randn(600, 64, 3, 3, generator=generator(4))
    try:
        torch.set_num_threads(4)
        gradients = [
            torch.autograd.grad((windows(feature, images, y, x) * weights).sum(), feature)[0]
            for _ in range(20)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_no_anchor_to_learn_from_leaves_zero_gradients():
    rpn, features = RPN(4, RPNConfig()).double(), pyramid(4, 64, 96)
    none = torch.zeros(0, dtype=torch.int64)
    logits, deltas = rpn.predict_at(features, none, none)
    (logits.sum() + deltas.sum()).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in rpn.parameters())


def rpn_losses(config, truth, size, padded, normalizer=1.0, seed=0):
    """Losses of random predictions of one image, and these predictions."""
    rpn, (logits, deltas, anchors) = RPN(4, config), random_levels(config, *padded)
    rpn.predict_at = lambda features, images, chosen: (
        torch.cat(logits, 1)[images, chosen],
        torch.cat(deltas, 1)[images, chosen],
    )
    losses = rpn.losses(pyramid(4, *padded), anchors, [truth], [size], [seed], normalizer)
    return losses, (logits, deltas, anchors)


def inside(anchors, height, width):
    """Whether the center is in the image."""
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    return (x < width) & (y < height)


def test_rpn_losses_equal_plain_formula():
    # with room for every anchor nothing is random
    config = RPNConfig(samples=10_000, positive_fraction=1.0, anchor_scale=4)
    truth = torch.tensor([[5.0, 6, 35, 33], [30, 10, 80, 55]])
    losses, (logits, deltas, anchors) = rpn_losses(config, truth, (60, 90), (64, 96), normalizer=7.0)
    logits, deltas, anchors = torch.cat(logits, 1)[0], torch.cat(deltas, 1)[0], torch.cat(anchors)
    usable = inside(anchors, 60, 90)
    logits, deltas, anchors = logits[usable].tolist(), deltas[usable], anchors[usable]
    iou = box_iou(truth, anchors)
    objectness, box, positives = 0.0, 0.0, 0
    for i in range(len(anchors)):
        owners = [g for g in range(2) if iou[g, i] == iou[g].max()]  # low quality: the best of a ground truth
        if not owners and iou[:, i].max() >= 0.7:
            owners = [int(iou[:, i].argmax())]
        if owners:
            positives += 1
            objectness += math.log1p(math.exp(-logits[i]))
            target = box_ops.encode(anchors[i : i + 1], truth[owners[-1:]], box_ops.RPN_STDS)
            box += (deltas[i] - target).abs().sum().item()
        elif iou[:, i].max() < 0.3:
            objectness += math.log1p(math.exp(logits[i]))
    assert iou.amax(dim=1).min() >= 0.3
    assert positives >= 2
    assert losses["rpn_objectness"].item() == pytest.approx(objectness / 7)
    assert losses["rpn_box"].item() == pytest.approx(box / 7)


def test_rpn_samples_the_configured_numbers():
    # the ground truths are six anchors themselves: 6 positives of at most 32 * 0.125 = 4, 28 negatives
    config = RPNConfig(samples=32, positive_fraction=0.125, anchor_scale=4)
    truth = make_anchors(config, 8, 8, 8)[100:160:10]
    losses, (logits, deltas, _) = rpn_losses(config, truth, (64, 64), (64, 64))
    sum(losses.values()).backward()
    sampled = torch.cat([x.grad for x in logits], 1)[0]
    assert (sampled < 0).sum() == 4
    assert (sampled > 0).sum() == 28
    assert torch.cat([x.grad for x in deltas], 1)[0].any(dim=1).sum() == 4


def test_rpn_never_trains_on_padding():
    config = RPNConfig(samples=10_000, positive_fraction=1.0, anchor_scale=4)
    truth = torch.tensor([[5.0, 6, 39, 40]])
    losses, (logits, deltas, anchors) = rpn_losses(config, truth, (40, 40), (64, 96))
    sum(losses.values()).backward()
    anchors, sampled = torch.cat(anchors), torch.cat([x.grad for x in logits], 1)[0] != 0
    moved = torch.cat([x.grad for x in deltas], 1)[0].any(dim=1)
    usable, iou = inside(anchors, 40, 40), box_iou(truth, anchors)[0]
    assert not sampled[~usable].any()
    assert not moved[~usable].any()
    assert sampled[usable & (iou < 0.3)].all()
    assert moved[usable & (iou >= 0.7)].all()


@pytest.mark.parametrize(
    ("size", "truth"),
    [
        ((85, 107), [86.0, 65, 106, 85]),
        ((94, 108), [86.5, 78.25, 108, 92.75]),
        ((108, 92), [75.75, 85.5, 92, 106.0]),
        ((108, 82), [65.0, 88, 82, 108]),
    ],
)
def test_an_object_beside_the_padding_has_an_anchor(size, truth):
    # its best anchors, at about 0.3, overlap it alike; one in the padding is ahead by float32's last digit
    truth = torch.tensor([truth])
    losses, (_, _, anchors) = rpn_losses(RPNConfig(samples=100_000), truth, size, (128, 128))
    anchors = torch.cat(anchors)
    iou, usable = box_iou(truth, anchors)[0], inside(anchors, *size)
    assert iou[usable].max() >= 0.3
    assert iou[~usable].max() == pytest.approx(iou[usable].max().item(), abs=1e-6)
    assert losses["rpn_box"] > 0


# --- RoI sampling ---


def test_rois_by_hand():
    truth, labels = torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 70]]), torch.tensor([3, 1])
    proposals = torch.tensor(
        [
            [0.0, 0, 10, 20],  # IoU 100 / 200 with the first, exactly the bound
            [0.0, 0, 10, 21],  # 100 / 210: background
            [60.0, 50, 90, 70],  # 600 / 800 with the second
        ]
    )
    config = RoIConfig(samples=8, positive_fraction=0.5)
    rois = sample_rois([proposals], [truth], [labels], config, 5, [0])
    # ground truth takes part: 4 positives in any order, then 1 negative
    order = [rois.boxes.tolist().index(box) for box in torch.cat([truth, proposals[[0, 2, 1]]]).tolist()]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert rois.labels[order].tolist() == [3, 1, 3, 1, 5]
    assert rois.images.tolist() == [0] * 5
    assert rois.positives.tolist() == [0, 1, 2, 3]
    # 10 x 20 to 10 x 10: up by a quarter height / 0.1, log(1/2) / 0.2; 30 x 20 to 40 x 20: left by 5 of 30
    expected = [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, -2.5, 0, -5 * math.log(2)],
        [-5 / 30 / 0.1, 0, 5 * math.log(4 / 3), 0],
    ]
    torch.testing.assert_close(rois.targets[order[:4]], torch.tensor(expected))


def test_roi_sampling_keeps_images_apart():
    random = generator(3)
    proposals = [random_boxes(60, 64, 96, random) for _ in range(3)]
    truth = [random_boxes(2, 64, 96, random), torch.zeros(0, 4), random_boxes(1, 64, 96, random)]
    labels = [torch.tensor([0, 4]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
    config = RoIConfig(samples=20, positive_fraction=0.25)
    rois = sample_rois(proposals, truth, labels, config, 5, [0, 1, 2])
    assert rois.images.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert (rois.labels[20:40] == 5).all()  # no object: all background
    positive = torch.nonzero(rois.labels < 5).squeeze(1)
    assert rois.positives.tolist() == positive.tolist()
    assert len(rois.targets) == len(positive)
    # the deltas of every positive lead to a box of its image and label
    decoded = box_ops.decode(rois.boxes[positive], rois.targets, box_ops.ROI_STDS)
    for box, image, label in zip(decoded, rois.images[positive], rois.labels[positive]):
        same = truth[image][labels[image] == label]
        assert (same - box).abs().amax(dim=1).min() < 1e-3
    for image in range(3):
        assert (rois.labels[20 * image : 20 * image + 20] < 5).sum() <= 5
        # alone or in a batch, in any place: the same
        alone = sample_rois(*([x[image]] for x in (proposals, truth, labels)), config, 5, [image])
        assert torch.equal(alone.boxes, rois.boxes[rois.images == image])


# --- RoIAlign over the pyramid ---


def square(side, x=0.0, y=0.0):
    return [x, y, x + side, y + side]


def test_levels_by_hand():
    sides = [0, 1, 56, 111, 112, 223, 224, 447, 448, 5000]
    boxes = torch.tensor([square(side) for side in sides], dtype=torch.float32)
    assert RoIPooler(RoIConfig()).levels(boxes).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    # the area counts, not the sides: 28 x 448 is as large as 112 x 112
    flat = torch.tensor([[0.0, 0, 448, 28]])
    assert RoIPooler(RoIConfig()).levels(flat).tolist() == [1]
    assert RoIPooler(RoIConfig(finest_scale=28)).levels(boxes[3:6]).tolist() == [1, 2, 2]


def test_levels_equal_torchvision():
    boxes = random_boxes(500, 1000, 1333, generator()) * torch.rand(500, 1, generator=generator(1))
    expected = LevelMapper(k_min=2, k_max=5)([boxes])
    assert expected.unique().tolist() == [0, 1, 2, 3]
    assert RoIPooler(RoIConfig()).levels(boxes).tolist() == expected.tolist()


def spread_boxes(extent=512):
    """Boxes for all four levels, shuffled, on the rows 0 and 1."""
    sides = [500, 20, 130, 300, 60, 240, 450, 115, 80]
    boxes = [square(side, 0.3 * (extent - side), 0.9 * (extent - side)) for side in sides]
    return torch.tensor(boxes, dtype=torch.float64), torch.arange(9) % 2


def test_pooling_equals_roi_align_level_by_level():
    config = RoIConfig()
    features, (boxes, images) = pyramid(3, 512, 512, images=2), spread_boxes()
    pooled, levels = RoIPooler(config)(features, boxes, images), RoIPooler(config).levels(boxes)
    assert levels.unique().tolist() == [0, 1, 2, 3]
    for box, image, level, ours in zip(boxes, images, levels, pooled):
        expected = roi_align(
            features[level],
            torch.cat([image[None], box])[None],
            7,
            1 / STRIDES[level],
            sampling_ratio=-1,
            aligned=True,
        )
        torch.testing.assert_close(ours, expected[0])


def test_pooling_equals_torchvision():
    config = RoIConfig(sampling_ratio=2, aligned=False, pool_size=5)
    features, (boxes, images) = pyramid(3, 512, 512, images=2), spread_boxes()
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=5, sampling_ratio=2)
    lists = [boxes[images == 0], boxes[images == 1]]
    expected = pooler({str(i): x for i, x in enumerate(features[:4])}, lists, [(512, 512)] * 2)
    order = torch.cat([torch.nonzero(images == 0), torch.nonzero(images == 1)]).squeeze(1)
    torch.testing.assert_close(RoIPooler(config)(features, boxes, images)[order], expected)


@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
@pytest.mark.parametrize("aligned", [True, False])
def test_pooling_by_products_is_the_operators(aligned, sampling_ratio):
    """Values and gradients; boxes without area and beyond the map too, and an image without any box."""
    random = generator(3)
    feature = torch.randn(3, 5, 20, 27, dtype=torch.float64, generator=random, requires_grad=True)
    low = torch.rand(40, 2, dtype=torch.float64, generator=random) * torch.tensor([120, 90]) - 10
    sides = 70 * torch.rand(40, 2, dtype=torch.float64, generator=random)
    sides[:3] = 0
    images = 2 * torch.randint(2, (40, 1), generator=random)  # none on the second of three
    rois = torch.cat([images.double(), low, low + sides], dim=1)
    expected, found = (
        pool(feature, rois, 7, 1 / 4, sampling_ratio, aligned) for pool in (roi_align, roi_align_by_products)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    factor = torch.randn(expected.shape, dtype=torch.float64, generator=random)
    gradients = [torch.autograd.grad((factor * pooled).sum(), feature) for pooled in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)
    assert roi_align_by_products(feature, rois[:0], 7, 1 / 4, sampling_ratio, aligned).shape == (0, 5, 7, 7)


def region_boxes(count, height, width, random):
    """Boxes of all levels; some of the whole map, at its corners, or of no width."""
    fixed = [[0, 0, width, height], [0, 0, 20, 9], [width - 9, height - 30, width, height], [7, 7, 7, 7]]
    boxes = random_boxes(count, height, width, random)
    return torch.cat([torch.tensor(fixed), boxes, boxes[:2] + torch.tensor([-3.0, -3, 3, 3])]).double()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_output_convs_around_the_boxes_are_those_of_the_maps(aligned, sampling_ratio):
    """Pooled values, and the gradients of features and layers."""
    torch.manual_seed(0)
    config = RoIConfig(aligned=aligned, sampling_ratio=sampling_ratio, finest_scale=12)
    pooler = RoIPooler(config)
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).double() for _ in range(4)]
    features = [feature.requires_grad_() for feature in pyramid(4, 160, 224, images=2)[:4]]
    boxes = region_boxes(9, 160, 224, generator())
    images = torch.arange(len(boxes)) % 2
    assert pooler.levels(boxes).unique().tolist() == [0, 1, 2, 3]
    parameters = [p for layer in layers for p in layer.parameters()]
    maps = [layer(feature) for layer, feature in zip(layers, features)]
    computed = []
    for level, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, level=level: computed.append(level))
    results = []
    for pooled in (pooler(maps, boxes, images), pooler(features, boxes, images, layers)):
        weights = torch.linspace(-1, 1, pooled.numel(), dtype=torch.float64).view_as(pooled)
        results.append([pooled, *torch.autograd.grad((pooled * weights).sum(), [*features, *parameters])])
    torch.testing.assert_close(*results)
    assert computed == [2]  # where the whole map is less work; windows on all others


def test_levels_without_boxes_and_layers_with_a_norm():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)).double() for _ in range(4)]
    features, pooler = pyramid(4, 160, 224)[:4], RoIPooler(RoIConfig())
    boxes, images = torch.tensor([[10.0, 10, 90, 90]]).double(), torch.tensor([0])
    maps = [layer(feature) for layer, feature in zip(layers, features)]
    assert torch.equal(pooler(features, boxes, images, layers), pooler(maps, boxes, images))
    assert pooler(features, boxes[:0], images[:0], layers).shape == (0, 4, 7, 7)
    layers[1:] = [None] * 3  # one box, on P2: nothing asks for the others
    assert pooler(features, boxes, images, layers).shape == (1, 4, 7, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_keeps_coordinates_exact_under_autocast(dtype):
    # bfloat16 has 8 bits: 500.7 px would be 500
    features = [x.to(dtype) for x in pyramid(3, 512, 512, images=2)]
    boxes, images = spread_boxes()
    boxes = boxes.float() + 0.7
    exact = RoIPooler(RoIConfig())([x.float() for x in features], boxes, images)
    with torch.autocast("cpu", dtype):
        pooled = RoIPooler(RoIConfig())(features, boxes, images)
    torch.testing.assert_close(pooled, exact)


def test_no_roi_keeps_the_graph():
    features = [x.requires_grad_() for x in pyramid(3, 64, 64)]
    pooled = RoIPooler(RoIConfig())(features, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in features[:4])


# --- detections ---


def plain_detections(rois, scores, deltas, size, config):
    """Threshold, decode, clip, NMS class by class, best first: (score, label, box) of every detection."""
    found = []
    for label in range(scores.shape[1]):
        chosen = torch.nonzero(scores[:, label] > config.score_threshold).squeeze(1)
        column = label if deltas.shape[1] > 1 else 0
        boxes = box_ops.decode(rois[chosen], deltas[chosen, column], box_ops.ROI_STDS)
        boxes = clip_boxes_to_image(boxes, size)
        kept = nms(boxes, scores[chosen, label], config.nms_iou)
        found += [(scores[chosen[i], label].item(), label, boxes[i]) for i in kept]
    return sorted(found, key=lambda row: -row[0])[: config.detections]


@pytest.mark.parametrize("class_agnostic", [True, False])
@pytest.mark.parametrize("detections", [5, 1000])
def test_detections_equal_plain_reference(class_agnostic, detections):
    random = generator(7)
    config = tiny_config("test.score_threshold=0.3", f"test.detections={detections}").test
    rois = random_boxes(50, 80, 120, random).double()
    scores = torch.rand(50, 6, generator=random, dtype=torch.float64)
    deltas = torch.randn(50, 1 if class_agnostic else 6, 4, generator=random, dtype=torch.float64)
    found = select_detections(rois, scores, deltas, (80, 120), config)
    expected = plain_detections(rois, scores, deltas, (80, 120), config)
    assert len(expected) == 5 if detections == 5 else 20 < len(expected) < 300
    assert found.labels.tolist() == [label for _, label, _ in expected]
    assert found.scores.tolist() == [score for score, _, _ in expected]
    torch.testing.assert_close(found.boxes, torch.stack([box for *_, box in expected]))


def test_small_detections_go_and_shrink_as_far_as_the_limit():
    rois = torch.tensor([[0.0, 0, 100, 100], [-20, 20, 10, 60]])
    scores = torch.tensor([[0.9], [0.8]])
    deltas = torch.zeros(2, 1, 4)
    deltas[0, 0, 2:] = -30.0  # e^-6 of the sides, 0.25 px
    deltas[1, 0, 0] = -10.0  # a width to the left: nothing is in the image
    for overrides, expected in (
        ((), [1.6, 0]),
        (("test.shrink_limit=0",), [100 * math.exp(-6), 0]),
        (("test.shrink_limit=0", "test.min_size=0.01"), [100 * math.exp(-6)]),
        (("test.shrink_limit=0", "test.min_size=0.3"), []),
    ):
        found = select_detections(rois, scores, deltas, (100, 100), tiny_config(*overrides).test)
        sides = (found.boxes[:, 2] - found.boxes[:, 0]).tolist()
        assert sides == pytest.approx(expected, abs=1e-4)


def test_no_detection_above_the_threshold():
    config = tiny_config("test.score_threshold=0.25").test
    rois, scores = torch.tensor([[0.0, 0, 5, 5]]), torch.full((1, 3), 0.25)
    for chosen in (slice(None), slice(0)):  # too weak; no RoI at all
        found = select_detections(
            rois[chosen],
            scores[chosen],
            torch.zeros(1, 3, 4)[chosen],
            (9, 9),
            config,
        )
        assert (len(found.boxes), len(found.scores), len(found.labels)) == (0, 0, 0)
