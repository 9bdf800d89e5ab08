"""``python -m clis check CONFIG``: reads every file that a run would touch; reports whether it may start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clis.atomic import atomic_write, check_writable
from clis.commands.arguments import add_config, non_negative, positive
from clis.commands.check_images import ImageCheck, Stream
from clis.commands.check_report import SHOWN, Report
from clis.config import DETECTOR_RULES, Config, data_path
from clis.config_files import load_config
from clis.data.annotations import Annotations, checked_for_training, describe_changes
from clis.data.categories import Category, check_same_categories
from clis.data.image_classes import GROUP_NAMES, coverage, describe_coverage
from clis.data.image_level import ImageLevelIndex, check_containers, is_intact
from clis.data.sampling import class_repeat_factors
from clis.data.shapes import ShapesSpec, category_entries
from clis.data.streams import (
    add_label_noise,
    make_image_level_sampler,
    make_instance_sampler,
    read_annotations,
    read_index,
)
from clis.engine.describe import pretraining_warnings, schedule_warnings
from clis.engine.optim import split_batch
from clis.engine.preflight import (
    check_folder,
    check_images,
    check_regions,
    check_space,
    check_writable_folder,
    describe_reuse,
    pending_runs,
)
from clis.engine.prerequisites import PlannedRun, plan_run
from clis.engine.pretrain import SETTINGS as PRETRAINING
from clis.engine.run_folder import RunFolder, regions_file
from clis.engine.start import check_run, starting_weights
from clis.metric.matching import check_truth, describe_uncounted
from clis.models import CLISDetector, build_classifier, build_model
from clis.text import counted, name_key, shortened


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis check`."""
    add_config(parser)
    parser.add_argument("--sample", type=positive, metavar="N", help="read only N images of each stream")
    parser.add_argument(
        "--workers",
        type=non_negative,
        default=os.cpu_count(),
        help="processes that read images (default: one per CPU)",
    )
    parser.add_argument("--list", type=Path, metavar="FILE", help="write every image that cannot be used")


def run(arguments: argparse.Namespace) -> None:
    """Check a config, print the report and exit with 0 if the run may start, else with 1."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.list is not None:
        check_writable(arguments.list)
    report = check(config, arguments.overrides, workers=arguments.workers, sample=arguments.sample)
    report.say()
    if arguments.list is not None:
        with atomic_write(arguments.list) as temporary:
            text = "".join(f"{line}\n" for line in report.listing)
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of any bytes
    sys.exit(bool(report.errors))


def check(
    config: Config, overrides: Sequence[str] = (), *, workers: int, sample: int | None = None
) -> Report:
    """Check files and settings of a run, and of the runs that it would train first.

    Args:
        overrides: those that `config` was made with; some hold for these runs too.
        workers: processes that read images.
        sample: images of each stream that are read, spread evenly; None reads all.
    """
    report, data = Report(), config.data
    plan = _check_plan(config, overrides, report)
    runs = list({id(each): each for each in (*pending_runs(plan), plan)}.values())
    if data.generate == "shapes" and not data_path(config, data.train).exists():
        _check_to_generate(config, report)
        _check_models(runs, [Category(**entry) for entry in category_entries(ShapesSpec())], report)
        return report
    train, val = _check_annotations(config, report)
    index = None
    if train is not None:
        for each in runs:
            index = _check_image_level(each, train, report) or index
        _check_models(runs, train.categories, report)
    images, streams = ImageCheck(data.max_pixels, workers, sample, report), {}
    if train is not None:
        streams["instance-level"] = images.annotated(train, data_path(config, data.train_images))
    if index is not None:
        streams["image-level"] = images.image_level(index)
    joint = any(each.config.clis.s > 0 for each in runs)
    stages = [list(streams.values())] if joint else [[stream] for stream in streams.values()]
    for stage in stages:  # a baseline and its pre-training count for themselves
        limit = f"data.max_bad_images allows {data.max_bad_images}" + " in all" * (len(stage) > 1)
        images.judge(stage, data.max_bad_images, limit)
    if val is not None:
        _check_validation_images(val, images, config, report)
    _describe_step(streams, config, report)
    return report


def _check_to_generate(config: Config, report: Report) -> None:
    """Check that the embedded benchmark, which does not exist yet, can be written."""
    folder = data_path(config, "shapes")
    report.notes.append(f"{folder}: the embedded benchmark will be written at the start")
    with report.catching():
        check_writable_folder(folder, "data.root")


def _check_models(runs: Sequence[PlannedRun], categories: Sequence[Category], report: Report) -> None:
    """Build the detectors of the runs; check their folders, and the disks' room."""
    needs = []
    for run in runs:
        with report.catching():
            model = _check_model(run.config, categories, report)
            needs.append(check_folder(run, model, categories))
    with report.catching():
        check_space(needs)


