"""What `CLISDetector.detect` takes: image files, Pillow images, arrays and tensors, one or many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clis.data.images import as_displayed, read_photo

ImageInput: TypeAlias = "str | Path | Image.Image | np.ndarray | Tensor"
"""A path, a Pillow image, an RGB array uint8 [H,W,3] or a tensor uint8 [3,H,W]."""

_ACCEPTED = "a path, a Pillow image, an RGB array uint8 [H,W,3] or a tensor uint8 [3,H,W]"


def as_tensors(images: ImageInput | Sequence[ImageInput]) -> list[Tensor]:
    """Convert one image or many to uint8 RGB tensors [3,H,W]; a tensor stays on its device.

    Files and Pillow images are turned as their EXIF orientation says, as they are displayed. Arrays
    [B,H,W,3] and tensors [B,3,H,W] are B images.

    Raises:
        ValueError: something else is given, or values that are not uint8: whether a float image counts from
            0 to 1 or to 255 cannot be known.
        ImageError: a file cannot be read.
    """
    if isinstance(images, Tensor | np.ndarray):
        images = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, str | Path | Image.Image):
        images = [images]
    elif not isinstance(images, list | tuple):
        raise ValueError(f"{type(images).__name__} is not an image; give {_ACCEPTED}, or a list of them")
    return [_as_tensor(image, number) for number, image in enumerate(images)]


def _as_tensor(image: ImageInput, number: int) -> Tensor:
    if isinstance(image, str | Path):
        return read_photo(image)[0]
    if isinstance(image, Image.Image):
        try:
            return as_displayed(image)
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from None
    if isinstance(image, np.ndarray):
        _check(number, "an array", "[H,W,3], RGB", str(image.dtype), image.shape, channels=-1)
        image = np.require(image, requirements=("C", "W"))  # copied if it is a view or read-only
        return torch.from_numpy(image).permute(2, 0, 1)
    if isinstance(image, Tensor):
        dtype = str(image.dtype).removeprefix("torch.")
        _check(number, "a tensor", "[3,H,W], RGB", dtype, image.shape, channels=0)
        return image
    raise ValueError(f"image {number} is of type {type(image).__name__}; give {_ACCEPTED}")


def _check(number: int, kind: str, form: str, dtype: str, shape: Sequence[int], channels: int) -> None:
    """Raise `ValueError` unless type and shape are those of an image, with 3 channels at this place."""
    if dtype != "uint8":
        scale = "round and convert it, after multiplying by 255 if it counts from 0 to 1"
        raise ValueError(
            f"image {number} is {kind} of {dtype}; uint8 in 0..255 is needed: "
            + (scale if "float" in dtype else "scale it to 0..255 and convert it")
        )
    if len(shape) != 3 or shape[channels] != 3 or 0 in shape:
        raise ValueError(f"image {number} is {kind} of shape {list(shape)}; {form}, is needed")
