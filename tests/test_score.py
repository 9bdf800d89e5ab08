"""The command `evaluate.py --annotations FILE --results FILE`."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lvis_cases import detections_of, random_case, with_masks
from runs import REPOSITORY

from clis.commands import run_verb
from clis.metric.lvis_eval import evaluate


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    data, rows = random_case(rng, federated=True)
    with_masks(data, rows, rng, keep_boxes=True)
    (tmp_path / "gt.json").write_text(json.dumps(data))
    (tmp_path / "dt.json").write_text(json.dumps(rows))
    (tmp_path / "half.json").write_text(json.dumps(rows[::2]))
    detections_of(rows).save(tmp_path / "dt.npz")
    return tmp_path


def run(files: Path, *options: str, results: str = "dt.json") -> None:
    run_verb("score", ["--annotations", str(files / "gt.json"), "--results", str(files / results), *options])


def test_prints_and_writes_the_figures(files: Path, capsys: pytest.CaptureFixture) -> None:
    run(files, "--out", str(files / "eval.json"), "--per-class", str(files / "classes.csv"))
    expected = evaluate(files / "gt.json", files / "dt.json")
    assert json.loads((files / "eval.json").read_text()) == expected
    printed = capsys.readouterr().out
    assert re.search(rf"^\| AP +\| +{100 * expected['AP']:.1f} \|$", printed, re.MULTILINE)
    assert "AP against training images" in printed
    assert (
        (files / "classes.csv").read_text().startswith("id,name,frequency,train_images,images,instances,AP,")
    )


@pytest.mark.parametrize("options", [[], ["--masks"]])
@pytest.mark.parametrize("results", ["dt.json", "dt.npz"])
def test_official_agrees(
    files: Path, options: list[str], results: str, capsys: pytest.CaptureFixture
) -> None:
    had_float = "float" in vars(np)
    if options and results == "dt.npz":
        with pytest.raises(ValueError, match=r"dt.npz: an .npz file holds boxes alone"):
            run(files, *options, results=results)
        return
    run(files, "--official", *options, results=results)
    last = capsys.readouterr().out.splitlines()[-1]
    by_figure, by_curve = (float(part.split()[0]) for part in last.partition(": ")[2].split(", "))
    assert last.startswith("largest difference")
    assert max(by_figure, by_curve) < 1e-9
    assert ("float" in vars(np)) == had_float  # the repair of NumPy for lvis is gone again


def test_comparison_and_errors(files: Path, capsys: pytest.CaptureFixture) -> None:
    run(files, "--errors", "--compare", str(files / "half.json"), "--samples", "20")
    printed = capsys.readouterr().out
    difference = (
        evaluate(files / "gt.json", files / "dt.json")["AP"]
        - evaluate(files / "gt.json", files / "half.json")["AP"]
    )
    assert f"   AP {100 * difference:+.1f}  (" in printed
    for error in ("class", "location", "both", "duplicate", "background", "missed"):
        assert f"| {error} " in printed
    assert "boxes alone, classes erased: AP " in printed


@pytest.mark.parametrize("protocol", ["fixed", "pooled"])
def test_results_are_compared_by_any_protocol(
    files: Path, protocol: str, capsys: pytest.CaptureFixture
) -> None:
    options = ["--protocol", protocol]
    run(files, *options, "--compare", str(files / "half.json"), "--samples", "20")
    figures = [
        evaluate(files / "gt.json", files / name, protocol=protocol) for name in ("dt.json", "half.json")
    ]
    difference = 100 * (figures[0][f"{protocol}_AP"] - figures[1][f"{protocol}_AP"])
    printed = capsys.readouterr().out
    assert re.search(rf"^ +{protocol}_AP {re.escape(f'{difference:+.1f}')}  \(", printed, re.MULTILINE)
    run(files, *options, "--compare", str(files / "dt.json"), "--samples", "5")
    assert f"{protocol}_AP +0.0  (+0.0 .. +0.0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda x, y, w, h: [x, y, x + w, y + h], "boxes reach beyond their images; are they x1, y1, x2, y2"),
        (lambda x, y, w, h: [x / 640, y / 480, w / 640, h / 480], "all boxes are within 0..1"),
    ],
)
def test_boxes_of_another_form_are_suspected(tmp_path, capsys, changed, said):
    """Boxes in the lower right of their images; as they should be, nothing is said."""
    boxes = [[400, 300, 100, 90], [350, 250, 200, 100], [500, 400, 100, 60]]
    truth = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 480, "width": 640}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": box} for n, box in enumerate(boxes, 1)
        ],
    }
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    for name, form in (("dt.json", lambda *box: box), ("other.json", changed)):
        rows = [{"image_id": 1, "category_id": 1, "bbox": list(form(*box)), "score": 0.5} for box in boxes]
        (tmp_path / name).write_text(json.dumps(rows))
    run(tmp_path)
    assert said not in capsys.readouterr().out
    run(tmp_path, results="other.json")
    assert said in capsys.readouterr().out


def test_a_file_that_is_missing_is_named_first(files: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--results .*none.json: no such file"):
        run(files, results="none.json")


def test_a_place_that_cannot_be_written_is_known_before_the_work(files: Path) -> None:
    (files / "none.json").write_text("read only after that")
    with pytest.raises(IsADirectoryError, match=f"{files}: is a folder; name a file"):
        run(files, "--out", str(files), results="none.json")
    path = files / "gt.json" / "below" / "classes.csv"
    with pytest.raises(OSError, match=rf"^{path}: cannot be written \(Not a directory\); name another"):
        run(files, "--per-class", str(path), results="none.json")


def test_of_two_results_that_of_another_split_is_named(files: Path) -> None:
    other = [{"image_id": 9999, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}]
    (files / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"/other\.json: 1 detections have image ids that .*row 0: 9999"):
        run(files, "--compare", str(files / "other.json"))


def test_no_file_is_written_over_one_that_is_read_or_another_one_that_is_written(files: Path) -> None:
    before = {path: path.read_bytes() for path in files.iterdir()}
    (files / "link.json").symlink_to("dt.json")
    for options, message in (
        (["--out", str(files / "link.json")], "--out .*link.json: would replace the file of --results"),
        (["--per-class", str(files / "gt.json")], "--per-class .*: would replace the file of --annotations"),
        (["--out", str(files / "new"), "--per-class", str(files / "new")], "replace the file of --out; name"),
    ):
        with pytest.raises(ValueError, match=message):
            run(files, *options)
    (files / "link.json").unlink()
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_protocols_have_their_own_names(files: Path, capsys: pytest.CaptureFixture) -> None:
    for protocol in ("fixed", "pooled"):
        run(files, "--protocol", protocol, "--out", str(files / "eval.json"))
        assert all(name.startswith(f"{protocol}_") for name in json.loads((files / "eval.json").read_text()))
        assert "AP against training images" not in capsys.readouterr().out


def test_groups_come_from_the_training_file(files: Path, capsys: pytest.CaptureFixture) -> None:
    data = json.loads((files / "gt.json").read_text())
    for category in data["categories"]:
        category.update(frequency="f", image_count=1000)
    (files / "train.json").write_text(json.dumps(data))
    run(files, "--train-annotations", str(files / "train.json"), "--out", str(files / "eval.json"))
    assert "does not say" not in capsys.readouterr().out
    for category in data["categories"]:
        del category["frequency"], category["image_count"]
    (files / "gt.json").write_text(json.dumps(data))
    run(files)
    assert "gt.json does not say which classes are rare" in capsys.readouterr().out
    run(files, "--train-annotations", str(files / "train.json"), "--out", str(files / "eval.json"))
    assert "does not say" not in capsys.readouterr().out
    figures = json.loads((files / "eval.json").read_text())
    assert figures["APf"] == figures["AP"] > 0
    assert figures["APr"] == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--errors", "--masks"], "--errors looks at boxes"),
        (["--protocol", "fixed", "--official"], "--official goes with the standard protocol"),
        (["--protocol", "pooled", "--errors"], "--errors goes with the standard protocol"),
        (["--samples", "0"], "--samples 0: at least 1"),
        (
            ["--protocol", "fixed", "--max-detections", "5"],
            "--max-detections goes with the standard protocol",
        ),
        (["--protocol", "pooled", "--per-class", "c.csv"], "--per-class does not go with --protocol pooled"),
        (["--official", "--train-annotations", "t.json"], "--official takes the groups of --annotations"),
    ],
)
def test_contradictions_are_refused(files: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(files, *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: checkpoint"),
        (["--results", "r.json"], "required: --annotations"),
        (["c.pt", "--annotations", "a.json", "--results", "r.json"], "unrecognized arguments: c.pt"),
        (["c.pt", "--errors", "--protocol", "fixed"], "unrecognized arguments: --errors --protocol"),
    ],
)
def test_evaluate_takes_a_checkpoint_or_result_files(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "evaluate.py"), run_name="__main__")
    assert message in capsys.readouterr().err


def test_an_empty_result_list_is_zero(files: Path) -> None:
    (files / "dt.json").write_text("[]")
    run(files, "--out", str(files / "eval.json"), "--errors")
    assert json.loads((files / "eval.json").read_text())["AP"] == 0
    with pytest.raises(ValueError, match=r"the published package fails on .*at least one detection"):
        run(files, "--official")


def test_evaluating_a_checkpoint_does_not_load_the_published_packages() -> None:
    code = "import sys, clis.engine.evaluate; sys.exit('lvis' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
