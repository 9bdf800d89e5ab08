"""The curves of a run's log, short enough for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clis.config import FIGURES

MAX_POINTS = 1500
"""Points of a curve in the page; longer logs are averaged over equal numbers of records."""
LOSSES = (
    "loss", "rpn_objectness", "rpn_box", "instance_cls", "box", "objectness", "image_cls", "contrastive",
    "pseudo",
)  # fmt: skip


def curves_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``steps`` and, by field of metrics.jsonl, ``raw`` and ``smooth`` values; losses come first.

    Evaluations are not part of it. A value that was not finite or was not logged is None.
    """
    logged = [record for record in records if "AP" not in record]
    names = list(dict.fromkeys(name for record in logged for name in record if name != "step"))
    names = [*(name for name in LOSSES if name in names), *(name for name in names if name not in LOSSES)]
    group = -(-len(logged) // MAX_POINTS) or 1
    steps = [int(record["step"]) for record in logged][group - 1 :: group]
    fields = {}
    for name in names:
        values = np.array([_number(record.get(name)) for record in logged][: len(steps) * group])
        values = _mean(values.reshape(-1, group))
        fields[name] = {"raw": _plain(values), "smooth": _plain(smoothed(values))}
    return {"steps": steps, "losses": sum(name in LOSSES for name in names), "fields": fields}


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return running means over a twentieth of the values, at least 5, from the first value to the last.

    The window is centered and gets shorter at both ends, so that a curve begins and ends where the run does.
    """
    half = max(2, len(values) // 40)
    defined = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(defined, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(defined)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    low, high = place - reach, place + reach + 1
    count = counts[high] - counts[low]
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, (sums[high] - sums[low]) / count, np.nan)


def evaluations_of(evaluations: Sequence[tuple[int, Mapping[str, float]]]) -> list[dict[str, float]]:
    """Return of evaluations, steps and metrics, each as one mapping: step, AP, APr, APc and APf.

    They are fractions, -1 where undefined.
    """
    return [
        {"step": step} | {name: metrics.get(name, -1) for name in FIGURES} for step, metrics in evaluations
    ]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def _mean(rows: np.ndarray) -> np.ndarray:
    """Average each row over what is not NaN."""
    counts = (~np.isnan(rows)).sum(axis=1)
    return np.where(counts > 0, np.nansum(rows, axis=1) / counts.clip(min=1), np.nan)


def _plain(values: np.ndarray) -> list[float | None]:
    """Return four significant digits of each, None for NaN: JSON has no NaN."""
    return [None if np.isnan(value) else float(f"{value:.4g}") for value in values.tolist()]
