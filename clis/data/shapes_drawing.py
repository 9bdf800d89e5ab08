"""The drawings of the embedded benchmark: a class is an outline times a texture (10 x 5 = 50)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SUPERSAMPLING = 3
MAX_TILT = np.deg2rad(30)  # small networks should not have to learn full rotation invariance
RIM_WIDTH = 0.2  # of half the object's side

# Outlines: the depth of a point below the outline, positive inside, in units of half the object's side; x
# points right and y down. Only the sign (the outline) and small values (the rim) need to be right.


def _regular(x: np.ndarray, y: np.ndarray, corners: int, radius: float) -> np.ndarray:
    normals = [(2 * k + 1) * math.pi / corners for k in range(corners)]  # of the edges, from upwards
    beyond = [math.sin(angle) * x - math.cos(angle) * y for angle in normals]
    return radius * math.cos(math.pi / corners) - np.maximum.reduce(beyond)


def _star(x: np.ndarray, y: np.ndarray, tip: float = 1.2, notch: float = 0.6) -> np.ndarray:
    step = 2 * math.pi / 5
    from_tip = np.arctan2(x, -y)
    from_tip -= step * np.rint(from_tip / step)
    along, across = np.hypot(x, y) * np.cos(from_tip), np.hypot(x, y) * np.abs(np.sin(from_tip))
    edge_along, edge_across = tip - notch * math.cos(step / 2), notch * math.sin(step / 2)
    return (edge_across * (tip - along) - edge_along * across) / math.hypot(edge_along, edge_across)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(1 - np.maximum(x, y), 0.4 - np.minimum(x, y))


def _heart(x: np.ndarray, y: np.ndarray, half: float = 0.82, middle: float = 0.08) -> np.ndarray:
    """Join a square on its corner with a disk on each upper edge."""
    x, y = np.abs(x), y - middle
    square = (half - x - np.abs(y)) / math.sqrt(2)
    return np.maximum(square, half / math.sqrt(2) - np.hypot(x - half / 2, y + half / 2))


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    head = np.minimum((1 + y - x) / math.sqrt(2), 0.08 - y)
    shaft = np.minimum(np.minimum(0.4 - x, 1 - y), y + 0.6)
    return np.maximum(head, shaft)


OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "triangle": lambda x, y: _regular(x, y, 3, 1.25),
    "square": lambda x, y: 0.88 - np.maximum(np.abs(x), np.abs(y)),
    "pentagon": lambda x, y: _regular(x, y, 5, 1.08),
    "star": _star,
    "cross": _cross,
    "ring": lambda x, y: np.minimum(1 - np.hypot(x, y), np.hypot(x, y) - 0.38),
    "heart": _heart,
    "moon": lambda x, y: np.minimum(1 - np.hypot(x, y), np.hypot(x - 0.62, y) - 0.72),
    "arrow": _arrow,
    "disk": lambda x, y: 1 - np.hypot(x, y),
}


def _fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)  # several times as fast as x % 1


# Textures: where the second color shows, from shifted coordinates and the depth below the outline.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda x, y, depth: np.zeros(x.shape, bool),
    "stripes": lambda x, y, depth: _fraction(y / 0.55) < 0.5,
    "dots": lambda x, y, depth: np.hypot(_fraction(x / 0.6) - 0.5, _fraction(y / 0.6) - 0.5) < 0.34,
    "checks": lambda x, y, depth: (_fraction(x / 0.84) < 0.5) ^ (_fraction(y / 0.84) < 0.5),
    "rim": lambda x, y, depth: depth < RIM_WIDTH,
}

CLASSES: tuple[tuple[str, str], ...] = tuple(
    (texture, outline) for outline in OUTLINES for texture in TEXTURES
)
"""(texture, outline) of each label."""
CLASS_NAMES: tuple[str, ...] = tuple(f"{texture}_{outline}" for texture, outline in CLASSES)
"""Name of each label, e.g. ``stripes_star``; the category id is the label + 1."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One drawn image with N objects."""

    image: np.ndarray
    """uint8 [3, S, S], RGB."""
    boxes: np.ndarray
    """int64 [N, 4], xyxy in pixels, x2 and y2 exclusive: tight around each mask."""
    masks: np.ndarray
    """bool [N, S, S], pixels of which the object covers at least half; no two overlap."""


