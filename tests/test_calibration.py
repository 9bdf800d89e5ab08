"""Calibrations of the class probabilities: worked examples, what is refused, evaluate.py with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import CATEGORIES, make_model, tiny_config
from runs import BASELINE, SHORT
from test_grouped_losses import THREE, Z, make_categories

from clis.commands import run_verb
from clis.config import data_path
from clis.config_files import config_from_dict, merge_overrides
from clis.data.annotations import load_annotations
from clis.engine.checkpoint import load_checkpoint, load_model
from clis.engine.evaluate import measure_calibration
from clis.engine.run_folder import RunFolder
from clis.losses import CLASSIFICATION_LOSSES
from clis.models import build_model, find_calibration
from clis.models.calibration import fractal_dimensions


def test_worked_example_of_norcal():
    scores = find_calibration("norcal(gamma=0.6)", "cross_entropy")(THREE)(Z.softmax(dim=1)[:, :3])
    assert scores[0].tolist() == pytest.approx([0.185235, 0.271287, 0.397314], abs=1e-6)


def test_norcal_divides_the_odds_against_background():
    """By n^gamma, no images as one; it is a probability again, and gamma 0 changes nothing."""
    categories = make_categories((100, 10, 0))
    before = Z.softmax(dim=1)
    for gamma in (0.0, 0.3, 1.0):
        after = find_calibration(f"norcal(gamma={gamma})", "cross_entropy")(categories)(before[:, :3])
        background = 1 - after.sum(dim=1, keepdim=True)
        odds = before[:, :3] / before[:, 3:] / torch.tensor([100.0, 10.0, 1.0]) ** gamma
        torch.testing.assert_close(after / background, odds)
        if gamma == 0:
            torch.testing.assert_close(after, before[:, :3])


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [0.4, 0.5, 0.1], [0.7, 0.2, 0.1 + 1e-7], [1.0, 0.0, 0.0]])
def test_without_background_and_with_nothing_else(row):
    """Sums that rounding puts above 1 count as 1; float32 in, float32 out."""
    after = find_calibration("norcal", "cross_entropy")(THREE)(torch.tensor([row]))
    assert after.dtype == torch.float32
    assert after.sum().item() == pytest.approx(float(sum(row) > 0), abs=1e-6)


def test_fractal_dimension_counts_cells():
    """Four centers: on 1 x 1 one cell, on 2 x 2 three, so log 3 / log 2; fewer have 1, as a line."""
    corners = [[0.1, 0.1], [0.2, 0.2], [0.6, 0.1], [0.9, 1.0]]
    middle = [[0.5, 0.5]] * 3
    line = [[(i + 0.5) / 400, 0.3] for i in range(400)]
    plane = [[(i + 0.5) / 64, (j + 0.5) / 64] for i in range(64) for j in range(64)]
    centers = torch.tensor([*corners, *middle, *line, *plane], dtype=torch.float64)
    labels = torch.tensor([0] * 4 + [1] * 3 + [2] * 400 + [3] * 4096)
    found = fractal_dimensions(centers, labels, 5)
    assert found.tolist() == pytest.approx([math.log2(3), 1, 1, 2, 1], abs=1e-12)


def test_fracal_equals_its_formula():
    """softmax(z + w) / D^2, normalized, with w = log10(I / n) - log10 C, and 0 and 1 for background."""
    calibration = find_calibration("fracal", "cross_entropy")(THREE)
    scores = Z.softmax(dim=1)[:, :3]
    with pytest.raises(ValueError, match=r"test\.calibration needs the training annotations"):
        calibration(scores)
    centers = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.9]], dtype=torch.float64)
    calibration.measure(1000, centers.repeat(2, 1), torch.tensor([0] * 4 + [2] * 4))  # dimensions 2, 1, 2
    shift = torch.tensor([math.log10(10 / 3), math.log10(100 / 3), math.log10(1000 / 3), 0])
    expected = (Z + shift).softmax(dim=1) / torch.tensor([4.0, 1.0, 4.0, 1.0])
    expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(calibration(scores), expected[:, :3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("norcl", r"test\.calibration=norcl: there is no such calibration; did you mean norcal\?"),
        ("x", r"there is no such calibration; known: fracal, norcal\."),
        ("norcal(gama=1)", r"it has no option gama; did you mean gamma\?"),
        ("norcal(gamma='a')", r"gamma is 'a'; expected a number"),
        ("norcal(1)", r"test\.calibration=norcal\(1\): write options as in a call"),
    ],
)
def test_what_is_wrong_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_config(f"test.calibration={text}"), CATEGORIES)


def test_scores_that_are_no_softmax_are_refused():
    softmax = {name for name, loss in CLASSIFICATION_LOSSES.items() if loss.softmax_scores}
    assert softmax == {"balanced_softmax", "cross_entropy", "focal", "loce", "logit_adjusted", "seesaw"}
    for name in softmax:
        logits = torch.randn(9, CLASSIFICATION_LOSSES[name](CATEGORIES).num_logits)
        assert (CLASSIFICATION_LOSSES[name](CATEGORIES).scores(logits).sum(dim=1) <= 1 + 1e-6).all()
    overrides = ["test.calibration=norcal", "loss.classification=federated", "clis.objectness=false"]
    with pytest.raises(
        ValueError, match=r"test\.calibration=norcal: it needs scores from a softmax .*federat"
    ):
        build_model(tiny_config(*overrides), CATEGORIES)


def test_it_is_told_before_anything_is_made(data, tmp_path):
    for wrong, told in (
        (["test.calibration=norcl"], "did you mean norcal"),
        (["test.calibration=norcal", "loss.classification=gumbel"], "needs scores from a softmax"),
    ):
        overrides = [*SHORT, *wrong, f"data.root={data}", f"output={tmp_path / 'run'}"]
        with pytest.raises(ValueError, match=told):
            run_verb("train", ["--config", BASELINE, *overrides])
    assert not (tmp_path / "run").exists()


def test_class_probabilities_are_calibrated_before_the_objectness(one_thread):
    """The detector's scores over its objectness are NorCal's of the class probabilities."""
    plain, calibrated = make_model().eval(), make_model("test.calibration=norcal(gamma=0.5)").eval()
    calibrated.load_state_dict(plain.state_dict())  # a calibration adds nothing to a checkpoint
    image = torch.randint(256, (3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    plain.localization.fc_objectness = None
    ((rois, scores, _),) = plain.predict([image])
    ((same_rois, found, _),) = calibrated.predict([image])
    assert torch.equal(rois, same_rois)
    expected = find_calibration("norcal(gamma=0.5)", "cross_entropy")(CATEGORIES)(scores)
    objectness = found / expected
    torch.testing.assert_close(objectness, objectness[:, :1].expand_as(objectness))
    assert ((objectness > 0) & (objectness < 1)).all()


@pytest.mark.parametrize("text", ["norcal(gamma=0.6)", "fracal"])
def test_evaluate_calibrates_any_checkpoint(finished, tmp_path, text):
    checkpoint, field = str(finished / "checkpoints" / "last.pt"), "test.calibration"
    run_verb("evaluate", [checkpoint, f"{field}={text}", f"output={tmp_path / 'with'}"])
    with (
        np.load(tmp_path / "with" / "detections.npz") as found,
        np.load(finished / "detections.npz") as plain,
    ):
        assert not np.array_equal(found["score"], plain["score"])
    if text.startswith("norcal"):
        run_verb("evaluate", [checkpoint, f"{field}=norcal(gamma=0)", f"output={tmp_path / 'same'}"])
        metrics = RunFolder(tmp_path / "same").read_result()
        assert metrics == pytest.approx(RunFolder(finished).read_result(), abs=1e-6)


def test_fracal_measures_the_training_annotations(finished):
    """Its classes of fewer than four boxes have dimension 1, others 1 to 2."""
    state = load_checkpoint(finished / "checkpoints" / "last.pt")
    config = config_from_dict(merge_overrides(state["config"], ["test.calibration=fracal(power=1)"]))
    detector = load_model(state, config, "last.pt")
    measure_calibration(detector, config)
    training = load_annotations(data_path(config, config.data.train))
    boxes = np.bincount(training.labels, minlength=50)
    counts = torch.tensor([max(1, category.image_count) for category in training.categories])
    dimension = (len(training) / (50 * counts.double())).log10().exp() / detector.calibration.weights
    torch.testing.assert_close(dimension[boxes < 4], torch.ones((boxes < 4).sum(), dtype=torch.float64))
    assert ((dimension > 1 - 1e-9) & (dimension < 2 + 1e-9)).all()
    assert dimension.max() > 1.2
