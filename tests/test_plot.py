"""Figures: what is drawn is what the files say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from runs import BASELINE, SHORT

from clis.__main__ import main
from clis.commands import plot, run_verb
from clis.commands.plot import FinishedRun
from clis.engine.evaluate import load_validation


@pytest.fixture(scope="module")
def runs(finished) -> list[FinishedRun]:
    return [FinishedRun.read(folder) for folder in (finished / "detector", finished)]


@pytest.fixture(scope="module")
def annotations(runs, finished):
    from clis.engine.checkpoint import load_detector

    detector = load_detector(finished / "checkpoints" / "last.pt")
    return load_validation(runs[0].config, detector.categories)


def test_the_command_writes_four_pictures(finished, tmp_path, capsys):
    main(["plot", str(finished), str(finished / "detector"), f"--out={tmp_path / 'new'}", "--images=2"])
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["curves.png", "frequency.png", "image_count.png", "images.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000 for file in files)
    assert str(files[0]) in capsys.readouterr().out


def test_bars_are_the_figures_and_undefined_ones_are_left_out(runs):
    """The small benchmark's classes are all rare: common and frequent AP are -1."""
    changed = dataclasses.replace(runs[0], figures=runs[0].figures | {"AP": 0.25, "APr": 0.5, "APc": -1})
    (ax,) = plot.frequency_bars([changed]).axes
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[:2] == [25.0, 50.0]
    assert np.isnan(heights[2])


def test_curves_are_running_means_and_end_with_the_last_evaluation(runs):
    """30 records of loss 0..29: the first point is at step 20, the mean of 0..19 = 9.5."""
    records = [{"step": step + 1, "loss": float(step)} for step in range(30)]
    records.insert(15, {"step": 15, "AP": 0.125})
    records.insert(20, {"step": 99, "loss": None})  # of a step that was left out
    run = dataclasses.replace(runs[0], records=records, figures={"AP": 0.25})
    loss, ap = plot.training_curves([run]).axes
    steps, values = loss.lines[0].get_data()
    assert (steps[0], values[0], steps[-1], values[-1]) == pytest.approx((20, 9.5, 30, 19.5))
    steps, values = ap.lines[0].get_data()
    assert list(values) == [12.5, 25.0]
    assert list(steps) == [15, run.config.train.steps]


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


def test_boxes_of_truth_and_of_detections_above_the_score(runs, annotations):
    """Each rectangle is a box, in pixels of the image; the lowest scores are not drawn."""
    run = runs[1]
    (row,) = plot.rarest_images(annotations, 1)
    score = float(np.median(run.detections.score[run.detections.image_id == annotations.image_ids[row]]))
    truth, found = plot.boxes_on_images([run], annotations, 1, score).axes
    drawn = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in truth.patches]
    own = slice(annotations.offsets[row], annotations.offsets[row + 1])
    np.testing.assert_allclose(drawn, annotations.bboxes[own], atol=1e-4)
    own = (run.detections.image_id == annotations.image_ids[row]) & (run.detections.score >= score)
    drawn = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in found.patches]
    assert 0 < len(drawn) < (run.detections.image_id == annotations.image_ids[row]).sum()
    np.testing.assert_allclose(drawn, run.detections.bbox[own], atol=1e-3)


def test_a_point_a_class_over_its_training_images(runs, annotations):
    (ax,) = plot.ap_against_images([runs[1]], annotations).axes
    (points,) = ax.collections
    x = points.get_offsets()[:, 0]
    present = np.unique(annotations.labels)
    counts = np.array([annotations.categories[label].image_count for label in present])
    assert sorted(x.tolist()) == sorted(counts.clip(min=1).tolist())


def test_runs_that_are_not_finished_or_of_other_data(runs, tmp_path, data, finished):
    with pytest.raises(FileNotFoundError, match=r"config\.yaml: no such file; name folders of finished runs"):
        plot.plot([tmp_path], tmp_path, images=1, score=0.5)
    val = (data / "shapes" / "val.json").read_text()
    (data / "shapes" / "copy.json").write_text(val)
    arguments = ["--config", BASELINE, *SHORT, f"data.root={data}", f"output={tmp_path / 'other'}"]
    run_verb("train", [*arguments, "train.steps=1", "data.val=shapes/copy.json"])
    with pytest.raises(ValueError, match=r"other is of other data than .*; plot them apart"):
        plot.plot([finished, tmp_path / "other"], tmp_path, images=1, score=0.5)


def test_a_studys_figure_has_means_and_gains_over_the_first_row():
    """Gains are of equal seeds: (20 - 10, 26 - 14) = 10 and 12, mean 11; seed 2 of `more` has no partner."""

    def run(ap: float, rare: float) -> dict:
        return {"AP": ap, "APr": rare, "APc": 3.0, "APf": -100.0, "by_images": {"1-9": rare, "100-400": ap}}

    rows = {
        "first": {"runs": {"0": run(10.0, 1.0), "1": run(14.0, 1.0)}},
        "more": {"runs": {"0": run(20.0, 4.0), "1": run(26.0, 8.0), "2": run(99.0, 99.0)}},
        "not run": {"runs": {}},
    }
    bars, gains = plot.study_figure(rows, "a study").axes
    heights = [bar.get_height() for bar in bars.patches]
    assert heights[:3] == [12.0, 1.0, 3.0]
    assert np.isnan(heights[3])
    assert heights[4:6] == pytest.approx([(20 + 26 + 99) / 3, (4 + 8 + 99) / 3])
    assert [text.get_text() for text in bars.get_xticklabels()] == ["all", "rare", "common", "frequent"]
    line = gains.lines[0]
    assert line.get_xdata() == pytest.approx([3, 200])  # geometric means of 1 and 9, 100 and 400
    assert line.get_ydata() == pytest.approx([(3 + 7) / 2, (10 + 12) / 2])
    assert gains.get_ylabel() == "AP above: first"


def test_a_figure_of_nothing_is_empty():
    assert not plot.study_figure({"not run": {"runs": {}}}, "a study").axes[0].patches
