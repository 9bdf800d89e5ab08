"""A classification loss in a module of one's own: found from everywhere; what is wrong with one is told."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CATEGORIES, rows_of, tiny_config
from runs import BASELINE, CONFIG, REPOSITORY, SHORT

from clis.commands import check, run_verb
from clis.commands.study import run_study
from clis.config_files import load_config
from clis.engine.checkpoint import load_checkpoint, load_detector, save_checkpoint
from clis.engine.optim import make_optimizer
from clis.engine.run_folder import RunFolder
from clis.losses import CrossEntropy, build_classification_loss, find_classification_loss
from clis.models import build_model

SOUND = """
from __future__ import annotations
from typing import TYPE_CHECKING
import torch
from torch import nn
from clis.losses import CrossEntropy
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

class Weighted(CrossEntropy):
    def __init__(self, categories, *, gamma: float = 2.0, hard: bool = False):
        super().__init__(categories)
        self.gamma, self.hard = gamma, hard
        self.register_buffer("counts", torch.tensor([float(each.image_count) for each in categories]))

class Positional(Weighted):
    def __init__(self, categories: Sequence[Any], gamma: float = 3.0, *arguments, **more):
        super().__init__(categories, gamma=gamma)
"""

LACKING = """
from clis.losses import ClassificationLoss, CrossEntropy
from torch import nn

class Plain(nn.Module): pass
class Mute(ClassificationLoss):
    def scores(self, logits): return logits
class Blind(ClassificationLoss):
    def forward(self, logits, labels, normalizer, rows): return logits.sum()
class Unsized(Mute, Blind): pass
class Counted(CrossEntropy):
    def __init__(self, num_classes):
        super().__init__(range(num_classes))
class Mean(CrossEntropy):
    def forward(self, logits, labels, normalizer, rows):
        return nn.functional.cross_entropy(logits, labels)
class PerRow(CrossEntropy):
    def forward(self, logits, labels, normalizer, rows):
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))
class Regions(CrossEntropy):
    def image_level(self, logits, labels, normalizer, rows):
        return nn.functional.cross_entropy(logits, labels, reduction="sum")
class Rows(CrossEntropy):
    def forward(self, logits, labels, normalizer, rows): return logits.sum(dim=1)
class Number(CrossEntropy):
    def forward(self, logits, labels, normalizer, rows): return 0.0
class WithBackground(CrossEntropy):
    def scores(self, logits): return logits.softmax(dim=1)
class Detached(CrossEntropy):
    def forward(self, *arguments): return super().forward(*arguments).detach()
class Logits(CrossEntropy):
    def scores(self, logits): return logits[:, :-1]
class Uncounted(CrossEntropy):
    def statistics(self, logits, labels, rows): return None
