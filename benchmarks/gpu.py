"""Shows on a GPU, in one run of under nine minutes, what the README promises of one.

    python benchmarks/gpu.py --out FOLDER [--device cpu --tiny] [--parts a,c] [--minutes 8.75]

Needs this repository, torch, torchvision and the other packages of pyproject.toml; part a also pytest. No
data: images are made. Parts run in the order of their worth, each in a process of its own with a time limit:
a crash or a time-out ends a part and not the run, and later parts get the time that earlier ones have left.
After each part FOLDER/gpu.json and FOLDER/gpu.md hold all results so far, also those of a part that was cut
off, and FOLDER/part_X.log what it said. What the parts make (data, runs) is removed unless there is --keep.
`--tiny --device cpu` runs every part in a small form, as a trial.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
WORK = "work"
"""Folder below that of the results for what the parts make."""


@dataclass(frozen=True)
class Part:
    """A part of the run; gpu_parts.py has what it does."""

    title: str
    seconds: int
    """Its limit. Together they are less than nine minutes."""
    promised: tuple[str, ...]
    """Names of the rows without which it is not complete; a name with * at its end stands for any such."""


PARTS = {
    "a": Part("Tests marked device", 75, ("tests",)),
    "b": Part("The README's first command", 130, ("baseline", "CLIS", "all")),
    "c": Part(
        "A training step and inference at the paper's size, beside torchvision", 50,
        (
            "step, torchvision, float32", "step, torchvision in channels_last, float32",
            *(f"step, {who}, {name}" for who in ("baseline", "CLIS")
              for name in ("float32", "TF32", "bfloat16", "float16")),
            "inference, torchvision, bfloat16", "inference, CLIS, float32", "inference, CLIS, bfloat16",
        ),
    ),
    "d": Part(
        "The paper's tables V and VI, and the losses", 65,
        ("s=0 t=0", "s=16 t=0", "s=32 t=0", "s=16 t=2", "s=16 t=4"),
    ),
    "e": Part(
        "Equal bits under deterministic algorithms", 50,
        ("two runs of 30 steps", "a resumed run beside them", "the paper's size, two trainings"),
    ),
    "f": Part(
        "Several processes, or one with nccl", 35,
        ("collectives", "DDP", "training and evaluation", "one process fails"),
    ),
    "g": Part("An exported program", 30, ("program",)),
    "h": Part(
        "Launches and host waits of a step; the loader; the region search", 55,
        ("step, float32", "step, bfloat16", "loader, *", "region search, *"),
    ),
    "i": Part(
        "Images a process", 45, ("float32, 1 image*", "bfloat16, 1 image*", "inference, TF32, 1 image*")
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results and the parts' files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps, to try the script")
    parser.add_argument("--parts", default="".join(PARTS), help="letters, e.g. a,c (default: all)")
    parser.add_argument("--keep", action="store_true", help="keep the data and runs of the parts")
    parser.add_argument("--minutes", type=float, default=8.75, help="limit of the whole run")
    arguments = parser.parse_args(argv)
    keys = [key for key in arguments.parts if key != ","]
    if unknown := sorted(set(keys) - set(PARTS)):
        parser.error(f"--parts {unknown[0]}: one of {', '.join(PARTS)}")

    def command(key: str) -> list[str]:
        script = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu_parts.py"), key]
        return [*script, str(arguments.out), arguments.device, *(["--tiny"] if arguments.tiny else [])]

    form = f"{arguments.device}, {'small form: its times mean nothing' if arguments.tiny else 'full size'}"
    commands = {key: command(key) for key in keys}
    results = run_parts(commands, arguments.out, 60 * arguments.minutes, form=form)
    if not arguments.keep:
        shutil.rmtree(arguments.out / WORK, ignore_errors=True)
    return int(any(result["status"] != "ok" for result in results["parts"].values()))


def run_parts(
    commands: Mapping[str, Sequence[str]],
    out: Path,
    seconds: float,
    parts: Mapping[str, Part] = PARTS,
    form: str = "",
) -> dict[str, Any]:
    """Run each command by the key of its part, in order, and write the results after each; return them."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": describe_machine() | {"run": form}, "parts": {}}
    deadline, keys = time.monotonic() + seconds, list(commands)
    for place, key in enumerate(keys):
        left = deadline - time.monotonic()
        limit = max(parts[key].seconds, left - sum(parts[later].seconds for later in keys[place + 1 :]))
        print(f"{key}. {parts[key].title}", flush=True)
        result = run_part(key, parts[key], commands[key], out, min(limit, left))
        results["parts"][key] = result
        print(f"   {result['status']}, {result['seconds']:.0f} s", flush=True)
        for name, text in (
            ("gpu.json", json.dumps(results, indent=1) + "\n"),
            ("gpu.md", to_markdown(results)),
        ):
            (out / f".{name}").write_text(text)
            os.replace(out / f".{name}", out / name)
    return results


