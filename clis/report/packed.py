"""What is embedded in the page: JSON, with arrays as base64 of their little-endian bytes."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

_TYPES = {"u1": "<u1", "u2": "<u2", "u4": "<u4", "f4": "<f4"}

NONE = 0xFFFF
"""Stands for no class and no box in the page's arrays of 16 bits."""
SCORE_UNITS = 10_000
"""A score is a whole number of 1/10,000, rounded down: it is then on the same side of any whole percent."""


def pack(array: np.ndarray, kind: str) -> dict[str, str]:
    """Pack an array, row by row, as one of the types that the script knows: u1, u2, u4 or f4."""
    data = np.ascontiguousarray(array, dtype=_TYPES[kind]).tobytes()
    return {"type": kind, "data": base64.b64encode(data).decode()}


def pack_scores(scores: np.ndarray) -> dict[str, str]:
    """Pack scores in [0, 1] as `SCORE_UNITS`, and what is negative as `NONE`."""
    return pack(np.where(scores < 0, NONE, units_of(scores)), "u2")


def units_of(scores: np.ndarray) -> np.ndarray:
    """Return scores as whole numbers of `SCORE_UNITS`; float32's 0.3 is a little above 0.3, 0.7 below."""
    return np.floor(np.asarray(scores, np.float64) * SCORE_UNITS + 1e-3).clip(0, SCORE_UNITS).astype(np.int64)


def pack_boxes(boxes: np.ndarray, sizes: np.ndarray) -> dict[str, str]:
    """Pack boxes x y w h [n, 4] as u2 corners, in 65,535ths of the sides of their images.

    Args:
        sizes: height and width of the image of each, [n, 2].
    """
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    sides = np.tile(sizes[:, ::-1], 2).clip(min=1)
    return pack((corners / sides * 65535).round().clip(0, 65535), "u2")


def to_json(value: Any) -> str:
    """Return compact JSON that is safe within a script element, whatever names it holds."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
