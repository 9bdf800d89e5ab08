"""From a work item to tensors: one instance-level image with its own image-level images, and the loaders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clis.config import CLISConfig, DataConfig
from clis.data.annotated_images import open_annotated
from clis.data.annotations import Annotations
from clis.data.batch import OnDevice, Sample, collate, mosaic_as_image
from clis.data.image_level import ImageLevelIndex
from clis.data.images import EncodedImage, ImageError, open_image
from clis.data.mapped import MappedFile
from clis.data.mosaic import draw_tile
from clis.data.pasting import draw_paste
from clis.data.plan import Plan, plan_sample
from clis.data.sampling import ImageItem, JointSampler, SingleSampler, WorkItem
from clis.data.sealed import SealedLoader
from clis.data.transforms import FILL
from clis.text import counted

MAX_REPLACEMENTS = 100
"""Unreadable images in a row after which a stream counts as unavailable."""

MOST_WAITING = 8
"""Batches of images that may wait for others of their shape."""

T = TypeVar("T")


def first_readable(read: Callable[[int], T], index: int, length: int, unreadable: list[str]) -> tuple[int, T]:
    """Find the first readable image of a stream of `length` from `index` on; return it and `read`'s result.

    The errors of the images before it are appended to `unreadable`.

    Raises:
        ImageError: none of `MAX_REPLACEMENTS` images can be read, or none of a shorter stream.
    """
    tried = min(MAX_REPLACEMENTS, length)
    for candidate in range(index, index + tried):
        try:
            return candidate % length, read(candidate % length)
        except ImageError as error:
            unreadable.append(str(error))
    raise ImageError(f"{counted(tried, 'image')} in a row could not be read; the last: {unreadable[-1]}")


class ReadAhead:
    """Read a block of neighbors of an index at once, when the first image of the block is drawn."""

    def __init__(self, block: int | None) -> None:
        """Set up for blocks of `block` images drawn together (`data.shuffle_block`); None does nothing."""
        self.block = block
        self.current: int | None = None

    def __call__(
        self, index: ImageLevelIndex, image: int, length: int, row: Callable[[int], int] = int
    ) -> None:
        """Read ahead the block of `image`, which is in row `row(image)`, in a stream of `length` images."""
        if self.block is None or image // self.block == self.current:
            return
        self.current = image // self.block
        last = min((self.current + 1) * self.block, length) - 1
        index.read_ahead(row(self.current * self.block), row(last) + 1)


class _Opened(NamedTuple):
    """The images of one work item, not decoded yet."""

    row: int
    """Of the annotations."""
    instance: EncodedImage
    source_rows: np.ndarray
    """int64 [s], of the image-level index."""
    sources: list[EncodedImage]
    unreadable: tuple[str, ...]
    """One message for each image that was replaced."""


class Explained(NamedTuple):
    """A sample and what it was made from, for people to look at."""

    sample: Sample
    plan: Plan
    row: int
    """Of the annotations."""
    source_rows: np.ndarray
    """int64 [s], of the image-level index."""


class TwoStreamDataset(Dataset[Sample]):
    """Map a `WorkItem` to its `Sample`, a pure function of the item and the files."""

    def __init__(
        self,
        data: DataConfig,
        clis: CLISConfig,
        annotations: Annotations,
        image_folder: Path,
        index: ImageLevelIndex | None,
        regions: np.ndarray | None,
    ) -> None:
        """Keep what the samples are made from.

        Args:
            annotations: instance-level, boxes checked (see `clis.data.annotations`).
            image_folder: folder that `annotations.file_names` are relative to.
            index: the image-level images; None where clis.s is 0.
            regions: structured [n] in the index's order (see `clis.data.region_file.load_regions`).
        """
        self.data, self.clis = data, clis
        self.annotations, self.image_folder = annotations, image_folder
        self.index, self.regions = index, regions
        self._read_ahead = ReadAhead(data.shuffle_block)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a process that is not forked, with file names in place of mapped arrays."""
        regions = None if self.regions is None else MappedFile.replace(self.regions)
        return vars(self) | {"regions": regions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        regions = state["regions"]
        opened = regions.open() if isinstance(regions, MappedFile) else regions
        self.__dict__.update(state | {"regions": opened})

    def __getitem__(self, item: WorkItem) -> Sample:
        return self.explain(item).sample

    def explain(self, item: WorkItem) -> Explained:
        """Make the sample of an item, and say from what."""
        opened = self._open(item, whole=False)
        try:
            return self._explained(item, opened)
        except ImageError:
            # The headers were sound, but not all pixels: with a replacement, the plan is another one.
            return self._explained(item, self._open(item, whole=True))

    def plan(self, item: WorkItem) -> Plan:
        """Draw the plan of an item, for which no pixels are decoded."""
        return self._plan(item, self._open(item, whole=False))

    def _open(self, item: WorkItem, *, whole: bool) -> _Opened:
        """Open the item's images or replacements: with sound headers, or, if `whole`, with sound pixels."""
        unreadable: list[str] = []

        def first(read: Callable[[int], EncodedImage], index: int, length: int) -> tuple[int, EncodedImage]:
            def sound(candidate: int) -> EncodedImage:
                image = read(candidate)
                if whole:
                    image.decode()
                return image

            return first_readable(sound, index, length, unreadable)

        row, instance = first(self._open_instance, item.instance, len(self.annotations))
        length = 0 if self.index is None else len(self.index)
        sources = [first(self._open_image_level, i, length) for i in item.image_level]
        rows = np.array([i for i, _ in sources], dtype=np.int64)
        return _Opened(row, instance, rows, [image for _, image in sources], tuple(unreadable))

    def _open_instance(self, row: int) -> EncodedImage:
        return open_annotated(self.annotations, self.image_folder, row, self.data.max_pixels)

    def _open_image_level(self, row: int) -> EncodedImage:
        index = self.index
        assert index is not None  # work items have image-level images only where there is an index
        self._read_ahead(index, row, len(index))
        return open_image(index.read(row), index.name(row), self.data.max_pixels)

    def _explained(self, item: WorkItem, opened: _Opened) -> Explained:
        plan = self._plan(item, opened)
        sample = self._sample(item, opened, plan)
        sample = mosaic_as_image(sample) if self.clis.detect_mosaics else sample
        return Explained(sample, plan, opened.row, opened.source_rows)

    def _sample(self, item: WorkItem, opened: _Opened, plan: Plan) -> Sample:
        image, mosaics = self._draw(plan, opened)
        labels = torch.from_numpy(self.annotations.labels_of(opened.row))
        source_labels = torch.zeros(0, dtype=torch.int64)
        if self.index is not None and len(opened.source_rows):
            source_labels = torch.from_numpy(self.index.labels[opened.source_rows].astype(np.int64))
        pair_sources = [place for place, _ in plan.pastes]
        pair_boxes = torch.tensor([paste.box for _, paste in plan.pastes], dtype=torch.float32).view(-1, 4)
        row_of_region = plan.kept.cumsum(0) - 1
        return Sample(
            image=image,
            boxes=torch.cat([plan.boxes, pair_boxes]),
            labels=torch.cat([labels, source_labels[pair_sources]]),
            mosaics=mosaics,
            regions=plan.regions[plan.kept],
            region_labels=source_labels[plan.kept],
            region_mosaics=torch.arange(len(plan.kept))[plan.kept] // 4,
            pair_boxes=pair_boxes,
            pair_regions=row_of_region[pair_sources],
            seed=item.seed,
            image_id=int(self.annotations.image_ids[opened.row]),
            unreadable=opened.unreadable,
        )

    def _plan(self, item: WorkItem, opened: _Opened) -> Plan:
        regions = np.zeros((0, 4), dtype=np.float32)
        if self.regions is not None and len(opened.source_rows):
            regions = self.regions["box"][opened.source_rows]
        return plan_sample(
            self.data,
            self.clis.t,
            opened.instance.size,
            torch.from_numpy(self.annotations.boxes_of(opened.row)),
            [source.size for source in opened.sources],
            torch.from_numpy(regions),
            np.random.default_rng(item.seed),
        )

    def _draw(self, plan: Plan, opened: _Opened) -> tuple[Tensor, Tensor]:
        """Draw the image with its pasted regions, uint8 [3,H,W], and the mosaics, uint8 [s/4,3,S,S]."""
        if self.clis.detect_mosaics:
            image = torch.zeros(3, 0, 0, dtype=torch.uint8)  # a mosaic takes its place
        else:
            image = opened.instance.decode_resized(plan.size)
            image = image.flip(-1) if plan.flipped else image
        # Crops are whole pixels of the stored image, so these are needed at full size.
        whole = {place: opened.sources[place].decode() for place, _ in plan.pastes}
        for place, paste in plan.pastes:
            draw_paste(image, whole[place], paste)

        size = self.data.mosaic_size
        mosaics = torch.full((len(opened.sources) // 4, size, size, 3), FILL, dtype=torch.uint8)
        mosaics = mosaics.permute(0, 3, 1, 2)
        for place, (source, placement) in enumerate(zip(opened.sources, plan.placements)):
            if place in whole:
                pixels = whole[place]
            elif placement.crop is not None:
                pixels = source.decode()
            else:
                pixels = source.decode_resized(placement.size)
            draw_tile(pixels, placement, mosaics[place // 4], place % 4)
        return image, mosaics


class MicroBatches:
    """The work items of one process, micro-batch after micro-batch, for a range of steps.

    Process r of W takes the r-th of W contiguous slices of every global batch, so the items of all processes
    in the order of their ranks are the global batch in its order.
    """

    def __init__(
        self,
        sampler: JointSampler | SingleSampler,
        steps: range,
        rank: int,
        world_size: int,
        images_per_process: int,
    ) -> None:
        self.sampler, self.steps = sampler, steps
        self.rank, self.world_size, self.images_per_process = rank, world_size, images_per_process

    def __iter__(self) -> Iterator[list[WorkItem] | list[ImageItem]]:
        for step in self.steps:
            items = self.sampler.items(step)
            share = len(items) // self.world_size
            mine = items[self.rank * share : (self.rank + 1) * share]
            for first in range(0, share, self.images_per_process):
                yield mine[first : first + self.images_per_process]


def train_loader(
    dataset: Dataset,
    batches: MicroBatches,
    workers: int,
    pin: bool,
    collate: Callable[[Sequence[Any]], OnDevice] = collate,
) -> Iterable[Any]:
    """Load batches in the order of `batches`, in `workers` processes (0: in this one)."""
    return SealedLoader(dataset, workers, collate, pin, batch_sampler=batches)


class ImageDataset(Dataset[tuple[int, T]]):
    """Map a place in `rows` to its row and what `read` returns for that row, such as an image."""

    def __init__(self, read: Callable[[int], T], rows: Sequence[int]) -> None:
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[int, T]:
        return int(self.rows[place]), self.read(int(self.rows[place]))


def image_loader(
    read: Callable[[int], T], rows: Sequence[int], images_per_batch: int, workers: int
) -> Iterable[tuple[list[int], list[T]]]:
    """Load lists of rows with what `read` returns for them, in order, in `workers` processes.

    Tensors are copied, so that they can wait for others of their shape (`batches_by_shape`).
    """
    dataset: Dataset[Any] = ImageDataset(read, rows)
    return SealedLoader(dataset, workers, _unzip, copy=True, batch_size=images_per_batch)


def batches_by_shape(
    batches: Iterable[tuple[list[int], list[T]]], size: int, shape_of: Callable[[T], Any]
) -> Iterator[tuple[list[int], list[T]]]:
    """Sort batches of rows and images into batches of up to `size` images of one shape.

    What has no shape (None) is passed on alone, at once. No more than `MOST_WAITING` batches wait: then the
    fullest goes as it is.
    """
    waiting: dict[Any, list[tuple[int, T]]] = defaultdict(list)
    for rows, images in batches:
        for pair in zip(rows, images):
            shape = shape_of(pair[1])
            waiting[shape].append(pair)
            if len(waiting[shape]) == size or shape is None:
                yield _unzipped(waiting.pop(shape))
            elif sum(map(len, waiting.values())) >= MOST_WAITING * size:
                yield _unzipped(waiting.pop(max(waiting, key=lambda each: len(waiting[each]))))
    yield from map(_unzipped, waiting.values())


def _unzipped(pairs: list[tuple[int, T]]) -> tuple[list[int], list[T]]:
    return [row for row, _ in pairs], [image for _, image in pairs]


def _unzip(pairs: Sequence[tuple[int, T]]) -> tuple[list[int], list[T]]:
    return [row for row, _ in pairs], [image for _, image in pairs]
