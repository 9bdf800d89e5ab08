"""The pre-defined regions of an image-level index: a file of one row per image."""

from __future__ import annotations

import enum
import json
from pathlib import Path

import numpy as np

from clis.config import DETECTOR_RULES, RegionsConfig
from clis.data.image_level import ImageLevelIndex
from clis.data.mapped import map_array

_ROWS = 1 << 20
"""Rows that are checked at once, so that memory does not grow with the file."""


class RegionSource(enum.IntEnum):
    """Where a region comes from."""

    PENDING = 0
    """Not made yet; only in unfinished files."""
    RULE = 1
    """The rule of the region file gave it."""
    FALLBACK = 2
    """The rule gave none: the center box."""
    UNREADABLE = 3
    """The image could not be read; the box is empty."""


REGION_DTYPE = np.dtype([("box", np.float32, 4), ("score", np.float32), ("source", np.uint8)])
"""One region: xyxy in pixels of the stored image, score in [0, 1], `RegionSource`."""


def region_recipe(regions: RegionsConfig) -> dict[str, object]:
    """Return the settings that determine how a region file is made, by the names of the fields."""
    recipe: dict[str, object] = {"rule": regions.file_rule}
    if regions.rule in DETECTOR_RULES:
        recipe |= {"short_side": sorted(regions.short_side), "max_size": regions.max_size}
    return recipe


def region_sidecar(index: ImageLevelIndex, regions: RegionsConfig, detector: str | None) -> dict[str, object]:
    """Return the content of the JSON beside a region file: its index, recipe, and source of the boxes."""
    return {"index": index.digest, "images": len(index), **region_recipe(regions), "detector": detector}


def detector_steps(path: Path) -> int | None:
    """Return how many steps the detector of a region file was trained; None where that is not recorded."""
    try:
        return json.loads(path.with_suffix(".json").read_text()).get("detector_steps")
    except (OSError, ValueError, AttributeError):  # `load_regions` says what is wrong
        return None


def load_regions(
    path: str | Path, index: ImageLevelIndex, config: RegionsConfig, *, every_row: bool = False
) -> np.ndarray:
    """Load the regions of the index's images, in its order: `REGION_DTYPE` [n], memory-mapped.

    Args:
        config: how they must have been made (`region_recipe`).
        every_row: also check the rows of a file whose sidecar says that it was completed.

    Raises:
        ValueError: the file was made for another index, by another rule or at other sizes, is unfinished, has
            a region without area, or lacks its sidecar.
    """
    path = Path(path)
    sidecar = path.with_suffix(".json")
    if path.exists() and not sidecar.exists():
        raise ValueError(
            f"{path}: {sidecar.name} is missing, which says what it was made for; copy both files, or remove "
            "it to have it made again"
        )
    try:
        made = {"index": None} | json.loads(sidecar.read_text())
        regions = map_array(path)
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it to have it made again") from error
    if made["index"] != index.digest or regions.shape != (len(index),) or regions.dtype != REGION_DTYPE:
        raise ValueError(
            f"{path}: made for other image-level images than the {len(index)} of data.image_level; correct "
            "data.image_level, data.mapping or data.train, or name another regions.file, which is then made"
        )
    for name, wanted in region_recipe(config).items():
        if name not in made:
            raise ValueError(f"{path}: does not say its regions.{name}; remove it to have it made again")
        if made[name] != wanted:
            raise ValueError(
                f"{path}: made with regions.{name}={made[name]}, this run has {wanted}; set "
                f"regions.{name} to use it, or name another regions.file to have one made"
            )
    complete = "counts" in made  # written with the last row, by `clis.engine.region_search`
    for start in range(0, 0 if complete and not every_row else len(regions), _ROWS):
        bad = start + _unusable(regions[start : start + _ROWS])
        if len(bad):
            first = int(bad[0])
            raise ValueError(
                f"{path}: row {first} ({index.name(first)}) is unfinished or has no area: {regions[first]} "
                f"(and {len(bad) - 1} more near it); remove the file to have it made again"
            )
    return regions


def mean_scores(labels: np.ndarray, regions: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Average each class's scores over the regions that the rule gave.

    Args:
        labels: of the rows, int.
        regions: rows of `REGION_DTYPE`.

    Returns:
        The means, float64 [C], -1 where the rule gave none, and how many it gave, int64 [C].
    """
    given = regions["source"] == RegionSource.RULE
    counts = np.bincount(labels[given], minlength=classes)
    sums = np.bincount(labels[given], regions["score"][given], minlength=classes)
    return np.where(counts > 0, sums / counts.clip(min=1), -1), counts


def _unusable(regions: np.ndarray) -> np.ndarray:
    """Return the places of the regions that are unfinished or have no area."""
    x1, y1, x2, y2 = regions["box"].T
    without_area = ~((x2 > x1) & (y2 > y1)) & (regions["source"] != RegionSource.UNREADABLE)
    return np.flatnonzero(without_area | (regions["source"] == RegionSource.PENDING))
