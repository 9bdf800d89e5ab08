"""Decoding: against Pillow for every kind of file, and every failure an `ImageError` that names the file."""

import errno
import gzip
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from clis.data import images
from clis.data.images import (
    ImageError,
    as_displayed,
    decode_image,
    open_image,
    read_bytes,
    read_image,
    read_photo,
)
from clis.models.inputs import as_tensors
from clis.resize import resize_image

HEIGHT, WIDTH = 21, 34
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
PICTURE = np.stack([ROWS * 8, COLUMNS * 6, ROWS + COLUMNS], axis=2).astype(np.uint8)
KINDS = [
    ("JPEG", "RGB", {"quality": 95, "subsampling": 0}),
    ("JPEG", "RGB", {"quality": 95, "progressive": True}),
    ("JPEG", "L", {"quality": 95}),
    ("JPEG", "CMYK", {"quality": 95}),
    ("PNG", "RGB", {}),
    ("PNG", "L", {}),
    ("PNG", "LA", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", {}),
    ("PNG", "P", {"transparency": bytes([0, 128, 7])}),
    ("PNG", "1", {}),
    ("GIF", "P", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {}),
    ("BMP", "RGB", {}),
    ("BMP", "P", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "L", {"compression": "tiff_lzw"}),
    ("TIFF", "CMYK", {}),
]


def encoded(kind="PNG", mode="RGB", picture=PICTURE, **options):
    file = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(file, kind, **options)
    return file.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, pixels, *, depth=8, color=2, interlaced=0):
    """A PNG with right checksums of whatever zlib stream."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS)
def test_pixels_are_those_of_pillow(kind, mode, options):
    data = encoded(kind, mode, **options)
    image = decode_image(data, "a")
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert image.dtype == torch.uint8
    tolerance = 3 if kind == "JPEG" else 0  # torchvision's libjpeg may round differently
    np.testing.assert_allclose(
        image.permute(1, 2, 0).numpy().astype(int), expected.astype(int), atol=tolerance
    )


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(kind, exif=exif)
        assert decode_image(data, "a").shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
def test_photos_are_turned_as_pillow_turns_them(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.png").write_bytes(encoded(exif=exif))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    image, turned = read_photo(tmp_path / "a.png")
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert turned == (2 <= orientation <= 8)
    with Image.open(tmp_path / "a.png") as opened:
        np.testing.assert_array_equal(as_displayed(opened).permute(1, 2, 0).numpy(), expected)
        assert opened.getexif()[0x0112] == orientation  # the caller's image is as it was


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_once(orientation, tmp_path):
    """Pillow turns a TIFF when it decodes it, so that nothing is left to turn."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PICTURE).save(tmp_path / "a.tif", exif=exif)
    Image.fromarray(PICTURE).save(tmp_path / "a.png", exif=exif)
    expected = read_photo(tmp_path / "a.png")[0]
    image = open_image((tmp_path / "a.tif").read_bytes(), "a")
    assert image.size == expected.shape[1:]
    assert image.orientation() == 1
    np.testing.assert_array_equal(image.decode(), expected)
    np.testing.assert_array_equal(read_photo(tmp_path / "a.tif")[0], expected)
    with Image.open(tmp_path / "a.tif") as opened:
        np.testing.assert_array_equal(as_displayed(opened), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(dtype, tmp_path):
    """Read as 16-bit numbers, 0..255 were black; as floats, 0..1 were."""
    Image.fromarray(np.array([[0, 100, 255]], dtype=dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="a: 32-bit gray"):
        decode_image((tmp_path / "a.tif").read_bytes(), "a")
    with pytest.raises(ValueError, match="image 1: 32-bit gray"), Image.open(tmp_path / "a.tif") as opened:
        as_tensors([PICTURE, opened])


def test_what_the_machine_lacks_is_not_the_image_s_fault(tmp_path, monkeypatch):
    """Else a sound image would be replaced by its neighbor."""
    (tmp_path / "a.png").write_bytes(encoded())

    def raising(error):
        def fail(*_):
            raise error

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", raising(OSError(errno.EMFILE, "Too many open files")))
        with pytest.raises(OSError, match="Too many open files"):
            read_bytes(tmp_path / "a.png")
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(images, "_opened", raising(error))
        with pytest.raises(type(error)) as raised:
            decode_image(encoded(), "a")
        assert raised.value is error


def test_sixteen_bits_keep_the_upper_eight():
    row = b"\0" + struct.pack(">6H", 0x1234, 0x00FF, 0xFFFF, 0x8000, 0x7FFF, 0x0100)
    image = decode_image(png(2, 1, zlib.compress(row), depth=16), "a")
    assert image.permute(1, 2, 0).tolist() == [[[0x12, 0x00, 0xFF], [0x80, 0x7F, 0x01]]]
    gray = decode_image(png(6, 1, zlib.compress(row), depth=16, color=0), "a")
    assert gray.tolist() == [[[0x12, 0x00, 0xFF, 0x80, 0x7F, 0x01]]] * 3
    for color in (4, 6):  # with alpha, which is dropped
        pixels = decode_image(png(12 // (2 * color - 4), 1, zlib.compress(row), depth=16, color=color), "a")
        assert pixels[:, 0, 0].tolist() == {4: [0x12, 0x12, 0x12], 6: [0x12, 0x00, 0xFF]}[color]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (4, 3), (shade, shade, shade)) for shade in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], lossless=True)
    image = decode_image(file.getvalue(), "a")
    assert image.shape == (3, 3, 4)
    assert (image == 10).all()
    assert image.untyped_storage().nbytes() == 3 * 3 * 4


def test_gif_that_is_cut_off_in_its_second_frame():
    frames = [Image.new("RGB", (4, 3), (shade, shade, shade)) for shade in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(file.getvalue()[:-4], "a") == 10).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_of_a_tiff_in_either_byte_order(tmp_path, order):
    """0x1234 is 0x12 of 8 bits; clipped to them it would be white."""
    values = np.array([[0x1234, 0xFFFF, 0x00FF]], dtype=f"{order}u2")
    Image.frombytes("I;16B" if order == ">" else "I;16", (3, 1), values.tobytes()).save(tmp_path / "a.tif")
    assert decode_image((tmp_path / "a.tif").read_bytes(), "a")[0].tolist() == [[0x12, 0xFF, 0]]


def test_interlaced_png():
    """3 x 2 pixels, by Adam7: pass 1 has (0, 0), pass 4 (2, 0), pass 6 (1, 0), pass 7 row 1."""
    a, b, c = b"\1\1\1", b"\2\2\2", b"\3\3\3"
    pixels = b"\0" + a + b"\0" + c + b"\0" + b + b"\0" + c + b + a
    image = decode_image(png(3, 2, zlib.compress(pixels), interlaced=1), "a")
    assert image[0].tolist() == [[1, 2, 3], [3, 2, 1]]


def test_gzipped_bytes_are_unpacked():
    data = gzip.compress(encoded("JPEG"))
    assert torch.equal(decode_image(data, "a"), decode_image(encoded("JPEG"), "a"))
    with pytest.raises(ImageError, match=r"a: gzip data is truncated"):
        decode_image(data[:-20], "a")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404 Not Found</html>", "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"),
        (encoded("PPM"), "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"),
        (encoded("BMP")[:20], "truncated or corrupt BMP"),
        (encoded("TIFF")[:9], "truncated or corrupt TIFF"),
        (gzip.compress(b"text"), "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"),
        (b"\xff\xd8\xff", "truncated or corrupt JPEG"),
        (encoded("PNG")[:20], "truncated or corrupt PNG"),
        (png(0, 4, zlib.compress(b"")), "truncated or corrupt PNG"),
        (png(60000, 60000, zlib.compress(b"")), "60000 x 60000 pixels"),
        (encoded("JPEG").replace(struct.pack(">HH", HEIGHT, WIDTH), bytes(4)), "truncated or corrupt JPEG"),
        (encoded("GIF", "P")[:6] + b"\xff\xff\xff\xff" + encoded("GIF", "P")[10:], "65535 x 65535 pixels"),
        (b"RIFF" + encoded("WEBP")[4:8] + b"WAVE", "truncated or corrupt WEBP"),
    ],
)
def test_what_is_no_image(data, reason):
    with pytest.raises(
        ImageError, match=rf"^n01514668\.tar:foo\.JPEG: {reason}.*; replace or remove the file$"
    ):
        decode_image(data, "n01514668.tar:foo.JPEG")


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_files(kind, mode, options, share):
    data = encoded(kind, mode, **options)
    with pytest.raises(ImageError, match=r"^a: .*replace or remove the file$"):
        decode_image(data[: int(len(data) * share)], "a")


