"""What can be known of the files of all runs of a plan before the first of them is trained.

Nothing is decoded and no class folder is scanned: at the size of LVIS and ImageNet-22k it takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import nn

from clis.atomic import nearest_existing
from clis.config import DETECTOR_RULES, Config, data_path
from clis.data.annotated_images import check_size, image_path
from clis.data.annotations import Annotations
from clis.data.categories import Category, check_same_categories
from clis.data.image_level import ImageLevelIndex
from clis.data.images import MAX_PIXELS, ImageError, open_image, read_bytes
from clis.data.region_file import detector_steps, load_regions
from clis.data.streams import (
    check_image_level,
    make_image_level_sampler,
    make_index,
    read_training_annotations,
)
from clis.distributed import on_main, world_size
from clis.engine.checkpoint import check_same_files, load_checkpoint, saved_categories
from clis.engine.evaluate import load_validation
from clis.engine.optim import split_batch
from clis.engine.prerequisites import PlannedRun
from clis.engine.provenance import changed_files, training_files
from clis.engine.region_search import detector_checkpoint, given_boxes, read_boxes
from clis.engine.run_folder import RunFolder, regions_file
from clis.engine.start import check_given_start, starting_weights
from clis.metric.matching import check_truth, describe_uncounted
from clis.models import CLISDetector, build_classifier, build_model
from clis.progress import Progress, say

THREADS = 16
"""That ask for files at once: a network file system answers each only after a while."""
HEADER_SECONDS = 3.0
"""For the headers of a split's images: all of most sets, an even sample of one on a slow disk."""
HEADER_BYTES = 1 << 16
QUIET_SECONDS = 2.0
"""After which looking for images shows its progress."""
TRAIN_SAMPLE = 100
"""Training images that are looked for: some may be missing (`data.max_bad_images`), but not all."""
SHOWN = 3


def check_files(plan: PlannedRun) -> None:
    """Check the files of a run and of those that it needs and that are not done; all processes call this.

    Warns of ground truths that will not count.

    Raises:
        FileNotFoundError, ValueError: a run could not be trained or evaluated to its end; the message names
            the first reason.
    """
    seen: set[tuple[Path, Path]] = set()
    space: list[tuple[Path, int]] = []
    # rank 0 decides, since files may show late elsewhere
    outputs = on_main(lambda: {run.config.output for run in pending_runs(plan)})
    pending = {run.config.output: run for run in plan.walk() if run.config.output in outputs}
    for number, run in enumerate(pending.values()):
        config = run.config
        split_batch(config.train, world_size())
        if config.pretrain.epochs > 0:
            split_batch(config.pretrain, world_size(), "pretrain")
        training, _ = read_training_annotations(config)
        validation = load_validation(config, training.categories, training.path)
        images = data_path(config, config.data.val_images)
        if (data_path(config, config.data.val), images) not in seen:
            seen.add((data_path(config, config.data.val), images))
            check_truth(validation)
            for line in describe_uncounted(validation):
                say(f"WARNING: {line}")
            on_main(functools.partial(check_images, validation, images, config.data.max_pixels))
        is_first = number == 0 and config.pretrain.epochs == 0
        space.append(on_main(functools.partial(_check_run, run, training, is_first)))
    on_main(lambda: check_space(space))
    for line in on_main(lambda: list(describe_reuse(plan))):
        say(f"WARNING: {line}")


def describe_reuse(plan: PlannedRun) -> Iterator[str]:
    """Yield warnings of stale results that the runs of a plan would use, and of a named file to be made."""
    for run in needed_runs(plan):
        with contextlib.suppress(OSError, ValueError):  # a damaged folder is reported where it is used
            yield from _reuse_of(run)


def _reuse_of(run: PlannedRun) -> Iterator[str]:
    config, folder, path = run.config, RunFolder(run.config.output), regions_file(run.config)
    folder.check(config)
    if folder.is_finished(config):
        changed = changed_files(folder.read_record().get("training"), training_files(config))
        if changed:
            yield (
                f"{folder} is finished and will be used as it is, but {' and '.join(changed)} changed since "
                "its training; to train again, remove it or pass another output=FOLDER"
            )
    elif config.clis.s > 0 and run.detector is not None:
        steps = run.detector.config.train.steps
        if not path.exists() and config.regions.file is not None:
            yield f"{path} (regions.file) does not exist; a detector is trained for {steps} steps to make it"
        made = detector_steps(path) if path.exists() else None
        if made is not None and made < steps:
            yield (
                f"{path} was made by a detector trained for {made} steps, and this config trains it for "
                f"{steps}; to search again, start over in another folder (output=FOLDER)"
            )


