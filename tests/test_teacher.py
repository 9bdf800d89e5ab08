"""A teacher that labels the mosaics: which boxes, what is learned from them, and which detector is tested."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import MOSAIC, NUM_CLASSES, make_batch, make_model, normalizers_of, tiny_config
from runs import REPOSITORY, SHORT, records
from switches import steps

from clis.commands import run_verb
from clis.config import LossConfig, StartConfig
from clis.engine.checkpoint import detector_state, load_checkpoint, load_detector
from clis.engine.run_folder import RunFolder
from clis.engine.start import load_start
from clis.models.teacher import CLASSIFICATION, REGRESSION, mosaic_seeds, strongly_augmented
from clis.report.curves import LOSSES
from clis.study.runs import StudyRun

# a detector of random weights gives each of five classes and the background about a sixth
SURE = 0.178
TAUGHT = ("clis.task_specialized=false", "clis.objectness=false", "clis.contrastive=false", "clis.t=0",
          "regions.rule=full", "start.from=unread.pt", f"teacher.score={SURE}")  # fmt: skip
FIXED = (*TAUGHT, "teacher.momentum=1", "teacher.strong=false", "teacher.boxes=true")
MEAN = (*TAUGHT, "teacher.momentum=0.75")


def another(model):
    """Move the weights of a detector, but not its teacher's."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("teacher."):
                parameter += 0.01 * torch.randn_like(parameter)
    return model


class TestLabels:
    def test_are_what_the_teacher_detects_above_the_score(self):
        """As `detect_resized` finds it in the mosaics; the detector has other weights by now."""
        model, batch = another(make_model(*FIXED)), make_batch(2, pairs=0)
        teacher = model.teacher
        labeled = teacher.label(batch)
        found = teacher.model.detect_resized(batch.mosaics.unbind())
        for mosaic, each in enumerate(found):
            sure = each.scores > SURE
            expected = {tuple(box) for box in each.boxes[sure].float().tolist()}
            assert set(map(tuple, labeled.boxes[mosaic].tolist())) == expected
            assert len(labeled.boxes[mosaic]) == len(labeled.labels[mosaic])
            assert torch.equal(labeled.images[mosaic], batch.mosaics[mosaic])
        assert 0 < sum(map(len, labeled.boxes)) < sum(len(each.boxes) for each in found)

    def test_do_not_depend_on_the_labels_of_the_images(self):
        model, batch = make_model(*FIXED), make_batch(2, pairs=0)
        other = dataclasses.replace(
            batch, region_labels=(batch.region_labels + 1) % NUM_CLASSES, regions=batch.regions / 2
        )
        losses = [model(each, normalizers_of(each)).losses for each in (batch, other)]
        assert losses[0].keys() == losses[1].keys() >= {"pseudo", "instance_cls"}
        assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])

    def test_mosaics_have_seeds_of_their_own(self):
        batch = make_batch(3, pairs=0)
        batch = dataclasses.replace(batch, mosaics=torch.cat([batch.mosaics] * 2), seeds=[7, 8, 2**63 - 1])
        seeds = list(mosaic_seeds(batch))
        assert len({*seeds, *batch.seeds}) == 9
        assert all(0 <= seed < 2**63 for seed in seeds)


