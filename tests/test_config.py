"""Configs: what is shipped loads and is the paper's recipe; what is wrong is said in one clear line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from conftest import CATEGORIES
from hypothesis import given
from hypothesis import strategies as st

from clis import config as config_module
from clis.config import RESUMABLE, SCOPES, CLISConfig, Config, DataConfig, data_path, scoped_keys
from clis.config_files import (
    CLIS_OFF,
    config_differences,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    flatten,
    load_config,
    merge_overrides,
)
from clis.config_rules import Rules
from clis.config_scopes import Scope, scoped, scopes_of, setting
from clis.engine.prerequisites import plan_run
from clis.engine.run_folder import RunFolder
from clis.engine.start import check_plan
from clis.losses import build_classification_loss

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if "studies" not in path.parts)
LVIS = [path for path in SHIPPED if path.parent.name.startswith("lvis")]
REBALANCING = ("eqlv2", "seesaw", "bags", "efl", "pcb")
TABLE_I = [path for path in LVIS if "2x" in path.stem or path.stem.startswith(REBALANCING)]
STAGED = [path for path in LVIS if path.stem.startswith(("detic", "mosaicos", "self", "unbiased"))]
ONE_X = [path for path in LVIS if path not in TABLE_I and path not in STAGED]
"""The recipes of section IV-A; the others are of table I, and the systems of table VII in stages as long."""


def shipped_name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def value_at(config: Config, key: str) -> object:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.fixture
def write(tmp_path: Path):
    """Writes a config file below a temporary folder."""

    def write_file(name: str, text: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


class TestShipped:
    def test_the_recipes_of_the_paper_are_there(self):
        """Its own in tables I, II and VIII, the losses of table I and the systems of table VII."""
        systems = ("detic", "mosaicos", "mosaicos_mosaics", "self_training", "unbiased_teacher")
        assert {shipped_name(path) for path in LVIS} == {
            *(f"lvis_v1/{name}_r50.yaml" for name in (*REBALANCING, *systems)),
            "lvis_v1/baseline_2x_r50.yaml",
            "lvis_v1/clis_r50.yaml",
            "lvis_v1/clis_r101.yaml",
            "lvis_v1/baseline_r50.yaml",
            "lvis_v0.5/clis_r50.yaml",
            "lvis_v0.5/baseline_r50.yaml",
        }

    @pytest.mark.parametrize("path", SHIPPED, ids=shipped_name)
    def test_loads_and_its_detector_does_too(self, path):
        config = load_config(path)
        assert config.output == str(Path("runs", shipped_name(path)).with_suffix(""))
        assert load_config(path, ["clis=off"]).clis == dataclasses.replace(config.clis, **CLIS_OFF)
        if config.clis.s > 0 and config.regions.detector is not None:
            detector = load_config(config.regions.detector)
            assert (detector.clis.s, detector.clis.t) == (0, 0)
            assert (detector.data.train, detector.data.root) == (config.data.train, config.data.root)

    @pytest.mark.parametrize("path", SHIPPED, ids=shipped_name)
    def test_the_weights_that_it_starts_from_will_fit(self, path):
        check_plan(plan_run(load_config(path), str(path)))

    @pytest.mark.parametrize("path", SHIPPED, ids=shipped_name)
    def test_header_names_a_command_that_runs_it(self, path):
        header = path.read_text().split("\n\n")[0]
        assert f"--config configs/{shipped_name(path)}" in header or "benchmarks/" in header

    @pytest.mark.parametrize("path", TABLE_I, ids=shipped_name)
    def test_recipes_of_table_i_have_its_schedule(self, path):
        """Twice the steps, decayed after 2/3 and 11/12; BAGS starts from that and trains its last layer as
        long as the 1x recipes."""
        config, name = load_config(path), path.stem.split("_")[0]
        schedule = (config.train.steps, config.optim.decay_steps)
        assert schedule == ((90000, (60000, 82500)) if name == "bags" else (180000, (120000, 165000)))
        assert (config.clis.s, config.clis.objectness, config.data.repeat_threshold) == (0, False, 1e-3)
        build_classification_loss(config.loss.classification, CATEGORIES)
        if name == "bags":
            assert Path(config.start.from_).samefile(path.parent / "baseline_2x_r50.yaml")

    @pytest.mark.parametrize("path", [*ONE_X, *STAGED], ids=shipped_name)
    def test_lvis_recipes_hold_the_settings_of_section_iv_a(self, path):
        config = load_config(path)
        paper = {
            "train.steps": 90000,
            "train.images_per_step": 16,
            "optim.lr": 0.02,
            "optim.lr_images": 16,
            "optim.momentum": 0.9,
            "optim.weight_decay": 1e-4,
            "optim.decay_steps": (60000, 80000),
            "optim.warmup_steps": 500,
            "data.repeat_threshold": 1e-3,
            "data.short_sides": (640, 672, 704, 736, 768, 800),
            "data.max_size": 1333,
            "data.mosaic_size": 448,
            "test.score_threshold": 1e-4,
            "test.nms_iou": 0.5,
            "test.detections": 300,
            "model.backbone.norm": "folded",
            "model.backbone.trainable_layers": 3,
        }
        assert {key: value_at(config, key) for key in paper} == paper

    @pytest.mark.parametrize("path", [path for path in LVIS if "clis" in path.name], ids=shipped_name)
    def test_clis_recipes_have_every_part_with_the_papers_settings(self, path):
        config = load_config(path)
        # s and t, tables V and VI; alpha and beta, tables III and IV; the rest from section IV-A
        # (momentum is MoCo's).
        assert config.clis == CLISConfig(
            task_specialized=True,
            objectness=True,
            s=16,
            t=2,
            siamese=True,
            contrastive=True,
            embedding_dim=128,
            queue_size=115712,
            momentum=0.999,
            temperature=0.2,
        )
        assert (config.loss.alpha, config.loss.beta) == (0.1, 0.05)
        assert config.regions.rule == "category-rank-first"
        assert Path(config.regions.detector).samefile(path.parent / "baseline_r50.yaml")

    @pytest.mark.parametrize(
        "path",
        [path for path in SHIPPED if path.stem.startswith("baseline") and "2x" not in path.stem],
        ids=shipped_name,
    )
    def test_baselines_differ_from_clis_in_the_parts_of_clis_alone(self, path):
        baseline = load_config(path)
        clis = load_config(path.with_name(path.name.replace("baseline", "clis")))
        parts = {"task_specialized", "objectness", "s", "t", "siamese", "contrastive"}
        differing = {line.split(":")[0] for line in config_differences(baseline, clis)}
        assert differing == {f"clis.{part}" for part in parts}
        assert not any(getattr(baseline.clis, part) for part in parts)

    def test_clis_off_leaves_the_other_fields_alone(self, tmp_path):
        (tmp_path / "clis.yaml").write_text("clis: {s: 4, queue_size: 7}")
        (tmp_path / "child.yaml").write_text("base: clis.yaml\nclis: off")
        (tmp_path / "alone.yaml").write_text("clis: off")
        expected = CLISConfig(**CLIS_OFF, queue_size=7)
        assert load_config(tmp_path / "child.yaml").clis == expected
        assert load_config(tmp_path / "clis.yaml", ["clis=off"]).clis == expected
        assert load_config(tmp_path / "alone.yaml").clis == CLISConfig(**CLIS_OFF)
        some = load_config(tmp_path / "child.yaml", ["clis.objectness=true"]).clis
        assert some == dataclasses.replace(expected, objectness=True)
        with pytest.raises(ValueError, match="clis: a section of keys is needed, not True"):
            load_config(tmp_path / "alone.yaml", ["clis=on"])

    def test_backbone_weights_fit_the_backbone(self):
        weights = {shipped_name(path): load_config(path).model.backbone for path in LVIS}
        for name, backbone in weights.items():
            depth = "resnet101" if "r101" in name else "resnet50"
            assert backbone.name == depth
            assert backbone.weights.startswith(f"{depth}-")

    def test_lvis_versions_name_their_images_below_other_folders(self):
        v1 = load_config(CONFIGS / "lvis_v1/clis_r50.yaml").data
        v05 = load_config(CONFIGS / "lvis_v0.5/clis_r50.yaml").data
        assert (v1.train_images, v1.val_images) == ("coco", "coco")
        assert (v05.train_images, v05.val_images) == ("coco/train2017", "coco/val2017")
        assert (v05.drop_invalid, v05.drop_unmatched) == (True, True)


class TestFiles:
    def test_an_empty_file_is_the_default_recipe(self, write):
        config = load_config(write("empty.yaml"))
        assert config_differences(config, Config()) == []

    def test_a_child_changes_only_the_keys_that_it_names(self, write):
        write("parents/base.yaml", "optim: {lr: 0.5, momentum: 0.5}\ntrain: {steps: 7}\n")
        write("middle.yaml", "base: parents/base.yaml\noptim: {momentum: 0.25}\n")
        config = load_config(write("child.yaml", "base: middle.yaml\noptim: {warmup_steps: 3}\n"))
        assert (config.optim.lr, config.optim.momentum, config.optim.warmup_steps) == (0.5, 0.25, 3)
        assert config.train.steps == 7
        assert config.optim.weight_decay == 1e-4

    def test_regions_detector_is_relative_to_the_file_that_names_it(self, write, tmp_path):
        write("parents/base.yaml", "regions: {detector: detector.yaml}")
        config = load_config(write("child.yaml", "base: parents/base.yaml"))
        assert Path(config.regions.detector).resolve() == tmp_path.resolve() / "parents" / "detector.yaml"
        config = load_config(tmp_path / "child.yaml", ["regions.detector=mine.pt"])
        assert config.regions.detector == "mine.pt"

    def test_or_the_name_of_a_shipped_config(self, write):
        config = load_config(write("child.yaml", "regions: {detector: shapes/baseline.yaml}"))
        assert config.regions.detector == "shapes/baseline.yaml"

    @pytest.mark.parametrize("source", ["runs/base/", "./runs/base", "runs/gone", "shapes/baseline.yaml"])
    def test_a_run_knows_its_sources_in_any_spelling(self, write, tmp_path, monkeypatch, source):
        """Also one that is gone when the run is looked at again."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "base").mkdir(parents=True)
        path = write("mine.yaml", "train: {steps: 7}")
        overrides = ["output=runs/next", f"start.from={source}", f"regions.detector={source}"]
        config = load_config(path, overrides)
        folder = RunFolder(config.output)
        folder.claim(config)
        folder.metrics.write_text("{}\n")  # from here on it belongs to the config
        (tmp_path / "runs" / "base").rmdir()
        for _ in range(2):
            folder.claim(load_config(path, overrides))
        assert load_config(folder.config) == folder.read_config() == config

    @pytest.mark.parametrize("overrides", [(), ("regions.detector=parents/detector.yaml",)])
    def test_the_config_of_a_run_can_be_loaded(self, write, tmp_path, monkeypatch, overrides):
        """Its file is in another folder than the one that its detector was named in."""
        write("parents/detector.yaml", "clis: off")
        path = write("parents/mine.yaml", "regions: {detector: detector.yaml}\nclis: {s: 4}\n")
        monkeypatch.chdir(tmp_path)
        config = load_config(path, ["output=runs/mine", *overrides])
        folder = RunFolder(config.output)
        folder.claim(config)
        assert load_config(folder.config) == folder.read_config() == config
        monkeypatch.chdir(tmp_path / "parents")
        moved = load_config("../runs/mine/config.yaml")
        assert moved.regions.detector == "detector.yaml"
        assert plan_run(moved, "mine").detector is not None

    @pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
    def test_a_cycle_of_bases_is_told(self, write, names):
        for name, base in zip(names, (*names[1:], names[0])):
            path = write(f"{name}.yaml", f"base: {base}.yaml")
        with pytest.raises(ValueError, match=r"`base: a\.yaml` leads back to itself"):
            load_config(path.with_name("a.yaml"))

    def test_a_missing_base_names_the_file_that_asks_for_it(self, write):
        write("middle.yaml", "base: gone.yaml")
        path = write("child.yaml", "base: middle.yaml")
        with pytest.raises(FileNotFoundError, match=r"middle\.yaml: `base: gone\.yaml` .*does not exist"):
            load_config(path)

    def test_a_missing_config_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"gone\.yaml: no such config"):
            load_config(tmp_path / "gone.yaml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- train\n- data\n", ": a config is a mapping of sections.*not a list"),
            ("just words", ": a config is a mapping of sections.*not a str"),
            ("train: {steps: 1", ".*not valid YAML"),
            ("train:\n\tsteps: 1", ", line 2: not valid YAML: a tab; indent with spaces"),
            (
                "train:\n  steps: 1\ndata:\n  workers: 0\ntrain:\n  seed: 1\n",
                ", line 5: not valid YAML: train is there twice",
            ),
            ("extends: a.yaml", ": unknown key extends; a config names its parent by base: FILE"),
            ("rows: {}", ": unknown key rows; this is a study: python -m clis study FILE"),
            ("base: [a.yaml, b.yaml]", r": `base:` names one file, not \['a.yaml', 'b.yaml'\]"),
            ("train:\n  # steps: 10\n", ": train: a section of keys is needed, not nothing"),
            ("data: 5", ": data: a section of keys is needed, not 5"),
        ],
    )
    def test_a_file_of_another_form_is_an_error_that_names_it(self, write, text, message):
        with pytest.raises(ValueError, match=rf"wrong\.yaml{message}"):
            load_config(write("wrong.yaml", text))

    def test_merge_keys_add_what_a_mapping_does_not_have(self, write):
        """Merged into another mapping before it is read itself, it still has each of its keys once."""
        text = (
            "model:\n  backbone: &own\n    <<: {width: 32, fpn_channels: 64}\n    width: 48\n"
            "paper:\n  <<: *own\n  AP: 1\n"
        )
        with pytest.raises(ValueError, match=r"a\.yaml: unknown key paper\.(width|fpn_channels)"):
            load_config(write("a.yaml", text))
        backbone = load_config(write("a.yaml", text.partition("paper")[0])).model.backbone
        assert (backbone.width, backbone.fpn_channels) == (48, 64)

    def test_a_base_by_the_name_of_a_shipped_config(self, write, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        inherited = load_config(write("mine.yaml", "base: groceries/clis")).data
        assert inherited.train == "groceries/train.json"
        own = load_config(write("mine.yaml", "base: groceries/clis\ndata: {train: mine.json}")).data
        assert (inherited.source is None, own.source) == (False, None)  # how to get data is of those alone
        with pytest.raises(FileNotFoundError, match=r"does not exist; name a file, .* or a shipped config"):
            load_config(write("mine.yaml", "base: grocery/clis"))

    @pytest.mark.parametrize(
        ("name", "folder"),
        [
            ("configs/a/b.yaml", "runs/a/b"),
            ("configs/old/configs/b.yaml", "runs/b"),
            ("mine.v2.yaml", "runs/mine.v2"),
        ],
    )
    def test_the_run_folder_is_the_path_below_configs(self, write, name, folder):
        assert load_config(write(name)).output == folder

    def test_the_run_folder_can_be_named(self, write):
        assert load_config(write("configs/a.yaml"), ["output=elsewhere"]).output == "elsewhere"


class TestDataRoot:
    @pytest.fixture(autouse=True)
    def _working_folder(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("CLIS_DATA", raising=False)

    def test_is_the_override_then_the_file_then_the_environment_then_data(self, write, monkeypatch, tmp_path):
        plain, named = write("plain.yaml"), write("named.yaml", "data: {root: from_file}")
        assert load_config(plain).data.root == str(tmp_path / "data")
        monkeypatch.setenv("CLIS_DATA", "from_environment")
        assert load_config(plain).data.root == str(tmp_path / "from_environment")
        assert load_config(named).data.root == str(tmp_path / "from_file")
        assert load_config(named, ["data.root=/from/override"]).data.root == "/from/override"

    def test_home_is_expanded(self, write, monkeypatch):
        monkeypatch.setenv("HOME", "/somebody")
        assert load_config(write("a.yaml"), ["data.root=~/sets"]).data.root == "/somebody/sets"
        assert load_config(write("a.yaml"), ["data.root=~"]).data.root == "/somebody"

    def test_paths_are_below_it_unless_absolute(self, write):
        config = load_config(write("a.yaml"), ["data.root=/sets"])
        assert data_path(config, "lvis/val.json") == Path("/sets/lvis/val.json")
        assert data_path(config, "/other/val.json") == Path("/other/val.json")


class TestStrictKeys:
    @pytest.mark.parametrize(
        ("override", "meant"),
        [
            ("data.workrs=2", "data.workers"),
            ("trian.steps=2", "train"),
            ("clis.task_specialised=false", "clis.task_specialized"),
            ("model.backbone.widht=32", "model.backbone.width"),
            ("lr=0.1", "optim.lr or pretrain.lr"),
            ("clis.alpha=0.1", "loss.alpha"),
            ("backbone.name=resnet18", "model.backbone"),
            ("momentum=0.9", "clis.momentum or teacher.momentum or optim.momentum"),
        ],
    )
    def test_an_unknown_key_names_the_nearest(self, write, override, meant):
        key = override.split("=")[0]
        expected = rf"a\.yaml: unknown key .*; did you mean {meant}\?$"
        with pytest.raises(ValueError, match=expected) as raised:
            load_config(write("a.yaml"), [override])
        assert f"unknown key {key.split('.')[0]}" in str(raised.value)

    def test_an_unknown_key_like_no_other_lists_those_of_its_section(self):
        with pytest.raises(ValueError, match=r"unknown key loss\.xyz; known: classification, alpha, beta, "):
            config_from_dict({"loss": {"xyz": 1}})

    def test_the_same_in_a_file(self, write):
        with pytest.raises(
            ValueError, match=r"a\.yaml: unknown key optim\.lr_image; did you mean optim\.lr_images"
        ):
            load_config(write("a.yaml", "optim: {lr_image: 8}"))


class TestTypes:
    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("optim.weight_decay", "1e-4", 1e-4),  # a string to YAML 1.1
            ("optim.lr", "1", 1.0),
            ("optim.clip_norm", "10", 10.0),
            ("optim.clip_norm", "null", None),
            ("clis.siamese", "off", False),
            ("data.mapping", "null", None),
            ("data.image_level", "one_folder", ("one_folder",)),
            ("data.short_sides", "[80, 96]", (80, 96)),
            ("data.mosaic_scale", "[0.5, 2]", (0.5, 2.0)),
            ("optim.decay_steps", "[]", ()),
        ],
    )
    def test_values_become_the_type_of_their_field(self, write, key, text, value):
        found = value_at(load_config(write("a.yaml"), [f"{key}={text}"]), key)
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("train.steps=9e4", "train.steps: a whole number is needed, not '9e4'"),
            ("train.steps=1.5", "train.steps: a whole number is needed, not 1.5"),
            ("train.steps=true", "train.steps: a whole number is needed, not True"),
            ("train.steps=null", "train.steps: a whole number is needed, not None"),
            ("optim.lr=fast", "optim.lr: a number is needed, not 'fast'"),
            ("optim.lr=true", "optim.lr: a number is needed, not True"),
            (f"optim.lr=1{'0' * 400}", "optim.lr: a number is needed, not 1000"),  # beyond float64
            ("clis.siamese=1", "clis.siamese: true or false is needed, not 1"),
            ("data={train: 5}", "data.train: a string is needed, not 5"),
            ("data.short_sides={a: 1}", "data.short_sides: a list is needed"),
            ("data.short_sides=80,96", "data.short_sides: a whole number is needed, not '80,96'"),
            ("data.mosaic_scale=[1]", r"data.mosaic_scale: 2 values are needed, not \[1\]"),
            ("model.backbone.name=vgg16", "model.backbone.name: 'vgg16' is not one of 'resnet10', "),
            ("train.precision=[float32]", "train.precision: .* is not one of 'float32', "),
            ("clis=", "clis: a section of keys is needed, not nothing"),
        ],
    )
    def test_a_wrong_type_is_an_error_that_names_the_key(self, write, override, message):
        with pytest.raises(ValueError, match=rf"a\.yaml: {message}"):
            load_config(write("a.yaml"), [override])


