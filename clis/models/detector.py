"""CLIS: Faster R-CNN + FPN with an image-classification task beside it (Figure 2 of arXiv 2210.05568)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clis import boxes as box_ops
from clis.config import TestConfig
from clis.losses import ClassificationLoss, Rows, at_least_float32, l1_loss, objectness_loss
from clis.models.backbone import Backbone, SharedFolds
from clis.models.calibration import Calibration
from clis.models.contrastive import ContrastiveRegularization
from clis.models.heads import ClassificationHead, LocalizationHead, Refinement
from clis.models.inputs import ImageInput, as_tensors
from clis.models.online_regions import Preference, choose_regions, scores_for
from clis.models.roi import ImageDetections, RoIPooler, SampledRoIs, sample_rois, select_detections
from clis.models.rpn import RPN
from clis.models.teacher import Teacher
from clis.resize import image_size, padded_size, resize_image, round_half_up, scale_boxes, shortest_size

if TYPE_CHECKING:
    from clis.config import RoIConfig
    from clis.data.batch import Batch


@dataclass(frozen=True)
class Normalizers:
    """What the losses of this process are divided by, so that DDP's mean over processes is the global mean.

    Each is a count over the global batch (all processes and micro-batches) over the number of processes.
    """

    images: float
    regions: float
    pairs: float


@dataclass(frozen=True)
class Pending:
    """What passes have counted and made for `CLISDetector.after_step`: of a micro-batch or a whole step."""

    sums: dict[str, Tensor]
    """Added up over micro-batches and processes; of one shape on all, float64."""
    rows: dict[str, Tensor]
    """Joined in the order of the global batch."""


@dataclass(frozen=True)
class TrainOutput:
    """What one training pass gives: losses, counts, and what waits for the optimizer's step."""

    losses: dict[str, Tensor]
    """Raw, unweighted scalars."""
    stats: dict[str, Tensor]
    """Counts over the batch, for the log."""
    pending: Pending
    """What `CLISDetector.after_step` needs of the whole step."""
    views: tuple[Tensor, Tensor] | None
    """f_i and f_d [P,E] of the pairs, for the log."""


class Round(NamedTuple):
    """What the heads make of N RoIs."""

    logits: Tensor
    """[N,K]."""
    localization_features: Tensor
    """[N,D], what boxes and objectness are predicted from."""


