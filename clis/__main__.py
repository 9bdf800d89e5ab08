"""The smaller commands: ``python -m clis --help``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def run_command(main: Callable[[], None]) -> None:
    """Runs a command; what a user can mend is told in one line, without a traceback.

    Exit codes: 0 done, 1 an error of this kind, 75 a training or study that was asked to stop and can go on,
    130 interrupted. With CLIS_DEBUG=1 the traceback is shown.
    """
    from clis.engine.preemption import EXIT_CODE, Preempted

    try:
        main()
    except Preempted as stop:
        print(stop, file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        from clis.data.loader import is_lost_loader

        lost_loader = is_lost_loader(error)
        if os.environ.get("CLIS_DEBUG") == "1" or (isinstance(error, RuntimeError) and not lost_loader):
            raise
        text = str(error).rstrip()
        if lost_loader:
            text = f"a loader process ended ({text}); out of memory? Fewer data.workers need less. The same "
            text += "command goes on from the last checkpoint"
        if "Original Traceback" in text:  # from a loader process, whose traceback is in the message
            text = text.splitlines()[-1].partition(": ")[2]
        print(f"error: {text}\n(CLIS_DEBUG=1 shows the traceback)", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m clis", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("config", help="print a config as it would run, with all defaults")
    _add_config(command)
    command.set_defaults(run=_config)

    command = commands.add_parser("shapes", help="write the embedded benchmark into a folder")
    command.add_argument("folder", type=Path)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=_shapes)

    command = commands.add_parser("prepare", help="make a run's start a matter of a second")
    _add_prepare(command.add_subparsers(required=True, metavar="WHAT"))

    command = commands.add_parser(
        "regions", help="make the region file of a config (alone or under torchrun)"
    )
    _add_config(command)
    command.add_argument(
        "--scan", nargs="?", const="", metavar="SIZE,SIZE,...",
        help="make no file, but show what the detector finds at these shorter sides (default: from a quarter "
        "to five quarters of test.short_side)",
    )  # fmt: skip
    command.add_argument("--images", type=_positive, metavar="N", help="scan N images (default: 500)")
    command.add_argument(
        "--boxes", type=Path, metavar="FILE", help="report a scan's mean IoU with true boxes"
    )
    command.set_defaults(run=_regions)

    command = commands.add_parser(
        "pretrain", help="train a config's ResNet as an image classifier (alone or under torchrun)"
    )
    _add_config(command)
    command.set_defaults(run=_pretrain)

    command = commands.add_parser("compare", help="print the results of run folders as one table")
    command.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    command.set_defaults(run=_compare)

    command = commands.add_parser(
        "check", help="read every file that a run would touch; exit code 0 if it may start"
    )
    _add_config(command)
    command.add_argument("--sample", type=int, metavar="N", help="read only N images of each stream")
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read images")
    command.add_argument("--list", type=Path, metavar="FILE", help="write every image that cannot be used")
    command.set_defaults(run=_check)

    command = commands.add_parser(
        "convert", help="make a checkpoint of a Faster R-CNN of torchvision, mmdetection or detectron2"
    )
    command.add_argument("source", type=Path, help="its weights: .pth, or detectron2's .pkl")
    command.add_argument("out", type=Path, help="the checkpoint to write, a .pt file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="change the checkpoint's config")
    command.add_argument(
        "--annotations", type=Path, required=True, metavar="FILE", help="LVIS or COCO-form file: the classes"
    )
    command.add_argument(
        "--style", choices=("pytorch", "caffe"),
        help="of the ResNet: RGB with ImageNet's std, or BGR with std 1 and strides in the 1x1 convolutions; "
        "default: pytorch, of detectron2 caffe",
    )  # fmt: skip
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "export", help="make a program of torch.export of a trained detector, for images of one size"
    )
    command.add_argument("checkpoint", type=Path)
    command.add_argument("out", type=Path, help="the program to write, a .pt2 file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of the section test")
    command.add_argument(
        "--size", type=int, nargs=2, required=True, metavar=("HEIGHT", "WIDTH"), help="of the images"
    )
    command.add_argument("--device", default="cpu", help="where the program will run")
    command.set_defaults(run=_export)

    command = commands.add_parser("plot", help="draw figures of finished runs, side by side, as PNG files")
    command.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    command.add_argument("--out", type=Path, default=Path("runs/plots"), metavar="FOLDER")
    command.add_argument("--images", type=int, default=6, help="validation images with boxes")
    command.add_argument("--score", type=float, default=0.3, help="least score of a box that is drawn")
    command.set_defaults(run=_plot)

    command = commands.add_parser("study", help="run the rows of a table: configs/studies/*.yaml")
    command.add_argument("file", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="for every row")
    command.add_argument("--rows", nargs="+", default=(), metavar="NAME", help="only these")
    command.add_argument("--seeds", nargs="+", type=int, default=(), help="only these")
    command.add_argument("--jobs", type=int, default=2, help="runs at once, which share the CPUs")
    command.add_argument("--out", type=Path, default=Path("runs/studies"), metavar="FOLDER")
    command.set_defaults(run=_study)

    command = commands.add_parser("tensorboard", help="write metrics.jsonl of run folders as event files")
    command.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    command.add_argument("--follow", action="store_true", help="go on while the runs go on")
    command.set_defaults(run=_tensorboard)

    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="a YAML file, e.g. configs/lvis_v1/clis_r50.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value")


def _add_prepare(kinds: argparse._SubParsersAction) -> None:
    command = kinds.add_parser(
        "image-level", help="index class folders or tars for data.image_level, and say what they cover"
    )
    command.add_argument(
        "roots", nargs="+", type=Path, metavar="ROOT", help="of folders or tars, or a tar of tars"
    )
    command.add_argument(
        "--annotations", type=Path, required=True, help="LVIS or COCO-form file: the categories"
    )
    command.add_argument("--out", type=Path, required=True, metavar="INDEX", help="folder to write")
    command.add_argument("--mapping", type=Path, help="lines of: name, tab, category")
    command.add_argument("--labels", type=Path, help="of mixed tars, lines of: member name, tab, class")
    command.add_argument("--strict", action="store_true", help="stop at what matches nothing")
    command.add_argument("--workers", type=_positive, help="processes that scan tars; default: one a CPU")
    command.set_defaults(run=_prepare_image_level)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _config(arguments: argparse.Namespace) -> None:
    from clis.config import config_to_yaml, load_config

    print(config_to_yaml(load_config(arguments.config, arguments.overrides)), end="")


def _shapes(arguments: argparse.Namespace) -> None:
    from clis.data.shapes import ShapesSpec
    from clis.engine.train import generate_shapes

    generate_shapes(arguments.folder, ShapesSpec(seed=arguments.seed))


def _regions(arguments: argparse.Namespace) -> None:
    from clis.config import load_config
    from clis.distributed import choose_device, process_group
    from clis.engine.region_scan import scan_sizes
    from clis.engine.regions import detector_config, find_regions

    config = load_config(arguments.config, arguments.overrides)
    detector = detector_config(config, arguments.overrides)
    device = choose_device(config.train.device)
    if arguments.scan is None:
        for name in ("images", "boxes"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} is for a scan: add --scan")
        with process_group(device):
            find_regions(config, device, detector)
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--scan runs on one process: start it without torchrun")
    sizes = [size.strip() for size in arguments.scan.split(",") if size.strip()]
    if wrong := [size for size in sizes if not size.isdecimal() or int(size) == 0]:
        raise ValueError(
            f"--scan {arguments.scan}: {wrong[0]!r} is not a size; write e.g. --scan 200,400,600"
        )
    images = arguments.images or 500
    scan_sizes(config, device, detector, sizes=list(map(int, sizes)), images=images, boxes=arguments.boxes)


def _pretrain(arguments: argparse.Namespace) -> None:
    from clis.config import data_path, load_config
    from clis.distributed import choose_device, process_group
    from clis.engine.log import say
    from clis.engine.pretrain import pretrain
    from clis.engine.train import generate_shapes

    config = load_config(arguments.config, arguments.overrides)
    if config.pretrain.epochs == 0:
        raise ValueError("pretrain.epochs=0 is without pre-training; pass e.g. pretrain.epochs=100")
    device = choose_device(config.train.device)
    with process_group(device):
        if config.data.generate == "shapes":
            generate_shapes(data_path(config, "shapes"))
        path = pretrain(config, device)
        say(f"for a detector of this network: pretrain.epochs=0 model.backbone.weights={path.absolute()}")


def _prepare_image_level(arguments: argparse.Namespace) -> None:
    from clis.engine.prepare import prepare_image_level

    options = {key: value for key, value in vars(arguments).items() if key != "run"}
    prepare_image_level(options.pop("roots"), options.pop("annotations"), options.pop("out"), **options)


def _compare(arguments: argparse.Namespace) -> None:
    from clis.engine.lvis_eval import format_table

    print(format_table({str(f): json.loads((f / "eval.json").read_text()) for f in arguments.folders}))


def _check(arguments: argparse.Namespace) -> None:
    from clis.config import load_config
    from clis.engine.check import check

    config = load_config(arguments.config, arguments.overrides)
    report = check(config, arguments.overrides, workers=arguments.workers, sample=arguments.sample)
    report.say()
    if arguments.list is not None:
        arguments.list.write_text("".join(f"{line}\n" for line in report.listing))
    sys.exit(bool(report.errors))


def _convert(arguments: argparse.Namespace) -> None:
    from clis.engine.convert import convert

    convert(arguments.source, arguments.out, arguments.annotations, arguments.style, arguments.overrides)


def _export(arguments: argparse.Namespace) -> None:
    from clis.distributed import choose_device
    from clis.engine.export import export

    device = choose_device(arguments.device)
    export(arguments.checkpoint, arguments.out, tuple(arguments.size), device, arguments.overrides)


def _study(arguments: argparse.Namespace) -> None:
    from clis.engine.study import run_study

    folder = run_study(
        arguments.file, arguments.out, rows=arguments.rows, seeds=arguments.seeds, jobs=arguments.jobs,
        overrides=arguments.overrides,
    )  # fmt: skip
    print((folder / "table.md").read_text() + f"{folder}/study.json, table.md")


def _plot(arguments: argparse.Namespace) -> None:
    from clis.engine.plot import plot

    plot(arguments.folders, arguments.out, images=arguments.images, score=arguments.score)


def _tensorboard(arguments: argparse.Namespace) -> None:
    from clis.engine.tensorboard import write_events

    write_events(arguments.folders, arguments.follow)


if __name__ == "__main__":
    run_command(main)
