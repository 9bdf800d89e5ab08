"""``python -m clis evaluate``, or ``evaluate.py``: the metric of a checkpoint, which holds its config."""

from __future__ import annotations

import argparse
from pathlib import Path

from clis.atomic import check_writable
from clis.config import Config
from clis.data.annotations import Annotations
from clis.distributed import choose_device, is_main, on_main, process_group
from clis.engine.checkpoint import load_checkpoint, load_model
from clis.engine.evaluate import detect_split, evaluate_detector, inference_config, load_validation
from clis.engine.run_folder import RunFolder, find_checkpoint
from clis.metric.lvis_eval import format_table
from clis.metric.matching import describe_uncounted
from clis.models import CLISDetector
from clis.progress import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis evaluate`."""
    parser.add_argument("checkpoint", type=Path, help="a run folder, or one of its checkpoints")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="change the checkpoint's config, e.g. data.root=/datasets test.score_threshold=0.05; "
        "output=FOLDER for the results (default: a folder beside the checkpoint, named after it)",
    )  # fmt: skip
    parser.epilog = "Result files are judged by --annotations FILE --results FILE (python -m clis score)."


def run(arguments: argparse.Namespace) -> None:
    """Evaluate a checkpoint on the validation split of its config, print the metrics and name the files.

    Of a split without annotations only the detections are written.
    """
    arguments.checkpoint = find_checkpoint(arguments.checkpoint)
    state = load_checkpoint(arguments.checkpoint)
    bare = arguments.checkpoint.with_suffix("")
    output = bare if bare != arguments.checkpoint else bare.with_name(f"{bare.name}_evaluation")
    config = inference_config(state, arguments.checkpoint, arguments.overrides, output=str(output))
    folder = RunFolder(config.output)
    if folder.config.exists():
        raise ValueError(
            f"{folder} is a training run's folder, whose results would be lost; pass another output=FOLDER"
        )
    device = choose_device(config.train.device)
    with process_group(device):
        on_main(lambda: check_writable(folder.result))  # before hours of work
        detector = load_model(state, config, str(arguments.checkpoint)).to(device).eval()
        annotations = load_validation(config, detector.categories, "the detector", unlabeled=True)
        if not len(annotations.labels):
            _write_detections(detector, config, annotations, folder)
            return
        metrics = evaluate_detector(detector, config, folder, state.get("record"))
        say(format_table({str(arguments.checkpoint): metrics}))
        for line in describe_uncounted(annotations):
            say(f"WARNING: {line}")
        say(f"{folder.result}, {folder.detections.name}")


def _write_detections(
    detector: CLISDetector, config: Config, annotations: Annotations, folder: RunFolder
) -> None:
    """Write what a detector finds in a split that cannot be judged, also as an LVIS result file.

    Metrics of an earlier split are removed: they would be beside detections that are not theirs.
    """
    detections = detect_split(detector, config, annotations)
    if is_main():
        json_file = folder.detections.with_suffix(".json")
        folder.result.unlink(missing_ok=True)
        detections.save(folder.detections)
        detections.to_json(json_file)
        say(f"{annotations.path}: has no annotations, so there are detections and no metric")
        say(
            f"{folder.detections}, {json_file.name}: {len(detections)} detections in {len(annotations)} "
            "images"
        )
