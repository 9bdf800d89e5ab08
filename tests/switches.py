"""Every switch of the model and every classification loss, and steps to try them with."""

from __future__ import annotations

import pytest
import torch
from conftest import LOSSES, QUICK, make_sample, tiny_config

from clis.data.batch import Batch, collate
from clis.engine import train
from clis.engine.describe import contrast_state, summarize_step
from clis.engine.optim import make_optimizer
from clis.models import CLISDetector

PLAIN = "clis=off"
SWITCHES = [
    (),
    (PLAIN,),
    ("clis.task_specialized=false",),
    ("clis.objectness=false",),
    ("clis.siamese=false",),
    ("clis.task_specialized=false", "clis.siamese=false"),
    ("clis.contrastive=false",),
    ("clis.pasted_view=momentum",),
    ("clis.pasted_view=online", "clis.mask_same_class=true"),
    ("clis.s=0", "clis.t=0", "clis.contrastive=false"),
    ("clis.s=8", "clis.t=4"),
    ("regions.rule=max-size", "clis.t=0", "clis.contrastive=false"),
    ("regions.rule=max-score", "clis.t=0", "clis.contrastive=false"),
    (
        *("regions.rule=full", "clis.t=0", "clis.contrastive=false", "start.from=unread.pt"),
        *("teacher.momentum=0.9", "teacher.score=0.0875"),
    ),
    ("model.roi.class_agnostic_boxes=true", "model.roi.sampling_ratio=2"),
    ("model.backbone.norm=folded", "model.backbone.trainable_layers=3"),  # pools mosaics in windows
    ("model.backbone.canvas=square", "data.max_size=96"),
    ("model.rpn.anchor_spacing=grid", "model.rpn.round_anchors=true"),
    ("optim.clip_norm=1",),
]
LOSS_SWITCHES = {name: (f"loss.classification={name}", *overrides) for name, overrides in LOSSES.items()}
SWITCHES_AND_LOSSES = [
    *(pytest.param(each, id=" ".join(each)) for each in SWITCHES),
    *(
        pytest.param(each, id=" ".join(each), marks=() if name in QUICK else pytest.mark.slow)
        for name, each in LOSS_SWITCHES.items()
    ),
]


def make_batches() -> list[Batch]:
    """A batch for each of two steps, with and without boxes, regions and pairs.

    No two anchors of these seeds have IoUs that only rounding tells apart: float32 matches them as float64.
    """
    return [
        collate([make_sample(1, size=(64, 80)), make_sample(2, truths=0, pairs=0)]),
        collate([make_sample(3, pairs=1), make_sample(5, regions=0, pairs=0)]),
    ]


def steps(model: CLISDetector, batches: list[Batch], *overrides: str) -> list[dict[str, float]]:
    """What a step on each batch says of itself."""
    config = tiny_config("train.images_per_step=2", *overrides)
    optimizer, scaler = make_optimizer(model, config), torch.amp.GradScaler("cpu", enabled=False)
    records = []
    for batch in batches:
        normalizers = train.global_normalizers(batch.counts, config)
        outputs, norm = train.train_step(
            model, model, optimizer, scaler, [batch], normalizers, 0.01, 0.5, config
        )
        records.append({"norm": norm, **summarize_step(outputs, config), **contrast_state(model, outputs)})
    return records
