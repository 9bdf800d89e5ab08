"""Studies: what is shared is made once, what is done is skipped, and the table says what the runs gave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from runs import CONFIG, REPOSITORY, SHORT

from clis.__main__ import main
from clis.commands import run_verb
from clis.commands.study import draw_again, run_study
from clis.config import data_path
from clis.config_files import load_config
from clis.study.file import Row, Study, overruled
from clis.study.jobs import Job, plan_row, work
from clis.study.record import ABOUT, Record, table, table_by_images
from clis.study.runs import run_key

RECORDED = REPOSITORY / "docs" / "studies"
SHARED = REPOSITORY.parent / "shared" / "data"


def write_study(path: Path, rows: dict, seeds: tuple[int, ...] = (0,)) -> Path:
    path.write_text(yaml.safe_dump({"base": CONFIG, "seeds": list(seeds), "rows": rows}, sort_keys=False))
    return path


@pytest.mark.slow
def test_shared_stages_are_made_once_and_finished_runs_are_kept(data, tmp_path, capsys):
    """The baseline row is the detector of the regions: three trainings and one search for four rows."""
    rows = {
        "CLIS": {"paper": [29.2, 24.4, 28.6, 31.9]},
        "again": {"overrides": ["clis.siamese=true"]},  # the default: the same run
        "w/o SS": {"overrides": ["clis.siamese=false"]},
        "baseline": {"overrides": ["clis=off"]},
    }
    path = write_study(tmp_path / "small.yaml", rows)
    overrides = [*SHORT, f"data.root={data}"]
    folder = run_study(path, tmp_path / "out", overrides=overrides)
    assert folder == tmp_path / "out" / "small"
    runs = {f.name: f for f in (tmp_path / "out" / "runs").iterdir()}
    assert len(runs) == 3
    assert len(list((tmp_path / "out" / "regions").glob("*.npy"))) == 1
    document = json.loads((folder / "study.json").read_text())
    for name, row in document["rows"].items():
        figures = json.loads((runs[row["runs"]["0"]["key"]] / "eval.json").read_text())
        run = row["runs"]["0"]
        assert run["AP"] == round(100 * figures["AP"], 2), name
        by_images = run["by_images"]  # 50 classes with ground truth each, at most 10 training images
        assert by_images.keys() == {"1-2", "3-9"} or by_images.keys() == {"1-2", "3-9", "10-29"}
    assert document["rows"]["CLIS"]["runs"] == document["rows"]["again"]["runs"]
    assert "4 jobs to do" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("*.pt")}
    run_study(path, tmp_path / "out", overrides=overrides)
    assert "0 jobs to do" in capsys.readouterr().out
    run_study(path, tmp_path / "out", overrides=overrides, rows=["baseline"], seeds=[1])
    assert "1 job to do" in capsys.readouterr().out
    document = json.loads((folder / "study.json").read_text())
    assert list(document["rows"]["baseline"]["runs"]) == ["0", "1"]
    assert list(document["rows"]["CLIS"]["runs"]) == ["0"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_run_that_fails_is_named_and_the_others_are_done(data, tmp_path):
    """More images a step than can be divided so."""
    rows = {
        "bad": {"overrides": ["clis=off", "train.images_per_step=3"]},
        "good": {"overrides": ["clis=off"]},
    }
    path = write_study(tmp_path / "small.yaml", rows)
    overrides = [*SHORT, f"data.root={data}", "train.steps=1", "train.images_per_process=2"]
    with pytest.raises(ValueError, match=r"1 of 2 jobs failed: training of bad, seed 0; re-run the command"):
        run_study(path, tmp_path / "out", overrides=overrides)
    document = json.loads((tmp_path / "out" / "small" / "study.json").read_text())
    assert document["rows"]["bad"]["runs"] == {}
    assert "0" in document["rows"]["good"]["runs"]
    (log,) = [f for f in (tmp_path / "out" / "logs").iterdir() if "error: " in f.read_text()]
    assert "is not a whole number of micro-batches" in log.read_text()


@pytest.mark.slow
def test_a_run_whose_detector_failed_was_not_run(data, tmp_path, capsys):
    path = write_study(tmp_path / "small.yaml", {"CLIS": {}})
    overrides = [*SHORT, f"data.root={data}", "train.steps=1", "train.images_per_process=3"]
    with pytest.raises(ValueError, match="3 of 3 jobs failed"):
        run_study(path, tmp_path / "out", overrides=overrides)
    said = capsys.readouterr().out
    assert "NOT RUN training of CLIS, seed 0: regions by category-rank-first, seed 0 failed" in said
    (log,) = (tmp_path / "out" / "logs").iterdir()
    assert f"FAILED detector of the regions, seed 0, see {log}" in said


def test_the_table_by_hand():
    """APs 10 and 14: mean 12, deviation sqrt(8) = 2.8; the second row, of one seed, is 0.5 below."""

    def run(ap: float) -> dict:
        figures = {"AP": ap, "APr": 1.0, "APc": 2.0, "APf": -100.0, "step_seconds": 0.5}
        return figures | {"by_images": {"1-2": ap / 2, "10-29": ap}}

    rows = {
        "first": {
            "runs": {"0": run(10.0), "1": run(14.0)},
            "paper": [29.2, 24.4, 28.6, 31.9],
            "paper_seconds": 0.479,
        },
        "second": {"runs": {"0": run(9.5)}, "paper": None},
        "third": {"runs": {}, "paper": None},
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows).splitlines()]
    assert lines[0][:6] == ["row", "seeds", "AP", "APr", "APc", "APf"]
    assert lines[2] == [
        "first", "2", "12.0 ± 2.8", "1.0 ± 0.0", "2.0 ± 0.0", "", "", "0.50 ± 0.00",
        "29.2 / 24.4 / 28.6 / 31.9; 0.479 s",
    ]  # fmt: skip
    assert lines[3] == ["second", "1", "9.5", "1.0", "2.0", "", "-0.5", "0.50", ""]
    assert lines[4] == ["third", "0", "", "", "", "", "", "", ""]
    assert table_by_images(rows).splitlines() == [
        "| AP by training images | 1-2 | 10-29 |",
        "|---|---|---|",
        "| first | 6.0 ± 1.4 | 12.0 ± 2.8 |",
        "| second | 4.8 | 9.5 |",
        "| third |  |  |",
    ]


def test_differences_wait_for_the_first_row():
    def run(ap: float) -> dict:
        return {"AP": ap, "APr": 1.0, "APc": 2.0, "APf": 3.0, "step_seconds": 0.5, "by_images": {}}

    rows = {"first": {"runs": {}, "paper": None}, "second": {"runs": {"0": run(9.5)}, "paper": None}}
    second = table(rows).splitlines()[3].split("|")
    assert second[7].strip() == ""


def test_overrides_of_clis_do_not_reach_the_detector_in_either_form(tmp_path):
    """`clis.s=8` and `clis={s: 8}`: one detector, one region file, and neither command has it."""
    rows = {"dotted": {"overrides": ["clis.s=8"]}, "mapping": {"overrides": ["clis={s: 8, t: 1}"]}}
    loaded = Study.load(write_study(tmp_path / "small.yaml", rows))
    plan = {}
    for row in loaded.rows:
        plan_row(loaded, row, 0, tmp_path, ["optim.lr=0.5"], plan)
    detector, regions, *trainings = plan.values()
    assert len(trainings) == 2
    assert all(job.after == [regions] for job in trainings)
    assert regions.after == [detector]
    assert "optim.lr=0.5" in detector.command
    assert not [word for word in detector.command if word.startswith(("clis.", "clis="))]


def test_keys_are_of_what_changes_the_result():
    base = load_config(CONFIG, [])
    same = load_config(
        CONFIG, ["output=elsewhere", "data.workers=3", "train.log_every=7", "regions.file=x.npy"]
    )
    assert run_key(same) == run_key(base)
    assert run_key(load_config(CONFIG, ["regions.rule=center"])) == run_key(base)
    for override in (
        "train.seed=1",
        "data.label_noise=0.1",
        "loss.alpha=0.1",
        "data.flip=0.4",
    ):
        assert run_key(load_config(CONFIG, [override])) != run_key(base)


def keys(tmp_path: Path, *rows: list[str], overrides: tuple[str, ...] = (), base: str = CONFIG) -> list[str]:
    path = tmp_path / "keys.yaml"
    named = {str(number): {"overrides": row} for number, row in enumerate(rows)}
    path.write_text(yaml.safe_dump({"base": base, "seeds": [0], "rows": named}))
    loaded = Study.load(path)
    return [loaded.run(row, 0, overrides).key for row in loaded.rows]


def test_keys_tell_where_the_regions_come_from(tmp_path):
    """Two checkpoints, two rules, and two detectors of one config whose training differs."""
    first, second = keys(tmp_path, ["regions.detector=a.pt"], ["regions.detector=b.pt"])
    assert first != second
    assert len(set(keys(tmp_path, [], ["regions.rule=center"], ["regions.rule=top-score"]))) == 3
    lr = tmp_path / "lr.yaml"
    lr.write_text(f"base: {CONFIG}\noptim: {{lr: 0.02}}\n")
    (by_file,) = keys(tmp_path, [], base=str(lr))  # the detector keeps its own learning rate
    (by_override,) = keys(tmp_path, [], overrides=("optim.lr=0.02",))
    assert by_file != by_override
    without = ["clis={s: 0, t: 0, siamese: false, contrastive: false}"]
    assert len(set(keys(tmp_path, without, [*without, "regions.rule=center"]))) == 1


def test_keys_tell_what_is_chosen_in_training(tmp_path):
    """These rules share the file of whole images, and are other runs."""
    rows = [
        [f"regions.rule={rule}", "clis.t=0", "clis.contrastive=false"]
        for rule in ("full", "max-size", "max-score")
    ]
    assert len(set(keys(tmp_path, *rows))) == 3
    study = Study.load(tmp_path / "keys.yaml")
    assert len({study.run(row, 0, ()).regions for row in study.rows}) == 1


def test_keys_tell_the_boxes_that_are_given(data, tmp_path):
    """By what is in their file, as annotations are known."""
    path = tmp_path / "boxes.json"
    given, own = ["regions.rule=given", f"regions.boxes={path}"], (f"data.root={data}", "data.generate=null")
    found = []
    for box in ([1, 2, 3, 4], [1, 2, 3, 5]):
        path.write_text(json.dumps({"a.jpg": box}))
        found += keys(tmp_path, given, overrides=own)
    assert found[0] != found[1]


def test_runs_of_a_row_that_was_edited_are_dropped(tmp_path):
    path = write_study(tmp_path / "small.yaml", {"a": {}, "b": {"overrides": ["loss.alpha=0.1"]}})
    loaded = Study.load(path)
    run = {"AP": 1.0, "APr": 1.0, "APc": 1.0, "APf": 1.0, "step_seconds": 1.0, "by_images": {"1-2": 1.0}}
    record = Record(loaded, tmp_path / "small", [])
    for row in loaded.rows:
        record.rows[row.name] = {"0": run | {"key": loaded.run(row, 0, []).key}}
    record.write()
    edited = Study.load(
        write_study(tmp_path / "small.yaml", {"a": {}, "b": {"overrides": ["loss.alpha=0.2"]}})
    )
    again = Record(edited, tmp_path / "small", [])
    assert [again.has(row, 0) for row in edited.rows] == [True, False]
    again.write()
    rows = json.loads((tmp_path / "small" / "study.json").read_text())["rows"]
    assert [len(row["runs"]) for row in rows.values()] == [1, 0]


def test_processes_of_one_study_keep_what_the_other_has_recorded(tmp_path):
    """Both read the file at their start; each records a row. Places and speed may differ, results not."""
    path = write_study(tmp_path / "small.yaml", {"a": {}, "b": {"overrides": ["loss.alpha=0.1"]}})
    study, folder = Study.load(path), tmp_path / "small"
    run = {"AP": 1.0, "APr": 1.0, "APc": 1.0, "APf": 1.0, "step_seconds": 1.0, "by_images": {"1-2": 1.0}}
    records = Record(study, folder, []), Record(study, folder, ["data.workers=0"])
    for record, row in zip(records, study.rows):
        record.rows[row.name] = {"0": run | {"key": study.run(row, 0, []).key}}
        record.write()
    records[0].write()
    rows = json.loads((folder / "study.json").read_text())["rows"]
    assert {name: list(row["runs"]) for name, row in rows.items()} == {"a": ["0"], "b": ["0"]}
    assert sorted(each.name for each in folder.iterdir()) == ["study.json", "table.md"]
    with pytest.raises(ValueError, match="was made with the overrides"):
        Record(study, folder, ["data.workers=0", "optim.lr=1"])


def test_overrides_that_rows_set_themselves_are_named():
    rows = [Row("a", ("train.steps=9",), None), Row("b", ("train={steps: 4}",), None), Row("c", (), None)]
    assert overruled(rows, ["train.steps=4", "optim.lr=1"]) == {"train.steps": ["a"]}


def test_a_renamed_row_keeps_its_runs_and_a_removed_one_is_named(tmp_path):
    """A run is known by its settings. Drawing again refuses to drop one; running the study says so."""
    rows = {"a": {}, "b": {"overrides": ["loss.alpha=0.1"]}, "c": {"overrides": ["loss.alpha=0.2"]}}
    loaded = Study.load(write_study(tmp_path / "small.yaml", rows))
    run = {"AP": 1.0, "APr": -100.0, "APc": 1.0, "APf": 1.0, "step_seconds": 1.0, "by_images": {"1-2": 1.0}}
    record = Record(loaded, tmp_path / "small", [])
    for row in loaded.rows:
        record.rows[row.name] = {"3": run | {"key": loaded.run(row, 3, []).key}}
    record.write()
    path = write_study(tmp_path / "small.yaml", {"ours": rows["a"], "c": rows["c"]})
    again = Record(Study.load(path), tmp_path / "small", [])
    assert {name: list(runs) for name, runs in again.rows.items()} == {"ours": ["3"], "c": ["3"]}
    assert again.outdated == ["b, seed 3"]
    before = (tmp_path / "small" / "study.json").read_text()
    with pytest.raises(ValueError, match=r"data or rows than the study has now: b, seed 3; draw it"):
        draw_again(path, tmp_path)
    assert (tmp_path / "small" / "study.json").read_text() == before


def test_runs_that_another_study_has_are_not_run_again(tmp_path, capsys):
    for other in ("other", "damaged", "foreign"):
        (tmp_path / "out" / other).mkdir(parents=True)
    path = write_study(tmp_path / "small.yaml", {"a": {}, "b": {"overrides": ["loss.alpha=0.1"]}})
    loaded, figures = Study.load(path), {"AP": 1.0, "APr": 2.0, "APc": 3.0, "APf": 4.0}
    runs = {
        row.name: figures | {"by_images": {"1-2": 1.0}, "key": loaded.run(row, 0, []).key}
        for row in loaded.rows
    }
    rows = {
        "of another name": {"runs": {"5": runs["a"] | {"step_seconds": 9.0}}},
        "b": {"runs": {"0": runs["b"] | {"step_seconds": 9.0}}},
    }
    (tmp_path / "out" / "other" / "study.json").write_text(json.dumps({"overrides": [], "rows": rows}))
    (tmp_path / "out" / "damaged" / "study.json").write_text('{"rows": {')
    (tmp_path / "out" / "foreign" / "study.json").write_text('{"rows": ["no study of ours"]}')
    folder = run_study(path, tmp_path / "out")
    said = capsys.readouterr().out
    assert "0 jobs to do" in said
    assert all(
        f"{tmp_path / 'out' / name / 'study.json'}: left aside" in said for name in ("damaged", "foreign")
    )
    rows = json.loads((folder / "study.json").read_text())["rows"]
    assert {name: row["runs"] for name, row in rows.items()} == {name: {"0": runs[name]} for name in runs}
    assert "9.00" not in (folder / "table.md").read_text()  # seconds of another day


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_asked_to_stop_it_asks_what_runs(tmp_path, number):
    """A job that saves at its first signal and dies of the second, as a training; the study's whole group is
    signalled, as by Ctrl-C in a terminal. The study ends behind the job, and begins no other."""
    job = """
        import pathlib, signal, sys, time
        def save(number, frame):
            signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.SIG_DFL)
            time.sleep(1.5)
            pathlib.Path('saved').touch()
            sys.exit(75)
        signal.signal(signal.SIGTERM, save), signal.signal(signal.SIGINT, save)
        pathlib.Path('running').touch()
        time.sleep(60)
    """
    run = """
        import sys
        from pathlib import Path
        from clis.cli import run_command
        from clis.study.jobs import Job, work
        jobs = [Job(name, [sys.executable, 'job.py'], Path(name)) for name in ('first', 'second')]
        run_command(lambda: list(work(jobs, 1, Path('logs'))))
    """
    (tmp_path / "job.py").write_text(textwrap.dedent(job))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(run)], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (tmp_path / "running").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75, errors
    assert "re-run the same command to resume" in errors
    assert (tmp_path / "saved").exists()
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["first.txt"]


def test_jobs_share_the_cores_unless_the_user_says(tmp_path, monkeypatch):
    """More threads than cores can take twenty times as long, so OMP_NUM_THREADS of the user is kept."""
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS'])"

    def threads(at_once: int) -> str:
        out = tmp_path / "said"
        out.unlink(missing_ok=True)
        job = Job("job", [sys.executable, "-c", code, str(out)], out)
        assert list(work([job], at_once, tmp_path / "logs")) == [job]
        return out.read_text()

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (threads(1), threads(2), threads(9)) == ("6", "3", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads(1) == "2"


@pytest.mark.parametrize(
    "path",
    sorted((REPOSITORY / "configs" / "studies").rglob("*.yaml")),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_shipped_studies_load(path):
    loaded = Study.load(path)
    keys = set()
    for row in loaded.rows:
        keys.add(loaded.run(row, 0, []).key)
    assert len(keys) == len(loaded.rows)


def test_rows_may_have_seeds_of_their_own(tmp_path, monkeypatch):
    """All rows of a seed before the next; seeds that the command names hold for every row."""
    planned = []
    monkeypatch.setattr(
        "clis.commands.study.plan_row", lambda _, row, seed, *rest: planned.append((row.name, seed))
    )
    rows = {"few": {}, "many": {"overrides": ["clis.t=1"], "seeds": [0, 1, 2]}}
    path = write_study(tmp_path / "seeds.yaml", rows, seeds=(0, 1))
    run_study(path, tmp_path)
    assert planned == [("few", 0), ("many", 0), ("few", 1), ("many", 1), ("many", 2)]
    planned.clear()
    run_study(path, tmp_path, seeds=[7])
    assert planned == [("few", 7), ("many", 7)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": CONFIG, "seeds": [0], "rows": {"a": {"seeds": 3}}}, "row a: seeds is 3; give a list"),
        ({"base": CONFIG, "seeds": [], "rows": {"a": {}}}, r"seeds is \[\]; give a list of .*, at least one"),
        ({"base": CONFIG, "seeds": [0]}, "rows is missing"),
        ({"base": CONFIG, "seeds": [0], "rows": {}, "sedes": 1}, "unknown key sedes"),
        ({"base": CONFIG, "seeds": [0], "rows": {"a": {"override": []}}}, "row a: unknown key override"),
        ({"base": CONFIG, "seeds": [0], "rows": {"a": {"paper": [1, 2]}}}, "give AP, APr, APc, APf"),
        ({"base": CONFIG, "seeds": [0], "rows": {"a": ["x=1"]}}, "row a: a mapping of"),
        ({"base": CONFIG, "seeds": 0, "rows": {}}, "seeds is 0; give a list"),
        ({"base": CONFIG, "seeds": [0], "rows": ["a"]}, "give a mapping of names to rows"),
        ({"base": CONFIG, "seeds": [0], "rows": {"a": {"overrides": None}}}, "row a: overrides is None"),
        ({"base": CONFIG, "seeds": [0], "rows": {"a": {"paper": 3}}}, "row a: paper is 3"),
        ({"base": CONFIG, "seeds": [0], "rows": {"a": {"paper": [1, None, 3, 4]}}}, r"paper is \[1, None"),
        ({"base": CONFIG, "seeds": [0], "rows": {"a": {"paper_seconds": "1 s"}}}, "give a number"),
        (
            {"base": CONFIG, "seeds": [0], "rows": {"a": {"overrides": ["regions.file=x.npy"]}}},
            "cannot override regions.file",
        ),
        (
            {"base": CONFIG, "seeds": [0], "rows": {"a": {"overrides": ["train={seed: 3}"]}}},
            "cannot override train.seed",
        ),
        (
            {"base": CONFIG, "seeds": [0], "rows": {"a": {"overrides": ["data.root=x"]}}},
            "cannot override data.root",
        ),
    ],
)
def test_study_files_at_fault(tmp_path, values, message):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        Study.load(tmp_path / "bad.yaml")


@pytest.mark.parametrize("option", ["--rows=first", "--seeds=0"])
def test_what_is_drawn_again_is_all_that_is_recorded(tmp_path, option):
    with pytest.raises(ValueError, match=r"--draw draws all that is recorded; leave --rows and --seeds out"):
        main(["study", "studies/components", "--draw", option, f"--out={tmp_path}"])


def test_rows_that_are_not_there(tmp_path):
    path = write_study(tmp_path / "small.yaml", {"CLIS": {}})
    with pytest.raises(ValueError, match=r"has no row 'CLIP'; it has 'CLIS'"):
        run_study(path, tmp_path, rows=["CLIP"])
    with pytest.raises(
        ValueError, match=r"no row 'train.steps=9'; .*; put key=value before --rows and --seeds"
    ):
        run_study(path, tmp_path, rows=["CLIS", "train.steps=9"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("-1", "'-1' is not a seed; python -m"),
        ("train.steps=9", "'train.steps=9' is not a seed; put key=value before --rows and --seeds"),
    ],
)
def test_invalid_seeds(given, message, capsys):
    with pytest.raises(SystemExit):
        run_verb("study", ["studies/alpha", "--seeds", "0", given])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("override", ["--seed=3", "--output=x", "regions={file: r.npy}"])
def test_what_a_study_sets_itself_is_not_overridden(tmp_path, override):
    path = write_study(tmp_path / "small.yaml", {"CLIS": {}})
    with pytest.raises(
        ValueError, match=r"cannot be overridden on the command line.* --seeds N .* --out FOLDER"
    ):
        run_verb("study", [str(path), "--out", str(tmp_path), override])


def test_options_with_several_values_end_at_an_option_of_other_programs(tmp_path, monkeypatch):
    path, given = write_study(tmp_path / "small.yaml", {"CLIS": {}}), {}
    monkeypatch.setattr(
        "clis.commands.study.run_study", lambda *_, **options: given.update(options) or tmp_path
    )
    (tmp_path / "table.md").touch()
    run_verb(
        "study",
        [str(path), "--rows", "CLIS", "--steps", "5", "--seeds", "1", "2", "--lr=0.1", "data.workers=0"],
    )
    assert (given["rows"], given["seeds"]) == (["CLIS"], [1, 2])
    assert given["overrides"] == ["data.workers=0", "train.steps=5", "optim.lr=0.1"]


@pytest.mark.parametrize(
    "path",
    sorted(path.parent for path in RECORDED.rglob("study.json")),
    ids=lambda path: path.relative_to(RECORDED).as_posix(),
)
def test_recorded_runs_are_those_of_the_rows(path, monkeypatch):
    """What docs/ shows is what `python -m clis study` would skip as done; rows may be still to be run."""
    monkeypatch.setenv("CLIS_DATA", str(SHARED))
    name = path.relative_to(RECORDED).as_posix()
    loaded = Study.load(REPOSITORY / "configs" / "studies" / f"{name}.yaml")
    assert loaded.name == name
    document = json.loads((path / "study.json").read_text())
    recorded = document["rows"]
    config = load_config(loaded.base, document["overrides"])
    if config.data.generate is None and not data_path(config, config.data.train).exists():
        pytest.skip("the annotations, by which its runs are known, are not here")
    rows = {row.name: row for row in loaded.rows}
    for name, record in recorded.items():
        for seed, run in record["runs"].items():
            assert run["key"] == loaded.run(rows[name], int(seed), document["overrides"]).key, (name, seed)
    assert (path / "table.md").read_text() == "\n".join([ABOUT, table(recorded), table_by_images(recorded)])


def test_a_study_like_another_takes_what_it_does_not_give(tmp_path):
    """The base and a row are replaced, a row is added; paths are relative to the file that has them."""
    (tmp_path / "other").mkdir()
    rows = {"a": {"at": 0}, "b": {"at": 1, "config": "b.yaml"}}
    first = {"base": "one.yaml", "seeds": [0, 1], "axis": "alpha", "rows": rows}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(first))
    second = {"like": "../first.yaml", "base": "two.yaml", "rows": {"a": {"at": 3}, "c": {"at": 4}}}
    (tmp_path / "other" / "second.yaml").write_text(yaml.safe_dump(second))
    loaded = Study.load(tmp_path / "other" / "second.yaml")
    assert (loaded.name, loaded.seeds, loaded.axis) == ("second", (0, 1), "alpha")
    assert loaded.base.resolve() == tmp_path / "other" / "two.yaml"
    assert [(row.name, row.at) for row in loaded.rows] == [("a", 3), ("b", 1), ("c", 4)]
    assert loaded.rows[1].config.resolve() == tmp_path / "b.yaml"


def test_a_run_is_known_by_its_data_wherever_they_lie(data, tmp_path):
    """Equal for a copy in another folder, other for other annotations; here as of a user's own data."""
    study_file = write_study(tmp_path / "small.yaml", {"CLIS": {}})

    def key(root):
        loaded = Study.load(study_file)
        return loaded.run(loaded.rows[0], 0, [f"data.root={root}", "data.generate=null"]).key

    shutil.copytree(data, tmp_path / "copy")
    assert key(data) == key(tmp_path / "copy")
    before = key(tmp_path / "copy")
    path = tmp_path / "copy" / "shapes" / "train.json"
    path.write_text(path.read_text() + " ")
    assert key(tmp_path / "copy") != before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"like": "one.yaml"}, "one.yaml: like itself"),
        ({"like": "two.yaml"}, "one.yaml: like itself"),
        ({"like": None}, "None is no path"),
        ({"base": 5}, "5 is no path"),
        ({"rows": {"a": {"config": 5}}}, "5 is no path"),
    ],
)
def test_what_a_study_cannot_be_like(tmp_path, values, message):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"base": CONFIG, "seeds": [0], "rows": {}} | values))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"like": "one.yaml"}))
    with pytest.raises(ValueError, match=message):
        Study.load(tmp_path / "one.yaml")


