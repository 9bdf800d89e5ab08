"""Mosaic and pasting: the region is where its pixels are, on its own tile, and hides no box too far."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clis.config import DataConfig
from clis.data.mosaic import Placement, draw_tile, plan_mosaic
from clis.data.pasting import draw_paste, plan_pastes
from clis.data.transforms import FILL, random_cutout

SIZE = 128
TILE = SIZE // 2
COLORS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)
BLACK = 0


def sizes_of(images):
    return [tuple(image.shape[1:]) for image in images]


def mosaic(images, regions, *, generator, **data):
    """Plan and draw, with these fields of `data`: canvas, regions, kept."""
    data = DataConfig(mosaic_size=SIZE, **data)
    placements, regions, kept = plan_mosaic(sizes_of(images), regions, data, generator)
    canvas = torch.full((3, SIZE, SIZE), FILL, dtype=torch.uint8)
    for index, (image, placement) in enumerate(zip(images, placements)):
        draw_tile(image, placement, canvas, index)
    return canvas, regions, kept


def paste(image, boxes, sources, *, generator, **data):
    """Plan and draw on a copy, with these fields of `data`: image, and (index, box) of what was pasted."""
    sizes = [(size, region) for size, (_, region) in zip(sizes_of(image for image, _ in sources), sources)]
    pastes = plan_pastes(tuple(image.shape[1:]), boxes, sizes, DataConfig(**data), generator)
    image = image.clone()
    for index, planned in pastes:
        draw_paste(image, sources[index][0], planned)
    return image, [(index, torch.tensor(planned.box, dtype=torch.float32)) for index, planned in pastes]


def marked(height, width, box, color):
    """A black image with a rectangle of one color on the box (whole pixels)."""
    image = torch.full((3, height, width), BLACK, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = color[:, None, None]
    return image


def pixels_of(image, color):
    """Where each channel is on the color's side of the middle."""
    return ((image >= 128) == (color >= 128)[:, None, None]).all(dim=0)


