"""Figures: what is drawn is what the files say."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from runs import BASELINE, SHORT

from clis import figures
from clis.__main__ import main
from clis.commands import plot, run_verb
from clis.commands.arguments import read_names
from clis.commands.plot import PlottedRun
from clis.data.annotations import pack_annotations
from clis.engine.evaluate import load_validation
from clis.metric.detections import Detections
from clis.study.figure import study_figure


@pytest.fixture(scope="module")
def runs(finished) -> list[PlottedRun]:
    return [PlottedRun.read(folder) for folder in (finished / "detector", finished)]


@pytest.fixture(scope="module")
def annotations(runs, finished):
    from clis.engine.checkpoint import load_detector

    detector = load_detector(finished / "checkpoints" / "last.pt")
    return load_validation(runs[0].config, detector.categories, "the detector")


def test_the_command_writes_four_pictures(finished, tmp_path, capsys):
    main(["plot", str(finished), str(finished / "detector"), f"--out={tmp_path / 'new'}", "--images=2"])
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == [f"{name}.png" for name in plot.RUN_FIGURES]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000 for file in files)
    assert str(files[0]) in capsys.readouterr().out
    main(["plot", str(finished), f"--out={tmp_path / 'none'}", "--images=0"])
    assert not (tmp_path / "none" / "images.png").exists()
    with pytest.raises(SystemExit):
        main(["plot", str(finished), "--images=-1"])
    assert "--images: '-1' is not a number of at least 0" in capsys.readouterr().err


def run_with(run: PlottedRun, *, name: str | None = None, **changed) -> PlottedRun:
    """The run under this name, with these fields of its state."""
    return dataclasses.replace(run, name=name or run.name, state=dataclasses.replace(run.state, **changed))


def dots(ax) -> list[float]:
    """The means in a panel of a dot plot, from the top: what `errorbar` draws."""
    places = sorted(
        ((*container.lines[0].get_xydata()[0],) for container in ax.containers), key=lambda p: p[1]
    )
    return [round(float(x), 6) for x, _ in places]


def test_dots_are_means_with_single_runs_and_undefined_figures_are_left_out(runs):
    """Two runs of one name, AP 25 and 35: the dot is at 30, rings at both. APc is -1: its panel is empty."""
    metrics = {"AP": 0.25, "APr": 0.5, "APc": -1.0, "APf": 0.1}
    first = run_with(runs[0], name="ours", result=metrics)
    second = run_with(first, result=metrics | {"AP": 0.35})
    alone = run_with(first, name="alone")
    panels = plot.frequency_dots([first, alone, second]).axes
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["ours  (n = 2)", "alone  (n = 1)"]
    assert dots(panels[0]) == [30, 25]
    assert sorted(panels[0].lines[0].get_xdata()) == pytest.approx([25, 35])
    assert dots(panels[1]) == [50, 50]
    assert dots(panels[2]) == []


def test_figures_that_are_undefined_or_not_there_are_gaps(runs):
    """AP is -1 where no ground truth counts; eval.json may have AP alone."""
    run = run_with(runs[0], evaluations=[(2, {"AP": -1.0}), (4, {"AP": 0.2})], result={"AP": 0.25})
    _, ap = plot.training_curves([run]).axes
    np.testing.assert_equal(ap.lines[0].get_ydata(), [np.nan, 20, 25])
    assert [dots(panel) for panel in plot.frequency_dots([run]).axes] == [[25], [], [], []]


def test_curves_begin_with_the_first_record_and_end_with_the_last_evaluation(runs):
    """40 records of loss 0..39: the first and the last point are those values, the second is the mean of the
    first three. The raw values are there too. One evaluation alone is no curve."""
    records = [{"step": step + 1, "loss": float(step)} for step in range(40)]
    records.insert(20, {"step": 99, "loss": None})  # of a step that was left out
    evaluations = [(15, {"AP": 0.125}), (40, {"AP": 0.25})]
    run = run_with(runs[0], records=records, evaluations=evaluations, result=None)
    loss, ap = plot.training_curves([run]).axes
    raw, smooth = loss.lines
    assert list(raw.get_ydata()) == list(range(40))
    steps, values = smooth.get_data()
    assert (steps[0], values[0], steps[-1], values[-1]) == pytest.approx((1, 0, 40, 39))
    assert values[1] == pytest.approx(1)
    steps, values = ap.lines[0].get_data()
    assert (list(steps), list(values)) == ([15, 40], [12.5, 25.0])
    assert len(plot.training_curves([run_with(run, evaluations=evaluations[1:])]).axes) == 1


def test_images_of_the_rarest_classes_come_first(annotations):
    """Counts are made so that class 7 is the rarest and class 3 the next that is there at all."""
    counts = {7: 1, 3: 2}
    categories = tuple(
        dataclasses.replace(category, image_count=counts.get(label, 100))
        for label, category in enumerate(annotations.categories)
    )
    changed = dataclasses.replace(annotations, categories=categories)
    first, second = plot.rarest_images(changed, 2)
    assert 7 in changed.labels_of(first)
    assert 3 in changed.labels_of(second)
    assert first != second
    assert len(set(plot.rarest_images(changed, 10))) == 10
    assert plot.rarest_images(changed, 0) == []


def test_boxes_of_truth_and_of_detections_above_the_score(runs, annotations):
    """Each rectangle is a box, in pixels of the image; the lowest scores are not drawn."""
    run = runs[1]
    (row,) = plot.rarest_images(annotations, 1)
    score = float(np.median(run.detections.score[run.detections.image_id == annotations.image_ids[row]]))
    truth, found = plot.boxes_on_images([run], annotations, 1, score).axes
    drawn = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in truth.patches]
    own = slice(annotations.offsets[row], annotations.offsets[row + 1])
    np.testing.assert_allclose(drawn, annotations.bboxes[own], atol=1e-4)
    boxes = drawn_boxes(run, annotations, row, score)
    missed = len(found.patches) - len(boxes)
    drawn = np.array([[*p.get_xy(), p.get_width(), p.get_height()] for p in found.patches])[missed:]
    assert 0 < len(drawn) < (run.detections.image_id == annotations.image_ids[row]).sum()
    drawn[:, 2:] += drawn[:, :2]
    np.testing.assert_allclose(drawn, boxes[::-1], atol=1e-3)  # the best one on top


def drawn_boxes(run, annotations, row: int, score: float) -> np.ndarray:
    """Boxes xyxy that are drawn, best first."""
    found = run.detections
    own = np.flatnonzero((found.image_id == annotations.image_ids[row]) & (found.score >= score))
    own = own[np.argsort(-found.score[own], kind="stable")]
    boxes = found.bbox[own].copy()
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def document(federated: bool) -> dict:
    """One image of 100 x 50 with a cat at the left and a dog at the right; there is no owl, and nobody
    looked for a bat."""
    image = {"id": 7, "width": 100, "height": 50, "file_name": "7.jpg"}
    if federated:
        image |= {"neg_category_ids": [3], "not_exhaustive_category_ids": []}
    boxes = [(1, [0, 0, 20, 20]), (2, [60, 0, 20, 20])]
    return {
        "images": [image],
        "categories": [
            {"id": number, "name": name, "frequency": "r", "image_count": 1, "instance_count": 1}
            for number, name in enumerate(("cat", "dog", "owl", "bat"), 1)
        ],
        "annotations": [
            {"id": 10 + place, "image_id": 7, "category_id": category, "bbox": box, "area": 400}
            for place, (category, box) in enumerate(boxes)
        ],
    }


def photo_run(run: PlottedRun, folder, boxes: list, labels: list, scores: list) -> PlottedRun:
    """A run with these detections, x y w h, in the image of `document`, which is made in the folder."""
    data = dataclasses.replace(run.config.data, root=str(folder), val_images="")
    Image.new("RGB", (100, 50)).save(folder / "7.jpg")
    detections = Detections(
        image_id=np.full(len(boxes), 7), category_id=np.array(labels, np.int64),
        bbox=np.array(boxes, np.float64).reshape(-1, 4), score=np.array(scores, np.float64),
    )  # fmt: skip
    moved = run_with(run, config=dataclasses.replace(run.config, data=data))
    return dataclasses.replace(moved, detections=detections)


@pytest.mark.parametrize("federated", [True, False])
def test_boxes_are_drawn_by_the_verdicts_of_the_metric(runs, tmp_path, federated):
    """By score: a cat on the cat, a second one on it, an owl on the cat, a cat on nothing, a dog that has an
    IoU of a third with the dog, a bat on nothing. Without the last two nothing is on the dog."""
    boxes = [
        [0, 0, 20, 20],
        [1, 0, 20, 20],
        [0, 0, 20, 18],
        [30, 0, 20, 20],
        [70, 0, 20, 20],
        [30, 20, 20, 20],
    ]
    run = photo_run(runs[0], tmp_path, boxes, [1, 1, 3, 1, 2, 4], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    annotations = pack_annotations(document(federated), "test.json")

    def drawn(score: float) -> list[str]:
        name_of = {figures.matplotlib.colors.to_rgba(color): name for name, (color, _) in plot.LOOKS.items()}
        _, found = plot.boxes_on_images([run], annotations, 1, score).axes
        return [name_of[patch.get_edgecolor()] for patch in found.patches][::-1]

    bat = "not judged" if federated else "nothing there"
    assert drawn(0.3) == ["right", "duplicate", "wrong class", "nothing there", "box off", bat]
    assert drawn(0.55) == ["right", "duplicate", "wrong class", "nothing there", "missed"]


def test_a_box_of_a_class_that_the_data_set_does_not_have_is_drawn_with_a_question_mark(runs, tmp_path):
    run = photo_run(runs[0], tmp_path, [[0, 0, 20, 20]], [77], [0.9])
    with pytest.warns(UserWarning, match="1 detections have category ids"):
        figure = plot.boxes_on_images([run], pack_annotations(document(False), "test.json"), 1, 0.5)
    assert [text.get_text() for text in figure.axes[1].texts] == ["cat", "dog", "? 0.90"]


def test_figures_and_rows_that_would_hide_each_other_are_refused(tmp_path):
    folders = [tmp_path / name / "components" for name in ("shapes", "groceries")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "study.json").write_text(json.dumps({"overrides": [], "rows": ROWS}))
    with pytest.raises(ValueError, match="named after the last part; plot them apart"):
        main(["plot", *map(str, folders), f"--out={tmp_path / 'out'}"])
    study = shutil.copytree(folders[0], tmp_path / "curves")  # as one of the figures of runs
    with pytest.raises(ValueError, match="curves and the runs: figures of studies are named after"):
        main(["plot", str(study), str(tmp_path / "run"), f"--out={tmp_path / 'out'}"])
    with pytest.raises(ValueError, match="two rows would be called 'ours'"):
        main(["plot", str(folders[0]), "--names", "first=ours", "more=ours", f"--out={tmp_path / 'out'}"])
    (folders[0] / "study.json").write_text("{}")
    with pytest.raises(ValueError, match=r"study\.json: no record of a study"):
        main(["plot", str(folders[0]), f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_names_are_given_by_the_last_part_of_a_path_too():
    known = ["runs/clis", "runs/a=b", "w/o ILS"]
    given = ["clis=CLIS", "runs/a=b/=second", "w/o ILS=third"]
    assert read_names(given, known) == {"runs/clis": "CLIS", "runs/a=b": "second", "w/o ILS": "third"}
    assert read_names(["clis=s=4, t=1", "a=b=c"], known) == {"runs/clis": "s=4, t=1", "runs/a=b": "c"}
    for wrong in ("s=4", "clis=", "=x", "clis"):
        with pytest.raises(ValueError, match="write A=B, where A is one of: runs/clis, "):
            read_names([wrong], known)


def test_any_name_is_in_the_legend_as_it_is(runs, annotations):
    """Others leave out a leading _, and set what is between two $ as a formula; ticks are numbers."""
    named = [run_with(runs[0], name=name) for name in ("_$a$", "b", "_$a$")]
    study = {"rows": {"_$a$": ROWS["first"], "b": ROWS["more"]}, "classes": {"1-9": 8}}
    for figure, names in (
        (plot.training_curves(named), ["_$a$", "b"]),
        (plot.ap_against_images(named, annotations), ["_$a$", "b"]),
        (study_figure(study, "$x$"), ["_$a$ (n = 2)", "b (n = 3)"]),
    ):
        texts = figure.axes[0].get_legend().get_texts()
        assert [text.get_text() for text in texts] == names
        assert not texts[0].get_parse_math()
        figure.draw_without_rendering()
        ticks = [label.get_text() for ax in figure.axes for label in ax.get_xticklabels(which="both")]
        assert not any("$" in tick for tick in ticks)


def test_wide_images_leave_no_empty_rows(runs, tmp_path):
    """An image of 100 x 50 gets half the height of a square one: two columns of 3.2 inches are 1.6 high."""
    annotations = pack_annotations(document(False), "test.json")
    figure = plot.boxes_on_images([photo_run(runs[0], tmp_path, [], [], [])], annotations, 1, 0.5)
    width, height = figure.get_size_inches()
    assert (width, height) == pytest.approx((6.4, 1.6 + 0.25 + 0.4))


def test_a_point_a_class_over_its_training_images(runs, annotations):
    (ax,) = plot.ap_against_images([runs[1]], annotations).axes
    (points,) = ax.collections
    x = points.get_offsets()[:, 0]
    present = np.unique(annotations.labels)
    counts = np.array([annotations.categories[label].image_count for label in present])
    assert sorted(x.tolist()) == sorted(counts.clip(min=1).tolist())


def test_a_place_that_cannot_be_written_is_known_before_the_work(finished, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(plot, "plot", None)
    with pytest.raises(OSError, match=r"file/curves.png: cannot be written \(Not a directory\)"):
        run_verb("plot", [str(finished), f"--out={tmp_path / 'file'}"])


def test_runs_that_are_not_there_or_of_other_data(runs, tmp_path, data, finished):
    with pytest.raises(FileNotFoundError, match=r"config\.yaml: no such file; name run folders"):
        plot.plot([tmp_path], tmp_path, images=1, score=0.5)
    val = (data / "shapes" / "val.json").read_text()
    (data / "shapes" / "copy.json").write_text(val)
    arguments = ["--config", BASELINE, *SHORT, f"data.root={data}", f"output={tmp_path / 'other'}"]
    run_verb("train", [*arguments, "train.steps=1", "data.val=shapes/copy.json"])
    with pytest.raises(ValueError, match=r"other has data\.val .*copy\.json, .*; plot them apart"):
        plot.plot([finished, tmp_path / "other"], tmp_path, images=1, score=0.5)


def test_an_unfinished_run_is_drawn_as_far_as_it_is(finished, tmp_path, capsys):
    """Without an evaluation there are the curves alone, and what is missing is said; with one on the way the
    figures are of that."""
    copy = tmp_path / "half"
    shutil.copytree(finished, copy)
    for name in ("eval.json", "detections.npz"):
        (copy / name).unlink()
    paths = plot.plot([copy], tmp_path / "out", images=1, score=0.5, suffix="svg")
    assert [path.name for path in paths] == ["curves.svg"]
    assert "half: not finished, step 4 of 4, no evaluation yet" in capsys.readouterr().out

    metrics = json.loads((finished / "eval.json").read_text())
    evaluation = copy / "evaluations" / "step_00000002"
    evaluation.mkdir(parents=True)
    for name in ("eval.json", "detections.npz"):
        shutil.copy(finished / name, evaluation / name)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "AP": metrics["AP"]}) + "\n" + '{"step": 3, "lo')  # being written
    run = PlottedRun.read(copy)
    assert run.state.every_evaluation == [(2, {"AP": metrics["AP"]})]
    assert len(run.detections) == len(PlottedRun.read(finished).detections)


def figures_of(ap: float, rare: float) -> dict:
    bins = {"1-9": rare, "10-99": ap, "100-400": ap + 6}
    return {"key": "", "AP": ap, "APr": rare, "APc": 3.0, "APf": -100.0, "by_images": bins}


ROWS = {
    "first": {"runs": {"0": figures_of(10.0, 1.0), "1": figures_of(14.0, 1.0)}},
    "more": {"runs": {"0": figures_of(20.0, 4.0), "1": figures_of(26.0, 8.0), "2": figures_of(99.0, 99.0)}},
    "not run": {"runs": {}},
}


def test_a_study_of_few_rows_has_means_and_gains_over_the_first():
    """Gains are of equal seeds: (20 - 10, 26 - 14) = 10 and 12, mean 11; seed 2 of `more` has no partner. The
    last bin is one class, so it is joined with the one before: of 10 to 400 images, both with gain 11."""
    classes = {"1-9": 8, "10-99": 4, "100-400": 1}
    means, gains = study_figure({"rows": ROWS, "classes": classes}, "a study").axes
    assert means.get_legend_handles_labels()[1] == ["first (n = 2)", "more (n = 3)"]
    by_row = [line for line in means.lines if len(line.get_ydata()) == 1 and line.get_markersize() == 6]
    assert by_row[0].get_ydata()[0] == pytest.approx(12.0)
    line = next(line for line in gains.lines if len(line.get_xdata()) == 2 and line.get_marker() == "s")
    assert line.get_xdata() == pytest.approx([3, (10 * 400) ** 0.5])
    assert line.get_ydata() == pytest.approx([(3 + 7) / 2, 11])
    assert [text.get_text() for text in gains.texts] == ["n=8", "n=5"]
    assert gains.get_ylabel() == "delta AP vs first"


def test_a_sweep_is_a_line_over_its_values_with_the_other_rows_beside():
    """Rows at 0.5 and 0, in the other order in the file; APs 23 and 12 are means of the seeds."""
    rows = {
        "half": {"at": 0.5, "runs": {"0": figures_of(20.0, 4.0), "1": figures_of(26.0, 8.0)}},
        "none": ROWS["first"] | {"at": 0},
        "other": {"at": None, "runs": {"0": figures_of(7.0, 2.0)}},
    }
    line, beside = study_figure({"rows": rows, "axis": "alpha"}, "a study").axes
    means = next(each for each in line.lines if each.get_label() == "AP (all)")
    assert (list(means.get_xdata()), list(means.get_ydata())) == ([0, 0.5], pytest.approx([12, 23]))
    assert line.get_xlabel() == "alpha"
    assert "1 to 2 runs a point" in line.get_title(loc="left")
    assert [text.get_text() for text in beside.get_xticklabels()] == ["other"]


def test_many_rows_are_a_dot_plot_and_none_is_said():
    rows = {f"row {number}": ROWS["first"] for number in range(6)}
    panels = study_figure({"rows": rows}, "a study").axes
    assert len(panels) == 4
    assert dots(panels[0]) == [12] * 6
    nothing = study_figure({"rows": {"not run": {"runs": {}}}}, "a study")
    assert "no run is recorded" in nothing.get_suptitle()


def test_a_study_by_the_command_with_chosen_rows_and_names(tmp_path, capsys):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"overrides": [], "rows": ROWS}))
    out = f"--out={tmp_path / 'out'}"
    main(["plot", str(folder), out, "--format=svg", "--rows", "more", "first", "--names", "more=CLIS"])
    text = (tmp_path / "out" / "small.svg").read_text()
    assert "CLIS (n = 3)" in text
    assert "delta AP vs CLIS" in text
    for arguments, message in (
        (["--rows", "most"], "has no row 'most'; it has 'first', 'more', 'not run'"),
        (["--names", "most=x"], "--names most=x: write A=B, where A is one of: first, more, not run"),
        (["--names", "most"], "--names most: write A=B"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            main(["plot", str(folder), out, *arguments])
    with pytest.raises(ValueError, match=r"--score 7: must be between 0 and 1"):
        main(["plot", str(folder), out, "--score=7"])
    with pytest.raises(ValueError, match="--rows chooses rows of studies"):
        main(["plot", str(tmp_path), out, "--rows", "a"])


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_equal_figures_are_equal_files(tmp_path, suffix):
    for name in ("a", "b"):
        figures.save(study_figure({"rows": ROWS}, "a study"), tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_looks_differ_for_as_many_series_as_there_are_pairs():
    looks = [tuple(figures.look(number).values()) for number in range(63)]
    assert len(set(looks)) == 63
