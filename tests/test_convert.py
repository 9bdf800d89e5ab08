"""Other people's detectors as ours: torchvision's own detections, published names, conventions, bad files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CONFIG, SHORT
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

import clis
from clis.__main__ import main
from clis.commands import run_verb
from clis.commands.convert import convert
from clis.config_files import config_from_dict, merge_overrides
from clis.data.images import read_image
from clis.engine.checkpoint import load_checkpoint, load_model
from clis.models import ImageDetections, build_model
from clis.models.weight_files import read_weights

COCO_MINI = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"
SMALL = ("test.short_side=128", "test.max_size=160", "model.rpn.anchor_scale=2", "test.detections=500")
NUM_CLASSES = 6


def annotation_file(path: Path, ids: list[int]) -> Path:
    """A COCO-form file with one image and categories of these ids."""
    document = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 64, "width": 64}],
        "categories": [{"id": i, "name": f"class {i}"} for i in ids],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": i, "bbox": [8, 8, 20, 20], "area": 400, "iscrowd": 0}
            for n, i in enumerate(ids, start=1)
        ],
    }
    path.write_text(json.dumps(document))
    return path


def smooth_image(height: int, width: int, seed: int) -> Tensor:
    """Color blobs of several sizes: features that differ from place to place."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    for cells in (3, 8, 24):
        blobs = torch.rand(1, 3, cells, cells, generator=generator)
        image += nn.functional.interpolate(blobs, size=(height, width), mode="bilinear") / 3
    return (image[0] * 255).to(torch.uint8)


def random_statistics(network: nn.Module, eps: float) -> None:
    """Batch norms with statistics like a trained network's, some with variances for which `eps` matters."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, std=0.1)
            module.running_var[::16] = 1e-5
            module.weight.data[::16] *= 0.003


@torch.no_grad()
def spread(detector: nn.Module, image: Tensor) -> None:
    """Rescales the last layers so that on `image` scores range over 0..1 and boxes move."""
    images, _ = detector.transform([image.double() / 255])
    features = detector.backbone(images.tensors)
    head = detector.rpn.head
    hidden = torch.cat([head.conv(feature).flatten(2) for feature in features.values()], dim=2)[0].T
    for layer, std in ((head.cls_logits, 2.0), (head.bbox_pred, 0.3)):
        _rescale(layer, hidden @ layer.weight.flatten(1).T, std)
    proposals, _ = detector.rpn(images, features)
    heads = detector.roi_heads
    pooled = heads.box_head(heads.box_roi_pool(features, proposals, images.image_sizes))
    for layer, std in ((heads.box_predictor.cls_score, 2.5), (heads.box_predictor.bbox_pred, 1.0)):
        _rescale(layer, pooled @ layer.weight.T, std)


def _rescale(layer: nn.Module, outputs: Tensor, std: float) -> None:
    factors = std / outputs.std(dim=0)
    layer.weight.mul_(factors.view(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.copy_(-outputs.mean(dim=0) * factors)


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """torchvision's detector with random weights, float64, and norm_eps 0 as with its COCO weights."""
    torch.manual_seed(0)
    detector = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1,
        min_size=128, max_size=160, box_detections_per_img=500,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5),
    )  # fmt: skip
    detector.roi_heads.box_head = TwoMLPHead(256 * 7**2, 64)
    detector.roi_heads.box_predictor = FastRCNNPredictor(64, NUM_CLASSES + 1)
    random_statistics(detector, eps=0.0)
    detector = detector.eval().double()
    spread(detector, smooth_image(120, 160, seed=9))
    return detector.float().double()  # with weights that a file of float32 holds


