"""The configuration: frozen dataclasses whose defaults are the paper's recipe (arXiv 2210.05568, IV-A).

A YAML file names only what differs; `base:` names one parent file; `key.path=value` overrides come last. Keys
are strict: an unknown one is an error that names the nearest. Every field has its default, its scope
(`clis.config_scopes`) and, below it, what it means; a section's own rules are in its ``__post_init__``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from clis.config_rules import Rules
from clis.config_scopes import Scope, scoped, scopes_of, setting

MOST_CHANNELS = 2**16
"""Of a layer; more is a slip, and memory would not hold it."""

SHARED, OWN, IMAGE_LEVEL, MACHINE, INFERENCE, PRETRAINING, REGIONS = Scope


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The ResNet with its feature pyramid: architecture, normalization and initial weights."""

    name: Literal["resnet10", "resnet18", "resnet50", "resnet101"] = setting("resnet50", SHARED | PRETRAINING)
    """ResNet depth; 50 and 101 have bottleneck blocks, 10 (one block per stage) and 18 basic ones."""
    width: int = setting(64, SHARED | PRETRAINING)
    """Channels of the stem and the first stage; torchvision's networks have 64."""
    norm: Literal["folded", "frozen", "group"] = setting("folded", SHARED | PRETRAINING)
    """``folded``: batch norm with fixed statistics and trainable affine, folded into the convolution;
    ``frozen``: the same with a fixed affine; ``group``: group norm, for training from random weights. Group
    norm's statistics include the padding, so images of different sizes in a batch affect each other, unless
    `canvas` is ``square``."""
    canvas: Literal["batch", "square"] = setting("batch", SHARED)
    """Size that images are zero-padded to: the largest of their ``batch``, or a ``square`` with the longest
    side that they may have, `data.max_size` and `test.max_size`, which must then agree. On the square, group
    norm sees an instance-level image with the same padding in training, at test and in any batch. The region
    search has a square of `regions.max_size`; mosaics, all of one size, have none, unless detection is
    trained on them. Both are rounded up to a multiple of 32. With ``batch`` and images of different sizes,
    the losses of a step depend on how it is split into micro-batches (`train.images_per_process`), since
    convolutions see the padding with any norm, as in mmdetection."""
    norm_eps: float = setting(1e-5, SHARED | PRETRAINING)
    """Added to the variance; torchvision uses 0 for the COCO weights of its detector."""
    stride_in_1x1: bool = setting(False, SHARED | PRETRAINING)
    """Put a bottleneck's stride in its first 1x1 convolution (caffe's ResNets, detectron2's default) instead
    of the 3x3 (torchvision)."""
    trainable_layers: int = setting(3, SHARED)
    """How many of (conv1, layer1, ..., layer4), from the top, are trained: 3 freezes stem and layer1."""
    weights: str | None = setting(None, SHARED | PRETRAINING)
    """A ResNet state dict with torchvision's names, relative to `data.root`: torchvision's, or the
    ``backbone.pt`` that `python -m clis pretrain` makes, with the norm that it was made with; null is random
    weights. With `pretrain.epochs`, pre-training starts from it, and the detector from the result."""
    download: bool = setting(False, SHARED)
    """Fetch torchvision's ImageNet-1K weights if `weights` does not exist yet."""
    fpn_channels: int = setting(256, SHARED)
    """Channels of P2-P6."""

    def __post_init__(self) -> None:
        rules = Rules("model.backbone", self)
        rules.between(0, 5, "trainable_layers")
        rules.between(1, MOST_CHANNELS, "width", "fpn_channels")
        rules.at_least(0, "norm_eps")
        allowed = not self.stride_in_1x1 or self.name in ("resnet50", "resnet101")
        rules.require("stride_in_1x1", allowed, f"requires bottleneck blocks; {self.name} has basic blocks")
        for name in ("width", "fpn_channels"):
            whole = getattr(self, name) % 16 == 0
            rules.require(name, whole or self.norm != "group", "must be a multiple of 16 with group norm")


