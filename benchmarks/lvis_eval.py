"""The LVIS metric beside the `lvis` package and hotcoco: the same figures, in what time and memory?

    python benchmarks/lvis_eval.py GROUND_TRUTH.json RESULTS.json [--official] [--repeats 3]
    python benchmarks/lvis_eval.py --simulate 19809 --out FOLDER      # two files of LVIS val's size

Every measurement is a process of its own, and the kinds take turns. *metric* is matching and accumulating
with annotations and detections in arrays; *results* is from the two JSON files. hotcoco (`pip install
hotcoco`) is compared if it is installed; `--official` adds the `lvis` package, which needs minutes for 5,000
images and more than 24 GB for LVIS val.
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clis.data.annotations import load_annotations
from clis.metric.detections import Detections
from clis.metric.lvis_eval import accumulate, summarize
from clis.metric.matching import match
from clis.metric.official import load_lvis, run_lvis

T = TypeVar("T")

BASE = ("nothing", "imports alone")
KINDS = {
    "metric": "ours, arrays in: match + accumulate + average",
    "hotcoco": "hotcoco: evaluate + accumulate + summarize, loaded before",
    "read": "ours: result JSON to arrays",
    "json": "json.load of the result file",
    "results": "ours: both JSON files to figures",
}
OFFICIAL = ("official", "lvis package: evaluate + accumulate + summarize, loaded before")


def measure(kind: str, ground_truth: Path, results: Path, arrays: Path) -> tuple[float, dict[str, float]]:
    """CPU seconds of what `KINDS` says, and the figures if it has any."""
    figures: dict[str, float] = {}
    if kind == "metric":
        annotations = pickle.loads((arrays / "annotations.pickle").read_bytes())
        detections = Detections.load(arrays / "detections.npz")
        seconds, figures = _timed(lambda: summarize(match(annotations, detections), annotations.categories))
    elif kind == "hotcoco":
        import hotcoco

        truth = hotcoco.LVIS(str(ground_truth))
        found = truth.loadRes(str(results))
        evaluator = hotcoco.LVISEval(truth, found, "bbox")
        seconds, _ = _timed(evaluator.run)
        figures = dict(evaluator.get_results())
    elif kind == "read":
        seconds, _ = _timed(lambda: Detections.load(results))
    elif kind == "json":
        with open(results, "rb") as file:
            seconds, _ = _timed(lambda: json.load(file))
    elif kind == "results":
        seconds, figures = _timed(lambda: _from_files(ground_truth, results))
    elif kind == "official":
        evaluator = load_lvis(ground_truth, results)
        seconds, (figures, precision, recall) = _timed(lambda: run_lvis(evaluator))
        annotations = load_annotations(ground_truth)
        curves = accumulate(match(annotations, Detections.load(results)))
        figures["largest difference of ours on the curves"] = max(
            float(np.abs(curves.precision - precision).max()), float(np.abs(curves.recall - recall).max())
        )
    elif kind == "prepare":
        annotations, detections = load_annotations(ground_truth), Detections.load(results)
        (arrays / "annotations.pickle").write_bytes(pickle.dumps(annotations))
        detections.save(arrays / "detections.npz")
        seconds, figures = 0.0, {"images": len(annotations), "detections": len(detections)}
    else:
        seconds = 0.0
    return seconds, figures


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def _from_files(ground_truth: Path, results: Path) -> dict[str, float]:
    annotations = load_annotations(ground_truth)
    return summarize(match(annotations, Detections.load(results)), annotations.categories)


def child(kind: str, ground_truth: Path, results: Path, arrays: Path) -> dict:
    """One measurement in a process of its own."""
    command = [
        sys.executable,
        __file__,
        str(ground_truth),
        str(results),
        "--child",
        kind,
        "--out",
        str(arrays),
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"{kind}: {finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def compare(ground_truth: Path, results: Path, kinds: Sequence[str], repeats: int, official: bool) -> None:
    """Runs every kind in turn, `repeats` times, and prints the table and the differences."""
    texts = KINDS if find_spec("hotcoco") else {k: text for k, text in KINDS.items() if k != "hotcoco"}
    texts = dict([BASE]) | {kind: text for kind, text in texts.items() if kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder)
        # In a process of its own too: a child's peak memory on Linux is never below its parent's.
        size = child("prepare", ground_truth, results, arrays)["figures"]
        print(f"{size['images']} images, {size['detections']} detections")
        runs: dict[str, list[dict]] = {kind: [] for kind in texts}
        for _ in range(repeats):
            for kind in texts:
                runs[kind].append(child(kind, ground_truth, results, arrays))
                print(f"  {kind}: {runs[kind][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
        if official:
            texts |= dict([OFFICIAL])
            runs["official"] = [child("official", ground_truth, results, arrays)]
    print("| what | CPU seconds (min .. max) | peak GB |\n|---|---|---|")
    for kind, text in texts.items():
        seconds = [run["seconds"] for run in runs[kind]]
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} .. {max(seconds):.2f})"
        print(f"| {text} | {spread} | {max(run['peak'] for run in runs[kind]):.2f} |")
    for first, second in (("read", "json"), ("metric", "hotcoco"), ("metric", "official")):
        if runs.get(first) and runs.get(second):
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs[first], runs[second])]
            spread = f"{statistics.median(ratios):.4g} ({min(ratios):.4g} .. {max(ratios):.4g})"
            print(f"{first} / {second}: {spread}")
    ours = runs["metric"][0]["figures"] if "metric" in runs else {}
    for other in ("hotcoco", "official"):
        if ours and runs.get(other):
            theirs = runs[other][0]["figures"]
            print(f"largest difference from {other}: {max(abs(ours[n] - theirs[n]) for n in ours):.3g}")
            for name in theirs.keys() - ours.keys():
                print(f"{name}: {theirs[name]:.3g}")


def simulate(num_images: int, folder: Path, num_classes: int = 1203, seed: int = 0) -> None:
    """Writes gt.json and dt.json: LVIS's class skew, box sizes, federated lists; 300 detections an image."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    train_images = np.exp(rng.uniform(0, np.log(2000), num_classes)).astype(int)
    share = train_images / train_images.sum()
    images, columns = [], []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        classes = rng.choice(num_classes, 12, p=share)
        positive = np.unique(classes[:4])
        negative = np.setdiff1d(classes[4:], positive)
        images.append({
            "id": image_id, "file_name": f"{image_id}.jpg", "width": 640, "height": 480,
            "neg_category_ids": (negative + 1).tolist(),
            "not_exhaustive_category_ids": (positive[rng.random(len(positive)) < 0.1] + 1).tolist(),
        })  # fmt: skip
        labels = np.repeat(positive, np.minimum(rng.geometric(0.3, len(positive)), 100))
        boxes = _boxes(rng, len(labels))
        for label, box in zip(labels.tolist(), boxes.tolist()):
            record = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "bbox": box}
            annotations.append({**record, "area": box[2] * box[3]})
        near = rng.integers(len(labels), size=300)
        found = np.where(
            rng.random((300, 1)) < 0.6, boxes[near] * rng.normal(1, 0.06, (300, 4)), _boxes(rng, 300)
        )
        guess = rng.choice(num_classes, 300, p=share)
        kind = rng.random(300)
        guess = np.where(kind < 0.2, labels[near], np.where(kind < 0.35, rng.choice(classes, 300), guess))
        scores = np.round(rng.beta(1, 5, 300), 3)  # rounded: ties
        columns.append((np.full(300, image_id), guess + 1, np.abs(found).round(2), scores))
    categories = [
        {
            "id": c + 1,
            "name": f"class {c + 1}",
            "image_count": int(n),
            "frequency": "rcf"[int(n > 10) + int(n > 100)],
        }
        for c, n in enumerate(train_images)
    ]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "gt.json").write_text(json.dumps(document))
    names = ("image_id", "category_id", "bbox", "score")
    joined: dict[str, Any] = {name: np.concatenate(rows) for name, rows in zip(names, zip(*columns))}
    detections = Detections(**joined)
    detections.to_json(folder / "dt.json")
    print(f"{folder}/gt.json, dt.json: {len(annotations)} boxes, {len(detections)} detections")


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Boxes x y w h in 640 x 480 whose side is log-normal with a median of 36 px, as in LVIS."""
    sizes = np.exp(rng.normal(np.log(36), 1.0, (count, 1)) + rng.normal(0, 0.3, (count, 2))).clip(2, 470)
    corners = rng.random((count, 2)) * ([640, 480] - sizes)
    return np.hstack([corners.clip(0), sizes]).round(2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ground_truth", type=Path, nargs="?")
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--official", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--simulate", type=int, metavar="IMAGES")
    parser.add_argument("--classes", type=int, default=1203, help="of the simulated files")
    parser.add_argument("--out", type=Path, default=Path("runs/lvis_eval"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.simulate is not None:
        simulate(arguments.simulate, arguments.out, arguments.classes)
    elif arguments.results is None:
        parser.error("two files are needed, or --simulate IMAGES")
    elif arguments.child is not None:
        seconds, figures = measure(arguments.child, arguments.ground_truth, arguments.results, arguments.out)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"seconds": seconds, "peak": peak, "figures": figures}))
    else:
        files = arguments.ground_truth, arguments.results
        compare(*files, arguments.kinds, arguments.repeats, arguments.official)


if __name__ == "__main__":
    main()
