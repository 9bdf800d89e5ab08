"""Status, log and records: what is said of a run is what its files and its process say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from runs import BASELINE, REPOSITORY, SHORT

import clis
from clis.__main__ import main
from clis.cli import Preempted
from clis.commands import run_verb, status
from clis.commands.status import describe
from clis.engine import provenance
from clis.engine.at_work import QUIET, Process, at_work, last_sign
from clis.engine.checkpoint import load_checkpoint
from clis.engine.run_folder import RunFolder
from clis.engine.run_state import RunState
from clis.progress import Progress, logged, note, say

RECORD = {"loss": 2.5, "rpn_objectness": 0.1, "box": 0.25, "data_time": 0.5, "compute_time": 1.5}


@pytest.fixture
def folder(finished, tmp_path) -> RunFolder:
    """A run of 400 steps of 4 images that has a config and no record."""
    config = (finished / "config.yaml").read_text().replace("steps: 4\n", "steps: 400\n")
    (tmp_path / "config.yaml").write_text(config)
    return RunFolder(tmp_path)


def write_records(folder: RunFolder, *records: dict) -> None:
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_step_speed_time_left_and_ap(folder):
    """A step takes 2 s, so 100 of 400 steps leave 600 s, at 2 images/s. AP was better at step 50."""
    write_records(
        folder,
        {"step": 50, **RECORD},
        {"step": 50, "AP": 0.25, "APr": 0.1, "APc": 0.2, "APf": -1},
        {"step": 100, **RECORD, "loss": None},
        {"step": 100, "AP": 0.125, "APr": 0.05, "APc": 0.1, "APf": -1},
    )
    text = describe(RunState.read(folder))
    assert "step 100 of 400 (25%), 2.0 images/s, 2.00 s a step, 10:00 of training left" in text
    assert "losses at step 100: loss nan rpn 0.10 box 0.25" in text
    assert "after step 100: AP 12.5 APr 5.0 APc 10.0 APf -; the best so far is AP 25.0 after step 50" in text


def test_a_process_that_lives_that_died_and_that_another_one_has_the_number_of(folder):
    write_records(folder, {"step": 50, **RECORD})
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        process = replace(Process.current(), pid=sleeper.pid, stage="1/1 training", started=None)
        process.write(folder)
        assert process.lives()
        assert f"running (process {sleeper.pid} on" in describe(RunState.read(folder))
        assert "1/1 training" in describe(RunState.read(folder))
        assert not replace(process, started="0").lives()  # the number is another process's now
    finally:
        sleeper.kill()
        sleeper.wait()
    assert not process.lives()
    text = describe(RunState.read(folder))
    assert "dead: process" in text
    assert "re-run the same command to resume" in text


def test_of_a_process_elsewhere_the_last_sign_of_life_tells(folder):
    write_records(folder, {"step": 50, **RECORD})
    process = replace(Process.current(), machine="another", host="node7")
    process.write(folder)
    assert process.lives() is None
    assert "running (process" in describe(RunState.read(folder))
    assert "on node7, not seen from here)" in describe(RunState.read(folder))
    long_ago = time.time() - 2 * QUIET
    os.utime(folder.metrics, (long_ago, long_ago))
    assert last_sign(folder) == pytest.approx(2 * QUIET, abs=60)
    assert "probably dead (process" in describe(RunState.read(folder))


def test_a_run_that_waits_for_its_detector_shows_signs_of_life(folder, tmp_path):
    """What is said goes to the log of the run that makes the regions; that of the waiting one is touched."""
    with at_work(folder):
        long_ago = time.time() - 2 * QUIET
        for path in (folder.metrics, folder.log, folder.last, folder.result):
            if path.exists():
                os.utime(path, (long_ago, long_ago))
        assert last_sign(folder) > QUIET
        (tmp_path / "detector").mkdir()
        with at_work(RunFolder(tmp_path / "detector")):
            note("train 40/60")
        assert last_sign(folder) < 60


def test_how_a_run_ended_is_noted(folder):
    """An error is in the note and in the log; a run that stopped on request or well leaves no note."""

    def fail() -> None:
        with at_work(folder) as now:
            now("2/3 training")
            assert Process.read(folder).stage == "2/3 training"
            say("something")
            raise ValueError("no good\nat all")

    with pytest.raises(ValueError, match="no good"):
        fail()
    assert "ended by ValueError: no good (process" in describe(RunState.read(folder))
    assert ", 2/3 training); log.txt has what came before" in describe(RunState.read(folder))
    lines = folder.log.read_text().splitlines()
    assert [line[21:].split(" ")[0] for line in lines] == ["clis", "something", "ended"]
    assert time.strptime(lines[1][:19], "%Y-%m-%d %H:%M:%S")

    folder.checkpoints.mkdir(exist_ok=True)
    folder.checkpoint(60).touch()
    with pytest.raises(Preempted), at_work(folder):
        raise Preempted("stopped on request")
    assert not folder.process.exists()
    assert "stopped on request, step 60 saved" in describe(RunState.read(folder))
    with at_work(folder):
        assert not folder.preempted.exists()
    assert not folder.process.exists()
    assert len(folder.log.read_text().splitlines()) == 6  # appended


def test_the_innermost_log_has_what_is_said(tmp_path, capsys):
    outer, inner = tmp_path / "outer.txt", tmp_path / "inner.txt"
    with logged(outer):
        say("one")
        with logged(inner):
            say("two\nlines")
            with Progress("count", 3) as progress:
                progress.advance(3)
        note("three")
    say("four")
    with logged(tmp_path):  # a folder: no file to write to
        say("five")
    assert [line[21:] for line in outer.read_text().splitlines()] == ["one", "three"]
    told = inner.read_text().splitlines()
    assert told[0][21:] == "two"
    assert told[1] == " " * 21 + "lines"
    assert told[2][21:].startswith("count 3/3")
    out = capsys.readouterr().out
    assert "five" in out
    assert "three" not in out


def test_a_log_takes_file_names_of_any_bytes(tmp_path):
    """The byte 0xff is no UTF-8, and Python has it as a lone surrogate."""
    with logged(tmp_path / "log.txt"):
        note(f"replaced: {os.fsdecode(b'bird/' + bytes([255]) + b'.jpg')}")
    assert (tmp_path / "log.txt").read_text()[21:] == "replaced: bird/\\udcff.jpg\n"


def test_runs_below_a_folder(tmp_path, finished, monkeypatch, capsys):
    """As `clis status runs`, and `clis status` alone in the folder above."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").symlink_to(finished, target_is_directory=True)
    shutil.copytree(finished / "detector", tmp_path / "runs" / "b")
    runs = tmp_path / "runs"
    (runs / "b" / "wandb").mkdir()
    (runs / "b" / "wandb" / "config.yaml").write_text("of: another program")
    headings = [f"{runs}/a: finished", f"{runs}/a/detector: finished", f"{runs}/b: finished"]

    def said(*folders: str) -> list[str]:
        run_verb("status", list(folders))
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]

    assert said(str(runs)) == headings
    assert said(str(runs / "a")) == headings[:1]  # a run folder itself is that run alone
    (runs / "loop").symlink_to(".")
    (runs / "latest").symlink_to("b")  # each run is said once, by the first of its names
    assert said(str(runs)) == headings
    monkeypatch.chdir(tmp_path)
    assert len(said()) == 3


