"""A run folder is used by one run at a time, belongs to its config, and holds files of others in peace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import BASELINE, CONFIG, REPOSITORY, SHORT, assert_same_training

from clis.commands import run_verb
from clis.config_files import load_config
from clis.engine import at_work as at_work_module
from clis.engine.at_work import Process, only_maker, only_process
from clis.engine.region_parts import RegionParts, remove_parts
from clis.engine.run_folder import RunFolder
from clis.engine.run_state import RunState
from clis.engine.schedule import differences_after

HOLD = """
import sys, time
from clis.engine.at_work import only_process
from clis.engine.run_folder import RunFolder
with only_process(RunFolder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def arguments_of(data: Path, folder: Path, *overrides: str) -> list[str]:
    return ["--config", BASELINE, *SHORT, f"data.root={data}", f"output={folder}", *overrides]


class TestOneProcess:
    @pytest.fixture
    def holder(self, tmp_path, monkeypatch):
        """Another process that works on a run folder."""
        monkeypatch.setattr(at_work_module, "DYING", 0.3)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()
        process.wait()
        process.stdout.close()

    def test_a_second_one_is_refused_while_the_first_lives(self, holder, data, tmp_path):
        with pytest.raises(
            ValueError, match=r"another process is working on it; wait until it ends, or pass"
        ):
            run_verb("train", arguments_of(data, tmp_path / "run"))
        assert not (tmp_path / "run" / "config.yaml").exists()

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_dead_one_blocks_nobody(self, holder, tmp_path, number):
        """Its lock file and its note are still there."""
        folder = RunFolder(tmp_path / "run")
        Process.current().write(folder)
        holder.send_signal(number)
        holder.wait()
        assert folder.lock.exists()
        with only_process(folder):
            pass
        assert not folder.lock.exists()

    def test_it_is_named_where_it_left_a_note(self, holder, tmp_path):
        Process.current().write(RunFolder(tmp_path / "run"))
        match = rf"process {os.getpid()} on .* has been working on it since 20"
        with pytest.raises(ValueError, match=match), only_process(RunFolder(tmp_path / "run")):
            pass

    def test_a_file_of_regions_is_made_by_one(self, tmp_path):
        with only_maker(tmp_path / "regions.npy"):
            assert (tmp_path / "regions.lock").exists()
        assert list(tmp_path.parent.glob(f"{tmp_path.name}/*")) == []

    def test_a_folder_that_stayed_empty_goes(self, tmp_path):
        with only_process(RunFolder(tmp_path / "new")):
            pass
        assert not (tmp_path / "new").exists()


class TestFilesOfOthers:
    def test_nothing_of_a_run_removes_them(self, data, tmp_path):
        """Names that are nearly those of checkpoints, of temporary files and of parts of regions."""
        theirs = [
            ".notes.1234.tmp", ".cache.77.tmp.json", "deep/.config.12.tmp.yaml", "checkpoints/step_best.pt",
            "checkpoints/step_00000001 (copy).pt", "evaluations/step_old/eval.json", "notes.md",
            "regions.partial-mine/process_00000.bin", "regions.partial-0123456789ab/notes.txt",
        ]  # fmt: skip
        for name in theirs:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
        ours = [".config.12.tmp.yaml", "checkpoints/.step_00000002.99.tmp.pt", "checkpoints/.last.9.tmp.pt"]
        for name in ours:
            (tmp_path / name).write_text("")
        run_verb("train", [
            "--config", CONFIG, *SHORT, f"data.root={data}", f"output={tmp_path}", "regions.rule=center",
            "train.keep_last=1", "train.eval_every=2", "train.steps=4",
        ])  # fmt: skip
        assert all((tmp_path / name).read_text() == "{}" for name in theirs)
        assert not any((tmp_path / name).exists() for name in ours)
        assert RunFolder(tmp_path).steps_done == 4

    def test_parts_of_another_recipe_are_ours(self, tmp_path):
        first, second = (RegionParts(tmp_path / "regions.npy", 3, {"rule": name}) for name in "ab")
        first.open(2)
        second.open(1)
        assert not first.folder.exists()
        remove_parts(tmp_path / "regions.npy")
        assert not second.folder.exists()

    @pytest.mark.parametrize("name", ["eval.json", "metrics.jsonl"])
    def test_they_are_not_taken_for_a_runs(self, data, tmp_path, name):
        (tmp_path / name).write_text('{"accuracy": 1}\n')
        with pytest.raises(ValueError, match=rf"{name}: is not of a run"):
            run_verb("train", arguments_of(data, tmp_path))
        assert (tmp_path / name).read_text() == '{"accuracy": 1}\n'

    def test_a_config_of_ones_own_is_not_replaced(self, data, tmp_path):
        (tmp_path / "config.yaml").write_text("# mine\ntrain: {steps: 3}\n")
        with pytest.raises(ValueError, match="was not written by a run"):
            run_verb("train", arguments_of(data, tmp_path))
        assert (tmp_path / "config.yaml").read_text().startswith("# mine")


def test_a_start_that_failed_leaves_a_folder_that_belongs_to_nobody(data, tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(load_config(BASELINE, [*SHORT, f"data.root={data}", "optim.lr=0.5"]))
    run_verb("train", arguments_of(data, tmp_path, "train.steps=2"))
    assert folder.read_config().optim.lr == 0.04


class TestLongerTraining:
    def test_of_a_finished_run_is_the_uninterrupted_one(self, data, tmp_path):
        """2 steps, then 4: the schedule of the first 2 is the same, and so is all that follows."""
        run_verb("train", arguments_of(data, tmp_path / "a", "train.steps=2"))
        first = RunFolder(tmp_path / "a").read_result()
        run_verb("train", arguments_of(data, tmp_path / "a", "train.steps=4"))
        run_verb("train", arguments_of(data, tmp_path / "b", "train.steps=4"))
        assert_same_training(tmp_path / "a", tmp_path / "b")
        assert RunFolder(tmp_path / "a").evaluation(2).read_result() == first
        state = RunState.read(RunFolder(tmp_path / "a"))
        assert state.every_evaluation == [(2, first), (4, RunFolder(tmp_path / "b").read_result())]

    def test_from_another_working_folder(self, data, tmp_path, monkeypatch):
        """Relative paths, here of `regions.detector`, are those of the run folder, in its checkpoints too."""
        folder = tmp_path / "runs" / "a"
        run_verb("train", arguments_of(data, folder, "train.steps=2"))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert not Path(load_config(BASELINE).regions.detector).is_absolute()
        run_verb("train", arguments_of(data, folder, "train.steps=3"))
        assert RunFolder(folder).is_finished(load_config(BASELINE, ["train.steps=3"]))

    def test_another_schedule_says_how_to_start_from_the_weights(self, data, tmp_path):
        run_verb("train", arguments_of(data, tmp_path / "a", "train.steps=2"))
        match = (
            rf"optim.decay_steps: .* pass output=ANOTHER_FOLDER \(with start.from={tmp_path / 'a'} to start"
        )
        with pytest.raises(ValueError, match=match):
            run_verb("train", arguments_of(data, tmp_path / "a", "train.steps=4", "optim.decay_steps=[1]"))
        run_verb("train", arguments_of(
            data, tmp_path / "b", "train.steps=4", "optim.decay_steps=[1]", f"start.from={tmp_path / 'a'}"
        ))  # fmt: skip

    @pytest.mark.parametrize(
        ("before", "now", "done", "same"),
        [
            (["train.steps=9"], ["train.steps=20"], 9, True),
            (["train.steps=9"], ["train.steps=8"], 5, True),
            (["train.steps=9"], ["train.steps=8"], 9, False),  # more steps are made than there are to be
            (["optim.decay_steps=[6]"], ["optim.decay_steps=[12]"], 5, True),
            (["optim.decay_steps=[6]"], ["optim.decay_steps=[12]"], 7, False),  # step 6 had the lower rate
            (["optim.decay_steps=[2,6]"], ["optim.decay_steps=[2,12]"], 6, True),
            (["optim.decay_steps=[6]"], ["optim.decay_steps=[6,6]"], 6, True),
            (["optim.decay_steps=[6]"], ["optim.decay_steps=[6,6]"], 7, False),  # twice at one step: 0.01
            (["train.steps=9"], ["train.steps=20", "optim.lr=1"], 9, False),
            (["train.steps=9"], ["train.steps=20"], 0, False),  # nothing is made: nothing is resumed
        ],
    )
    def test_the_steps_made_have_to_be_the_same(self, before, now, done, same):
        old, new = (load_config(BASELINE, each) for each in (before, now))
        assert (differences_after(old, new, done) == []) == same

    def test_not_where_the_loss_looks_at_the_share_that_is_done(self):
        loss = "loss.classification=cross_entropy(pcb=0.4, pcb_start=0.5)"
        old, new = (load_config(BASELINE, [loss, f"train.steps={steps}"]) for steps in (9, 20))
        assert differences_after(old, new, 9) == ["train.steps: 9 != 20"]


class TestMovedData:
    def test_a_figure_can_be_told(self, finished, data, tmp_path, monkeypatch):
        """The run knows a root that is gone; CLIS_DATA does not count, and the message says what does."""
        pytest.importorskip("matplotlib")
        run = tmp_path / "run"
        shutil.copytree(finished, run)
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace(str(data), str(tmp_path / "gone")))
        monkeypatch.setenv("CLIS_DATA", str(data))
        with pytest.raises(FileNotFoundError, match=r"pass data.root=FOLDER if the data have moved"):
            run_verb("plot", [str(run), "--out", str(tmp_path / "plots"), "--images=1"])
        run_verb("plot", [str(run), f"data.root={data}", "--out", str(tmp_path / "plots"), "--images=1"])
        assert len(list((tmp_path / "plots").iterdir())) == 4
