"""The doors of the program: foreign arguments, terminals, pipes, names of configs and checkpoints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from runs import BASELINE, CONFIG, REPOSITORY

import clis
from clis.__main__ import main
from clis.cli import explain
from clis.commands import run_verb
from clis.commands.arguments import class_labels, split_overrides
from clis.config_files import SHIPPED, find_config, load_config
from clis.data.categories import Category
from clis.engine.describe import pretraining_warnings, schedule_warnings, speed_hints
from clis.engine.run_folder import find_checkpoint


def program(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a main function in a process of its own, as the commands are run."""
    text = f"from clis.cli import run_command\ndef main():\n    {code}\nrun_command(main)"
    every = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run([sys.executable, "-c", text], env=every, capture_output=True, timeout=60)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_does_not_have_is_escaped(encoding):
    done = program(r"print('\u8c61'); raise ValueError('\u8c61 is wrong')", PYTHONIOENCODING=encoding)
    assert done.stdout.split() == [rb"\u8c61"]
    assert done.stderr.startswith(rb"error: \u8c61 is wrong")
    assert done.returncode == 1


def test_a_name_that_is_not_utf8_is_printed_too():
    assert program(r"print('\udce9')", PYTHONIOENCODING="utf-8").stdout.split() == [rb"\udce9"]


def test_a_closed_pipe_ends_quietly():
    text = "from clis.cli import run_command\nrun_command(lambda: [print('x' * 99) for _ in range(9999)])"
    every = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", text], env=every, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_broken_pipe_that_is_not_the_output_is_an_error():
    done = program("raise BrokenPipeError(32, 'Broken pipe', 'a socket')")
    assert done.returncode == 1
    assert b"Broken pipe: 'a socket'" in done.stderr


def test_ranks_above_0_wait_for_rank_0(monkeypatch):
    """Where torchrun ends them within the wait, nothing is said twice."""
    slow = "import time; time.sleep = lambda s: print('waited', s); raise ValueError('wrong')"
    assert b"waited" in program(slow, RANK="1").stdout
    assert b"waited" not in program(slow, RANK="0").stdout


NCCL = (
    "NCCL error in: /pytorch/NCCLUtils.cpp:94, {}, NCCL version 2.27.5\n{}: A call failed.\nLast error:\n{}"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gloo/pair.cc:1] Connection closed by peer [::1]:5", "another process.*peer"),
        ("[gloo/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv", "another process.*waiting"),
        (
            "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)",
            "another process.*Work",
        ),
        ("NCCL communicator was aborted on rank 1.", "another process.*aborted on rank 1"),
        (NCCL.format("remote process exited", "ncclRemoteError", "gone"), "another process.*ncclRemoteError"),
        (
            NCCL.format("unhandled", "ncclSystemError", "socketProgress: Connection closed by remote peer a"),
            "another process.*socketProgress",
        ),
        (
            NCCL.format(
                "unhandled",
                "ncclSystemError",
                "Error while creating shared memory segment /dev/shm/nccl-1 (size 9), error: No space left",
            ),
            "no room in shared memory.*nccl-1.*No space left.*--shm-size",
        ),
        (NCCL.format("invalid usage", "ncclInvalidUsage", "Duplicate GPU detected"), None),
        ("Distributed package doesn't have NCCL built in", None),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_errors_of_collectives_say_whose_they_are(text, said):
    """What is not of another process keeps its own text."""
    line = explain(RuntimeError(text))
    assert (line is None) == (said is None)
    assert said is None or re.search(said, line)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a config"),
        ([CONFIG, "--eval-only"], "evaluate.py RUN_FOLDER"),
        ([CONFIG, "--epochs", "12"], "train.steps=N"),
        (["--resume", "runs/x/last.pt"], "is a checkpoint, not a config; the same command resumes"),
        ([CONFIG, "--seed"], "--seed: expected one argument"),
        ([CONFIG, "train.steps", "100"], "'train.steps' is neither the config"),
        (["--config", CONFIG, BASELINE], "is neither the config"),
        ([CONFIG, "x/train.steps=5"], "is neither the config"),
    ],
)
def test_arguments_of_other_programs_are_told_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        run_verb("train", arguments, prog="train.py")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [CONFIG, "train.seed=3", "train.images_per_step=4"],
        ["--config", CONFIG, "--seed", "3", "--batch-size=4"],
        ["--seed=3", "--resume", CONFIG, "--batch_size", "4"],
        ["shapes/clis", "--seed", "3", "train.images_per_step=4"],
    ],
)
def test_a_config_and_its_overrides_in_any_order(arguments, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    main(["config", *arguments])
    said = capsys.readouterr().out
    assert "seed: 3" in said
    assert "images_per_step: 4" in said


def test_paths_and_globs_may_hold_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1.yaml").write_text("train: {seed: 7}")
    Path("a=b").mkdir()
    files, overrides = (
        ["lr=0.1.yaml", "a=b", "runs/s=4/*.jpg", "../x=1.jpg", "photo.jpg"],
        ["a=c", "data.root=/x"],
    )
    assert split_overrides([*overrides, *files], "file") == (files, overrides)
    for empty in (overrides, ["", "a=b"]):
        with pytest.raises(ValueError, match="no file, or an empty one; name at least one before key=value"):
            split_overrides(empty, "file")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ("tench, Tinca tinca", [1]),
        ("cat,tench,Tinca_tinca,tench", [2, 1, 0]),
        ("tench,, cat,", [0, 2]),
    ],
)
def test_names_of_classes_may_hold_commas(names, labels):
    categories = [
        Category(id=number, name=name, frequency="r", image_count=1)
        for number, name in enumerate(("tench", "tench, Tinca tinca", "cat"))
    ]
    assert class_labels(names, categories) == labels
    with pytest.raises(ValueError, match="no class 'Tinca cat'; did you mean"):
        class_labels("tench, Tinca cat", categories)


