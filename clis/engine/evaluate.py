"""Runs a detector over the validation split and says how good it is."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clis.config import (
    Config,
    config_differences,
    config_from_dict,
    config_to_dict,
    data_path,
    merge_overrides,
    with_root,
)
from clis.data.annotations import Annotations, Category, check_same_categories
from clis.data.images import read_image
from clis.data.loader import image_loader
from clis.distributed import choose_device, from_main, gather_rows, is_main, process_group, rank, world_size
from clis.engine import report
from clis.engine.checkpoint import load_checkpoint, load_model
from clis.engine.detections import Detections
from clis.engine.log import Progress, say
from clis.engine.lvis_eval import METRICS, evaluate, format_table
from clis.engine.streams import read_annotations
from clis.files import written_whole
from clis.models import CLISDetector

INFERENCE = ("model.rpn.pre_nms_test", "model.rpn.proposals", "model.rpn.nms_iou")
"""Fields of the model that a trained detector may be evaluated with other values of."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``evaluate.py``, of a checkpoint, which holds everything else, or of result files."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        usage="evaluate.py CHECKPOINT [key=value ...]\n"
        "       evaluate.py --annotations FILE --results FILE [options]",
        description="Evaluate a checkpoint on the validation split of its config, or any detector's results.",
    )
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="change the checkpoint's config, e.g. data.root=/datasets test.score_threshold=0.05; "
        "output=FOLDER for the results (default: a folder beside the checkpoint, named after it)",
    )  # fmt: skip
    report.add_arguments(parser)
    arguments = parser.parse_args(argv)
    by_file = [arguments.annotations is not None, arguments.results is not None]
    if not any(by_file) and arguments.checkpoint is None:
        parser.error("a CHECKPOINT is needed, or --annotations FILE and --results FILE")
    if any(by_file):
        if not all(by_file) or arguments.checkpoint is not None:
            parser.error("--annotations FILE and --results FILE go together, and without a CHECKPOINT")
        report.evaluate_results(arguments)
        return
    if options := report.given(arguments):
        parser.error(
            f"{', '.join(options)}: for result files; evaluate the checkpoint first, then its detections.npz "
            "with --annotations and --results"
        )
    state = load_checkpoint(arguments.checkpoint)
    values = config_to_dict(config_from_dict(state["config"], source=str(arguments.checkpoint)))
    values["output"] = str(arguments.checkpoint.with_suffix(""))
    config = with_root(config_from_dict(merge_overrides(values, arguments.overrides), source="override"))
    _check_same_model(config, state, arguments.checkpoint)
    device = choose_device(config.train.device)
    with process_group(device):
        detector = load_model(state, config, str(arguments.checkpoint)).to(device).eval()
        metrics = evaluate_detector(detector, config, Path(config.output))
        say(format_table({str(arguments.checkpoint): metrics}))
        say(f"{config.output}/eval.json, detections.npz")


def _check_same_model(config: Config, state: dict[str, Any], checkpoint: Path) -> None:
    """Raises `ValueError` for an override of what the training has fixed."""
    trained = config_from_dict(state["config"], source=str(checkpoint))
    differences = [
        difference
        for difference in config_differences(trained, config, ("model", "clis", "loss"))
        if difference.split(":")[0] not in INFERENCE
    ]
    if differences:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(differences[:5])}; of model, clis and "
            f"loss only {', '.join(INFERENCE)} can change after the training"
        )


def evaluate_detector(detector: CLISDetector, config: Config, folder: Path) -> dict[str, float]:
    """Evaluates on `data.val`; rank 0 writes eval.json and detections.npz into `folder`.

    Returns:
        The metrics of `METRICS` as fractions, -1 where undefined, AR at `test.detections`; the same on all
        ranks.
    """
    annotations = load_validation(config, detector.categories)
    detections = run_detector(detector, config, annotations)
    metrics: dict[str, float] = {}
    if is_main():
        figures = evaluate(annotations, detections, max_detections=config.test.detections)
        names = [f"AR@{config.test.detections}" if name == "AR@300" else name for name in METRICS]
        metrics = {name: figures[name] for name in names}
        with written_whole(folder / "eval.json") as temporary:
            detections.save(folder / "detections.npz")
            temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    return from_main(metrics)


def load_validation(config: Config, categories: Sequence[Category]) -> Annotations:
    """The annotations of `data.val`, with the frequency groups of the training split's `categories`."""
    annotations = read_annotations(data_path(config, config.data.val))
    check_same_categories(categories, "the detector", annotations.categories, annotations.path)
    return dataclasses.replace(annotations, categories=tuple(categories))


def check_validation(config: Config, categories: Sequence[Category]) -> None:
    """Fails now rather than after the training, if the validation split cannot be read."""
    read_validation_image(
        data_path(config, config.data.val_images), load_validation(config, categories).file_names, 0
    )


def run_detector(detector: CLISDetector, config: Config, annotations: Annotations) -> Detections:
    """Detections of all images in their order, best first in each; on ranks above 0 those of their own share.

    They wait on the CPU and are gathered there, so no device ever holds more than those of one batch.
    """
    read = functools.partial(
        read_validation_image, data_path(config, config.data.val_images), annotations.file_names
    )
    rows = range(rank(), len(annotations), world_size())
    loader = image_loader(read, rows, config.test.images_per_batch, config.data.workers)
    columns = [torch.zeros(0, 7, dtype=torch.float64)]
    with Progress("evaluate", len(rows)) as progress:
        for batch_rows, images in loader:
            for row, found in zip(batch_rows, detector.detect(images)):
                columns.append(_columns(row, found.boxes, found.scores, found.labels).cpu())
            progress.advance(len(images))
    table = gather_rows(torch.cat(columns)).numpy()
    table = table[np.argsort(table[:, 0], kind="stable")]
    category_ids = np.array([category.id for category in annotations.categories])
    return Detections(
        image_id=annotations.image_ids[table[:, 0].astype(np.int64)],
        category_id=category_ids[table[:, 1].astype(np.int64)],
        bbox=table[:, 3:].astype(np.float32),
        score=table[:, 2].astype(np.float32),
    )


def _columns(row: int, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Rows of image row, label, score, x y w h; float64 [n,7] holds each exactly."""
    boxes = boxes.double()
    image = torch.full_like(scores, row, dtype=torch.float64)
    sizes = boxes[:, 2:] - boxes[:, :2]
    return torch.cat([torch.stack([image, labels.double(), scores.double()], 1), boxes[:, :2], sizes], dim=1)


def read_validation_image(folder: Path, file_names: np.ndarray, row: int) -> Tensor:
    """Image `row` of an annotation file, uint8 RGB [3,H,W]."""
    return read_image(folder / str(file_names[row]))