def extent(mask):
    ys, xs = torch.nonzero(mask, as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


def test_a_mosaic_of_what_surrounds_the_regions():
    """100 x 200 with a region of 40 x 20: times 1.5 that is 60 x 30 and fills its tile of 64 by its width."""
    boxes = [[80, 40, 120, 60], [0, 0, 40, 20], [170, 90, 200, 100], [80, 40, 120, 60]]
    images = [marked(100, 200, box, color) for box, color in zip(boxes, COLORS)]
    options = {"mosaic_scale": (1, 1), "flip": 0, "cutout": 0, "min_region": 1, "mosaic_surroundings": 1.5}
    regions = torch.tensor(boxes, dtype=torch.float32)
    sizes = sizes_of(images)
    data = DataConfig(mosaic_size=SIZE, **options)
    placements, *_ = plan_mosaic(sizes, regions, data, np.random.default_rng(0))
    # the second and third reach beyond their image, so only what is inside is cropped
    crops = [(70, 35, 130, 65), (0, 0, 50, 25), (162, 87, 200, 100), (70, 35, 130, 65)]
    assert [placement.crop for placement in placements] == crops
    assert [max(placement.size) for placement in placements] == [TILE] * 4
    canvas, moved, kept = mosaic(images, regions, generator=np.random.default_rng(0), **options)
    assert kept.all()
    for color, region in zip(COLORS, moved):
        torch.testing.assert_close(extent(pixels_of(canvas, color)), region, atol=1.0, rtol=0)


@st.composite
def boxed_sizes(draw, smallest=40, largest=200):
    height, width = draw(st.integers(smallest, largest)), draw(st.integers(smallest, largest))
    x1, y1 = draw(st.integers(0, width - 20)), draw(st.integers(0, height - 20))
    return height, width, (x1, y1, draw(st.integers(x1 + 20, width)), draw(st.integers(y1 + 20, height)))


def make_mosaic(sizes, seed, **options):
    images = [marked(*size, color) for size, color in zip(sizes, COLORS)]
    regions = torch.tensor([box for _, _, box in sizes], dtype=torch.float32)
    options = {"min_region": 8, **options}
    return mosaic(images, regions, generator=np.random.default_rng(seed), **options)


# --- mosaic ---


@settings(max_examples=80)
@given(sizes=st.tuples(*[boxed_sizes()] * 4), seed=st.integers(0, 2**32))
def test_mosaic_regions_are_where_their_pixels_are(sizes, seed):
    canvas, regions, kept = make_mosaic(sizes, seed, cutout=0.0)
    for index, color in enumerate(COLORS):
        mark = pixels_of(canvas, color)
        if kept[index]:
            torch.testing.assert_close(extent(mark), regions[index], atol=1.01, rtol=0)
        x, y = TILE * (index % 2), TILE * (index // 2)
        mark[y : y + TILE, x : x + TILE] = False
        assert not mark.any()  # the image itself stays on its tile


@settings(max_examples=80)
@given(sizes=st.tuples(*[boxed_sizes()] * 4), seed=st.integers(0, 2**32), min_region=st.integers(1, 40))
def test_mosaic_regions_stay_on_their_tile_and_small_ones_are_flagged(sizes, seed, min_region):
    _, regions, kept = make_mosaic(sizes, seed, min_region=min_region)
    corner = torch.tensor([[0, 0], [TILE, 0], [0, TILE], [TILE, TILE]])
    assert (regions[:, :2] >= corner).all()
    assert (regions[:, 2:] <= corner + TILE).all()
    sides = regions[:, 2:] - regions[:, :2]
    assert torch.equal(kept, sides.min(dim=1).values >= min_region)


def test_region_that_is_cropped_away_is_dropped():
    # At scale 4 a 64 x 64 image is 256 x 256 and shows 64 x 64 of it: a mark in one corner is mostly lost.
    sizes = [(64, 64, (0, 0, 8, 8))] * 4
    kept = torch.stack([make_mosaic(sizes, seed, mosaic_scale=(4.0, 4.0))[2] for seed in range(100)])
    # The 32-pixel mark keeps 8 pixels on an axis where the offset, of 0..192, is at most 24: kept in
    # (25 / 193)^2 = 1.7 % of the 400 regions, 6.7 expected.
    assert 0 < kept.sum() <= 20


def test_cutout_leaves_the_region_and_covers_part_of_it():
    sizes = [(100, 100, (10, 10, 90, 90))] * 4
    options = {"mosaic_scale": (1.0, 1.0), "flip": 0.0, "cutout_size": (0.5, 0.5)}
    plain, regions, _ = make_mosaic(sizes, 3, cutout=0.0, **options)
    cut, cut_regions, kept = make_mosaic(sizes, 3, cutout=1.0, **options)
    assert torch.equal(regions, cut_regions)
    assert kept.all()
    for color in COLORS:
        assert pixels_of(cut, color).sum() < 0.95 * pixels_of(plain, color).sum()


@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    flipped=st.booleans(),
    index=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_cutout_is_cropped_with_its_image(size, flipped, index, seed):
    """As if the image had been stored with the gray rectangle, most or all of which may be cropped off."""
    rng = np.random.default_rng(seed)
    height, width = size
    top, left = (int(rng.integers(min(TILE - length, 0), max(TILE - length, 0) + 1)) for length in size)
    cutout = random_cutout(size, rng, 1.0, (0.0, 1.0))
    placed = Placement(crop=None, size=size, flipped=flipped, top=top, left=left, cutout=cutout)
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    x1, y1, x2, y2 = cutout
    seen = image.flip(-1) if flipped else image.clone()
    seen[:, y1:y2, x1:x2] = FILL
    stored = seen.flip(-1) if flipped else seen
    found, expected = (torch.zeros(3, SIZE, SIZE, dtype=torch.uint8) for _ in range(2))
    draw_tile(image, placed, found, index)
    draw_tile(stored, replace(placed, cutout=None), expected, index)
    assert torch.equal(found, expected)


def test_image_at_scale_one_fills_its_tile_and_the_rest_is_gray():
    # 100 x 50 fits the 64-pixel tile at 64 x 32: half of the canvas is image.
    sizes = [(100, 50, (0, 0, 50, 100))] * 4
    canvas, regions, _ = make_mosaic(sizes, 0, mosaic_scale=(1.0, 1.0), cutout=0.0)
    assert (canvas == FILL).all(dim=0).sum() == SIZE * SIZE // 2
    assert (regions[:, 2:] - regions[:, :2]).tolist() == [[32.0, 64.0]] * 4


def test_small_images_lie_anywhere_in_their_tile():
    sizes = [(64, 64, (0, 0, 64, 64))] * 4
    regions = torch.stack(
        [make_mosaic(sizes, seed, mosaic_scale=(0.5, 0.5), cutout=0.0)[1] for seed in range(200)]
    )
    corner = regions[:, 0, :2]  # uniform on 0..32
    assert corner.min() <= 1
    assert corner.max() >= 31
    assert (corner.mean(dim=0) - 16).abs().max() < 2.5  # the deviation of the mean is 9.5 / sqrt(200) = 0.7


def test_mosaic_is_decided_by_the_seed_and_leaves_its_arguments():
    images = [marked(60, 80, (10, 10, 50, 50), color) for color in COLORS]
    regions = torch.tensor([[10.0, 10.0, 50.0, 50.0]] * 4)
    before, regions_before = [image.clone() for image in images], regions.clone()

    def run(seed):
        return mosaic(images, regions, min_region=8, generator=np.random.default_rng(seed))

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(1)))
    assert not torch.equal(run(1)[0], run(2)[0])
    assert all(torch.equal(a, b) for a, b in zip(images, before))
    assert torch.equal(regions, regions_before)


