"""``python -m clis convert``: a Faster R-CNN of torchvision, mmdetection or detectron2 as our checkpoint.

Parameters are renamed, classes put in our order, and the input of caffe's ResNets folded into the first
convolution; whatever else the source does in its own way is a field of the config (`Source.settings`).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clis.atomic import atomic_write
from clis.config import Config
from clis.config_files import config_differences, config_from_dict, merge_overrides
from clis.data.annotations import Annotations
from clis.data.streams import read_annotations
from clis.engine.checkpoint import detector_state
from clis.models import build_model
from clis.models.backbone import BLOCKS, IMAGE_MEAN, IMAGE_STD
from clis.models.weight_files import first_names, prefixes_of, read_weights
from clis.models.weights import load_state
from clis.progress import say

CONV1 = "backbone.body.conv1.weight"
FC_CLS, FC_BOX = "classification.fc_cls", "localization.fc_box"
SUB_NETWORK, SHARED = "classification.sub_network.", "localization.sub_network."
"""The two names of the one 2fc of a plain Faster R-CNN."""

COCO_TEST = "test={score_threshold: 0.05, detections: 100}"
"""All three's, where the annotations are not LVIS's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis convert`."""
    parser.add_argument("source", type=Path, help="its weights: .pth, or detectron2's .pkl")
    parser.add_argument("out", type=Path, help="the checkpoint to write, a .pt file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change the checkpoint's config")
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="FILE", help="LVIS or COCO-form file: the classes"
    )
    parser.add_argument(
        "--style", choices=("pytorch", "caffe"),
        help="ResNet input convention: RGB with ImageNet's std, or BGR with std 1 and strides in the 1x1 "
        "convolutions (default: caffe for detectron2, else pytorch)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Convert the weights of a public detector to a checkpoint of ours."""
    convert(arguments.source, arguments.out, arguments.annotations, arguments.style, arguments.overrides)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A public detector: how its parameters are called, and where it differs from our defaults."""

    name: str
    marker: str
    """A parameter that no other kind has."""
    names: tuple[tuple[str, str], ...]
    """Substitutions that lead, one after the other, from its names to ours."""
    left_out: str
    """Names of what is no part of the box detector: masks, keypoints, counters."""
    background_first: bool = False
    """Background is logit 0 and has boxes of its own, instead of last and without."""
    style: str = "pytorch"
    """Of its published ResNets, see `convert`."""
    settings: tuple[str, ...]
    """Overrides of our defaults, beside `clis=off` and what the shapes tell."""


TORCHVISION = Source(
    name="torchvision",
    marker="roi_heads.box_head.fc6.weight",
    names=(
        (r"^(backbone\.fpn\.\w+\.\d)\.(weight|bias)$", r"\1.0.\2"),  # without 0: before torchvision 0.13
        (r"^rpn\.head\.conv\.(0\.0\.)?", "rpn.conv."),
        (r"^rpn\.head\.cls_logits\.", "rpn.objectness."),
        (r"^rpn\.head\.bbox_pred\.", "rpn.deltas."),
        (r"^roi_heads\.box_head\.fc6\.", f"{SUB_NETWORK}fc1."),
        (r"^roi_heads\.box_head\.fc7\.", f"{SUB_NETWORK}fc2."),
        (r"^roi_heads\.box_predictor\.cls_score\.", f"{FC_CLS}."),
        (r"^roi_heads\.box_predictor\.bbox_pred\.", f"{FC_BOX}."),
    ),
    left_out=r"num_batches_tracked$|^n_averaged$|^roi_heads\.(mask|keypoint)_",  # n_averaged: --model-ema
    background_first=True,
    settings=(
        "model.backbone.norm_eps=0",  # as torchvision sets it for its COCO weights
        "model.rpn={round_anchors: true, anchor_spacing: grid, min_size: 0.001, shrink_limit: 0}",
        "model.roi={sampling_ratio: 2, aligned: false}",
        "test={min_size: 0.01, shrink_limit: 0, resize: torchvision}",
    ),
)
MMDETECTION = Source(
    name="mmdetection",
    marker="roi_head.bbox_head.fc_cls.weight",
    names=(
        (r"^backbone\.", "backbone.body."),
        (r"^neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
        (r"^neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
        (r"^rpn_head\.rpn_conv\.", "rpn.conv."),
        (r"^rpn_head\.rpn_cls\.", "rpn.objectness."),
        (r"^rpn_head\.rpn_reg\.", "rpn.deltas."),
        (r"^roi_head\.bbox_head\.shared_fcs\.0\.", f"{SUB_NETWORK}fc1."),
        (r"^roi_head\.bbox_head\.shared_fcs\.1\.", f"{SUB_NETWORK}fc2."),
        (r"^roi_head\.bbox_head\.fc_cls\.", f"{FC_CLS}."),
        (r"^roi_head\.bbox_head\.fc_reg\.", f"{FC_BOX}."),
    ),
    left_out=r"num_batches_tracked$|^roi_head\.mask_head\.",
    settings=("test.resize=opencv",),
)
DETECTRON2 = Source(
    name="detectron2",
    marker="proposal_generator.rpn_head.objectness_logits.weight",
    names=(
        (r"^backbone\.bottom_up\.stem\.", "backbone.body."),
        *((rf"^backbone\.bottom_up\.res{n}\.", f"backbone.body.layer{n - 1}.") for n in range(2, 6)),
        (r"^(backbone\.body\..*)conv(\d)\.norm\.", r"\1bn\2."),
        (r"^(backbone\.body\..*)shortcut\.norm\.", r"\1downsample.1."),
        (r"^(backbone\.body\..*)shortcut\.", r"\1downsample.0."),
        *((rf"^backbone\.fpn_lateral{n}\.", f"backbone.fpn.inner_blocks.{n - 2}.0.") for n in range(2, 6)),
        *((rf"^backbone\.fpn_output{n}\.", f"backbone.fpn.layer_blocks.{n - 2}.0.") for n in range(2, 6)),
        (r"^proposal_generator\.rpn_head\.conv\.", "rpn.conv."),
        (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.objectness."),
        (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.deltas."),
        (r"^roi_heads\.box_head\.fc([12])\.", rf"{SUB_NETWORK}fc\1."),
        (r"^roi_heads\.box_predictor\.cls_score\.", f"{FC_CLS}."),
        (r"^roi_heads\.box_predictor\.bbox_pred\.", f"{FC_BOX}."),
    ),
    left_out=r"num_batches_tracked$|^roi_heads\.(mask|keypoint)_|^pixel_(mean|std)$|\.cell_anchors\.\d$",
    style="caffe",
    settings=("model.rpn.shrink_limit=0", "test.shrink_limit=0"),
)
SOURCES = (TORCHVISION, MMDETECTION, DETECTRON2)

INPUTS = {"pytorch": (IMAGE_MEAN, IMAGE_STD), "caffe": (IMAGE_MEAN[::-1], (1.0, 1.0, 1.0))}
"""Mean and std of each style, in the order of its channels: RGB or BGR."""


def convert(
    source: Path, out: Path, annotations: Path, style: str | None = None, overrides: Sequence[str] = ()
) -> None:
    """Write the detector in the file `source` as the checkpoint `out`, and print what was assumed.

    Args:
        source: see `clis.models.weight_files.read_weights`.
        out: a .pt file that does not exist yet.
        annotations: LVIS or COCO-form file with the classes of the detector.
        style: of the ResNet, ``pytorch`` (RGB, ImageNet's std) or ``caffe`` (BGR, std 1, strides in the 1x1
            convolutions); None is that of the kind's published weights.
        overrides: `key.path=value` for the checkpoint's config.

    Raises:
        FileNotFoundError, FileExistsError: `source` does not exist; `out` already exists.
        ValueError: no such detector, or one of other classes; says which parameters or how many.
    """
    if out.suffix != ".pt":
        raise ValueError(f"{out}: the name of a checkpoint ends in .pt")
    if out.exists():
        raise FileExistsError(f"{out} already exists; remove it or name another file")
    weights = read_weights(source)
    classes = read_annotations(annotations)
    try:
        kind, weights = _kind_of(weights)
        style = style or kind.style
        _check_input(weights, style)
        names = _names(weights, kind)
        state = {ours: weights[its].float() for ours, its in names.items()}
        settings = ["clis=off", *kind.settings, *_settings_of(state, style)]
        settings += [] if classes.federated else [COCO_TEST]
        config = config_from_dict(merge_overrides({}, [*settings, *overrides]), source="its config")
        _put_classes_in_order(state, kind, classes)
        if style == "caffe":
            state[CONV1] = state[CONV1][:, [2, 1, 0]] * torch.tensor(IMAGE_STD)[:, None, None]
        state |= {name.replace(SUB_NETWORK, SHARED): state[name] for name in state if SUB_NETWORK in name}
        model = build_model(config, classes.categories, pretrained=False)
        if unknown := [its for ours, its in names.items() if ours not in model.state_dict()]:
            raise ValueError(f"no part of {kind.name}'s Faster R-CNN with FPN: {', '.join(unknown)}")
    except KeyError as error:
        raise ValueError(f"{source}: {error.args[0]} (our name) is missing") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    load_state(model, state, str(source))
    with atomic_write(out) as temporary:
        torch.save(detector_state(model, config), temporary)
    say(f"{source}: {kind.name}, {style} style, {classes.num_classes} classes; other than our defaults:")
    for difference in config_differences(config, Config()):
        say(f"  {difference}")
    say(f"{out}: for load_detector, regions.detector and, with data.val and data.val_images, evaluate.py")


def _kind_of(weights: dict[str, Tensor]) -> tuple[Source, dict[str, Tensor]]:
    """Return the kind of detector, and its weights without a prefix of all names (DDP's ``module.``)."""
    for kind in SOURCES:
        prefixes = prefixes_of(weights, kind.marker)
        if "" in prefixes:
            return kind, weights
        if len(prefixes) > 1:
            raise ValueError(f"several detectors, below {', '.join(prefixes)}: write a file of one of them")
        if prefixes:
            return kind, {name.removeprefix(prefixes[0]): value for name, value in weights.items()}
    markers = ", ".join(f"{kind.marker} ({kind.name})" for kind in SOURCES)
    raise ValueError(
        f"no Faster R-CNN with FPN that is known: none of {markers} is there, but {first_names(weights)}"
    )


def _check_input(weights: Mapping[str, Tensor], style: str) -> None:
    """Raise `ValueError` where the file itself (of an older detectron2) says that its input is another."""
    for name, expected in zip(("pixel_mean", "pixel_std"), INPUTS[style]):
        found = weights[name].flatten().tolist() if name in weights else expected
        if not np.allclose(found, expected, atol=0.01):
            raise ValueError(f"{name} is {found}, but of {style} style {list(expected)}; see --style")


def _names(weights: Mapping[str, Tensor], kind: Source) -> dict[str, str]:
    """Return the source's name of each parameter of the box detector, by our name."""
    names: dict[str, str] = {}
    left_out = [name for name in weights if re.search(kind.left_out, name)]
    for its in weights:
        if its in left_out:
            continue
        ours = its
        for pattern, replacement in kind.names:
            ours = re.sub(pattern, replacement, ours)
        if ours in names:
            raise ValueError(f"{its} and {names[ours]} are the same parameter")
        names[ours] = its
    if heads := [name for name in left_out if "mask_" in name or "keypoint_" in name]:
        say(f"left out: {len(heads)} parameters of the mask or keypoint head")
    return names


def _settings_of(state: Mapping[str, Tensor], style: str) -> list[str]:
    """Return the overrides of the config that follow from the shapes of the weights and the style."""
    blocks = [len({name.split(".")[3] for name in state if f".layer{n}." in name}) for n in range(1, 5)]
    depths = [name for name, known in BLOCKS.items() if list(known) == blocks]
    if not depths:
        raise ValueError(f"a ResNet of {blocks} blocks; known are {', '.join(BLOCKS)}")
    one_box = len(state[f"{FC_BOX}.bias"]) == 4 and len(state[f"{FC_CLS}.bias"]) > 2
    return [
        f"model.backbone.name={depths[0]}",
        f"model.backbone.width={len(state[CONV1])}",
        f"model.backbone.fpn_channels={len(state['rpn.conv.bias'])}",
        f"model.backbone.stride_in_1x1={style == 'caffe'}",
        f"model.roi.fc_dim={len(state[SUB_NETWORK + 'fc1.bias'])}",
        f"model.roi.class_agnostic_boxes={one_box}",
    ]


def _put_classes_in_order(state: dict[str, Tensor], kind: Source, annotations: Annotations) -> None:
    """Give the last layers one row per label of ours; background's comes last in the logits.

    Raises:
        ValueError: they are of another number of classes.
    """
    ids = [category.id for category in annotations.categories]
    first = int(kind.background_first)
    outputs = len(state[f"{FC_CLS}.bias"]) - 1
    if outputs == len(ids):
        rows = list(range(first, first + outputs))
    elif kind.background_first and outputs == max(ids) and min(ids) > 0:  # as torchvision's references label
        rows = ids
        say(f"left out: {outputs - len(ids)} of {outputs} outputs, whose category ids are no class")
    else:
        raise ValueError(f"a detector of {outputs} classes, but {annotations.path} has {len(ids)}")
    for key in ("weight", "bias"):
        logits, boxes = state[f"{FC_CLS}.{key}"], state[f"{FC_BOX}.{key}"]
        if len(logits) != outputs + 1 or len(boxes) not in (4, 4 * (outputs + first)):
            raise ValueError(
                f"{FC_CLS}.{key} (our names) of {len(logits)} rows with {FC_BOX} of {len(boxes)}"
            )
        state[f"{FC_CLS}.{key}"] = logits[[*rows, 0 if first else outputs]]
        if len(boxes) > 4:
            state[f"{FC_BOX}.{key}"] = boxes.unflatten(0, (-1, 4))[rows].flatten(0, 1)
