"""An exported program finds what the detector finds, on images that it was not exported with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from runs import OLD_TORCH

from clis.__main__ import main
from clis.boxes import nms_top_k
from clis.commands.export import CATEGORIES, agreement
from clis.commands.export_program import nms_of_best
from clis.engine.checkpoint import load_checkpoint, load_detector

pytestmark = pytest.mark.skipif(OLD_TORCH, reason="needs torch 2.11")

SIZE = (50, 70)


@pytest.fixture(scope="module")
def checkpoint(finished):
    return finished / "checkpoints" / "last.pt"


@pytest.fixture(scope="module")
def program(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "detector.pt2"
    main(["export", str(checkpoint), str(out), "--candidates", "3000", "--size", *map(str, SIZE)])
    return out


def images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(256, (3, *SIZE), dtype=torch.uint8, generator=generator)
    block = torch.full((3, *SIZE), 90, dtype=torch.uint8)
    block[:, 10:35, 20:52] = 240
    return {"noise": noise, "nothing": torch.zeros_like(noise), "a block": block}


def test_it_gives_the_detectors_detections(checkpoint, program):
    """Boxes in pixels of the given image, which is resized to a short side of 48 inside; bit for bit
    the detections of a detector in the program's layout."""
    exported = torch.export.load(program).module()
    detector = load_detector(checkpoint).to(memory_format=torch.contiguous_format)  # the program's
    found_any = False
    for name, image in images().items():
        expected = detector.detect([image])[0]
        boxes, scores, labels = exported(image)
        assert torch.equal(boxes, expected.boxes), name
        assert torch.equal(scores, expected.scores), name
        assert torch.equal(labels, expected.labels), name
        found_any |= len(boxes) > 0
    assert found_any


