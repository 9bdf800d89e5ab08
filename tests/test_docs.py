"""The worked examples of docs/, as a newcomer would type them; what they say of settings and data is so."""

from __future__ import annotations

import collections
import csv
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import rows_of
from runs import CONFIG, REPOSITORY, SHORT

import clis
from clis.config import RESUMABLE, Config
from clis.config_files import config_to_dict, flatten, load_config, merge_overrides
from clis.data.categories import Category
from clis.data.shapes import ShapesSpec, frequency_order, train_image_counts, val_image_counts
from clis.data.shapes_drawing import CLASS_NAMES
from clis.engine.run_folder import RunFolder
from clis.losses import CLASSIFICATION_LOSSES, build_classification_loss
from clis.losses.options import check_options, read_call
from clis.models.calibration import CALIBRATIONS
from clis.study.file import Study

# The example at the size of a test: a small network from random weights on small images, few steps.
SMALL = [value for value in SHORT if not value.startswith("data.generate")] + [
    "model.backbone={name: resnet10, norm: group, trainable_layers: 5, weights: null, download: false}",
    "model.rpn={anchor_scale: 4, proposals: 30, samples: 32}", "clis.s=4", "data.min_region=6",
    "data.max_size=96", "optim.decay_steps=[]",
]  # fmt: skip


def text_of(document: str) -> str:
    return (REPOSITORY / "docs" / document).read_text()


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(document), flags=re.S)


def write_named(folder: Path, texts: list[str]) -> None:
    """Each block into the file that its first line names."""
    for text in texts:
        (folder / text.split("\n")[0].removeprefix("# ")).write_text(text)


