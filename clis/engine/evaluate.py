"""Run a detector over the validation split and say how good it is."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clis.atomic import atomic_write
from clis.config import Config, data_path, scoped_keys
from clis.config_files import config_differences
from clis.config_scopes import Scope
from clis.data.annotated_images import read_annotated
from clis.data.annotations import Annotations
from clis.data.categories import Category, check_same_categories
from clis.data.loader import batches_by_shape, image_loader
from clis.data.streams import read_annotations
from clis.distributed import gather_rows, on_main, rank, world_size
from clis.engine.checkpoint import load_checkpoint, load_model, saved_config
from clis.engine.memory import memory_advice
from clis.engine.optim import autocast
from clis.engine.provenance import provenance, validation_files
from clis.engine.run_folder import RECORD, RunFolder
from clis.metric.detections import Detections
from clis.metric.lvis_eval import METRICS, evaluate
from clis.models import CLISDetector
from clis.progress import Progress, say
from clis.resize import image_size

INFERENCE = scoped_keys(Scope.INFERENCE)
"""Model fields that may change after the training."""


def evaluate_detector(
    detector: CLISDetector, config: Config, folder: RunFolder, training: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Evaluate a detector on `data.val`; rank 0 writes eval.json and detections.npz into `folder`.

    Beside the metrics, eval.json has a ``record`` of where they come from.

    Args:
        training: the record of the detector's training, as its checkpoint has it.

    Returns:
        The metrics of `METRICS` as fractions, -1 where undefined, AR at `test.detections`; the same on all
        ranks.
    """
    annotations = load_validation(config, detector.categories, "the detector")
    detections = detect_split(detector, config, annotations)

    def judge() -> dict[str, float]:
        figures = evaluate(annotations, detections, max_detections=config.test.detections)
        names = [f"AR@{config.test.detections}" if name == "AR@300" else name for name in METRICS]
        metrics = {name: figures[name] for name in names}
        with atomic_write(folder.result) as temporary:
            detections.save(folder.detections)
            record = evaluation_record(config, training)
            temporary.write_text(json.dumps({**metrics, RECORD: record}, indent=1) + "\n")
        return metrics

    return on_main(judge)


def detect_split(detector: CLISDetector, config: Config, annotations: Annotations) -> Detections:
    """Return the detections of all images of a split, as `run_detector`, with the calibration measured."""
    measure_calibration(detector, config)
    return run_detector(detector, config, annotations)


def evaluation_record(config: Config, training: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return where the metrics of an evaluation come from: code, data, protocol, inference, training."""
    protocol = {"name": "standard", "iou_type": "bbox", "max_detections": config.test.detections}
    return {
        **provenance(validation_files(config)),
        "protocol": protocol,
        "test": dataclasses.asdict(config.test),
        "training": training,
    }


def load_validation(
    config: Config, categories: Sequence[Category], source: str, *, unlabeled: bool = False
) -> Annotations:
    """Read the annotations of `data.val`, with the frequency groups of the training split's `categories`.

    Args:
        source: what has these categories, for errors.
        unlabeled: accept a split without annotations, which cannot be judged.

    Raises:
        FileNotFoundError, ValueError: they cannot be read, or are of other categories.
    """
    annotations = read_annotations(data_path(config, config.data.val), unlabeled=unlabeled)
    check_same_categories(categories, source, annotations.categories, annotations.path)
    return dataclasses.replace(annotations, categories=tuple(categories))


def measure_calibration(detector: CLISDetector, config: Config) -> None:
    """Let the detector's calibration measure `data.train`, if it needs to and did not do so before."""
    calibration = detector.calibration
    if calibration is None or calibration.weights is not None:
        return
    training = read_annotations(data_path(config, config.data.train))
    check_same_categories(detector.categories, "the detector", training.categories, training.path)
    sizes = np.repeat(training.image_sizes[:, ::-1], np.diff(training.offsets), axis=0)
    centers = (training.bboxes[:, :2] + training.bboxes[:, 2:] / 2) / sizes
    device = next(detector.parameters()).device
    calibration.measure(len(training), torch.from_numpy(centers), torch.tensor(training.labels))
    calibration.to(device)


def inference_config(
    state: dict[str, Any], checkpoint: Path, overrides: Sequence[str] = (), **values: Any
) -> Config:
    """Return the config of a checkpoint for inference; arguments as of `saved_config`.

    Raises:
        ValueError: as `saved_config`; or an override is of a field that the training has fixed, some of which
            would fit the same weights and give other detections in silence.
    """
    trained = saved_config(state, str(checkpoint))
    config = saved_config(state, str(checkpoint), overrides, **values)
    differences = [
        difference
        for difference in config_differences(trained, config, ("model", "clis", "loss", "teacher"))
        if difference.split(":")[0] not in INFERENCE
    ]
    if differences:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(differences[:5])}; of model, clis, "
            f"loss and teacher only {', '.join(INFERENCE)} can change after the training"
        )
    return config


