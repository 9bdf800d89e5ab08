"""Our baseline beside torchvision's own Faster R-CNN on the embedded benchmark: is ours at least level?

    python benchmarks/accuracy_vs_torchvision.py --seeds 0 1 2

Both have the same backbone and pyramid (random weights), see the same images in the same order on the same
canvas, take the same steps with the same optimizer, and are evaluated by the same metric. torchvision keeps
its RPN and RoI losses (smooth L1), RoIAlign (two points a bin, not aligned), anchors, matching and inference.
Results are kept in OUT, so that an interrupted run resumes with the next seed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from clis.config import Config, data_path
from clis.config_files import config_differences, config_from_dict, config_to_dict, load_config
from clis.data.annotated_images import read_annotated
from clis.data.annotations import load_annotations
from clis.data.loader import MicroBatches, image_loader, train_loader
from clis.data.streams import generate_data, make_streams
from clis.engine.optim import learning_rate
from clis.engine.run_folder import regions_file
from clis.engine.train import run
from clis.metric.detections import Detections
from clis.metric.lvis_eval import evaluate
from clis.models.backbone import IMAGE_MEAN, IMAGE_STD, STRIDES, Backbone
from clis.progress import Progress


class PeerBackbone(nn.Module):
    """Our ResNet and FPN in the form that torchvision asks for: a batch to named levels."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_channels = backbone.fpn.inner_blocks[0][0].out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone.body(images)
        levels = self.backbone.fpn({str(level): feature for level, feature in enumerate(features)})
        return {**levels, "P6": F.max_pool2d(levels["3"], 1, 2)}


