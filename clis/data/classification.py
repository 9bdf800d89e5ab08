"""Image-level images as a classification set: random crops for training, central crops for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from clis.config import DataConfig, PretrainConfig
from clis.data.batch import OnDevice
from clis.data.image_level import ImageLevelIndex
from clis.data.images import MAX_PIXELS, ImageError, decode_image, open_image
from clis.data.loader import ReadAhead, first_readable
from clis.data.sampling import ImageItem
from clis.resize import round_half_up, shortest_size

SHORT_SIDE = 256 / 224
"""Short side of the image from which the central crop is taken, relative to the crop's (torchvision)."""
LONG_SIDE = 8
"""Limit of its long side, relative to the short one: a strip of one pixel would fill the memory."""


@dataclass(frozen=True)
class Split:
    """Which of n images are trained on: all but `held_out`, which are spread evenly over the index.

    The index is in the order of its classes, so all classes are held out alike. Arithmetic, no lists.
    """

    images: int
    held_out: int

    @property
    def trained(self) -> int:
        """Number of images that are trained on."""
        return self.images - self.held_out

    def trained_row(self, place: int) -> int:
        """Return the row in the index of a training image, 0 <= place < trained; ascending."""
        return place * self.images // self.trained

    def held_out_row(self, place: int) -> int:
        """Return the row in the index of a held-out image, 0 <= place < held_out; ascending."""
        return -(-(place + 1) * self.images // self.held_out) - 1


class LabeledImage(NamedTuple):
    """One image, uint8 [3,S,S], with its label, its name for messages, and errors of images it replaces."""

    image: Tensor
    label: int
    name: str
    unreadable: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LabeledBatch(OnDevice):
    """B images with their labels, and errors of the images that could not be read."""

    images: Tensor
    """uint8 [B,3,S,S]."""
    labels: Tensor
    """int64 [B]."""
    names: list[str]
    """B names, for messages."""
    unreadable: tuple[str, ...]


def collate_labeled(samples: Sequence[LabeledImage]) -> LabeledBatch:
    """Stack images of the same size to a batch."""
    return LabeledBatch(
        images=torch.stack([sample.image for sample in samples]),
        labels=torch.tensor([sample.label for sample in samples]),
        names=[sample.name for sample in samples],
        unreadable=tuple(message for sample in samples for message in sample.unreadable),
    )


class RandomCrops(Dataset[LabeledImage]):
    """Map an `ImageItem` to a random crop of its image, a pure function of the item and the files."""

    def __init__(
        self, data: DataConfig, pretrain: PretrainConfig, index: ImageLevelIndex, split: Split
    ) -> None:
        self.index, self.split = index, split
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(pretrain.image_size, scale=pretrain.scale),
                v2.RandomHorizontalFlip(data.flip),
            ]
        )
        self.read_ahead, self.max_pixels = ReadAhead(data.shuffle_block), data.max_pixels

    def __getitem__(self, item: ImageItem) -> LabeledImage:
        unreadable: list[str] = []
        place, image = first_readable(self._read, item.image, self.split.trained, unreadable)
        row = self.split.trained_row(place)
        with torch.random.fork_rng(devices=[]):  # the transforms draw from torch's CPU generator
            torch.random.default_generator.manual_seed(item.seed)
            image = self.augment(image)
        return LabeledImage(image, int(self.index.labels[row]), self.index.name(row), tuple(unreadable))

    def _read(self, place: int) -> Tensor:
        row = self.split.trained_row(place)
        self.read_ahead(self.index, place, self.split.trained, self.split.trained_row)
        return decode_image(self.index.read(row), self.index.name(row), self.max_pixels)


def central_crop(index: ImageLevelIndex, size: int, row: int, max_pixels: int = MAX_PIXELS) -> Tensor | str:
    """Return the central square of an image, uint8 [3,size,size], or what is wrong with the image."""
    try:
        image = open_image(index.read(row), index.name(row), max_pixels)
        short_side = round_half_up(size * SHORT_SIDE)
        pixels = image.decode_resized(shortest_size(image.size, short_side, LONG_SIDE * short_side))
    except ImageError as error:
        return str(error)
    return v2.functional.center_crop(pixels, [size, size])