def function(categories): return CrossEntropy(categories)
"""


@pytest.fixture
def modules(tmp_path, monkeypatch) -> Path:
    """A working folder with modules, none of which Python knows before or after."""
    for name, text in {
        "sound_loss": SOUND,
        "lacking_loss": LACKING,
        "broken_loss": "import not_installed_anywhere",
        "typo_loss": "class Focal(:\n",
        "failing_loss": "raise RuntimeError('no license')",
        "script_loss": "raise SystemExit(2)",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_loss")]:
        del sys.modules[name]


def test_names_of_ours_import_nothing(modules):
    before = set(sys.modules), list(sys.path)
    assert find_classification_loss("cross_entropy").func is CrossEntropy
    assert (set(sys.modules), sys.path) == before


def test_the_loss_is_given_the_categories_with_their_training_images(modules):
    model = build_model(tiny_config("loss.classification=sound_loss:Weighted"), CATEGORIES)
    assert model.classification_loss.counts.tolist() == [1, 10, 11, 100, 1000]
    assert model.classification.fc_cls.out_features == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cross_entrpy", r"there is no such loss; did you mean cross_entropy\? .*is written module:Class"),
        ("dice", r"there is no such loss; known: acsl, .*\. One of your own is written module:Class"),
        ("sound_loss:", r"write module:Class, e\.g\. my_loss:Focal for the class Focal in my_loss\.py"),
        (":Weighted", r"write module:Class"),
        ("losses/sound_loss:Weighted", r"write module:Class"),
        ("sound_loss.py:Weighted", r"write module:Class"),
        (
            "sond_loss:Weighted",
            r"there is no module sond_loss in FOLDER or on Python's path; call from the folder that it is",
        ),
        ("losses.sound_loss:Weighted", r"there is no module losses in FOLDER or"),
        (
            "broken_loss:Focal",
            r"importing broken_loss fails with ModuleNotFoundError: No module named 'not_installed_anywhere'",
        ),
        ("typo_loss:Focal", r"importing typo_loss fails with SyntaxError: .*typo_loss\.py, line 1"),
        ("failing_loss:Focal", r"importing failing_loss fails with RuntimeError: no license"),
        ("script_loss:Focal", r"importing script_loss fails with SystemExit: 2"),
        ("sound_loss:Weigthed", r"FOLDER/sound_loss\.py has no class Weigthed; did you mean Weighted\?"),
        ("broken:X", r"there is no module broken"),
        ("lacking_loss:function", r"function in FOLDER/lacking_loss\.py is not a loss; it needs num_logits"),
        ("lacking_loss:Plain", r"Plain in FOLDER/lacking_loss\.py is not a loss; it needs num_logits, forw"),
        ("lacking_loss:Mute", r"Mute in .* has no forward; it needs"),
        ("lacking_loss:Blind", r"Blind in .* has no scores; it needs .*see docs/benchmark\.md"),
        (
            "lacking_loss:Unsized",
            r"AttributeError: 'Unsized' object has no attribute 'num_logits'\. It ne",
        ),
        (
            "lacking_loss:Counted",
            r"built from 5 categories .* fails with TypeError: 'tuple' object cannot",
        ),
        ("lacking_loss:Mean", r"it gives nan, nan for no rows; return one number, the sum over the rows"),
        ("lacking_loss:Regions", r"image_level gives .* for a few rows"),
        (
            "lacking_loss:PerRow",
            r"forward gives .* for a few rows, and .* where `normalizer` is twice as large; divide a sum",
        ),
        ("lacking_loss:Detached", r"forward gives a number without a gradient, so nothing would be learned"),
        ("lacking_loss:Rows", r"it gives \[\], \[\] for no rows"),
        ("lacking_loss:Uncounted", r"fails with AttributeError: 'NoneType' object has no attribute 'dtype'"),
        ("lacking_loss:Number", r"fails with AttributeError: 'float' object has no attribute 'shape'"),
        ("lacking_loss:Logits", r"scores gives -20 to 18\.\d+ for logits of -20 to 20; return probabilities"),
        (
            "lacking_loss:WithBackground",
            r"scores gives the shape \(0, 6\) for no rows; it has to be \(0, 5",
        ),
    ],
)
def test_what_is_wrong_with_a_loss_is_told(modules, name, message):
    message = rf"loss\.classification={name}: .*" + message.replace("FOLDER", str(modules))
    with pytest.raises(ValueError, match=message):
        build_classification_loss(name, CATEGORIES)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("", (2.0, False)),
        ("()", (2.0, False)),
        ("(gamma=10)", (10.0, False)),
        (" ( hard=true, gamma=1e-1 )", (0.1, True)),
    ],
)
def test_options_are_given_as_in_a_call(modules, call, expected):
    loss = build_classification_loss(f"sound_loss:Weighted{call}", CATEGORIES)
    assert (loss.gamma, loss.hard) == expected
    assert isinstance(loss.gamma, float)


def test_options_may_be_positional_and_annotated_for_type_checkers_alone(modules):
    loss = build_classification_loss("sound_loss:Positional(gamma=4.0)", CATEGORIES)
    assert loss.gamma == 4.0
    with pytest.raises(ValueError, match=r"it has no option gama; did you mean gamma\?"):
        find_classification_loss("sound_loss:Positional(gama=4.0)")


def test_a_loss_is_built_without_gradients_too(modules):
    with torch.inference_mode():
        build_classification_loss("sound_loss:Weighted", CATEGORIES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("(gama=10)", r"it has no option gama; did you mean gamma\?"),
        ("(gamma='x')", r"gamma is 'x'; expected a number"),
        ("(gamma=true)", r"gamma is True; expected a number"),
        ("(hard=1)", r"hard is 1; expected true or false"),
        ("(10)", r"write options as in a call, e\.g\. eqlv2\(gamma=10\)"),
        ("(gamma=10", r"write options as in a call"),
        ("(gamma=10)(gamma=2)", r"write options as in a call"),
        ("(gamma=__import__('os').getpid())", r"gamma is not a plain value"),
        ("(gamma=1, gamma=2)", r"write options as in a call"),
        ("(**{'gamma': 1})", r"write options as in a call"),
    ],
)
def test_what_is_wrong_with_options(modules, call, message):
    with pytest.raises(ValueError, match=rf"loss\.classification=sound_loss:Weighted.*{message}"):
        find_classification_loss(f"sound_loss:Weighted{call}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eqlv3", r"there is no such loss; did you mean eqlv2\?"),
        ("eqlv2(objctness=false)", r"it has no option objctness; did you mean objectness\?"),
        ("cross_entropy(gamma=1)", r"it has no option gamma; known: pcb, pcb_start\."),
        ("seesaw(objectness=1)", r"objectness is 1; expected true or false"),
        ("eql(tail_images=0.5)", r"tail_images is 0\.5; expected a whole number"),
        ("seesaw(eps=0)", r"eps=0: must be above 0 and at most 1"),
        ("eqlv2(prior=1)", r"prior=1: must be at least 0, which switches it off, and below 1"),
        ("efl(gamma=0)", r"gamma=0: must be above 0"),
        ("focal(gamma=0.5)", r"gamma=0\.5: must be at least 1"),
        ("cross_entropy(pcb=2)", r"pcb=2: must be in 0\.\.1; 0 switches it off"),
        ("seesaw(pcb=0.05, pcb_start=16)", r"pcb_start=16: must be a share of the training"),
    ],
)
def test_what_is_wrong_with_options_of_ours(name, message):
    with pytest.raises(ValueError, match=rf"^loss\.classification={re.escape(name)}: {message}"):
        build_classification_loss(name, CATEGORIES)


def test_a_confusion_matrix_of_too_many_classes_is_refused():
    with pytest.raises(ValueError, match=r"pcb=0\.4 keeps a confusion matrix of 5001 x 5001 .* at most 5000"):
        build_classification_loss("cross_entropy(pcb=0.4)", CATEGORIES[:1] * 5001)


def test_two_objectnesses_in_one_score_are_refused(modules):
    (modules / "own_loss.py").write_text(
        "from clis.losses import CrossEntropy\nclass Own(CrossEntropy):\n    has_objectness = True\n"
    )
    build_model(tiny_config("loss.classification=own_loss:Own", "clis.objectness=false"), CATEGORIES)
    with pytest.raises(ValueError, match=r"own_loss:Own has an objectness of its own.*clis\.objectness=true"):
        build_model(tiny_config("loss.classification=own_loss:Own"), CATEGORIES)


def test_a_detector_that_never_learns_background_is_refused(modules, data):
    """Seesaw's classes have positives alone: without any objectness, rows of background have no gradient."""
    loss = build_classification_loss("seesaw(objectness=false)", CATEGORIES)
    logits, background = torch.randn(4, 5).requires_grad_(), torch.full((4,), 5)
    loss(logits, background, 4.0, rows_of([0] * 4)).backward()
    assert (logits.grad == 0).all()

    overrides = ["loss.classification=seesaw(objectness=false)", "clis.objectness=false"]
    told = r"seesaw\(objectness=false\) has no loss on background.*clis\.objectness=false"
    with pytest.raises(ValueError, match=told):
        build_model(tiny_config(*overrides), CATEGORIES)
    with pytest.raises(ValueError, match=told):  # and before the detector of the run's regions is trained
        run_verb("train", ["--config", CONFIG, *SHORT, *overrides, f"data.root={data}", "output=run"])
    assert not list((modules / "run").rglob("*.pt"))