@pytest.fixture(scope="module")
def converted(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchvision")
    torch.save({name: value.float() for name, value in theirs.state_dict().items()}, folder / "theirs.pth")
    annotations = annotation_file(folder / "annotations.json", list(range(1, NUM_CLASSES + 1)))
    convert(folder / "theirs.pth", folder / "ours.pt", annotations, overrides=SMALL)
    return folder / "ours.pt"


def ours_from(checkpoint: Path, *overrides: str) -> clis.CLISDetector:
    """The converted detector with other settings; float64, so that no rounding decides a suppression."""
    state = load_checkpoint(checkpoint)
    config = config_from_dict(merge_overrides(state["config"], overrides))
    return load_model(state, config, str(checkpoint)).double().eval()


# The grids of P6 are of 3 x 2 and 1 x 3 cells, 160 // 3 = 53 pixels apart along the longer side.
IMAGES = [smooth_image(333, 250, 1), smooth_image(97, 301, 2)]


@torch.no_grad()
def detections_of(theirs: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    return theirs([image.double() / 255 for image in images])


@pytest.fixture(scope="module")
def expected(theirs: nn.Module) -> dict[str, Tensor]:
    """Of the first image alone."""
    return detections_of(theirs, IMAGES[:1])[0]


def differing(found: ImageDetections, expected: dict[str, Tensor]) -> int:
    """Detections of theirs that ours do not have, by label, box within 0.01 px and score within 1e-4."""
    same = found.labels[:, None] == expected["labels"] - 1
    same &= (found.boxes[:, None] - expected["boxes"]).abs().amax(dim=2) < 0.01
    same &= (found.scores[:, None] - expected["scores"]).abs() < 1e-4
    return int((~same.any(dim=0)).sum())


# --- torchvision's own detections ---


def test_detections_equal_torchvision(theirs, converted, expected):
    ours = ours_from(converted)
    found = ours.detect(IMAGES[:1]) + ours.detect(IMAGES)
    # each alone: torchvision's see the padding of larger images of their batch, ours do not
    alone = [reference for image in IMAGES for reference in detections_of(theirs, [image])]
    for detections, reference in zip(found, [expected, *alone], strict=True):
        assert len(reference["boxes"]) > 50
        assert reference["scores"].max() > 0.9
        assert len(reference["labels"].unique()) > 2
        torch.testing.assert_close(detections.boxes, reference["boxes"], atol=0.01, rtol=0)
        torch.testing.assert_close(detections.scores, reference["scores"], atol=1e-4, rtol=0)
        assert torch.equal(detections.labels, reference["labels"] - 1)


def test_float32_detections_equal_torchvision(converted, expected):
    (found,) = clis.load_detector(converted).detect(IMAGES[:1])
    # in float32 an IoU at the threshold may go the other way
    assert differing(found, expected) <= len(expected["boxes"]) // 50


@pytest.mark.parametrize(
    "override",
    [
        "model.backbone.norm_eps=1e-5", "model.rpn.round_anchors=false", "model.rpn.anchor_spacing=stride",
        "model.roi.sampling_ratio=0", "model.roi.aligned=true", "test.resize=pillow", "test.resize=opencv",
    ],
)  # fmt: skip
def test_every_setting_is_needed(converted, expected, override):
    assert differing(ours_from(converted, override).detect(IMAGES[:1])[0], expected) > 0


@pytest.mark.skipif(not COCO_MINI.exists(), reason="sample data is not here")
def test_detections_of_photographs_equal_torchvision(theirs, converted):
    paths = sorted((COCO_MINI / "images").iterdir())
    images = [read_image(path) for path in paths[:: len(paths) // 2][:2]]
    alone = [reference for image in images for reference in detections_of(theirs, [image])]
    for found, reference in zip(ours_from(converted).detect(images), alone):
        assert len(found.boxes) == len(reference["boxes"]) > 20
        assert differing(found, reference) == 0


# --- published names ---


def baseline(num_classes: int, *overrides: str) -> dict[str, Tensor]:
    """The random state of a narrow plain Faster R-CNN, of ResNet-50 where no override says otherwise."""
    narrow = ("model.backbone={width: 16, fpn_channels: 8}", "model.roi.fc_dim=12")
    config = config_from_dict(merge_overrides({}, ["clis=off", *narrow, *overrides]))
    torch.manual_seed(1)
    model = build_model(config, range(num_classes))
    return {name: torch.randn(value.shape) for name, value in model.state_dict().items()}


BLOCKS = {"resnet10": [1, 1, 1, 1], "resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}
HEADS = {
    "rpn.conv": ("rpn.head.conv.0.0", "rpn_head.rpn_conv", "proposal_generator.rpn_head.conv"),
    "rpn.objectness": (
        "rpn.head.cls_logits", "rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits",
    ),
    "rpn.deltas": ("rpn.head.bbox_pred", "rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"),
    "classification.sub_network.fc1": (
        "roi_heads.box_head.fc6", "roi_head.bbox_head.shared_fcs.0", "roi_heads.box_head.fc1",
    ),
    "classification.sub_network.fc2": (
        "roi_heads.box_head.fc7", "roi_head.bbox_head.shared_fcs.1", "roi_heads.box_head.fc2",
    ),
    "classification.fc_cls": (
        "roi_heads.box_predictor.cls_score", "roi_head.bbox_head.fc_cls", "roi_heads.box_predictor.cls_score",
    ),
    "localization.fc_box": (
        "roi_heads.box_predictor.bbox_pred", "roi_head.bbox_head.fc_reg", "roi_heads.box_predictor.bbox_pred",
    ),
}  # fmt: skip
"""Ours, and what torchvision, mmdetection and detectron2 call it."""
KINDS = ("torchvision", "mmdetection", "detectron2")


def published(kind: str, resnet: str, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that the kind's own code would have written, of our parameters."""
    state: dict[str, Tensor] = {}
    detectron2 = kind == "detectron2"
    body = {"torchvision": "backbone.body", "mmdetection": "backbone", "detectron2": "backbone.bottom_up"}[
        kind
    ]

    def layer(theirs: str, name: str) -> None:
        for part in ("weight", "bias"):
            state[f"{theirs}.{part}"] = ours[f"{name}.{part}"]

    def conv_norm(theirs: str, conv: str, norm: str, our_conv: str, our_norm: str) -> None:
        state[f"{theirs}.{conv}.weight"] = ours[f"backbone.body.{our_conv}.weight"]
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{theirs}.{norm}.{part}"] = ours[f"backbone.body.{our_norm}.{part}"]
        if not detectron2:
            state[f"{theirs}.{norm}.num_batches_tracked"] = torch.tensor(7)

    conv_norm(
        f"{body}.stem" if detectron2 else body, "conv1", "conv1.norm" if detectron2 else "bn1", "conv1", "bn1"
    )
    for stage, blocks in enumerate(BLOCKS[resnet], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            theirs = f"{body}.res{stage + 1}.{block}" if detectron2 else f"{body}.{name}"
            for i in range(1, 3 if resnet == "resnet10" else 4):
                norm = f"conv{i}.norm" if detectron2 else f"bn{i}"
                conv_norm(theirs, f"conv{i}", norm, f"{name}.conv{i}", f"{name}.bn{i}")
            if f"backbone.body.{name}.downsample.0.weight" in ours:
                shortcut = ("shortcut", "shortcut.norm") if detectron2 else ("downsample.0", "downsample.1")
                conv_norm(theirs, *shortcut, f"{name}.downsample.0", f"{name}.downsample.1")
    for level in range(4):
        inner, outer = {
            "torchvision": (f"backbone.fpn.inner_blocks.{level}.0", f"backbone.fpn.layer_blocks.{level}.0"),
            "mmdetection": (f"neck.lateral_convs.{level}.conv", f"neck.fpn_convs.{level}.conv"),
            "detectron2": (f"backbone.fpn_lateral{level + 2}", f"backbone.fpn_output{level + 2}"),
        }[kind]
        layer(inner, f"backbone.fpn.inner_blocks.{level}.0")
        layer(outer, f"backbone.fpn.layer_blocks.{level}.0")
    for name, theirs in HEADS.items():
        layer(theirs[KINDS.index(kind)], name)
    if kind == "torchvision":  # background first, with boxes
        for part in ("weight", "bias"):
            logits, boxes = (f"roi_heads.box_predictor.{name}.{part}" for name in ("cls_score", "bbox_pred"))
            state[logits] = state[logits].roll(1, dims=0)
            state[boxes] = torch.cat([torch.full_like(state[boxes][:4], 9.0), state[boxes]])
    return state


def converted_state(folder: Path, weights: object, ids: list[int], **options) -> dict:
    """The checkpoint of weights that are written to a file first."""
    torch.save(weights, folder / "theirs.pth")
    annotations = annotation_file(folder / "annotations.json", ids)
    convert(folder / "theirs.pth", folder / "ours.pt", annotations, **options)
    return load_checkpoint(folder / "ours.pt")


def assert_same_parameters(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("localization.sub_network"):  # the classification's, by another name
            value = expected[name.replace("localization", "classification")]
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize(
    ("kind", "resnet", "class_agnostic"),
    [
        ("torchvision", "resnet50", False), ("mmdetection", "resnet101", False),
        ("mmdetection", "resnet50", True), ("detectron2", "resnet50", False),
    ],
)  # fmt: skip
def test_published_names_are_our_parameters(kind, resnet, class_agnostic, tmp_path):
    state = baseline(5, f"model.backbone.name={resnet}", f"model.roi.class_agnostic_boxes={class_agnostic}")
    weights = published(kind, resnet, state)
    file = {
        "torchvision": weights,
        "mmdetection": {"meta": {"epoch": 12}, "state_dict": weights},
        "detectron2": {"model": weights, "iteration": 89999},
    }[kind]
    found = converted_state(tmp_path, file, [3, 5, 6, 8, 9], style="pytorch")
    assert_same_parameters(found["model"], state)
    assert [category["id"] for category in found["categories"]] == [3, 5, 6, 8, 9]
    model = config_from_dict(found["config"]).model
    assert model.roi.class_agnostic_boxes == class_agnostic
    assert (model.roi.fc_dim, model.backbone.fpn_channels, model.backbone.width) == (12, 8, 16)


def test_detectron2_pickles_and_caffe_style(tmp_path):
    state = baseline(5)
    weights = {name: value.numpy() for name, value in published("detectron2", "resnet50", state).items()}
    weights["pixel_mean"] = np.array([103.53, 116.28, 123.675], dtype=np.float32).reshape(3, 1, 1)
    weights["pixel_std"] = np.ones((3, 1, 1), dtype=np.float32)
    weights["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4))
    annotations = annotation_file(tmp_path / "annotations.json", [1, 2, 3, 4, 5])
    # conv1 sees (x - mean) / std of red, green, blue instead of x - mean of blue, green, red
    red, green, blue = (state["backbone.body.conv1.weight"][:, channel] for channel in (2, 1, 0))
    expected = state | {
        "backbone.body.conv1.weight": torch.stack([58.395 * red, 57.12 * green, 57.375 * blue], dim=1)
    }
    for protocol in (2, 4, 5):
        (tmp_path / "theirs.pkl").write_bytes(
            pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}, protocol)
        )
        convert(tmp_path / "theirs.pkl", tmp_path / f"{protocol}.pt", annotations)
        found = load_checkpoint(tmp_path / f"{protocol}.pt")
        assert_same_parameters(found["model"], expected)
        assert found["config"]["model"]["backbone"]["stride_in_1x1"]
    with pytest.raises(ValueError, match="pixel_mean"):
        convert(tmp_path / "theirs.pkl", tmp_path / "rgb.pt", annotations, style="pytorch")


def test_caffe_style_equals_a_network_that_sees_blue_green_red(tmp_path):
    """torchvision's ResNet with the strides in the 1x1 convolutions, on x - mean, padded with zeros."""
    torch.manual_seed(2)
    network = resnet50(weights=None).eval()
    random_statistics(network, eps=1e-5)
    for stage in (network.layer2, network.layer3, network.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    nn.init.normal_(network.conv1.weight, std=0.1 / 58)
    state = baseline(3, "model.backbone.width=64")
    for name, value in network.state_dict().items():
        if f"backbone.body.{name}" in state:
            state[f"backbone.body.{name}"] = value
    found = converted_state(tmp_path, published("mmdetection", "resnet50", state), [1, 2, 3], style="caffe")
    ours = load_model(found, config_from_dict(found["config"]), "ours").double().eval().backbone
    image = smooth_image(50, 83, 0)
    seen = torch.zeros(1, 3, 64, 96, dtype=torch.float64)
    seen[0, :, :50, :83] = image.flip(0) - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    layers = {f"layer{i}": str(i) for i in (1, 2, 3, 4)}
    expected = IntermediateLayerGetter(network.double(), layers)(seen)
    for level, reference in zip(ours.body(ours.batch([image])), expected.values(), strict=True):
        torch.testing.assert_close(level, reference, atol=1e-5, rtol=1e-5)


def test_torchvision_files_from_before_0_13(tmp_path):
    state = baseline(4)
    weights = {
        name.replace("conv.0.0.", "conv.").replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        if name.startswith(("backbone.fpn", "rpn"))
        else name: value
        for name, value in published("torchvision", "resnet50", state).items()
    }
    assert {"rpn.head.conv.bias", "backbone.fpn.inner_blocks.3.bias"} <= weights.keys()
    assert_same_parameters(converted_state(tmp_path, weights, [1, 2, 3, 4])["model"], state)


def test_outputs_that_are_category_ids(tmp_path, capsys):
    """COCO in small: 9 outputs behind background, of which 3, 5, 6 and 8 are no category."""
    state = baseline(9)
    state["classification.fc_cls.bias"] = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    state["localization.fc_box.bias"] = torch.arange(1.0, 10).repeat_interleave(4)
    found = converted_state(tmp_path, published("torchvision", "resnet50", state), [1, 2, 4, 7, 9])["model"]
    assert found["classification.fc_cls.bias"].tolist() == [1, 2, 4, 7, 9, 0]
    assert found["localization.fc_box.bias"].view(5, 4)[:, 0].tolist() == [1, 2, 4, 7, 9]
    assert "4 of 9 outputs" in capsys.readouterr().out
    # mmdetection and detectron2 have no outputs but classes
    (tmp_path / "ours.pt").unlink()
    weights = published("mmdetection", "resnet50", state)
    with pytest.raises(ValueError, match=r"a detector of 9 classes, but .*annotations\.json has 5"):
        converted_state(tmp_path, weights, [1, 2, 4, 7, 9])


def test_an_average_of_torchvisions_references(tmp_path):
    """--model-ema of its training script: DDP's prefix, and a counter beside the model."""
    state = baseline(4)
    weights = {f"module.{name}": x for name, x in published("torchvision", "resnet50", state).items()}
    weights["n_averaged"] = torch.tensor(7)
    assert_same_parameters(converted_state(tmp_path, weights, [1, 2, 3, 4])["model"], state)


def test_a_mask_head_is_left_out_and_said_so(tmp_path, capsys):
    state = baseline(4)
    weights = published("mmdetection", "resnet50", state)
    weights["roi_head.mask_head.convs.0.conv.weight"] = torch.zeros(2, 2)
    assert_same_parameters(converted_state(tmp_path, weights, [1, 2, 3, 4])["model"], state)
    assert "1 parameters of the mask or keypoint head" in capsys.readouterr().out


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"roi_heads.box_head.fc8.weight": torch.zeros(2), "backbone.body.fc.bias": torch.zeros(2)},
            "no part of torchvision's Faster R-CNN with FPN: roi_heads.box_head.fc8.weight, backbone.body.fc",
        ),
        (
            {"backbone.body.layer3.5.bn2.running_mean": None},
            "missing backbone.body.layer3.5.bn2.running_mean",
        ),
        ({"backbone.body.conv1.weight": None}, "backbone.body.conv1.weight .* is missing"),
        ({"rpn.head.cls_logits.bias": torch.zeros(7)}, r"rpn.objectness.bias is \[7\], the model's is \[3\]"),
        ({"backbone.body.layer3.6.conv1.weight": torch.zeros(2)}, r"a ResNet of \[3, 4, 7, 3\] blocks"),
        ({"roi_heads.box_predictor.bbox_pred.weight": torch.zeros(16, 12)}, "of 5 rows with .* of 16"),
        ({"roi_heads.box_head.fc6.weight": None}, "no Faster R-CNN with FPN that is known: .*fc6.weight"),
        ({"epoch": 12}, "epoch is a int, not a tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_of_another_network_are_named(changes, message, tmp_path):
    state = baseline(4)
    weights = published("torchvision", "resnet50", state) | changes
    weights = {name: value for name, value in weights.items() if value is not None}
    with pytest.raises(ValueError, match=rf"theirs\.pth: .*{message}"):
        converted_state(tmp_path, weights, [1, 2, 3, 4])
    assert not (tmp_path / "ours.pt").exists()


class Harmful:
    """What pickle would call when it reads this: here, a file that appears."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_of_a_pickle(protocol, tmp_path):
    arrays = {
        "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "big-endian": np.arange(6, dtype=">f8").reshape(3, 2),
        "column-major": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "one number": np.array(5, dtype=np.float16),
    }
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(arrays, protocol))
    found = read_weights(tmp_path / "weights.pkl")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert found[name].tolist() == array.tolist()
    (tmp_path / "objects.pkl").write_bytes(pickle.dumps({"a": np.array([{}, 5], dtype=object)}, protocol))
    with pytest.raises(ValueError, match=r"objects\.pkl: not readable"):
        read_weights(tmp_path / "objects.pkl")


@pytest.mark.parametrize("name", ["weights.pkl", "weights.pth"])
def test_no_code_of_a_file_is_run(name, tmp_path):
    content = {"model": {"a": np.zeros(2), "b": Harmful(tmp_path / "was here")}}
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: not readable without running code in it .*torch\.save"):
        read_weights(tmp_path / name)
    assert not (tmp_path / "was here").exists()


def test_nothing_is_overwritten(tmp_path):
    annotations = annotation_file(tmp_path / "annotations.json", [1])
    (tmp_path / "there.pt").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"there\.pt already exists"):
        convert(tmp_path / "theirs.pth", tmp_path / "there.pt", annotations)
    with pytest.raises(ValueError, match=r"ours\.pth: the name of a checkpoint ends in \.pt"):
        convert(tmp_path / "theirs.pth", tmp_path / "ours.pth", annotations)
    with pytest.raises(FileNotFoundError, match=r"theirs\.pth: no such file"):
        convert(tmp_path / "theirs.pth", tmp_path / "ours.pt", annotations)


# --- the command, and what takes its checkpoint ---


def test_the_command_evaluation_and_regions(data, tmp_path, capsys):
    annotations = data / "shapes" / "train.json"
    num_classes = clis.load_annotations(annotations).num_classes
    state = baseline(num_classes, "model.backbone.name=resnet10")
    for name in state:
        if "running_var" in name:
            state[name] = state[name].abs() + 0.5
    torch.save({"state_dict": published("mmdetection", "resnet10", state)}, tmp_path / "theirs.pth")
    checkpoint = tmp_path / "ours.pt"
    paths = ["data.val=shapes/val.json", "data.val_images=shapes", f"data.root={data}", "data.workers=0"]
    small = ["test.short_side=48", "model.rpn.proposals=20"]
    main(
        ["convert", str(tmp_path / "theirs.pth"), str(checkpoint), *paths, *small, "train.device=cpu"]
        + ["--annotations", str(annotations)]
    )  # fmt: skip
    told = capsys.readouterr().out
    assert f"mmdetection, pytorch style, {num_classes} classes" in told
    assert "test.resize: opencv != pillow" in told

    run_verb("evaluate", [str(checkpoint)])
    metrics = json.loads((tmp_path / "ours" / "eval.json").read_text())
    assert 0 <= metrics["AP"] <= 1
    main(
        ["regions", CONFIG, *SHORT, f"data.root={data}", f"output={tmp_path / 'run'}"]
        + [f"regions.detector={checkpoint}"]
    )
    assert len(np.load(tmp_path / "run" / "regions.npy")) > 0
