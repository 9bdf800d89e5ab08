"""Image files as tensors; whatever cannot be used is an `ImageError` that names its file."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path

import torch
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as torchvision_decode_image

from clis.data.image_scan import MAX_BYTES
from clis.resize import resize_image

MAX_PIXELS = 2**27
"""An image that claims more is taken for a decompression bomb: 400 MB as RGB."""

_GZIP = b"\x1f\x8b"
_JPEG = b"\xff\xd8\xff"
_GIF = (b"GIF87a", b"GIF89a")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Adam7, the seven passes of an interlaced PNG: first column and row, step in x and y.
_PNG_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Stuffing, TEM, RST0 to 7, SOI, EOI and fill bytes.
_JPEG_WITHOUT_LENGTH = {0x00, 0x01, 0xFF, *range(0xD0, 0xDA)}


# EXIF data is never used, so nobody needs to know that it is broken.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says why."""


def read_image(path: str | Path) -> Tensor:
    """Reads an image file: uint8 RGB [3,H,W]; see `decode_image`.

    Raises:
        ImageError: the file is missing, or its bytes are not a usable image.
    """
    return decode_image(read_bytes(path), str(path))


def read_bytes(path: str | Path) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: the file cannot be read, is no regular file (a pipe would be waited for), or is larger
            than `MAX_BYTES`.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: no regular file; check the image folder")
        if status.st_size > MAX_BYTES:
            raise ImageError(f"{path}: {status.st_size} bytes, more than 1 GiB; check the image folder")
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}; check the image folder") from error


def decode_image(data: bytes, name: str) -> Tensor:
    """`open_image` and `EncodedImage.decode`: uint8 RGB [3,H,W]."""
    return open_image(data, name).decode()