def _check_plan(config: Config, overrides: Sequence[str], report: Report) -> PlannedRun:
    """Check settings and folders of the run and of those before it; return it with what could be planned."""
    plan = PlannedRun("the run", config, None, None)
    with report.catching():
        plan = plan_run(config, "the run", overrides)
    for each in plan.walk():
        with report.catching():
            RunFolder(each.config.output).check(each.config)
        if each.config.pretrain.epochs > 0:
            with report.catching():
                RunFolder(each.config.output).pretraining.check(each.config, PRETRAINING)
        with report.catching():
            check_run(each)
    with report.catching():
        report.warnings += describe_reuse(plan)
    try:
        split_batch(config.train, 1)
    except ValueError as error:
        report.warnings.append(str(error))
    report.notes += schedule_warnings(config) + pretraining_warnings(config)
    return plan


def _check_annotations(config: Config, report: Report) -> tuple[Annotations | None, Annotations | None]:
    """Read and describe both splits; one that cannot be read is None."""
    train = val = None
    with report.catching():
        train = read_annotations(data_path(config, config.data.train))
        _describe_counts(train, report)
        checked = _checked_boxes(train, config, report)
        if checked is not None:
            train = checked
            _describe_classes(train, config, report)
    with report.catching():
        val = read_annotations(data_path(config, config.data.val))
        _describe_names(val, config, report)
        check_truth(val)
        if train is not None:
            check_same_categories(train.categories, train.path, val.categories, val.path)
            _describe_overlap(train, val, config, report)
    return train, val


def _check_image_level(plan: PlannedRun, train: Annotations, report: Report) -> ImageLevelIndex | None:
    """Check the index of the image-level stream and its regions; None where the run reads no such images."""
    config, index = plan.config, None
    pretrained = config.pretrain.epochs == 0 or RunFolder(config.output).pretraining.backbone.exists()
    if config.clis.s == 0 and pretrained:
        return None
    with report.catching():
        index = read_index(config, train)
        report.notes.append(describe_coverage(coverage(train.categories, index.image_counts)))
        if index.folder is not None:
            if not is_intact(index):
                report.errors.append(f"{index.folder}: damaged; remove it and prepare it again")
            check_containers(index)
        index = add_label_noise(config, index)
        make_image_level_sampler(config, index)
        if config.clis.s > 0:
            check_regions(plan, index, train, every_row=True)
            _describe_regions(config, report)
    return index


def _describe_counts(train: Annotations, report: Report) -> None:
    """Warn of classes that have other numbers of images than the file says, as in a part of a larger one."""
    other = [
        f"{category.name}: {category.image_count}, here {count}"
        for category, count in zip(train.categories, train.images_per_class().tolist())
        if category.image_count != count
    ]
    if other:
        report.warnings.append(
            f"{train.path}: image_count of {counted(len(other), 'class', 'classes')} is not the number of "
            f"images in this file ({shortened(other, SHOWN)}); APr, APc, APf and some losses follow it and "
            "frequency: remove both fields to have them counted"
        )


def _checked_boxes(train: Annotations, config: Config, report: Report) -> Annotations | None:
    """Return what the run will train on, or None if the boxes stop it."""
    boxes = len(train.labels)
    try:
        train, counts = checked_for_training(
            train, drop_invalid=config.data.drop_invalid, empty_images=config.data.empty_images
        )
    except ValueError as error:
        report.errors.append(str(error))
        return None
    if left_out := counts.pop("empty images", 0):
        report.notes.append(f"{train.path}: {left_out} images without a box are left out (data.empty_images)")
    if any(counts.values()):
        report.warnings.append(f"{train.path}: {describe_changes(counts)}, of {boxes} boxes")
    empty = int((np.diff(train.offsets) == 0).sum())
    if empty:
        report.notes.append(f"{train.path}: {empty} images without a box, which train as background")
    return train


def _describe_classes(train: Annotations, config: Config, report: Report) -> None:
    of_class = class_repeat_factors(
        train.offsets, train.labels, train.num_classes, config.data.repeat_threshold
    )
    _describe_oddities(train, report)
    instances = np.bincount(train.labels, minlength=train.num_classes)
    report.notes.append(f"{train.path}: {len(train)} images, {len(train.labels)} boxes")
    for group, word in GROUP_NAMES.items():
        own = np.array([category.frequency == group for category in train.categories])
        if own.any():
            report.notes.append(
                f"  {own.sum()} {word} classes, {instances[own].sum()} boxes, repeat factors "
                f"{of_class[own].min():.2f} to {of_class[own].max():.2f}"
            )
    draws, data = len(make_instance_sampler(config, train)), config.data
    report.notes.append(f"  a pass is {draws} images ({data.repeat}, rounding {data.repeat_rounding})")
    named: dict[str, list[str]] = {}
    for category in train.categories:
        named.setdefault(name_key(category.name), []).append(f"{category.id} {category.name!r}")
    for alike in named.values():
        if len(alike) > 1:
            report.warnings.append(
                f"{train.path}: categories {' and '.join(alike)} have one name, and are learned as different "
                "classes"
            )
    absent = [category.name for category, count in zip(train.categories, instances) if count == 0]
    if absent:
        report.warnings.append(
            f"{train.path}: {len(absent)} classes without a box: {shortened(absent, SHOWN)}"
        )