class CLISDetector(nn.Module):
    """The detector and, in training, its tasks with image-level supervision.

    An optional part is a module or None, and shared parts are one module under two names; `build_model`
    decides. Plain Faster R-CNN: no objectness, `image_classification`, `contrastive`, `refinement` or
    `teacher`, one sub-network.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        rpn: RPN,
        localization: LocalizationHead,
        classification: ClassificationHead,
        image_classification: ClassificationHead | None,
        region_preference: Preference | None,
        contrastive: ContrastiveRegularization | None,
        refinement: Refinement | None,
        classification_loss: ClassificationLoss,
        calibration: Calibration | None,
        roi_config: RoIConfig,
        test_config: TestConfig,
        max_size: int,
        categories: Sequence[Any],
    ) -> None:
        """Assemble the detector from its parts; `build_model` makes them from a config.

        Args:
            region_preference: by which the image-classification task chooses regions among the proposals;
                None leaves it the pre-defined ones.
            max_size: longest side of the instance-level images in training, in pixels.
        """
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.roi_align = RoIPooler(roi_config)
        self.localization = localization
        self.classification = classification
        self.image_classification = image_classification
        self.region_preference = region_preference
        self.contrastive = contrastive
        self.refinement = refinement
        self.teacher: Teacher | None = None
        """A copy of this detector, which `build_model` sets once this one is complete."""
        self.schedule = ((1.0, 1.0),) if refinement is None else refinement.schedule
        """Of each round of the heads: weight of L_incls, and stage of its `Rows`."""
        self.classification_loss, self.calibration = classification_loss, calibration
        self.roi_config, self.test_config, self.max_size = roi_config, test_config, max_size
        self.categories = tuple(categories)
        self.nms = box_ops.nms_top_k

    @property
    def tested(self) -> CLISDetector:
        """Return the detector to evaluate: the teacher if it follows this one, otherwise this one."""
        return self.teacher.model if self.teacher is not None and self.teacher.follows else self

    @property
    def num_classes(self) -> int:
        """Return the number of classes C, without background."""
        return len(self.categories)

    def forward(self, batch: Batch, normalizers: Normalizers) -> TrainOutput:
        """Make one training pass over a batch of both streams (Figure 2); a function of batch and seeds."""
        sizes = [image_size(image) for image in batch.images]

        # instance-level images: proposals and their RoIs
        shared: SharedFolds = {}  # of both streams
        features = self.backbone(batch.images, self.max_size, shared)
        anchors = self.rpn.anchors(features)
        count = normalizers.images * self.rpn.config.samples
        losses = self.rpn.losses(features, anchors, batch.boxes, sizes, batch.seeds, count)
        with torch.no_grad():  # after the losses: autocast keeps what it casts, here without a gradient
            objectness, deltas = self.rpn(features)
        proposals = self.rpn.propose(objectness, deltas, anchors, sizes)
        rois = sample_rois(
            proposals, batch.boxes, batch.labels, self.roi_config, self.num_classes, batch.seeds
        )

        # localization task and instance-classification task; pasted instances are pooled along with the RoIs
        num_rois = len(rois.boxes)
        pooled = self.roi_align(
            features, torch.cat([rois.boxes, batch.pair_boxes]), torch.cat([rois.images, batch.pair_images])
        )
        instance_features = self.classification.sub_network(pooled)
        rounds = self._rounds(pooled[:num_rois], instance_features[:num_rois])
        losses |= self._localization_losses(rounds[-1].localization_features, rois, normalizers)
        losses["instance_cls"], counted = self._instance_classification(rounds, rois, batch, normalizers)
        pending = Pending(sums={"classification": counted}, rows={})
        views = None

        # image-level images: image-classification task on the pre-defined regions, or on chosen proposals
        if self.image_classification is not None:
            pooled_regions = self._pool_regions(batch, shared)
            image_features = self.image_classification.sub_network(pooled_regions)
            losses["image_cls"] = self._image_classification_loss(image_features, batch, normalizers)

            # contrastive regularization between the two views of each pair
            if self.contrastive is not None:
                pairs = batch.pair_regions
                contrast = self.contrastive(
                    image_features[pairs],
                    instance_features[num_rois:],
                    pooled_regions[pairs],
                    pooled[num_rois:],
                    batch.region_labels[pairs],
                    normalizers.pairs,
                )
                losses["contrastive"] = contrast.loss
                pending.rows.update(keys=contrast.keys, key_labels=contrast.labels)
                views = contrast.views
        stats = {
            "positive_rois": (rois.labels < self.num_classes).sum(),
            "pairs": rois.labels.new_full((), len(batch.pair_boxes)),
        }

        # or, not CLIS: all of the above for the mosaics, with the boxes that a teacher finds in them
        if self.teacher is not None and len(batch.mosaics) > 0:
            labeled = self.teacher.label(batch)
            images = normalizers.images * len(labeled.images) / len(batch.images)
            output = self(labeled, replace(normalizers, images=images))
            taught = [loss for name, loss in output.losses.items() if name in self.teacher.losses]
            losses["pseudo"] = torch.stack(taught).sum()
            stats["pseudo_boxes"] = rois.labels.new_full((), sum(map(len, labeled.labels)))
        return TrainOutput(losses, stats, pending, views)

    @torch.no_grad()
    def after_step(self, pending: Pending, progress: float) -> None:
        """Move all state that no gradient moves, once the optimizer's step is accepted.

        Args:
            pending: of all micro-batches and processes of the step.
            progress: share of the training that is done, in 0..1.
        """
        self.classification_loss.update(pending.sums["classification"], progress)
        if self.contrastive is not None:
            keys, labels = pending.rows["keys"], pending.rows["key_labels"]
            self.contrastive.update(self.classification.sub_network, keys, labels)
        if self.teacher is not None:
            self.teacher.follow(self)

    def _rows(
        self, images: Tensor, batch: Batch, normalizers: Normalizers, positive_fraction: float = 1.0
    ) -> Rows:
        """Describe which images rows of logits belong to; `images` int64 [N] are places in the batch."""

        def uniform(count: int) -> Tensor:
            return torch.stack([box_ops.uniform(count, seed, images.device) for seed in batch.seeds])

        _, stage = self.schedule[0]  # regions pass only through the first round
        return Rows(images, len(batch.images), normalizers.images, uniform, stage, positive_fraction)

    def _rounds(self, pooled: Tensor, instance_features: Tensor) -> list[Round]:
        """Apply the heads to pooled RoIs and their classification features, once per refinement round."""
        rounds = [self._predict_round(pooled, instance_features)]
        for _ in self.schedule[1:]:
            assert self.refinement is not None  # without one, the schedule has one round
            deltas = self.localization.deltas(rounds[-1].localization_features)
            pooled = self.refinement(pooled, rounds[-1].logits, deltas)
            rounds.append(self._predict_round(pooled, self.classification.sub_network(pooled)))
        return rounds

    def _predict_round(self, pooled: Tensor, instance_features: Tensor) -> Round:
        localization_features = self._localization_features(pooled, instance_features)
        return Round(self.classification.fc_cls(instance_features), localization_features)

    def _instance_classification(
        self, rounds: Sequence[Round], rois: SampledRoIs, batch: Batch, normalizers: Normalizers
    ) -> tuple[Tensor, Tensor]:
        """Compute L_incls of RoIs over the rounds, and what it counts: in every round, as in PCB's code."""
        compute, parts = self.classification_loss, []
        count = normalizers.images * self.roi_config.samples
        rows = self._rows(rois.images, batch, normalizers, self.roi_config.positive_fraction)
        for (weight, stage), (logits, _) in zip(self.schedule, rounds, strict=True):
            at_stage = replace(rows, stage=stage)
            loss = weight * compute(logits, rois.labels, count, at_stage)
            with torch.no_grad():
                parts.append((loss, compute.statistics(logits, rois.labels, at_stage)))
        losses, counted = zip(*parts)
        return sum(losses), sum(counted)

    def _pool_regions(self, batch: Batch, shared: SharedFolds) -> Tensor:
        """Pool the regions of the mosaics, [R,C,P,P]; P2-P5 are computed only around them."""
        summed = self.backbone.top_down(batch.mosaics.unbind(), shared=shared)
        regions = batch.regions
        if self.region_preference is not None:
            regions = self.choose_regions(summed, batch, self.region_preference)
        return self.roi_align(summed, regions, batch.region_mosaics, self.backbone.output_convs)

    @torch.no_grad()
    def choose_regions(self, summed: Sequence[Tensor], batch: Batch, prefer: Preference) -> Tensor:
        """Choose a proposal for each image-level image, whose extent is its region in the batch: [R,4].

        Args:
            summed: what `Backbone.top_down` makes of the mosaics.
        """
        features = self.backbone.levels(summed)
        proposals = self._propose(features, [image_size(mosaic) for mosaic in batch.mosaics])

        def score() -> Tensor:
            scores, _ = self._apply_heads(features, proposals, None)  # calibration is for the test
            return scores_for(scores, batch.region_labels, batch.region_mosaics)

        return choose_regions(proposals, batch.regions, batch.region_mosaics, prefer, score)

    def _image_classification_loss(self, features: Tensor, batch: Batch, normalizers: Normalizers) -> Tensor:
        """Compute L_imcls of the regions from their features [R,D]."""
        assert self.image_classification is not None
        logits = self.image_classification.fc_cls(features)
        images = batch.region_mosaics // (len(batch.mosaics) // len(batch.images))
        rows = self._rows(images, batch, normalizers)
        return self.classification_loss.image_level(logits, batch.region_labels, normalizers.regions, rows)

    def _localization_features(self, pooled: Tensor, instance_features: Tensor) -> Tensor:
        """Return [N,D] of the localization sub-network, computed again only if it is one of its own."""
        if self.localization.sub_network is self.classification.sub_network:
            return instance_features
        return self.localization.sub_network(pooled)

    def _localization_losses(
        self, features: Tensor, rois: SampledRoIs, normalizers: Normalizers
    ) -> dict[str, Tensor]:
        """Compute L_loc on the positives, for the box of their own class, and L_obj on all RoIs."""
        count = normalizers.images * self.roi_config.samples
        is_object = rois.labels < self.num_classes
        deltas = self.localization.deltas(features[rois.positives])
        own = rois.labels[rois.positives].clamp(max=deltas.shape[1] - 1)
        losses = {"box": l1_loss(deltas[torch.arange(len(own), device=own.device), own], rois.targets, count)}
        if self.localization.fc_objectness is not None:
            logits = self.localization.fc_objectness(features).squeeze(1)
            losses["objectness"] = objectness_loss(logits, is_object, count)
        return losses

    @torch.no_grad()
    def predict(
        self, images: Sequence[Tensor], max_size: int | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return RoIs [n,4], scores [n,C] and box deltas [n, C or 1, 4] of each image, without resizing it.

        The score is the class probability, calibrated as `test.calibration` says, times the objectness where
        there is one (section III-B.5).

        Args:
            max_size: the longest side that such images may have; see `BackboneConfig.canvas`.
        """
        sizes = [image_size(image) for image in images]
        features = self.backbone(images, max_size)
        proposals = self._propose(features, sizes)
        return list(zip(proposals, *self._apply_heads(features, proposals, self.calibration), strict=True))

    def _propose(self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return the RPN's proposals [n,4] for each image of these features."""
        objectness, deltas = self.rpn(features)
        return self.rpn.propose(objectness, deltas, self.rpn.anchors(features), sizes)

    def _apply_heads(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], calibration: Calibration | None
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return scores [n,C] and box deltas [n, C or 1, 4] of each image's proposals.

        Args:
            calibration: of the class probabilities; None leaves them as they are.
        """
        counts = [boxes.shape[0] for boxes in proposals]
        rows = torch.cat(
            [torch.full_like(boxes[:, 0], row, dtype=torch.int64) for row, boxes in enumerate(proposals)]
        )
        pooled = self.roi_align(features, torch.cat(list(proposals)), rows)
        instance_features = self.classification.sub_network(pooled)
        logits, localized = self._rounds(pooled, instance_features)[-1]
        scores = self.classification_loss.scores(logits)
        if calibration is not None:
            scores = calibration(scores)
        if self.localization.fc_objectness is not None:
            scores = scores * at_least_float32(self.localization.fc_objectness(localized)).sigmoid()
        return scores.split(counts), self.localization.deltas(localized).split(counts)

    @torch.no_grad()
    def detect(self, images: ImageInput | Sequence[ImageInput]) -> list[ImageDetections]:
        """Detect objects in one image or many of any sizes, resized as `test_config` says.

        Images that are padded to one size are one batch, so that no image depends on which others there are.

        Args:
            images: paths, Pillow images, RGB arrays uint8 [H,W,3] or tensors uint8 [3,H,W], one or a list.
                Files and Pillow images are turned as their EXIF orientation says.

        Returns:
            The detections of each image, a list also for one; boxes in pixels of the given image, of a turned
            one as it is displayed.

        Raises:
            ValueError: an image is something else, or not uint8 (see `as_tensors`).
            ImageError: a file cannot be read.
        """
        images = as_tensors(images)
        if not images:
            return []
        short_side, max_size = self.test_config.short_side, self.test_config.max_size
        sizes = [image_size(image) for image in images]
        resized = [
            self.resize(image, self.resized_size(size, short_side, max_size))
            for image, size in zip(images, sizes)
        ]
        batches: dict[tuple[int, ...], list[int]] = {}
        for place, size in enumerate(sizes):
            batches.setdefault(self.canvas_of(size), []).append(place)
        found: dict[int, ImageDetections] = {}
        for places in batches.values():
            batch = [resized[place] for place in places]
            for place, small, each in zip(places, batch, self.detect_resized(batch, max_size)):
                boxes = scale_boxes(each.boxes, image_size(small), sizes[place])
                found[place] = ImageDetections(boxes, each.scores, each.labels)
        return [found[place] for place in range(len(images))]

    def canvas_of(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return to what `detect` pads an image of this height and width; () where it is the same for all."""
        if self.backbone.square:
            return ()
        return padded_size(self.resized_size(size, self.test_config.short_side, self.test_config.max_size))

    def detect_resized(self, images: Sequence[Tensor], max_size: int | None = None) -> list[ImageDetections]:
        """Detect objects as `detect`, in images that already have their size; boxes are in their pixels."""
        return [
            select_detections(*prediction, image_size(image), self.test_config, self.nms)
            for image, prediction in zip(images, self.predict(images, max_size))
        ]

    @torch.no_grad()
    def find_pseudo_boxes(self, images: Sequence[Tensor], config: TestConfig) -> list[ImageDetections]:
        """Detect objects in images of training as `config` says, without calibration."""
        sizes = [image_size(image) for image in images]
        features = self.backbone(images, self.max_size)
        proposals = self._propose(features, sizes)
        predictions = zip(proposals, *self._apply_heads(features, proposals, None), strict=True)
        return [
            select_detections(*prediction, size, config, self.nms)
            for size, prediction in zip(sizes, predictions)
        ]

    @torch.no_grad()
    def rank_first(
        self, images: Sequence[Tensor], labels: Tensor, max_size: int | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the box [4] and score [] of each image's label that rank first of all RoIs (section IV-A.3).

        No score threshold and no limit of detections: tail categories score low but rank well. Images and
        boxes as for `detect_resized`; a box is NaN where the image has no RoI.
        """
        found = []
        predictions = self.predict(images, max_size)
        for image, label, (rois, scores, deltas) in zip(images, labels.tolist(), predictions):
            if len(rois) == 0:
                found.append((rois.new_full((4,), torch.nan), rois.new_zeros(())))
                continue
            score, first = scores[:, label].max(dim=0, keepdim=True)  # a row: of a number the host would wait
            own = deltas[first, min(label, deltas.shape[1] - 1)]
            moved = box_ops.decode(rois[first], own, box_ops.ROI_STDS, self.test_config.shrink_limit)
            found.append((box_ops.clip(moved, image_size(image))[0], score[0]))
        return found

    def resized_size(self, size: tuple[int, int], short_side: int, max_size: int) -> tuple[int, int]:
        """Return height and width, rounded as `test.resize` says, of an image that is resized from `size`."""
        to_whole = math.floor if self.test_config.resize == "torchvision" else round_half_up
        return shortest_size(size, short_side, max_size, to_whole)

    def resize(
        self, image: Tensor, size: tuple[int, int], extent: tuple[float, float] | None = None
    ) -> Tensor:
        """Resize a uint8 image [3,H,W] on the model's device, 0..255, as `test.resize` says.

        The result is uint8, or, with torchvision's resizing, of the model's type.

        Args:
            size: height and width of the result.
            extent: height and width of what is resized, where the image was decoded at a part of its size;
                see `resize_image`. Not with torchvision's resizing.
        """
        like = self.backbone.normalize.mean
        image = image.to(like.device, non_blocking=True)
        if self.test_config.resize == "torchvision":
            return F.interpolate(image.to(like)[None], size=size, mode="bilinear")[0]
        return resize_image(image, size, extent, antialias=self.test_config.resize == "pillow")
