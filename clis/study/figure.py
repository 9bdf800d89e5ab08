"""The figure of a study: a line over the value of a sweep, or a dot plot of its rows; the gain by images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from clis.figures import METRIC_GROUPS, Axes, Figure, defined, dot_plot, log_scale, look, mean_line, subplots
from clis.metric.analysis import merge_small_bins

MOST_GAINS = 4
"""Rows of which the gain by images can be told apart in one panel."""


def study_figure(document: Mapping[str, Any], title: str) -> Figure:
    """Draw a study from its ``study.json``.

    A study with an `axis` has lines over the values at which its rows are, and the other rows beside them;
    another one a dot plot, or with few rows the gain over the first row by training images. Rows without
    runs are left out.
    """
    rows = {name: row for name, row in document["rows"].items() if row["runs"]}
    if not rows:
        figure, _ = subplots(1, 1, (4, 1))
        figure.suptitle(f"{title}: no run is recorded yet", fontsize=10)
        return figure
    if document.get("axis") and sum("at" in row and row["at"] is not None for row in rows.values()) > 1:
        return _sweep(rows, document["axis"], title)
    if 1 < len(rows) <= MOST_GAINS:
        return _gains(rows, document.get("classes") or {}, title)
    return dot_plot({name: list(row["runs"].values()) for name, row in rows.items()}, title)


def _sweep(rows: Mapping[str, Mapping[str, Any]], axis: str, title: str) -> Figure:
    """Draw AP of each group over the value of the sweep, and rows that are not on it in a panel beside."""
    on_axis = sorted((row for row in rows.values() if row.get("at") is not None), key=lambda row: row["at"])
    beside = {name: row for name, row in rows.items() if row.get("at") is None}
    ratio = {"width_ratios": [6, 0.4 + 1.1 * len(beside)]} if beside else {}
    figure, axes = subplots(1, 2 if beside else 1, (4.2 if beside else 6.4, 3.6), sharey=True, **ratio)
    places = [float(row["at"]) for row in on_axis]
    for number, (key, group) in enumerate(METRIC_GROUPS.items()):
        values = [_values(row, key) for row in on_axis]
        mean_line(axes[0, 0], places, values, number, f"{key} ({group})")
        if beside:
            kind, values = look(number), [_values(row, key) for row in beside.values()]
            for place, runs in enumerate(values):
                axes[0, 1].plot(np.full(len(runs), place), runs, "o", ms=3.5, mfc="none", mec=kind["color"])
                axes[0, 1].plot(place, runs.mean(), kind["marker"], ms=5, color=kind["color"])
    _value_axis(axes[0, 0], places)
    axes[0, 0].set(xlabel=axis, ylabel="AP")
    axes[0, 0].set_title(_number_of_runs([*on_axis, *beside.values()], title), fontsize=9, loc="left")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    if beside:
        labels = [textwrap.fill(name, 16) for name in beside]
        axes[0, 1].set_xticks(range(len(beside)), labels, fontsize=7)
        axes[0, 1].margins(x=0.35)
    for ax in axes[0]:
        ax.grid(axis="y", lw=0.4, color="0.85")
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _value_axis(ax: Axes, places: list[float]) -> None:
    """Put the ticks at the values; values of several sizes get a logarithmic axis, with 0 on it."""
    positive = [place for place in places if place > 0]
    if positive and max(positive) / min(positive) >= 16:
        if min(places) <= 0:
            ax.set_xscale("symlog", linthresh=min(positive), linscale=0.6)
        else:
            ax.set_xscale("log")
    ax.set_xticks(places, [f"{place:g}" for place in places], fontsize=7, rotation=40)
    ax.minorticks_off()


def _gains(rows: Mapping[str, Mapping[str, Any]], classes: Mapping[str, int], title: str) -> Figure:
    """Draw a line per row over the groups, and the gain over the first row by training images."""
    figure, axes = subplots(1, 2, (4.6, 3.4))
    left, right = axes[0]
    first, handles = next(iter(rows)), {}
    for number, (name, row) in enumerate(rows.items()):
        places = np.arange(len(METRIC_GROUPS)) + 0.12 * (number - (len(rows) - 1) / 2)
        kind = look(number)
        for place, key in zip(places, METRIC_GROUPS):
            runs = _values(row, key)
            left.plot(np.full(len(runs), place), runs, "o", ms=3.5, mfc="none", mec=kind["color"], alpha=0.6)
            left.plot(place, runs.mean(), kind["marker"], color=kind["color"], ms=6)
        label = f"{name} (n = {len(row['runs'])})"
        (handles[label],) = left.plot([], [], kind["marker"], color=kind["color"], label=label)
        if number > 0:
            draw_gain(right, row["runs"], rows[first]["runs"], classes, number)
    left.set_xticks(
        range(len(METRIC_GROUPS)), [f"{key}\n{group}" for key, group in METRIC_GROUPS.items()], fontsize=8
    )
    left.set(ylabel="AP")
    left.set_ylim(bottom=0)
    left.set_title(title, fontsize=9, loc="left")
    left.legend([*handles.values()], [*handles], fontsize=7, framealpha=0.6)
    right.axhline(0, color="black", lw=0.6)
    log_scale(right)
    right.set(xlabel="training images of the class (n: classes)", ylabel=f"delta AP vs {first}")
    for ax in axes[0]:
        ax.grid(axis="y", lw=0.4, color="0.85")
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw_gain(
    ax: Axes,
    runs: Mapping[str, Mapping[str, Any]],
    first: Mapping[str, Mapping[str, Any]],
    classes: Mapping[str, int],
    number: int,
) -> None:
    """Draw how far runs are above those of the same seeds in the first row, by training images.

    Args:
        runs, first: by seed, each with ``by_images``: AP in percent by "first-last" number of images.
        classes: classes in each of these bins; those with fewer than three are joined with neighbors. Where
            they are not known, bins are drawn as they are.
        number: of the series, for its look.
    """
    seeds = [seed for seed in runs if seed in first]
    per_seed = [_gain_bins(runs[seed]["by_images"], first[seed]["by_images"], classes) for seed in seeds]
    if not per_seed or not per_seed[0]:
        return
    bins = per_seed[0]
    centers = [math.sqrt(max(low, 1) * max(high, 1)) for low, high, _, _ in bins]
    values = [np.array([gains[place][3] for gains in per_seed]) for place in range(len(bins))]
    mean_line(ax, centers, values, number)
    if classes and number == 1:
        for center, (_, _, count, _) in zip(centers, bins):
            ax.annotate(
                f"n={count}", (center, 0.01), xycoords=("data", "axes fraction"), ha="center", fontsize=6
            )


def _gain_bins(
    above: Mapping[str, float], below: Mapping[str, float], classes: Mapping[str, int]
) -> list[tuple[int, int, int, float]]:
    rows = []
    for name in (name for name in above if name in below):
        low, _, high = name.partition("-")
        rows.append((int(low), int(high), classes.get(name, 1), above[name] - below[name]))
    return merge_small_bins(rows) if classes else rows


def _values(row: Mapping[str, Any], key: str) -> np.ndarray:
    """Return a figure of each run, NaN where undefined: float64 [runs]."""
    return np.array([defined(run, key) for run in row["runs"].values()], dtype=float)


def _number_of_runs(rows: list[Mapping[str, Any]], title: str) -> str:
    counts = sorted({len(row["runs"]) for row in rows})
    if len(counts) > 1:
        return f"{title} ({counts[0]} to {counts[-1]} runs a point)"
    return f"{title} ({counts[0]} run{'s' * (counts[0] > 1)} a point)"