# Each of these was a segmentation fault in torchvision 0.29 and not an exception.
@pytest.mark.parametrize(
    "pixels",
    [
        b"garbage",
        zlib.compress((b"\0" + bytes(6)) * 2)[:-1] + b"\x55",
        zlib.compress((b"\x09" + bytes(6)) * 2),  # no filter is 9
    ],
)
def test_png_whose_checksums_alone_are_right(pixels):
    with pytest.raises(ImageError, match=r"^a: .*data stream.*; replace or remove the file$"):
        decode_image(png(2, 2, pixels), "a")


def test_png_of_too_few_rows_is_black_below_them():
    """As in Pillow, where all checksums are right; in torchvision 0.29 this too was a segmentation fault."""
    image = decode_image(png(2, 2, zlib.compress(b"\0" + b"\7" * 6)), "a")
    assert image.tolist() == [[[7, 7], [0, 0]]] * 3


def test_png_checksum():
    data = bytearray(encoded("PNG"))
    data[data.index(b"IDAT") + 30] ^= 1
    with pytest.raises(ImageError, match=r"^a: broken PNG file \(bad header checksum in b'IDAT'\)"):
        decode_image(bytes(data), "a")


@settings(max_examples=300)
@given(
    data=st.sampled_from([encoded(kind, mode, **options) for kind, mode, options in KINDS]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_corrupt_bytes_give_an_image_or_an_image_error(data, changes):
    corrupt = bytearray(data)
    for place, value in changes:
        corrupt[int(place * len(data))] = value
    try:
        image = decode_image(bytes(corrupt), "a")
    except ImageError as error:
        assert str(error).startswith("a: ")  # noqa: PT017
    else:
        assert (image.dtype, image.ndim, len(image)) == (torch.uint8, 3, 3)


# --- decoding at reduced size ---

LARGE = (301, 403)  # no multiple of 8: at 1/8 the last row and column are filled to 5/8 and 3/8
JPEGS = {
    "baseline": ("RGB", {"quality": 92}),
    "progressive": ("RGB", {"quality": 92, "progressive": True}),
    "full color": ("RGB", {"quality": 92, "subsampling": 0}),
    "gray": ("L", {"quality": 92}),
    "CMYK": ("CMYK", {"quality": 92}),
}


def ramps():
    """Red grows from top to bottom, green from left to right; blue has soft stripes."""
    rows, columns = np.mgrid[: LARGE[0], : LARGE[1]]
    blue = 128 + 60 * np.sin(rows / 15) * np.cos(columns / 20)
    return np.stack([rows * (255 / LARGE[0]), columns * (255 / LARGE[1]), blue], axis=2).astype(np.uint8)


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [(150, 201), (75, 100), (70, 190), (37, 50), (3, 4), (290, 40), (1, 1)])
def test_jpegs_of_any_size_show_the_same(kind, packed, size):
    """At 1/2, 1/4 and 1/8, and at sizes of which one side allows more than the other."""
    mode, options = JPEGS[kind]
    data = encoded("JPEG", mode, ramps(), **options)
    image = open_image(gzip.compress(data) if packed else data, "a")
    assert image.size == LARGE
    resized, plain = image.decode_resized(size), resize_image(image.decode(), size)
    assert resized.dtype == torch.uint8
    assert resized.shape == (3, *size)
    difference = (resized.int() - plain.int()).abs().float()
    # with the filled part of the last row and column taken for whole pixels: 13, and 4 on the average
    assert difference.max() <= 4
    assert difference.mean() <= 1


def test_jpegs_are_decoded_at_reduced_size_where_half_of_it_is_enough():
    """On noise the two ways differ visibly; where more than half is needed or it is no JPEG they are one."""
    noise = np.random.default_rng(0).integers(256, size=(*LARGE, 3), dtype=np.uint8)
    for kind, size, reduced in (
        ("JPEG", (150, 201), True),
        ("JPEG", (151, 201), False),
        ("JPEG", (150, 202), False),
        ("JPEG", LARGE, False),
        ("JPEG", (400, 500), False),
        ("PNG", (75, 100), False),
        ("WEBP", (75, 100), False),
    ):
        image = open_image(encoded(kind, picture=noise), "a")
        same = torch.equal(image.decode_resized(size), resize_image(image.decode(), size))
        assert same == (not reduced), (kind, size)


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS)
def test_other_kinds_are_decoded_whole(kind, mode, options):
    """Also CMYK, whose conversion to RGB is each decoder's own."""
    if kind != "JPEG" or mode == "CMYK":
        image = open_image(encoded(kind, mode, **options), "a")
        assert torch.equal(image.decode_resized((5, 9)), resize_image(image.decode(), (5, 9)))


