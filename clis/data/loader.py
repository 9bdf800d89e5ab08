"""From a work item to tensors: one instance-level image with its own image-level images, and the loaders."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clis.config import CLISConfig, DataConfig
from clis.data.annotations import Annotations
from clis.data.image_level import ImageLevelIndex
from clis.data.images import ImageError, decode_image, read_image
from clis.data.mosaic import mosaic
from clis.data.pasting import paste
from clis.data.sampling import JointSampler, WorkItem
from clis.data.transforms import random_flip, resize_shortest

GRACE = 30
"""Seconds that a loader process lives on behind SIGTERM, for the step to be finished."""
MAX_REPLACEMENTS = 100
"""Unreadable images in a row after which a stream is taken to be gone."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One work item as tensors; the fields are those of `Batch` for one image."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    mosaics: Tensor
    regions: Tensor
    region_labels: Tensor
    region_mosaics: Tensor
    pair_boxes: Tensor
    pair_regions: Tensor
    seed: int
    image_id: int
    unreadable: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B instance-level images with M mosaics of image-level images, R regions in them and P pasted pairs."""

    images: list[Tensor]
    """B uint8 [3,H,W], with the pasted instances in them."""
    boxes: list[Tensor]
    """B float32 [G,4] xyxy: ground truth, then the pasted boxes."""
    labels: list[Tensor]
    """B int64 [G]."""
    mosaics: Tensor
    """uint8 [M,3,S,S]."""
    regions: Tensor
    """float32 [R,4] xyxy in pixels of their mosaic."""
    region_labels: Tensor
    """int64 [R]."""
    region_mosaics: Tensor
    """int64 [R], row of `mosaics`."""
    pair_boxes: Tensor
    """float32 [P,4], where each pair's crop was pasted."""
    pair_images: Tensor
    """int64 [P], row of `images`."""
    pair_regions: Tensor
    """int64 [P], row of `regions`: the other view."""
    seeds: list[int]
    """B seeds in [0, 2**63) of the items, for anchor and RoI sampling."""
    image_ids: list[int]
    """B ids of the annotation file, to name images in messages."""
    unreadable: tuple[str, ...] = ()
    """One message for each image that could not be read and was replaced."""

    def _apply(self, function: Callable[[Tensor], Tensor]) -> Batch:
        changed = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                changed[field.name] = [function(tensor) for tensor in value]
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device) -> Batch:
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._apply(Tensor.pin_memory)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples one below the other; rows of mosaics and regions are counted through."""
    mosaics_before = np.cumsum([0] + [len(sample.mosaics) for sample in samples])
    regions_before = np.cumsum([0] + [len(sample.regions) for sample in samples])
    return Batch(
        images=[sample.image for sample in samples],
        boxes=[sample.boxes for sample in samples],
        labels=[sample.labels for sample in samples],
        mosaics=torch.cat([sample.mosaics for sample in samples]),
        regions=torch.cat([sample.regions for sample in samples]),
        region_labels=torch.cat([sample.region_labels for sample in samples]),
        region_mosaics=torch.cat([s.region_mosaics + int(n) for s, n in zip(samples, mosaics_before)]),
        pair_boxes=torch.cat([sample.pair_boxes for sample in samples]),
        pair_images=torch.tensor([i for i, s in enumerate(samples) for _ in s.pair_boxes], dtype=torch.int64),
        pair_regions=torch.cat([s.pair_regions + int(n) for s, n in zip(samples, regions_before)]),
        seeds=[sample.seed for sample in samples],
        image_ids=[sample.image_id for sample in samples],
        unreadable=tuple(message for sample in samples for message in sample.unreadable),
    )


class TwoStreamDataset(Dataset[Sample]):
    """Maps a `WorkItem` to its `Sample`, a pure function of the item and the files."""

    def __init__(
        self,
        data: DataConfig,
        clis: CLISConfig,
        annotations: Annotations,
        image_folder: Path,
        index: ImageLevelIndex | None,
        regions: np.ndarray | None,
    ) -> None:
        """
        Args:
            annotations: instance-level, boxes checked (see `clis.data.annotations`).
            image_folder: where `annotations.file_names` lie.
            index: the image-level images; None where clis.s is 0.
            regions: structured [n] in the index's order (see `clis.data.image_level.load_regions`).
        """
        self.data, self.clis = data, clis
        self.annotations, self.image_folder = annotations, image_folder
        self.index, self.regions = index, regions

    def __getitem__(self, item: WorkItem) -> Sample:
        generator = np.random.default_rng(item.seed)
        unreadable: list[str] = []
        row, image = self._read(self._read_instance, item.instance, len(self.annotations), unreadable)
        boxes = torch.from_numpy(self.annotations.boxes_of(row))
        labels = torch.from_numpy(self.annotations.labels_of(row))
        short_side = int(generator.choice(self.data.short_sides))
        image, boxes = resize_shortest(image, boxes, short_side, self.data.max_size)
        image, boxes = random_flip(image, boxes, generator, self.data.flip)

        sources = [
            self._read(self._read_image_level, i, len(self.index), unreadable) for i in item.image_level
        ]
        mosaics, regions, kept = self._mosaics(sources, generator)
        chosen = generator.permutation(np.flatnonzero(kept))[: self.clis.t]
        image, pasted = paste(
            image,
            boxes,
            [(sources[i][1], self._region(sources[i][0])) for i in chosen],
            size_range=self.data.paste_size,
            max_cover=self.data.paste_max_cover,
            flip_probability=self.data.flip,
            generator=generator,
        )
        source_labels = torch.tensor([int(self.index.labels[i]) for i, _ in sources], dtype=torch.int64)
        row_of_region = np.cumsum(kept) - 1
        pair_sources = [int(chosen[place]) for place, _ in pasted]
        pair_boxes = torch.stack([box for _, box in pasted]) if pasted else torch.zeros(0, 4)
        return Sample(
            image=image,
            boxes=torch.cat([boxes, pair_boxes]),
            labels=torch.cat([labels, source_labels[pair_sources]]),
            mosaics=mosaics,
            regions=regions[kept],
            region_labels=source_labels[kept],
            region_mosaics=torch.arange(len(sources))[kept] // 4,
            pair_boxes=pair_boxes,
            pair_regions=torch.tensor([row_of_region[i] for i in pair_sources], dtype=torch.int64),
            seed=item.seed,
            image_id=int(self.annotations.image_ids[row]),
            unreadable=tuple(unreadable),
        )

    def _mosaics(
        self, sources: list[tuple[int, Tensor]], generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """Mosaics uint8 [s/4,3,S,S], each source's region in its mosaic [s,4], whether it was kept [s]."""
        size = self.data.mosaic_size
        canvases, regions, kept = (
            [torch.zeros(0, 3, size, size, dtype=torch.uint8)],
            [torch.zeros(0, 4)],
            [[]],
        )
        for first in range(0, len(sources), 4):
            four = sources[first : first + 4]
            canvas, moved, inside = mosaic(
                [image for _, image in four],
                torch.stack([self._region(i) for i, _ in four]),
                size=size,
                scale_range=self.data.mosaic_scale,
                flip_probability=self.data.flip,
                cutout_probability=self.data.cutout,
                cutout_range=self.data.cutout_size,
                min_region=self.data.min_region,
                generator=generator,
            )
            canvases.append(canvas[None])
            regions.append(moved)
            kept.append(inside.numpy())
        return torch.cat(canvases), torch.cat(regions), np.concatenate(kept).astype(bool)

    def _region(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.regions["box"][index]))

    def _read(
        self, read: Callable[[int], Tensor], index: int, length: int, unreadable: list[str]
    ) -> tuple[int, Tensor]:
        """The image at `index`, or the next of its stream that can be read; failures are noted."""
        for candidate in range(index, index + MAX_REPLACEMENTS):
            try:
                return candidate % length, read(candidate % length)
            except ImageError as error:
                unreadable.append(str(error))
        raise ImageError(f"{MAX_REPLACEMENTS} images in a row could not be read; the last: {unreadable[-1]}")

    def _read_instance(self, row: int) -> Tensor:
        path = self.image_folder / self.annotations.file_names[row]
        image = read_image(path)
        expected = tuple(self.annotations.image_sizes[row])
        if tuple(image.shape[1:]) != expected:
            raise ImageError(
                f"{path}: {image.shape[1]} x {image.shape[2]} pixels (height x width), but "
                f"{self.annotations.path} says {expected[0]} x {expected[1]} of image "
                f"{self.annotations.image_ids[row]}"
            )
        return image

    def _read_image_level(self, index: int) -> Tensor:
        return decode_image(self.index.read(index), self.index.name(index))


