"""Boxes with readable labels on pictures, drawn with Pillow."""

from __future__ import annotations

import colorsys
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST, LARGEST = 720, 1600
"""Longest side of a drawn picture in pixels: smaller images are enlarged, so that labels can be read."""

FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf",
    "wqy-zenhei.ttc", "Arial Unicode.ttf", "PingFang.ttc", "arialuni.ttf", "msyh.ttc",
)  # fmt: skip
"""Common fonts of systems, for characters that Pillow's own font does not have."""

Color = tuple[int, int, int]
WHITE, BLACK, GRAY = (255, 255, 255), (0, 0, 0), (120, 120, 120)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A box to draw."""

    box: Sequence[float]
    """xyxy in pixels of the image."""
    text: str = ""
    """Its label; nothing is written where it is empty."""
    color: Color = WHITE
    dashed: bool = False


def class_color(label: int) -> Color:
    """Return the color of a class: hues a golden angle apart, bright and dark in turn; none repeats."""
    hue = (label * 0.61803398875) % 1
    red, green, blue = colorsys.hls_to_rgb(hue, (0.62, 0.42)[label % 2], 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def picture_of(image: Tensor, smallest: int = SMALLEST, largest: int = LARGEST) -> tuple[Image.Image, float]:
    """Make a picture of a uint8 RGB image [3,H,W] whose longest side is within these bounds.

    Returns:
        The picture, and the factor from pixels of the image to its own.
    """
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    longest = max(picture.size)
    scale = min(max(longest, smallest), largest) / longest
    if scale == 1:
        return picture, 1.0
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.BICUBIC), scale


def draw_marks(
    picture: Image.Image, marks: Sequence[Mark], scale: float = 1.0, width: int | None = None
) -> None:
    """Draw boxes and their labels on a picture, the first on top; thickness and text follow its size.

    A label stands above its box, or below or inside it where there is no room or another label.

    Args:
        scale: from pixels of the boxes to pixels of the picture.
        width: of the lines in pixels; None follows the picture's size.
    """
    canvas = ImageDraw.Draw(picture)
    longest = max(picture.size)
    width = width or max(2, round(longest / 300))
    places = [tuple(scale * side for side in mark.box) for mark in marks]
    for mark, place in reversed(list(zip(marks, places))):
        _draw_box(canvas, place, mark.color, width, mark.dashed)
    taken: list[tuple[float, float, float, float]] = []
    for mark, place in zip(marks, places):
        if mark.text:
            font = font_of(text_size(longest), mark.text)
            _draw_label(canvas, picture.size, place, mark, font, width, taken)


def draw_caption(picture: Image.Image, text: str, size: int, lines: int = 1) -> Image.Image:
    """Return the picture with N lines of text, of this size in pixels, on a white strip below it."""
    font = font_of(size, text)
    height = round(1.35 * font.size) * lines + 6
    framed = Image.new("RGB", (picture.width, picture.height + height), WHITE)
    framed.paste(picture)
    canvas = ImageDraw.Draw(framed)
    for number, line in enumerate(text.splitlines()[:lines]):
        place = (4, picture.height + 3 + round(1.35 * font.size) * number)
        canvas.text(place, shorten(line, font, picture.width - 8), fill=BLACK, font=font)
    return framed


def side_by_side(pictures: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    """Join pictures from left to right on white, with their upper sides aligned."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    joined = Image.new("RGB", (width, max(picture.height for picture in pictures)), WHITE)
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width + gap
    return joined


def text_size(longest: float) -> int:
    """Return the size in pixels of the text on a picture with this longest side."""
    return max(14, round(longest / 40))


def font_of(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Return a font for a text in this size in pixels.

    It is Pillow's own wherever that has the characters; else the first of `FONTS` that is on the machine and
    has them; else Pillow's own after all, which draws boxes in their place.
    """
    return _font_with(size, frozenset(c for c in text if not (c.isascii() or c.isspace())))


@cache
def _font_with(size: int, characters: frozenset[str]) -> ImageFont.FreeTypeFont:
    own = _own_font(size)
    for font in itertools.chain([own], (_system_font(name, size) for name in FONTS)):
        if font is not None and all(_has_glyph(font, character) for character in characters):
            return font
    warnings.warn(
        "no font here has all characters of the labels, so some are drawn as empty boxes; install one that "
        "has them, e.g. apt install fonts-noto-cjk",
        stacklevel=1,
    )
    return own


def _has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Check that a font draws something else than for U+10FFFF, which is no character."""
    return bytes(font.getmask(character)) != bytes(font.getmask("\U0010ffff"))


@cache
def _system_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@cache
def _own_font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font in this size in pixels."""
    try:
        font = ImageFont.load_default(size)
    except TypeError:
        raise ValueError("drawing needs Pillow 10.1 or newer: pip install -U pillow") from None
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("this Pillow is built without FreeType; reinstall it: pip install -U pillow")
    return font


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return the text, or as much of its start as fits this width in pixels, followed by three dots."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _draw_box(
    canvas: ImageDraw.ImageDraw, place: Sequence[float], color: Color, width: int, dashed: bool
) -> None:
    """Draw a box on a halo of black or white, whichever differs more, so that it shows on any ground."""
    x1, y1, x2, y2 = place
    halo = _contrast(color)
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
    for start, end in zip(corners, corners[1:]):
        canvas.line([start, end], fill=halo, width=width + 2)
    for start, end in zip(corners, corners[1:]):
        for piece in _dashes(start, end, 5 * width) if dashed else [(start, end)]:
            canvas.line(list(piece), fill=color, width=width)


def _dashes(
    start: tuple[float, float], end: tuple[float, float], length: float
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Cut a line into pieces of about this length, and return every other one."""
    pieces = max(1, round(abs(end[0] - start[0] + end[1] - start[1]) / length)) // 2 * 2 + 1
    points = [
        (start[0] + (end[0] - start[0]) * part / pieces, start[1] + (end[1] - start[1]) * part / pieces)
        for part in range(pieces + 1)
    ]
    return list(zip(points[::2], points[1::2]))


def _draw_label(
    canvas: ImageDraw.ImageDraw,
    size: tuple[int, int],
    place: Sequence[float],
    mark: Mark,
    font: ImageFont.FreeTypeFont,
    width: int,
    taken: list[tuple[float, float, float, float]],
) -> None:
    x1, y1, x2, y2 = place
    text = shorten(mark.text, font, size[0] - 6)
    label_width, label_height = font.getlength(text) + 6, 1.25 * font.size
    room_x, room_y = size[0] - label_width, size[1] - label_height
    lefts = [min(max(left, 0), room_x) for left in (x1 - width / 2, x2 + width / 2 - label_width)]
    tops = [top for top in (y1 - label_height, y2, y1, y2 - label_height) if 0 <= top <= room_y] or [0.0]
    boxes = [(left, top, left + label_width, top + label_height) for left in lefts for top in tops]
    free = [box for box in boxes if not any(_overlap(box, other) for other in taken)]
    chosen = (free or boxes)[0]
    taken.append(chosen)
    canvas.rectangle(chosen, fill=mark.color)
    canvas.text((chosen[0] + 3, chosen[1]), text, fill=_contrast(mark.color), font=font)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _contrast(color: Color) -> Color:
    """Return black or white, whichever is further from the color in luminance (Rec. 709)."""
    red, green, blue = color
    return BLACK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 128 else WHITE
