"""Fuzz what a user hands in: random mutations of a small data set, config and result file.

    python benchmarks/fuzz.py --mutations 500 --out fuzz.jsonl

Every mutation has to end in success or in one clear message (a `ValueError` or `OSError` that names
something), within a time limit, and must leave every input file as it was. Mutations are numbered:
`--seed S --only N` runs one again. The exit code is 1 if any ended otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from clis.commands import run_verb
from clis.commands.check import check
from clis.config import Config, data_path
from clis.config_files import load_config
from clis.data.annotated_images import read_annotated
from clis.data.streams import read_annotations
from clis.engine.evaluate import load_validation
from clis.progress import Progress

LIMIT = 20
"""Seconds for one mutation."""
SHOWN = 12
"""Lines of a traceback that are printed."""
WORDS = (
    "",
    "x",
    "1",
    "caf\u00e9",
    "cafe\u0301",
    "../..",
    "a\\b.jpg",
    "0001.jpg",
    "\0",
    "\ud800",
    "~",
    "null",
    "cat",
)
NUMBERS = (0, 1, -1, 2, 0.5, 1e-4, 1e9, 2**31, 2**63, 2**70, -(2**70), float("nan"), float("inf"), 1e308)
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    *WORDS,
    *NUMBERS,
    [],
    {},
    [[]],
    [1, 2],
    [1, 2, 3, 4],
    {"a": 1},
    [None],
    "9" * 5000,
)
EXTRA = ("ignore", "iscrowd", "area", "segmentation", "neg_category_ids", "not_exhaustive_category_ids",
         "frequency", "image_count", "score", "synset", "coco_url", "base", "paper", "zzz")  # fmt: skip


def build(root: Path) -> None:
    """Write the data set: 6 photos, 3 classes with 2 image-level images each, perfect results, a config."""
    noise = np.random.default_rng(0)

    def photo(path: Path, width: int, height: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)

    names = ("cat", "dog", "owl")
    document: dict[str, list[dict[str, Any]]] = {
        "images": [], "annotations": [], "categories": [{"id": k, "name": n} for k, n in enumerate(names, 1)]
    }  # fmt: skip
    for i in range(1, 7):
        photo(root / "photos" / f"{i:04}.jpg", 48, 36)
        document["images"].append({"id": i, "file_name": f"{i:04}.jpg", "width": 48, "height": 36})
        for j in range(2):
            box = {"bbox": [3 + 15 * j, 5, 15, 20], "area": 300, "iscrowd": 0, "category_id": (i + j) % 3 + 1}
            document["annotations"].append({"id": 2 * i + j, "image_id": i, **box})
    for name in names:
        for j in range(2):
            photo(root / "classes" / name / f"{j}.jpg", 32, 32)
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(document))
    found = [{k: each[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
             for each in document["annotations"]]  # fmt: skip
    (root / "results.json").write_text(json.dumps(found))
    config = {
        "model": {
            "backbone": {"name": "resnet10", "width": 16, "norm": "group", "trainable_layers": 5,
                         "fpn_channels": 16},
            "roi": {"samples": 8, "fc_dim": 16},
        },
        "clis": {"s": 4, "t": 2, "queue_size": 16},
        "data": {
            "root": str(root), "train": "train.json", "train_images": "photos", "val": "val.json",
            "val_images": "photos", "image_level": ["classes"], "short_sides": [32], "max_size": 64,
            "mosaic_size": 64, "min_region": 4.0, "paste_size": [4, 16], "workers": 0,
        },
        "regions": {"rule": "center"},
        "optim": {"lr": 0.01, "decay_steps": [], "warmup_steps": 1},
        "train": {"steps": 2, "images_per_step": 2},
        "test": {"short_side": 32, "max_size": 64},
        "output": str(root / "run"),
    }  # fmt: skip
    (root / "small.yaml").write_text(yaml.safe_dump(config))


class Mutation:
    """One change of the folder, a function of the seed and its number."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")

    def apply(self, root: Path) -> str:
        """Change one file; return what was done."""
        target = self.random.choice(("train.json", "val.json", "results.json", "small.yaml", "image"))
        if target == "image":
            path = self.random.choice(sorted((root / "photos").iterdir()) + sorted(root.glob("classes/*/*")))
            return self._change_bytes(path)
        path = root / target
        return self._change_bytes(path) if self.random.random() < 0.3 else self._change_values(path)

    def _change_values(self, path: Path) -> str:
        is_json = path.suffix == ".json"
        document = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
        said = []
        for _ in range(self.random.choice((1, 1, 1, 2, 5))):
            holder, key, where = self._place(document)
            if holder is None:
                document, text = self.random.choice(ODD), "all"
            else:
                text = f"{where}: {self._change_item(holder, key)}"
            said.append(text)
        try:
            text = json.dumps(document) if is_json else yaml.safe_dump(document)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        except (yaml.YAMLError, UnicodeError, ValueError):
            path.write_text(repr(document), encoding="utf-8", errors="backslashreplace")
        return f"{path.name}: {'; '.join(said)}"

    def _place(self, document: Any) -> tuple[Any, Any, str]:
        """Draw a place in the document: its holder, its key there and its name."""
        holder, key, where = None, None, ""
        value = document
        while isinstance(value, dict | list) and value and (holder is None or self.random.random() < 0.85):
            holder = value
            key = (
                self.random.choice(list(value))
                if isinstance(value, dict)
                else self.random.randrange(len(value))
            )
            where, value = f"{where}.{key}", value[key]
        return (None, None, "") if self.random.random() < 0.02 else (holder, key, where)

    def _change_item(self, holder: Any, key: Any) -> str:
        what = self.random.choice(("replace", "replace", "replace", "remove", "repeat", "add"))
        if what == "remove":
            del holder[key]
        elif what == "repeat" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif what == "add" and isinstance(holder, dict):
            extra = self.random.choice(EXTRA)
            holder[extra] = copy.deepcopy(self.random.choice(ODD))
            return f"{extra} = {str(holder[extra])[:40]!r} added"
        else:
            holder[key] = copy.deepcopy(self.random.choice(ODD))
            return f"= {str(holder[key])[:40]!r}"
        return what

    def _change_bytes(self, path: Path) -> str:
        data = path.read_bytes()
        middle = self.random.randrange(len(data))
        kinds: dict[str, Callable[[], bytes | None]] = {
            "cut off": lambda: data[:middle],
            "empty": lambda: b"",
            "noise": lambda: self.random.randbytes(200),
            "a changed byte": lambda: data[:middle] + self.random.randbytes(1) + data[middle + 1 :],
            "UTF-16": lambda: data.decode("latin-1").encode("utf-16"),
            "byte order mark": lambda: b"\xef\xbb\xbf" + data,
            "Latin-1": lambda: data[:middle] + b"\xe9" + data[middle:],
            "twice": lambda: data + data,
            "zeros": lambda: bytes(len(data)),
            "deeply nested": lambda: b"[" * 100_000,
            "tab": lambda: data[:middle] + b"\t" + data[middle:],
            "a tag of Python": lambda: b"a: !!python/object/apply:os.system ['true']\n",
            "a folder": lambda: path.unlink() or path.mkdir(),  # type: ignore[func-returns-value]
            "a pipe": lambda: path.unlink() or os.mkfifo(path),  # type: ignore[func-returns-value]
            "a link to itself": lambda: path.unlink() or path.symlink_to(path),  # type: ignore[func-returns-value]
            "gone": lambda: path.unlink(),
        }  # fmt: skip
        what = self.random.choice(list(kinds))
        changed = kinds[what]()
        if changed is not None:
            path.write_bytes(changed)
        return f"{path.name}: {what}"