class TestOverrides:
    def test_apply_in_order_and_into_sections_that_the_file_lacks(self, write):
        path = write("a.yaml", "train: {steps: 5, seed: 3}")
        config = load_config(path, ["train.steps=6", "model.backbone.width=32", "train.steps=7"])
        assert (config.train.steps, config.train.seed, config.model.backbone.width) == (7, 3, 32)
        assert load_config(path, "train.steps=6") == load_config(path, ["train.steps=6"])

    def test_a_mapping_leaves_the_other_keys_of_its_section(self, write):
        path = write("a.yaml", "clis: {s: 4, t: 1, momentum: 0.5}")
        config = load_config(path, ["clis={s: 8}"])
        assert (config.clis.s, config.clis.t, config.clis.momentum) == (8, 1, 0.5)

    def test_the_value_may_hold_equals_signs_colons_and_brackets(self):
        values = merge_overrides({}, ["data.train=a=b.json", "output=runs: [x"])
        assert values == {"data": {"train": "a=b.json"}, "output": "runs: [x"}

    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("data.root=/data/set #1", "/data/set #1"),  # in YAML a comment begins at the space
            ("output=runs/a: b", "runs/a: b"),  # a mapping
            ("output=2024-01-01", "2024-01-01"),  # a date
            ("output=007", "007"),  # 7, in base 8
            ("output=on", "on"),  # true
            ("output=[x]", "[x]"),  # a list
            ("output='a b'", "a b"),
            ("regions.file=null", None),
            ("data.image_level=first #2", "first #2"),
            ("data.image_level=[first, second]", ["first", "second"]),
            ("train.steps=007", 7),  # no text: YAML
        ],
    )
    def test_texts_are_taken_as_they_are(self, override, value):
        ((section, found),) = merge_overrides({}, [override]).items()
        assert (found if section == "output" else next(iter(found.values()))) == value

    def test_of_a_part_of_clis_leave_clis_off_as_it_is(self, write):
        """What one load sets after `clis=off`, the next load must not find in every `clis: off`."""
        path = write("a.yaml", "clis: off")
        assert load_config(path, ["clis=off", "clis.task_specialized=true"]).clis.task_specialized
        merge_overrides({}, ["clis=off", "clis.objectness=true"])
        found = load_config(path).clis
        assert (found.task_specialized, found.objectness) == (False, False)

    def test_a_key_twice_in_a_mapping_is_an_error(self, write):
        with pytest.raises(ValueError, match=r"train: a section of keys is needed, not '\{steps: 4"):
            load_config(write("a.yaml"), ["train={steps: 4, steps: 5}"])

    def test_leave_the_given_values_as_they_are(self):
        values = {"train": {"steps": 5}}
        merge_overrides(values, ["train.steps=6"])
        assert values == {"train": {"steps": 5}}

    @pytest.mark.parametrize("override", ["train.steps", "=5", ".steps=5", "train.=5", "train..steps=5", ""])
    def test_of_another_form_are_an_error_that_shows_the_form(self, override):
        with pytest.raises(ValueError, match=r"write it as key\.path=value, e\.g\. train\.steps=100"):
            merge_overrides({}, [override])

    def test_cannot_lead_through_a_value(self, write):
        path = write("a.yaml", "train: {steps: 5}")
        with pytest.raises(ValueError, match=r"'train\.steps\.x=1': steps is a value, not a section"):
            load_config(path, ["train.steps.x=1"])


