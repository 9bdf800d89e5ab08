"""SGD: the learning rate as a function of the step, and the step with all its micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from clis.config import Config, OptimConfig, PretrainConfig, TrainConfig
from clis.distributed import no_sync

B = TypeVar("B")


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.SGD:
    """Make SGD over every trainable parameter; `gradient_step` sets the learning rate of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(
        parameters, lr=0.0, momentum=config.optim.momentum, weight_decay=config.optim.weight_decay
    )


def make_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """Make the loss scaler of `train.precision`; it is enabled for float16 alone."""
    return torch.amp.GradScaler(device.type, enabled=config.train.precision == "float16")


def learning_rate(step: int, optim: OptimConfig, images_per_step: int) -> float:
    """Return the rate of step 0, 1, ..., scaled to the global batch: linear warm-up, then step decay.

    Each step of `optim.decay_steps` multiplies it by `optim.decay_factor`.
    """
    rate = optim.lr * images_per_step / optim.lr_images
    rate *= optim.decay_factor ** sum(step >= decay for decay in optim.decay_steps)
    if step < optim.warmup_steps:
        rate *= optim.warmup_factor + (1 - optim.warmup_factor) * step / optim.warmup_steps
    return rate


def split_batch(
    batch: TrainConfig | PretrainConfig, processes: int, section: str = "train"
) -> tuple[int, int]:
    """Return images per micro-batch of a process, and its micro-batches per step (gradient accumulation).

    Args:
        batch: the section of the config with images per step and process.
        section: its name, for the message.

    Raises:
        ValueError: the global batch does not divide so.
    """
    images, at_most = batch.images_per_step, batch.images_per_process
    share, rest = divmod(images, processes)
    at_once = min(at_most, share)
    if rest or share % at_once:
        on = "one process" if processes == 1 else f"{processes} processes"
        raise ValueError(
            f"{section}.images_per_step={images} is not a whole number of micro-batches of "
            f"{section}.images_per_process={at_most} on {on}"
        )
    return at_once, share // at_once


def gradient_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[B],
    loss_of: Callable[[B], Tensor],
    rate: float,
    config: Config,
    device: torch.device,
) -> float:
    """Make one step on this process's micro-batches: forward and backward of each, clip, step.

    A gradient that is NaN or infinite changes nothing. It is looked for in the reduced gradient, so that all
    processes find the same, and a process whose own loss is not finite still takes part in the reduction.

    Args:
        network: the model, or DDP around it.
        loss_of: a micro-batch's part of the loss [] by `network`; called once for each, under autocast. The
            mean over the processes of the sum over their micro-batches is the loss of the step.
        rate: the step's learning rate.

    Returns:
        The norm of the gradient before clipping.
    """
    for number, batch in enumerate(batches, 1):
        # gradients travel between processes once a step, with the last micro-batch
        with no_sync(network, number < len(batches)):
            with autocast(config.train.precision, device):
                loss = loss_of(batch)
            # An infinite loss may have a finite gradient; as NaN it tells all processes, without a wait.
            loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
            scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(network.parameters(), config.optim.clip_norm or math.inf).item()
    for group in optimizer.param_groups:
        group["lr"] = rate
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()  # lowers its scale after a gradient that is not
    optimizer.zero_grad(set_to_none=True)
    return norm


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast to the type that `train.precision` names; disabled for float32."""
    return torch.autocast(
        device.type,
        getattr(torch, precision if precision != "float32" else "bfloat16"),
        enabled=precision != "float32",
    )
