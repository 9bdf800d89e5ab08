"""The worked example of docs/data.md, from zero to an evaluation, as a newcomer would type it."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from runs import REPOSITORY, SHORT

import clis
from clis.config import Config, config_to_dict

TEXT = (REPOSITORY / "docs" / "data.md").read_text()
# The example at the size of a test: a small network from random weights on small images, few steps.
SMALL = [value for value in SHORT if not value.startswith("data.generate")] + [
    "model.backbone={name: resnet10, norm: group, trainable_layers: 5, weights: null, download: false}",
    "model.rpn={anchor_scale: 4, proposals: 30, samples: 32}", "clis.s=4", "data.min_region=6",
    "data.max_size=96", "optim.decay_steps=[]",
]  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.S)


def test_your_own_data_from_zero(data, tmp_path):
    """A table of boxes and folders by class name, made of the embedded benchmark's images."""
    folder = tmp_path / "mine"
    (folder / "photos").mkdir(parents=True)
    rows = []
    for split in ("train", "val"):
        document = json.loads((data / "shapes" / f"{split}.json").read_text())
        names = {category["id"]: category["name"] for category in document["categories"]}
        files = {image["id"]: image["file_name"] for image in document["images"]}
        for image_id, file in files.items():
            shutil.copy(data / "shapes" / file, folder / "photos" / f"{split}{image_id}.jpg")
        rows += [
            [f"{split}{a['image_id']}.jpg", names[a["category_id"]], *a["bbox"], split]
            for a in document["annotations"]
        ]
    with open(folder / "boxes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["photo", "class", "x", "y", "width", "height", "split"], *rows])
    shutil.copytree(data / "shapes" / "image_level", folder / "classes")

    (script,) = blocks("python")
    (tmp_path / "make_json.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "make_json.py"], cwd=tmp_path, check=True, env=environment)
    for text in blocks("yaml"):
        (tmp_path / text.split("\n")[0].removeprefix("# ")).write_text(text)
    assert yaml.safe_load((tmp_path / "mine_baseline.yaml").read_text())["base"] == "mine.yaml"

    for name in ("train.py", "evaluate.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (commands,) = blocks("bash")
    for command in commands.strip().splitlines():
        words = command.split()
        assert words[0] == "python"
        words = [sys.executable, *words[1:]] + ([] if words[1] == "evaluate.py" else SMALL)
        result = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        if "clis check" in command:
            assert "The run may start." in result.stdout
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "last" / "eval.json").exists()


def test_every_command_and_field_that_the_docs_name_is_there():
    """Commands of `python -m clis`, and `section.field` names."""
    known = subprocess.run(
        [sys.executable, "-m", "clis", "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ).stdout  # fmt: skip
    fields = {f"{section}.{key}" for section, values in config_to_dict(Config()).items()
              if isinstance(values, dict) for key in values}  # fmt: skip
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        text = path.read_text()
        for command in re.findall(r"python -m clis (\w+)", text):
            assert re.search(rf"^\s+{command}\b", known, flags=re.M), (path.name, command)
        for field in re.findall(r"`((?:data|clis|train|optim|loss|regions|test)\.\w+)", text):
            in_api = field.removeprefix("clis.") in clis.__all__
            assert field in fields or in_api or Path(field).suffix in (".py", ".npy"), (path.name, field)
