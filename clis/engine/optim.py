"""SGD and the learning rate as a function of the step."""

from __future__ import annotations

import torch
from torch import nn

from clis.config import Config, OptimConfig


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.SGD:
    """SGD on every trainable parameter; the learning rate is set anew each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(
        parameters, lr=0.0, momentum=config.optim.momentum, weight_decay=config.optim.weight_decay
    )


def learning_rate(step: int, optim: OptimConfig, images_per_step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, a factor at each decay step, scaled to the global batch."""
    rate = optim.lr * images_per_step / optim.lr_images
    rate *= optim.decay_factor ** sum(step >= decay for decay in optim.decay_steps)
    if step < optim.warmup_steps:
        rate *= optim.warmup_factor + (1 - optim.warmup_factor) * step / optim.warmup_steps
    return rate