@dataclass(frozen=True, kw_only=True)
class RPNConfig:
    """The region proposal network: anchors, matching, sampling and the proposals that are kept."""

    anchor_scale: float = setting(8.0, SHARED)
    """Anchor side in strides (mmdetection: 8)."""
    anchor_ratios: tuple[float, ...] = setting((0.5, 1.0, 2.0), SHARED)
    """Height / width."""
    round_anchors: bool = setting(False, SHARED)
    """Round the half sides of anchors to whole pixels (torchvision)."""
    anchor_spacing: Literal["stride", "grid"] = setting("stride", SHARED)
    """Pixels between neighboring anchors: the level's stride, or padded image size // ``grid`` size
    (torchvision), which is below P6's stride of 64 where its last row or column extends beyond the image."""
    positive_iou: float = setting(0.7, SHARED)
    negative_iou: float = setting(0.3, SHARED)
    samples: int = setting(256, SHARED)
    """Anchors sampled per image for the loss."""
    positive_fraction: float = setting(0.5, SHARED)
    pre_nms_train: int = setting(2000, SHARED)
    """Candidates per level before NMS."""
    pre_nms_test: int = setting(1000, SHARED | INFERENCE)
    nms_iou: float = setting(0.7, SHARED | INFERENCE)
    proposals: int = setting(1000, SHARED | INFERENCE)
    """Proposals kept per image."""
    min_size: float = setting(0.0, SHARED)
    """Minimum side of a proposal in pixels, exclusive (torchvision: 0.001)."""
    shrink_limit: float = setting(0.016, SHARED)
    """A proposal keeps at least this share of its anchor's sides (mmdetection: 16 / 1000); 0 is no limit
    (torchvision, detectron2)."""

    def __post_init__(self) -> None:
        rules = Rules("model.rpn", self)
        rules.at_least(1, "samples", "proposals")
        usable = len(self.anchor_ratios) > 0 and all(0 < ratio < math.inf for ratio in self.anchor_ratios)
        rules.require("anchor_ratios", usable, "must be at least one ratio, all above 0 and finite")
        rules.between(0, 1, "positive_iou", "negative_iou", "positive_fraction", "nms_iou", "shrink_limit")
        below = self.negative_iou <= self.positive_iou
        rules.require("negative_iou", below, f"must be at most model.rpn.positive_iou={self.positive_iou}")
        rules.positive("anchor_scale")
        rules.at_least(1, "pre_nms_train", "pre_nms_test")
        rules.at_least(0, "min_size")


@dataclass(frozen=True, kw_only=True)
class RoIConfig:
    """The RoI heads: sampling, RoIAlign, the two sub-networks and their output layers."""

    samples: int = 512
    """RoIs sampled per image in training."""
    positive_fraction: float = 0.25
    positive_iou: float = 0.5
    pool_size: int = 7
    sampling_ratio: int = 0
    """RoIAlign points per bin; 0 is adaptive (mmdetection)."""
    aligned: bool = True
    """RoIAlign's half-pixel correction."""
    finest_scale: float = 56.0
    """RoIs with sqrt(area) below twice this many pixels are pooled from P2."""
    fc_dim: int = 1024
    """Width D of the two hidden layers of each sub-network."""
    class_agnostic_boxes: bool = False
    """Predict one box for all classes instead of one box per class."""
    fc_cls_std: float = 0.01
    """Standard deviation of the last classification fc's initial weights (mmdetection: 0.01; torchvision's
    detector: 1 / sqrt(3 * fc_dim)). A wider start lets classification take off sooner in a short training."""
    cosine: float | None = None
    """Scale of a cosine classifier as the last classification fc, 20 in Seesaw's recipes for LVIS; null is a
    linear layer."""
    refinement_rounds: int | None = None
    """Apply the heads this often, 2 to 5 times, each time to features that their predictions have refined
    (PCB's recipes have 3); null applies them once."""

    def __post_init__(self) -> None:
        rules = Rules("model.roi", self)
        rules.at_least(1, "samples")
        rules.between(0, 1, "positive_fraction", "positive_iou")
        rules.at_least(0, "sampling_ratio")
        rules.positive("finest_scale", "positive_fraction")
        rules.between(1, MOST_CHANNELS, "fc_dim", "pool_size")
        rules.at_least(0, "fc_cls_std")
        bounded = self.cosine is None or 0 < self.cosine < math.inf
        rules.require("cosine", bounded, "must be above 0 and finite, or null")
        rounds = self.refinement_rounds
        rules.require("refinement_rounds", rounds is None or 2 <= rounds <= 5, "must be 2 to 5, or null")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector: backbone, region proposal network and RoI heads."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig, metadata=scoped(SHARED))


