"""One work item as tensors, and a batch of them: what the data pipeline yields and the models take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

B = TypeVar("B", bound="OnDevice")


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """A dataclass whose tensors, single or in lists, move together."""

    unreadable: tuple[str, ...]
    """One message for each image that could not be read and was replaced."""

    COUNTED: ClassVar[tuple[str, ...]] = ()
    """Fields whose lengths the losses are divided by, summed over all processes and micro-batches."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Lengths of the fields in `COUNTED`."""
        return tuple(len(getattr(self, name)) for name in self.COUNTED)

    def _apply(self: B, function: Callable[[Tensor], Tensor]) -> B:
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                changed[field.name] = [function(tensor) for tensor in value]
        return dataclasses.replace(self, **changed)

    def to(self: B, device: torch.device) -> B:
        """Return a copy with every tensor on `device`; copies from pinned memory are asynchronous."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: B) -> B:
        """Return a copy with every tensor in pinned memory; `DataLoader` calls this method by its name."""
        return self._apply(Tensor.pin_memory)


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


def mosaic_as_image(sample: Sample) -> Sample:
    """Return the only mosaic of a sample, with its regions as ground truth, as the instance-level image."""
    (mosaic,) = sample.mosaics
    emptied = ("mosaics", "regions", "region_labels", "region_mosaics")
    return dataclasses.replace(
        sample,
        image=mosaic,
        boxes=sample.regions,
        labels=sample.region_labels,
        **{name: getattr(sample, name)[:0] for name in emptied},
    )


@dataclass(frozen=True, kw_only=True)
class Batch(OnDevice):
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

    COUNTED: ClassVar[tuple[str, ...]] = ("regions", "pair_boxes")


def count_batches(batches: Sequence[OnDevice], kind: type[OnDevice]) -> list[int]:
    """Sum the `counts` of this process's micro-batches of a step, of which there may be none."""
    return [sum(batch.counts[place] for batch in batches) for place in range(len(kind.COUNTED))]


def collate(samples: Sequence[Sample]) -> Batch:
    """Concatenate samples to a batch; rows of mosaics and regions are numbered through the whole batch."""
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
