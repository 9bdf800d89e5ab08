"""Run folders made by hand for the report: the case of test_verdicts, with images, a log and regions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from lvis_cases import detections_of
from PIL import Image
from test_verdicts import detection_rows, hand_made

from clis.config_files import config_from_dict, config_to_yaml, merge_overrides
from clis.data.image_level import build_index
from clis.data.region_file import REGION_DTYPE, RegionSource, region_sidecar
from clis.data.streams import read_annotations
from clis.engine.run_folder import RunFolder
from clis.metric.lvis_eval import evaluate

EMPTY_IMAGES = 20
"""Validation images without an object, so that there are 23, on two pages."""


def write_data(root: Path) -> Path:
    """Annotations, JPEGs in plain gray, and two image-level images of the first class."""
    data = hand_made()
    data["images"] += [
        {"id": 100 + i, "file_name": f"{100 + i}.jpg", "width": 400, "height": 400, "neg_category_ids": [],
         "not_exhaustive_category_ids": []}
        for i in range(EMPTY_IMAGES)
    ]  # fmt: skip
    (root / "val").mkdir(parents=True)
    for image in data["images"]:
        Image.new("RGB", (400, 400), (image["id"], 90, 90)).save(root / "val" / image["file_name"])
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(data))
    (root / "level" / "dog").mkdir(parents=True)
    for name, gray in (("a", 40), ("b", 200)):
        Image.new("RGB", (80, 40), (gray,) * 3).save(root / "level" / "dog" / f"{name}.jpg")
    return root


def write_regions(root: Path) -> Path:
    """One region by the detector with score 0.25 in a.jpg, none in b.jpg."""
    index = build_index([root / "level"], read_annotations(root / "train.json").categories)
    rows = np.zeros(2, REGION_DTYPE)
    rows["box"] = [[0, 0, 40, 40], [20, 10, 60, 30]]
    rows["score"] = [0.25, 0]
    rows["source"] = [RegionSource.RULE, RegionSource.FALLBACK]
    path = root / "regions.npy"
    np.save(path, rows)
    config = config_from_dict({"regions": {"detector": "x.pt"}})
    sidecar = region_sidecar(index, config.regions, "x.pt") | {"counts": {}}
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    return path


def write_run(
    root: Path, folder: Path, *overrides: str, rows: list[dict] | None = None, paper: dict | None = None
) -> RunFolder:
    """A finished run of 40 steps with 10 records: loss 10, 9, ..., 1 at steps 4, 8, ..., 40."""
    run = RunFolder(folder)
    run.path.mkdir(parents=True)
    settings = [
        f"data.root={root}", "data.train=train.json", "data.val=val.json", "data.val_images=val",
        "data.train_images=val", "data.image_level=[level]", f"regions.file={root / 'regions.npy'}",
        "train.steps=40", f"output={folder}", *overrides,
    ]  # fmt: skip
    values = merge_overrides({}, settings) | {"paper": paper or {}}
    run.config.write_text(config_to_yaml(config_from_dict(values)))
    records = [{"step": 4 * i, "loss": 11.0 - i, "box": 0.5, "lr": 0.01} for i in range(1, 11)]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_result(root, run, detection_rows() if rows is None else rows)
    return run


def write_result(root: Path, run: RunFolder, rows: list[dict]) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    detections = detections_of(rows)
    detections.save(run.detections)
    run.result.write_text(json.dumps(evaluate(root / "val.json", detections)))