@dataclass(frozen=True, kw_only=True)
class CLISConfig:
    """The parts of CLIS (section III). All off, with s = t = 0, is a plain Faster R-CNN."""

    task_specialized: bool = True
    """TSS: the localization task has a sub-network of its own; off, it shares classification's 2fc."""
    objectness: bool = True
    """L_obj on the localization sub-network, multiplied into the score at inference."""
    s: int = 16
    """Image-level images per instance-level image, a multiple of 4; 0 leaves them out (w/o ILS)."""
    t: int = 2
    """Instances pasted into each instance-level image, t <= s; 0 is no pasting."""
    siamese: bool = True
    """SS: image classification shares 2fc and last fc with instance classification; off, it has its own
    (without TSS only its own last fc)."""
    contrastive: bool = True
    """CLR: L_con on the pasted pairs; off with t > 0, the pasted instances are ordinary ground truth only."""
    embedding_dim: int = 128
    """E, the output of the projection MLPs."""
    queue_size: int = 115712
    """Q, keys held in the dictionary; it starts empty, with unfilled places masked. Eq. 1 takes them from
    other instances, but Q also holds keys of the query's own image: up to about Q / N of them with N
    image-level images, 0.1 in the paper. Choose Q well below N, or set `mask_same_class`."""
    momentum: float = 0.999
    """Of the momentum copy of the instance-classification sub-network and its MLP."""
    temperature: float = 0.2
    """tau of Eq. 1."""
    pasted_view: Literal["symmetric", "momentum", "online"] = "symmetric"
    """What is contrasted. ``symmetric``: f_i with the momentum key of the pasted view and f_d with that of
    the region, the mean of both. ``momentum``: f_i with the key of the pasted view alone; one MLP serves both
    tasks, since the instance task's own would never learn. ``online``: f_i with f_d, both with a gradient;
    beside negatives from the lagging copy this is solved without telling instances apart."""
    mask_same_class: bool = False
    """Leave keys of the query's class out of the negatives; Eq. 1 keeps them."""
    detect_mosaics: bool = False
    """Not CLIS: train detection on mosaics with their regions as boxes, and on no other images, in place of
    image classification; `loss.alpha` and `siamese` have no effect then. It is MosaicOS's middle stage."""

    def __post_init__(self) -> None:
        rules = Rules("clis", self)
        whole = self.s >= 0 and self.s % 4 == 0
        rules.require("s", whole, "must be a multiple of 4 (a mosaic holds four images)")
        rules.require("t", 0 <= self.t <= self.s, f"must be between 0 and clis.s={self.s}")
        paired = self.t > 0 or not self.contrastive
        rules.require("contrastive", paired, "requires pasted pairs; set clis.t above 0 or this to false")
        single = (self.s, self.t) == (4, 0) or not self.detect_mosaics
        rules.require("detect_mosaics", single, "requires clis.s=4 and clis.t=0, and clis.contrastive=false")
        rules.at_least(1, "queue_size", "embedding_dim")
        rules.between(0, 1, "momentum")
        rules.positive("temperature")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of Eq. 2 and the classification loss."""

    classification: str = "cross_entropy"
    """A name of `clis.losses.CLASSIFICATION_LOSSES`, or ``module:Class``, e.g. ``my_loss:Focal``, of a module
    in the working folder or on Python's path (docs/benchmark.md)."""
    alpha: float = 0.1
    """Weight of the image-classification loss L_imcls."""
    beta: float = 0.05
    """Weight of the contrastive loss L_con; the paper met NaN at 0.1."""
    rpn_objectness: float = 1.0
    rpn_box: float = 1.0
    instance_cls: float = 1.0
    box: float = 1.0
    objectness: float = 1.0
    pseudo: float = 4.0
    """Weight of the summed detection losses on the pseudo boxes of `teacher`; 4 is Unbiased Teacher's."""

    def __post_init__(self) -> None:
        rules = Rules("loss", self)
        rules.at_least(0, "alpha", "beta", "rpn_objectness", "rpn_box", "instance_cls", "box", "objectness")
        rules.at_least(0, "pseudo")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every loss that `CLISDetector.forward` may return, by its name there."""
        return {
            "rpn_objectness": self.rpn_objectness,
            "rpn_box": self.rpn_box,
            "instance_cls": self.instance_cls,
            "box": self.box,
            "objectness": self.objectness,
            "image_cls": self.alpha,
            "contrastive": self.beta,
            "pseudo": self.pseudo,
        }


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Files of both streams, the order in which images are drawn, augmentation and loading."""

    root: str | None = setting(None, SHARED | MACHINE)
    """Folder that the paths below are relative to; null is $CLIS_DATA, or ``data`` if that is unset."""
    generate: Literal["shapes"] | None = setting(None, SHARED)
    """Write the embedded benchmark to ``root/shapes`` if it does not exist yet."""
    source: str | None = setting(None, SHARED | MACHINE)
    """How to get the data, in words: shown when the training annotations are missing. A config with this one
    as its `base` but data of its own sets it to null."""
    train: str = setting("lvis/lvis_v1_train.json", SHARED | PRETRAINING | REGIONS)
    """Instance-level annotations (D_d): LVIS v1, LVIS v0.5 or COCO form."""
    train_images: str = setting("coco", SHARED)
    """Folder of their images; LVIS v1 names them ``train2017/000000391895.jpg`` below it."""
    val: str = setting("lvis/lvis_v1_val.json", SHARED)
    val_images: str = setting("coco", SHARED)
    image_level: tuple[str, ...] = setting(("imagenet22k",), IMAGE_LEVEL | PRETRAINING | REGIONS)
    """Folders of the image-level images (D_i): one folder or one tar per class, scanned at every start. Or
    the one folder that `python -m clis prepare image-level` wrote, which opens at once; it has its own
    mapping, so `mapping` and `drop_unmatched` have no effect."""
    shuffle_block: int | None = setting(None, IMAGE_LEVEL | PRETRAINING)
    """Shuffle the image-level images in blocks of this many neighbors in their index, for shards of mixed
    classes that are too many for random access; null shuffles over all. Class folders and class tars require
    null, since each of their blocks has a single class."""
    mapping: str | None = setting(None, IMAGE_LEVEL | PRETRAINING | REGIONS)
    """File of ``wnid<TAB>category`` lines, for folder names that do not identify the class."""
    drop_unmatched: bool = setting(False, IMAGE_LEVEL | PRETRAINING | REGIONS)
    """Leave out image-level folders that match no category instead of stopping."""
    drop_invalid: bool = setting(False, SHARED)
    """Drop boxes without area or with a side under one pixel (mmdetection), and clip boxes that leave the
    image, instead of stopping."""
    empty_images: bool = setting(False, SHARED)
    """Also train on images that have no box left; mmdetection and detectron2 leave them out. Repeat factors
    are counted on the images that remain."""
    max_bad_images: int = setting(0, SHARED | MACHINE)
    """Unreadable images that a start of a run may replace by the next in their stream before it stops."""
    image_level_share: float = setting(1.0, IMAGE_LEVEL | PRETRAINING)
    """Share of the image-level images that are used, above 0; `train.seed` draws which. The replacement of an
    unreadable image may come from the rest, too."""
    label_noise: float = setting(0.0, IMAGE_LEVEL | PRETRAINING | REGIONS)
    """Share of the image-level images that get the label of another class, drawn by `train.seed`: what a
    stream from a search engine may be like (section IV-D.5). Images held out by pre-training get it too."""
    repeat_threshold: float = setting(1e-3, SHARED)
    """t of repeat-factor sampling: classes in a smaller share of the images are repeated."""
    repeat_rounding: Literal["ceil", "stochastic", "none"] = setting("ceil", SHARED)
    """``ceil`` as mmdetection, ``stochastic`` as detectron2, ``none`` for no repetition."""
    repeat: Literal["repeat-factor", "class-balanced"] = setting("repeat-factor", SHARED)
    """What an image's repetition follows: LVIS's ``repeat-factor``, or ``class-balanced``, which draws all
    classes equally often (for training a last layer again) and needs stochastic rounding."""
    short_sides: tuple[int, ...] = setting((640, 672, 704, 736, 768, 800), SHARED)
    """Scale jitter: the shorter side is drawn from these."""
    max_size: int = setting(1333, SHARED)
    """Limit of the longer side."""
    flip: float = setting(0.5, SHARED | PRETRAINING)
    """Probability of the horizontal flip, in both streams and for pasted crops."""
    mosaic_size: int = setting(448, IMAGE_LEVEL)
    """Side of the canvas of four image-level images."""
    mosaic_scale: tuple[float, float] = setting((0.5, 1.5), IMAGE_LEVEL)
    """Random scaling of an image-level image, relative to fit-to-tile."""
    mosaic_surroundings: float | None = setting(None, IMAGE_LEVEL)
    """Crop an image-level image to its region, sides times this factor, before it is fitted to its tile, so
    that regions are larger in their mosaics; null, the paper's reading, places the whole image."""
    cutout: float = setting(0.5, IMAGE_LEVEL)
    """Probability of cutout on an image-level image."""
    cutout_size: tuple[float, float] = setting((0.1, 0.4), IMAGE_LEVEL)
    """Sides of the cutout rectangle, relative to the image's."""
    min_region: float = setting(16.0, IMAGE_LEVEL)
    """A region whose clipped sides are under this many pixels of the mosaic is dropped. With a `regions.rule`
    that chooses in training, this is about the whole image, and the chosen part may be smaller."""
    paste_size: tuple[float, float] = setting((32.0, 256.0), IMAGE_LEVEL)
    """Range of sqrt(area) of a pasted crop, in pixels of the instance-level image."""
    paste_max_cover: float = setting(0.5, IMAGE_LEVEL)
    """A paste that would cover more than this share of any box is rejected."""
    max_pixels: int = setting(2**27, SHARED)
    """An image that claims more is taken for a decompression bomb, and cannot be used: 2^27 pixels are 400 MB
    as RGB. It also holds for validation images, the region search, reports and `clis predict`."""
    workers: int = setting(4, SHARED | MACHINE)
    """Loader processes per training process."""

    def __post_init__(self) -> None:
        rules = Rules("data", self)
        usable = len(self.short_sides) > 0 and min(self.short_sides) >= 1
        rules.require("short_sides", usable, "must be at least one size, all above 0")
        rules.at_least(1, "max_size", "max_pixels")
        even = self.mosaic_size > 0 and self.mosaic_size % 2 == 0
        rules.require("mosaic_size", even, "must be even and above 0")
        rules.between(0, 1, "flip", "cutout", "paste_max_cover")
        rules.at_least(0, "repeat_threshold")
        rounded = self.repeat == "repeat-factor" or self.repeat_rounding == "stochastic"
        rules.require("repeat", rounded, "requires data.repeat_rounding=stochastic (factors are below 1)")
        rules.ranges("mosaic_scale", "paste_size")
        rules.ranges("cutout_size", most=1)
        rules.at_least(1, "mosaic_surroundings", "shuffle_block", or_null=True)
        rules.positive("min_region")
        fits = self.min_region <= self.mosaic_size // 2
        rules.require("min_region", fits, "must be at most half of data.mosaic_size, else no region is left")
        share = self.image_level_share
        rules.require("image_level_share", 0 < share <= 1, "must be above 0 and at most 1")
        single = share == 1 or self.shuffle_block is None
        rules.require("image_level_share", single, "draws single images; set data.shuffle_block=null")
        rules.require("label_noise", 0 <= self.label_noise < 1, "must be at least 0 and below 1")
        rules.at_least(0, "workers", "max_bad_images")