def needed_runs(plan: PlannedRun) -> Iterator[PlannedRun]:
    """Yield the run and those whose results it will use, each after those that it needs."""
    config, folder = plan.config, RunFolder(plan.config.output)
    if not folder.is_finished(config):
        if plan.start is not None and not folder.has_begun:
            yield from needed_runs(plan.start)
        if plan.detector is not None and config.clis.s > 0 and not regions_file(config).exists():
            yield from needed_runs(plan.detector)
    yield plan


def pending_runs(plan: PlannedRun) -> Iterator[PlannedRun]:
    """Yield those of the needed runs that are not finished."""
    for run in needed_runs(plan):
        if not RunFolder(run.config.output).is_finished(run.config):
            yield run


def _check_run(run: PlannedRun, training: Annotations, first: bool) -> tuple[Path, int]:
    """Check what one process can check; return the run's folder and the bytes that it will need there.

    Args:
        first: the run is the first stage, which reads all files of both streams at once.
    """
    config, folder = run.config, RunFolder(run.config.output)
    _check_some_images(training, config)
    pretrains = config.pretrain.epochs > 0 and not folder.pretraining.backbone.exists()
    if config.clis.s > 0 or pretrains:
        _check_image_level(run, training, first)
    return check_folder(run, build_to_train(config, training.categories, folder), training.categories)


def check_folder(run: PlannedRun, model: CLISDetector, categories: Sequence[Category]) -> tuple[Path, int]:
    """Check that the model can begin or resume in the run's folder; return that and the bytes to come there.

    Raises:
        OSError, ValueError: it cannot.
    """
    folder = RunFolder(run.config.output)
    check_given_start(run, model)
    check_same_files(folder, run.config)
    check_writable_folder(folder.path, "output")
    return folder.path, checkpoint_bytes(model, run.config, categories, folder)


def build_to_train(config: Config, categories: Sequence[Category], folder: RunFolder) -> CLISDetector:
    """Build a run's detector, and the classifier of its pre-training if that is not done yet.

    Their loss and the backbone's weights are read and tried, and the weights downloaded if need be.

    Raises:
        FileNotFoundError, ValueError: the weights are missing or do not fit, or the loss fails.
    """
    if config.pretrain.epochs > 0 and not folder.pretraining.backbone.exists():
        build_classifier(config, categories)
        return build_model(config, categories, pretrained=False)
    return build_model(config, categories, pretrained=starting_weights(config, folder))


def _check_image_level(run: PlannedRun, training: Annotations, first: bool) -> None:
    config, path = run.config, regions_file(run.config)
    index = check_image_level(config, training)
    made = path.exists()
    given = config.clis.s > 0 and not made and config.regions.rule == "given"
    if index is None and (given or (made and not first)):
        index = make_index(config, training)
    if index is not None:
        make_image_level_sampler(config, index)
    if config.clis.s > 0:
        check_regions(run, index, training)


def check_regions(
    run: PlannedRun, index: ImageLevelIndex | None, training: Annotations, *, every_row: bool = False
) -> None:
    """Check a run's file of regions, or what it will be made of.

    Args:
        index: None where the class folders are not scanned; needed for given boxes.
        every_row: see `load_regions`.

    Raises:
        OSError, ValueError: the regions cannot be used or made.
    """
    config, path = run.config, regions_file(run.config)
    if path.exists():
        if index is not None:
            load_regions(path, index, config.regions, every_row=every_row)
        return
    check_writable_folder(path.parent, "regions.file" if config.regions.file else "output")
    if config.regions.rule == "given":
        assert index is not None
        read_boxes(given_boxes(config), index)
    elif config.regions.rule in DETECTOR_RULES and run.detector is None:
        checkpoint = detector_checkpoint(config, None)
        categories = saved_categories(load_checkpoint(checkpoint))
        check_same_categories(categories, str(checkpoint), training.categories, training.path)


# --- images -----------------------------------------------------------------------------------------------