def load_for_inference(
    checkpoint: Path, device: torch.device, overrides: Sequence[str] = ()
) -> tuple[CLISDetector, Config]:
    """Load a detector ready for `detect`, and its config, with ``key=value`` overrides.

    That it is from the middle of its training is said.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`, `inference_config` and `load_model`.
    """
    state = load_checkpoint(checkpoint)
    config = inference_config(state, checkpoint, overrides)
    detector = load_model(state, config, str(checkpoint)).to(device).eval()
    measure_calibration(detector, config)
    if 0 < state["step"] < config.train.steps:
        say(f"{checkpoint}: of step {state['step']}; its training has {config.train.steps}")
    return detector, config


def run_detector(detector: CLISDetector, config: Config, annotations: Annotations) -> Detections:
    """Return the detections of all images in their order, best first in each image.

    They are computed in `train.precision`. Ranks above 0 return those of their own share. Images of one
    padded size make a batch, so that none sees another's padding. Detections wait on the CPU and are
    gathered there, so no device ever holds more than those of one batch.
    """
    read = functools.partial(
        read_annotated,
        annotations,
        data_path(config, config.data.val_images),
        max_pixels=config.data.max_pixels,
    )
    rows = range(rank(), len(annotations), world_size())
    loader = image_loader(read, rows, config.test.images_per_batch, config.data.workers)
    device = next(detector.parameters()).device

    def shape_of(image: Tensor) -> tuple[int, ...]:
        return detector.canvas_of(image_size(image))

    tables = [torch.zeros(0, 7, dtype=torch.float64)]
    where, less = "evaluation", "a lower test.images_per_batch, test.short_side or test.max_size"
    with Progress("evaluate", len(rows)) as progress, memory_advice(lambda: where, less):
        for batch_rows, images in batches_by_shape(loader, config.test.images_per_batch, shape_of):
            with autocast(config.train.precision, device):
                found = detector.detect(images)
            columns = [
                _columns(row, each.boxes, each.scores, each.labels) for row, each in zip(batch_rows, found)
            ]
            tables.append(torch.cat(columns).cpu())  # one wait for all
            progress.advance(len(images))
    table = gather_rows(torch.cat(tables)).numpy()
    table = table[np.argsort(table[:, 0], kind="stable")]
    category_ids = np.array([category.id for category in annotations.categories])
    return Detections(
        image_id=annotations.image_ids[table[:, 0].astype(np.int64)],
        category_id=category_ids[table[:, 1].astype(np.int64)],
        bbox=table[:, 3:].astype(np.float32),
        score=table[:, 2].astype(np.float32),
    )


def _columns(row: int, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Return rows of image row, label, score, x y w h; float64 [n,7] holds each exactly."""
    boxes = boxes.double()
    image = torch.full_like(scores, row, dtype=torch.float64)
    sizes = boxes[:, 2:] - boxes[:, :2]
    return torch.cat([torch.stack([image, labels.double(), scores.double()], 1), boxes[:, :2], sizes], dim=1)