def run_part(key: str, part: Part, command: Sequence[str], out: Path, limit: float) -> dict[str, Any]:
    """Run a part for at most `limit` seconds; what it has written by then counts in any case."""
    rows_file, log = out / f"part_{key}.jsonl", out / f"part_{key}.log"
    rows_file.unlink(missing_ok=True)
    began, status = time.monotonic(), "not started: no time was left"
    if limit > 5:
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment(out),
                start_new_session=True,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait(timeout=limit)
                status = "ok" if code == 0 else f"failed with {code}: {last_line(log)}"
            except subprocess.TimeoutExpired:
                status = f"cut off after {limit:.0f} s"
                process.terminate()  # part a says then how far it is
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=3)
            finally:
                kill_family(process)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    names = [row["row"] for row in rows]
    missing = [promise for promise in part.promised if not any(is_kept(promise, name) for name in names)]
    if status == "ok" and (wrong := [row["row"] for row in rows if row.get("ok") is False]):
        status = f"not as promised: {', '.join(wrong)}"
    elif status == "ok" and missing:
        status = f"incomplete: no {', '.join(missing)}"
    return {"title": part.title, "status": status, "seconds": time.monotonic() - began, "rows": rows}


def is_kept(promise: str, name: str) -> bool:
    return name.startswith(promise[:-1]) if promise.endswith("*") else name == promise


def environment(out: Path) -> dict[str, str]:
    """Of a part: this repository's code, and a cache in the folder."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "CLIS_CACHE": str(out.resolve() / WORK / "cache")}


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def kill_family(process: subprocess.Popen) -> None:
    """Kill the process with all that it has started; torchrun's workers are in sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    family = [process.pid]
    for pid in family:  # grows as it goes
        family += [child for child, parent in parents.items() if parent == pid]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also those whose parent has ended
    for pid in family[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def describe_machine() -> dict[str, str]:
    """Versions, card and driver, without torch: this process keeps off the card."""
    machine = {"python": platform.python_version(), "cores": str(os.cpu_count())}
    for name in ("torch", "torchvision"):
        machine[name] = importlib.metadata.version(name)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    machine["card"] = said(query) or "none"
    machine["commit"] = said(["git", "describe", "--always", "--dirty"]) or "unknown"
    return machine


def said(command: Sequence[str]) -> str:
    """What a command prints, on one line; nothing where it does not work."""
    try:
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(result.stdout.strip().splitlines()) if result.returncode == 0 else ""


def to_markdown(results: Mapping[str, Any]) -> str:
    """The results as tables, one a part."""
    lines = [", ".join(f"{name} {value}" for name, value in results["machine"].items()), ""]
    for key, part in results["parts"].items():
        lines += [f"## {key}. {part['title']}: {part['status']} ({part['seconds']:.0f} s)", ""]
        columns = list(dict.fromkeys(name for row in part["rows"] for name in row if name != "ok"))
        if columns:
            lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(shown(row.get(name)) for name in columns)} |" for row in part["rows"]]
            lines.append("")
    return "\n".join(lines)


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):  # a median with least and most
        return "{} ({} .. {})".format(*map(shown, value))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