class ClassAgnosticPredictor(nn.Module):
    """torchvision's last layers, with one box for all classes as in the benchmark's config."""

    def __init__(self, features: int, num_logits: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(features, num_logits)
        self.bbox_pred = nn.Linear(features, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.cls_score(features)
        return logits, self.bbox_pred(features).repeat(1, logits.shape[1])


def make_peer(config: Config, num_classes: int) -> FasterRCNN:
    """torchvision's Faster R-CNN of the config's sizes."""
    model, test = config.model, config.test
    sides = tuple((model.rpn.anchor_scale * stride,) for stride in STRIDES)
    ratios = (tuple(model.rpn.anchor_ratios),) * len(STRIDES)
    canonical = int(4 * model.roi.finest_scale)
    channels = model.backbone.fpn_channels
    square = model.backbone.canvas == "square"
    peer = FasterRCNN(
        PeerBackbone(Backbone(model.backbone)),
        num_classes=None,
        image_mean=[value / 255 for value in IMAGE_MEAN],
        image_std=[value / 255 for value in IMAGE_STD],
        min_size=test.short_side,
        max_size=test.max_size,
        _skip_resize=True,  # in training: the images come resized
        size_divisible=-(-test.max_size // 32) * 32 if square else 32,
        rpn_anchor_generator=AnchorGenerator(sides, ratios),
        rpn_pre_nms_top_n_train=model.rpn.pre_nms_train,
        rpn_pre_nms_top_n_test=model.rpn.pre_nms_test,
        rpn_post_nms_top_n_train=model.rpn.proposals,
        rpn_post_nms_top_n_test=model.rpn.proposals,
        rpn_batch_size_per_image=model.rpn.samples,
        rpn_positive_fraction=model.rpn.positive_fraction,
        box_roi_pool=MultiScaleRoIAlign(
            ["0", "1", "2", "3"], model.roi.pool_size, sampling_ratio=2, canonical_scale=canonical
        ),
        box_head=TwoMLPHead(channels * model.roi.pool_size**2, model.roi.fc_dim),
        box_predictor=ClassAgnosticPredictor(model.roi.fc_dim, num_classes + 1),
        box_batch_size_per_image=model.roi.samples,
        box_positive_fraction=model.roi.positive_fraction,
        box_score_thresh=test.score_threshold,
        box_nms_thresh=test.nms_iou,
        box_detections_per_img=test.detections,
    )  # fmt: skip
    return peer


def train_peer(config: Config) -> FasterRCNN:
    """The loop of `clis.engine.train.train` around torchvision's detector, on one process."""
    annotations, dataset, sampler = make_streams(config, regions_file(config))
    torch.manual_seed(config.train.seed)
    peer = make_peer(config, len(annotations.categories)).train()
    optimizer = torch.optim.SGD(
        peer.parameters(), lr=0.0, momentum=config.optim.momentum, weight_decay=config.optim.weight_decay
    )
    batches = MicroBatches(sampler, range(config.train.steps), 0, 1, config.train.images_per_step)
    with Progress("torchvision", config.train.steps) as progress:
        for step, batch in enumerate(train_loader(dataset, batches, config.data.workers, pin=False)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.optim, config.train.images_per_step)
            targets = [
                {"boxes": boxes, "labels": labels + 1} for boxes, labels in zip(batch.boxes, batch.labels)
            ]
            losses = peer([image / 255 for image in batch.images], targets)
            sum(losses.values()).backward()
            if config.optim.clip_norm is not None:
                nn.utils.clip_grad_norm_(peer.parameters(), config.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance(text=" ".join(f"{name} {loss.item():.3g}" for name, loss in losses.items()))
    return peer


@torch.no_grad()
def evaluate_peer(peer: FasterRCNN, config: Config) -> dict[str, float]:
    """Our metric on torchvision's detections of the validation split."""
    annotations = load_annotations(data_path(config, config.data.val))
    folder = data_path(config, config.data.val_images)
    peer.eval()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("image_id", "category_id", "bbox", "score")}
    category_ids = np.array([category.id for category in annotations.categories])
    read = functools.partial(read_annotated, annotations, folder)
    loader = image_loader(read, range(len(annotations)), config.test.images_per_batch, config.data.workers)
    with Progress("evaluate torchvision", len(annotations)) as progress:
        for rows, images in loader:
            for row, found in zip(rows, peer([image / 255 for image in images])):
                boxes = found["boxes"].double()
                columns["image_id"].append(np.full(len(boxes), annotations.image_ids[row]))
                columns["category_id"].append(category_ids[found["labels"].numpy() - 1])
                columns["bbox"].append(torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).numpy())
                columns["score"].append(found["scores"].numpy())
            progress.advance(len(images))
    joined: dict[str, Any] = {name: np.concatenate(rows) for name, rows in columns.items()}
    return evaluate(annotations, Detections(**joined))


def read_peer(path: Path, config: Config) -> dict[str, Any]:
    """Return the metrics of an earlier training of torchvision's detector, if it had these settings.

    Raises:
        ValueError: it had others, or does not say which.
    """
    found = json.loads(path.read_text())
    if "config" not in found:
        raise ValueError(f"{path}: of an earlier version, which does not say its settings; remove it")
    earlier = config_from_dict(found["config"], source=str(path))
    if differences := config_differences(earlier, config):
        raise ValueError(f"{path} is of other settings: {'; '.join(differences[:5])}; remove it")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="configs/shapes/baseline.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy_vs_torchvision"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "torchvision": []}
    for seed in arguments.seeds:
        ours = arguments.out / f"ours_{seed}"
        config = load_config(arguments.config, [*arguments.overrides, f"train.seed={seed}", f"output={ours}"])
        generate_data(config)
        run(config, torch.device("cpu"))
        rows["ours"].append(json.loads((ours / "eval.json").read_text()))
        path = arguments.out / f"torchvision_{seed}.json"
        if not path.exists():
            began = time.monotonic()
            metrics = evaluate_peer(train_peer(config), config)
            record = {"seconds": time.monotonic() - began, "config": config_to_dict(config)}
            path.write_text(json.dumps(metrics | record))
        rows["torchvision"].append(read_peer(path, config))
    print("| run | seeds | AP | AP50 | APr | APc | APf |\n|---|---|---|---|---|---|---|")
    for name, results in rows.items():
        cells = []
        for metric in ("AP", "AP50", "APr", "APc", "APf"):
            values = [100 * result[metric] for result in results]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| {name} | {len(results)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
