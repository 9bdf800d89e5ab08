"""Charts of what a config trains on: images per class of both streams, and sizes of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from clis.data.categories import Category

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise ValueError('charts need matplotlib: pip install -e ".[report]"') from None

TICKS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
STYLES = ("-", "--", ":")


def long_tail(categories: Sequence[Category], instance: np.ndarray, image_level: np.ndarray | None) -> Figure:
    """Draw images per class of both streams, int64 [C], on a log scale; classes in the order of the first."""
    order = np.argsort(-instance, kind="stable")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    ax = figure.subplots()
    places = np.arange(1, len(order) + 1)
    if image_level is not None:
        label = "image-level images"
        ax.plot(places, image_level[order], ls="", marker="x", ms=5, color="#b3261e", label=label)
    ax.plot(places, instance[order], lw=2.2, color="#0b57d0", label="instance-level images")
    ax.set_yscale("symlog", linthresh=1, linscale=0.3)  # classes without images are at 0
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set(xlabel="class, by instance-level images", ylabel="images (log scale)")
    ax.set(xlim=(0.5, len(order) + 0.5), ylim=(-0.2, None))
    _mark_groups(ax, [categories[label].frequency for label in order])
    ax.grid(axis="y", alpha=0.3)
    ax.legend()
    return figure


def _mark_groups(ax: Axes, frequencies: Sequence[str]) -> None:
    """Write where the frequent, common and rare classes are, if these are in one piece each."""
    names = {"f": "frequent", "c": "common", "r": "rare"}
    starts = [
        0,
        *(place for place in range(1, len(frequencies)) if frequencies[place] != frequencies[place - 1]),
    ]
    if len(starts) > 3:
        return
    for start, end in zip(starts, [*starts[1:], len(frequencies)]):
        ax.text((start + end + 1) / 2, 1.0, f"{names[frequencies[start]]} ({end - start})",
                transform=ax.get_xaxis_transform(), ha="center", va="bottom")  # fmt: skip
        if start:
            ax.axvline(start + 0.5, color="black", lw=0.8, alpha=0.5)


def box_sizes(sides: Mapping[str, np.ndarray]) -> Figure:
    """Draw the distribution of square roots of area in pixels, one line per kind of box, on a log scale."""
    shown = {name: values[values > 0] for name, values in sides.items() if (values > 0).any()}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    ax = figure.subplots()
    if shown:
        low, high = (pick([pick(values) for values in shown.values()]) for pick in (min, max))
        edges = np.geomspace(max(low * 0.95, 0.5), high * 1.05, 30)
        colors = ("#0b57d0", "#b3261e", "#1a7f37")
        for (name, values), style, color in zip(shown.items(), STYLES, colors):
            counts, _ = np.histogram(values, edges)
            label = f"{name}: median {np.median(values):.0f} px, n = {len(values)}"
            ax.stairs(100 * counts / len(values), edges, lw=2.2, ls=style, color=color, label=label)
        ax.set_xscale("log")
        ticks = [tick for tick in TICKS if edges[0] <= tick <= edges[-1]]
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
        ax.legend()
    ax.set(xlabel="square root of the box's area, in pixels as the network sees it", ylabel="% of the boxes")
    ax.grid(alpha=0.3)
    return figure
