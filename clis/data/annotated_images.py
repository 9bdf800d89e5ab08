"""The images of an annotation file, which must have the sizes that the file says."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from torch import Tensor

from clis.data.annotations import Annotations
from clis.data.images import MAX_PIXELS, EncodedImage, ImageError, open_image, read_bytes

_SIDEWAYS = 5
"""EXIF orientations from here on exchange width and height."""


def open_annotated(
    annotations: Annotations, folder: Path, row: int, max_pixels: int = MAX_PIXELS
) -> EncodedImage:
    """Open the image at place `row` of an annotation file, whose boxes are in its stored pixels.

    Args:
        folder: folder that `annotations.file_names` are relative to.
        max_pixels: see `data.max_pixels`.

    Raises:
        ImageError: it cannot be read, or its size is not the one in the annotations.
    """
    path = image_path(folder, str(annotations.file_names[row]))
    image = open_image(read_bytes(path), str(path), max_pixels)
    check_size(image, annotations, row)
    return image


def read_annotated(annotations: Annotations, folder: Path, row: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read the image at place `row` of an annotation file: uint8 RGB [3,H,W]; see `open_annotated`."""
    return open_annotated(annotations, folder, row, max_pixels).decode()


def image_path(folder: Path, name: str) -> Path:
    r"""Return the path of an image of an annotation file.

    A name that was written on Windows (``photos\1.jpg``), or whose accents the disk has in Unicode's other
    form, is the file that it means, where only that exists.
    """
    path = folder / name
    if (name.isascii() and "\\" not in name) or path.exists():
        return path
    for text in (name, name.replace("\\", "/")):
        for form in ("NFC", "NFD"):
            if (found := folder / unicodedata.normalize(form, text)).exists():
                return found
    return path


def check_size(image: EncodedImage, annotations: Annotations, row: int) -> None:
    """Check that an image has the size that an annotation file says of its image at place `row`.

    Raises:
        ImageError: it has another size; the message names an EXIF rotation where that is the cause.
    """
    height, width = annotations.image_sizes[row].tolist()
    if image.size == (height, width):
        return
    if image.size == (width, height) and image.orientation() >= _SIDEWAYS:
        cause = (
            f"it has an EXIF rotation (orientation {image.orientation()}), which is never applied: boxes "
            "belong to the stored pixels. Rotate the pixels and remove the tag (exiftran -ai)"
        )
    else:
        cause = "boxes would be in the wrong place. Use the images that were annotated, or correct the sizes"
    raise ImageError(
        f"{image.name}: {image.size[1]} x {image.size[0]} pixels, but the annotations say {width} x {height} "
        f"(image {annotations.image_ids[row]} of {annotations.path}): {cause}"
    )
