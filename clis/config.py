"""The configuration: frozen dataclasses whose defaults are the paper's recipe (arXiv 2210.05568, IV-A).

A YAML file names only what differs; `base:` names one parent file; `key.path=value` overrides come last. Keys
are strict: an unknown one is an error that names the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    name: Literal["resnet10", "resnet18", "resnet50", "resnet101"] = "resnet50"
    """ResNet depth; 50 and 101 have bottleneck blocks, 10 (one block a stage) and 18 basic ones."""
    width: int = 64
    """Channels of the stem and the first stage; torchvision's networks have 64."""
    norm: Literal["folded", "frozen", "group"] = "folded"
    """``folded``: batch norm with fixed statistics and trainable affine, folded into the convolution;
    ``frozen``: the same with a fixed affine; ``group``: group norm, for training from random weights. Group
    norm's statistics take in the padding, so images of different sizes in a batch affect each other, unless
    `canvas` is ``square``."""
    canvas: Literal["batch", "square"] = "batch"
    """What images are zero-padded to: the largest of their ``batch``, or a ``square`` of the longest side
    that they may have, `data.max_size` and `test.max_size`, which then have to agree. On the square, group
    norm sees an instance-level image with the same padding in training, at test and in any batch. The region
    search has a square of `regions.max_size`; mosaics, all of one size, have none. Both are rounded up to a
    multiple of 32."""
    norm_eps: float = 1e-5
    """Added to the variance; torchvision takes 0 for the COCO weights of its detector."""
    stride_in_1x1: bool = False
    """A bottleneck's stride is in its first 1x1 convolution (caffe's ResNets, detectron2's default), not in
    the 3x3 (torchvision)."""
    trainable_layers: int = 3
    """How many of (conv1, layer1, ..., layer4), from the top, are trained: 3 freezes stem and layer1."""
    weights: str | None = None
    """A ResNet state dict with torchvision's names, relative to `data.root`: torchvision's, or the
    ``backbone.pt`` that `python -m clis pretrain` makes, with the norm that it was made with; null is random
    weights. With `pretrain.epochs` the pre-training starts from it, and the detector from what comes out."""
    download: bool = False
    """Fetch torchvision's ImageNet-1K weights if `weights` does not exist yet."""
    fpn_channels: int = 256
    """Channels of P2-P6."""


@dataclass(frozen=True, kw_only=True)
class RPNConfig:
    anchor_scale: float = 8.0
    """Anchor side in strides (mmdetection: 8)."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width."""
    round_anchors: bool = False
    """Half sides of the anchors in whole pixels (torchvision)."""
    anchor_spacing: Literal["stride", "grid"] = "stride"
    """Pixels from anchor to anchor: the level's stride, or padded image size // ``grid`` size (torchvision),
    which is below P6's stride of 64 where its last row or column reaches beyond the image."""
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    samples: int = 256
    """Anchors sampled an image for the loss."""
    positive_fraction: float = 0.5
    pre_nms_train: int = 2000
    """Candidates a level before NMS."""
    pre_nms_test: int = 1000
    nms_iou: float = 0.7
    proposals: int = 1000
    """Proposals kept an image."""
    min_size: float = 0.0
    """Minimum side of a proposal in pixels, exclusive (torchvision: 0.001)."""
    shrink_limit: float = 0.016
    """A proposal keeps at least this share of its anchor's sides (mmdetection: 16 / 1000); 0 is no limit
    (torchvision, detectron2)."""