def run_commands(document: str, folder: Path, *, more: dict[str, list[str]]) -> dict[str, str]:
    """Types the document's commands into a folder with links to the repository; what each of them said.

    `more` has further words for a command, by its second word or, behind ``-m clis``, by its fourth.
    """
    for name in ("train.py", "evaluate.py", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    said = {}
    for command in "".join(blocks(document, "bash")).strip().splitlines():
        python, *words = command.split()
        assert python == "python"
        name = words[2] if words[0] == "-m" else words[0]
        result = subprocess.run(
            [sys.executable, *words, *more[name]],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        said[name] = result.stdout
    return said


@pytest.mark.slow
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

    (script,) = blocks("data.md", "python")
    (tmp_path / "make_json.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "make_json.py"], cwd=tmp_path, check=True, env=environment)
    write_named(tmp_path, blocks("data.md", "yaml"))
    assert yaml.safe_load((tmp_path / "mine_baseline.yaml").read_text())["base"] == "mine.yaml"

    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(merge_overrides(yaml.safe_load(config.read_text()), SMALL)))
    said = run_commands("data.md", tmp_path, more=collections.defaultdict(list))
    assert "The run may start." in said["check"]
    assert "regions.short_side=" in said["regions"].splitlines()[-1]
    assert "runs/mine_baseline is already finished" in said["train.py"]
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "last" / "eval.json").exists()


@pytest.mark.slow
def test_adding_a_classification_loss(data, tmp_path):
    """The file as it is shown: trained, evaluated by another process, and compared to cross-entropy."""
    write_named(tmp_path, blocks("benchmark.md", "python") + blocks("benchmark.md", "yaml"))
    short = [*SHORT, f"data.root={data}"]
    more = {"train.py": short, "evaluate.py": [], "study": [*short, "--seeds", "0"]}
    said = run_commands("benchmark.md", tmp_path, more=more)
    assert "classification loss logit_adjusted:LogitAdjusted" in said["train.py"]
    alone = RunFolder(tmp_path / "runs" / "adjusted").read_result()
    again = RunFolder(tmp_path / "runs" / "adjusted" / "checkpoints" / "last").read_result()
    assert alone == again
    rows = json.loads((tmp_path / "runs" / "studies" / "losses" / "study.json").read_text())["rows"]
    assert list(rows) == ["cross-entropy", "logit adjustment"]
    runs = [row["runs"]["0"] for row in rows.values()]
    assert runs[0]["key"] != runs[1]["key"]
    assert runs[1]["AP"] == round(100 * alone["AP"], 2)  # the same run as the one by train.py


def test_the_shown_loss_is_its_formula():
    """Classes of 1 and 4 training images: n over the geometric mean 2 is 1/2 and 2, background's factor is 1.

    Of equal logits, softmax with these factors is 1/7, 4/7 and 2/7; scores are the plain softmax, 1/3.
    """
    (code,) = blocks("benchmark.md", "python")
    assert len(code.splitlines()) < 40
    namespace: dict = {"__name__": "logit_adjusted"}
    exec(code, namespace)
    categories = [
        Category(id=count, name=f"class{count}", frequency="r", image_count=count) for count in (1, 4)
    ]
    loss = namespace["LogitAdjusted"](categories)
    logits = torch.full((1, 3), 0.3)
    for label, probability in enumerate([1 / 7, 4 / 7, 2 / 7]):
        value = loss(logits, torch.tensor([label]), 1.0, None)
        torch.testing.assert_close(value, -torch.tensor(probability).log())
    every = loss(logits.expand(3, 3), torch.tensor([0, 1, 2]), 6.0, None)
    torch.testing.assert_close(every, -torch.tensor(8 / 343).log() / 6)
    torch.testing.assert_close(loss.scores(logits), torch.full((1, 2), 1 / 3))


def test_the_shown_loss_is_the_built_in_one():
    (code,) = blocks("benchmark.md", "python")
    namespace: dict = {"__name__": "logit_adjusted"}
    exec(code, namespace)
    categories = [
        Category(id=count, name=f"class{count}", frequency="r", image_count=count) for count in (0, 3, 50)
    ]
    shown, ours = (
        namespace["LogitAdjusted"](categories),
        build_classification_loss("logit_adjusted", categories),
    )
    logits, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    rows = rows_of([0] * 8)
    torch.testing.assert_close(ours(logits, labels, 8.0, rows), shown(logits, labels, 8.0, rows))
    torch.testing.assert_close(ours.scores(logits), shown.scores(logits))


def test_the_table_of_losses_has_their_options_and_defaults():
    """Of every loss and calibration that is there; each is built as the table writes it."""
    section = text_of("benchmark.md").split("## Losses")[1].split("\n## ")[0]
    shown = re.findall(r"^\| `(\w+)(\([^`]*\))?` \|", section, flags=re.M)
    assert set(CLASSIFICATION_LOSSES) | set(CALIBRATIONS) <= {name for name, _ in shown}
    for name, options in shown:
        if name not in CLASSIFICATION_LOSSES and name not in CALIBRATIONS:
            continue
        built = CLASSIFICATION_LOSSES.get(name) or CALIBRATIONS[name]
        _, given = read_call(name + options, name)
        check_options(given, built, name)
        parameters = inspect.signature(built.__init__).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
        defaults.pop("pcb_start", None)  # explained below the table: 2/3 is no literal
        assert given == defaults, name


def test_shown_studies_are_studies(tmp_path):
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    write_named(tmp_path, blocks("benchmark.md", "yaml"))
    studies = [Study.load(path) for path in sorted(tmp_path.glob("*.yaml"))]
    assert [study.name for study in studies] == ["losses", "temperature"]
    for study in studies:
        for row in study.rows:
            study.run(row, 0, [])


def test_the_long_tail_and_the_splits_are_those_of_the_benchmark():
    spec, text = ShapesSpec(), " ".join(text_of("benchmark.md").split())
    order = frequency_order()
    counts = train_image_counts(spec)[order]
    for group, name in (
        (counts[counts > 100], "frequent, more than 100"),
        (counts[(counts > 10) & (counts <= 100)], "common, 11 to 100"),
        (counts[counts <= 10], "rare, 1 to 10"),
    ):
        assert f"| {name} | {len(group)} | {' '.join(map(str, group))} |" in text
    first, last = (CLASS_NAMES[order[rank]] for rank in (0, -1))
    (val_count,) = set(val_image_counts(spec).tolist())
    sides, image_level_sides = (
        f"{low} to {high}" for low, high in (spec.object_size, spec.image_level_object_size)
    )
    for part in (
        f"`{first}` is the most frequent class, `{last}` the rarest",
        f"That is {counts.sum()} objects; the head has {counts[0] // counts[-1]} times",
        f"| training scenes (instance-level) | {spec.train_images} | 1 to {spec.max_objects} whole objects, "
        f"sides {sides} of the image's",
        f"| validation scenes | {spec.val_images} | the same | balanced: each class in {val_count} images |",
        f"| image-level images | {len(CLASS_NAMES) * spec.image_level_per_class} | one object, "
        f"{image_level_sides} of the side",
        f"balanced: {spec.image_level_per_class} images per class |",
        f"JPEGs of {spec.image_size} x {spec.image_level_size} pixels",
        f"data seed {spec.seed}**",
    ):
        assert part in text


def test_the_settings_that_differ_from_the_papers_are_told():
    """All of them and no other, both values, but for the data sets and their files."""
    ours, paper = (
        flatten(config_to_dict(load_config(path)))
        for path in (CONFIG, REPOSITORY / "configs" / "lvis_v1" / "clis_r50.yaml")
    )
    section = text_of("benchmark.md").split("## Network and recipe")[1].split("\n## ")[0]
    told = {
        field: (yaml.safe_load(here), yaml.safe_load(there))
        for field, here, there in re.findall(r"`([\w.]+)` ([^(`]+) \((.*?)\)", section)
    }
    files = {"generate", "train", "train_images", "val", "val_images", "image_level", "drop_unmatched",
             "drop_invalid", "max_bad_images"}  # fmt: skip
    silent = {*RESUMABLE, "regions.detector", *(f"data.{name}" for name in files)}
    assert told == {
        field: (value, paper[field])
        for field, value in ours.items()
        if value != paper[field] and field not in silent
    }


def test_every_command_and_field_that_the_docs_name_is_there():
    """Commands of `python -m clis`, and `section.field` names."""
    known = subprocess.run(
        [sys.executable, "-m", "clis", "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ).stdout  # fmt: skip
    fields = set(flatten(config_to_dict(Config())))
    sections = "|".join(config_to_dict(Config()))
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        text = path.read_text()
        for command in re.findall(r"python -m clis (\w+)", text):
            assert re.search(rf"^\s+{command}\b", known, flags=re.M), (path.name, command)
        for field in re.findall(rf"`((?:{sections})(?:\.\w+)+)", text):
            in_api = field.removeprefix("clis.") in clis.__all__
            is_section = any(each.startswith(f"{field}.") for each in fields)
            is_file = Path(field).suffix in (".py", ".npy", ".yaml", ".json")
            assert field in fields or in_api or is_section or is_file, (path.name, field)