def test_a_reader_that_has_seen_enough_ends_the_list(folder, monkeypatch):
    """As `clis status runs | head -1`: no error of the runs that follow."""
    lines = []

    def say(text: str) -> None:
        lines.append(text)
        raise BrokenPipeError

    monkeypatch.setattr(status, "say", say)
    with pytest.raises(BrokenPipeError):
        run_verb("status", [str(folder), str(folder)])
    assert len(lines) == 1


def test_a_folder_without_a_run(tmp_path, finished, capsys):
    """It stops no other one from being shown, also one that comes after it."""
    with pytest.raises(
        ValueError, match=r"a/config\.yaml: no such file[^\n]*\n.*b/config\.yaml: no such file"
    ):
        main(["status", str(tmp_path / "a"), str(finished), str(tmp_path / "b")])
    assert f"{finished}: finished" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"config\.yaml: no such file; name run folders"):
        main(["status", str(tmp_path)])


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory) -> Path:
    """The run folder of a baseline with an evaluation on the way."""
    folder = tmp_path_factory.mktemp("evaluated")
    train(data, folder)
    return folder


def train(data: Path, folder: Path) -> None:
    more = ["train.eval_every=2", f"data.root={data}", f"output={folder}", "paper={AP: 22, APr: 8.9}"]
    run_verb("train", ["--config", BASELINE, *SHORT, *more])


def test_a_training_logs_its_evaluations_and_ends_without_a_note(evaluated, data, capsys):
    log = (evaluated / "log.txt").read_text()
    assert "step 2: AP " in log
    assert "1/1 " in log
    assert not (evaluated / "process.json").exists()
    main(["status", str(evaluated)])
    assert capsys.readouterr().out.startswith(f"{evaluated}: finished")
    train(data, evaluated)  # finished: left alone
    assert (evaluated / "log.txt").read_text() == log