# --- pasting ---


def gray(height, width):
    return torch.full((3, height, width), 60, dtype=torch.uint8)


@st.composite
def box_lists(draw, height, width):
    boxes = []
    for _ in range(draw(st.integers(0, 5))):
        x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append([x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))])
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@settings(max_examples=100)
@given(data=st.data(), seed=st.integers(0, 2**32), max_cover=st.sampled_from([0.1, 0.5, 1.0]))
def test_pastes_hide_at_most_max_cover_of_any_box(data, seed, max_cover):
    height, width = data.draw(st.integers(30, 150)), data.draw(st.integers(30, 150))
    boxes = data.draw(box_lists(height, width))
    sources = [
        (marked(*size, COLORS[0]), torch.tensor(size[2])) for size in data.draw(st.lists(boxed_sizes()))
    ]
    image = gray(height, width)
    _, pasted = paste(
        image,
        boxes,
        sources,
        paste_size=(8, 100),
        paste_max_cover=max_cover,
        generator=np.random.default_rng(seed),
    )
    # Count pixels: everything pasted later than a box, all together, against the box.
    later = [(box, 0) for box in boxes] + [(box, i + 1) for i, (_, box) in enumerate(pasted)]
    for (x1, y1, x2, y2), first in ((box.int().tolist(), first) for box, first in later):
        hidden = torch.zeros(height, width, dtype=torch.bool)
        for _, other in pasted[first:]:
            a, b, c, d = other.int().tolist()
            hidden[b:d, a:c] = True
        assert hidden[y1:y2, x1:x2].sum() <= max_cover * (x2 - x1) * (y2 - y1)


@settings(max_examples=80)
@given(
    source=boxed_sizes(), height=st.integers(20, 200), width=st.integers(20, 200), seed=st.integers(0, 2**32)
)
def test_pasted_box_is_exactly_the_pixels_written(source, height, width, seed):
    image, region = marked(*source, COLORS[0]), torch.tensor(source[2], dtype=torch.float32)
    target = gray(height, width)
    result, pasted = paste(
        target, torch.zeros(0, 4), [(image, region)], generator=np.random.default_rng(seed)
    )
    ((index, box),) = pasted  # nothing is in the way: always pasted
    assert index == 0
    changed = (result != target).any(dim=0)
    assert extent(changed).tolist() == box.tolist()
    x1, y1, x2, y2 = box.int().tolist()
    assert changed.sum() == (x2 - x1) * (y2 - y1)
    assert pixels_of(result, COLORS[0])[y1:y2, x1:x2].all()  # the crop is the mark, with none of the black


def test_size_is_log_uniform_and_keeps_the_aspect_ratio():
    source = (marked(60, 120, (0, 0, 120, 60), COLORS[0]), torch.tensor([0.0, 0.0, 120.0, 60.0]))
    sides = []
    for seed in range(400):
        _, pasted = paste(
            gray(500, 500),
            torch.zeros(0, 4),
            [source],
            paste_size=(16, 256),
            generator=np.random.default_rng(seed),
        )
        x1, y1, x2, y2 = pasted[0][1].tolist()
        assert abs((x2 - x1) - 2 * (y2 - y1)) <= 2  # rounding
        sides.append(((x2 - x1) * (y2 - y1)) ** 0.5)
    octaves = np.histogram(np.log2(sides), bins=[3.5, 5, 6, 7, 8.5])[0]
    assert (np.abs(octaves - 100) < 35).all()  # 100 expected an octave, deviation 8.7


