"""Evaluation in batches: the detections of images that share a batch are those of each alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_config

from clis.data.annotations import load_annotations
from clis.engine import evaluate
from clis.models import build_model

SIZES = [(64, 80), (80, 64), (64, 70), (128, 150), (64, 64)]
"""Height and width by row, modulo 5; the third is padded as the first, and the fourth is resized."""


@pytest.mark.parametrize("canvas", ["batch", "square"])
def test_batches_have_images_of_like_shapes(canvas, data, monkeypatch):
    annotations = load_annotations(data / "shapes" / "val.json")

    def read(annotations, folder, row, max_pixels):
        generator = torch.Generator().manual_seed(row)
        return torch.randint(256, (3, *SIZES[row % 5]), dtype=torch.uint8, generator=generator)

    monkeypatch.setattr(evaluate, "read_annotated", read)
    found = []
    for images_per_batch in (1, 3):
        config = tiny_config(
            f"test.images_per_batch={images_per_batch}", f"data.root={data}", "data.workers=0",
            f"model.backbone.canvas={canvas}", "data.max_size=96", "model.roi.fc_cls_std=0.5",
        )  # fmt: skip
        torch.manual_seed(0)
        detector = build_model(config, annotations.categories).double().eval()
        sizes = []
        predict = detector.predict

        def noted(images, max_size, predict=predict, sizes=sizes):
            sizes.append([tuple(-(-side // 32) for side in image.shape[1:]) for image in images])
            return predict(images, max_size)

        monkeypatch.setattr(detector, "predict", noted)
        found.append(evaluate.run_detector(detector, config, annotations))
        assert sum(map(len, sizes)) == len(annotations)
        assert max(map(len, sizes)) == images_per_batch
        if canvas == "batch":
            assert all(len(set(each)) == 1 for each in sizes)
    one, several = found
    for name in ("image_id", "category_id"):
        assert np.array_equal(getattr(one, name), getattr(several, name))
    np.testing.assert_allclose(several.bbox, one.bbox, rtol=0, atol=1e-4)
    np.testing.assert_allclose(several.score, one.score, rtol=1e-6)


def test_detections_are_computed_in_the_precision_of_training(data):
    """In bfloat16 the network's layers are, and scores differ from float32's by its rounding alone."""
    annotations = load_annotations(data / "shapes" / "val.json")
    found, types = [], []
    for precision in ("float32", "bfloat16"):
        config = tiny_config(
            f"train.precision={precision}", f"data.root={data}", "data.val_images=shapes",
            "data.workers=0", "test.score_threshold=0",
        )  # fmt: skip
        torch.manual_seed(0)
        detector = build_model(config, annotations.categories).eval()
        detector.rpn.conv.register_forward_hook(lambda *layer: types.append(layer[-1].dtype))
        found.append(evaluate.run_detector(detector, config, annotations))
    assert [torch.float32, torch.bfloat16] == sorted(set(types), key=types.index)
    exact, rounded = (np.sort(each.score) for each in found)
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded[-100:], exact[-100:], rtol=0.05)
