"""The network, built from a config: the only place that reads the model switches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clis.config import Config, data_path
from clis.losses import ClassificationLoss, build_classification_loss
from clis.models.backbone import Backbone, ImageClassifier, ResidualLayers
from clis.models.calibration import find_calibration
from clis.models.contrastive import ContrastiveRegularization
from clis.models.detector import CLISDetector, Normalizers, Pending, TrainOutput
from clis.models.heads import ClassificationHead, LocalizationHead, Refinement, TwoFC
from clis.models.online_regions import PREFERENCES
from clis.models.roi import ImageDetections
from clis.models.rpn import RPN
from clis.models.teacher import Teacher
from clis.models.weights import load_backbone_weights

__all__ = [
    "CLISDetector",
    "ImageClassifier",
    "ImageDetections",
    "Normalizers",
    "Pending",
    "TrainOutput",
    "build_classifier",
    "build_model",
    "find_calibration",
]


def build_model(config: Config, categories: Sequence[Any], *, pretrained: bool | Path = True) -> CLISDetector:
    """Build a detector for C categories, initialized from torch's global generator.

    Sub-networks are shared by aliasing: without TSS the localization sub-network *is* the classification one;
    siamese, image classification *is* instance classification.

    Args:
        categories: one object per class; the label is the place in this sequence. The classification loss may
            read `image_count`, `instance_count` and `frequency` of `clis.data.categories.Category`.
        pretrained: load `model.backbone.weights`, if the config names any; a path loads those weights in
            place of them, e.g. what a run's own pre-training (`pretrain.epochs` > 0) has made.

    Raises:
        FileNotFoundError, ValueError: the backbone weights are missing or of another network, or
            `loss.classification` names no classification loss or one that `clis.objectness` does not suit,
            or `test.calibration` names no calibration of its scores.
    """
    if isinstance(categories, int):
        raise TypeError(
            f"categories is {categories}: pass one object per class, e.g. the `categories` of "
            "clis.load_annotations(FILE), or a list of clis.Category"
        )
    model, clis = config.model, config.clis
    num_classes = len(categories)
    backbone = Backbone(model.backbone)
    if isinstance(pretrained, Path):
        load_backbone_weights(backbone.body, model.backbone.name, pretrained)
    elif pretrained:
        _load_weights(backbone.body, config)
    loss = _build_loss(config, categories)
    calibration = find_calibration(config.test.calibration, config.loss.classification)

    def sub_network() -> TwoFC:
        return TwoFC(model.backbone.fpn_channels * model.roi.pool_size**2, model.roi.fc_dim)

    def classification_head(shared: TwoFC) -> ClassificationHead:
        return ClassificationHead(shared, loss.num_logits, model.roi.fc_cls_std, model.roi.cosine)

    classification = classification_head(sub_network())
    num_boxes = 1 if model.roi.class_agnostic_boxes else num_classes
    localization = LocalizationHead(
        sub_network() if clis.task_specialized else classification.sub_network,
        num_boxes=num_boxes,
        objectness=clis.objectness,
    )
    image_classification = None
    if config.classifies_images:
        image_classification = (
            classification
            if clis.siamese
            else classification_head(sub_network() if clis.task_specialized else classification.sub_network)
        )
    contrastive = None
    if clis.contrastive:
        contrastive = ContrastiveRegularization(
            classification.sub_network,
            embedding_dim=clis.embedding_dim,
            queue_size=clis.queue_size,
            momentum=clis.momentum,
            temperature=clis.temperature,
            pasted_view=clis.pasted_view,
            mask_same_class=clis.mask_same_class,
        )
    refinement = None
    if model.roi.refinement_rounds is not None:
        refinement = Refinement(
            model.roi.refinement_rounds,
            num_logits=loss.num_logits,
            num_boxes=num_boxes,
            channels=model.backbone.fpn_channels,
            pool_size=model.roi.pool_size,
        )
    detector = CLISDetector(
        backbone=backbone,
        rpn=RPN(model.backbone.fpn_channels, model.rpn),
        localization=localization,
        classification=classification,
        image_classification=image_classification,
        region_preference=PREFERENCES.get(config.regions.rule),
        contrastive=contrastive,
        refinement=refinement,
        classification_loss=loss,
        calibration=None if calibration is None else calibration(categories),
        roi_config=model.roi,
        test_config=config.test,
        max_size=config.data.max_size,
        categories=categories,
    )
    if config.has_teacher:
        detector.teacher = Teacher(copy.deepcopy(detector), config.teacher)
    # convolutions hand this layout on, and on CPUs need no copies to and from one of their own
    return detector.to(memory_format=torch.channels_last)


def build_classifier(
    config: Config, categories: Sequence[Any], *, pretrained: bool = True
) -> ImageClassifier:
    """Build the detector's ResNet as an image classifier, at the start of its pre-training.

    Arguments and errors as `build_model`; `pretrained` loads `model.backbone.weights`.
    """
    classifier = ImageClassifier(config.model.backbone, categories)
    if pretrained:
        _load_weights(classifier, config)
    return classifier.to(memory_format=torch.channels_last)


def _build_loss(config: Config, categories: Sequence[Any]) -> ClassificationLoss:
    name = config.loss.classification
    loss = build_classification_loss(name, categories)
    if loss.has_objectness and config.clis.objectness:
        raise ValueError(
            f"loss.classification={name} has an objectness of its own, and clis.objectness=true would "
            "multiply a second one into the score: switch off one of them, the loss's by its option "
            "objectness=false"
        )
    if loss.needs_objectness and not config.clis.objectness:
        raise ValueError(
            f"loss.classification={name} has no loss on background, and with clis.objectness=false nothing "
            "would learn to tell objects from it: switch on one of them, the loss's by its option "
            "objectness=true"
        )
    return loss


def _load_weights(body: ResidualLayers, config: Config) -> None:
    backbone = config.model.backbone
    if backbone.weights is not None:
        load_backbone_weights(body, backbone.name, data_path(config, backbone.weights), backbone.download)