def check_images(annotations: Annotations, folder: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Check that all images of a split are there, and that they have the sizes of the annotations.

    Headers are read in an even order for `HEADER_SECONDS`; none is decoded.

    Raises:
        ValueError: some are not; the message names the first.
    """

    def missing(row: int) -> str | None:
        return _missing(image_path(folder, str(annotations.file_names[row])))

    def wrong(row: int) -> str | None:
        try:
            _check_header(annotations, folder, row, max_pixels)
        except ImageError as error:
            return str(error)
        return None

    rows = list(range(len(annotations)))
    _refuse(annotations, _problems(missing, rows, f"look for {Path(annotations.path).name}"), len(rows))
    until = time.monotonic() + HEADER_SECONDS
    even = np.random.default_rng(0).permutation(len(annotations)).tolist()
    _refuse(annotations, _problems(wrong, even, f"sizes of {Path(annotations.path).name}", until), len(rows))


def _problems(
    problem_of: Callable[[int], str | None], rows: Sequence[int], label: str, until: float = np.inf
) -> list[str]:
    """Return what is wrong with the images of these rows, as far as there is time."""
    found: list[str] = []
    block = 64 * THREADS
    began, done = time.monotonic(), 0
    with ThreadPoolExecutor(THREADS) as pool, Progress(label, len(rows), at_most=True) as progress:
        for start in range(0, len(rows), block):
            if time.monotonic() > until:
                break
            part = rows[start : start + block]
            found += [problem for problem in pool.map(problem_of, part) if problem is not None]
            done += len(part)
            if time.monotonic() - began > QUIET_SECONDS:
                progress.advance(done - progress.done)
    return found


def _refuse(annotations: Annotations, problems: Sequence[str], length: int) -> None:
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{annotations.path}: {len(problems)} of {length} images cannot be used: "
            f"{'; '.join(problems[:SHOWN])}{more}"
        )


def _missing(path: Path) -> str | None:
    """Say why there is no image file of this name."""
    try:
        status = path.stat()
    except OSError as error:
        return f"{path}: {error.strerror or error}; check the image folder"
    if not stat.S_ISREG(status.st_mode):
        return f"{path}: not a regular file; check the image folder"
    return None if status.st_size > 0 else f"{path}: the file is empty; replace it"


def _check_header(annotations: Annotations, folder: Path, row: int, max_pixels: int) -> None:
    """Check an image's size by the first bytes of its file, or by all where its header is longer."""
    path = image_path(folder, str(annotations.file_names[row]))
    try:
        with path.open("rb") as file:
            image = open_image(file.read(HEADER_BYTES), str(path), max_pixels)
    except (ImageError, OSError):
        image = open_image(read_bytes(path), str(path), max_pixels)
    check_size(image, annotations, row)


def _check_some_images(annotations: Annotations, config: Config) -> None:
    folder = data_path(config, config.data.train_images)
    rows = np.linspace(0, len(annotations) - 1, min(TRAIN_SAMPLE, len(annotations))).astype(int).tolist()
    problems = [_missing(image_path(folder, str(annotations.file_names[row]))) for row in rows]
    if None not in problems:
        raise ValueError(
            f"{annotations.path}: none of the {len(rows)} sampled training images exists "
            f"(data.train_images={config.data.train_images}): {problems[0]}"
        )


# --- the place of the run ---------------------------------------------------------------------------------


def check_writable_folder(folder: Path, setting: str) -> None:
    """Check that files can be made in a folder, which may not exist yet; nothing is left behind.

    Args:
        setting: the config's key that says where the folder is, for the message.

    Raises:
        OSError: they cannot.
    """
    place = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(
            f"{folder}: nothing can be written there ({place}: {error.strerror}); allow writing, or pass "
            f"another {setting}="
        ) from error


def checkpoint_bytes(
    model: CLISDetector, config: Config, categories: Sequence[Category], folder: RunFolder
) -> int:
    """Return the bytes that the checkpoints of a run and its pre-training take beyond those that it has.

    There are `train.keep_last`, one that is written before an older one goes, and perhaps the best one.
    """
    at_once = config.train.keep_last + 1
    num_bytes = _bytes_to_come(model, at_once + (config.train.eval_every is not None), folder)
    if config.pretrain.epochs > 0 and not folder.pretraining.backbone.exists():
        classifier = build_classifier(config, categories, pretrained=False)
        num_bytes += _bytes_to_come(classifier, at_once, folder.pretraining)
    return num_bytes


def _bytes_to_come(model: nn.Module, number: int, folder: RunFolder) -> int:
    kept = sum(path.stat().st_size for path in folder.step_checkpoints())
    return max(0, number * _checkpoint_size(model) - kept)


def _checkpoint_size(model: nn.Module) -> int:
    """Return the bytes of a checkpoint: all tensors, of which modules share some, and SGD's momentum."""
    tensors = {value.data_ptr(): value for value in model.state_dict().values()}
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(each.numel() * each.element_size() for each in (*tensors.values(), *trained))


def check_space(needs: Sequence[tuple[Path, int]]) -> None:
    """Check that each disk has room for the checkpoints of all runs that will be on it.

    Args:
        needs: run folders, which may not exist yet, and their bytes.

    Raises:
        OSError: there is too little.
    """
    by_disk: dict[int, list[tuple[Path, int]]] = {}
    for folder, num_bytes in needs:
        by_disk.setdefault(os.stat(nearest_existing(folder)).st_dev, []).append((folder, num_bytes))
    for runs in by_disk.values():
        usage = shutil.disk_usage(nearest_existing(runs[0][0]))
        needed = sum(num_bytes for _, num_bytes in runs)
        if usage.total > 0 and usage.free < needed:  # some network file systems know no total
            raise OSError(
                f"{', '.join(str(folder) for folder, _ in runs)}: checkpoints will take "
                f"{needed / 1e9:.2f} GB, but only {usage.free / 1e9:.2f} GB are free there; make room, lower "
                "train.keep_last, or pass output= on another disk"
            )