def attempts(root: Path) -> dict[str, Callable[[], object]]:
    """Name what is tried on the folder."""

    def loaded() -> Config:
        return load_config(root / "small.yaml")

    def checked() -> None:
        config = loaded()
        if (
            config.model.backbone.width <= 64 and config.data.max_size <= 10_000
        ):  # else it takes long, rightly
            check(config, workers=0).say()

    def read() -> None:
        config = loaded()
        training = read_annotations(data_path(config, config.data.train))
        annotations = load_validation(config, training.categories, training.path)
        for row in range(len(annotations)):
            read_annotated(annotations, data_path(config, config.data.val_images), row)

    files = ["--annotations", str(root / "val.json"), "--results", str(root / "results.json")]
    return {
        "load_config": loaded,
        "check": checked,
        "evaluate's reading": read,
        "score": lambda: run_verb("score", files),
    }


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in the block after `seconds`, even while it waits for a file."""

    def over(*_: object) -> None:
        raise _TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _TooLong(BaseException):
    """Not an error that anything handles."""


def digest(root: Path) -> dict[str, str]:
    """Return a hash of every input by its name: content of files, kind of what is none."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [each for each in folders if each != "run"]
        for name in files:
            path = Path(folder, name)
            plain = path.is_file() and not path.is_symlink()
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else "special"
    return found