@pytest.fixture(scope="module")
def any_size(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("any") / 'my "own" detector.pt2'
    main(["export", str(checkpoint), str(out), "--candidates", "3000"])
    return out


def test_a_program_takes_images_of_any_size(checkpoint, any_size):
    """The resize and the canvas of 64 x 64 are inside: bit for bit the detections of `detect`, in images that
    are smaller, of the canvas's size, and far larger, in both orientations."""
    exported = torch.export.load(any_size).module()
    detector = load_detector(checkpoint).to(memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(6)
    for size in ((20, 31), (48, 64), (64, 48), (48, 48), (200, 333), (333, 77)):
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)
        image[:, 5:15, 4:18] = 240
        expected = detector.detect([image])[0]
        boxes, scores, labels = exported(image)
        assert len(boxes) > 0
        assert torch.equal(boxes, expected.boxes), size
        assert torch.equal(scores, expected.scores), size
        assert torch.equal(labels, expected.labels), size


def test_the_script_beside_it_needs_no_code_of_ours(any_size, tmp_path):
    """It is run where `clis` cannot be imported, for an image that its EXIF tag turns; with the threshold
    lowered, since this detector is hardly trained."""
    script = any_size.with_name('my "own" detector_run.py')
    assert len(script.read_text().splitlines()) <= 24
    for source in (any_size, script):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    text = (tmp_path / script.name).read_text()
    (tmp_path / "all.py").write_text(text.replace(">= 0.3", ">= 0"))
    (tmp_path / "text.jpg").write_text("no image")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    noise = np.random.default_rng(0).integers(256, size=(40, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg", exif=exif)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['clis'] = None; import runpy; "
         "sys.argv = ['', 'text.jpg', 'noise.jpg']; "
         f"runpy.run_path({script.name!r}); runpy.run_path('all.py')"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    unreadable, nothing, again, *lines = done.stdout.splitlines()
    assert unreadable == again
    assert unreadable.startswith("text.jpg cannot be used: ")
    assert nothing.startswith("noise.jpg nothing above 0.3; the best score is 0.")
    assert lines
    boxes = [json.loads(line[line.index("[") :]) for line in lines]
    assert all(line.startswith("noise.jpg ") for line in lines)
    assert max(box[2] for box in boxes) <= 40 < max(box[3] for box in boxes) <= 80  # of the turned image


@pytest.mark.slow
def test_a_program_of_two_images_at_a_time(checkpoint, tmp_path):
    """Where the canvas is that of the batch, an image alone has less padding: the program's detections are
    those on the square canvas, which the detector has if it is told so."""
    state = load_checkpoint(checkpoint)
    state["config"]["model"]["backbone"]["canvas"] = "batch"
    torch.save(state, tmp_path / "batch.pt")
    out = tmp_path / "two.pt2"
    main(["export", str(tmp_path / "batch.pt"), str(out), "--candidates", "3000", "--batch", "2"])
    assert not (tmp_path / "two_run.py").exists()
    exported = torch.export.load(out).module()
    detector = load_detector(tmp_path / "batch.pt").to(memory_format=torch.contiguous_format)
    assert not detector.backbone.square
    detector.backbone.square = True
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(256, (2, 3, 30, 90), dtype=torch.uint8, generator=generator)
    images[0, :, 5:25, 10:30] = 200
    for found, expected in zip(exported(images), detector.detect(list(images)), strict=True):
        assert torch.equal(found[0], expected.boxes)
        assert torch.equal(found[1], expected.scores)
        assert torch.equal(found[2], expected.labels)


@pytest.mark.slow
def test_an_onnx_model_finds_the_same_by_onnxruntime(checkpoint, tmp_path):
    """Sizes other than the one it was made with; resizing in float32 may change a pixel by one."""
    pytest.importorskip("onnxruntime")
    from clis.commands.export_onnx import run_onnx

    out = tmp_path / "detector.onnx"
    main(["export", str(checkpoint), str(out), "--candidates", "3000"])
    found = run_onnx(out)
    detector = load_detector(checkpoint)
    generator = torch.Generator().manual_seed(6)
    for size in ((20, 31), (48, 64), (200, 333)):
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)
        image[:, 5:15, 4:18] = 240
        expected = detector.detect([image])[0]
        assert agreement(found(image), [expected.boxes, expected.scores, expected.labels]) >= 0.9, size


def test_agreement_by_hand():
    """Of three detections, in another order: one is found, one has another class, one is off by 2 pixels."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 2, 3])
    others = [boxes.flip(0) + torch.tensor([[2.0], [0], [0]]), scores.flip(0), torch.tensor([3, 7, 1])]
    assert agreement(others, [boxes, scores, labels]) == pytest.approx(1 / 3)
    nothing = [boxes[:0], scores[:0], labels[:0]]
    assert agreement(nothing, nothing) == 1
    assert agreement(others, nothing) == 0


def test_it_holds_its_categories_and_no_part_of_the_training(checkpoint, program):
    files = {CATEGORIES: ""}
    exported = torch.export.load(program, extra_files=files)
    names = [category["name"] for category in json.loads(files[CATEGORIES])]
    assert names == [category.name for category in load_detector(checkpoint).categories]
    assert not [name for name in exported.state_dict if "contrastive" in name or "image_class" in name]


@pytest.mark.parametrize("threshold", [-1.0, 0.4])
@pytest.mark.parametrize("min_size", [0.0, 6.0])
def test_one_turn_is_the_loop_if_the_candidates_suffice(threshold, min_size):
    """Boxes of 2 to 30 pixels in three groups, at 200 places; ties among the scores."""
    generator = torch.Generator().manual_seed(1)
    low = 60 * torch.rand(200, 2, generator=generator)
    boxes = torch.cat([low, low + 2 + 28 * torch.rand(200, 2, generator=generator)], dim=1)
    scores = (10 * torch.rand(200, generator=generator)).round() / 10
    groups = torch.randint(3, (200,), generator=generator)

    def candidates(index):
        return boxes[index], groups[index]

    expected = nms_top_k(scores, candidates, 0.5, 30, threshold, min_size)
    assert 5 < len(expected) <= 30
    for size in (150, 200):
        assert torch.equal(nms_of_best(scores, candidates, 0.5, 30, threshold, min_size, size), expected)
    few = nms_of_best(scores, candidates, 0.5, 30, threshold, min_size, 10)
    assert torch.equal(few, expected[: len(few)])  # too few candidates: the first ones, no wrong ones
    assert len(few) < len(expected)


def test_one_turn_where_nothing_counts():
    boxes = torch.tensor([[0.0, 0, 9, 9], [1, 1, 9, 9]])
    scores = torch.tensor([0.2, 0.1])
    kept = nms_of_best(scores, lambda i: (boxes[i], i * 0), 0.5, 5, 0.5, 0.0, 2)
    assert kept.tolist() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt", "out.pt2"], "no such checkpoint"),
        (["CHECKPOINT", "out.pth"], r"ends in \.pt2 or \.onnx"),
        (["CHECKPOINT", "out.onnx", "--batch", "2"], "ONNX is for the CPU and single images"),
        (["CHECKPOINT", "out.pt2", "clis.s=8"], "only the section test can change"),
        (["CHECKPOINT", "out.pt2", "test={detections: 3}", "train={seed: 3}"], "^train.seed: only the sec"),
        (["CHECKPOINT", "out.pt2", "--size", "0", "8"], "above 0"),
        (["CHECKPOINT", "out.pt2", "--candidates", "3"], "raise --candidates 3"),
        (["CHECKPOINT", "out.pt2", "--candidates", "0"], "--candidates 0: must be at least 1"),
    ],
)
def test_bad_input(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(checkpoint) if each == "CHECKPOINT" else each for each in arguments]
    if "--size" not in arguments:
        arguments += ["--size", "50", "70"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(["export", *arguments])
    assert not list(tmp_path.glob("*.pt2"))