def draw_scene(
    rng: np.random.Generator,
    labels: np.ndarray,
    *,
    image_size: int,
    object_size: tuple[float, float],
    backdrop: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]],
) -> Scene:
    """Draw one object of each label in `labels` (int [N], 0..49) on a backdrop, all of them wholly visible.

    `object_size` is the range of an object's side as a fraction of `image_size`; `backdrop` is
    `draw_gradient` or `draw_studio`.
    """
    image, palette = backdrop(rng, image_size)
    sides = np.sort(rng.uniform(*object_size, len(labels)))[::-1]  # the largest is placed first
    sides = sides * min(1, np.sqrt(0.6 / (sides**2).sum())) * image_size
    masks = np.zeros((len(labels), image_size, image_size), bool)
    boxes = np.zeros((len(labels), 4), np.int64)
    for k in range(len(labels)):
        alpha, color = _place_object(rng, labels[k], sides[k], palette, np.any(masks[:k], axis=0), boxes[:k])
        image += alpha * (color - image)
        masks[k] = alpha >= 0.5
        boxes[k] = _tight_box(masks[k])
    return Scene(image=np.rint(255 * image.clip(0, 1)).astype(np.uint8), boxes=boxes, masks=masks)


def draw_object(
    rng: np.random.Generator, label: int, side: float, palette: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one object with a random tilt, texture phase and two colors unlike `palette`, [K, 3] in 0..1.

    `side` is the side, in pixels, of the square in which the upright outline is drawn. Returns the coverage,
    [h, w] in 0..1 and trimmed to the object, and its color, [3, h, w] in 0..1.
    """
    texture, outline = CLASSES[label]
    pixels = int(np.ceil(1.5 * side)) + 1
    line = ((np.arange(pixels * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - pixels / 2) * (2 / side)
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)
    along, across = (np.cos(tilt) * line).astype(np.float32), (np.sin(tilt) * line).astype(np.float32)
    x, y = along[None, :] + across[:, None], along[:, None] - across[None, :]
    depth = OUTLINES[outline](x, y)
    shift_x, shift_y = rng.uniform(0, 1, 2).tolist()  # Python floats keep x and y in float32
    inside = depth > 0
    alpha = _average(inside)
    share = _average(inside & TEXTURES[texture](x + shift_x, y + shift_y, depth)) / np.maximum(alpha, 1e-6)
    first = _contrasting_color(rng, palette)
    second = _contrasting_color(rng, np.vstack([palette, first]))
    x1, y1, x2, y2 = _tight_box(alpha > 0)
    color = first[:, None, None] + (second - first)[:, None, None] * share
    return alpha[y1:y2, x1:x2], color[:, y1:y2, x1:x2]


def _average(samples: np.ndarray) -> np.ndarray:
    """Average the SUPERSAMPLING x SUPERSAMPLING boolean samples of each pixel."""
    samples, n = samples.view(np.uint8), SUPERSAMPLING
    none = np.zeros_like(samples[::n, ::n])
    return sum((samples[i::n, j::n] for i in range(n) for j in range(n)), start=none) / n**2


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _contrasting_color(rng: np.random.Generator, others: np.ndarray, contrast: float = 0.6) -> np.ndarray:
    """Draw a color that differs from all `others` [K, 3]; brightness counts twice, as JPEG blurs chroma."""
    candidates = rng.uniform(0, 1, (64, 3))
    difference = candidates[:, None] - others
    brightness = np.abs(difference @ np.array([0.299, 0.587, 0.114]))
    nearest = (np.sqrt((difference**2).sum(2)) / 2 + brightness).min(1)
    enough = np.flatnonzero(nearest >= contrast)
    return candidates[enough[0] if len(enough) else nearest.argmax()]


def _place_object(
    rng: np.random.Generator,
    label: int,
    side: float,
    palette: np.ndarray,
    occupied: np.ndarray,
    boxes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an object where there is room, shrinking it until there is: `draw_object` on the full canvas."""
    size = len(occupied)
    while True:
        patch, patch_color = draw_object(rng, label, side, palette)
        height, width = patch.shape
        for _ in range(40 if max(height, width) <= size else 0):
            top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
            window = np.s_[..., top : top + height, left : left + width]
            box = np.array([left, top, left + width, top + height])
            if not (occupied[window] & (patch > 0)).any() and not _covers(box, boxes):
                alpha, color = np.zeros((size, size)), np.zeros((3, size, size))
                alpha[window], color[window] = patch, patch_color
                return alpha, color
        side *= 0.9


def _covers(box: np.ndarray, boxes: np.ndarray, share: float = 0.15) -> bool:
    """Check whether `box` and any of `boxes` share more than `share` of the smaller one."""
    overlap = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    smaller = np.minimum(np.prod(box[2:] - box[:2]), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    return bool((np.prod(overlap.clip(0), axis=1) > share * smaller).any())


def draw_gradient(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the backdrop of a scene: a two-color gradient with faint blobs and lines.

    Returns the image, float64 [3, size, size] in 0..1, and its two main colors, [2, 3].
    """
    palette = _related_colors(rng)
    across = _ramp(rng, size)
    mix = (across - across.min()) / np.ptp(across)
    image = palette[0][:, None, None] + (palette[1] - palette[0])[:, None, None] * mix
    for _ in range(rng.integers(3, 7)):
        image += _faint(rng, 0.12) * _blob(rng, size)
    for _ in range(rng.integers(2, 5)):
        image += _faint(rng, 0.12) * (np.abs(_ramp(rng, size) - rng.uniform(-0.6, 0.6)) < 0.015)
    return image + rng.normal(0, 0.01, image.shape), palette


def draw_studio(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the backdrop of an image-level image: one color, waves or noise, with a few larger blobs.

    Returns the same as `draw_gradient`.
    """
    palette = _related_colors(rng)
    style = rng.integers(3)
    if style == 0:
        mix = np.zeros((size, size))
    elif style == 1:
        mix = 0.5 + 0.5 * np.sin(_ramp(rng, size) * rng.uniform(20, 60))
    else:
        mix = rng.uniform(0, 1, (size, size))
    image = palette[0][:, None, None] + (palette[1] - palette[0])[:, None, None] * mix
    for _ in range(rng.integers(1, 4)):
        image += _faint(rng, 0.2) * _blob(rng, size)
    return image, palette


def _related_colors(rng: np.random.Generator) -> np.ndarray:
    """Draw two colors of a backdrop, [2, 3], near enough that an object can differ from both."""
    first = rng.uniform(0.1, 0.9, 3)
    return np.stack([first, (first + rng.normal(0, 0.15, 3)).clip(0, 1)])


def _faint(rng: np.random.Generator, strength: float) -> np.ndarray:
    return rng.uniform(-strength, strength, (3, 1, 1))


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the signed distance, [size, size] in image sides, to a random line through the middle."""
    line = (np.arange(size) + 0.5) / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    return np.cos(angle) * line[None, :] + np.sin(angle) * line[:, None]


def _blob(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a soft spot of random place and extent, [size, size] in 0..1."""
    line = (np.arange(size) + 0.5) / size
    middle, extent = rng.uniform(0, 1, 2), rng.uniform(0.04, 0.15, 2)
    profile = np.exp(-(((line - middle[:, None]) / extent[:, None]) ** 2))
    return profile[0][None, :] * profile[1][:, None]
