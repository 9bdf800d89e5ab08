"""The recipe on real photographs (where the sample data is), and what a wrong CLIS_DATA says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from clis.cli import run_command
from clis.commands import run_verb
from clis.config_files import load_config
from clis.data import streams
from clis.data.annotations import load_annotations
from clis.data.images import decode_image
from clis.data.region_file import load_regions
from clis.engine.run_folder import RunFolder
from clis.metric.detections import Detections
from clis.metric.lvis_eval import METRICS

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "coco_mini"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not all((SHARED / name).exists() for name in ("coco_mini", "imagenet_mini", "weights")),
    reason="sample data is not here",
)
VAL_IMAGES = 24


def small_split(path: Path) -> Path:
    """The first images of the validation split, with all of its categories."""
    document = json.loads((SHARED / "coco_mini" / "val.json").read_text())
    images = document["images"][:VAL_IMAGES]
    ids = {image["id"] for image in images}
    annotations = [record for record in document["annotations"] if record["image_id"] in ids]
    path.write_text(json.dumps(document | {"images": images, "annotations": annotations}))
    return path


@needs_data
@pytest.mark.slow
def test_the_recipe_runs_on_photographs(tmp_path):
    output = tmp_path / "run"
    arguments = [
        "train.steps=2", "train.images_per_step=2", "train.device=cpu", "train.log_every=1",
        "data.short_sides=[128]", "data.max_size=200", "data.image_level=[imagenet_mini/folders]",
        "data.workers=0", "test.short_side=128", "test.max_size=200", "test.images_per_batch=8",
        "regions.short_side=64", "regions.max_size=100",
        "model.backbone.weights=weights/resnet18_pqf.pt", "model.backbone.download=false",
        f"data.root={SHARED}", f"data.val={small_split(tmp_path / 'val.json')}", f"output={output}",
    ]  # fmt: skip
    config = load_config(CONFIGS / "clis.yaml", arguments)
    run_verb("train", ["--config", str(CONFIGS / "clis.yaml"), *arguments])

    for folder in (output, output / "detector"):
        metrics = RunFolder(folder).read_result()
        assert tuple(metrics) == METRICS
        assert all(value == -1 or 0 <= value <= 1 for value in metrics.values())
        assert metrics["AP"] >= 0  # defined: the split has boxes
        detections = Detections.load(folder / "detections.npz")
        assert np.isfinite(detections.bbox).all()
        assert set(detections.image_id) <= set(load_annotations(tmp_path / "val.json").image_ids)
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in steps] == [1, 2]
    # one run has the parts of CLIS, the other none
    detector, clis = (
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        for folder in (output / "detector", output)
    )
    contrast = {f"contrast_{name}" for name in ("positive", "other", "queue", "retrieval")}
    queue = {"queue_filled", "queue_concentration"}
    assert {"objectness", "image_cls", "contrastive", *contrast, *queue} == clis.keys() - detector.keys()
    assert all(np.isfinite(value) for record in (detector, clis) for value in record.values())

    index = streams.make_index(config, load_annotations(SHARED / "coco_mini" / "train.json"))
    regions = load_regions(output / "regions.npy", index, config.regions)
    assert len(regions) == 277  # one image a wnid
    counts = json.loads((output / "regions.json").read_text())["counts"]
    assert sum(counts.values()) == 277
    assert set(counts) <= {"rule", "fallback"}
    for row in range(0, 277, 23):
        height, width = decode_image(index.read(row), index.name(row)).shape[1:]
        assert (regions["box"][row] >= 0).all()
        assert (regions["box"][row] <= np.array([width, height] * 2) + 1e-3).all()


@pytest.mark.parametrize("name", ["clis", "baseline"])
def test_a_wrong_data_folder_names_the_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.setenv("CLIS_DATA", str(tmp_path / "nowhere"))
    missing = re.escape(str(tmp_path / "nowhere" / "coco_mini" / "train.json"))
    with pytest.raises(FileNotFoundError, match=missing):
        run_verb(
            "train", ["--config", str(CONFIGS / f"{name}.yaml"), f"output={tmp_path}", "train.device=cpu"]
        )


def test_the_command_says_so_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLIS_DATA", str(tmp_path))
    monkeypatch.delenv("CLIS_DEBUG", raising=False)
    arguments = ["--config", str(CONFIGS / "clis.yaml"), f"output={tmp_path / 'run'}", "train.device=cpu"]
    with pytest.raises(SystemExit, match="1"):
        run_command(lambda: run_verb("train", arguments))
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert str(tmp_path / "coco_mini" / "train.json") in told.splitlines()[0]