@dataclass(frozen=True, kw_only=True)
class RoIConfig:
    samples: int = 512
    """RoIs sampled an image in training."""
    positive_fraction: float = 0.25
    positive_iou: float = 0.5
    pool_size: int = 7
    sampling_ratio: int = 0
    """RoIAlign points a bin; 0 is adaptive (mmdetection)."""
    aligned: bool = True
    """RoIAlign's half-pixel correction."""
    finest_scale: float = 56.0
    """RoIs with sqrt(area) below twice this many pixels are pooled from P2."""
    fc_dim: int = 1024
    """Width D of the two hidden layers of each sub-network."""
    class_agnostic_boxes: bool = False
    """One box for all classes instead of one a class."""
    fc_cls_std: float = 0.01
    """Standard deviation of the last classification fc's first weights (mmdetection: 0.01; torchvision's
    detector: 1 / sqrt(3 * fc_dim)). A wider start lets classification take off sooner in a short training."""
    cosine: float | None = None
    """Scale of a cosine classifier as the last classification fc, 20 in Seesaw's recipes for LVIS; null is a
    linear layer."""
    refinement_rounds: int | None = None
    """Apply the heads this often, 2 to 5 times, each time to features that their predictions have refined
    (PCB's recipes have 3); null applies them once."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)


@dataclass(frozen=True, kw_only=True)
class CLISConfig:
    """The parts of CLIS (section III). All off, with s = t = 0, is a plain Faster R-CNN."""

    task_specialized: bool = True
    """TSS: the localization task has a sub-network of its own; off, it shares classification's 2fc."""
    objectness: bool = True
    """L_obj on the localization sub-network, multiplied into the score at inference."""
    s: int = 16
    """Image-level images to one instance-level image, a multiple of 4; 0 is without them (w/o ILS)."""
    t: int = 2
    """Instances pasted into each instance-level image, t <= s; 0 is no pasting."""
    siamese: bool = True
    """SS: image classification shares 2fc and last fc with instance classification; off, it has its own
    (without TSS its own last fc alone)."""
    contrastive: bool = True
    """CLR: L_con on the pasted pairs; off with t > 0, the pasted instances are ordinary ground truth only."""
    embedding_dim: int = 128
    """E, the output of the projection MLPs."""
    queue_size: int = 115712
    """Q, keys held in the dictionary."""
    queue_init: Literal["empty", "noise"] = "empty"
    """An empty queue masks its unfilled places; ``noise`` starts from normalized Gaussian keys (MoCo)."""
    momentum: float = 0.999
    """Of the copy of the instance-classification sub-network and its MLP."""
    temperature: float = 0.2
    """tau of Eq. 1."""
    pasted_view: Literal["symmetric", "momentum", "online"] = "symmetric"
    """What is contrasted. ``symmetric``: f_i with the momentum key of the pasted view and f_d with that of
    the region, the mean of both. ``momentum``: f_i with the key of the pasted view alone; one MLP serves both
    tasks, since the instance task's own would never learn. ``online``: f_i with f_d, both with a gradient;
    beside negatives from the lagging copy this is solved without telling instances apart."""
    mask_same_class: bool = False
    """Leave keys of the query's class out of the negatives; Eq. 1 keeps them."""


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
        }


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    root: str | None = None
    """Folder that the paths below are relative to; null is $CLIS_DATA, or ``data`` where that is unset."""
    generate: Literal["shapes"] | None = None
    """Write the embedded benchmark to ``root/shapes`` if it is not there."""
    train: str = "lvis/lvis_v1_train.json"
    """Instance-level annotations (D_d): LVIS v1, LVIS v0.5 or COCO form."""
    train_images: str = "coco"
    """Folder of their images; LVIS v1 names them ``train2017/000000391895.jpg`` below it."""
    val: str = "lvis/lvis_v1_val.json"
    val_images: str = "coco"
    image_level: tuple[str, ...] = ("imagenet22k",)
    """Folders of the image-level images (D_i): one folder or one tar a class, scanned at every start. Or the
    one folder that `python -m clis prepare image-level` wrote, which opens at once; it has its own mapping,
    and `mapping` and `drop_unmatched` do not matter."""
    shuffle_block: int | None = None
    """Shuffle the image-level images in blocks of this many neighbors of their index, for shards of mixed
    classes that are too many for random access; null shuffles over all. Class folders and class tars need
    null: a block of theirs is of one class."""
    mapping: str | None = None
    """File of ``wnid<TAB>category`` lines, where folder names alone do not tell the class."""
    drop_unmatched: bool = False
    """Leave out image-level folders that match no category instead of stopping."""
    drop_invalid: bool = False
    """Drop boxes without area or with a side under one pixel (mmdetection), and clip boxes that leave the
    image, instead of stopping."""
    empty_images: bool = False
    """Train on images that no box is left in, too; mmdetection and detectron2 leave them out. Repeat factors
    are counted on the images that are left."""
    max_bad_images: int = 0
    """Unreadable images that a start of a run may replace by the next of their stream before it stops; each
    counts once a process."""
    image_level_share: float = 1.0
    """Share of the image-level images that are used, above 0; `train.seed` draws which. What replaces an
    unreadable image may be any."""
    label_noise: float = 0.0
    """Share of the image-level images that get the label of another class, drawn by `train.seed`: what a
    stream from a search engine may be like (section IV-D.5). Those that pre-training holds out too."""
    repeat_threshold: float = 1e-3
    """t of repeat-factor sampling: classes in a smaller share of the images are repeated."""
    repeat_rounding: Literal["ceil", "stochastic", "none"] = "ceil"
    """``ceil`` as mmdetection, ``stochastic`` as detectron2, ``none`` for no repetition."""
    short_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Scale jitter: the shorter side is drawn from these."""
    max_size: int = 1333
    """Limit of the longer side."""
    flip: float = 0.5
    """Probability of the horizontal flip, in both streams and for pasted crops."""
    mosaic_size: int = 448
    """Side of the canvas of four image-level images."""
    mosaic_scale: tuple[float, float] = (0.5, 1.5)
    """Random scaling of an image-level image, relative to fit-to-tile."""
    mosaic_surroundings: float | None = None
    """Crop an image-level image to its region, sides times this factor, before it is fitted to its tile, so
    that regions are larger in their mosaics; null, the paper's reading, places the whole image."""
    cutout: float = 0.5
    """Probability of cutout on an image-level image."""
    cutout_size: tuple[float, float] = (0.1, 0.4)
    """Sides of the cutout rectangle, relative to the image's."""
    min_region: float = 16.0
    """A region whose clipped sides are under this many pixels of the mosaic is dropped."""
    paste_size: tuple[float, float] = (32.0, 256.0)
    """Range of sqrt(area) of a pasted crop, in pixels of the instance-level image."""
    paste_max_cover: float = 0.5
    """A paste that would cover more than this share of any box is rejected."""
    workers: int = 4
    """Loader processes for each training process."""