class TestContradictions:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["clis.s=6"], "clis.s=6: must be a multiple of 4"),
            (["clis.s=-4"], "clis.s=-4: must be a multiple of 4"),
            (["model.backbone.norm_eps=-1"], "model.backbone.norm_eps=-1.0: must be at least 0 and finite"),
            (
                ["model.backbone={name: resnet18, stride_in_1x1: true}"],
                "stride_in_1x1=true: requires bottleneck blocks; resnet18 has basic blocks",
            ),
            (["model.rpn.min_size=-1"], "model.rpn.min_size=-1.0: must be at least 0"),
            (["test.min_size=.inf"], "test.min_size=inf: must be at least 0"),
            (["model.rpn.shrink_limit=1.1"], "model.rpn.shrink_limit=1.1: must be between 0 and 1"),
            (
                ["model.rpn.negative_iou=0.8"],
                "model.rpn.negative_iou=0.8: must be at most model.rpn.positive_iou=0.7",
            ),
            (["test.shrink_limit=.nan"], "test.shrink_limit=nan: must be between 0 and 1"),
            (["clis.s=4", "clis.t=5"], "clis.t=5: must be between 0 and clis.s=4"),
            (["clis.t=-1"], "clis.t=-1: must be between 0"),
            (["clis.s=0"], "clis.t=2: must be between 0 and clis.s=0"),
            (["clis.t=0"], "clis.contrastive=true: requires pasted pairs"),
            (["clis.queue_size=0"], "clis.queue_size=0: must be at least 1"),
            (["clis.momentum=1.01"], "clis.momentum=1.01: must be between 0 and 1"),
            (["clis.temperature=0"], "clis.temperature=0.0: must be above 0"),
            (["data.image_level=[]"], "clis.s=16: requires folders in data.image_level"),
            (["data.short_sides=[]"], r"data.short_sides=\[]: must be at least one size"),
            (
                ["data.short_sides=[320, 0]"],
                r"data.short_sides=\[320, 0]: must be at least one size, all above 0",
            ),
            (["data.mosaic_size=225"], "data.mosaic_size=225: must be even"),
            (["data.flip=50"], "data.flip=50.0: must be between 0 and 1"),
            (["data.paste_size=[64, 32]"], r"data.paste_size=\[64.0, 32.0\]: must be a lower bound"),
            (["data.workers=-1"], "data.workers=-1: must be at least 0"),
            (["model.backbone.trainable_layers=6"], "trainable_layers=6: must be between 0 and 5"),
            (["model.backbone.norm=group", "model.backbone.width=24"], "width=24: must be a multiple of 16"),
            (["model.rpn.samples=0"], "model.rpn.samples=0: must be at least 1"),
            (["model.roi.positive_fraction=0"], "model.roi.positive_fraction=0.0: must be above 0"),
            (["model.roi.fc_cls_std=-1"], "model.roi.fc_cls_std=-1.0: must be at least 0"),
            (["model.roi.fc_cls_std=.inf"], "model.roi.fc_cls_std=inf: must be at least 0 and finite"),
            (["train.steps=0"], "train.steps=0: must be at least 1"),
            (["optim.decay_steps=[480, -1]"], r"optim.decay_steps=\[480, -1\]: must all be at least 0"),
            (["optim.warmup_steps=-1"], "optim.warmup_steps=-1: must be at least 0"),
            (["data.paste_size=[1, .inf]"], "data.paste_size=.*: must be a lower bound .*, then a finite"),
            (["model.rpn.anchor_ratios=[1, .nan]"], "anchor_ratios=.*: must be .*, all above 0 and finite"),
            (["train.save_every=0"], "train.save_every=0: must be at least 1"),
            (["train.seed=-1"], "train.seed=-1: must be between 0 and"),
            (["optim.lr=0"], "optim.lr=0.0: must be above 0"),
            (["optim.lr=.nan"], "optim.lr=nan: must be above 0"),
            (["test.images_per_batch=0"], "test.images_per_batch=0: must be at least 1"),
            (["loss.alpha=-1"], "loss.alpha=-1.0: must be at least 0"),
            (["loss.box=.nan"], "loss.box=nan: must be at least 0"),
            (["train.eval_every=0"], "train.eval_every=0: must be above 0, or null"),
            (
                ["data.mosaic_surroundings=0.5"],
                "mosaic_surroundings=0.5: must be at least 1 and finite, or null",
            ),
            (["data.cutout_size=[0.5, 1.5]"], r"data.cutout_size=\[0.5, 1.5\]: must be .* of at most 1"),
            (
                ["data.image_level_share=0.5", "data.shuffle_block=9"],
                "image_level_share=0.5: draws single images",
            ),
            (["data.mosaic_size=30"], r"data.min_region=[0-9.]+: must be at most half of data.mosaic_size"),
            (["regions.file=runs/mine.json"], r"regions.file=runs/mine.json: must end with .npy"),
            (["regions.file=runs/v1.0"], r"regions.file=runs/v1.0: must end with .npy"),
            (["regions.short_side=[]"], r"regions.short_side=\[\]: must be at least one size"),
            (["regions.max_size=300"], "regions.max_size=300: must be at least the largest .*, 400"),
            (["regions.rule=given"], "regions.rule=given: requires a file of boxes; set regions.boxes"),
            (["regions.boxes=b.json"], "regions.boxes=b.json: not read by regions.rule=category-rank-first"),
            (["clis.detect_mosaics=true"], "clis.detect_mosaics=true: requires clis.s=4 and clis.t=0, and"),
            (
                [
                    "clis.s=4",
                    "clis.t=0",
                    "clis.contrastive=false",
                    "clis.detect_mosaics=true",
                    "regions.rule=max-size",
                ],
                "clis.detect_mosaics=true: requires pre-defined regions, not regions.rule=max-size",
            ),
            (
                [
                    "clis.t=0",
                    "clis.contrastive=false",
                    "regions.rule=max-score",
                    "data.mosaic_surroundings=2",
                ],
                "regions.rule=max-score: chooses .*; set data.mosaic_surroundings=null",
            ),
            (
                ["regions.rule=max-size"],
                "regions.rule=max-size: chooses regions .*; set clis.t=0 and clis.contrastive=false",
            ),
            (["teacher.momentum=2"], "teacher.momentum=2.0: must be between 0 and 1, or null"),
            (["teacher.score=1"], "teacher.score=1.0: must be at least 0 and below 1"),
            (["teacher.momentum=1"], "teacher.momentum=1.0: requires a trained detector .*; set start.from"),
            (
                ["teacher.momentum=1", "start.from=a.pt"],
                "teacher.momentum=1.0: uses no regions to paste; set clis.t=0 and clis.contrastive=false",
            ),
            (
                ["teacher.momentum=1", "start.from=a.pt", "clis.t=0", "clis.contrastive=false"],
                "teacher.momentum=1.0: uses no regions; set regions.rule=full",
            ),
            (
                ["model.backbone.canvas=square", "test.max_size=1400"],
                "model.backbone.canvas=square: requires equal .*, not 1333 and 1400",
            ),
            (["model.roi.cosine=0"], "model.roi.cosine=0.0: must be above 0 and finite, or null"),
            (["optim.clip_norm=-1"], "optim.clip_norm=-1.0: must be above 0 and finite, or null"),
            (["optim.lr=.inf"], "optim.lr=inf: must be above 0 and finite"),
            (["optim.momentum=.nan"], "optim.momentum=nan: must be between 0 and 1"),
            (["test.nms_iou=-3"], "test.nms_iou=-3.0: must be between 0 and 1"),
            (["model.rpn.pre_nms_test=0"], "model.rpn.pre_nms_test=0: must be at least 1"),
            (["clis.embedding_dim=-3"], "clis.embedding_dim=-3: must be at least 1"),
            (["model.roi.refinement_rounds=1"], "model.roi.refinement_rounds=1: must be 2 to 5, or null"),
        ],
    )
    def test_are_refused_in_the_words_of_the_keys(self, write, overrides, message):
        with pytest.raises(ValueError, match=rf"a\.yaml: .*{message}"):
            load_config(write("a.yaml"), overrides)

    @pytest.mark.parametrize(
        "overrides",
        [
            ["clis.t=0", "clis.contrastive=false"],
            ["clis.s=0", "clis.t=0", "clis.contrastive=false", "data.image_level=[]"],
            ["clis.s=4", "clis.t=4"],
            ["clis.contrastive=false"],  # pasted instances as ordinary ground truth
            ["model.backbone.width=24"],  # only group norm needs a multiple of 16
            ["model.backbone.canvas=square", "test.max_size=1340"],  # both are padded to 1344
        ],
    )
    def test_settings_at_the_border_of_one_are_allowed(self, write, overrides):
        load_config(write("a.yaml"), overrides)

    def test_are_found_in_python_too(self):
        with pytest.raises(ValueError, match=r"clis\.t=5"):
            CLISConfig(s=4, t=5)
        with pytest.raises(ValueError, match=r"clis\.s=16: requires folders"):
            Config(data=DataConfig(image_level=()))

    def test_name_the_section_where_it_is(self, monkeypatch):
        """Rules spell out the key of their section, which the section itself cannot know."""
        checked = {}

        class Spy(Rules):
            def __init__(self, prefix: str, section: object) -> None:
                super().__init__(prefix, section)
                checked[prefix] = section

        monkeypatch.setattr(config_module, "Rules", Spy)
        config = Config()
        assert checked.keys() == {key.rpartition(".")[0] for key in SCOPES} - {""}
        assert all(value_at(config, key) is section for key, section in checked.items())