def _describe_oddities(annotations: Annotations, report: Report) -> None:
    """Warn of annotations that are possible and hardly meant."""
    sizes = annotations.bboxes[:, 2:]
    if len(sizes) and (sizes < 2).all():
        width, height = sizes[sizes.prod(axis=1).argmax()]
        report.warnings.append(
            f"{annotations.path}: no box has a side of 2 px, the largest is {width:.3g} x {height:.3g}: are "
            "they fractions of the image (0..1)? Boxes are x, y, width, height in pixels"
        )
    files, counts = np.unique(annotations.file_names, return_counts=True)
    if (counts > 1).any():
        report.warnings.append(
            f"{annotations.path}: {(counts > 1).sum()} image files are used more than once: "
            f"{shortened(files[counts > 1].tolist(), SHOWN)}; join their records"
        )


def _describe_names(val: Annotations, config: Config, report: Report) -> None:
    moved = sum(str(name).startswith("train2017/") for name in val.file_names)
    if moved:
        folder = data_path(config, config.data.val_images)
        report.notes.append(f"{val.path}: {moved} of {len(val)} images are in {folder}/train2017 (LVIS v1)")
    report.warnings += describe_uncounted(val)
    if val.renamed:
        report.notes.append(f"{val.path}: {val.renamed} names are read without COCO_val2014_ (LVIS v0.5)")


def _describe_overlap(train: Annotations, val: Annotations, config: Config, report: Report) -> None:
    """Warn of images that are in both splits; the same annotation file for both is meant."""
    if config.data.train == config.data.val:
        report.notes.append(f"{val.path}: training and validation are the same split")
        return
    first, second = (
        {str(data_path(config, folder) / name) for name in split.file_names}
        for folder, split in ((config.data.train_images, train), (config.data.val_images, val))
    )
    if both := sorted(first & second):
        report.warnings.append(
            f"{val.path}: {len(both)} of {len(second)} validation images are training images too, so the "
            f"figures will be too high: {shortened(both, SHOWN)}"
        )


def _describe_regions(config: Config, report: Report) -> None:
    rule = config.regions.rule
    if not regions_file(config).exists():
        made_by = config.regions.detector if rule in DETECTOR_RULES else config.regions.file_rule
        report.notes.append(f"{regions_file(config)}: will be made, by {made_by}")


def _check_model(config: Config, categories: Sequence[Category], report: Report) -> CLISDetector:
    """Build the model, which reads the backbone's weights and tries the classification loss."""
    folder = RunFolder(config.output)
    has_weights = config.pretrain.epochs > 0 and folder.pretraining.backbone.exists()
    if has_weights or config.start.from_ is not None:
        return build_model(config, categories, pretrained=starting_weights(config, folder))
    backbone = config.model.backbone
    path = None if backbone.weights is None else data_path(config, backbone.weights)
    to_download = path is not None and backbone.download and not path.exists()
    if to_download:
        warning = (
            f"{path}: does not exist and will be downloaded at the start; fetch it now if the training "
            "machine has no network"
        )
        report.warnings += [warning] * (warning not in report.warnings)
    if config.pretrain.epochs > 0:
        report.notes.append(f"{folder.pretraining.backbone}: will be made, by pre-training")
        build_classifier(config, categories, pretrained=not to_download)
    pretrained = config.pretrain.epochs == 0 and not to_download
    return build_model(config, categories, pretrained=pretrained)


def _check_validation_images(val: Annotations, images: ImageCheck, config: Config, report: Report) -> None:
    """Read the validation images, none of which is ever replaced; look for all where only some are read."""
    folder = data_path(config, config.data.val_images)
    images.judge([images.annotated(val, folder)], 0, "validation needs all")
    if images.sample is not None:
        with report.catching():
            check_images(val, folder, config.data.max_pixels)


def _describe_step(streams: dict[str, Stream], config: Config, report: Report) -> None:
    """Note what the loaders have to do for one step, by what reading took just now."""
    images = {"instance-level": config.train.images_per_step}
    images["image-level"] = config.train.images_per_step * config.clis.s
    streams = {name: stream for name, stream in streams.items() if images[name] > 0}
    seconds = sum(images[name] * stream.seconds for name, stream in streams.items())
    megabytes = sum(images[name] * stream.num_bytes for name, stream in streams.items()) / 1e6
    counts = " + ".join(f"{images[name]} {name}" for name in streams)
    if streams:
        report.notes.append(
            f"a step reads {counts} images: {megabytes:.1f} MB, {seconds:.2f} s of one core for reading and "
            "decoding at full size, before augmentation; all loader processes together share it"
        )