def test_it_is_told_before_anything_is_made(modules, data):
    """By a run before the detector of its regions is trained, by a study before its first job, by check."""
    wrong = "loss.classification=sound_loss:Wrong"
    told = r"sound_loss\.py has no class Wrong; known: CrossEntropy, Weighted"
    with pytest.raises(ValueError, match=told):
        run_verb("train", ["--config", CONFIG, *SHORT, wrong, f"data.root={data}", "output=run"])
    study = {"base": CONFIG, "seeds": [0], "rows": {"good": {}, "wrong": {"overrides": [wrong]}}}
    (modules / "losses.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match=told):
        run_study(modules / "losses.yaml", modules / "out", overrides=[*SHORT, f"data.root={data}"])
    assert not (modules / "run").exists()
    assert not (modules / "out").exists()

    for root in (data, modules / "nothing_yet"):
        config = load_config(BASELINE, [*SHORT, wrong, f"data.root={root}", "data.generate=shapes"])
        errors = check.check(config, workers=0, sample=1).errors
        assert [error for error in errors if "has no class Wrong" in error] == errors != []


def test_check_tries_the_loss_where_the_backbone_is_still_to_be_downloaded(modules, data):
    backbone = "{name: resnet18, norm: folded, width: 64, weights: resnet18.pth, download: true}"
    overrides = ["loss.classification=lacking_loss:Mean", f"model.backbone={backbone}", f"data.root={data}"]
    report = check.check(load_config(BASELINE, [*SHORT[1:], *overrides]), workers=0, sample=1)
    assert any("resnet18.pth: does not exist and will be downloaded" in each for each in report.warnings)
    assert [error for error in report.errors if "it gives nan" in error] == report.errors != []


def test_a_checkpoint_imports_its_loss_with_the_detector_and_not_before(modules):
    config = tiny_config("loss.classification=sound_loss:Weighted")
    model = build_model(config, CATEGORIES)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    path = save_checkpoint(RunFolder(modules), 1, model, make_optimizer(model, config), scaler, config)
    del sys.modules["sound_loss"]
    (modules / "sound_loss.py").unlink()
    assert load_checkpoint(path)["config"]["loss"]["classification"] == "sound_loss:Weighted"
    with pytest.raises(ValueError, match=r"step_00000001\.pt: loss\.classification=.*no module sound_loss"):
        load_detector(path)


@pytest.mark.slow
def test_the_working_folder_is_searched_by_torchrun_and_from_scripts_elsewhere(data, tmp_path):
    """`torchrun train.py`, `python evaluate.py` and a user's script put their own folder on Python's path."""
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir()
    elsewhere.mkdir()
    (work / "sound_loss.py").write_text(SOUND)
    (elsewhere / "use.py").write_text(
        "import sys, clis; print(clis.load_detector(sys.argv[1]).classification_loss.counts.sum().item())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}

    def python(*words: str) -> str:
        result = subprocess.run(
            [sys.executable, *words], cwd=work, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    python(
        *launcher, "--rdzv-endpoint=localhost:0", str(REPOSITORY / "train.py"), "--config", BASELINE, *SHORT,
        "train.steps=1", "loss.classification=sound_loss:Weighted", f"data.root={data}", "output=run",
    )  # fmt: skip
    checkpoint = "run/checkpoints/last.pt"
    assert "APr" in python(str(REPOSITORY / "evaluate.py"), checkpoint)
    images = [category["image_count"] for category in load_checkpoint(work / checkpoint)["categories"]]
    assert float(python(str(elsewhere / "use.py"), checkpoint)) == sum(images) > 0