class TestScopes:
    """What a field is for: a field without a scope would be missed by whoever asks for one."""

    def test_are_on_every_field(self):
        assert list(SCOPES) == list(flatten(config_to_dict(Config())))

    @pytest.mark.parametrize(
        ("scope", "some", "others"),
        [
            (Scope.SHARED, {"train.steps", "data.train", "data.root"}, {"clis.s", "data.cutout", "output"}),
            (Scope.MACHINE, {"output", "train.device"}, {"train.seed", "pretrain.images_per_process"}),
            (Scope.INFERENCE, {"model.rpn.proposals"}, {"model.rpn.pre_nms_train"}),
            (Scope.PRETRAINING, {"pretrain.lr", "model.backbone.width"}, {"model.backbone.fpn_channels"}),
            (Scope.REGIONS, {"regions.rule", "data.train"}, {"regions.file", "data.mosaic_size"}),
        ],
    )
    def test_choose_keys_of_fields_and_of_whole_sections(self, scope, some, others):
        assert some <= set(scoped_keys(scope))
        assert not others & set(scoped_keys(scope))

    def test_must_be_there(self):
        @dataclasses.dataclass
        class Section:
            has: int = setting(1, Scope.OWN)
            lacks: int = 2

        @dataclasses.dataclass
        class Whole:
            section: Section = dataclasses.field(default_factory=Section)

        with pytest.raises(TypeError, match=r"^section\.lacks: has no scope"):
            scopes_of(Whole)

    def test_are_either_on_a_section_or_on_its_fields(self):
        @dataclasses.dataclass
        class Section:
            twice: int = setting(1, Scope.OWN)

        @dataclasses.dataclass
        class Whole:
            section: Section = dataclasses.field(default_factory=Section, metadata=scoped(Scope.OWN))

        with pytest.raises(TypeError, match=r"^section\.twice: its section has a scope already"):
            scopes_of(Whole)

    @pytest.mark.parametrize(
        ("scope", "message"),
        [
            (Scope.PRETRAINING, "exactly one of SHARED, OWN and IMAGE_LEVEL"),
            (Scope.SHARED | Scope.IMAGE_LEVEL, "exactly one of SHARED, OWN and IMAGE_LEVEL"),
            (Scope.SHARED | Scope.MACHINE | Scope.REGIONS, "changes a result, so it cannot be MACHINE"),
        ],
    )
    def test_must_not_contradict_themselves(self, scope, message):
        @dataclasses.dataclass
        class Section:
            field: int = setting(1, scope)

        with pytest.raises(TypeError, match=message):
            scopes_of(Section)


