"""Which images a training step sees: repeat factors, a stateless shuffle and the joint two-stream sampler.

Every draw is a pure function of (seed, number of the draw), so resuming and sharding are arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Literal, Protocol, get_args

import numpy as np

from clis.data.categories import image_class_pairs

Rounding = Literal["ceil", "stochastic", "none"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FEISTEL_ROUNDS = 6
_FRACTION_BITS = 30
"""Cumulative repeat factors are int64 in units of 2**-30: exact, with room for 2**33 draws per epoch."""

# Tags that keep hashes of one seed apart by what they are for.
_REPEAT_ORDER, _REPEAT_OFFSET, _UNIFORM_ORDER, _ITEM_SEED, _BLOCK_ORDER, _BLOCK_PLACE, _PART = range(7)


def _scramble(x: int) -> int:
    """Apply splitmix64's finalizer: a bijection of 64-bit integers whose output bits look independent."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def mix(*values: int) -> int:
    """Hash integers (taken modulo 2**64; their order matters) to one integer in [0, 2**64)."""
    state = 0
    for value in values:
        state = _scramble((state + value + _GOLDEN) & _MASK)
    return state


def permuted(position: int, n: int, key: int) -> int:
    """Return the entry at `position` of the pseudo-random permutation of [0, n) that `key` selects.

    A Feistel network over Z_a x Z_b with a * b just above n, walked until it lands below n; no memory, any
    position addressable.

    Args:
        position: 0 <= position < n.
        n: 1 <= n <= 2**62.
        key: any integer; different keys give unrelated permutations.

    Raises:
        ValueError: `n` or `position` is out of its range.
    """
    if not 0 < n <= 1 << 62:
        raise ValueError(f"permuted: n must be in [1, 2**62], got {n}")
    if not 0 <= position < n:
        raise ValueError(f"permuted: position must be in [0, {n}), got {position}")
    key = mix(key)
    a = isqrt(n - 1) + 1
    b = -(-n // a)  # a * b < n + a, so that a walk rarely takes a second turn
    while True:
        left, right = divmod(position, b)
        round_key = key
        for _ in range(_FEISTEL_ROUNDS // 2):
            left = (left + _scramble((right + round_key) & _MASK)) % a
            right = (right + _scramble((left + round_key + _GOLDEN) & _MASK)) % b
            round_key += 2 * _GOLDEN
        position = left * b + right
        if position < n:
            return position


def repeat_factors(offsets: np.ndarray, labels: np.ndarray, num_classes: int, threshold: float) -> np.ndarray:
    """Compute LVIS's repeat factor of every image (Gupta et al. 2019, section 4): float64 [N], at least 1.

    It is the largest `class_repeat_factors` among the image's classes; 1 for an image without boxes.
    Arguments and errors are the same as there.
    """
    class_factors = class_repeat_factors(offsets, labels, num_classes, threshold)
    num_images = len(offsets) - 1
    factors = np.ones(num_images)
    np.maximum.at(factors, np.repeat(np.arange(num_images), np.diff(offsets)), class_factors[labels])
    return factors


def class_balanced_factors(offsets: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Compute how often to draw every image so that all classes come equally often: float64 [N], mean 1.

    An image's factor is N / C times the sum of 1 / N_c over the classes that it holds, N_c the images with
    class c and C the classes that any image holds; 0 for an image without boxes. So each class draws N / C
    images of its own per epoch. Most factors are below 1: they are for stochastic rounding.

    Args:
        offsets, labels, num_classes: as for `class_repeat_factors`.
    """
    num_images = len(offsets) - 1
    rows = np.repeat(np.arange(num_images), np.diff(offsets))
    held_by, held = image_class_pairs(rows, labels, num_classes)
    images_of = np.bincount(held, minlength=num_classes)
    shares = 1 / images_of[held]
    return np.bincount(held_by, shares, minlength=num_images) * num_images / max(1, (images_of > 0).sum())


def class_repeat_factors(
    offsets: np.ndarray, labels: np.ndarray, num_classes: int, threshold: float
) -> np.ndarray:
    """Compute LVIS's repeat factor of every class, at least 1.

    With f(c) the share of images that hold class c, r(c) = max(1, sqrt(threshold / f(c))); a class without
    images counts as in one.

    Args:
        offsets: int64 [N + 1]; image i owns labels[offsets[i]:offsets[i + 1]].
        labels: int64 [A], 0..C-1, one per box.
        num_classes: C.
        threshold: share of images below which a class is repeated; 1e-3 on LVIS.

    Returns:
        float64 [C], at least 1.

    Raises:
        ValueError: a label is outside 0..C-1, or the offsets do not span the labels.
    """
    if offsets[0] != 0 or offsets[-1] != len(labels):
        raise ValueError(
            f"repeat_factors: offsets span {offsets[0]}..{offsets[-1]}, but there are {len(labels)} labels"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"repeat_factors: labels span {labels.min()}..{labels.max()}, outside 0..{num_classes - 1}; "
            "are these category ids instead of labels?"
        )
    num_images = len(offsets) - 1
    _, held = image_class_pairs(np.repeat(np.arange(num_images), np.diff(offsets)), labels, num_classes)
    share = np.bincount(held, minlength=num_classes).clip(min=1) / max(num_images, 1)
    return np.sqrt(threshold / share).clip(min=1)


def _fixed_point_bounds(factors: np.ndarray, rounding: Rounding) -> np.ndarray:
    """Return the cumulative draws of the images, int64 [N] in units of 2**-30; the last is a whole number."""
    if rounding == "none":
        factors = np.minimum(np.ceil(factors), 1)
    elif rounding == "ceil":
        factors = np.ceil(factors)
    whole = np.floor(factors)
    fraction = np.cumsum(factors - whole)
    if fraction.any():
        # Fractions shrink to the whole number of draws below their sum. Had they grown to the one above, an
        # image could be drawn more than ceil(r) times; here it is always floor(r) or ceil(r) times.
        fraction = fraction / fraction[-1] * np.floor(fraction[-1])
    unit = 1 << _FRACTION_BITS
    return np.cumsum(whole.astype(np.int64)) * unit + np.rint(fraction * unit).astype(np.int64)


class Sampler(Protocol):
    """An endless stream of image indices, in epochs of `len` draws."""

    def __len__(self) -> int: ...

    def draw(self, k: int) -> int:
        """Return the image of the k-th draw, k >= 0."""
        ...


class RepeatSampler:
    """Shuffled stream in which an epoch repeats every image according to its repeat factor.

    * ``ceil``: ceil(r) times, as mmdetection's ClassBalancedDataset.
    * ``stochastic``: floor(r) or ceil(r) times, r on average, as detectron2's RepeatFactorTrainingSampler,
      but by systematic sampling: draws take the images that hold u, u + 1, u + 2, ... on the cumulative sum
      of the factors, with one random u in [0, 1) per epoch. All epochs have the length floor(sum of r), for
      which the fractions shrink by less than one draw in total.
    * ``none``: once.
    """

    def __init__(self, factors: np.ndarray, rounding: Rounding, seed: int) -> None:
        """Prepare the stream.

        Args:
            factors: float [N], at least 0; an image with factor 0 is never drawn.
            rounding: see the class.
            seed: any integer.

        Raises:
            ValueError: unknown rounding, no image to draw, or a factor that is negative or not finite.
        """
        if rounding not in get_args(Rounding):
            raise ValueError(f"unknown repeat-factor rounding {rounding!r}; use one of {get_args(Rounding)}")
        factors = np.asarray(factors, dtype=np.float64)
        if not (np.isfinite(factors) & (factors >= 0)).all():
            raise ValueError("repeat factors must be finite and at least 0")
        self._bounds = _fixed_point_bounds(factors, rounding)
        self._length = int(self._bounds[-1]) >> _FRACTION_BITS if len(factors) else 0
        if self._length == 0:
            raise ValueError("repeat factors leave no image to draw; is the dataset empty?")
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    def draw(self, k: int) -> int:
        """Return the image (0..N-1) of the k-th draw of the endless stream, k >= 0."""
        epoch, position = divmod(k, self._length)
        position = permuted(position, self._length, mix(self._seed, _REPEAT_ORDER, epoch))
        offset = mix(self._seed, _REPEAT_OFFSET, epoch) >> (64 - _FRACTION_BITS)
        point = (position << _FRACTION_BITS) + offset
        return int(self._bounds.searchsorted(point, side="right"))


class UniformSampler:
    """Shuffled stream in which an epoch holds every one of n images exactly once; O(1) memory."""

    def __init__(self, n: int, seed: int) -> None:
        """Prepare the stream.

        Args:
            n: number of images, at least 1.
            seed: any integer.

        Raises:
            ValueError: there is no image.
        """
        if n < 1:
            raise ValueError("there is no image to sample from; is the image-level index empty?")
        self._n = n
        self._seed = seed

    def __len__(self) -> int:
        return self._n

    def draw(self, k: int) -> int:
        """Return the image (0..n-1) of the k-th draw of the endless stream, k >= 0."""
        epoch, position = divmod(k, self._n)
        return permuted(position, self._n, mix(self._seed, _UNIFORM_ORDER, epoch))


class PartSampler:
    """Shuffled stream over a random part of n images, the same in all epochs; O(1) memory."""

    def __init__(self, n: int, share: float, seed: int) -> None:
        """Select the part.

        Args:
            n: number of images, at least 1.
            share: share of the images that are drawn, in (0, 1], rounded to whole images, at least one.
            seed: any integer; a larger share with the same seed contains the smaller one.

        Raises:
            ValueError: there is no image.
        """
        self._part = UniformSampler(max(1, round(share * n)) if n else 0, seed)
        self._n, self._key = n, mix(seed, _PART)

    def __len__(self) -> int:
        return len(self._part)

    def draw(self, k: int) -> int:
        """Return the image (0..n-1) of the k-th draw of the endless stream, k >= 0."""
        return permuted(self._part.draw(k), self._n, self._key)


class BlockSampler:
    """Shuffled stream in two levels: blocks of neighbors in random order, and the images of each at random.

    For shards of mixed classes on a disk that random access would starve: a block is read through while its
    images are drawn. An epoch holds every one of n images exactly once; O(1) memory. The last block may be
    shorter; it, too, has a random place among the others.
    """

    def __init__(self, n: int, block: int, seed: int) -> None:
        """Prepare the stream.

        Args:
            n: number of images, at least 1; block b holds the images from b * block on.
            block: images per block, at least 1.
            seed: any integer.

        Raises:
            ValueError: there is no image, or `block` is below 1.
        """
        if n < 1 or block < 1:
            raise ValueError(f"need at least 1 image and blocks of at least 1, got {n} and {block}")
        self._n, self._block, self._seed = n, min(block, n), seed

    def __len__(self) -> int:
        return self._n

    def draw(self, k: int) -> int:
        """Return the image (0..n-1) of the k-th draw of the endless stream, k >= 0."""
        epoch, position = divmod(k, self._n)
        full, rest = divmod(self._n, self._block)
        before = mix(self._seed, _BLOCK_PLACE, epoch) % (full + 1) * self._block  # the shorter one comes here
        if before <= position < before + rest:
            place, size, block = position - before, rest, full
        else:
            slot, place = divmod(position if position < before else position - rest, self._block)
            size, block = self._block, permuted(slot, full, mix(self._seed, _BLOCK_ORDER, epoch))
        key = mix(self._seed, _BLOCK_ORDER, epoch, block)
        return block * self._block + permuted(place, size, key)


def item_seed(seed: int, index: int) -> int:
    """Return the seed, in [0, 2**63), of the item with this place in the run."""
    return mix(seed, _ITEM_SEED, index) >> 1


@dataclass(frozen=True)
class WorkItem:
    """One instance-level image with its own image-level images: the unit of work of a data worker."""

    instance: int
    """Index of the instance-level image."""
    image_level: tuple[int, ...]
    """Indices of the s image-level images."""
    seed: int
    """In [0, 2**63): seeds every random choice made for this item, in the worker and in the model."""


@dataclass(frozen=True)
class ImageItem:
    """One image of a run that draws from one stream only."""

    image: int
    """Index of the image in its stream."""
    seed: int
    """In [0, 2**63): seeds every random choice made for this item."""


class SingleSampler:
    """The global batches of a run, drawn from one stream."""

    def __init__(self, sampler: Sampler, images_per_step: int, seed: int) -> None:
        """Combine a stream with the size of its batches.

        Args:
            sampler: the stream.
            images_per_step: images in a global batch, at least 1.
            seed: any integer; the items' seeds follow from it.
        """
        self._sampler, self._images_per_step, self._seed = sampler, images_per_step, seed

    def items(self, step: int) -> list[ImageItem]:
        """Return the global batch of a step; see `JointSampler.items`."""
        first = step * self._images_per_step
        return [
            ImageItem(self._sampler.draw(k), item_seed(self._seed, k))
            for k in range(first, first + self._images_per_step)
        ]


class JointSampler:
    """The global batches of a run, drawn from both streams (paper, section IV-A: B_i = s * B_d)."""

    def __init__(
        self,
        instance_sampler: Sampler,
        image_level_sampler: Sampler | None,
        images_per_step: int,
        s: int,
        seed: int,
    ) -> None:
        """Combine the two streams.

        Args:
            instance_sampler: stream of instance-level images.
            image_level_sampler: stream of image-level images; None where s is 0.
            images_per_step: instance-level images in a global batch, at least 1.
            s: image-level images for each of them, at least 0.
            seed: any integer; the items' seeds follow from it.
        """
        self._instance_sampler = instance_sampler
        self._image_level_sampler = image_level_sampler
        self._images_per_step = images_per_step
        self._s = s
        self._seed = seed

    @property
    def instance_pass(self) -> int:
        """Number of draws in one pass over the instance-level images, with their repetitions."""
        return len(self._instance_sampler)

    def passes(self, steps: int) -> tuple[float, float]:
        """Return how many passes over the instance-level and the image-level images this many steps make."""
        draws = steps * self._images_per_step
        image_level = draws * self._s / len(self._image_level_sampler) if self._image_level_sampler else 0.0
        return draws / len(self._instance_sampler), image_level

    def items(self, step: int) -> list[WorkItem]:
        """Return the global batch of a step (0 for the first): images_per_step items in a fixed order.

        A pure function of the constructor's arguments and `step`; a process takes its slice of the list.
        """
        first = step * self._images_per_step
        return [self._item(index) for index in range(first, first + self._images_per_step)]

    def _item(self, index: int) -> WorkItem:
        draws, sampler = range(index * self._s, (index + 1) * self._s), self._image_level_sampler
        return WorkItem(
            instance=self._instance_sampler.draw(index),
            image_level=() if sampler is None else tuple(sampler.draw(k) for k in draws),
            seed=item_seed(self._seed, index),
        )
