"""What `detect` takes: the same detections however an image comes, and one line for everything else."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from conftest import make_model, make_sample
from PIL import Image

from clis.data.images import ImageError
from clis.models.inputs import as_tensors

PIXELS = make_sample(0, size=(40, 60)).image
ARRAY = PIXELS.permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def model():
    return make_model("test.score_threshold=0.0").eval()


def same(found, expected) -> bool:
    keys = ("boxes", "scores", "labels")
    return all(torch.equal(getattr(found, key), getattr(expected, key)) for key in keys)


def test_a_path_a_picture_an_array_and_a_tensor_give_the_same_detections(model, tmp_path):
    """A lossless file, so that all have the same pixels; the reference is a list of one tensor."""
    path, picture = tmp_path / "image.png", Image.fromarray(ARRAY)
    picture.save(path)
    (expected,) = model.detect([PIXELS])
    assert len(expected.boxes) > 0
    for image in (path, str(path), picture, ARRAY, PIXELS):
        for given in (image, [image], (image,)):
            (found,) = model.detect(given)
            assert same(found, expected), type(image)


def test_many_of_all_kinds_and_stacked_batches(model):
    other = make_sample(1, size=(40, 60)).image
    expected = model.detect([PIXELS, other])
    for images in (
        [Image.fromarray(ARRAY), other],
        torch.stack([PIXELS, other]),
        np.stack([ARRAY, other.permute(1, 2, 0).numpy()]),
    ):
        assert all(map(same, model.detect(images), expected))
    assert model.detect([]) == []


def test_boxes_of_a_turned_photo_are_those_of_the_displayed_one(model, tmp_path):
    """EXIF orientation 6: the stored 40 x 60 pixels are shown as 60 x 40, turned clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ARRAY).save(tmp_path / "turned.png", exif=exif)
    shown = Image.fromarray(ARRAY).transpose(Image.Transpose.ROTATE_270)
    for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert same(model.detect(image)[0], model.detect(shown)[0])


def test_arrays_that_are_views():
    """OpenCV's BGR turned to RGB has a negative stride, which PyTorch does not take; of memory that is
    read-only, as that of `np.asarray(picture)`, it warns."""
    bgr = np.ascontiguousarray(ARRAY[..., ::-1])
    assert torch.equal(as_tensors(bgr[..., ::-1])[0], PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(as_tensors(np.asarray(Image.fromarray(ARRAY)))[0], PIXELS)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_pictures_of_other_modes_become_rgb(mode):
    picture = Image.fromarray(ARRAY).convert(mode)
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(as_tensors(picture)[0].permute(1, 2, 0).numpy(), expected)
    assert picture.mode == mode


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS / 255, "image 0 is a tensor of float32; uint8 in 0..255 is needed.*multiplying by 255"),
        (PIXELS.float(), "image 0 is a tensor of float32; uint8 in 0..255 is needed: round and convert"),
        ([PIXELS, ARRAY / 255], "image 1 is an array of float64; uint8"),
        (ARRAY.astype(np.uint16), "image 0 is an array of uint16.*scale it to 0..255 and convert it"),
        (PIXELS.permute(1, 2, 0), r"image 0 is a tensor of shape \[40, 60, 3\]; \[3,H,W\], RGB, is needed"),
        (PIXELS.numpy(), r"image 0 is an array of shape \[3, 40, 60\]; \[H,W,3\], RGB, is needed"),
        (PIXELS[0], r"a tensor of shape \[40, 60\]"),
        (PIXELS[:, :0], r"a tensor of shape \[3, 0, 60\]"),
        (None, "^NoneType is not an image; give a path, a Pillow image, an RGB array"),
        (b"image.png", "^bytes is not an image"),
        (iter([PIXELS]), "^list_iterator is not an image.*or a list of them"),
        ([PIXELS, 3], "image 1 is of type int; give a path"),
        ([[PIXELS]], "image 0 is of type list; give a path"),
    ],
)
def test_anything_else_is_one_line(model, image, message):
    with pytest.raises(ValueError, match=message) as caught:
        model.detect(image)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_images_are_named(model, tmp_path):
    (tmp_path / "note.jpg").write_text("not an image")
    for name, why in (("note.jpg", "not a JPEG"), ("none.jpg", "No such file")):
        with pytest.raises(ImageError, match=f"{name}: {why}"):
            model.detect(tmp_path / name)
