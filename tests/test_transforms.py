"""Augmentations: a marked rectangle is found again exactly where its box went."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clis.data.transforms import flip_boxes, random_cutout, scaled_size
from clis.resize import resize_image, scale_boxes, shortest_size


def resize(image, boxes, size):
    return resize_image(image, size), scale_boxes(boxes, tuple(image.shape[1:]), size)


def flip(image, boxes):
    return image.flip(-1), flip_boxes(boxes, image.shape[-1])


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
def test_shortest_size(size, limits, scaled):
    assert shortest_size(size, *limits) == scaled


def test_boxes_scale_by_the_size_the_image_really_got():
    # 10 x 15 at scale 1.5 is 15 x 22.5, so 23 wide: x grows by 23 / 15, y by 1.5.
    boxes = torch.tensor([[3.0, 2.0, 15.0, 10.0]])
    assert scaled_size((10, 15), 1.5) == (15, 23)
    scaled = scale_boxes(boxes, (10, 15), (15, 23))
    torch.testing.assert_close(scaled, torch.tensor([[4.6, 3.0, 23.0, 15.0]]))


def test_resize_averages_what_it_shrinks():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, 1::4] = stripes[:, :, 2::4] = 255
    resized, _ = resize(stripes, torch.zeros(0, 4), (16, 16))
    # Without antialiasing, pixel i of the result would be the mean of columns 4i + 1 and 4i + 2: all 255.
    assert (resized[:, :, 1:-1].int() - 127).abs().max() <= 2


def test_resize_without_antialiasing_takes_two_columns():
    # each of the two columns lies between four: the mean of the inner two, rounded
    row = torch.tensor([200, 0, 11, 200, 7, 100, 50, 7], dtype=torch.uint8).expand(3, 1, 8)
    assert resize_image(row, (1, 2), antialias=False)[0, 0].tolist() == [6, 75]
    assert resize_image(row, (1, 2))[0, 0].tolist() != [6, 75]


def test_sizes_may_be_rounded_down():
    assert shortest_size((480, 640), 800, 1333) == (800, 1067)
    assert shortest_size((480, 640), 800, 1333, math.floor) == (800, 1066)
    assert shortest_size((2, 3000), 800, 1333, math.floor) == (1, 1333)


def test_flip_by_hand():
    image = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 4)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.5, 0.0, 4.0, 1.0]])
    flipped, moved = flip(image, boxes)
    assert flipped[0, 0].tolist() == [3, 2, 1, 0]
    assert moved.tolist() == [[3.0, 0.0, 4.0, 1.0], [0.0, 0.0, 2.5, 1.0]]


@settings(max_examples=60)
@given(sample=marked_images(), height=st.integers(20, 200), width=st.integers(20, 200))
def test_resized_mark_stays_in_its_box(sample, height, width):
    assert_follows(*resize(*sample, (height, width)))


@settings(max_examples=60)
@given(sample=marked_images(), short_side=st.integers(30, 150), flips=st.tuples(st.booleans(), st.booleans()))
def test_mark_stays_in_its_box_through_the_whole_chain(sample, short_side, flips):
    image, boxes = flip(*sample) if flips[0] else sample
    image, boxes = resize(image, boxes, shortest_size(tuple(image.shape[1:]), short_side, 200))
    image, boxes = flip(image, boxes) if flips[1] else (image, boxes)
    assert_follows(image, boxes)
    height, width = image.shape[-2:]
    # float32: 60 * (47 / 60) may be 47 and a rounding error, which a flip brings to the other end
    assert (boxes >= -1e-3).all()
    assert (boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()


@settings(max_examples=60)
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    sides=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    seed=st.integers(0, 2**32),
)
def test_cutout_is_a_rectangle_of_the_asked_size_inside_the_image(height, width, sides, seed):
    generator = np.random.default_rng(seed)
    rectangle = random_cutout((height, width), generator, probability=1.0, side_range=tuple(sides))
    x1, y1, x2, y2 = rectangle
    for length, start, end in ((height, y1, y2), (width, x1, x2)):
        assert 0 <= start < end <= length
        low, high = (max(int(length * side + 0.5), 1) for side in sides)
        assert low <= end - start <= high


def test_cutouts_are_anywhere():
    generator = np.random.default_rng(0)
    options = {"probability": 1.0, "side_range": (0.25, 0.25)}
    corners = np.array([random_cutout((40, 80), generator, **options)[:2] for _ in range(2000)])
    # 20 x 10 pixels, so that x1 is uniform on 0..60 and y1 on 0..30; both ends are missed with chance e^-32
    assert corners.min(axis=0).tolist() == [0, 0]
    assert corners.max(axis=0).tolist() == [60, 30]
    # the deviations of the means are 17.6 and 8.9 over sqrt(2000)
    np.testing.assert_allclose(corners.mean(axis=0), [30, 15], atol=1.6)


def test_probability_of_cutout():
    generator = np.random.default_rng(0)
    cuts = sum(random_cutout((40, 60), generator, 0.3, (0.1, 0.4)) is not None for _ in range(1000))
    # 300 expected; the standard deviation is sqrt(1000 * 0.3 * 0.7) = 14.5.
    assert 240 < cuts < 360
    assert random_cutout((40, 60), generator, 0.0, (0.1, 0.4)) is None


def test_arguments_are_not_modified_and_the_seed_decides():
    image, boxes = marked(40, 60, (5, 6, 20, 30))
    before, boxes_before = image.clone(), boxes.clone()
    flip(*resize(image, boxes, (33, 44)))
    assert torch.equal(image, before)
    assert torch.equal(boxes, boxes_before)
    first, again, other = (
        random_cutout((40, 60), np.random.default_rng(seed), 1.0, (0.1, 0.4)) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("order", ["channels first", "channels last"])
def test_resize_of_either_order_in_memory(order):
    """The same pixels, and the order is kept."""
    image = torch.randint(256, (3, 60, 90), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = resize_image(image, (31, 47))
    if order == "channels last":
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    resized = resize_image(image, (31, 47))
    assert torch.equal(resized, expected)
    assert resized.stride() == ((1, 3 * 47, 3) if order == "channels last" else (31 * 47, 47, 1))


@settings(max_examples=60)
@given(length=st.integers(2, 60), share=st.floats(0.05, 1), new=st.integers(1, 60))
def test_resize_of_an_extent_that_ends_within_a_pixel(length, share, new):
    """A ramp of 4 a pixel, resized by a factor f, is one of 4 / f that starts at the same edge.

    Its value at position x is 4 x - 2, and pixel i of the result is centered at (i + 0.5) / f. Away from the
    edges, where there is less to average, that is what it must be, but for rounding.
    """
    extent = length - 1 + share
    new = max(min(new, int(extent)), 1)
    ramp = (4 * torch.arange(length)).to(torch.uint8).expand(3, 20, length)
    resized = resize_image(ramp, (20, new), extent=(20, extent))
    assert resized.shape == (3, 20, new)
    factor = new / extent
    centers = (torch.arange(new) + 0.5) / factor
    inner = (centers > 1 / factor) & (centers < extent - 1 / factor - 1)
    torch.testing.assert_close(resized[0, 0, inner].float(), 4 * centers[inner] - 2, atol=1.01, rtol=0)


def test_images_without_boxes():
    image, _ = marked(40, 60, (5, 6, 20, 30))
    empty = torch.zeros(0, 4)
    for result, boxes in (flip(image, empty), resize(image, empty, (20, 20))):
        assert boxes.shape == (0, 4)
        assert boxes.dtype == torch.float32
        assert result.dtype == torch.uint8
