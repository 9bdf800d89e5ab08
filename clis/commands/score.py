"""``python -m clis score``, or ``evaluate.py --annotations --results``: the metric on anyone's detections."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clis.atomic import atomic_write, check_writable
from clis.data.annotations import Annotations
from clis.data.categories import check_same_categories
from clis.data.streams import read_annotations
from clis.metric import analysis
from clis.metric.detections import Detections
from clis.metric.lvis_eval import accumulate, summarize
from clis.metric.masks import ground_truth_masks
from clis.metric.matching import Matches, describe_uncounted, match
from clis.progress import say
from clis.text import markdown_table

OUTSIDE = 0.2
"""Share of boxes beyond their images from which on they are probably of another form."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis score`."""
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="FILE", help="LVIS or COCO-form JSON"
    )
    parser.add_argument(
        "--results", type=Path, required=True, metavar="FILE",
        help="LVIS result JSON, or a detections.npz of ours",
    )  # fmt: skip
    parser.add_argument("--masks", action="store_true", help="compare masks (segmentation) instead of boxes")
    parser.add_argument(
        "--protocol", choices=("standard", "fixed", "pooled"), default="standard",
        help="fixed: 10,000 detections a class over the split instead of 300 an image; pooled: these, ranked "
        "over all classes together (arXiv 2102.01066)",
    )  # fmt: skip
    parser.add_argument(
        "--max-detections",
        type=int,
        metavar="N",
        help="keep at most N detections per image, in COCO form per image and class (default 300)",
    )
    parser.add_argument(
        "--train-annotations", type=Path, metavar="FILE",
        help="take the classes' training-image counts and frequency groups from this file",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--per-class", type=Path, metavar="FILE", help="write a CSV file, one line a class")
    parser.add_argument("--errors", action="store_true", help="AP50 lost to each kind of error (TIDE)")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE",
        help="compare with these results: difference and 95 %% interval (paired bootstrap)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=200, metavar="N", help="bootstrap samples (default 200)"
    )
    parser.add_argument(
        "--official", action="store_true", help="run the lvis package (COCO form: pycocotools) beside ours"
    )


def run(arguments: argparse.Namespace) -> None:
    """Judge a result file by the LVIS metric, and print the requested tables."""
    score_results(arguments)


def score_results(arguments: argparse.Namespace) -> dict[str, float]:
    """Print the requested tables and return the figures."""
    _check(arguments)
    limit = 300 if arguments.max_detections is None else arguments.max_detections
    annotations, masks = _ground_truth(arguments)
    categories = annotations.categories
    detections = Detections.load(arguments.results, masks=arguments.masks)
    for line in describe_boxes(annotations, detections):
        say(f"WARNING: {arguments.results}: {line}")
    matches = match(annotations, detections, limit, arguments.protocol, masks)
    figures = summarize(matches, categories, limit, arguments.protocol)
    kind = "federated" if annotations.federated else "exhaustive (no federated fields: judged as COCO is)"
    say(f"{arguments.annotations}: {len(annotations)} images, {annotations.num_classes} classes, {kind}")
    if annotations.groups_counted and arguments.train_annotations is None:
        say(
            f"WARNING: {arguments.annotations} does not say which classes are rare (`frequency`): r, c and f "
            "are counted in this split; --train-annotations FILE takes the counts of training"
        )
    say(f"{arguments.results}: {len(detections)} detections, {len(matches.rows)} of them judged")
    for line in describe_uncounted(annotations):
        say(f"WARNING: {line}")
    say(markdown_table(["figure", "%"], [(name, _percent(value)) for name, value in figures.items()]))
    if arguments.out is not None:
        with atomic_write(arguments.out) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n")
    standard = arguments.protocol == "standard"
    if arguments.per_class is not None or standard:
        curves = accumulate(matches)
        if arguments.per_class is not None:
            analysis.write_class_table(arguments.per_class, matches, curves, categories)
            say(f"classes: {arguments.per_class}")
        bins = analysis.ap_by_image_count(curves, categories)
        source = arguments.train_annotations or "image_count of --annotations; counted in it if it has none"
        say(f"\nAP against training images ({source})")
        rows = [
            (f"{first}-{last}" if first < last else str(first), str(classes), _percent(ap))
            for first, last, classes, ap in bins
        ]
        say(markdown_table(["images", "classes", "AP"], rows))
    if arguments.errors:
        _say_errors(annotations, detections, matches)
    if arguments.compare is not None:
        _say_comparison(arguments, annotations, matches, masks, limit)
    if arguments.official:
        _say_official(arguments, detections, figures, matches, limit)
    return figures


