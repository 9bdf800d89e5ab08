"""The scripts behind RESULTS.md in their smallest form: what was measured once can be measured again.

Those with tests of their own: faults.py (test_survival), fuzz.py, groceries.py, pairs.py, and gpu.py with
what it takes from step.py, inference.py, loader.py and region_search.py (test_gpu_script).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from runs import BASELINE, REPOSITORY, SHORT

from clis.models.backbone import Backbone

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import accuracy_vs_torchvision

COCO_MINI = REPOSITORY.parent / "shared" / "data" / "coco_mini"


def output_of(folder: Path, script: str, *arguments: str) -> list[str]:
    """What the script prints, started in the folder."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CLIS_CACHE": str(folder / "cache")}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_the_peer_sees_our_pyramid():
    """torchvision's detector gets P2 to P6 of a batch as ours has them."""
    backbone = Backbone(tiny_config().model.backbone)
    images = [torch.rand(3, 50, 60) * 255, torch.rand(3, 64, 40) * 255]
    levels = accuracy_vs_torchvision.PeerBackbone(backbone)(backbone.batch(images))
    assert len(levels) == 5
    for ours, theirs in zip(backbone(images), levels.values()):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.slow
def test_ours_beside_torchvision(data, tmp_path):
    arguments = ["--seeds", "0", "--config", BASELINE, "--out", "out", *SHORT, f"data.root={data}"]
    printed = output_of(tmp_path, "accuracy_vs_torchvision.py", *arguments)
    assert [line.split(" | ")[:2] for line in printed[-2:]] == [["| ours", "1"], ["| torchvision", "1"]]
    kept = json.loads((tmp_path / "out" / "torchvision_0.json").read_text())
    assert kept["config"]["train"]["steps"] == 4
    assert output_of(tmp_path, "accuracy_vs_torchvision.py", *arguments)[-2:] == printed[-2:]


@pytest.mark.slow
def test_the_metric_beside_others(tmp_path):
    """Two simulated files, and the package's figures on them."""
    output_of(tmp_path, "lvis_eval.py", "--simulate", "30", "--classes", "20", "--out", ".")
    printed = output_of(tmp_path, "lvis_eval.py", "gt.json", "dt.json", "--repeats", "1", "--official")
    [difference] = [line for line in printed if line.startswith("largest difference from official")]
    assert float(difference.split()[-1]) < 1e-9


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_starts_and_indices(data, tmp_path):
    printed = output_of(
        tmp_path, "annotation_cache.py", str(data / "shapes" / "train.json"), "--repeats", "1"
    )
    assert sum("every later start" in line for line in printed) > 3
    printed = output_of(tmp_path, "image_level_index.py", "--images", "2000", "--repeats", "1")
    assert printed[-2].split()[0] == "2000"
    assert len(output_of(tmp_path, "sampler.py", "--repeats", "1")) > 10


@pytest.mark.slow
@pytest.mark.skipif(not COCO_MINI.exists(), reason="no coco_mini")
def test_photographs_to_memorize(tmp_path):
    short = ["train.steps=2", "optim.decay_steps=[]", "optim.warmup_steps=1", "model.backbone.width=16"]
    printed = output_of(
        tmp_path, "overfit_coco_mini.py", "--data", str(COCO_MINI.parent), "--out", "out", *short
    )
    assert [line.split(" | ")[0] for line in printed[-2:]] == ["| baseline", "| CLIS"]
