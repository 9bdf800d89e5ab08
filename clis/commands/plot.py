"""Figures of runs and studies (the extra ``[report]``): curves, AP by frequency and by images, boxes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clis.atomic import check_writable
from clis.commands.arguments import non_negative, read_names, split_overrides
from clis.config import Config, data_path
from clis.data.annotated_images import read_annotated
from clis.data.annotations import Annotations
from clis.data.streams import read_annotations
from clis.engine.evaluate import load_validation
from clis.engine.run_folder import RunFolder
from clis.engine.run_state import RunState, check_same_data
from clis.figures import (
    FORMATS,
    METRIC_GROUPS,
    Axes,
    Figure,
    defined,
    dot_plot,
    log_scale,
    look,
    matplotlib,
    save,
    subplots,
)
from clis.metric.analysis import ap_by_image_count, find_errors, merge_small_bins
from clis.metric.detections import Detections
from clis.metric.lvis_eval import accumulate
from clis.metric.matching import match
from clis.metric.verdicts import Verdicts, verdicts_of
from clis.progress import Progress, say
from clis.report.curves import smoothed
from clis.study.figure import study_figure
from clis.study.record import read_record
from clis.text import printable

RUN_FIGURES = ("curves", "frequency", "image_count", "images")
"""Names of the figures of runs."""
LOOKS = {
    "right": ("#009E73", "-"),
    "wrong class": ("#E69F00", "--"),
    "box off": ("#CC79A7", (0, (1, 1))),
    "duplicate": ("#56B4E9", (0, (6, 1.5, 1, 1.5, 1, 1.5))),
    "nothing there": ("#D55E00", ":"),
    "not judged": ("0.6", "-"),
    "missed": ("#0072B2", "-."),
}
"""Color and line style of a box, in the order of `clis.metric.verdicts.VERDICTS`; then of missed objects."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis plot`."""
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER",
        help="run folders, or folders of studies; key=value changes the runs' configs, e.g. "
        "data.root=/datasets if the data have moved",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("runs/plots"), metavar="FOLDER",
        help="folder for the figures (default runs/plots)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=FORMATS, default="png", help="default png; pdf and svg for papers"
    )
    parser.add_argument(
        "--names", nargs="+", default=(), metavar="A=B",
        help="call the run folder, or a study's row, A by the name B; runs of one name are drawn together",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", default=(), metavar="NAME", help="only these rows of a study")
    parser.add_argument(
        "--images", type=non_negative, default=6, metavar="N", help="validation images with boxes (default 6)"
    )
    parser.add_argument(
        "--score", type=float, default=0.3, metavar="S", help="minimum score of boxes to draw (default 0.3)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Draw the figures of runs, and one of each study, as files in one folder.

    Raises:
        OSError, ValueError: an argument is wrong; see `plot`.
    """
    if not 0 <= arguments.score <= 1:
        raise ValueError(f"--score {arguments.score:g}: must be between 0 and 1")
    named, overrides = split_overrides(arguments.folders, "folder")
    folders = [Path(each) for each in named]
    studies = {
        folder: read_record(folder / "study.json") for folder in folders if (folder / "study.json").is_file()
    }
    runs = [folder for folder in folders if folder not in studies]
    taken = dict.fromkeys(RUN_FIGURES if runs else (), "the runs")
    for folder in studies:
        if (other := taken.setdefault(folder.resolve().name, str(folder))) != str(folder):
            raise ValueError(
                f"{folder} and {other}: figures of studies are named after the last part; plot them apart"
            )
    rows = dict.fromkeys(row for document in studies.values() for row in document["rows"])
    names = read_names(arguments.names, [*map(str, runs), *rows])
    if arguments.rows and not studies:
        raise ValueError("--rows chooses rows of studies, and no folder with a study.json is named")
    chosen = {
        folder: _chosen(document, arguments.rows, names, str(folder)) for folder, document in studies.items()
    }
    check_writable(arguments.out / f"curves.{arguments.format}")  # before minutes of work
    for folder, document in chosen.items():
        path = arguments.out / f"{folder.resolve().name}.{arguments.format}"
        save(study_figure(document, folder.resolve().name), path)
        say(str(path))
    if runs:
        plot(
            runs, arguments.out, images=arguments.images, score=arguments.score, names=names,
            suffix=arguments.format, overrides=overrides,
        )  # fmt: skip


def _chosen(
    document: dict[str, Any], rows: Sequence[str], names: Mapping[str, str], source: str
) -> dict[str, Any]:
    """Return a study.json with the chosen rows under their new names."""
    if unknown := [name for name in rows if name not in document["rows"]]:
        known = ", ".join(map(repr, document["rows"]))
        raise ValueError(f"{source} has no row {unknown[0]!r}; it has {known}")
    chosen: dict[str, Any] = {}
    for name in rows or document["rows"]:
        new = names.get(name, name)
        if new in chosen:
            raise ValueError(f"{source}: two rows would be called {new!r}; give each a name of its own")
        chosen[new] = document["rows"][name]
    return document | {"rows": chosen}


@dataclass(frozen=True)
class PlottedRun:
    """What a run folder has for the figures."""

    name: str
    state: RunState
    detections: Detections | None
    """Those of the last evaluation; None before the first."""

    @classmethod
    def read(cls, path: Path, name: str | None = None, overrides: Sequence[str] = ()) -> PlottedRun:
        """Read a run, finished or not; what an unfinished one lacks is printed.

        Args:
            overrides: ``key=value`` for its config, e.g. where the data are now.

        Raises:
            FileNotFoundError: no run has begun there, or its detections are gone.
        """
        state = RunState.read(RunFolder(path), overrides)
        if missing := state.what_is_missing():
            say(f"{path}: {missing}")
        found = state.evaluated
        if found is not None and not found.detections.exists():
            raise FileNotFoundError(f"{found.detections}: no such file; evaluate the checkpoint again")
        detections = None if found is None else Detections.load(found.detections)
        return cls(printable(name or str(path)), state, detections)

    @property
    def config(self) -> Config:
        """The config of the run."""
        return self.state.config


def plot(
    folders: Sequence[Path],
    out: Path,
    *,
    images: int,
    score: float,
    names: Mapping[str, str] | None = None,
    suffix: str = "png",
    overrides: Sequence[str] = (),
) -> list[Path]:
    """Write four figures of the runs, which must be of one data set, and return their paths.

    Before its first evaluation a run is in the curves alone; without any other run these are all.

    Args:
        images: validation images that are shown, those with the rarest classes; 0 draws no such figure.
        score: detections below it are not drawn.
        names: other names of runs, by their folders.
        suffix: the format, one of `FORMATS`.
        overrides: ``key=value`` for the configs of all runs, e.g. where the data are now.

    Raises:
        FileNotFoundError, ValueError: a run does not exist, or they are of different data sets.
    """
    runs = [PlottedRun.read(folder, (names or {}).get(str(folder)), overrides) for folder in folders]
    check_same_data([run.state for run in runs], "plot them apart")
    figures = {"curves": training_curves(runs)}
    evaluated = [run for run in runs if run.detections is not None]
    if evaluated:
        annotations = _validation(evaluated[0].config)
        figures |= {
            "frequency": frequency_dots(evaluated),
            "image_count": ap_against_images(evaluated, annotations),
        }
        if images:
            figures["images"] = boxes_on_images(evaluated, annotations, images, score)
    paths = [out / f"{name}.{suffix}" for name in figures]
    with Progress("figures", len(paths)) as progress:
        for path, figure in zip(paths, figures.values()):
            save(figure, path)
            progress.advance()
    for path in paths:
        say(str(path))
    return paths


def training_curves(runs: Sequence[PlottedRun]) -> Figure:
    """Draw the total loss over the steps, raw and smoothed; below it AP, if a run has several evaluations."""
    evaluated = any(len(run.state.every_evaluation) > 1 for run in runs)  # one alone is no curve
    figure, axes = subplots(1 + evaluated, 1, (7, 3.2), sharex=True)
    numbers = _numbers(runs)
    handles: dict[str, matplotlib.lines.Line2D] = {}
    for run in runs:
        kind = look(numbers[run.name])
        losses = [r for r in run.state.records if r.get("loss") is not None]
        steps, values = [r["step"] for r in losses], np.array([r["loss"] for r in losses], dtype=float)
        axes[0, 0].plot(steps, values, color=kind["color"], lw=0.6, alpha=0.3)
        (line,) = axes[0, 0].plot(steps, smoothed(values), color=kind["color"], ls=kind["linestyle"])
        handles.setdefault(run.name, line)
        if evaluated and run.state.metrics is not None:
            points, metrics = zip(*run.state.every_evaluation)
            axes[1, 0].plot(points, [100 * defined(each, "AP") for each in metrics], ms=5, **kind)
    axes[0, 0].set(ylabel="total loss")
    axes[-1, 0].set(xlabel="step")
    axes[-1, 0].set_xlim(left=0)
    if evaluated:
        axes[1, 0].set(ylabel="AP")
    axes[0, 0].legend([*handles.values()], [*handles], fontsize=8)
    return figure


def frequency_dots(runs: Sequence[PlottedRun]) -> Figure:
    """Draw AP of all, rare, common and frequent classes, a line per name (see `dot_plot`)."""
    rows: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        assert run.state.metrics is not None
        _, metrics = run.state.metrics
        rows.setdefault(run.name, []).append({key: 100 * defined(metrics, key) for key in METRIC_GROUPS})
    return dot_plot(rows)


def ap_against_images(runs: Sequence[PlottedRun], annotations: Annotations) -> Figure:
    """Draw AP of every class over its number of training images, and means of bins of at least 3 classes."""
    figure, axes = subplots(1, 1, (7, 3.6))
    ax, numbers = axes[0, 0], _numbers(runs)
    handles: dict[str, matplotlib.lines.Line2D] = {}
    counts = np.array([category.image_count for category in annotations.categories])
    for run in runs:
        assert run.detections is not None
        kind = look(numbers[run.name])
        curves = accumulate(match(annotations, run.detections, run.config.test.detections))
        class_ap = curves.class_ap()
        rated = class_ap >= 0
        ax.scatter(
            counts[rated].clip(min=1), 100 * class_ap[rated], s=9, alpha=0.35, color=kind["color"],
            marker=kind["marker"], lw=0,
        )  # fmt: skip
        bins = merge_small_bins(ap_by_image_count(curves, annotations.categories))
        centers = [math.sqrt(max(first, 1) * max(last, 1)) for first, last, _, _ in bins]
        (line,) = ax.plot(centers, [100 * ap for *_, ap in bins], ms=5, **kind)
        if not handles:
            for center, (first, last, classes, _) in zip(centers, bins):
                ax.annotate(
                    f"{first}-{last}\nn={classes}", (center, 1.01), xycoords=("data", "axes fraction"),
                    ha="center", fontsize=6,
                )  # fmt: skip
        handles.setdefault(run.name, line)
    log_scale(ax)
    ax.set(xlabel="training images of the class; above: bins of the lines, n classes", ylabel="AP")
    ax.legend([*handles.values()], [*handles], fontsize=8)
    return figure


def boxes_on_images(
    runs: Sequence[PlottedRun], annotations: Annotations, images: int, score: float
) -> Figure:
    """Draw one row per image: the ground truth, then each run's detections of at least this score.

    Colors and line styles are verdicts (`LOOKS`), not classes: those of `clis report`, at this score.
    """
    rows = rarest_images(annotations, images)
    width = 3.2
    sizes = annotations.image_sizes[rows].astype(float)
    heights = width * sizes[:, 0] / sizes[:, 1] + 0.25
    figure = Figure(figsize=(width * (1 + len(runs)), heights.sum() + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), 1 + len(runs), squeeze=False, height_ratios=heights)
    name_of = {category.id: category.name for category in annotations.categories}
    judged = [_verdicts(run, annotations) for run in runs]
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
        of_image = slice(annotations.offsets[row], annotations.offsets[row + 1])
        for run, verdicts, ax in zip(runs, judged, line[1:]):
            assert run.detections is not None
            found = run.detections
            own = np.flatnonzero((found.image_id == image_id) & (found.score >= score))
            own = own[np.argsort(-found.score[own], kind="stable")]
            boxes = found.bbox[own].copy()
            boxes[:, 2:] += boxes[:, :2]
            missed = verdicts.missed(score)[of_image]
            kinds = [[*LOOKS][verdict] for verdict in verdicts.verdicts[own].tolist()]
            texts = [
                f"{name_of.get(found.category_id[place], '?')} {found.score[place]:.2f}"
                for place in own.tolist()
            ]
            texts = [name for name, gone in zip(names, missed) if gone] + texts[::-1]  # the best on top
            kinds = ["missed"] * int(missed.sum()) + kinds[::-1]
            _draw(ax, pixels, np.concatenate([truth[missed], boxes[::-1]]), texts, kinds)
            ax.set_title(run.name, fontsize=7)
    handles = [
        matplotlib.lines.Line2D([], [], color=color, ls=style, label=name)
        for name, (color, style) in LOOKS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7)
    return figure


def _verdicts(run: PlottedRun, annotations: Annotations) -> Verdicts:
    assert run.detections is not None
    matches = match(annotations, run.detections, run.config.test.detections)
    return verdicts_of(
        annotations, run.detections, matches, find_errors(annotations, run.detections, matches)
    )


def rarest_images(annotations: Annotations, images: int) -> list[int]:
    """Return rows of images that hold the classes with the fewest training images, one for each class."""
    counts = np.array([category.image_count for category in annotations.categories])
    chosen: list[int] = []
    holders = annotations.rows_of_boxes
    for label in np.argsort(counts, kind="stable"):
        if len(chosen) == images:
            break
        own = [row for row in holders[annotations.labels == label].tolist() if row not in chosen]
        chosen += own[:1]
    return chosen


def _draw(
    ax: Axes, pixels: np.ndarray, boxes: np.ndarray, texts: Sequence[str], kinds: Sequence[str]
) -> None:
    """Draw an image with its boxes, each in the color and style of its verdict, or in that color."""
    ax.imshow(pixels)
    for (x1, y1, x2, y2), text, kind in zip(boxes.tolist(), texts, kinds):
        color, style = LOOKS.get(kind, (kind, "-"))
        ax.add_patch(
            matplotlib.patches.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=color, ls=style, lw=1.3)
        )
        room = y1 >= 0.05 * len(pixels)  # above the box
        ax.text(x1, y1, text, fontsize=5, color="white", va="bottom" if room else "top", clip_on=True,
                bbox={"facecolor": color, "edgecolor": "none", "pad": 0.6})  # fmt: skip
    ax.set_axis_off()


def _validation(config: Config) -> Annotations:
    """Read the validation split, with the counts of the training split."""
    train = read_annotations(data_path(config, config.data.train))
    return load_validation(config, train.categories, train.path)


def _numbers(runs: Sequence[PlottedRun]) -> dict[str, int]:
    """Return the number of each name in the order of the runs, for its look."""
    return {name: number for number, name in enumerate(dict.fromkeys(run.name for run in runs))}
