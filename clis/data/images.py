"""Image files as tensors; whatever cannot be used is an `ImageError` that names its file."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from clis.data.image_scan import MAX_BYTES
from clis.resize import resize_image

FORMATS = "JPEG, PNG, WebP, GIF, BMP or TIFF"
"""What can be read, for messages."""

MAX_PIXELS = 2**27
"""Default of `data.max_pixels`: an image that claims more is taken for a decompression bomb."""

_GZIP = b"\x1f\x8b"
_JPEG = b"\xff\xd8\xff"
_FORMATS: dict[bytes, type[ImageFile]] = {
    _JPEG: JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"GIF8": GifImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
}
"""Readers of Pillow by the first bytes of an image."""

SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of the system that are not a file's fault: no memory, or no file handles."""

ORIENTATION = 0x0112
"""The EXIF tag of how an image is to be turned for display, 1 to 8."""

# Training never uses EXIF data, so nobody needs to know that it is broken; the limit of pixels is ours.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says why."""


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read an image file: uint8 RGB [3,H,W]; see `decode_image`.

    Raises:
        ImageError: the file is missing, or its bytes are not a usable image.
    """
    return decode_image(read_bytes(path), str(path), max_pixels)


def read_photo(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[Tensor, bool]:
    """Read an image file as it is displayed: uint8 RGB [3,H,W], turned as its EXIF orientation says.

    Training, evaluation and the region search see images as they are stored: annotations belong to these.

    Returns:
        The pixels, and whether they were turned or mirrored.

    Raises:
        ImageError: as `read_image`.
    """
    image = open_image(read_bytes(path), str(path), max_pixels)
    orientation = image.orientation()
    return _turned(image.decode(), orientation), orientation != 1


def as_displayed(image: Image.Image) -> Tensor:
    """Convert a Pillow image of any mode: uint8 RGB [3,H,W], turned as its EXIF orientation says."""
    return _turned(_pixels(image.copy()), _orientation(image))


def read_bytes(path: str | Path) -> bytes:
    """Read the bytes of an image file.

    Raises:
        ImageError: the file cannot be read, is not a regular file (reading a pipe would wait), or is larger
            than `MAX_BYTES`.
        OSError: this process has no memory or file handles left, which is not the image's fault.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: not a regular file; check the image folder")
        if status.st_size > MAX_BYTES:
            raise ImageError(f"{path}: {status.st_size} bytes, more than 1 GiB; check the image folder")
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        raise ImageError(f"{path}: {error.strerror or error}; check the image folder") from error


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode image bytes, with `open_image` and `EncodedImage.decode`: uint8 RGB [3,H,W]."""
    return open_image(data, name, max_pixels).decode()


def open_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Read the header of JPEG, PNG, WebP, GIF, BMP or TIFF bytes, also gzip'ed ones (as in ImageNet-22k).

    Args:
        name: name of the image in messages.
        max_pixels: see `data.max_pixels`.

    Raises:
        ImageError: the bytes are empty, not an image, or an image of too many pixels.
    """
    with _naming(name):
        data = unpacked(data)
        width, height = _opened(data).size
        if height * width > max_pixels:
            raise ValueError(
                f"{width} x {height} pixels, more than data.max_pixels={max_pixels} (raise it "
                "to use this image)"
            )
        return EncodedImage(data=data, name=name, size=(height, width))


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image whose size is known; whether its pixels are sound only shows when they are decoded."""

    data: bytes
    """Not gzip'ed."""
    name: str
    size: tuple[int, int]
    """Height and width as stored: EXIF rotation is never applied (a TIFF's always is, by Pillow)."""

    def decode(self) -> Tensor:
        """Decode the pixels: uint8 RGB [3,H,W], channels last in memory.

        Gray, palette, CMYK, 16-bit and transparent images become RGB; alpha is dropped, not blended. Of an
        animation the first frame is taken.

        Raises:
            ImageError: the bytes are truncated or corrupt, or the pixels are 32-bit numbers.
        """
        with _naming(self.name):
            if self.data.startswith(_JPEG):
                return self._decode_jpeg()
            _opened(self.data).verify()  # checksums of a PNG, which `load` passes over
            return _pixels(_opened(self.data))

    def orientation(self) -> int:
        """Return the EXIF orientation of `decode`'s pixels, 1 to 8.

        1 is that of an image that has none, or a damaged one, and of a TIFF, which Pillow has turned.
        """
        image = _opened(self.data)
        return 1 if isinstance(image, TiffImageFile) else _orientation(image)

    def decode_resized(self, size: tuple[int, int]) -> Tensor:
        """Decode at another size, uint8 RGB [3,*size]; a JPEG is decoded at the smallest scale that suffices.

        Raises:
            ImageError: the bytes are truncated or corrupt.
        """
        pixels, extent = self.decode_reduced(size)
        return resize_image(pixels, size, extent)

    def decode_reduced(self, least: tuple[int, int]) -> tuple[Tensor, tuple[float, float] | None]:
        """Decode the pixels, a JPEG at 1/2, 1/4 or 1/8 of its size where that is not below `least`.

        Returns:
            uint8 RGB [3,H,W], and the height and width of it that the image fills; None is all of it.

        Raises:
            ImageError: the bytes are truncated or corrupt.
        """
        return self._decode_reduced(least) or (self.decode(), None)

    def _decode_jpeg(self) -> Tensor:
        """Decode with torchvision, which is faster than Pillow."""
        # A bytearray because PyTorch warns of read-only buffers.
        encoded = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        image = decode_jpeg(encoded, ImageReadMode.RGB)
        if image.shape[1:] != self.size:
            raise ValueError(f"{list(image.shape[1:])} pixels, but its header says {list(self.size)}")
        return image

    def _decode_reduced(self, least: tuple[int, int]) -> tuple[Tensor, tuple[float, float]] | None:
        """Decode a JPEG at 1/2, 1/4 or 1/8 of its size, not below `least`; return it and the extent it fills.

        The extent is a height and width. Returns None where `least` is above the half, or where Pillow cannot
        read the image, so that torchvision has to say what is wrong.
        """
        height, width = self.size
        if min(height // least[0], width // least[1]) < 2 or not self.data.startswith(_JPEG):
            return None
        try:
            image = JpegImageFile(io.BytesIO(self.data))
            if image.mode not in ("RGB", "L"):
                return None
            drafted = image.draft(None, least[::-1])
            if drafted is None:
                return None
            (_, _, filled_width, filled_height) = drafted[1]
            image.decodermaxblock = len(self.data)  # not in blocks of 64 kB
            return _pixels(image), (filled_height, filled_width)
        except Exception:
            return None


def _opened(data: bytes) -> ImageFile:
    """Read only the header. `Image.open` would do, except for its own limit of pixels."""
    image_file = next((read for start, read in _FORMATS.items() if data.startswith(start)), None)
    if image_file is None:
        raise ValueError(f"not a {FORMATS} image")
    try:
        return image_file(io.BytesIO(data))
    except Exception as error:
        raise ValueError(f"truncated or corrupt {image_file.format} ({str(error) or 'no pixels'})") from error


def _pixels(image: Image.Image) -> Tensor:
    """Decode a Pillow image, the first frame of an animation: uint8 RGB [3,H,W], channels last in memory."""
    if image.mode == "F" or (image.mode == "I" and not isinstance(image, PngImageFile)):
        raise ValueError("32-bit grayscale has no defined white level; save it with 8 or 16 bits")
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit gray, which `convert` would clip to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # `convert` drops it too, with a warning
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # the pixels may be sound
        return 1
    return orientation if orientation in range(1, 9) else 1


def _turned(image: Tensor, orientation: int) -> Tensor:
    """Turn and mirror stored pixels [3,H,W] for display, by their EXIF orientation."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    axes = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    return image.flip(axes) if axes else image


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn whatever the decoders raise into an `ImageError` of this image."""
    try:
        yield
    except Exception as error:  # Pillow's are of many kinds
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # not the image's fault
            raise
        # torchvision puts the place in its own sources first.
        reason = re.sub(r"^.*\.cpp:\d+,\s*", "", (str(error).splitlines() or [""])[0])
        raise ImageError(f"{name}: {reason or type(error).__name__}; replace or remove the file") from error


def unpacked(data: bytes) -> bytes:
    """Return the bytes of an image, uncompressed if they were gzip'ed.

    Raises:
        ValueError, zlib.error: there are none, or the gzip data is damaged or too large.
    """
    if not data:
        raise ValueError("the file is empty")
    if not data.startswith(_GZIP):
        return data
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    unpacked = unpacker.decompress(data, MAX_BYTES)
    if not unpacker.eof:
        raise ValueError("gzip data is truncated or unpacks to more than 1 GiB")
    return unpacked