def test_exif_rotation_is_not_applied_at_reduced_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded("JPEG", picture=ramps(), exif=exif)
    small = open_image(data, "a").decode_resized((30, 40))
    assert (small[1, 15, 35].int() - small[1, 15, 5].int()) > 150  # green still grows to the right


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_truncated_jpegs_at_reduced_size(kind, share):
    mode, options = JPEGS[kind]
    data = encoded("JPEG", mode, ramps(), **options)
    image = open_image(data[: int(len(data) * share)], "a")  # its header is sound
    with pytest.raises(ImageError, match=r"^a: .*replace or remove the file$"):
        image.decode_resized((30, 40))


@settings(max_examples=300)
@given(
    kind=st.sampled_from(sorted(JPEGS)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_corrupt_jpegs_at_reduced_size(kind, changes):
    mode, options = JPEGS[kind]
    corrupt = bytearray(encoded("JPEG", mode, **options))
    for place, value in changes:
        corrupt[int(place * len(corrupt))] = value
    try:
        image = open_image(bytes(corrupt), "a")
        resized = image.decode_resized((5, 8))
    except ImageError as error:
        assert str(error).startswith("a: ")  # noqa: PT017
    else:
        assert (resized.dtype, resized.shape) == (torch.uint8, (3, 5, 8))


def test_neither_large_images_nor_broken_exif_make_pillow_warn(tmp_path):
    """100 million pixels are between its limit and ours; a WebP says so where it is opened. A process, since
    pytest has filters of its own."""
    data = encoded("JPEG", picture=ramps())
    claims = data.replace(struct.pack(">HH", *LARGE), struct.pack(">HH", 10000, 10000))
    directory = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # of five entries, none of which is there
    (tmp_path / "large.jpg").write_bytes(claims)
    (tmp_path / "exif.jpg").write_bytes(
        data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(directory)) + directory + data[2:]
    )
    webp = encoded("WEBP", lossless=True)
    bits = struct.pack("<I", 9999 | 9999 << 14)
    (tmp_path / "large.webp").write_bytes(webp[:0x15] + bits + webp[0x15 + 4 :])
    script = (
        "import sys; from pathlib import Path; from clis.data.images import open_image as open\n"
        "*jpegs, webp = (open(Path(path).read_bytes(), path) for path in sys.argv[1:])\n"
        "for image in jpegs: print(image.decode_resized((3, 4)).shape)\n"
        "print(webp.size)"
    )
    command = [sys.executable, "-W", "default", "-c", script, *map(str, sorted(tmp_path.iterdir()))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "torch.Size([3, 3, 4])\n" * 2 + "(10000, 10000)\n"
    assert "PIL" not in result.stderr


def test_gif_whose_frame_is_larger_than_its_screen():
    """It has the frame's size before and after it is decoded, so boxes belong to it."""
    data = bytearray(encoded("GIF", "P"))
    data[6:10] = struct.pack("<HH", 2, 2)
    image = open_image(bytes(data), "a")
    assert image.size == (HEIGHT, WIDTH)
    assert torch.equal(image.decode(), decode_image(encoded("GIF", "P"), "a"))


@pytest.mark.parametrize("marker", [0xD0, 0xD7, 0xD9])
def test_size_of_a_jpeg_with_a_marker_that_has_no_length(marker):
    """Its next two bytes, FFEF, are another marker; taken for a length they lead to a forged frame header."""
    forged = b"\xff\xc0\0\x11\x08\0\x10\0\x10"  # of 16 x 16 pixels
    place = 2 + 2 + 0xFFEF - 8  # in the segment that begins at byte 8, behind marker and length
    body = bytes(place) + forged + bytes(0xFFFF - 2 - place - len(forged))
    jpeg = encoded("JPEG")
    data = jpeg[:2] + bytes([0xFF, marker]) + b"\xff\xef\xff\xff" + body + jpeg[2:]
    assert data[4 + 0xFFEF :].startswith(forged)
    image = open_image(data, "a")
    assert image.size == (HEIGHT, WIDTH)
    if marker != 0xD9:  # the end of the image
        assert torch.equal(image.decode(), decode_image(jpeg, "a"))


def test_jpeg_whose_decoders_disagree_about_its_size():
    """Pillow takes the last of two frame headers; torchvision has to refuse them, or agree."""
    jpeg = encoded("JPEG")
    frame = jpeg.index(b"\xff\xc0")
    length = 2 + struct.unpack_from(">H", jpeg, frame + 2)[0]
    other = jpeg[frame : frame + 5] + struct.pack(">HH", 16, 16) + jpeg[frame + 9 : frame + length]
    image = open_image(jpeg[:frame] + other + jpeg[frame:], "a")
    with pytest.raises(ImageError, match=r"^a: .*replace or remove the file$"):
        image.decode()


def test_read_image(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    np.testing.assert_array_equal(read_image(path).permute(1, 2, 0).numpy(), PICTURE)
    for missing in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(ImageError, match=rf"^{missing}: .*check the image folder"):
            read_image(missing)
    path.write_bytes(b"text")
    with pytest.raises(ImageError, match=rf"^{path}: not a JPEG"):
        read_image(path)


def test_what_must_not_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # whoever opens it waits
    with pytest.raises(ImageError, match=r"pipe\.jpg: not a regular file; check"):
        read_image(tmp_path / "pipe.jpg")
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(2**30 + 1)  # a hole: it takes no space
    with pytest.raises(ImageError, match=r"large\.jpg: 1073741825 bytes, more than 1 GiB; check"):
        read_image(tmp_path / "large.jpg")


def test_the_limit_of_pixels_is_a_setting():
    data = png(40, 30, zlib.compress(bytes(30 * (1 + 40 * 3))))
    assert open_image(data, "a", 1200).size == (30, 40)
    with pytest.raises(ImageError, match=r"a: 40 x 30 pixels, more than data\.max_pixels=1199 "):
        open_image(data, "a", 1199)
