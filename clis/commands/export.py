"""``python -m clis export``: a trained detector as one program, to run without our code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clis.atomic import atomic_write, check_writable
from clis.commands.arguments import positive
from clis.commands.export_program import Program, letterbox, nms_of_best
from clis.config_files import flatten, merge_overrides
from clis.distributed import choose_device
from clis.engine.evaluate import load_for_inference
from clis.models import CLISDetector
from clis.progress import say

CATEGORIES = "categories.json"
"""Name of the labels' categories: a file in a .pt2, an entry in the metadata of a .onnx."""

CANDIDATES = 5000
"""Boxes of an image that NMS chooses from, the default."""

TRIED = (480, 640)
"""Height and width of the noise that a program for any size is tried on."""

TORCH = (2, 11)
"""The oldest version that is known to export these programs; that of 2.6 cannot."""

AGREEMENT = 0.98
"""Least share of the detector's detections that onnxruntime has to find."""

SCRIPT = '''"""Detect objects: python {script} IMAGE... (needs torch and torchvision alone)."""

import json
import sys
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_image

files = {{"categories.json": ""}}
program = torch.export.load(Path(__file__).with_name({program!r}), extra_files=files).module()
names = [category["name"] for category in json.loads(files["categories.json"])]
for path in sys.argv[1:] or sys.exit(__doc__):
    try:
        image = decode_image(path, ImageReadMode.RGB, apply_exif_orientation=True)  # uint8 RGB [3,H,W]
        boxes, scores, labels = (found.tolist() for found in program(image.to("{device}")))
    except (RuntimeError, AssertionError) as error:  # no image, or only a pixel wide once it is resized
        print(path, "cannot be used:", *str(error).splitlines()[:1])
        continue
    kept = [found for found in zip(boxes, scores, labels) if found[1] >= 0.3]
    for box, score, label in kept:
        print(path, names[label], f"{{score:.2f}}", [round(side) for side in box])
    if not kept:
        print(path, "nothing above 0.3; the best score is", f"{{max(scores, default=0):.2f}}")
'''
"""What is written beside a program of one image at a time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis export`."""
    parser.add_argument("checkpoint", type=Path, help="a run folder, or one of its checkpoints")
    parser.add_argument("out", type=Path, help="the program to write: .pt2 (torch.export) or .onnx")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change the section test, e.g. test.detections=100, or data.root",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="only for images of this size, which need no square canvas then (default: any size)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="take N images of one size at a time, [N,3,H,W]"
    )
    parser.add_argument(
        "--candidates", type=int, default=CANDIDATES, metavar="N",
        help=f"set how many boxes of an image NMS chooses from (default {CANDIDATES})",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where the program will run (default cpu)")


def run(arguments: argparse.Namespace) -> None:
    """Export the detector of a checkpoint as a program for a device."""
    export(
        arguments.checkpoint,
        arguments.out,
        None if arguments.size is None else tuple(arguments.size),
        choose_device(arguments.device, "--device "),
        arguments.overrides,
        candidates=arguments.candidates,
        batch=arguments.batch,
    )


def export(
    checkpoint: Path,
    out: Path,
    size: tuple[int, int] | None,
    device: torch.device,
    overrides: Sequence[str] = (),
    candidates: int = CANDIDATES,
    batch: int | None = None,
) -> None:
    """Write the detector in `checkpoint` as the program `out`.

    The program finds what `CLISDetector.detect` finds, as long as `candidates` boxes are enough for NMS to
    choose from: a loop whose end depends on the image cannot be exported. It is tried on images of noise
    before it is written. With it are the categories, as `CATEGORIES`, and beside a .pt2 for single images is
    a script that runs it.

    Args:
        out: a .pt2 or .onnx file.
        size: height and width of the images, before they are resized as the `test` section says; None is any.
        device: where the program will run.
        overrides: `key.path=value` of the `test` section, or where the data are now.
        candidates: how many boxes of an image NMS chooses from, the best ones.
        batch: images at a time; None is one image without the dimension.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or an argument is wrong, or onnx is not installed.
    """
    _check_arguments(out, size, device, overrides, candidates, batch)
    check_writable(out)
    onnx = out.suffix == ".onnx"
    nms = _onnx_nms() if onnx else nms_of_best
    detector, _ = load_for_inference(checkpoint, device, overrides)
    detector.to(memory_format=torch.contiguous_format)  # in which torch.export.save stores all weights
    on_canvas = detector.backbone.square
    detector.backbone.square |= size is None  # the canvas of the program
    images = _noise(size or TRIED, batch, device)
    expected = _found(detector, images)
    if size is None:
        letterbox(detector, in_float=onnx or device.type != "cpu")
    if onnx:
        expected = _found(detector, images)  # its pixels, which may differ by one
    dimension = 1 if batch is None else 2
    dynamic = None if size else (dict.fromkeys((dimension, dimension + 1), torch.export.Dim.DYNAMIC),)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`create_unbacked_symint`", FutureWarning)  # torchvision's
        program = torch.export.export(
            Program(detector, nms, candidates, batch), (images,), dynamic_shapes=dynamic, strict=False
        )
    _check(_flat(program.module()(images)), expected, out, candidates)
    categories = json.dumps([dataclasses.asdict(category) for category in detector.categories])
    with atomic_write(out) as temporary:
        if onnx:
            from clis.commands.export_onnx import run_onnx, save_onnx

            save_onnx(program, temporary, {CATEGORIES: categories})
            share = agreement(run_onnx(temporary)(images), expected)
            if share < AGREEMENT:
                raise ValueError(
                    f"{out}: onnxruntime finds only {share:.0%} of the detector's detections on noise; the "
                    "versions of onnxscript and onnxruntime may not fit"
                )
            say(f"onnxruntime finds {share:.1%} of the detector's detections on noise")
        else:
            torch.export.save(program, temporary, extra_files={CATEGORIES: categories})
    shape = [*([] if batch is None else [batch]), 3, *(size or ("H", "W"))]
    if size is None and not on_canvas:
        say("every image is padded to one square, so detections differ from detect's; --size avoids this")
    say(f"{out}: for uint8 RGB images [{', '.join(map(str, shape))}] on {device.type}")
    if not onnx and batch is None:
        script = out.with_name(f"{out.stem}_run.py")
        with atomic_write(script) as temporary:
            temporary.write_text(SCRIPT.format(script=script.name, program=out.name, device=device))
        say(f"{script}: runs it, with torch and torchvision alone")


def _check_arguments(
    out: Path,
    size: tuple[int, int] | None,
    device: torch.device,
    overrides: Sequence[str],
    candidates: int,
    batch: int | None,
) -> None:
    """Refuse arguments of `export` that are wrong or do not go together, before anything is loaded."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH:
        raise ValueError(
            f"clis export needs torch {TORCH[0]}.{TORCH[1]} or newer, this is {torch.__version__}"
        )
    if out.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{out}: the name of an exported program ends in .pt2 or .onnx")
    if size is not None and min(size) < 1:
        raise ValueError(f"--size {size[0]} {size[1]}: height and width are above 0")
    if candidates < 1:
        raise ValueError(f"--candidates {candidates}: must be at least 1")
    changed = flatten(merge_overrides({}, overrides))
    if wrong := [key for key in changed if not key.startswith("test.") and key != "data.root"]:
        raise ValueError(
            f"{wrong[0]}: only the section test can change, e.g. test.detections=100, and data.root"
        )
    if out.suffix == ".onnx" and (device.type != "cpu" or batch is not None):
        raise ValueError(f"{out}: ONNX is for the CPU and single images; leave out --device and --batch")


def _onnx_nms() -> Callable[..., Tensor]:
    from clis.commands.export_onnx import nms_in_onnx

    return nms_in_onnx


def _noise(size: tuple[int, int], batch: int | None, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (3, *size) if batch is None else (batch, 3, *size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)


def _found(detector: CLISDetector, images: Tensor) -> list[Tensor]:
    """Return boxes, scores and labels of each image in turn, as a program does."""
    found = detector.detect([images] if images.dim() == 3 else list(images))
    return [part for each in found for part in (each.boxes, each.scores, each.labels)]


def _flat(outputs: Sequence[Tensor | Sequence[Tensor]]) -> list[Tensor]:
    return [part for each in outputs for part in ([each] if isinstance(each, Tensor) else each)]


def _check(outputs: Sequence[Tensor], expected: Sequence[Tensor], out: Path, candidates: int) -> None:
    """Raise `ValueError` unless a program finds what the detector finds."""
    for start in range(0, len(expected), 3):
        (boxes, scores, labels), wanted = outputs[start : start + 3], expected[start : start + 3]
        same = len(boxes) == len(wanted[0]) and torch.equal(labels, wanted[2])
        same = same and torch.allclose(boxes, wanted[0], atol=0.01)
        if not same or not torch.allclose(scores, wanted[1]):
            raise ValueError(
                f"{out}: on noise the program finds {len(boxes)} boxes, the detector {len(wanted[0])} or "
                f"others; raise --candidates {candidates}"
            )


def agreement(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the share of the expected detections of an image that are found, in any order.

    A detection is found if one of its class is within a pixel and 0.01 of the score: roundings change the
    order of nearly equal scores, and with it, rarely, what NMS keeps.
    """
    (boxes, scores, labels), (wanted, wanted_scores, wanted_labels) = outputs, expected
    if len(wanted) == 0:
        return float(len(boxes) == 0)
    near = ((wanted[:, None] - boxes[None]).abs() <= 1).all(dim=2)
    near &= (wanted_scores[:, None] - scores[None]).abs() <= 0.01
    near &= wanted_labels[:, None] == labels[None]
    return float(near.any(dim=1).float().mean())