def test_large_paste_is_limited_to_the_image():
    source = (marked(50, 100, (0, 0, 100, 50), COLORS[0]), torch.tensor([0.0, 0.0, 100.0, 50.0]))
    _, pasted = paste(
        gray(40, 60), torch.zeros(0, 4), [source], paste_size=(500, 600), generator=np.random.default_rng(0)
    )
    x1, _, x2, _ = pasted[0][1].tolist()
    assert x2 - x1 == 60  # as wide as the image allows
    assert pasted[0][1][3] - pasted[0][1][1] == 30


def test_crop_is_rounded_outward_and_clipped_to_the_source():
    # Only the one-pixel column x = 5 is red; the region 5.4..5.6 still takes the whole pixel, rows from 0.
    source = marked(20, 20, (5, 0, 6, 20), COLORS[0])
    region = torch.tensor([5.4, -3.0, 5.6, 25.0])
    result, pasted = paste(
        gray(40, 40), torch.zeros(0, 4), [(source, region)], generator=np.random.default_rng(0)
    )
    x1, y1, x2, y2 = pasted[0][1].int().tolist()
    assert y2 - y1 == 40  # 1 x 20, enlarged until it fills the height
    assert x2 - x1 == 2
    assert pixels_of(result, COLORS[0])[y1:y2, x1:x2].all()


def test_crop_brings_its_background_and_its_own_flip():
    # Left half of the region red, right half black: after a flip the red half is on the right.
    source = (marked(32, 64, (0, 0, 32, 32), COLORS[0]), torch.tensor([0.0, 0.0, 64.0, 32.0]))
    for probability, red_side in ((0.0, slice(0, 0.4)), (1.0, slice(0.6, 1))):
        result, pasted = paste(
            gray(300, 300),
            torch.zeros(0, 4),
            [source],
            flip=probability,
            generator=np.random.default_rng(1),
        )
        x1, y1, x2, y2 = pasted[0][1].int().tolist()
        patch = result[:, y1:y2, x1:x2]
        width = patch.shape[-1]
        red = patch[0, :, int(width * red_side.start) : int(width * red_side.stop)]
        assert (red > 200).all()
        assert (patch[0] < 50).float().mean() == pytest.approx(0.5, abs=0.1)


def test_source_without_a_place_is_given_up_and_the_others_keep_their_index():
    image = gray(64, 64)
    source = marked(30, 30, (0, 0, 30, 30), COLORS[0])
    region, outside = torch.tensor([0.0, 0.0, 30.0, 30.0]), torch.tensor([40.0, 0.0, 50.0, 10.0])
    empty = torch.tensor([4.0, 4.0, 4.0, 9.0])
    # A box of one pixel on every fourth pixel: no 32-pixel paste misses them all.
    xs, ys = torch.meshgrid(torch.arange(0.0, 64, 4), torch.arange(0.0, 64, 4), indexing="ij")
    boxes = torch.stack([xs, ys, xs + 1, ys + 1], dim=-1).reshape(-1, 4)
    result, pasted = paste(image, boxes, [(source, region)], generator=np.random.default_rng(0))
    assert pasted == []
    assert torch.equal(result, image)
    sources = [(source, outside), (source, region), (source, empty), (source, region)]
    _, pasted = paste(
        gray(400, 400), torch.zeros(0, 4), sources, paste_size=(20, 30), generator=np.random.default_rng(0)
    )
    assert [index for index, _ in pasted] == [1, 3]


def test_paste_is_decided_by_the_seed_and_leaves_its_arguments():
    image, boxes = gray(100, 120), torch.tensor([[10.0, 10.0, 60.0, 60.0]])
    sources = [
        (marked(50, 50, (5, 5, 45, 45), color), torch.tensor([5.0, 5.0, 45.0, 45.0])) for color in COLORS
    ]
    kept = [image.clone(), boxes.clone(), *(tensor.clone() for source in sources for tensor in source)]

    def run(seed):
        return paste(image, boxes, sources, generator=np.random.default_rng(seed))

    (first, pasted), (again, pasted_again), (other, _) = run(1), run(1), run(2)
    assert torch.equal(first, again)
    assert len(pasted) > 0
    assert [(i, box.tolist()) for i, box in pasted] == [(i, box.tolist()) for i, box in pasted_again]
    assert not torch.equal(first, other)
    now = [image, boxes, *(tensor for source in sources for tensor in source)]
    assert all(torch.equal(a, b) for a, b in zip(kept, now))


def test_paste_without_sources_or_boxes_changes_nothing():
    image = gray(50, 50)
    result, pasted = paste(image, torch.zeros(0, 4), [], generator=np.random.default_rng(0))
    assert pasted == []
    assert torch.equal(result, image)