@dataclass(frozen=True, kw_only=True)
class RegionsConfig:
    """The pre-defined region of every image-level image (section IV-A.3)."""

    file: str | None = None
    """``regions.npy``, made if it does not exist; null is the run folder's."""
    rule: Literal["category-rank-first", "top-score", "center", "full", "given"] = "category-rank-first"
    """The detector's box that scores highest for the image's own class, or for any; the central half of the
    area; the whole image; the box that `boxes` has."""
    boxes: str | None = None
    """Of the rule ``given``: a JSON file of {image: [x1, y1, x2, y2]}, relative to `data.root`, in pixels of
    the stored image; an image is ``class/file name``, or ``class.tar:member name``."""
    detector: str | None = None
    """Checkpoint that finds the regions, or a config (then trained first, in its own run folder)."""
    short_side: tuple[int, ...] = (400,)
    """Shorter side at which the detector looks at an image; with several, the best-scoring box is taken. Not
    the size at test: image-level objects fill their images, so at that size they are larger than any object
    that the detector has learned. 400 is half of LVIS's 800 (not measured; `python -m clis regions CONFIG
    --scan` measures your images)."""
    max_size: int = 667
    """Limit of the longer side at the largest `short_side`; a smaller one has its limit in proportion."""
    images_per_batch: int = 1


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 0.02
    """Learning rate for a global batch of `lr_images`; scaled linearly to `train.images_per_step`."""
    lr_images: int = 16
    momentum: float = 0.9
    weight_decay: float = 1e-4
    """On everything trainable, as in mmdetection."""
    decay_steps: tuple[int, ...] = (60000, 80000)
    decay_factor: float = 0.1
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    clip_norm: float | None = None
    """Limit of the gradient's global norm."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 90000
    images_per_step: int = 16
    """B_d, instance-level images in the global batch."""
    images_per_process: int = 1
    """The most that one process takes at once; the rest is gradient accumulation."""
    seed: int = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast type of forward and backward; losses stay float32."""
    device: str = "auto"
    """``auto`` is CUDA where there is one, else the CPU."""
    log_every: int = 20
    save_every: int = 5000
    """Steps between checkpoints; the last step has one in any case."""
    save_minutes: float | None = None
    """Also a checkpoint when the last one is so old."""
    keep_last: int = 2
    """Checkpoints kept; the one before the last takes over where the last turns out damaged."""
    eval_every: int | None = None
    """Steps between evaluations during training; each saves a checkpoint, and the best AP is ``best.pt``."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a gradient that is NaN or infinite: end the run, or leave the step out without any trace."""
    max_skipped: int = 10
    """Most steps that `on_nonfinite` = ``skip`` may leave out in the whole run. With float16, whose scaling
    leaves out steps by itself, most of them in a row. One more, or a loss scale below 1, ends the run."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The detector's ResNet is first trained as a classifier of the image-level images (section IV-D.4: the
    paper's comparison, no part of CLIS).

    Momentum, weight decay, decay factor and clipping are those of `optim`, without warm-up; seed, precision,
    logging and saving those of `train`, flip, loaders and bad images those of `data`.
    """

    epochs: int = 0
    """Passes over the images that are not held out; 0 is without pre-training, the paper's has 100."""
    images_per_step: int = 256
    """Image-level images in the global batch."""
    images_per_process: int = 32
    """The most that one process takes at once; the rest is gradient accumulation. Batch norm takes its
    statistics over these images, so that the number matters (the paper: 32 on each of 8 GPUs)."""
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


