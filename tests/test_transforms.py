"""Augmentations: a marked rectangle is found again exactly where its box went."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clis.data.transforms import (
    FILL,
    cutout,
    flip,
    random_flip,
    resize,
    resize_scale,
    resize_shortest,
)


def marked(height, width, box):
    """A black image with a red rectangle on the box (whole pixels), and the box as [1, 4]."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[0, y1:y2, x1:x2] = 255
    return image, torch.tensor([box], dtype=torch.float32)


def extent(image):
    """The box of the red pixels, at least half bright."""
    ys, xs = torch.nonzero(image[0] >= 128, as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


def assert_follows(image, boxes):
    torch.testing.assert_close(extent(image), boxes[0], atol=1.0, rtol=0)


@st.composite
def marked_images(draw):
    height, width = draw(st.integers(24, 120)), draw(st.integers(24, 120))
    x1, y1 = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
    x2, y2 = draw(st.integers(x1 + 12, width)), draw(st.integers(y1 + 12, height))
    return marked(height, width, (x1, y1, x2, y2))


@pytest.mark.parametrize(
    ("size", "limits", "scaled"),
    [
        ((480, 640), (800, 1333), (800, 1067)),  # 640 * 800 / 480 = 1066.67
        ((640, 480), (800, 1333), (1067, 800)),
        ((400, 1000), (800, 1333), (533, 1333)),  # the long side decides: 400 * 1.333 = 533.2
        ((427, 640), (640, 1333), (640, 959)),  # 640 * 640 / 427 = 959.25
        ((5, 1000), (50, 100), (1, 100)),  # half a pixel rounds up to one
        ((3, 1000), (50, 100), (1, 100)),  # and nothing vanishes
    ],
)
def test_resize_shortest_sizes(size, limits, scaled):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    resized, _ = resize_shortest(image, torch.zeros(0, 4), *limits)
    assert resized.shape == (3, *scaled)


def test_resize_scale_is_limited_by_the_tighter_side():
    assert resize_scale(100, 200, 50, 1000) == 0.5
    assert resize_scale(200, 100, 50, 60) == 0.3


def test_boxes_scale_by_the_size_the_image_really_got():
    # 10 x 15 at scale 1.5 is 15 x 22.5, so 23 wide: x grows by 23 / 15, y by 1.5.
    boxes = torch.tensor([[3.0, 2.0, 15.0, 10.0]])
    image, scaled = resize_shortest(torch.zeros(3, 10, 15, dtype=torch.uint8), boxes, 15, 1000)
    assert image.shape == (3, 15, 23)
    torch.testing.assert_close(scaled, torch.tensor([[4.6, 3.0, 23.0, 15.0]]))


def test_resize_averages_what_it_shrinks():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, 1::4] = stripes[:, :, 2::4] = 255
    resized, _ = resize(stripes, torch.zeros(0, 4), (16, 16))
    # Without antialiasing, pixel i of the result would be the mean of columns 4i + 1 and 4i + 2: all 255.
    assert (resized[:, :, 1:-1].int() - 127).abs().max() <= 2


def test_flip_by_hand():
    image = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 4)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.5, 0.0, 4.0, 1.0]])
    flipped, moved = flip(image, boxes)
    assert flipped[0, 0].tolist() == [3, 2, 1, 0]
    assert moved.tolist() == [[3.0, 0.0, 4.0, 1.0], [0.0, 0.0, 2.5, 1.0]]


@settings(max_examples=60, deadline=None)
@given(sample=marked_images(), height=st.integers(20, 200), width=st.integers(20, 200))
def test_resized_mark_stays_in_its_box(sample, height, width):
    assert_follows(*resize(*sample, (height, width)))


@settings(max_examples=60, deadline=None)
@given(sample=marked_images(), short_side=st.integers(30, 150), seed=st.integers(0, 2**32))
def test_mark_stays_in_its_box_through_the_whole_chain(sample, short_side, seed):
    generator = np.random.default_rng(seed)
    image, boxes = sample
    image, boxes = random_flip(image, boxes, generator)
    image, boxes = resize_shortest(image, boxes, short_side, 200)
    image, boxes = random_flip(image, boxes, generator)
    assert_follows(image, boxes)
    height, width = image.shape[-2:]
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()
    after = cutout(image, generator, probability=1.0)
    ys, xs = torch.nonzero(after[0] >= 128, as_tuple=True)
    x1, y1, x2, y2 = boxes[0].tolist()
    inside = (xs >= x1 - 1) & (xs < x2 + 1) & (ys >= y1 - 1) & (ys < y2 + 1)
    assert inside.all()


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    sides=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    seed=st.integers(0, 2**32),
)
def test_cutout_fills_one_rectangle_of_the_asked_size(height, width, sides, seed):
    image = torch.full((3, height, width), 7, dtype=torch.uint8)
    result = cutout(image, np.random.default_rng(seed), probability=1.0, side_range=tuple(sides))
    assert (image == 7).all()
    filled = (result == FILL).all(dim=0)
    assert ((result == 7).all(dim=0) | filled).all()
    rows, columns = filled.any(dim=1), filled.any(dim=0)
    assert torch.equal(filled, rows[:, None] & columns[None, :])
    for line in (rows, columns):
        where = torch.nonzero(line)
        assert where[-1] - where[0] + 1 == len(where)  # without a gap
        low, high = (max(int(len(line) * side + 0.5), 1) for side in sides)
        assert low <= len(where) <= high


def test_probabilities():
    image, boxes = marked(40, 60, (5, 6, 20, 30))
    generator = np.random.default_rng(0)
    flips = sum(not torch.equal(random_flip(image, boxes, generator, 0.3)[1], boxes) for _ in range(1000))
    cuts = sum(bool((cutout(image, generator, 0.3) == FILL).any()) for _ in range(1000))
    # 300 expected; the standard deviation is sqrt(1000 * 0.3 * 0.7) = 14.5.
    assert 240 < flips < 360
    assert 240 < cuts < 360
    assert torch.equal(cutout(image, generator, probability=0.0), image)
    assert torch.equal(random_flip(image, boxes, generator, 0.0)[0], image)


def test_arguments_are_not_modified_and_seeds_decide():
    image, boxes = marked(40, 60, (5, 6, 20, 30))
    before, boxes_before = image.clone(), boxes.clone()

    def run(seed):
        generator = np.random.default_rng(seed)
        result, moved = random_flip(image, boxes, generator, 1.0)
        result, moved = resize(result, moved, (33, 44))
        return cutout(result, generator, 1.0), moved

    (first, first_boxes), (again, again_boxes), (other, _) = run(1), run(1), run(2)
    assert torch.equal(first, again)
    assert torch.equal(first_boxes, again_boxes)
    assert not torch.equal(first, other)
    assert torch.equal(image, before)
    assert torch.equal(boxes, boxes_before)


def test_images_without_boxes():
    image, _ = marked(40, 60, (5, 6, 20, 30))
    empty = torch.zeros(0, 4)
    for result, boxes in (flip(image, empty), resize(image, empty, (20, 20))):
        assert boxes.shape == (0, 4)
        assert boxes.dtype == torch.float32
        assert result.dtype == torch.uint8