class TestDifferences:
    def test_name_the_key_and_both_values(self):
        config = Config()
        other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
        assert config_differences(config, other) == ["optim.lr: 0.02 != 0.5"]

    def test_can_be_of_some_sections_and_keys(self):
        """A key is no other one that begins like it."""
        changed = ["data.train=a.json", "data.train_images=b", "optim.lr=0.5", "optim.momentum=0.5"]
        other = config_from_dict(merge_overrides({}, changed))
        found = config_differences(Config(), other, ("optim", "data.train", "loss"))
        assert [line.split(":")[0] for line in found] == ["data.train", "optim.lr", "optim.momentum"]

    @pytest.mark.parametrize("key", RESUMABLE)
    def test_ignore_what_a_resumed_run_may_change(self, key):
        places = {"data.root": "/elsewhere", "output": "elsewhere"}
        values = {**places, "train.device": "cpu", "train.on_nonfinite": "skip"}
        changed = config_from_dict(merge_overrides({}, [f"{key}={values.get(key, 99)}"]))
        assert value_at(changed, key) != value_at(Config(), key)
        assert config_differences(Config(), changed) == []

    def test_do_not_ignore_what_changes_the_result(self):
        keys = ("train.seed", "train.images_per_step", "train.precision", "data.train")
        for key, value in zip(keys, (1, 8, "bfloat16", "other.json")):
            changed = config_from_dict(merge_overrides({}, [f"{key}={value}"]))
            assert [line.split(":")[0] for line in config_differences(Config(), changed)] == [key]


