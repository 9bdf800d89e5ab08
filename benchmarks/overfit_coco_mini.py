"""Does the detector learn what it sees? Baseline and CLIS, trained and evaluated on the same 8 photographs.

    python benchmarks/overfit_coco_mini.py --data FOLDER [--out FOLDER] [key=value ...]

FOLDER holds the data of configs/coco_mini/clis.yaml. The photographs are chosen by the annotations alone,
always the same: 2-10 boxes, each at least 24 px wide and high in the file and at the training resolution, no
two of one class that NMS would merge, and as many classes as possible.
Expected: AP50 of at least 0.9 for both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_convert, box_iou

from clis.commands import run_verb
from clis.config import Config, data_path
from clis.config_files import load_config

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "configs" / "coco_mini"
CONFIGS = {"baseline": CONFIG_FOLDER / "overfit_baseline.yaml", "CLIS": CONFIG_FOLDER / "overfit_clis.yaml"}
NUM_PHOTOGRAPHS = 8
MIN_SIDE = 24.0


def choose_subset(document: dict[str, Any], config: Config) -> dict[str, Any]:
    """The LVIS-form document with the chosen images and their annotations alone; all categories stay."""
    annotations = defaultdict(list)
    for annotation in document["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    candidates = [
        image
        for image in sorted(document["images"], key=lambda image: image["id"])
        if is_candidate(image, annotations[image["id"]], config)
    ]
    chosen: list[dict[str, Any]] = []
    seen: set[int] = set()
    while len(chosen) < NUM_PHOTOGRAPHS:
        if not candidates:
            raise ValueError(f"only {len(chosen)} of {NUM_PHOTOGRAPHS} photographs qualify; use more images")
        best = max(candidates, key=lambda image: _merit(annotations[image["id"]], seen))
        candidates.remove(best)
        chosen.append(best)
        seen |= _classes(annotations[best["id"]])
    kept = [annotation for image in chosen for annotation in annotations[image["id"]]]
    return {**document, "images": chosen, "annotations": kept}


def is_candidate(image: dict[str, Any], annotations: Sequence[dict[str, Any]], config: Config) -> bool:
    """Whether a detector of this resolution and NMS can get every box of the image right."""
    if not 2 <= len(annotations) <= 10:
        return False
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations])
    sides = image["width"], image["height"]
    scale = min(config.test.short_side / min(sides), config.test.max_size / max(sides))
    if (boxes[:, 2:] * min(scale, 1) < MIN_SIDE).any():
        return False
    corners = box_convert(boxes, "xywh", "xyxy")
    labels = torch.tensor([annotation["category_id"] for annotation in annotations])
    same_class = (labels[:, None] == labels).triu(diagonal=1)
    return not (same_class & (box_iou(corners, corners) > config.test.nms_iou)).any()


def _merit(annotations: Sequence[dict[str, Any]], seen: set[int]) -> tuple[int, int]:
    """Most new classes first, then fewest boxes; `max` takes the lowest id of equals."""
    return len(_classes(annotations) - seen), -len(annotations)


def _classes(annotations: Sequence[dict[str, Any]]) -> set[int]:
    return {annotation["category_id"] for annotation in annotations}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="default: $CLIS_DATA, or ./data")
    parser.add_argument("--out", type=Path, default=Path("runs/overfit_coco_mini"), help="a new folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    if out.exists():  # a resumed run would have no time to report
        parser.error(f"{out} exists: remove it or pass another --out")
    overrides = list(arguments.overrides)
    if arguments.data is not None:
        overrides.append(f"data.root={arguments.data.resolve()}")

    config = load_config(CONFIGS["CLIS"], overrides)
    document = json.loads(data_path(config, "coco_mini/train.json").read_text())
    subset = choose_subset(document, config)
    out.mkdir(parents=True)
    path = out / "subset.json"
    path.write_text(json.dumps(subset))
    classes = _classes(subset["annotations"])
    print(f"{path}: {len(subset['annotations'])} boxes of {len(classes)} classes in the images")
    print("  " + ", ".join(image["file_name"] for image in subset["images"]))

    results = {}
    for name, file in CONFIGS.items():
        folder = out / name.lower()
        began = time.monotonic()
        subset_paths = [f"data.train={path}", f"data.val={path}", f"output={folder}"]
        run_verb("train", ["--config", str(file), *overrides, *subset_paths])
        results[name] = json.loads((folder / "eval.json").read_text()) | {"seconds": time.monotonic() - began}
    print("| run | AP50 | AP | seconds |\n|---|---|---|---|")
    for name, result in results.items():
        print(f"| {name} | {result['AP50']:.3f} | {result['AP']:.3f} | {result['seconds']:.0f} |")


if __name__ == "__main__":
    main()