def describe_boxes(annotations: Annotations, detections: Detections) -> Iterator[str]:
    """Say what detections look like if they are not x, y, width, height in pixels."""
    order = np.argsort(annotations.image_ids)
    place = np.searchsorted(annotations.image_ids[order], detections.image_id).clip(max=len(order) - 1)
    known = annotations.image_ids[order[place]] == detections.image_id  # others are an error soon
    if not known.any():
        return
    sizes, boxes = annotations.image_sizes[order[place[known]], ::-1], detections.bbox[known]
    if (boxes <= 1).all() and (sizes > 2).all():
        yield "all boxes are within 0..1, as fractions of the image would be; they have to be in pixels"
    outside = (boxes[:, :2] + boxes[:, 2:] > 1.02 * sizes + 2).any(axis=1)
    if outside.mean() > OUTSIDE:
        yield (
            f"{outside.sum()} of {len(outside)} boxes reach beyond their images; are they x1, y1, x2, y2? "
            "They have to be x, y, width, height"
        )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together, and files that are not there or cannot be written."""
    if arguments.errors and arguments.masks:
        raise ValueError("--errors looks at boxes; leave --masks out")
    if arguments.protocol != "standard":
        for name in ("errors", "official"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} goes with the standard protocol; leave --protocol out")
        if arguments.max_detections is not None:
            raise ValueError("--max-detections goes with the standard protocol; the others limit a class")
        if arguments.protocol == "pooled" and arguments.per_class:
            raise ValueError("--per-class does not go with --protocol pooled, which knows no classes")
    if arguments.official and arguments.train_annotations:
        raise ValueError("--official takes the groups of --annotations; leave --train-annotations out")
    if arguments.samples < 1:
        raise ValueError(f"--samples {arguments.samples}: at least 1")
    used: dict[Path, str] = {}
    for name in ("annotations", "results", "compare", "train_annotations"):
        path, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if path is not None:
            if not path.exists():
                raise FileNotFoundError(f"{option} {path}: no such file")
            used[path.resolve()] = option
    for path, option in ((arguments.out, "--out"), (arguments.per_class, "--per-class")):
        if path is not None:
            if other := used.get(path.resolve()):
                raise ValueError(f"{option} {path}: would replace the file of {other}; name another file")
            used[path.resolve()] = option
            check_writable(path)


def _ground_truth(arguments: argparse.Namespace) -> tuple[Annotations, list | None]:
    masks = None
    if arguments.masks:
        annotations, masks = ground_truth_masks(arguments.annotations)
    else:
        annotations = read_annotations(arguments.annotations)
    if arguments.train_annotations is not None:
        train = read_annotations(arguments.train_annotations)
        check_same_categories(train.categories, train.path, annotations.categories, annotations.path)
        annotations = dataclasses.replace(
            annotations, categories=train.categories, groups_counted=train.groups_counted
        )
    return annotations, masks


def _say_errors(annotations: Annotations, detections: Detections, matches: Matches) -> None:
    shares = analysis.error_shares(annotations, detections, matches, annotations.categories)
    say("\nAP50, and how much it would rise if one kind of error alone were corrected")
    rows = [
        [
            name,
            *(_percent(values[group]) for group in analysis.ERROR_GROUPS),
            str(shares.counts.get(name, "")),
        ]
        for name, values in {"AP50": shares.ap50, **shares.lost}.items()
    ]
    say(markdown_table(["error", *analysis.ERROR_GROUPS, "number"], rows))
    agnostic = analysis.class_agnostic(annotations, detections, matches)
    say("boxes alone, classes erased: " + "  ".join(f"{k} {_percent(v)}" for k, v in agnostic.items()))


def _say_comparison(
    arguments: argparse.Namespace,
    annotations: Annotations,
    matches: Matches,
    masks: list | None,
    limit: int,
) -> None:
    other = Detections.load(arguments.compare, masks=arguments.masks)
    below = match(annotations, other, limit, arguments.protocol, masks)
    intervals = analysis.bootstrap(
        below, matches, annotations.categories, arguments.samples, protocol=arguments.protocol
    )
    say(f"\n{arguments.results} against {arguments.compare}, 95 % intervals of {arguments.samples} samples")
    width = max((5, *map(len, intervals)))
    for name, interval in intervals.items():
        low, high = 100 * interval.low, 100 * interval.high
        say(f"{name:>{width}} {100 * interval.value:+.1f}  ({low:+.1f} .. {high:+.1f})")


def _say_official(
    arguments: argparse.Namespace,
    detections: Detections,
    figures: dict[str, float],
    matches: Matches,
    limit: int,
) -> None:
    from clis.metric.official import official_precision

    with tempfile.TemporaryDirectory() as folder:
        results = arguments.results
        if results.suffix == ".npz":
            results = Path(folder) / "results.json"
            detections.to_json(results)
        iou_type = "segm" if arguments.masks else "bbox"
        say("\nrunning the published package ...")
        theirs, precision, recall = official_precision(arguments.annotations, results, iou_type, limit)
    curves = accumulate(matches)
    rows = [(name, f"{figures[name]:.10f}", f"{value:.10f}") for name, value in theirs.items()]
    say(markdown_table(["figure", "ours", "package"], rows))
    by_figure = max(abs(figures[name] - value) for name, value in theirs.items())
    by_curve = max(
        float(np.abs(curves.precision - precision).max()), float(np.abs(curves.recall - recall).max())
    )
    say(f"largest difference: {by_figure:.3g} of a figure, {by_curve:.3g} anywhere on the curves")


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"
