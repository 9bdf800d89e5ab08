"""Collects what the runs have and writes it as one HTML file."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clis.atomic import atomic_write
from clis.config import ONLINE_RULES, Config, data_path
from clis.config_files import config_to_dict, flatten
from clis.data.annotations import Annotations
from clis.data.categories import check_same_categories
from clis.data.image_level import ImageLevelIndex, is_index
from clis.data.region_file import load_regions
from clis.data.streams import make_index, read_annotations
from clis.engine.run_folder import regions_file
from clis.engine.run_state import check_same_data
from clis.metric.analysis import ERROR_GROUPS, ERRORS
from clis.metric.matching import IOU_THRESHOLDS
from clis.metric.verdicts import VERDICTS
from clis.pages import check_page, render
from clis.progress import Progress, say
from clis.report.curves import curves_of, evaluations_of
from clis.report.judged import (
    FLOOR,
    STAGES,
    Judged,
    boxes_to_embed,
    class_payload,
    image_payload,
    judge,
    run_payload,
)
from clis.report.packed import NONE, SCORE_UNITS, to_json
from clis.report.pictures import (
    PICTURE_BYTES,
    SCORE,
    class_order,
    read_pictures,
    region_payload,
    worst_images,
)
from clis.report.runs import ReportRun, read_run
from clis.text import printable

HERE = Path(__file__).parent
MAX_BYTES = 30_000_000
"""Size from which on a page is called large."""


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    names: Sequence[str],
    overrides: Sequence[str] = (),
    images: int | None = None,
    regions: int = 90,
) -> None:
    """Write the page of some runs of one data set.

    Args:
        names: of the runs, in the page.
        overrides: ``key=value`` for the configs of all, e.g. where the data are now.
        images: validation images with a picture, of the others the page draws the boxes alone; None is as
            many as `PICTURE_BYTES` hold.
        regions: regions of the image-level stream with a picture.

    Raises:
        FileNotFoundError, ValueError: a folder is no run, or the runs are of different data.
        OSError: the page cannot be written; known before minutes of work.
    """
    paths = [os.path.abspath(folder) for folder in folders]
    if twice := [folder for folder, path in zip(folders, paths) if paths.count(path) > 1]:
        raise ValueError(f"{twice[0]}: is named more than once; name each run once")
    runs = [read_run(folder, name, overrides) for folder, name in zip(folders, names)]
    check_same_data([run.state for run in runs], "make a report for each")
    check_page(out)
    payload = collect(runs, images, regions)
    text = render_page(payload)
    with atomic_write(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    for note in payload["notes"]:
        say(note)
    for run in runs:
        for sentence in run.missing:
            say(f"{run.name}: {sentence}")
    size = out.stat().st_size
    say(f"{out}: {size / 1e6:.1f} MB")
    if size > MAX_BYTES:
        say("so large a page opens slowly; name fewer runs, or fewer --images and --regions")


def render_page(payload: dict[str, Any]) -> str:
    """Fill in the template with the style, the script and the embedded data."""
    title = " / ".join(run["name"] for run in payload["runs"])
    return render(
        "report.html.j2",
        title=title,
        # Not escaped: the contents of style and script elements. `to_json` leaves no "<" in the data.
        style=_Verbatim((HERE / "report.css").read_text(encoding="utf-8")),
        script=_Verbatim((HERE / "report.js").read_text(encoding="utf-8")),
        data=_Verbatim(to_json(payload)),
    )


class _Verbatim(str):
    """A text that Jinja2 puts into the page as it is."""

    def __html__(self) -> str:
        return self


def collect(runs: Sequence[ReportRun], images: int | None, regions: int) -> dict[str, Any]:
    """Return everything that the page shows, in the form that `to_json` writes."""
    annotations, note = _annotations(runs[0])
    notes = [] if note is None else [note]
    payload: dict[str, Any] = {
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "score": SCORE, "floor": FLOOR, "units": SCORE_UNITS, "none": NONE,
        "verdicts": VERDICTS, "errors": ERRORS, "groups": list(ERROR_GROUPS), "iou": float(IOU_THRESHOLDS[0]),
        "runs": [_run_head(run) for run in runs],
    }  # fmt: skip
    if annotations is not None:
        judged = _judge_all(runs, annotations)
        some = [each for each in judged if each is not None]
        index = _image_level(runs, annotations)
        payload["classes"] = class_payload(annotations, None if index is None else index.image_counts)
        if some:
            boxes, payload["boxesOfAnImage"] = boxes_to_embed(some, len(annotations))
            payload["federated"] = annotations.federated
            heads = [head for head, each in zip(payload["runs"], judged) if each is not None]
            for head, each, rows in zip(heads, some, boxes):
                head["judged"] = run_payload(each, annotations, rows)
            payload["images"] = image_payload(annotations, some[0].verdicts.required)
            shown = worst_images(annotations, some, len(annotations) if images is None else images)
            room = PICTURE_BYTES if images is None else None
            config = runs[0].state.config
            folder = data_path(config, config.data.val_images)
            pictures, complaint = read_pictures(annotations, folder, shown, room, config.data.max_pixels)
            payload["images"]["pictures"] = pictures
            notes += complaint
        if index is not None:
            ap = [each.curves.class_ap() for each in some] or [np.zeros(annotations.num_classes)]
            order = class_order(annotations.categories, ap)
            payload["regions"] = _regions(runs, index, annotations, order, regions)
    for head, run in zip(payload["runs"], runs):
        head["missing"] = run.missing
    return payload | {"notes": notes}


def _run_head(run: ReportRun) -> dict[str, Any]:
    """Return what a page has of a run without its data set."""
    state = run.state
    step, metrics = state.metrics or (None, None)
    defaults = flatten(config_to_dict(Config()))
    return {
        "name": run.name,
        "folder": printable(str(state.folder)),
        "finished": state.result is not None,
        "step": state.step if state.result is None else state.steps,
        "steps": state.steps,
        "figures": metrics,
        "evaluatedStep": step if state.result is None else None,
        "paper": state.config.paper.figures or None,
        "record": {key: _text(value) for key, value in flatten(state.source).items()},
        "curves": curves_of(state.records),
        "evaluations": evaluations_of(state.every_evaluation),
        "recipe": {key: _text(value) for key, value in state.recipe.items()},
        "defaults": {key: _text(value) for key, value in defaults.items()},
        "judged": None,
    }


def _text(value: Any) -> str:
    """Return a setting as a config writes it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _annotations(run: ReportRun) -> tuple[Annotations | None, str | None]:
    """Read the validation split with the counts of the training split, or say why that is not possible."""
    config = run.state.config
    try:
        train, val = (
            read_annotations(data_path(config, path)) for path in (config.data.train, config.data.val)
        )
        check_same_categories(train.categories, train.path, val.categories, val.path)
    except (OSError, ValueError) as error:
        return None, f"No classes, errors and pictures: the annotations cannot be read. {_moved(error)}"
    return dataclasses.replace(val, categories=train.categories), None


