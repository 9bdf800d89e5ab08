"""What all figures share: matplotlib (the extra ``[report]``), the looks of series, the dot plot, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clis.atomic import atomic_write

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
except ImportError:
    raise ValueError('matplotlib is not installed: pip install -e ".[report]"') from None

matplotlib.rcParams["text.parse_math"] = False  # names of runs and classes may hold a $

METRIC_GROUPS = {"AP": "all", "APr": "rare", "APc": "common", "APf": "frequent"}
FORMATS = ("png", "pdf", "svg")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito, which people with any color vision tell apart; without the yellow, which paper loses."""
MARKERS = "osD^vPX<>"
STYLES = ("-", "--", "-.", ":")


def look(number: int) -> dict[str, Any]:
    """Return color, marker and line style of a series; they differ for 63 series, also in gray."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": STYLES[number % len(STYLES)],
    }


def subplots(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """Make a figure without a screen, and its axes [rows, columns], each of this size in inches."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def log_scale(ax: Axes) -> None:
    """Make the x axis logarithmic, with plain numbers at its ticks: powers would be formulas."""
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(LogFormatter())
    ax.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the name's suffix; equal figures give equal files."""
    date = {"pdf": "CreationDate", "svg": "Date"}.get(path.suffix[1:])
    settings: Any = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "clis"}  # text stays text
    with matplotlib.rc_context(settings), atomic_write(path) as temporary:
        metadata = {date: None} if date else None
        figure.savefig(temporary, dpi=130, bbox_inches="tight", metadata=metadata)


def defined(figures: Mapping[str, float], name: str) -> float:
    """Return a figure, or NaN where it is undefined."""
    value = figures.get(name, -1.0)
    return value if value >= 0 else float("nan")


def dot_plot(rows: Mapping[str, Sequence[Mapping[str, float]]], title: str = "") -> Figure:
    """Draw AP of all, rare, common and frequent classes, a panel each, with a line per row.

    The dot is the mean of the runs, its whiskers are one standard deviation of at least three to both sides,
    and the rings below it are the single runs. Their number follows the name.

    Args:
        rows: figures of each run in percent, -1 where undefined, by the row's name.
    """
    height = 1.1 + 0.27 * max(len(rows), 1)
    figure, axes = subplots(1, len(METRIC_GROUPS), (2.1, height), sharey=True)
    names = [f"{name}  (n = {len(runs)})" for name, runs in rows.items()]
    for ax, (key, group) in zip(axes[0], METRIC_GROUPS.items()):
        for number, runs in enumerate(rows.values()):
            values = np.array([defined(run, key) for run in runs], dtype=float)
            if not len(values) or np.isnan(values).all():
                continue
            mean = values.mean()
            if len(values) > 1:
                ax.plot(values, np.full(len(values), number + 0.27), "o", ms=3, mfc="none", mec="0.45")
            spread = values.std(ddof=1) if len(values) > 2 else 0.0
            ax.errorbar(mean, number, xerr=spread or None, fmt="o", color=COLORS[0], ms=5, capsize=2.5)
            ax.annotate(
                f"{mean:.1f}", (mean, number), xytext=(0, 4), textcoords="offset points",
                ha="center", fontsize=6.5,
            )  # fmt: skip
        ax.set(xlabel=f"{key} ({group})")
        ax.margins(x=0.14)
        ax.set_ylim(len(rows) - 0.4, -0.7)
        ax.grid(axis="y", lw=0.4, color="0.85")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(rows)), names, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def mean_line(
    ax: Axes, places: Sequence[float], values: Sequence[np.ndarray], number: int, label: str | None = None
) -> None:
    """Draw the means of the runs at each place as a line, and the single runs as rings."""
    kind = look(number)
    for place, runs in zip(places, values):
        if len(runs) > 1:
            ax.plot(np.full(len(runs), place), runs, "o", ms=3.5, mfc="none", mec=kind["color"], alpha=0.5)
    ax.plot(places, [runs.mean() if len(runs) else np.nan for runs in values], ms=5, label=label, **kind)