def open_image(data: bytes, name: str) -> EncodedImage:
    """Reads the header of JPEG, PNG, WebP or GIF bytes, also gzip'ed ones (as in ImageNet-22k).

    Args:
        name: what to call the image in messages.

    Raises:
        ImageError: the bytes are empty, no image, or an image of no or too many pixels.
    """
    with _naming(name):
        data = unpacked(data)
        return EncodedImage(data=data, name=name, size=_header_size(data))


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image whose size is known; whether its pixels are sound shows when they are decoded."""

    data: bytes
    """Not gzip'ed."""
    name: str
    size: tuple[int, int]
    """Height and width as stored: EXIF rotation is never applied."""

    def decode(self) -> Tensor:
        """The pixels: uint8 RGB [3,H,W], channels last in memory.

        Gray, palette, CMYK, 16-bit and transparent images become RGB; alpha is dropped, not blended. Of an
        animated GIF the first frame is taken.

        Raises:
            ImageError: the bytes are truncated or corrupt.
        """
        with _naming(self.name):
            return self._decode()

    def decode_resized(self, size: tuple[int, int]) -> Tensor:
        """The pixels at another size, uint8 RGB [3,*size], of a JPEG from as few of them as serve.

        Raises:
            ImageError: the bytes are truncated or corrupt.
        """
        pixels, extent = self.decode_reduced(size)
        return resize_image(pixels, size, extent)

    def decode_reduced(self, least: tuple[int, int]) -> tuple[Tensor, tuple[float, float] | None]:
        """The pixels, of a JPEG at 1/2, 1/4 or 1/8 of its size where that is not below `least`.

        Returns:
            uint8 RGB [3,H,W], and the height and width of it that the image fills; None is all of it.

        Raises:
            ImageError: the bytes are truncated or corrupt.
        """
        return self._decode_reduced(least) or (self.decode(), None)

    def _decode(self) -> Tensor:
        if self.data.startswith(_GIF):
            return self._decode_gif()
        if self.data.startswith(_PNG):
            _check_png(self.data)
        # A bytearray because PyTorch warns of read-only buffers.
        image = torchvision_decode_image(
            torch.frombuffer(bytearray(self.data), dtype=torch.uint8), mode=ImageReadMode.RGB
        )
        if image.dtype == torch.uint16:
            image = (image.to(torch.int32) >> 8).to(torch.uint8)
        self._check_size(*image.shape[1:])
        return image

    def _decode_gif(self) -> Tensor:
        """The first frame; torchvision would decode them all."""
        try:
            image = GifImageFile(io.BytesIO(self.data))
            # Where the first frame is larger than the screen, Pillow gives the size of the frame.
            self._check_size(image.height, image.width)
            return _pixels(image)
        except Exception as error:
            raise ValueError(f"corrupt GIF: {error}") from error

    def _check_size(self, height: int, width: int) -> None:
        if (height, width) != self.size:
            raise ValueError(f"{[height, width]} pixels, but its header says {list(self.size)}")

    def _decode_reduced(self, least: tuple[int, int]) -> tuple[Tensor, tuple[float, float]] | None:
        """A JPEG at 1/2, 1/4 or 1/8 of its size but not below `least`, and the height and width it fills.

        None where `least` is above the half, or where Pillow makes no sense of it and torchvision has to say
        what is wrong. Whole images are torchvision's, since Pillow takes longer.
        """
        height, width = self.size
        if min(height // least[0], width // least[1]) < 2 or not self.data.startswith(_JPEG):
            return None
        try:
            # Not Image.open, which has a limit of pixels of its own.
            image = JpegImageFile(io.BytesIO(self.data))
            if image.size != (width, height) or image.mode not in ("RGB", "L"):
                return None
            _, (_, _, *extent) = image.draft(None, least[::-1])
            image.decodermaxblock = len(self.data)  # not in blocks of 64 kB
            return _pixels(image), tuple(extent[::-1])
        except Exception:
            return None


def _pixels(image: Image) -> Tensor:
    """The pixels of a Pillow image: uint8 RGB [3,H,W], channels last in memory."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever the decoders raise, as an `ImageError` of this image."""
    try:
        yield
    except (RuntimeError, ValueError, struct.error, zlib.error) as error:
        raise ImageError(f"{name}: {_reason(error)}; replace or remove the file") from error


def _reason(error: Exception) -> str:
    if isinstance(error, struct.error):
        return "truncated image header"
    # torchvision puts the place in its own sources first.
    return re.sub(r"^.*\.cpp:\d+,\s*", "", str(error).splitlines()[0])


def unpacked(data: bytes) -> bytes:
    """The bytes of an image, which may have been gzip'ed.

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


def _header_size(data: bytes) -> tuple[int, int]:
    if data.startswith(_JPEG):
        height, width = _jpeg_size(data)
    elif data.startswith(_PNG):
        width, height = struct.unpack_from(">II", data, 16)
    elif data.startswith(_GIF):
        width, height = struct.unpack_from("<HH", data, 6)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        height, width = _webp_size(data)
    else:
        raise ValueError("not a JPEG, PNG, WebP or GIF image")
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, which is none or more than {MAX_PIXELS}")
    return height, width


def _jpeg_size(data: bytes) -> tuple[int, int]:
    position = 2
    while True:
        position = data.find(b"\xff", position)
        if position < 0:
            raise ValueError("JPEG without a frame header, perhaps truncated")
        marker, length = struct.unpack_from(">BH", data, position + 1)
        if marker in _JPEG_FRAMES:
            return struct.unpack_from(">HH", data, position + 5)
        position += 1 if marker in _JPEG_WITHOUT_LENGTH else 2 + length


def _webp_size(data: bytes) -> tuple[int, int]:
    if data[12:16] == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        return (high_height << 16 | low_height) + 1, (high_width << 16 | low_width) + 1
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF


def _check_png(data: bytes) -> None:
    """Raises `ValueError` for a PNG whose pixel data would crash the process in torchvision.

    An error of libpng while it reads rows is a segmentation fault in torchvision (seen in 0.29), not an
    exception. It cannot happen once the checksums hold and the pixel data is complete, with valid filters.
    """
    chunks = dropwhile(lambda chunk: chunk[0] != b"IDAT", list(_png_chunks(data)))
    packed = b"".join(body for _, body in takewhile(lambda chunk: chunk[0] == b"IDAT", chunks))
    scans = _png_scans(data)
    length = sum(rows * stride for rows, stride in scans)
    # The window size is the header's, as for libpng. One byte more, so that zlib goes on to its checksum.
    unpacker = zlib.decompressobj(wbits=0)
    pixels = unpacker.decompress(packed, length + 1)
    if not unpacker.eof or len(pixels) != length:
        raise ValueError(f"corrupt PNG: its pixel data is not of {length} bytes")
    start = 0
    for rows, stride in scans:
        if max(pixels[start : start + rows * stride : stride]) > 4:
            raise ValueError("corrupt PNG: unknown filter")
        start += rows * stride


def _png_scans(data: bytes) -> list[tuple[int, int]]:
    """Rows, and bytes of a row with its filter, of each pass over the image."""
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * _PNG_CHANNELS.get(color, 0)
    scans = []
    for x, y, step_x, step_y in _PNG_PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            scans.append((rows, 1 + -(-columns * bits // 8)))
    return scans


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk up to the last."""
    position, kind = len(_PNG), b""
    while kind != b"IEND":
        if position + 12 > len(data):
            raise ValueError("truncated PNG")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            raise ValueError("truncated PNG")
        if zlib.crc32(data[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError(f"corrupt PNG: wrong checksum of {kind.decode('latin-1')}")
        yield kind, data[position + 8 : end]
        position = end + 4
