"""The verbs of ``python -m clis``, one file each with `add_arguments(parser)` and `run(arguments)`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import clis
from clis.commands.arguments import VerbParser

VERBS = {
    "train": "train a detector, and before it what its config needs (benchmark, baseline, regions)",
    "evaluate": "evaluate a checkpoint on the validation split of its config",
    "score": "judge result files of any detector by the LVIS metric",
    "predict": "detect objects in your photos: pictures with boxes, JSON and a page",
    "show": "draw what a training step sees: both streams, regions, pairs, the long tail",
    "study": "run the rows of a table: configs/studies/*.yaml",
    "check": "read every file that a run would touch; exit with 0 if it may start",
    "prepare": "index image-level data so that runs start fast",
    "regions": "make the region file of a config, or show at which size to search (alone or under torchrun)",
    "pretrain": "train a config's ResNet as an image classifier (alone or under torchrun)",
    "convert": "make a checkpoint of a Faster R-CNN of torchvision, mmdetection or detectron2",
    "export": "make a program of a trained detector that runs without our code: torch.export or ONNX",
    "status": "print how far runs are, and whether their processes live",
    "plot": "draw figures of runs side by side, or of studies, as PNG, PDF or SVG files",
    "report": "write one HTML file of runs: curves, classes, errors, pictures of mistakes, regions",
    "compare": "print the results of run folders as one table, the paper's beside them",
    "config": "print a config as it would run, with all defaults",
    "shapes": "write the embedded benchmark into a folder",
    "tensorboard": "write metrics.jsonl of run folders as event files",
}
"""Help line by verb; the verb is the name of its file here."""


def run_verb(verb: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the arguments of a verb, by default those of the program, and run it.

    Args:
        prog: name of the program in its help; default ``python -m clis VERB``.
    """
    command = importlib.import_module(f"clis.commands.{verb}")
    parser = VerbParser(prog=prog or f"python -m clis {verb}", description=_sentence(verb))
    parser.add_argument("--version", action="version", version=f"clis {clis.__version__}")
    command.add_arguments(parser)
    command.run(parser.parse(sys.argv[1:] if argv is None else argv))


def _sentence(verb: str) -> str:
    return f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}."