def test_comparing_an_unfinished_run_and_the_papers_figures(evaluated, tmp_path, capsys):
    copy = tmp_path / "half"
    shutil.copytree(evaluated, copy)
    (copy / "eval.json").unlink()
    main(["compare", str(evaluated), str(copy)])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]
    assert [row[0] for row in cells] == [
        str(evaluated),
        f"{evaluated}: the paper's, not ours",
        f"{copy}, step 2",
        f"{copy}: the paper's, not ours",
    ]
    assert cells[1][1:] == ["22.0", "-", "-", "8.9", "-", "-", "-"]
    assert lines[-1] == f"{copy}: not finished, step 4 of 4; its metrics are those after step 2"
    alone = tmp_path / "step_2"  # the results of a checkpoint, as `clis evaluate` writes them
    alone.mkdir()
    shutil.copy(evaluated / "eval.json", alone)
    main(["compare", str(alone)])
    assert f"| {alone} " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[1]", '{"AP": null}', '{"pooled_AP": 0.2}', '{"AP": {"bbox": 0.2}}'])
def test_an_eval_json_of_another_kind_is_named(folder, text):
    """As `clis score --protocol pooled --out` writes it, or another program."""
    folder.result.write_text(text)
    for verb in ("compare", "status"):
        with pytest.raises(ValueError, match=r"eval\.json: not the figures of the standard protocol"):
            run_verb(verb, [str(folder)])


def test_an_eval_json_with_fewer_figures_is_shown(folder, capsys):
    folder.result.write_text('{"AP": 0.25}')
    run_verb("status", [str(folder)])
    assert "AP 25.0 APr - APc - APf -" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["5", "{}"])
def test_a_line_of_metrics_that_is_no_record_is_named(folder, line):
    folder.metrics.write_text(f'{{"step": 1, "loss": 3}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: damaged \(a line is no record of a step\)"):
        run_verb("status", [str(folder)])


def test_results_and_checkpoints_say_where_they_come_from(evaluated, data, tmp_path):
    """The hashes are those of sha256sum; a baseline has no region file. The metrics themselves are apart."""
    record = json.loads((evaluated / "eval.json").read_text())["record"]
    assert record["version"] == clis.__version__
    assert record["protocol"] == {"name": "standard", "iou_type": "bbox", "max_detections": 20}
    assert record["test"]["short_side"] == 48

    def sha(name: str) -> str:
        command = ["sha256sum", data / "shapes" / name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]

    assert record["data"]["val"]["sha256"] == sha("val.json")
    state = load_checkpoint(evaluated / "checkpoints" / "last.pt")
    hashes = {name: each["sha256"] for name, each in state["record"]["data"].items()}
    assert hashes == {"train": sha("train.json")}
    assert record["training"]["data"] == state["record"]["data"]
    assert "record" not in RunFolder(evaluated).read_result()
    checkpoint = str(evaluated / "checkpoints" / "last.pt")
    run_verb("evaluate", [checkpoint, f"output={tmp_path / 'again'}", "test.detections=10"])
    again = json.loads((tmp_path / "again" / "eval.json").read_text())["record"]
    assert again["training"] == state["record"]
    assert again["protocol"]["max_detections"] == 10


def test_a_run_with_regions_has_their_hash(finished):
    state = load_checkpoint(finished / "checkpoints" / "last.pt")
    files = state["record"]["data"]
    assert files["regions"]["sha256"] == provenance.file_hash(finished / "regions.npy") is not None


def test_the_commit_is_that_of_the_source_tree_or_none(monkeypatch, tmp_path):
    provenance.commit.cache_clear()
    found = provenance.commit()
    if (REPOSITORY / ".git").exists():
        head = subprocess.run(
            ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert found.removesuffix("-dirty") == head.stdout.strip()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")  # no git
        provenance.commit.cache_clear()
        assert provenance.commit() is None
    with monkeypatch.context() as patch:
        patch.setattr(clis, "__file__", str(tmp_path / "site-packages" / "clis" / "__init__.py"))
        provenance.commit.cache_clear()
        assert provenance.commit() is None
    provenance.commit.cache_clear()


def test_a_file_that_changes_is_hashed_anew_and_a_missing_one_has_none(tmp_path):
    path = tmp_path / "file"
    assert provenance.file_hash(path) is None
    path.write_bytes(b"")
    empty = provenance.file_hash(path)
    assert empty == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no bytes
    path.write_bytes(b"x")
    assert provenance.file_hash(path) != empty


def test_a_run_of_another_version_is_read_by_what_this_one_knows(folder):
    """A setting that is gone is in the recipe alone; an override changes what is known."""
    text = folder.config.read_text()
    folder.config.write_text(text.replace("clis:\n", "clis:\n  queue_init: empty\n"))
    state = RunState.read(folder, ["test.detections=7"])
    assert state.unknown == ["clis.queue_init"]
    assert state.recipe["clis.queue_init"] == "empty"
    assert state.config.test.detections == 7
    folder.config.write_text(f"{text}masks:\n  size: 28\n")
    assert RunState.read(folder).unknown == ["masks.size"]
    folder.config.write_text(text.replace("  s: 4\n", "  s: many\n"))
    with pytest.raises(ValueError, match=r"config\.yaml: .*clis\.s"):
        RunState.read(folder)