class MicroBatches:
    """The work items of one process, micro-batch after micro-batch, from one step up to another.

    Process r of W takes the r-th of W contiguous slices of every global batch, so that the items of all
    processes in the order of their ranks are the global batch in its order.
    """

    def __init__(
        self, sampler: JointSampler, steps: range, rank: int, world_size: int, images_per_process: int
    ) -> None:
        self.sampler, self.steps = sampler, steps
        self.rank, self.world_size, self.images_per_process = rank, world_size, images_per_process

    def __iter__(self) -> Iterator[list[WorkItem]]:
        for step in self.steps:
            items = self.sampler.items(step)
            share = len(items) // self.world_size
            mine = items[self.rank * share : (self.rank + 1) * share]
            for first in range(0, share, self.images_per_process):
                yield mine[first : first + self.images_per_process]


def train_loader(
    dataset: TwoStreamDataset, batches: MicroBatches, workers: int, pin: bool
) -> DataLoader[Batch]:
    """Batches in the order of `batches`, loaded by `workers` processes (0: in this one)."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_outlive_signals,
    )


class ImageDataset(Dataset[Tensor]):
    """uint8 RGB images [3,H,W] by row, from a reader."""

    def __init__(self, read: Callable[[int], Tensor], rows: Sequence[int]) -> None:
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[int, Tensor]:
        return int(self.rows[place]), self.read(int(self.rows[place]))


def image_loader(
    read: Callable[[int], Tensor], rows: Sequence[int], images_per_batch: int, workers: int
) -> DataLoader[tuple[list[int], list[Tensor]]]:
    """Lists of rows with their images, in order."""
    return DataLoader(
        ImageDataset(read, rows),
        batch_size=images_per_batch,
        num_workers=workers,
        collate_fn=_unzip,
        worker_init_fn=_outlive_signals,
    )


def is_lost_loader(error: BaseException) -> bool:
    """Whether this is what torch raises, anywhere in the main process, when a loader process is killed."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def _outlive_signals(worker: int) -> None:
    """A signal to the whole process group is the main process's to answer; it still needs the batches.

    SIGTERM is also how a main process that exits ends its loaders, and waits for them: so not for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def _unzip(pairs: Sequence[tuple[int, Tensor]]) -> tuple[list[int], list[Tensor]]:
    return [row for row, _ in pairs], [image for _, image in pairs]
