"""An exported program finds what the detector finds, on images that it was not exported with."""

from __future__ import annotations

import json

import pytest
import torch

from clis.__main__ import main
from clis.boxes import nms_top_k
from clis.commands.export import CATEGORIES, nms_of_best
from clis.engine.checkpoint import load_detector

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
        (["CHECKPOINT", "out.pth"], r"ends in \.pt2"),
        (["CHECKPOINT", "out.pt2", "clis.s=8"], "only the section test can change"),
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