def judge(attempt: Callable[[], object]) -> str | None:
    """Run an attempt; return what is wrong with how it ended, or None."""
    said = io.StringIO()
    try:
        with time_limit(LIMIT), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            attempt()
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, UnicodeError) or not text.strip():
            return f"no clear message: {error!r}"
        if "Traceback" in text or len(text.splitlines()) > 3:
            return f"a message of {len(text.splitlines())} lines: {text[:200]}"
    except _TooLong as error:
        return str(error)
    except Exception:
        return "".join(traceback.format_exc().splitlines(keepends=True)[-SHOWN:])
    return "a traceback in the output" if "Traceback" in said.getvalue() else None


def run(seed: int, number: int, template: Path) -> dict[str, Any]:
    """Apply one mutation to a copy of the folder and judge every attempt."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
        root = Path(name, "data")
        shutil.copytree(template, root)
        text = (root / "small.yaml").read_text().replace(str(template), str(root))
        (root / "small.yaml").write_text(text)
        what = Mutation(seed, number).apply(root)
        before = digest(root)
        wrong = {name: found for name, each in attempts(root).items() if (found := judge(each)) is not None}
        after = digest(root)
        if changed := [path for path in {**before, **after} if before.get(path) != after.get(path)]:
            wrong["inputs"] = f"changed: {', '.join(changed)}"
        return {"seed": seed, "number": number, "what": what, "wrong": wrong}


def fuzz(seed: int, numbers: range) -> Iterator[dict[str, Any]]:
    """Yield the outcome of each mutation."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name, Progress("fuzz", len(numbers)) as progress:
        template = Path(name, "data")
        build(template)
        os.environ["CLIS_CACHE"] = str(Path(name, "cache"))
        for number in numbers:
            yield run(seed, number, template)
            progress.advance()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="run the mutation of this number alone")
    parser.add_argument("--out", type=Path, help="write one JSON line a mutation")
    arguments = parser.parse_args()
    numbers = range(arguments.mutations)
    if arguments.only is not None:
        numbers = range(arguments.only, arguments.only + 1)
    outcomes = []
    for outcome in fuzz(arguments.seed, numbers):
        outcomes.append(outcome)
        for name, wrong in outcome["wrong"].items():
            print(f"{outcome['number']}: {outcome['what']}\n  {name}: {wrong}")
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(outcome) + "\n" for outcome in outcomes))
    bad = sum(bool(outcome["wrong"]) for outcome in outcomes)
    print(f"seed {arguments.seed}: {len(outcomes)} mutations, {bad} ended otherwise")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
