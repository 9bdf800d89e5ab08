"""The two streams of a config: which files they read and which images each step draws."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clis.config import Config, data_path
from clis.data.annotations import (
    CACHED_BYTES,
    Advance,
    Annotations,
    describe_changes,
    load_annotations,
    load_training_annotations,
)
from clis.data.image_level import (
    ImageLevelIndex,
    build_index,
    check_containers,
    is_index,
    match_containers,
    open_index,
)
from clis.data.label_noise import with_wrong_labels
from clis.data.loader import TwoStreamDataset
from clis.data.region_file import REGION_DTYPE, load_regions
from clis.data.sampling import (
    BlockSampler,
    JointSampler,
    PartSampler,
    RepeatSampler,
    Sampler,
    UniformSampler,
    class_balanced_factors,
    repeat_factors,
)
from clis.data.shapes import generate_shapes
from clis.distributed import local_main_first
from clis.progress import Progress, say
from clis.text import counted, shortened


def generate_data(config: Config) -> None:
    """Write the data that `data.generate` names, the embedded benchmark, if they do not exist yet."""
    if config.data.generate == "shapes":
        generate_shapes(data_path(config, "shapes"))


def read_annotations(path: str | Path, *, unlabeled: bool = False) -> Annotations:
    """Read annotations with progress; all processes of a machine must call this, and one of them reads.

    Args:
        unlabeled: accept a file without annotations.
    """
    with _reading(path) as advance:
        return load_annotations(path, advance, unlabeled=unlabeled)


def read_training_annotations(config: Config) -> tuple[Annotations, dict[str, int]]:
    """Read what a run trains on, as `read_annotations`; also return what was left out or changed, counted.

    Raises:
        FileNotFoundError, ValueError: as `load_training_annotations`.
    """
    path, data = data_path(config, config.data.train), config.data
    try:
        with _reading(path) as advance:
            return load_training_annotations(
                path, drop_invalid=data.drop_invalid, empty_images=data.empty_images, advance=advance
            )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {data.source}" if data.source else str(error)) from None


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[Advance]:
    """Yield the progress function for the reader of a file; small and mapped files show no progress."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    label = f"reading {Path(path).name}, MiB"
    with local_main_first(), Progress(label, size >> 20, at_most=True) as progress:  # parts are rounded down
        yield (lambda count: progress.advance(count >> 20)) if size >= CACHED_BYTES else (lambda count: None)


def make_streams(
    config: Config, regions_file: Path | None
) -> tuple[Annotations, TwoStreamDataset, JointSampler]:
    """Open the two streams of training data, and draw which of their images each step has.

    Args:
        regions_file: of the image-level images; not read if there are none (`clis.s` = 0). None is a table of
            empty regions, which the caller fills in.

    Raises:
        FileNotFoundError, ValueError: a file is missing or wrong; see the readers in `clis.data`.
    """
    data, clis, seed = config.data, config.clis, config.train.seed
    annotations, changes = read_training_annotations(config)
    if any(changes.values()):
        say(f"{annotations.path}: {describe_changes(changes)}")
    index = regions = image_level_sampler = None
    if clis.s > 0:
        index = make_index(config, annotations)
        if regions_file is None:
            regions = np.zeros(len(index), dtype=REGION_DTYPE)
        else:
            regions = load_regions(regions_file, index, config.regions)
        image_level_sampler = make_image_level_sampler(config, index)
    instance_sampler = make_instance_sampler(config, annotations)
    sampler = JointSampler(instance_sampler, image_level_sampler, config.train.images_per_step, clis.s, seed)
    images = data_path(config, data.train_images)
    return annotations, TwoStreamDataset(data, clis, annotations, images, index, regions), sampler


def make_instance_sampler(config: Config, annotations: Annotations) -> RepeatSampler:
    """Make the shuffle of the instance-level stream, with its repetitions."""
    data, boxes = config.data, (annotations.offsets, annotations.labels, annotations.num_classes)
    factors = (
        class_balanced_factors(*boxes)
        if data.repeat == "class-balanced"
        else repeat_factors(*boxes, data.repeat_threshold)
    )
    return RepeatSampler(factors, data.repeat_rounding, config.train.seed)


def make_index(config: Config, annotations: Annotations) -> ImageLevelIndex:
    """Open the prepared index of the image-level images, or make one, for the categories of `annotations`.

    Raises:
        ValueError: a prepared index is damaged, of other categories or not alone; or as `build_index`.
    """
    return add_label_noise(config, read_index(config, annotations))


def add_label_noise(config: Config, index: ImageLevelIndex) -> ImageLevelIndex:
    """Return the index with as many wrong labels as `data.label_noise` says; itself where that is 0."""
    noise = config.data.label_noise
    return with_wrong_labels(index, noise, config.train.seed) if noise > 0 else index


def read_index(config: Config, annotations: Annotations) -> ImageLevelIndex:
    """Do the same as `make_index`, but keep the labels as they are, whatever `data.label_noise` is."""
    data = config.data
    roots = [data_path(config, root) for root in data.image_level]
    if any(map(is_index, roots)):
        if len(roots) > 1:
            raise ValueError("data.image_level: a prepared index stands alone; prepare one of all the roots")
        return open_index(roots[0], annotations.categories)
    mapping = None if data.mapping is None else data_path(config, data.mapping)
    index = build_index(roots, annotations.categories, mapping, strict=not data.drop_unmatched)
    if index.unmatched:
        some = shortened(index.unmatched)
        what = (
            "image-level class matches no category and is",
            "image-level classes match no category and are",
        )
        say(f"{counted(len(index.unmatched), *what)} left out: {some}")
    return index


def check_image_level(config: Config, annotations: Annotations) -> ImageLevelIndex | None:
    """Check where the image-level images come from, without scanning class folders and tars for images.

    Returns:
        The index, if it is a prepared one, which opens at once.

    Raises:
        FileNotFoundError, ValueError: as `make_index`; or folders or tars of a prepared index have moved.
    """
    data = config.data
    roots = [data_path(config, root) for root in data.image_level]
    if any(map(is_index, roots)):
        index = make_index(config, annotations)
        check_containers(index)
        return index
    mapping = None if data.mapping is None else data_path(config, data.mapping)
    match_containers(roots, annotations.categories, mapping, strict=not data.drop_unmatched)
    return None


def make_image_level_sampler(config: Config, index: ImageLevelIndex, images: int | None = None) -> Sampler:
    """Make the shuffle of the image-level stream: over all images, over a part, or block by block.

    Args:
        images: how many images of the index the stream has; None is all.

    Raises:
        ValueError: blocks are set, but the neighbors in the index are of one class.
    """
    block, share, seed = config.data.shuffle_block, config.data.image_level_share, config.train.seed
    images = len(index) if images is None else images
    if share < 1:
        return PartSampler(images, share, seed)
    if block is None:
        return UniformSampler(images, seed)
    if not index.mixed:
        raise ValueError(
            "data.shuffle_block is for tars of mixed classes (`python -m clis prepare image-level` with "
            "--labels); a block of these images would be of one class: set it to null"
        )
    return BlockSampler(images, block, seed)
