"""benchmarks/gpu.py: a part that goes wrong ends alone, and every part works in its small form on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
from runs import REPOSITORY


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The script, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("gpu_script", REPOSITORY / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.mark.slow
def test_a_part_that_goes_wrong_ends_alone(gpu, tmp_path):
    parts = {key: gpu.Part(f"part {key}", 8, ("kept", "more*")) for key in "abcde"}
    write = "open({!r}, 'a').write({!r} + chr(10))"

    def rows(key: str, *names: str, **more) -> list[str]:
        path = str(tmp_path / f"part_{key}.jsonl")
        return [write.format(path, json.dumps({"row": name, "ms": 2.0, **more})) for name in names]

    commands = {
        "a": python(*rows("a", "kept", "more of it")),
        "b": python(*rows("b", "kept"), "raise ValueError('no luck')"),
        "c": python(*rows("c", "kept"), "import time", "time.sleep(60)"),
        "d": python(*rows("d", "kept", "more", ok=False)),
        "e": python(*rows("e", "kept")),
    }
    results = gpu.run_parts(commands, tmp_path, 28, parts)
    assert results == json.loads((tmp_path / "gpu.json").read_text())
    statuses = {key: part["status"] for key, part in results["parts"].items()}
    assert statuses["a"] == "ok"
    assert statuses["b"] == "failed with 1: ValueError: no luck"
    assert statuses["c"].startswith("cut off after")
    assert statuses["d"] == "not as promised: kept, more"
    assert statuses["e"] == "incomplete: no more*"
    assert [row["row"] for row in results["parts"]["c"]["rows"]] == ["kept"]  # what it had until then
    table = (tmp_path / "gpu.md").read_text()
    assert "## b. part b: failed with 1: ValueError: no luck" in table
    assert "| row | ms |\n|---|---|\n| kept | 2 |\n| more of it | 2 |" in table
    assert "torch 2" in table.splitlines()[0]


def test_the_limits_leave_nine_minutes(gpu):
    assert sum(part.seconds for part in gpu.PARTS.values()) < 9 * 60


@pytest.mark.slow
def test_what_is_left_when_the_time_is_over(gpu, tmp_path):
    parts = {"a": gpu.Part("one", 6, ()), "b": gpu.Part("two", 1, ())}
    commands = {"a": python("import time", "time.sleep(60)"), "b": python()}
    results = gpu.run_parts(commands, tmp_path, 7, parts)
    assert [part["status"] for part in results["parts"].values()] == [
        "cut off after 6 s", "not started: no time was left"
    ]  # fmt: skip


@pytest.mark.slow
def test_every_part_in_its_small_form(gpu, tmp_path):
    """As it runs on a GPU, but for sizes; alone on two cores in less than five minutes."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--out", str(tmp_path)]
    command += ["--device", "cpu", "--tiny", "--minutes", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, cwd=tmp_path, timeout=3700)
    results = json.loads((tmp_path / "gpu.json").read_text())
    statuses = {key: part["status"] for key, part in results["parts"].items()}
    assert statuses == dict.fromkeys(gpu.PARTS, "ok")
    figures = {row["row"]: row for part in results["parts"].values() for row in part["rows"]}
    for name, wanted in {
        "tests": {"passed", "failed", "skipped"},
        "CLIS": {"AP", "APr", "step ms", "waiting ms"},
        "all": {"seconds"},
        "step, CLIS, float32": {"ms", "peak GB", "images/s", "to torchvision", "to baseline"},
        "inference, CLIS, bfloat16": {"ms", "images/s", "to torchvision in channels_last"},
        "s=16 t=2": {"float32 ms", "bfloat16 to s=0", "paper's V100 ms", "paper's to s=0"},
        "loss: seesaw": {"float32 ms", "float32 to cross_entropy"},
        "two runs of 30 steps": {"what", "seconds"},
        "a resumed run beside them": {"what", "stopped at"},
        "collectives": {"processes", "backend", "gather of keys, ms"},
        "program": {"export s", "program ms", "detector ms"},
        "step, bfloat16": {"operators", "launches", "nonzero", "to the host", "GPU idle"},
        "loader, 2 workers": {"images/s", "of the TF32 step's"},
        "region search, bfloat16": {"images/s"},
        "bfloat16, 2 images": {"images/s", "peak GB"},
    }.items():
        assert wanted <= figures[name].keys(), name
    assert not (tmp_path / gpu.WORK).exists()
    assert (tmp_path / "gpu.md").read_text().count("\n## ") == len(gpu.PARTS)