@dataclass(frozen=True, kw_only=True)
class TestConfig:
    score_threshold: float = 1e-4
    nms_iou: float = 0.5
    detections: int = 300
    """Detections kept an image."""
    min_size: float = 0.0
    """Boxes with a side of fewer pixels of the resized image are left out before NMS (torchvision: 0.01)."""
    shrink_limit: float = 0.016
    """A box keeps at least this share of its RoI's sides; see `RPNConfig.shrink_limit`."""
    short_side: int = 800
    max_size: int = 1333
    resize: Literal["pillow", "opencv", "torchvision"] = "pillow"
    """Whose bilinear resizing: ``pillow`` has antialiasing (detectron2), ``opencv`` has none (mmdetection),
    both in uint8; ``torchvision``'s detectors have none, in float, and round the sizes down."""
    images_per_batch: int = 1
    export_candidates: int = 5000
    """Boxes of an image that NMS chooses from in a program of `python -m clis export`; elsewhere they are all
    that it needs."""


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    clis: CLISConfig = field(default_factory=CLISConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    regions: RegionsConfig = field(default_factory=RegionsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    test: TestConfig = field(default_factory=TestConfig)
    output: str = "runs/default"
    """The run folder; `load_config` sets it to ``runs/`` + the config's path below ``configs/``."""

    def __post_init__(self) -> None:
        _check(self)


# Fields of `DataConfig` that matter to the image-level stream and the pasting from it alone.
IMAGE_LEVEL_FIELDS = (
    "image_level", "shuffle_block", "mapping", "drop_unmatched", "image_level_share", "label_noise",
    "mosaic_size", "mosaic_scale", "mosaic_surroundings", "cutout", "cutout_size", "min_region", "paste_size",
    "paste_max_cover",
)  # fmt: skip

DETECTOR_RULES = ("category-rank-first", "top-score")
"""The rules of `regions.rule` that a detector applies."""

# Machine settings: a resumed run may change them without being another run.
RESUMABLE = (
    "data.root", "data.workers", "train.device", "train.images_per_process", "train.log_every",
    "train.save_every", "train.save_minutes", "train.keep_last", "train.eval_every",
    "regions.images_per_batch", "test.images_per_batch", "test.export_candidates", "output",
)  # fmt: skip


def data_path(config: Config, relative: str) -> Path:
    """A path of the config below `data.root` (an absolute one stays as it is)."""
    return Path(config.data.root or "data") / relative


def _check(config: Config) -> None:
    """Raises `ValueError` for settings that contradict each other or cannot work.

    A rule says what must hold, so that a NaN breaks it too.
    """
    for right, message in (*_model_rules(config), *_data_rules(config), *_run_rules(config)):
        if not right:
            raise ValueError(message)


def _model_rules(config: Config) -> Iterator[tuple[Any, str]]:
    clis, backbone, rpn, roi = config.clis, config.model.backbone, config.model.rpn, config.model.roi
    yield clis.s >= 0 and clis.s % 4 == 0, f"clis.s={clis.s}: a multiple of 4, for a mosaic holds four images"
    yield 0 <= clis.t <= clis.s, f"clis.t={clis.t}: between 0 and clis.s={clis.s}"
    yield (
        clis.t > 0 or not clis.contrastive,
        "clis.contrastive=true needs pasted pairs: set clis.t above 0 or clis.contrastive=false",
    )
    yield clis.queue_size >= 1, f"clis.queue_size={clis.queue_size}: at least 1"
    yield 0 <= clis.momentum <= 1, f"clis.momentum={clis.momentum}: between 0 and 1"
    yield clis.temperature > 0, f"clis.temperature={clis.temperature}: above 0"
    yield 0 <= backbone.trainable_layers <= 5, "model.backbone.trainable_layers: between 0 and 5"
    yield 0 <= backbone.norm_eps < math.inf, f"model.backbone.norm_eps={backbone.norm_eps}: at least 0"
    yield (
        not backbone.stride_in_1x1 or backbone.name in ("resnet50", "resnet101"),
        f"model.backbone.stride_in_1x1=true needs bottleneck blocks, which {backbone.name} has not",
    )
    if backbone.norm == "group":
        yield (
            backbone.width % 16 == 0,
            f"model.backbone.width={backbone.width}: a multiple of 16 with group norm",
        )
        yield (
            backbone.fpn_channels % 16 == 0,
            f"model.backbone.fpn_channels={backbone.fpn_channels}: a multiple of 16 with group norm",
        )
    yield min(rpn.samples, roi.samples, rpn.proposals) >= 1, "model: samples and proposals are at least 1"
    yield len(rpn.anchor_ratios) > 0 and min(rpn.anchor_ratios) > 0, "model.rpn.anchor_ratios: above 0"
    for name, fraction in (("rpn", rpn.positive_fraction), ("roi", roi.positive_fraction)):
        yield 0 <= fraction <= 1, f"model.{name}.positive_fraction={fraction}: between 0 and 1"
    for name, section in (("model.rpn", rpn), ("test", config.test)):
        yield 0 <= section.min_size < math.inf, f"{name}.min_size={section.min_size}: at least 0"
        limit = section.shrink_limit
        yield 0 <= limit <= 1, f"{name}.shrink_limit={limit}: between 0 and 1"
    yield 0 <= roi.fc_cls_std < math.inf, f"model.roi.fc_cls_std={roi.fc_cls_std}: at least 0 and finite"
    yield (
        roi.cosine is None or 0 < roi.cosine < math.inf,
        f"model.roi.cosine={roi.cosine}: above 0 and finite, or null",
    )
    yield (
        roi.refinement_rounds is None or 2 <= roi.refinement_rounds <= 5,
        f"model.roi.refinement_rounds={roi.refinement_rounds}: between 2 and 5, or null",
    )
    for name, weight in config.loss.weights.items():
        yield 0 <= weight < math.inf, f"loss: the weight of {name} is {weight}; at least 0 and finite"


def _data_rules(config: Config) -> Iterator[tuple[Any, str]]:
    data = config.data
    yield data.short_sides and min(data.short_sides) >= 1, "data.short_sides: at least one size, above 0"
    for key, needed in (("clis.s", config.clis.s > 0), ("pretrain.epochs", config.pretrain.epochs > 0)):
        yield data.image_level or not needed, f"{key} > 0 needs data.image_level folders, or set {key}=0"
    yield data.mosaic_size > 0 and data.mosaic_size % 2 == 0, f"data.mosaic_size={data.mosaic_size}: even"
    for name in ("flip", "cutout", "paste_max_cover"):
        yield 0 <= getattr(data, name) <= 1, f"data.{name}={getattr(data, name)}: between 0 and 1"
    for name in ("mosaic_scale", "cutout_size", "paste_size"):
        low, high = getattr(data, name)
        yield 0 < low <= high, f"data.{name}=[{low:g}, {high:g}]: lower bound above 0, then upper bound"
    yield (
        data.mosaic_surroundings is None or 1 <= data.mosaic_surroundings < math.inf,
        f"data.mosaic_surroundings={data.mosaic_surroundings}: at least 1, or null",
    )
    yield data.cutout_size[1] <= 1, f"data.cutout_size={list(data.cutout_size)}: at most 1, the whole side"
    yield data.min_region > 0, f"data.min_region={data.min_region}: above 0"
    yield (
        data.shuffle_block is None or data.shuffle_block >= 1,
        f"data.shuffle_block={data.shuffle_block}: at least 1, or null",
    )
    yield 0 < data.image_level_share <= 1, f"data.image_level_share={data.image_level_share}: in (0, 1]"
    yield (
        data.image_level_share == 1 or data.shuffle_block is None,
        "data.image_level_share draws single images: set data.shuffle_block=null",
    )
    yield 0 <= data.label_noise < 1, f"data.label_noise={data.label_noise}: in [0, 1)"
    yield (
        (config.regions.rule == "given") == (config.regions.boxes is not None),
        f"regions.rule={config.regions.rule}, regions.boxes={config.regions.boxes}: the rule `given` needs a "
        "file of boxes, the others do not read one",
    )
    for name in ("workers", "max_bad_images"):
        yield getattr(data, name) >= 0, f"data.{name}={getattr(data, name)}: at least 0"
    searched, most = config.regions.short_side, config.regions.max_size
    yield len(searched) > 0, "regions.short_side: at least one size"
    yield (
        most >= max(searched, default=0),
        f"regions.max_size={most}: at least the largest regions.short_side, {max(searched, default=0)}",
    )
    padded = [-(-side // 32) for side in (data.max_size, config.test.max_size)]
    yield (
        config.model.backbone.canvas == "batch" or padded[0] == padded[1],
        f"model.backbone.canvas=square needs equal data.max_size and test.max_size, not {data.max_size} and "
        f"{config.test.max_size}: images lie on one canvas in training and at test",
    )
    for section, sizes in (
        ("data", (data.max_size,)),
        ("regions", (*config.regions.short_side, config.regions.max_size)),
        ("test", (config.test.short_side, config.test.max_size)),
    ):
        yield min(sizes) >= 1, f"{section}: image sizes are at least 1"


def _run_rules(config: Config) -> Iterator[tuple[Any, str]]:
    train, optim = config.train, config.optim
    for name in ("steps", "images_per_step", "images_per_process", "log_every", "save_every", "keep_last"):
        yield getattr(train, name) >= 1, f"train.{name}={getattr(train, name)}: at least 1"
    for name in ("save_minutes", "eval_every"):
        value = getattr(train, name)
        yield value is None or value > 0, f"train.{name}={value}: above 0, or null"
    yield train.max_skipped >= 0, f"train.max_skipped={train.max_skipped}: at least 0"
    yield 0 <= train.seed < 2**31, f"train.seed={train.seed}: between 0 and 2**31 - 1"
    yield optim.lr > 0 and optim.lr_images >= 1, f"optim.lr={optim.lr}: above 0, optim.lr_images at least 1"
    yield from _pretrain_rules(config.pretrain)
    yield config.test.images_per_batch >= 1, "test.images_per_batch: at least 1"
    for name in ("detections", "export_candidates"):
        yield getattr(config.test, name) >= 1, f"test.{name}={getattr(config.test, name)}: at least 1"
    yield config.regions.images_per_batch >= 1, "regions.images_per_batch: at least 1"


def _pretrain_rules(pretrain: PretrainConfig) -> Iterator[tuple[Any, str]]:
    yield pretrain.epochs >= 0, f"pretrain.epochs={pretrain.epochs}: at least 0"
    for name, least in (("images_per_step", 1), ("images_per_process", 1), ("image_size", 32)):
        yield getattr(pretrain, name) >= least, f"pretrain.{name}={getattr(pretrain, name)}: at least {least}"
    low, high = pretrain.scale
    yield (
        0 < low <= high <= 1,
        f"pretrain.scale=[{low:g}, {high:g}]: a range above 0 and up to at most 1",
    )
    yield 0 < pretrain.lr < math.inf, f"pretrain.lr={pretrain.lr}: above 0 and finite"
    yield (
        all(epoch > 0 for epoch in pretrain.decay_epochs),
        f"pretrain.decay_epochs={list(pretrain.decay_epochs)}: above 0",
    )
    yield 0 <= pretrain.held_out < 1, f"pretrain.held_out={pretrain.held_out}: at least 0 and below 1"