@dataclass(frozen=True, kw_only=True)
class RegionsConfig:
    """The pre-defined region of every image-level image (section IV-A.3)."""

    file: str | None = setting(None, OWN)
    """``regions.npy``, made if it does not exist; null is the run folder's."""
    rule: Literal["category-rank-first", "top-score", "center", "full", "given", "max-size", "max-score"] = (
        setting("category-rank-first", OWN | REGIONS)
    )
    """The detector's box with the highest score for the image's own class, or for any class; the central half
    of the area; the whole image; the box in `boxes`. Or, not pre-defined, a proposal of the model in training
    that every step chooses: the largest (Detic), or the one with the highest score for the image's class
    (YOLO9000)."""
    boxes: str | None = setting(None, OWN | REGIONS)
    """For the rule ``given``: a JSON file of {image: [x1, y1, x2, y2]}, relative to `data.root`, in pixels of
    the stored image; an image is ``class/file name``, or ``class.tar:member name``."""
    detector: str | None = setting(None, OWN | REGIONS)
    """Checkpoint that finds the regions, or a config (trained first, in its own run folder)."""
    short_side: tuple[int, ...] = setting((400,), OWN | REGIONS)
    """Shorter side at which the detector sees an image; with several, the best-scoring box is used. Not the
    size at test: image-level objects fill their images, so at that size they are larger than any object that
    the detector has learned. 400 is half of LVIS's 800 (not measured; `python -m clis regions CONFIG --scan`
    measures your images)."""
    max_size: int = setting(667, OWN | REGIONS)
    """Limit of the longer side at the largest `short_side`; a smaller one has its limit in proportion."""
    images_per_batch: int = setting(1, OWN | MACHINE)

    def __post_init__(self) -> None:
        rules = Rules("regions", self)
        named = self.file is None or Path(self.file).suffix == ".npy"
        rules.require("file", named, "must end with .npy (a .json of the same name is written beside it)")
        usable = len(self.short_side) > 0 and min(self.short_side) >= 1
        rules.require("short_side", usable, "must be at least one size, all above 0")
        largest = max(self.short_side)
        enough = self.max_size >= largest
        rules.require("max_size", enough, f"must be at least the largest regions.short_side, {largest}")
        rules.at_least(1, "images_per_batch")

    @property
    def file_rule(self) -> str:
        """The rule by which `file` is made; an online one chooses within the whole image."""
        return "full" if self.rule in ONLINE_RULES else self.rule


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Start from the weights of another run, e.g. to train its last layer again with another loss."""

    from_: str | None = None
    """Checkpoint or run folder, or a config (then trained first, in its own run folder); null starts from
    `model.backbone.weights`. Written ``from``."""
    fresh: tuple[str, ...] = ()
    """Names of modules or tensors that start from scratch, e.g. ``classification.fc_cls``, or that are left
    behind in the checkpoint; everything else must fit exactly."""
    train: tuple[str, ...] = ()
    """Names of modules that are trained, while all others are frozen; none is all of them."""

    def __post_init__(self) -> None:
        rules = Rules("start", self)
        rules.require("fresh", self.from_ is not None or not self.fresh, "requires start.from")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Not CLIS: a teacher finds boxes in the mosaics, and detection is also trained on them.

    It takes the place of the image-classification task, and does not use the labels of the images.
    """

    momentum: float | None = None
    """Momentum of the teacher, which starts as a copy of the detector of `start.from`. 1 keeps it fixed
    (Self-Training). Below 1, teacher <- momentum x teacher + (1 - momentum) x detector after every step, and
    the teacher is evaluated (Unbiased Teacher, with 0.9996). null is no teacher. No effect if clis.s is 0."""
    score: float = 0.7
    """Minimum score (exclusive) of a pseudo box; 0.7 is Unbiased Teacher's. NMS and the most boxes of a
    mosaic are those of `test`."""
    boxes: bool = False
    """Also train the RPN's and the RoIs' boxes on pseudo boxes; Unbiased Teacher does not."""
    strong: bool = True
    """The detector sees the mosaics with color jitter, blur and erasing, the teacher without."""

    def __post_init__(self) -> None:
        rules = Rules("teacher", self)
        rules.require("score", 0 <= self.score < 1, "must be at least 0 and below 1")
        bounded = self.momentum is None or 0 <= self.momentum <= 1
        rules.require("momentum", bounded, "must be between 0 and 1, or null")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD and its learning-rate schedule."""

    lr: float = setting(0.02, SHARED)
    """Learning rate for a global batch of `lr_images`; scaled linearly to `train.images_per_step`."""
    lr_images: int = setting(16, SHARED)
    momentum: float = setting(0.9, SHARED | PRETRAINING)
    weight_decay: float = setting(1e-4, SHARED | PRETRAINING)
    """On everything trainable, as in mmdetection."""
    decay_steps: tuple[int, ...] = setting((60000, 80000), SHARED)
    decay_factor: float = setting(0.1, SHARED | PRETRAINING)
    warmup_steps: int = setting(500, SHARED)
    warmup_factor: float = setting(0.001, SHARED)
    clip_norm: float | None = setting(None, SHARED | PRETRAINING)
    """Limit of the gradient's global norm."""

    def __post_init__(self) -> None:
        rules = Rules("optim", self)
        rules.positive("lr")
        rules.positive("clip_norm", or_null=True)
        rules.at_least(1, "lr_images")
        rules.at_least(0, "weight_decay", "decay_factor", "warmup_steps")
        rules.require("decay_steps", min(self.decay_steps, default=0) >= 0, "must all be at least 0")
        rules.between(0, 1, "momentum", "warmup_factor")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run: length, batch, precision, device, logging and saving."""

    steps: int = setting(90000, SHARED)
    images_per_step: int = setting(16, SHARED)
    """B_d, instance-level images in the global batch."""
    images_per_process: int = setting(1, SHARED | MACHINE)
    """The most that one process takes at once; the rest is gradient accumulation."""
    seed: int = setting(0, SHARED | PRETRAINING | REGIONS)
    precision: Literal["float32", "bfloat16", "float16"] = setting("float32", SHARED | PRETRAINING)
    """Autocast type of forward, backward, evaluation and region search; losses and scores stay float32."""
    device: str = setting("auto", SHARED | MACHINE)
    """``auto`` is CUDA if available, else the CPU."""
    log_every: int = setting(20, SHARED | MACHINE)
    save_every: int = setting(5000, SHARED | MACHINE)
    """Steps between checkpoints; the last step always has one."""
    save_minutes: float | None = setting(None, SHARED | MACHINE)
    """Also save when the last checkpoint is this many minutes old."""
    keep_last: int = setting(2, SHARED | MACHINE)
    """Checkpoints kept; if the last one is damaged, the one before it is used."""
    eval_every: int | None = setting(None, SHARED | MACHINE)
    """Steps between evaluations during training; each saves a checkpoint, and the best AP is ``best.pt``."""
    on_nonfinite: Literal["stop", "skip"] = setting("stop", SHARED | MACHINE)
    """At a gradient that is NaN or infinite: end the run, or leave the step out without any trace."""
    max_skipped: int = setting(10, SHARED | MACHINE)
    """Maximum number of steps that `on_nonfinite` = ``skip`` may leave out in the whole run. With float16,
    whose scaling leaves out steps by itself, the maximum in a row. One more, or a loss scale below 1, ends
    the run."""

    def __post_init__(self) -> None:
        rules = Rules("train", self)
        rules.at_least(1, "steps", "images_per_step", "images_per_process")
        rules.at_least(1, "log_every", "save_every", "keep_last")
        rules.positive("save_minutes", "eval_every", or_null=True)
        rules.at_least(0, "max_skipped")
        rules.require("seed", 0 <= self.seed < 2**31, "must be between 0 and 2**31 - 1")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pre-training of the detector's ResNet as a classifier of the image-level images.

    This is section IV-D.4: the paper's comparison, not part of CLIS. Momentum, weight decay, decay factor
    and clipping are those of `optim`, without warm-up; seed, precision, logging and saving those of `train`;
    flip, loaders and bad images those of `data`.
    """

    epochs: int = 0
    """Passes over the images that are not held out; 0 is no pre-training, the paper's has 100."""
    images_per_step: int = 256
    """Image-level images in the global batch."""
    images_per_process: int = 32
    """The most that one process takes at once; the rest is gradient accumulation. Batch norm computes its
    statistics over these images, so the number matters (the paper: 32 on each of 8 GPUs)."""
    image_size: int = 224
    """Side of the crops in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop, relative to the image's."""
    lr: float = 0.1
    """Learning rate for `images_per_step` as it is: not scaled."""
    decay_epochs: tuple[int, ...] = (30, 60, 90)
    """Passes after which it is multiplied by `optim.decay_factor`."""
    held_out: float = 0.05
    """Share of the images that are not trained on, for the top-1 accuracy."""

    def __post_init__(self) -> None:
        rules = Rules("pretrain", self)
        rules.at_least(0, "epochs")
        rules.at_least(1, "images_per_step", "images_per_process")
        rules.at_least(32, "image_size")
        rules.ranges("scale", most=1)
        rules.require("lr", 0 < self.lr < math.inf, "must be above 0 and finite")
        positive = all(epoch > 0 for epoch in self.decay_epochs)
        rules.require("decay_epochs", positive, "must all be above 0")
        rules.require("held_out", 0 <= self.held_out < 1, "must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class TestConfig:
    """Inference: image size, and which detections are kept."""

    score_threshold: float = setting(1e-4, SHARED)
    nms_iou: float = setting(0.5, SHARED)
    detections: int = setting(300, SHARED)
    """Detections kept per image."""
    min_size: float = setting(0.0, SHARED)
    """Boxes with a side of fewer pixels of the resized image are left out before NMS (torchvision: 0.01)."""
    shrink_limit: float = setting(0.016, SHARED)
    """A box keeps at least this share of its RoI's sides; see `RPNConfig.shrink_limit`."""
    short_side: int = setting(800, SHARED)
    max_size: int = setting(1333, SHARED)
    resize: Literal["pillow", "opencv", "torchvision"] = setting("pillow", SHARED)
    """Whose bilinear resizing: ``pillow`` has antialiasing (detectron2), ``opencv`` has none (mmdetection),
    both in uint8; ``torchvision``'s detectors have none, in float, and round the sizes down."""
    images_per_batch: int = setting(1, SHARED | MACHINE)
    calibration: str | None = setting(None, OWN)
    """Correct the class probabilities for the long tail, before the objectness is multiplied in: ``norcal``,
    ``fracal`` (clis/models/calibration.py), with options as in `loss.classification`, e.g.
    ``norcal(gamma=0.6)``. Needs a loss with a softmax over classes and background; null is none."""

    def __post_init__(self) -> None:
        rules = Rules("test", self)
        rules.at_least(0, "min_size")
        rules.between(0, 1, "score_threshold", "nms_iou", "shrink_limit")
        rules.at_least(1, "detections", "short_side", "max_size")
        rules.at_least(1, "images_per_batch")


@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """The paper's figures for this very recipe, in percent, shown beside a run's own; they change nothing.

    A child file does not inherit them, and an override that changes a result removes them.
    """

    AP: float | None = None
    APr: float | None = None
    APc: float | None = None
    APf: float | None = None

    def __post_init__(self) -> None:
        rules = Rules("paper", self)
        for name, value in self.figures.items():
            rules.require(name, 0 <= value <= 100, "must be between 0 and 100")

    @property
    def figures(self) -> dict[str, float]:
        """Those that the paper has, in percent by name."""
        values = {name: getattr(self, name) for name in FIGURES}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, in sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    clis: CLISConfig = field(default_factory=CLISConfig, metadata=scoped(OWN))
    loss: LossConfig = field(default_factory=LossConfig, metadata=scoped(OWN))
    data: DataConfig = field(default_factory=DataConfig)
    regions: RegionsConfig = field(default_factory=RegionsConfig)
    start: StartConfig = field(default_factory=StartConfig, metadata=scoped(OWN))
    teacher: TeacherConfig = field(default_factory=TeacherConfig, metadata=scoped(IMAGE_LEVEL))
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig, metadata=scoped(OWN | PRETRAINING))
    test: TestConfig = field(default_factory=TestConfig)
    paper: PaperConfig = field(default_factory=PaperConfig, metadata=scoped(OWN | MACHINE))
    output: str = setting("runs/default", OWN | MACHINE)
    """The run folder; `load_config` sets it to ``runs/`` + the config's path below ``configs/``."""

    def __post_init__(self) -> None:
        """Check the rules between sections; each section checks its own."""
        for key, value in (("clis.s", self.clis.s), ("pretrain.epochs", self.pretrain.epochs)):
            if value > 0 and not self.data.image_level:
                raise ValueError(
                    f"{key}={value}: requires folders in data.image_level; name some or set {key}=0"
                )
        if self.pretrain.epochs > 0 and self.start.from_ is not None:
            raise ValueError(
                f"start.from={self.start.from_}: replaces what pretrain.epochs={self.pretrain.epochs} makes; "
                "set one of them"
            )
        self._check_regions()
        if self.has_teacher:
            self._check_teacher()
        train, test = self.data.max_size, self.test.max_size
        if self.model.backbone.canvas == "square" and -(-train // 32) != -(-test // 32):
            raise ValueError(
                f"model.backbone.canvas=square: requires equal data.max_size and test.max_size, not {train} "
                f"and {test} (one canvas in training and at test)"
            )

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher labels the mosaics."""
        return self.teacher.momentum is not None and self.clis.s > 0

    @property
    def classifies_images(self) -> bool:
        """Whether there is an image-classification task, to which the image-level images belong."""
        return self.clis.s > 0 and not self.clis.detect_mosaics and not self.has_teacher

    def _check_teacher(self) -> None:
        given = f"teacher.momentum={self.teacher.momentum}"
        if self.start.from_ is None:
            raise ValueError(f"{given}: requires a trained detector to begin with; set start.from")
        if self.clis.t > 0:
            raise ValueError(f"{given}: uses no regions to paste; set clis.t=0 and clis.contrastive=false")
        if self.clis.detect_mosaics:
            raise ValueError(f"{given}: finds boxes in the mosaics itself; set clis.detect_mosaics=false")
        if self.regions.rule != "full":
            raise ValueError(f"{given}: uses no regions; set regions.rule=full, which needs no search")

    def _check_regions(self) -> None:
        rule = self.regions.rule
        # Rules of one section, but a section that only describes a region file does not name the boxes.
        if rule == "given" and self.regions.boxes is None:
            raise ValueError("regions.rule=given: requires a file of boxes; set regions.boxes")
        if rule != "given" and self.regions.boxes is not None:
            raise ValueError(
                f"regions.boxes={self.regions.boxes}: not read by regions.rule={rule}; set "
                "regions.rule=given or regions.boxes=null"
            )
        if rule in ONLINE_RULES and self.clis.detect_mosaics:
            raise ValueError(
                f"clis.detect_mosaics=true: requires pre-defined regions, not regions.rule={rule}"
            )
        if rule in ONLINE_RULES and self.clis.t > 0:
            raise ValueError(
                f"regions.rule={rule}: chooses regions when the images are already made, so "
                "nothing can be pasted; set clis.t=0 and clis.contrastive=false"
            )
        if rule in ONLINE_RULES and self.clis.s > 0 and self.data.mosaic_surroundings is not None:
            raise ValueError(
                f"regions.rule={rule}: chooses regions when the mosaics are already made; set "
                "data.mosaic_surroundings=null, which places whole images in them"
            )


SCOPES = scopes_of(Config)
"""The scope of every field, by its dotted key."""


def scoped_keys(scope: Scope) -> tuple[str, ...]:
    """Return the dotted keys of the fields with this scope, in the order above."""
    return tuple(key for key, scopes in SCOPES.items() if scope in scopes)


RESUMABLE = scoped_keys(Scope.MACHINE)
"""What a resumed run may change without being another run."""

FIGURES = ("AP", "APr", "APc", "APf")
"""The metrics that every table shows: AP of all, rare, common and frequent classes."""

DETECTOR_RULES = ("category-rank-first", "top-score")
"""The values of `regions.rule` that use a detector."""
ONLINE_RULES = ("max-size", "max-score")
"""The values of `regions.rule` that choose among proposals in training."""


def data_path(config: Config, relative: str) -> Path:
    """Resolve a path of the config below `data.root` (an absolute one stays as it is)."""
    return Path(config.data.root or "data") / relative
