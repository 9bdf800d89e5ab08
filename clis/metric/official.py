"""The published evaluators for comparison: `lvis` for federated annotations, pycocotools for others."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lvis import LVIS, LVISEval, LVISResults
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from clis.text import read_text


def official_precision(
    annotations: str | Path, results: str | Path, iou_type: str = "bbox", max_detections: int = 300
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Return the published package's figures, precision [T, R, C, A] and recall [T, C, A] for two JSON files.

    Federated annotations go to `lvis` (all 13 figures), others to pycocotools (AP, AP50, AP75, APs, APm, APl,
    and AR, ARs, ARm, ARl at `max_detections`). Slow: see RESULTS.md.

    Raises:
        ValueError: the package fails on these files, as both do on an empty result list, and `lvis` where an
            annotation has no area or a category no frequency.
    """
    document = json.loads(read_text(annotations))
    try:
        if any("neg_category_ids" in image for image in document["images"]):
            return run_lvis(load_lvis(annotations, results, iou_type, max_detections))
        return _coco(document, json.loads(read_text(results)), iou_type, max_detections)
    except (KeyError, IndexError, TypeError, AssertionError) as error:
        raise ValueError(
            f"the published package fails on {annotations} with {results}: {error!r}; it needs every field "
            "of its format and at least one detection"
        ) from error


def load_lvis(
    annotations: str | Path, results: str | Path, iou_type: str = "bbox", max_detections: int = 300
) -> LVISEval:
    """Make the evaluator of the `lvis` package with both files loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the package's logger.warn
        truth = _Truth(str(annotations))
        detections = json.loads(read_text(results))
        evaluator = LVISEval(truth, LVISResults(truth, detections, max_dets=max_detections), iou_type)
    evaluator.params.max_dets = max_detections
    return evaluator


def run_lvis(evaluator: LVISEval) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Compute figures, precision and recall as `official_precision` returns them."""
    with _float_in_numpy(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        evaluator.run()
    figures = {name: float(value) for name, value in evaluator.results.items()}
    return figures, evaluator.eval["precision"], evaluator.eval["recall"]


class _Truth(LVIS):
    """Read the annotations as our metric does, also with a byte order mark."""

    def _load_json(self, path: str) -> Any:
        return json.loads(read_text(path))


@contextlib.contextmanager
def _float_in_numpy() -> Iterator[None]:
    """Provide `numpy.float`, which NumPy 1.24 removed and lvis 0.5.3 uses, for the length of one call."""
    if "float" in vars(np):
        yield
        return
    vars(np)["float"] = float
    try:
        yield
    finally:
        del vars(np)["float"]


def _coco(
    document: dict, results: list, iou_type: str, max_detections: int
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = document
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluator.params.maxDets = [max_detections]
        evaluator.evaluate()
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"][..., 0], evaluator.eval["recall"][..., 0]

    def mean(values: np.ndarray) -> float:
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    figures = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, ..., 0])}
    figures["AP75"] = mean(precision[5, ..., 0])
    figures |= {f"AP{letter}": mean(precision[..., a]) for a, letter in enumerate("sml", 1)}
    figures[f"AR@{max_detections}"] = mean(recall[..., 0])
    figures |= {f"AR{letter}@{max_detections}": mean(recall[..., a]) for a, letter in enumerate("sml", 1)}
    return figures, precision, recall
