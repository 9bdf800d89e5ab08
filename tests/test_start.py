"""Runs that start from another one's weights: what is loaded, from scratch, trained; the recipe; studies."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CATEGORIES, tiny_config
from runs import BASELINE, CONFIG, REPOSITORY, SHORT, assert_same_training, records

from clis.commands import check, run_verb
from clis.commands.study import run_study
from clis.config import Config, StartConfig
from clis.config_files import config_to_dict, load_config
from clis.engine import train
from clis.engine.checkpoint import detector_state, load_checkpoint
from clis.engine.prerequisites import plan_run
from clis.engine.run_folder import RunFolder
from clis.engine.start import load_start, train_only
from clis.models import build_model
from clis.study.file import Study
from clis.study.runs import StudyRun

PLAIN = "clis=off"
NEW_PARTS = (
    "localization.sub_network", "localization.fc_objectness", "image_classification.sub_network",
    "image_classification.fc_cls", "contrastive",
)  # fmt: skip


def model_of(*overrides: str, seed: int):
    torch.manual_seed(seed)
    return build_model(tiny_config(*overrides), CATEGORIES)


@pytest.fixture
def plain(tmp_path) -> Path:
    """A checkpoint of a Faster R-CNN without any part of CLIS."""
    path = tmp_path / "plain.pt"
    torch.save(detector_state(model_of(PLAIN, seed=0), tiny_config(PLAIN)), path)
    return path


class TestWeights:
    def test_a_head_from_scratch_on_a_detector_that_is_kept(self, plain):
        before = load_checkpoint(plain)["model"]
        model = model_of(PLAIN, seed=1)
        fresh = model.classification.fc_cls.weight.clone()
        load_start(model, StartConfig(from_=str(plain), fresh=("classification.fc_cls",)), plain)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) == (not name.startswith("classification.fc_cls.weight"))
        assert torch.equal(model.classification.fc_cls.weight, fresh)

    def test_a_detector_of_other_classes(self, plain):
        """What depends on the classes has to start from scratch; the rest is loaded."""
        others = [replace(each, id=each.id + 100, name=f"other {each.name}") for each in CATEGORIES[:-1]]
        model, before = build_model(tiny_config(PLAIN), others), load_checkpoint(plain)["model"]
        fresh = ("classification.fc_cls",)
        with pytest.raises(ValueError, match=r"split has 4; .* in start\.fresh .*: localization\.fc_box$"):
            load_start(model, StartConfig(from_=str(plain), fresh=fresh), plain)
        load_start(model, StartConfig(from_=str(plain), fresh=(*fresh, "localization.fc_box")), plain)
        assert torch.equal(model.rpn.conv.weight, before["rpn.conv.weight"])
        assert len(model.classification.fc_cls.weight) == len(others) + 1

    def test_clis_from_a_plain_detector(self, plain):
        """The momentum copy starts as a copy of what was loaded, not of the random weights before."""
        before = load_checkpoint(plain)["model"]
        model = model_of("clis.siamese=false", seed=1)
        load_start(model, StartConfig(from_=str(plain), fresh=NEW_PARTS), plain)
        loaded = before["classification.sub_network.fc1.weight"]
        assert torch.equal(model.classification.sub_network.fc1.weight, loaded)
        assert torch.equal(model.contrastive.momentum_sub_network.fc1.weight, loaded)
        assert not torch.equal(model.image_classification.sub_network.fc1.weight, loaded)

    def test_a_momentum_copy_from_scratch_is_a_copy_of_what_is_loaded(self, tmp_path):
        """Its MLP as well: a random one would put keys into another space than that of the queries."""
        path = tmp_path / "clis.pt"
        trained = model_of(seed=0)
        trained.contrastive.momentum_mlp.weight.data.zero_()
        trained.contrastive.momentum_sub_network.fc1.weight.data.zero_()
        torch.save(detector_state(trained, tiny_config()), path)
        model = model_of(seed=1)
        fresh = ("contrastive.momentum_sub_network", "contrastive.momentum_mlp", "contrastive.queue")
        load_start(model, StartConfig(from_=str(path), fresh=fresh), path)
        own, copies = trained.classification.sub_network, model.contrastive
        assert torch.equal(copies.momentum_sub_network.fc1.weight, own.fc1.weight)
        assert torch.equal(copies.momentum_mlp.weight, trained.contrastive.instance_mlp.weight)

    def test_a_shared_classifier_from_a_plain_detector(self, plain):
        """The plain one knows it by one name; siamese, image classification is that module."""
        without_contrast = ("clis.contrastive=false", "clis.t=0", "clis.task_specialized=false")
        model = model_of(*without_contrast, "clis.objectness=false", seed=1)
        load_start(model, StartConfig(from_=str(plain)), plain)
        loaded = load_checkpoint(plain)["model"]["classification.fc_cls.weight"]
        assert torch.equal(model.image_classification.fc_cls.weight, loaded)

    def test_a_plain_detector_from_clis_leaves_parts_behind(self, tmp_path):
        path = tmp_path / "clis.pt"
        torch.save(detector_state(model_of("clis.siamese=false", seed=0), tiny_config()), path)
        model = model_of(PLAIN, seed=1)
        load_start(model, StartConfig(from_=str(path), fresh=NEW_PARTS), path)
        kept = load_checkpoint(path)["model"]["classification.sub_network.fc1.weight"]
        assert torch.equal(model.classification.sub_network.fc1.weight, kept)

    @pytest.mark.parametrize("switch", ["clis.siamese=true", "clis.task_specialized=false"])
    @pytest.mark.parametrize("fresh", ["classification", "image_classification"])
    def test_a_shared_part_starts_from_scratch_by_either_name(self, tmp_path, switch, fresh):
        """Siamese, both tasks have one classifier; without TSS its sub-network is localization's too."""
        path, config = tmp_path / "clis.pt", tiny_config(switch)
        torch.save(detector_state(model_of(switch, seed=0), config), path)
        model = model_of(switch, seed=1)
        drawn = {name: value.clone() for name, value in model.state_dict().items()}
        load_start(model, StartConfig(from_=str(path), fresh=(fresh,)), path)
        part = "classification.sub_network.fc1.weight"
        for name in (part, f"image_{part}", "classification.fc_cls.weight"):
            assert torch.equal(model.state_dict()[name], drawn[name])
        assert not torch.equal(model.rpn.state_dict()["conv.weight"], drawn["rpn.conv.weight"])

    def test_classifiers_that_differ_are_not_joined_in_silence(self, tmp_path):
        """Siamese from a run without SS: one of the two has to be left behind, by name."""
        path, other = tmp_path / "clis.pt", "clis.siamese=false"
        torch.save(detector_state(model_of(other, seed=0), tiny_config(other)), path)
        model = model_of("clis.siamese=true", seed=1)
        with pytest.raises(
            ValueError, match=r"classification\.sub_network\.fc1\.weight and image_class\S+ are"
        ):
            load_start(model, StartConfig(from_=str(path)), path)
        given = load_checkpoint(path)["model"]["classification.fc_cls.weight"]
        load_start(model, StartConfig(from_=str(path), fresh=("image_classification",)), path)
        assert torch.equal(model.classification.fc_cls.weight, given)
        assert model.image_classification.fc_cls.weight is model.classification.fc_cls.weight

    def test_what_is_neither_loaded_nor_named_is_an_error(self, plain):
        model = model_of("clis.siamese=false", seed=1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        start = StartConfig(from_=str(plain), fresh=NEW_PARTS[:-1])
        with pytest.raises(
            ValueError, match=r"plain\.pt: .*missing contrastive\..*name what .* start\.fresh"
        ):
            load_start(model, start, plain)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_a_prefix_is_a_whole_word(self, plain):
        start = StartConfig(from_=str(plain), fresh=("classification.fc",))
        with pytest.raises(
            ValueError, match=r"start\.fresh: classification\.fc matches no parameter; the par"
        ):
            load_start(model_of(PLAIN, seed=1), start, plain)

    def test_other_classes_are_refused(self, plain):
        torch.manual_seed(0)
        model = build_model(tiny_config(PLAIN), CATEGORIES[::-1])
        with pytest.raises(ValueError, match="must be of one data set"):
            load_start(model, StartConfig(from_=str(plain)), plain)

    def test_parts_that_are_trained(self):
        """A shared sub-network has the names of both of its tasks; the momentum copy stays frozen."""
        model = model_of("clis.task_specialized=false", seed=0)
        train_only(model, ["classification", "contrastive"])
        trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        parts = {"classification", "image_classification", "contrastive"}
        assert {name.split(".")[0] for name in trained} == parts | {"localization"}
        assert not any("momentum" in name or "fc_box" in name for name in trained)
        with pytest.raises(ValueError, match=r"start\.train: clasification matches no parameter"):
            train_only(model, ["clasification"])
        with pytest.raises(ValueError, match=r"start\.train: contrastive\.momentum.* is frozen anyway"):
            train_only(model, ["contrastive.momentum_sub_network"])


@pytest.fixture
def second(tmp_path, monkeypatch) -> Path:
    """A config that trains the last layer of the baseline again, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "second.yaml"
    start = {"from": BASELINE, "fresh": ["classification.fc_cls"], "train": ["classification.fc_cls"]}
    data = {"repeat": "class-balanced", "repeat_rounding": "stochastic"}
    path.write_text(yaml.safe_dump({"base": BASELINE, "start": start, "data": data, "optim": {"lr": 0.1}}))
    return path


def errors_of(path: Path, overrides: list[str], *more: str) -> list[str]:
    """What `check` finds wrong with a config."""
    overrides = [*overrides, *more]
    return check.check(load_config(path, overrides), overrides=overrides, workers=0, sample=1).errors


class TestRecipe:
    def test_both_trainings_in_one_command(self, second, data, tmp_path, capsys):
        arguments = ["--config", str(second), *SHORT, f"data.root={data}", f"output={tmp_path / 'run'}"]
        run_verb("train", arguments)
        said = capsys.readouterr().out
        assert "1/2 run to start from: " in said
        assert "classes drawn equally often" in said
        first, last = (
            load_checkpoint(tmp_path / "run" / name / "checkpoints" / "last.pt") for name in ("start", "")
        )
        changed = {n for n, value in last["model"].items() if not torch.equal(value, first["model"][n])}
        assert changed == {"classification.fc_cls.weight", "classification.fc_cls.bias"}
        assert first["config"]["start"] == {"from": None, "fresh": [], "train": []}

        # a run that is resumed does not read the start
        reference = tmp_path / "run"
        checkpoint = RunFolder(reference / "start").last
        arguments[-1] = f"output={tmp_path / 'again'}"
        step, calls = train.train_step, []

        def crash(*values):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step(*values)

        alone = [*arguments[:-1], f"start.from={checkpoint}", arguments[-1]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_step", crash)
            with pytest.raises(KeyboardInterrupt):
                run_verb("train", alone)
        (reference / "start").rename(reference / "away")
        run_verb("train", alone)
        assert_same_training(tmp_path / "again", reference)

    def test_mistakes_are_reported_before_the_first_training(self, second, data, tmp_path):
        arguments = ["--config", str(second), *SHORT, f"data.root={data}", f"output={tmp_path / 'run'}"]
        Path("loop.yaml").write_text(yaml.safe_dump({"base": BASELINE, "start": {"from": "loop.yaml"}}))
        for override, message in (
            ("start.fresh=[classification.fc_clas]", r"start\.fresh: classification\.fc_clas matches no"),
            ("start.train=[head]", r"start\.train: head matches no parameter"),
            ("clis.objectness=true", r"run to start from: .* missing localization\.fc_objectness\.weight"),
            ("start.from=gone.pt", r"gone\.pt: no such checkpoint"),
            ("start.from=gone.yaml", r"gone\.yaml: no such config"),
            ("start.from=loop.yaml", r"start\.from=loop\.yaml: this run needs itself"),
        ):
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                run_verb("train", [*arguments, override])
            assert any(re.search(message, error) for error in errors_of(second, arguments[2:], override))
            nothing = [*arguments[2:], f"data.root={tmp_path}", "data.generate=shapes", override]
            assert any(re.search(message, error) for error in errors_of(second, nothing))
        assert errors_of(second, arguments[2:]) == []
        assert not (tmp_path / "run").exists()

    def test_a_finished_run_needs_no_start_and_no_other_folder(self, second, data, tmp_path, capsys):
        """Nor is it held up by what a folder that it does not need belongs to."""
        arguments = ["--config", str(second), *SHORT, f"data.root={data}", f"output={tmp_path / 'run'}"]
        run_verb("train", arguments)
        for name in ("start", "checkpoints"):
            shutil.rmtree(tmp_path / "run" / name)
        RunFolder(tmp_path / "run" / "start").claim(load_config(BASELINE, ["optim.lr=0.5"]))
        capsys.readouterr()
        run_verb("train", arguments)
        assert "1/1" in (said := capsys.readouterr().out)
        assert "is already finished" in said

    def test_the_backbones_weights_are_read_once_by_the_run_that_starts_from_them(
        self, second, data, tmp_path
    ):
        missing = "model.backbone={weights: gone.pth, norm: folded}"
        for config in (Path(BASELINE), second):
            words = [*SHORT, f"data.root={data}", f"output={tmp_path / 'run'}", missing]
            assert ["gone.pth: backbone weights" in error for error in errors_of(config, words)] == [True]


LAST_LAYER = {"classification.fc_cls"}


@pytest.mark.parametrize(
    ("name", "loss", "trained"),
    [
        ("acsl", "acsl(prior=0)", LAST_LAYER),
        ("loce", "loce", LAST_LAYER | {"localization.fc_box", "rpn.conv", "rpn.objectness", "rpn.deltas"}),
    ],
)
def test_losses_that_are_fine_tuned_from_the_baseline(name, loss, trained, data, tmp_path):
    """All weights come from the softmax baseline, and only what the official recipe trains moves."""
    config = str(REPOSITORY / "configs" / "shapes" / f"{name}.yaml")
    overrides = [*SHORT, "train.steps=2", f"data.root={data}", f"output={tmp_path}"]
    run_verb("train", ["--config", config, *overrides])
    first, last = (load_checkpoint(RunFolder(folder).last) for folder in (tmp_path / "start", tmp_path))
    assert (first["config"]["loss"]["classification"], last["config"]["loss"]["classification"]) == (
        "cross_entropy",
        loss,
    )
    weights = {key: value for key, value in last["model"].items() if key in first["model"]}
    moved = {key.rpartition(".")[0] for key, value in weights.items() if not first["model"][key].equal(value)}
    assert moved == trained
    assert set(last["model"]) - set(weights) <= {"classification_loss.mean_scores"}
    assert load_config(config).train.steps == (600 if name == "acsl" else 300)


def test_the_stages_of_mosaicos(data, tmp_path, capsys):
    """The baseline finds the regions, goes on to mosaics, and then returns to images with boxes."""
    config = str(REPOSITORY / "configs" / "shapes" / "mosaicos.yaml")
    run_verb(
        "train", ["--config", config, *SHORT, "train.steps=2", f"data.root={data}", f"output={tmp_path}"]
    )
    said = capsys.readouterr().out
    assert re.findall(r"^[1-4]/4 ([a-z ]+|.*mosaicos.yaml)", said, re.MULTILINE) == [
        "detector for the regions",
        "regions",
        "run to start from",
        config,
    ]
    assert said.count("detection is trained on their mosaics, and on no other images") == 1
    trained = [
        RunFolder(folder).last for folder in (tmp_path / "start" / "detector", tmp_path / "start", tmp_path)
    ]
    models = [load_checkpoint(path)["model"] for path in trained]
    assert models[0].keys() == models[1].keys() == models[2].keys()
    for before, after in zip(models, models[1:]):  # two steps from where the stage before ended
        change = max(float((before[name] - after[name]).abs().max()) for name in before)
        assert 0 < change < 0.1


def test_overrides_of_image_level_settings_reach_the_stage_that_has_such_images():
    """Also where the run itself has none; those of a run that has some are its own."""
    given = [
        "data.image_level_share=0.5",
        "regions.rule=center",
        "data.label_noise=0.1",
        "data.mosaic_size=96",
    ]

    def start_of(config: Path) -> Config:
        start = plan_run(load_config(config, given), str(config), given).start
        assert start is not None
        return start.config

    shapes = REPOSITORY / "configs" / "shapes"
    mosaics = start_of(shapes / "mosaicos.yaml")
    assert (mosaics.data.image_level_share, mosaics.data.mosaic_size) == (0.5, 96)
    assert (mosaics.data.label_noise, mosaics.regions.rule) == (0.1, "center")
    baseline = start_of(shapes / "mosaicos_mosaics.yaml")
    assert (baseline.data.image_level_share, baseline.regions.rule) == (1.0, "category-rank-first")
    key = StudyRun.load(shapes / "mosaicos.yaml", []).key
    assert StudyRun.load(shapes / "mosaicos.yaml", given[:1]).key != key


def test_a_run_whose_detector_would_be_itself():
    """The baseline names itself for the regions, by the config that it is a child of; it has none to find."""
    with pytest.raises(ValueError, match=r"regions\.detector=.*baseline\.yaml: this run needs itself"):
        plan_run(load_config(BASELINE, ["clis.s=4"]), BASELINE)


def test_contradictory_settings(tmp_path):
    with pytest.raises(ValueError, match=r"start\.fresh=\['x'\]: requires start\.from"):
        tiny_config("start.fresh=[x]")
    with pytest.raises(ValueError, match=r"start\.from=a\.pt: replaces what pretrain\.epochs=1 makes"):
        tiny_config("start.from=a.pt", "pretrain.epochs=1")
    with pytest.raises(
        ValueError, match=r"data\.repeat=class-balanced: requires data\.repeat_rounding=stoch"
    ):
        tiny_config("data.repeat=class-balanced")
    with pytest.raises(ValueError, match=r"unknown key start\.from_"):
        tiny_config("start.from_=a.pt")
    (tmp_path / "a.yaml").write_text("start: {from: weights/a.pt}")
    config = load_config(tmp_path / "a.yaml")
    assert Path(config.start.from_).resolve() == tmp_path / "weights" / "a.pt"
    assert config_to_dict(config)["start"] == {"from": config.start.from_, "fresh": [], "train": []}


class TestStudies:
    def test_a_run_is_known_by_its_start(self, second):
        study = {"base": CONFIG, "seeds": [0], "rows": {"plain": {"config": BASELINE}}}
        study["rows"] |= {"second": {"config": str(second)}}
        study["rows"] |= {"from another": {"config": str(second), "overrides": ["start.from=other.pt"]}}
        study["rows"] |= {"first": {"config": str(second), "overrides": ["optim.momentum=0.8"]}}
        Path("rows.yaml").write_text(yaml.safe_dump(study))
        loaded = Study.load(Path("rows.yaml"))
        runs = {row.name: loaded.run(row, 0, []) for row in loaded.rows}
        assert len({run.key for run in runs.values()}) == 4
        assert runs["second"].start.key == runs["plain"].key
        assert runs["first"].start.key != runs["plain"].key  # the momentum is the start's, too
        other = [loaded.run(row, 1, []).start for row in loaded.rows if row.name == "second"]
        assert other[0].plan.config.train.seed == 1

    def test_a_mistake_in_a_row_is_reported_before_any_job(self, second, data):
        study = {"base": CONFIG, "seeds": [0], "rows": {"second": {"config": str(second)}}}
        study["rows"]["second"]["overrides"] = ["start.fresh=[tpyo]"]
        Path("rows.yaml").write_text(yaml.safe_dump(study))
        with pytest.raises(ValueError, match=r"start\.fresh: tpyo matches no parameter"):
            run_study(Path("rows.yaml"), Path("out"), overrides=[*SHORT, f"data.root={data}"])
        assert not Path("out").exists()

    @pytest.mark.slow
    def test_rows_share_the_run_that_they_start_from(self, second, data, capsys):
        rows = {"plain": {"config": BASELINE}, "second": {"config": str(second)}}
        Path("rows.yaml").write_text(yaml.safe_dump({"base": CONFIG, "seeds": [0], "rows": rows}))
        folder = run_study(Path("rows.yaml"), Path("out"), overrides=[*SHORT, f"data.root={data}"])
        assert "2 rows; 2 jobs to do" in capsys.readouterr().out
        keys = [
            row["runs"]["0"]["key"]
            for row in json.loads((folder / "study.json").read_text())["rows"].values()
        ]
        states = [load_checkpoint(RunFolder(f"out/runs/{key}").last)["model"] for key in keys]
        same = [name for name, value in states[0].items() if torch.equal(value, states[1][name])]
        assert len(states[0]) - len(same) == 2
        assert len(records(Path(f"out/runs/{keys[1]}"))) == 4
