"""A teacher that finds boxes in image-level images, whose labels are not used: pseudo-labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

if TYPE_CHECKING:
    from clis.config import TeacherConfig
    from clis.data.batch import Batch
    from clis.models.detector import CLISDetector

CLASSIFICATION = ("rpn_objectness", "instance_cls", "objectness")
"""The losses on pseudo boxes that say what is an object, and of which class."""
REGRESSION = ("rpn_box", "box")
"""Those that say where it is. Unbiased Teacher leaves them out: a score says nothing about localization."""
SMALLEST_BOX = 1.0
"""Pseudo boxes with a shorter side, in pixels of the mosaic, are left out: they have no finite targets."""
JITTER = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
    ]
)
"""The first half of Unbiased Teacher's strong augmentation (arXiv 2102.09480), without its change of hue, for
which torchvision would copy a table to the device each time."""
ERASED = (
    (0.7, (0.05, 0.2), (0.3, 3.3)),
    (0.5, (0.02, 0.2), (0.1, 6.0)),
    (0.3, (0.02, 0.2), (0.05, 8.0)),
)
"""The second: a probability, and the ranges of the area, as a share of the image's, and of height / width."""


SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of an image and of its mosaics: odd, 2**64 over the golden ratio, so that none meet."""


class Teacher(nn.Module):
    """A copy of the detector that is not trained, and labels what the detector is trained on.

    With a momentum of 1 it stays as it is: Self-Training (arXiv 2006.06882), but with labels found in every
    step. Below 1 it is the moving mean of the detector: the teacher of Unbiased Teacher (arXiv 2102.09480).
    What it finds is selected as in a test (`test.nms_iou`, `test.detections`), but for `teacher.score`; as in
    the official code, its proposals are as many as in training (`model.rpn.pre_nms_train`).
    """

    def __init__(self, model: CLISDetector, config: TeacherConfig) -> None:
        """Wrap a copy of the detector that is to be taught, without a teacher of its own."""
        super().__init__()
        self.model = model.requires_grad_(False)
        self.found = replace(model.test_config, score_threshold=config.score, min_size=SMALLEST_BOX)
        """How pseudo boxes are selected; `model` itself detects as its own `test_config` says."""
        assert config.momentum is not None
        self.momentum, self.strong = config.momentum, config.strong
        self.losses = CLASSIFICATION + REGRESSION * config.boxes
        """Names of the losses of `CLISDetector.forward` that pseudo boxes have, if the detector has them."""

    @property
    def follows(self) -> bool:
        """Whether it is the moving mean of the detector."""
        return self.momentum < 1

    @torch.no_grad()
    def label(self, batch: Batch) -> Batch:
        """Return the mosaics as instance-level images, with the boxes that are found above `teacher.score`.

        A mosaic in which nothing is found is all background. The host waits for the boxes.
        """
        images = list(batch.mosaics.unbind())
        found = self.model.find_pseudo_boxes(images, self.found)
        seeds, per_image = list(mosaic_seeds(batch)), len(images) // len(batch.images)
        if self.strong:
            images = [strongly_augmented(image, seed) for image, seed in zip(images, seeds, strict=True)]
        return replace(
            batch,
            images=images,
            boxes=[detections.boxes.float() for detections in found],
            labels=[detections.labels for detections in found],
            mosaics=batch.mosaics[:0],
            regions=batch.regions[:0],
            region_labels=batch.region_labels[:0],
            region_mosaics=batch.region_mosaics[:0],
            seeds=seeds,
            image_ids=[image_id for image_id in batch.image_ids for _ in range(per_image)],
        )

    @torch.no_grad()
    def follow(self, model: CLISDetector) -> None:
        """Move towards the detector after a step: teacher = m teacher + (1 - m) detector.

        What the classification loss has counted, its buffers, is no mean and is taken as it is.
        """
        if not self.follows:
            return
        new = dict(model.named_parameters())
        for name, parameter in self.model.named_parameters():
            parameter.lerp_(new[name], 1 - self.momentum)
        counts = model.classification_loss.buffers()
        for old, count in zip(self.model.classification_loss.buffers(), counts):
            old.copy_(count)

    @torch.no_grad()
    def restart(self, model: CLISDetector) -> None:
        """Become a copy of the detector, which has just been given other weights."""
        state = model.state_dict()
        self.model.load_state_dict({name: state[name] for name in self.model.state_dict()})


def mosaic_seeds(batch: Batch) -> Iterator[int]:
    """Derive a seed in [0, 2**63) for each mosaic from that of its image, whose own is not among them."""
    for seed in batch.seeds:
        for place in range(1, len(batch.mosaics) // len(batch.seeds) + 1):
            yield (seed + place * SEED_STEP) % 2**63


def strongly_augmented(image: Tensor, seed: int) -> Tensor:
    """Change colors and blur of an image uint8 [3,H,W], and erase parts of it, as the seed says.

    No box moves. Erased parts are black (noise in Unbiased Teacher).
    """
    exact = torch.autocast(image.device.type, enabled=False)  # a kernel in bfloat16 can turn white into black
    with torch.random.fork_rng(devices=[]), exact:  # all is drawn on the CPU
        torch.default_generator.manual_seed(seed)
        image = JITTER(image).clone()
        height, width = image.shape[1:]
        for probability, (smallest, largest), (lowest, highest) in ERASED:
            chance, area, ratio, y, x = torch.rand(5).tolist()
            if chance >= probability:
                continue
            area = height * width * (smallest + area * (largest - smallest))
            ratio = lowest * (highest / lowest) ** ratio  # uniform in its logarithm
            tall = min(round(math.sqrt(area * ratio)), height)
            wide = min(round(math.sqrt(area / ratio)), width)
            top, left = round(y * (height - tall)), round(x * (width - wide))
            image[:, top : top + tall, left : left + wide] = 0
    return image