def test_versions_and_verbs(capsys):
    for arguments in (["--version"], ["score", "--version"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert capsys.readouterr().out == f"clis {clis.__version__}\n"
    for arguments, said in (([], "verbs:"), (["trian"], "did you mean train?")):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert said in capsys.readouterr().err


def test_configs_are_found_by_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("shapes/clis") == SHIPPED / "shapes" / "clis.yaml"
    assert load_config("shapes/clis").output == "runs/shapes/clis"
    with pytest.raises(FileNotFoundError, match=r"shape/clis: no such config; did you mean shapes/clis"):
        find_config("shape/clis")
    (tmp_path / "configs" / "shapes").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="a folder, not a config"):
        find_config("configs/shapes")
    (tmp_path / "configs" / "shapes" / "clis.yaml").write_text("train: {steps: 5}")
    assert load_config("shapes/clis").train.steps == 5  # those of the working folder come first


@pytest.mark.slow
def test_an_editable_install_is_found_from_the_folder_above_the_clone(tmp_path):
    """A folder called clis lies there, the clone, which Python would take for a package without contents."""
    shutil.copytree(
        REPOSITORY,
        tmp_path / "clis",
        symlinks=True,
        ignore=shutil.ignore_patterns(".*", "*.egg-info", "runs"),
    )
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", tmp_path / "clis"], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(
        [python, "-c", "import clis; print(clis.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.strip() == str(tmp_path / "clis" / "clis" / "__init__.py")


def test_a_link_beside_a_config_names_its_own_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("train: {steps: 5}")
    Path("other.yaml").symlink_to("mine.yaml")
    assert load_config("other.yaml").output == "runs/other"


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(
        "data: {train: ~/t.json, image_level: [~/a, b]}\nstart: {from: ~/x.pt}"
    )
    config = load_config("~/mine.yaml", ["regions.file=~/r.npy", "output=~/out"])
    assert config.data.train == str(tmp_path / "t.json")
    assert config.data.image_level == (str(tmp_path / "a"), "b")
    assert Path(config.start.from_).resolve() == tmp_path / "x.pt"
    assert (config.regions.file, config.output) == (str(tmp_path / "r.npy"), str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "gone.json")):
        run_verb("score", ["--annotations=~/gone.json", "--results", "~/r.json"])


def test_a_run_folder_is_its_last_checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint in this folder"):
        find_checkpoint(tmp_path / "run")
    for name in ("step_00000002.pt", "step_00000004.pt"):
        (folder / name).write_bytes(b"x")
    assert find_checkpoint(tmp_path / "run") == folder / "step_00000004.pt"
    (folder / "last.pt").write_bytes(b"y")
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(folder) == folder / "last.pt"
    assert find_checkpoint(folder / "step_00000002.pt").name == "step_00000002.pt"


def test_schedules_beyond_the_end_are_said():
    short = tiny_config("train.steps=100", "optim.warmup_steps=100", "optim.decay_steps=[60,100,200]")
    warmup, decay = schedule_warnings(short)
    assert "optim.warmup_steps=100" in warmup
    assert "decay_steps: 100, 200 are not before the end" in decay
    assert (
        schedule_warnings(tiny_config("train.steps=100", "optim.warmup_steps=99", "optim.decay_steps=[99]"))
        == []
    )
    (late,) = pretraining_warnings(tiny_config("pretrain.epochs=60"))
    assert "pretrain.decay_epochs: 60, 90 are not before the end, pretrain.epochs=60" in late
    assert (
        pretraining_warnings(tiny_config()) == pretraining_warnings(tiny_config("pretrain.epochs=100")) == []
    )


@pytest.mark.parametrize(
    ("images", "accumulation", "more"),
    [(1, 16, 8), (1, 12, 6), (2, 4, 8), (8, 2, None), (1, 1, None), (1, 13, None)],
)
def test_a_gpu_that_may_idle_is_hinted_at(images, accumulation, more):
    """With a number that divides a process's images of a step: 13 has none above 1."""
    config = tiny_config(f"train.images_per_process={images}")
    hints = speed_hints(config, accumulation, torch.device("cuda"))
    assert [f"train.images_per_process={more} " in hint for hint in hints] == [True] * (more is not None)
    assert not speed_hints(config, accumulation, torch.device("cpu"))


def test_the_public_names_are_listed():
    assert set(dir(clis)) == {*clis.__all__, "__version__"}
