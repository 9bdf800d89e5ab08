"""Figures of runs and studies (the extra ``[report]``): curves, AP by frequency and by images, boxes."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clis.commands.figures import (
    FORMATS,
    GROUPS,
    Axes,
    Figure,
    dot_plot,
    look,
    matplotlib,
    save,
    subplots,
)
from clis.commands.study_figure import study_figure
from clis.config import Config, data_path
from clis.data.annotations import Annotations
from clis.data.streams import read_annotations
from clis.engine.evaluate import load_validation, read_annotated
from clis.engine.run_folder import RunFolder
from clis.engine.run_state import RunState
from clis.metric.analysis import FOREGROUND_IOU, ap_by_image_count, merge_small_bins
from clis.metric.detections import Detections
from clis.metric.lvis_eval import accumulate
from clis.metric.matching import match
from clis.progress import Progress, say

SMOOTHED = 20
"""The most records of metrics.jsonl that a point of a curve is the mean of."""

VERDICTS = {
    "right": ("#009E73", "-"),
    "wrong class": ("#E69F00", "--"),
    "nothing there": ("#D55E00", ":"),
    "not judged": ("0.6", "-"),
    "missed": ("#0072B2", "-."),
}
"""Color and line style of a box by what it is, at IoU 0.5; the last is of ground truth."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis plot`."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="run folders, or folders of studies"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/plots"), metavar="FOLDER")
    parser.add_argument(
        "--format", choices=FORMATS, default="png", help="default png; pdf and svg for papers"
    )
    parser.add_argument(
        "--names", nargs="+", default=(), metavar="A=B",
        help="call the run folder, or a study's row, A by the name B; runs of one name are drawn together",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", default=(), metavar="NAME", help="only these rows of a study")
    parser.add_argument("--images", type=int, default=6, help="validation images with boxes")
    parser.add_argument("--score", type=float, default=0.3, help="minimum score of boxes to draw")


def run(arguments: argparse.Namespace) -> None:
    """Draw the figures of runs, and one of each study, as files in one folder."""
    names = _names(arguments.names)
    studies = [folder for folder in arguments.folders if (folder / "study.json").is_file()]
    runs = [folder for folder in arguments.folders if folder not in studies]
    known = {str(folder) for folder in runs}
    if arguments.rows and not studies:
        raise ValueError("--rows chooses rows of studies, and no folder with a study.json is named")
    for folder in studies:
        document = json.loads((folder / "study.json").read_text())
        known |= set(document["rows"])
        document = _chosen(document, arguments.rows, names, str(folder))
        path = arguments.out / f"{folder.resolve().name}.{arguments.format}"
        save(study_figure(document, folder.resolve().name), path)
        say(str(path))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--names {unknown[0]}=...: no such run folder or row; there are {sorted(known)}")
    if runs:
        plot(
            runs, arguments.out, images=arguments.images, score=arguments.score, names=names,
            suffix=arguments.format,
        )  # fmt: skip


def _names(pairs: Sequence[str]) -> dict[str, str]:
    """Read A=B into new names by old ones."""
    names = {}
    for pair in pairs:
        old, _, new = pair.rpartition("=")
        if not (old and new):
            raise ValueError(f"--names {pair}: write it as FOLDER=NAME or ROW=NAME")
        names[old.rstrip("/")] = new
    return names


def _chosen(
    document: dict[str, Any], rows: Sequence[str], names: Mapping[str, str], source: str
) -> dict[str, Any]:
    """Return a study.json with the chosen rows under their new names."""
    if unknown := [name for name in rows if name not in document["rows"]]:
        raise ValueError(f"{source} has no row {unknown[0]}; it has {', '.join(document['rows'])}")
    chosen = {name: document["rows"][name] for name in rows or document["rows"]}
    return document | {"rows": {names.get(name, name): row for name, row in chosen.items()}}


@dataclass(frozen=True)
class PlottedRun:
    """What a run folder has for the figures."""

    name: str
    config: Config
    records: list[dict[str, float | None]]
    evaluations: list[tuple[int, dict[str, float]]]
    """Steps and metrics, with those of the finished run at the end."""
    detections: Detections | None
    """Those of the last evaluation; None before the first."""

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> PlottedRun:
        """Read a run, finished or not; what an unfinished one lacks is printed.

        Raises:
            FileNotFoundError: no run has begun there, or its detections are gone.
        """
        folder = RunFolder(path)
        state = RunState.read(folder)
        if missing := state.what_is_missing():
            say(missing)
        found = folder
        if state.result is None and state.evaluations:
            found = folder.evaluation(state.evaluations[-1][0])
        evaluated = state.metrics is not None
        if evaluated and not found.detections.exists():
            raise FileNotFoundError(f"{found.detections}: no such file; evaluate the checkpoint again")
        evaluations = state.evaluations + ([] if state.result is None else [(state.steps, state.result)])
        detections = Detections.load(found.detections) if evaluated else None
        return cls(name or str(path), state.config, state.records, evaluations, detections)

    @property
    def figures(self) -> dict[str, float]:
        """The metrics of the last evaluation, empty before the first."""
        return self.evaluations[-1][1] if self.evaluations else {}


def plot(
    folders: Sequence[Path],
    out: Path,
    *,
    images: int,
    score: float,
    names: Mapping[str, str] | None = None,
    suffix: str = "png",
) -> list[Path]:
    """Write four figures of the runs, which must be of one data set, and return their paths.

    Before its first evaluation a run is in the curves alone; without any other run these are all.

    Args:
        images: validation images that are shown, those with the rarest classes.
        score: detections below it are not drawn.
        names: other names of runs, by their folders.
        suffix: the format, one of `FORMATS`.

    Raises:
        FileNotFoundError, ValueError: a run does not exist, or they are of different data sets.
    """
    runs = [PlottedRun.read(folder, (names or {}).get(str(folder))) for folder in folders]
    _check_same_data(runs)
    figures = {"curves": training_curves(runs)}
    evaluated = [run for run in runs if run.detections is not None]
    if evaluated:
        annotations = _validation(evaluated[0].config)
        figures |= {
            "frequency": frequency_dots(evaluated),
            "image_count": ap_against_images(evaluated, annotations),
            "images": boxes_on_images(evaluated, annotations, images, score),
        }
    paths = [out / f"{name}.{suffix}" for name in figures]
    with Progress("figures", len(paths)) as progress:
        for path, figure in zip(paths, figures.values()):
            save(figure, path)
            progress.advance()
    for path in paths:
        say(str(path))
    return paths


def training_curves(runs: Sequence[PlottedRun]) -> Figure:
    """Draw the total loss over the steps, raw and smoothed; below it the AP of the evaluations, if any."""
    evaluated = any(run.evaluations for run in runs)
    figure, axes = subplots(1 + evaluated, 1, (7, 3.2), sharex=True)
    numbers = _numbers(runs)
    for run in runs:
        kind, label = look(numbers[run.name]), _label_once(axes[0, 0], run.name)
        losses = [r for r in run.records if r.get("loss") is not None]
        steps, values = [r["step"] for r in losses], np.array([r["loss"] for r in losses], dtype=float)
        axes[0, 0].plot(steps, values, color=kind["color"], lw=0.6, alpha=0.3)
        axes[0, 0].plot(
            steps, running_mean(values, SMOOTHED), color=kind["color"], ls=kind["linestyle"], label=label
        )
        if run.evaluations:
            points, metrics = zip(*run.evaluations)
            axes[1, 0].plot(points, [100 * each["AP"] for each in metrics], ms=5, **kind)
    axes[0, 0].set(ylabel="total loss")
    axes[-1, 0].set(xlabel="step")
    axes[-1, 0].set_xlim(left=0)
    if evaluated:
        axes[1, 0].set(ylabel="AP")
    axes[0, 0].legend(fontsize=8)
    return figure


def running_mean(values: np.ndarray, most: int) -> np.ndarray:
    """Return the mean of each value and up to `most` - 1 before it, float64 [n]: from the first value on.

    The window is at most a tenth of the values, so that a short run is not one flat line.
    """
    width = max(1, min(most, len(values) // 10))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def frequency_dots(runs: Sequence[PlottedRun]) -> Figure:
    """Draw AP of all, rare, common and frequent classes, a line per name (see `dot_plot`)."""
    rows: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        rows.setdefault(run.name, []).append(
            {key: 100 * run.figures[key] if run.figures[key] >= 0 else -1.0 for key in GROUPS}
        )
    return dot_plot(rows)


def ap_against_images(runs: Sequence[PlottedRun], annotations: Annotations) -> Figure:
    """Draw AP of every class over its number of training images, and means of bins of at least 3 classes."""
    figure, axes = subplots(1, 1, (7, 3.6))
    ax, numbers, counted = axes[0, 0], _numbers(runs), False
    counts = np.array([category.image_count for category in annotations.categories])
    for run in runs:
        assert run.detections is not None
        kind = look(numbers[run.name])
        curves = accumulate(match(annotations, run.detections, run.config.test.detections))
        class_ap = curves.class_ap()
        defined = class_ap >= 0
        ax.scatter(
            counts[defined].clip(min=1), 100 * class_ap[defined], s=9, alpha=0.35, color=kind["color"],
            marker=kind["marker"], lw=0,
        )  # fmt: skip
        bins = merge_small_bins(ap_by_image_count(curves, annotations.categories))
        centers = [math.sqrt(max(first, 1) * max(last, 1)) for first, last, _, _ in bins]
        label = _label_once(ax, run.name)
        ax.plot(centers, [100 * ap for *_, ap in bins], ms=5, label=label, **kind)
        if not counted:
            for center, (first, last, classes, _) in zip(centers, bins):
                ax.annotate(
                    f"{first}-{last}\nn={classes}", (center, 1.01), xycoords=("data", "axes fraction"),
                    ha="center", fontsize=6,
                )  # fmt: skip
            counted = True
    ax.set(
        xscale="log", xlabel="training images of the class; above: bins of the lines, n classes", ylabel="AP"
    )
    ax.legend(fontsize=8)
    return figure


def boxes_on_images(
    runs: Sequence[PlottedRun], annotations: Annotations, images: int, score: float
) -> Figure:
    """Draw one row per image: the ground truth, then each run's detections of at least this score.

    Colors and line styles are verdicts (`VERDICTS`), not classes.
    """
    rows = rarest_images(annotations, images)
    width = 3.2
    sizes = annotations.image_sizes[rows].astype(float)
    heights = width * sizes[:, 0] / sizes[:, 1] + 0.25
    figure = Figure(figsize=(width * (1 + len(runs)), heights.sum() + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), 1 + len(runs), squeeze=False, height_ratios=heights)
    label_of = {category.id: label for label, category in enumerate(annotations.categories)}
    folder = data_path(runs[0].config, runs[0].config.data.val_images)
    for row, line in zip(rows, axes):
        image_id = annotations.image_ids[row]
        pixels = (
            read_annotated(annotations, folder, row, runs[0].config.data.max_pixels).permute(1, 2, 0).numpy()
        )
        truth, labels = annotations.boxes_of(row), annotations.labels_of(row)
        names = [annotations.categories[label].name for label in labels.tolist()]
        _draw(line[0], pixels, truth, names, ["black"] * len(names))
        line[0].set_title(f"image {image_id}: ground truth", fontsize=7)
        for run, ax in zip(runs, line[1:]):
            assert run.detections is not None
            found = run.detections
            own = np.flatnonzero((found.image_id == image_id) & (found.score >= score))
            own = own[np.argsort(-found.score[own], kind="stable")]
            boxes = found.bbox[own].copy()
            boxes[:, 2:] += boxes[:, :2]
            own_labels = np.array([label_of[id_] for id_ in found.category_id[own].tolist()], dtype=np.int64)
            kinds, missed = verdicts(annotations, row, boxes, own_labels)
            texts = [
                f"{annotations.categories[label].name} {found.score[place]:.2f}"
                for label, place in zip(own_labels.tolist(), own)
            ]
            texts = [name for name, gone in zip(names, missed) if gone] + texts[::-1]  # the best on top
            kinds = ["missed"] * int(missed.sum()) + kinds[::-1]
            _draw(ax, pixels, np.concatenate([truth[missed], boxes[::-1]]), texts, kinds)
            ax.set_title(run.name, fontsize=7)
    handles = [
        matplotlib.lines.Line2D([], [], color=color, ls=style, label=name)
        for name, (color, style) in VERDICTS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7)
    return figure


def verdicts(
    annotations: Annotations, image: int, boxes: np.ndarray, labels: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """Judge the boxes of an image against its ground truth at IoU 0.5.

    A box is right if it is the first to take a ground truth of its class, of the wrong class if one of
    another class is there; else nothing is there for it. Where the annotations do not say whether its class
    is in the image, it is not judged.

    Args:
        boxes: float [n,4] xyxy, best first.
        labels: integer [n].

    Returns:
        A key of `VERDICTS` for each box, and which ground truths were missed, bool [G].
    """
    truth, truth_labels = annotations.boxes_of(image), annotations.labels_of(image)
    iou, taken = _iou(boxes, truth), np.zeros(len(truth), dtype=bool)
    kinds = []
    for overlaps, label in zip(iou, labels.tolist()):
        fits = overlaps >= FOREGROUND_IOU
        own = np.where(fits & (truth_labels == label) & ~taken, overlaps, 0)
        if own.any():
            taken[own.argmax()] = True
            kinds.append("right")
        elif not _is_judged(annotations, image, label):
            kinds.append("not judged")
        else:
            kinds.append("wrong class" if (fits & (truth_labels != label)).any() else "nothing there")
    return kinds, ~taken


def _is_judged(annotations: Annotations, image: int, label: int) -> bool:
    """Return whether a false detection of this class counts in this image."""
    if not annotations.federated:
        return True

    def listed(pair: tuple[np.ndarray, np.ndarray]) -> bool:
        offsets, labels = pair
        return label in labels[offsets[image] : offsets[image + 1]]

    present = label in annotations.labels_of(image) or listed(annotations.negatives)
    return present and not listed(annotations.not_exhaustive)


def _iou(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the IoU of xyxy boxes [n,4] and [G,4]: float64 [n,G]."""
    a, b = boxes[:, None].astype(float), truth[None].astype(float)
    sides = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(min=0)
    inter = sides.prod(axis=-1)
    areas = [(each[..., 2:] - each[..., :2]).prod(axis=-1) for each in (a, b)]
    return inter / np.maximum(areas[0] + areas[1] - inter, 1e-12)


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
    ax: Axes, pixels: np.ndarray, boxes: np.ndarray, texts: Sequence[str], kinds: Sequence[str]
) -> None:
    """Draw an image with its boxes, each in the color and style of its verdict, or in that color."""
    ax.imshow(pixels)
    for (x1, y1, x2, y2), text, kind in zip(boxes.tolist(), texts, kinds):
        color, style = VERDICTS.get(kind, (kind, "-"))
        ax.add_patch(
            matplotlib.patches.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=color, ls=style, lw=1.3)
        )
        ax.text(x1, y1, text, fontsize=5, color="white", va="bottom", clip_on=True,
                bbox={"facecolor": color, "edgecolor": "none", "pad": 0.6})  # fmt: skip
    ax.set_axis_off()


def _check_same_data(runs: Sequence[PlottedRun]) -> None:
    first = runs[0].config
    for run in runs[1:]:
        other = {key: getattr(run.config.data, key) for key in ("root", "train", "val")}
        if other != {key: getattr(first.data, key) for key in other}:
            raise ValueError(f"{run.name} is of other data than {runs[0].name}; plot them apart")


def _validation(config: Config) -> Annotations:
    """Read the validation split, with the counts of the training split."""
    train = read_annotations(data_path(config, config.data.train))
    return load_validation(config, train.categories)


def _numbers(runs: Sequence[PlottedRun]) -> dict[str, int]:
    """Return the number of each name in the order of the runs, for its look."""
    return {name: number for number, name in enumerate(dict.fromkeys(run.name for run in runs))}


def _label_once(ax: Axes, name: str) -> str | None:
    """Return the name as a label of the legend, unless an earlier line has it."""
    return None if name in ax.get_legend_handles_labels()[1] else name