class TestRoundTrip:
    @pytest.mark.parametrize("path", SHIPPED, ids=shipped_name)
    def test_a_config_survives_yaml(self, path):
        config = load_config(path)
        assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config

    @given(
        rate=st.floats(min_value=1e-300, max_value=1e300),
        clip=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        steps=st.lists(st.integers(0, 2**40)).map(tuple),
        folders=st.lists(st.text(), min_size=1).map(tuple),
        name=st.text(),
    )
    def test_with_any_numbers_and_texts(self, rate, clip, steps, folders, name):
        config = Config()
        optim = dataclasses.replace(config.optim, lr=rate, clip_norm=clip, decay_steps=steps)
        data = dataclasses.replace(config.data, train=name, image_level=folders)
        config = dataclasses.replace(config, optim=optim, data=data)
        assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config

    def test_the_plain_form_has_plain_types_only(self):
        def leaves(value):
            if isinstance(value, dict):
                return [leaf for item in value.values() for leaf in leaves(item)]
            return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]

        assert {type(leaf) for leaf in leaves(config_to_dict(Config()))} <= {
            str,
            int,
            float,
            bool,
            type(None),
        }


class TestPaper:
    def test_the_figures_belong_to_one_file(self, write):
        """A child does not inherit them; an override of the recipe drops them, and one of its own stays."""
        parent = write("parent.yaml", "paper: {AP: 29.2, APr: 24.4}\ntrain: {steps: 7}\n")
        child = write("child.yaml", "base: parent.yaml\n")
        assert load_config(parent).paper.figures == {"AP": 29.2, "APr": 24.4}
        assert load_config(child).paper.figures == {}
        assert load_config(child).train.steps == 7
        same = ["train.seed=3", "data.workers=0", "train.images_per_process=2", "output=x"]
        assert load_config(parent, same).paper.figures == {"AP": 29.2, "APr": 24.4}
        assert load_config(parent, ["clis=off"]).paper.figures == {}
        assert load_config(parent, ["train.steps=9", "paper.AP=3"]).paper.figures == {"AP": 3.0}

    def test_they_change_nothing(self):
        config = load_config(CONFIGS / "lvis_v1" / "clis_r50.yaml")
        assert config_differences(config, dataclasses.replace(config, paper=Config().paper)) == []

    @pytest.mark.parametrize(
        ("path", "figures"),
        [
            ("lvis_v1/clis_r50", (29.2, 24.4, 28.6, 31.9)),  # tables I, II
            ("lvis_v1/clis_r101", (31.1, 25.2, 30.9, 33.8)),
            ("lvis_v1/baseline_r50", (22.0, 8.9, 20.8, 29.1)),
            ("lvis_v1/baseline_2x_r50", (24.1, 14.7, 22.2, 30.5)),
            ("lvis_v1/bags_r50", (26.0, 17.2, 24.9, 31.1)),
            ("lvis_v1/eqlv2_r50", (25.5, 16.4, 23.9, 31.2)),
            ("lvis_v1/seesaw_r50", (26.4, 17.5, 25.3, 31.5)),
            ("lvis_v1/mosaicos_r50", (23.9, 15.5, 22.4, 29.3)),  # table VII
            ("lvis_v1/unbiased_teacher_r50", (19.2, 6.6, 17.4, 26.8)),
            ("lvis_v0.5/clis_r50", (30.4, 25.5, 30.5, 32.1)),
            ("lvis_v0.5/baseline_r50", (24.2, 13.3, 23.3, 29.7)),
            ("lvis_v1/pcb_r50", ()),  # a child of seesaw's; the paper has no such row
            ("lvis_v1/efl_r50", ()),  # the paper's row is of another detector
        ],
    )
    def test_shipped_ones(self, path, figures):
        assert tuple(load_config(CONFIGS / f"{path}.yaml").paper.figures.values()) == figures

    def test_bad_ones(self):
        with pytest.raises(ValueError, match=r"paper\.APr=290\.0: must be between 0 and 100"):
            config_from_dict({"paper": {"APr": 290}})
        with pytest.raises(ValueError, match=r"unknown key paper\.AP50"):
            config_from_dict({"paper": {"AP50": 29}})


@pytest.mark.parametrize("path", LVIS, ids=shipped_name)
def test_the_recipes_of_lvis_evaluate_on_the_way_and_before_each_decay(path):
    config = load_config(path)
    assert config.train.eval_every
    if "bags" not in path.stem:  # its second decay is at 82,500
        assert all(step % config.train.eval_every == 0 for step in config.optim.decay_steps)