def test_places_on_an_axis_need_an_axis_and_are_numbers(tmp_path):
    path = tmp_path / "sweep.yaml"
    values = {"base": CONFIG, "seeds": [0], "rows": {"a": {"at": 0}, "b": {"at": 0.5}}}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="no `axis` says on what"):
        Study.load(path)
    path.write_text(yaml.safe_dump(values | {"axis": "alpha"}))
    assert [row.at for row in Study.load(path).rows] == [0, 0.5]
    path.write_text(yaml.safe_dump(values | {"axis": "alpha", "rows": {"a": {"at": "left"}}}))
    with pytest.raises(ValueError, match="row a: at is 'left'; give a number"):
        Study.load(path)


def test_drawing_again_runs_nothing_and_keeps_what_is_recorded(tmp_path, monkeypatch):
    """The record of an earlier version has no places; the study file has them."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("clis.commands.study.work", None)
    source = REPOSITORY / "docs" / "studies" / "beta"
    recorded = json.loads((source / "study.json").read_text())
    old = {name: recorded[name] for name in ("base", "overrides", "classes")} | {
        "rows": {name: {"runs": row["runs"]} for name, row in recorded["rows"].items()}
    }
    (tmp_path / "beta").mkdir()
    (tmp_path / "beta" / "study.json").write_text(json.dumps(old))
    config = str(REPOSITORY / "configs" / "studies" / "beta.yaml")
    monkeypatch.chdir(REPOSITORY)
    run_verb("study", [config, "--draw", f"--out={tmp_path}"])
    assert json.loads((tmp_path / "beta" / "study.json").read_text()) == recorded
    assert (tmp_path / "beta" / "table.md").read_text() == (source / "table.md").read_text()
    assert (tmp_path / "beta" / "figure.png").stat().st_size > 10_000
    assert sum(recorded["classes"].values()) == 50
    recorded["rows"]["0.1"]["runs"]["0"]["key"] = "of another"
    (tmp_path / "beta" / "study.json").write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match=r"data or rows than the study has now: 0\.1, seed 0;"):
        run_verb("study", [config, "--draw", f"--out={tmp_path}"])
    assert json.loads((tmp_path / "beta" / "study.json").read_text()) == recorded  # nothing is thrown away
    del recorded["rows"]["0.1"]["runs"]["0"]["by_images"]
    for damaged in ('{"rows": {"a": {}}}', json.dumps(recorded), '{"overrides": [1], "rows": {}}'):
        (tmp_path / "beta" / "study.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"study\.json: no record of a study, or damaged"):
            run_verb("study", [config, "--draw", f"--out={tmp_path}"])
    with pytest.raises(SystemExit):
        run_verb("study", [config, "--jobs=0"])
    with pytest.raises(FileNotFoundError, match="--out is the folder above the study's own"):
        run_verb("study", [config, "--draw", f"--out={tmp_path / 'none'}"])