class TestLoss:
    @pytest.mark.parametrize(
        ("boxes", "names"), [("true", CLASSIFICATION + REGRESSION), ("false", CLASSIFICATION)]
    )
    def test_is_that_of_detection_on_the_labeled_mosaics(self, boxes, names):
        """As for a batch that has them as instance-level images, and no image-level ones: a mean over the
        mosaics, whatever their number beside that of the images."""
        model = another(make_model(*FIXED, f"teacher.boxes={boxes}"))
        batch = make_batch(2, pairs=0)
        batch = dataclasses.replace(batch, mosaics=torch.cat([batch.mosaics, batch.mosaics.flip(0)]))
        labeled = model.teacher.label(batch)
        assert len(labeled.images) == 4
        plain = model(labeled, normalizers_of(labeled)).losses
        output = model(batch, normalizers_of(batch))
        expected = sum(loss for name, loss in plain.items() if name in names)
        torch.testing.assert_close(output.losses["pseudo"], expected)
        assert output.stats["pseudo_boxes"] == sum(map(len, labeled.boxes))

    def test_trains_the_detector_and_not_the_teacher(self):
        model, batch = make_model(*FIXED), make_batch(2, pairs=0)
        model(batch, normalizers_of(batch)).losses["pseudo"].backward()
        moved = {
            name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert moved == {"backbone", "rpn", "classification", "localization"}

    def test_where_nothing_is_found_all_is_background(self):
        model, batch = make_model(*FIXED, "teacher.score=0.999"), make_batch(2, pairs=0)
        output = model(batch, normalizers_of(batch))
        assert output.stats["pseudo_boxes"] == 0
        assert 0 < output.losses["pseudo"].item() < math.inf


class TestStrongAugmentation:
    def test_is_a_function_of_the_seed_that_leaves_torchs_generator_alone(self):
        image = make_batch(1).mosaics[0]
        state = torch.get_rng_state()
        pictures = [strongly_augmented(image, seed) for seed in (3, 3, *range(4, 20))]
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(pictures[0], pictures[1])
        assert len({tuple(picture.flatten().tolist()) for picture in pictures}) > 12
        assert all(p.dtype == torch.uint8 and p.shape == (3, MOSAIC, MOSAIC) for p in pictures)

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_computes_in_full_precision(self, precision):
        """In bfloat16 the blur of this seed has a kernel whose sum is above 1, and 256 is 0 in uint8."""
        white = torch.full((3, MOSAIC, MOSAIC), 255, dtype=torch.uint8)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            augmented = strongly_augmented(white, 1843)
        assert torch.equal(augmented, strongly_augmented(white, 1843))
        assert (augmented > 100).float().mean() > 0.4

    def test_is_what_the_detector_sees_and_the_teacher_does_not(self):
        model, batch = make_model(*MEAN), make_batch(2, pairs=0)
        labeled, plain = model.teacher.label(batch), make_model(*FIXED).teacher.label(batch)
        assert not any(map(torch.equal, labeled.images, plain.images))
        assert all(map(torch.equal, labeled.boxes, plain.boxes))


class TestTeacherItself:
    def test_follows_the_detector_after_every_step(self):
        """A quarter of the way to each parameter; what no step moves, the teacher has as well."""
        model, batch = make_model(*MEAN), make_batch(2, pairs=0)
        before = {name: p.clone() for name, p in model.teacher.model.named_parameters()}
        steps(model, [batch], *MEAN)
        own = dict(model.named_parameters())
        for name, parameter in model.teacher.model.named_parameters():
            torch.testing.assert_close(parameter, 0.75 * before[name] + 0.25 * own[name])
        assert not torch.equal(before["rpn.conv.weight"], own["rpn.conv.weight"])

    def test_with_a_momentum_of_one_it_stays(self):
        model, batch = make_model(*FIXED), make_batch(2, pairs=0)
        before = {name: p.clone() for name, p in model.teacher.model.named_parameters()}
        steps(model, [batch], *FIXED)
        assert all(torch.equal(p, before[name]) for name, p in model.teacher.model.named_parameters())

    def test_has_the_counts_of_the_detectors_loss(self):
        """They are no weights, but scores may depend on them, and a run that starts from the teacher does."""
        overrides = (*MEAN, "loss.classification=seesaw", "clis.objectness=false")
        model, batch = make_model(*overrides), make_batch(2, pairs=0)
        steps(model, [batch], *overrides)
        counts = model.classification_loss.counts
        assert counts.sum() > 0
        assert torch.equal(model.teacher.model.classification_loss.counts, counts)
        model.classification_loss.scale = torch.nn.Parameter(torch.ones(1))  # of a loss that learns
        model.teacher.model.classification_loss.scale = torch.nn.Parameter(torch.zeros(1))
        model.teacher.follow(model)
        assert model.teacher.model.classification_loss.scale.item() == 0.25

    def test_only_one_that_follows_is_tested(self):
        fixed, mean = make_model(*FIXED), make_model(*MEAN)
        assert (fixed.tested is fixed, mean.tested is mean.teacher.model) == (True, True)

    def test_a_run_without_image_level_images_has_none(self):
        assert make_model(*MEAN, "clis=off").teacher is None


@pytest.mark.parametrize(("name", "tests_teacher"), [("self_training", False), ("unbiased_teacher", True)])
def test_a_run_begins_with_the_baseline_as_teacher(name, tests_teacher, data, tmp_path, capsys):
    """And its checkpoint is evaluated as the run was. Nothing is sure of one of 50 classes so early."""
    config = str(REPOSITORY / "configs" / "shapes" / f"{name}.yaml")
    arguments = ["--config", config, *SHORT, "train.steps=2", f"data.root={data}", "teacher.score=0.0205"]
    run_verb("train", [*arguments, f"output={tmp_path}", "train.save_every=1", "train.keep_last=2"])
    said = capsys.readouterr().out
    assert said.count("their labels are not used: detection is also trained") == 1
    assert "on: gradient clipping" in said
    assert " pse " in said
    assert all(record["pseudo_boxes"] > 0 for record in records(tmp_path))
    baseline, run = RunFolder(tmp_path / "start"), RunFolder(tmp_path)
    first, last = (load_checkpoint(each.last)["model"] for each in (baseline, run))
    teacher = {key.removeprefix("teacher.model."): value for key, value in last.items() if "teacher" in key}
    student = {key: value for key, value in last.items() if "teacher" not in key}
    assert teacher.keys() == student.keys() == first.keys()
    assert all(torch.equal(teacher[key], first[key]) for key in first) is not tests_teacher
    tested = load_detector(run.last).state_dict()
    expected = teacher if tests_teacher else student
    assert all(torch.equal(tested[key], expected[key]) for key in expected)
    run_verb("evaluate", [str(run.last), f"output={tmp_path / 'again'}"])
    assert RunFolder(tmp_path / "again").read_result() == run.read_result()
    with pytest.raises(ValueError, match=r"was trained with other settings: teacher.score"):
        run_verb("evaluate", [str(run.last), f"output={tmp_path / 'other'}", "teacher.score=0.5"])


class TestStart:
    """From a checkpoint; its teacher is no part of what is started from, unless it was what was evaluated."""

    def saved(self, path, *overrides):
        """The checkpoint of a detector that has moved away from its teacher."""
        model = another(make_model(*overrides))
        torch.save(detector_state(model, tiny_config(*overrides)), path)
        return model

    @pytest.mark.parametrize("before", [FIXED, MEAN])
    @pytest.mark.parametrize("after", [FIXED, MEAN, ("clis=off",)])
    def test_is_the_detector_that_was_evaluated(self, before, after, tmp_path):
        first = self.saved(tmp_path / "first.pt", *before)
        second = make_model(*after, seed=5)
        load_start(second, StartConfig(from_="first.pt"), tmp_path / "first.pt")
        expected = first.tested.state_dict()
        for model in (second, *([second.teacher.model] if second.teacher is not None else [])):
            own = model.state_dict()
            assert all(torch.equal(own[key], expected[key]) for key in own if not key.startswith("teacher."))

    def test_gives_the_teacher_no_part_from_scratch(self, tmp_path):
        self.saved(tmp_path / "plain.pt", "clis=off")
        start = StartConfig(from_="plain.pt", fresh=("classification.fc_cls",))
        with pytest.raises(ValueError, match=r"fc_cls would also start from scratch in the teacher"):
            load_start(make_model(*FIXED), start, tmp_path / "plain.pt")


def test_every_loss_is_a_curve_of_the_report():
    assert set(LossConfig().weights) < set(LOSSES)


def test_without_image_level_images_a_teacher_is_no_other_run():
    keys = {
        StudyRun.load(
            REPOSITORY / "configs" / "shapes" / f"{name}.yaml",
            ["clis=off", "loss.pseudo=4", "loss.classification=focal"],
        ).key
        for name in ("self_training", "unbiased_teacher")
    }
    assert len(keys) == 1
