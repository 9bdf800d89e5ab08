"""Figures of finished runs (the extra ``[report]``): curves, AP by frequency and by images, boxes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clis.config import Config, data_path
from clis.data.annotations import Annotations
from clis.data.images import read_image
from clis.data.streams import read_annotations
from clis.engine.evaluate import load_validation
from clis.engine.run_folder import RunFolder
from clis.metric.analysis import ap_by_image_count
from clis.metric.detections import Detections
from clis.metric.lvis_eval import accumulate
from clis.metric.matching import match
from clis.progress import say

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise ValueError('matplotlib is not installed: pip install -e ".[report]"') from None

GROUPS = {"AP": "all", "APr": "rare", "APc": "common", "APf": "frequent"}
SMOOTHED = 20
"""Records of metrics.jsonl that a point of a curve is the mean of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis plot`."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--out", type=Path, default=Path("runs/plots"), metavar="FOLDER")
    parser.add_argument("--images", type=int, default=6, help="validation images with boxes")
    parser.add_argument("--score", type=float, default=0.3, help="minimum score of boxes to draw")


def run(arguments: argparse.Namespace) -> None:
    """Draw the figures of finished runs as PNG files in one folder."""
    plot(arguments.folders, arguments.out, images=arguments.images, score=arguments.score)


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder has for the figures."""

    name: str
    config: Config
    records: list[dict[str, float | None]]
    figures: dict[str, float]
    detections: Detections

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """Read a finished run.

        Raises:
            FileNotFoundError: the run does not exist or is not finished.
        """
        run = RunFolder(folder)
        for path in (run.config, run.metrics, run.result, run.detections):
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file; name folders of finished runs")
        return cls(
            name=str(folder),
            config=run.read_config(),
            records=run.read_metrics(),
            figures=run.read_result(),
            detections=Detections.load(run.detections),
        )


def plot(folders: Sequence[Path], out: Path, *, images: int, score: float) -> list[Path]:
    """Write four PNG files of the runs, which must be of one data set, and return their paths.

    Args:
        images: validation images that are shown, those with the rarest classes.
        score: detections below it are not drawn.

    Raises:
        FileNotFoundError, ValueError: a run is not finished, or they are of different data sets.
    """
    runs = [FinishedRun.read(folder) for folder in folders]
    annotations = _validation(runs)
    figures = {
        "curves.png": training_curves(runs),
        "frequency.png": frequency_bars(runs),
        "image_count.png": ap_against_images(runs, annotations),
        "images.png": boxes_on_images(runs, annotations, images, score),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=130, bbox_inches="tight")
        say(str(out / name))
    return [out / name for name in figures]


def training_curves(runs: Sequence[FinishedRun]) -> Figure:
    """Draw the smoothed total loss over the steps; below it the AP of evaluations during training, if any."""
    evaluated = any("AP" in record for run in runs for record in run.records)
    figure, axes = _subplots(1 + evaluated, 1, (7, 3.2))
    for run in runs:
        losses = [r for r in run.records if r.get("loss") is not None]
        values = np.array([r["loss"] for r in losses])
        width = min(SMOOTHED, len(values))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes[0, 0].plot([r["step"] for r in losses][width - 1 :], smooth, label=run.name)
        if evaluated:
            points = [r for r in run.records if "AP" in r]
            last = (run.config.train.steps, run.figures["AP"])
            steps, aps = zip(*[(r["step"], r["AP"]) for r in points], last)
            axes[1, 0].plot(steps, 100 * np.array(aps), marker="o", label=run.name)
            axes[1, 0].set(xlabel="step", ylabel="AP")
    axes[0, 0].set(xlabel="step", ylabel="total loss")
    axes[0, 0].legend(fontsize=8)
    return figure


def frequency_bars(runs: Sequence[FinishedRun]) -> Figure:
    """Draw AP of all, rare, common and frequent classes, one bar per run; undefined ones are left out."""
    figure, axes = _subplots(1, 1, (7, 3.2))
    ax, width = axes[0, 0], 0.8 / len(runs)
    for number, run in enumerate(runs):
        values = [100 * run.figures[name] if run.figures[name] >= 0 else math.nan for name in GROUPS]
        bars = ax.bar(np.arange(len(GROUPS)) + number * width, values, width, label=run.name)
        ax.bar_label(bars, fmt="%.1f", fontsize=7)
    ax.set_xticks(np.arange(len(GROUPS)) + 0.4 - width / 2, GROUPS.values())
    ax.set_ylabel("AP")
    ax.legend(fontsize=8)
    return figure


def ap_against_images(runs: Sequence[FinishedRun], annotations: Annotations) -> Figure:
    """Draw AP of every class over its number of training images, and the means of `ap_by_image_count`."""
    figure, axes = _subplots(1, 1, (7, 3.6))
    ax = axes[0, 0]
    counts = np.array([category.image_count for category in annotations.categories])
    for run in runs:
        curves = accumulate(match(annotations, run.detections, run.config.test.detections))
        class_ap = curves.class_ap()
        defined = class_ap >= 0
        points = ax.scatter(counts[defined].clip(min=1), 100 * class_ap[defined], s=8, alpha=0.35)
        bins = [row for row in ap_by_image_count(curves, annotations.categories) if row[3] >= 0]
        centers = [math.sqrt(max(first, 1) * max(last, 1)) for first, last, _, _ in bins]
        color = points.get_facecolor()[0, :3]
        ax.plot(centers, [100 * row[3] for row in bins], marker="o", color=color, label=run.name)
    ax.set(xscale="log", xlabel="training images of the class", ylabel="AP")
    ax.legend(fontsize=8)
    return figure


def boxes_on_images(
    runs: Sequence[FinishedRun], annotations: Annotations, images: int, score: float
) -> Figure:
    """Draw one row per image: the ground truth, then each run's detections of at least this score."""
    rows = rarest_images(annotations, images)
    figure, axes = _subplots(len(rows), 1 + len(runs), (3.2, 3.2))
    label_of = {category.id: label for label, category in enumerate(annotations.categories)}
    for row, line in zip(rows, axes):
        image_id = annotations.image_ids[row]
        file = data_path(runs[0].config, runs[0].config.data.val_images) / str(annotations.file_names[row])
        pixels = read_image(file).permute(1, 2, 0).numpy()
        _draw(line[0], pixels, annotations.boxes_of(row), annotations.labels_of(row), None, annotations)
        line[0].set_title(f"image {image_id}: ground truth", fontsize=7)
        for run, ax in zip(runs, line[1:]):
            found = run.detections
            own = np.flatnonzero((found.image_id == image_id) & (found.score >= score))
            boxes = found.bbox[own].copy()
            boxes[:, 2:] += boxes[:, :2]
            labels = np.array([label_of[id_] for id_ in found.category_id[own].tolist()], dtype=np.int64)
            _draw(ax, pixels, boxes, labels, found.score[own], annotations)
            ax.set_title(run.name, fontsize=7)
    return figure


def study_figure(rows: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Draw from the rows of a ``study.json`` AP by frequency, and the gain over the first row by images.

    Bars and lines are means over the seeds; whiskers and bands are a standard deviation to both sides. A gain
    is that of runs with the same seed, where both rows have it.
    """
    figure, axes = _subplots(1, 2, (7, 4))
    bars, gains = axes[0]
    shown = {name: row["runs"] for name, row in rows.items() if row["runs"]}
    first, width = next(iter(shown), ""), 0.8 / max(len(shown), 1)
    for number, (name, runs) in enumerate(shown.items()):
        color = matplotlib.colormaps["tab20"](number % 20)
        values = np.array([[run[group] for group in GROUPS] for run in runs.values()], dtype=float)
        values[values < 0] = math.nan
        places = np.arange(len(GROUPS)) + number * width
        bars.bar(places, values.mean(axis=0), width, yerr=_spread(values), capsize=2, label=name, color=color)
        if number > 0:
            _draw_gain(gains, runs, shown[first], color)
    bars.set_xticks(np.arange(len(GROUPS)) + 0.4 - width / 2, GROUPS.values())
    bars.set(ylabel="AP", title=title)
    gains.axhline(0, color="black", lw=0.6)
    gains.set(xscale="log", xlabel="training images of the class", ylabel=f"AP above: {first}")
    figure.legend(*bars.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _draw_gain(ax: Axes, runs: Mapping[str, Any], first: Mapping[str, Any], color: tuple[float, ...]) -> None:
    """Draw how far the runs are above those of the same seeds in the first row."""
    seeds = [seed for seed in runs if seed in first]
    if not seeds:
        return
    bins = [name for name in runs[seeds[0]]["by_images"] if name in first[seeds[0]]["by_images"]]
    gains = np.array(
        [[runs[seed]["by_images"][name] - first[seed]["by_images"][name] for name in bins] for seed in seeds]
    )
    ends = [[max(int(end), 1) for end in name.split("-")] for name in bins]
    centers, mean, spread = [math.sqrt(low * high) for low, high in ends], gains.mean(axis=0), _spread(gains)
    ax.plot(centers, mean, marker="o", color=color)
    if spread is not None:
        ax.fill_between(centers, mean - spread, mean + spread, color=color, alpha=0.15)


def _spread(values: np.ndarray) -> np.ndarray | None:
    """Return the standard deviation over the rows, if there is more than one."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else None


def rarest_images(annotations: Annotations, images: int) -> list[int]:
    """Return rows of images that hold the classes with the fewest training images, one for each class."""
    counts = np.array([category.image_count for category in annotations.categories])
    chosen: list[int] = []
    holders = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    for label in np.argsort(counts, kind="stable"):
        own = [row for row in holders[annotations.labels == label].tolist() if row not in chosen]
        chosen += own[:1]
        if len(chosen) == images:
            break
    return chosen


def _draw(
    ax: Axes,
    pixels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    annotations: Annotations,
) -> None:
    """Draw an image with its boxes, one color per class in all of them."""
    ax.imshow(pixels)
    colors = matplotlib.colormaps["tab20"]
    for place, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.tolist(), labels.tolist())):
        color = colors(label % 20)
        ax.add_patch(matplotlib.patches.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=color, lw=1.2))
        text = annotations.categories[label].name
        text += "" if scores is None else f" {scores[place]:.2f}"
        ax.text(x1, y1, text, fontsize=5, color="white", va="bottom",
                bbox={"facecolor": color, "edgecolor": "none", "pad": 0.6})  # fmt: skip
    ax.set_axis_off()


def _validation(runs: Sequence[FinishedRun]) -> Annotations:
    """Read the validation split, with the counts of the training split of the first run."""
    first = runs[0].config
    for run in runs[1:]:
        other = {key: getattr(run.config.data, key) for key in ("root", "train", "val")}
        if other != {key: getattr(first.data, key) for key in other}:
            raise ValueError(f"{run.name} is of other data than {runs[0].name}; plot them apart")
    train = read_annotations(data_path(first, first.data.train))
    return load_validation(first, train.categories)


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """Make a figure without a screen, and its axes [rows, columns], each of this size in inches."""
    figure = Figure(figsize=(size[0] * columns, size[1] * max(rows, 1)), layout="constrained")
    return figure, figure.subplots(max(rows, 1), columns, squeeze=False)