def _judge_all(runs: Sequence[ReportRun], annotations: Annotations) -> list[Judged | None]:
    judged: list[Judged | None] = []
    with Progress("judge", STAGES * len(runs)) as progress:
        for run in runs:
            detections = run.detections()
            limit = run.state.config.test.detections
            if detections is None:
                judged.append(None)
                progress.advance(STAGES)
            else:
                judged.append(judge(annotations, detections, limit, progress.advance))
    return judged


def _image_level(runs: Sequence[ReportRun], annotations: Annotations) -> ImageLevelIndex | None:
    """Index the image-level stream of the first run that has one, if its files are there."""
    for run in runs:
        config = run.state.config
        if config.clis.s > 0:
            roots = [data_path(config, root) for root in config.data.image_level]
            if not any(map(is_index, roots)):
                say(f"indexing {', '.join(map(str, roots))}")
            try:
                return make_index(config, annotations)
            except (OSError, ValueError) as error:
                run.missing.append(f"No image-level images: {_moved(error)}")
                return None
    return None


def _regions(
    runs: Sequence[ReportRun], index: ImageLevelIndex, annotations: Annotations, order: np.ndarray, count: int
) -> dict[str, Any] | None:
    """Return the regions of the first run with an image-level stream, or None where they cannot be read."""
    run = next(run for run in runs if run.state.config.clis.s > 0)
    config = run.state.config
    # the folder's own by its present place: it may have been moved
    path = regions_file(config) if config.regions.file else run.state.folder.regions
    try:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; pass regions.file=FILE")
        found = load_regions(path, index, config.regions)
    except (OSError, ValueError) as error:
        run.missing.append(f"No regions: {error}.")
        return None
    payload = region_payload(index, found, annotations.categories, order, count, config.data.max_pixels)
    rule = config.regions.file_rule
    if config.regions.rule in ONLINE_RULES:
        rule = f"{rule}, of which training chooses a part by {config.regions.rule}"
    return payload | {"run": run.name, "file": str(path), "rule": rule}


def _moved(error: Exception) -> str:
    return f"{error}. If the data have moved, pass data.root=FOLDER."
