"""Pre-training instead of joint training (section IV-D.4): the detector's ResNet learns to classify first."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clis.atomic import atomic_write
from clis.config import Config, data_path, scoped_keys
from clis.config_scopes import Scope
from clis.data.classification import LabeledBatch, RandomCrops, Split, central_crop, collate_labeled
from clis.data.image_level import ImageLevelIndex
from clis.data.images import ImageError
from clis.data.loader import MicroBatches, image_loader, train_loader
from clis.data.sampling import SingleSampler
from clis.data.streams import make_image_level_sampler, make_index, read_annotations
from clis.distributed import all_reduce_sum, on_main, rank, world_size
from clis.engine.bad_images import check_bad_images
from clis.engine.describe import describe_pretraining
from clis.engine.loop import Training
from clis.engine.optim import gradient_step, learning_rate, split_batch
from clis.engine.run_folder import RunFolder
from clis.engine.schedule import due_after
from clis.engine.skipped import NotFinite
from clis.losses import at_least_float32
from clis.models import ImageClassifier, build_classifier
from clis.progress import Progress, say
from clis.text import shortened

SETTINGS = scoped_keys(Scope.PRETRAINING)
"""What makes another pre-training; see `Scope`."""

ADVICE = "a lower pretrain.lr or an optim.clip_norm may help"
"""What to try where a loss or gradient is not finite."""


def pretrain(config: Config, device: torch.device) -> Path:
    """Make the ``backbone.pt`` of a config in the folder ``pretrain`` of its run, resuming there, if needed.

    It is a ResNet state dict in torchvision's form, with the classifier; ``pretrain.json`` beside it has the
    top-1 accuracy on the images that were held out.

    Returns:
        Its path.

    Raises:
        FileNotFoundError, ValueError: files are missing or wrong, or the folder is of other settings.
        ImageError: more images than `data.max_bad_images` cannot be read.
    """
    folder = RunFolder(config.output).pretraining
    folder.claim(config, SETTINGS)
    path = folder.backbone
    if on_main(path.exists):
        say(f"{path} already exists")
        return path
    annotations = read_annotations(data_path(config, config.data.train))
    index = make_index(config, annotations)
    _claim_images(folder, index)
    split = Split(len(index), round(config.pretrain.held_out * len(index)))
    if split.trained == 0:
        raise ValueError(f"pretrain.held_out={config.pretrain.held_out} leaves none of {len(index)} images")
    images = len(make_image_level_sampler(config, index, split.trained))
    torch.manual_seed(config.train.seed)
    model = build_classifier(config, annotations.categories).to(device)
    train_classifier(model, _as_stage(config, images), folder, index, split, device)
    report = held_out_accuracy(model.eval(), config, index, split, device)
    report |= {"trained_images": images, "epochs": config.pretrain.epochs}

    def write() -> None:
        with atomic_write(folder.accuracy) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        with atomic_write(path) as temporary:
            torch.save({key: value.cpu() for key, value in model.state_dict().items()}, temporary)

    on_main(write)
    say(f"{path}: top-1 accuracy {_percent(report['top1'])} on {report['held_out_images']} held-out images")
    return path


def train_classifier(
    model: ImageClassifier,
    config: Config,
    folder: RunFolder,
    index: ImageLevelIndex,
    split: Split,
    device: torch.device,
) -> None:
    """Train for `train.steps` steps, or resume from the last checkpoint, as `clis.engine.train`.

    Args:
        config: with `train` and `optim` as they are in pre-training.
    """
    images_per_process, accumulation = split_batch(config.train, world_size(), "pretrain")
    training = Training(model, config, folder, device, ADVICE, (*SETTINGS, "train.steps"))
    shuffle = make_image_level_sampler(config, index, split.trained)
    say(describe_pretraining(config, len(shuffle), split.held_out, model, accumulation))
    sampler = SingleSampler(shuffle, config.train.images_per_step, config.train.seed)
    micro_batches = MicroBatches(sampler, training.remaining, rank(), world_size(), images_per_process)
    dataset = RandomCrops(config.data, config.pretrain, index, split)
    pin = device.type == "cuda"
    loader = train_loader(dataset, micro_batches, config.data.workers, pin, collate_labeled)
    with training.run(
        loader, LabeledBatch, accumulation, "pretrain",
        where=lambda done: f"{folder}: step {done + 1} of the pre-training",
        less_memory="a lower pretrain.images_per_process or pretrain.image_size",
    ) as steps:  # fmt: skip
        for step, given in steps:
            rate = learning_rate(step, config.optim, config.train.images_per_step)
            done, text = step + 1, ""
            sums, norm = classification_step(
                training.network, model, training.optimizer, training.scaler, given.batches, rate, config
            )
            training.made(given, norm, functools.partial(_not_finite, sums, given.batches))
            if due_after(done, config.train).record:
                loss, top1 = (all_reduce_sum(sums.sum(dim=0)) / config.train.images_per_step).tolist()
                training.write(done, {"loss": loss, "top1": top1}, norm, rate)
                text = f"loss {loss:.2f} top-1 {_percent(top1)}"
            training.progress.advance(text=text)


def classification_step(
    network: nn.Module,
    model: ImageClassifier,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[LabeledBatch],
    rate: float,
    config: Config,
) -> tuple[Tensor, float]:
    """Make one step of softmax cross-entropy on this process's micro-batches.

    Args:
        network: the model, or DDP around it.
        rate: the step's learning rate.

    Returns:
        Of each micro-batch the sum of the losses and the number of right first guesses, [n,2]; and the norm
        of the gradient before clipping.
    """
    device = batches[0].images.device
    sums = []
    statistics = _running_statistics(model)
    before = [value.clone() for value in statistics]

    def mean_loss(batch: LabeledBatch) -> Tensor:
        logits = at_least_float32(network(batch.images))
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        right = (logits.argmax(dim=1) == batch.labels).sum()
        sums.append(torch.stack([loss.detach(), right.to(loss.dtype)]))
        return loss * world_size() / config.train.images_per_step

    norm = gradient_step(network, optimizer, scaler, batches, mean_loss, rate, config, device)
    if not math.isfinite(norm):  # the step leaves no trace
        for value, kept in zip(statistics, before):
            value.copy_(kept)
    elif statistics and world_size() > 1:  # each process has those of its own images
        mean = all_reduce_sum(torch.cat(statistics)) / world_size()
        for value, share in zip(statistics, mean.split([len(value) for value in statistics])):
            value.copy_(share)
    return torch.stack(sums), norm


@torch.no_grad()
def held_out_accuracy(
    model: ImageClassifier, config: Config, index: ImageLevelIndex, split: Split, device: torch.device
) -> dict[str, float | None]:
    """Measure how often the first guess is right on the central crops of the readable held-out images.

    Returns:
        ``top1``, a share or None where there are no such images, and ``held_out_images``, their number; the
        same on all processes.

    Raises:
        ImageError: more images than `data.max_bad_images` cannot be read.
    """
    rows = [split.held_out_row(place) for place in range(rank(), split.held_out, world_size())]
    read = functools.partial(
        central_crop, index, config.pretrain.image_size, max_pixels=config.data.max_pixels
    )
    loader = image_loader(read, rows, config.pretrain.images_per_process, config.data.workers)
    counts, unreadable = torch.zeros(3, dtype=torch.int64), []
    with Progress("held-out images", len(rows)) as progress:
        for batch_rows, images in loader:
            crops = {row: image for row, image in zip(batch_rows, images) if isinstance(image, Tensor)}
            unreadable += [image for image in images if isinstance(image, str)]
            check_bad_images(unreadable, config.data.max_bad_images)
            if crops:
                guesses = model(torch.stack(list(crops.values())).to(device)).argmax(dim=1).cpu()
                right = guesses.numpy() == index.labels[list(crops)]
                counts += torch.tensor([int(right.sum()), len(crops), 0])
            progress.advance(len(images))
    counts[2] = len(unreadable)
    right, judged, bad = all_reduce_sum(counts).tolist()
    if bad > config.data.max_bad_images:
        raise ImageError(
            f"unreadable held-out images of all processes: {bad}, and data.max_bad_images allows "
            f"{config.data.max_bad_images}"
        )
    return {"top1": right / judged if judged else None, "held_out_images": judged}


def _claim_images(folder: RunFolder, index: ImageLevelIndex) -> None:
    """Tie the folder to the images of an index, whose order says which of them are held out.

    Raises:
        ValueError: the pre-training has begun with others, or this process has found others than rank 0.
    """

    def claimed() -> str:
        if not folder.has_begun:
            with atomic_write(folder.index_digest) as temporary:
                temporary.write_text(f"{index.digest}\n")
        return folder.index_digest.read_text().strip() if folder.index_digest.exists() else index.digest

    if on_main(claimed) != index.digest:
        raise ValueError(
            f"{folder}: the image-level images have changed since this pre-training began, and with them the "
            "held-out ones; restore them, or remove the folder to start over"
        )


def _as_stage(config: Config, images: int) -> Config:
    """Return the config with `train` and `optim` as they are in pre-training with `images` images."""
    pretrain = config.pretrain

    def steps(epochs: int) -> int:
        return -(-epochs * images // pretrain.images_per_step)

    train = dataclasses.replace(
        config.train,
        steps=steps(pretrain.epochs),
        images_per_step=pretrain.images_per_step,
        images_per_process=pretrain.images_per_process,
        eval_every=None,
    )
    optim = dataclasses.replace(
        config.optim,
        lr=pretrain.lr,
        lr_images=pretrain.images_per_step,
        decay_steps=tuple(map(steps, pretrain.decay_epochs)),
        warmup_steps=0,
    )
    return dataclasses.replace(config, train=train, optim=optim)


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """Return running means and variances of batch norm, [channels] each; empty with group norm."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    values = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
    return [value for value in values if value is not None]


def _not_finite(sums: Tensor, batches: Sequence[LabeledBatch]) -> NotFinite:
    """Say which images had a loss that was not finite in a step."""
    bad = [batch for loss, batch in zip(sums[:, 0].tolist(), batches) if not math.isfinite(loss)]
    losses = [f"loss on images {shortened(batch.names)}" for batch in bad]
    return NotFinite(losses, [name for batch in batches for name in batch.names])


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f}"
