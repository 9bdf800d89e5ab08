"""What a run says of itself: its effective recipe at the start, the record and the line of a step."""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch

from clis.config import Config
from clis.data.annotations import Annotations
from clis.data.image_level import ImageLevelIndex
from clis.data.sampling import JointSampler
from clis.distributed import all_reduce_sum, world_size
from clis.engine.optim import learning_rate
from clis.models import CLISDetector, ImageClassifier, TrainOutput


def describe_run(
    config: Config,
    annotations: Annotations,
    index: ImageLevelIndex | None,
    sampler: JointSampler,
    model: CLISDetector,
    accumulation: int,
) -> str:
    """The recipe as it will run on these data and processes, line by line."""
    data, clis, train, optim = config.data, config.clis, config.train, config.optim
    groups = [category.frequency for category in annotations.categories]
    counts = " ".join(f"{groups.count(group)} {group}" for group in "rcf")
    instance, image_level = sampler.passes(train.steps)
    lines = [
        f"{len(annotations)} instance-level images, {len(annotations.labels)} boxes, {len(groups)} classes "
        f"({counts}); repeat factors {data.repeat_rounding}, threshold {data.repeat_threshold:g}: a pass is "
        f"{sampler.instance_pass} images"
    ]
    if index is not None:
        lines.append(
            f"{len(index)} image-level images of {(index.image_counts > 0).sum()} classes"
            + f", of which a share of {data.image_level_share:g} is used" * (data.image_level_share < 1)
            + f", a share of {data.label_noise:g} with wrong labels" * (data.label_noise > 0)
            + f", s={clis.s} t={clis.t}, alpha {config.loss.alpha:g} beta {config.loss.beta:g}"
        )
    lines.append(
        f"{train.steps} steps of {train.images_per_step} images ({world_size()} process(es), {accumulation} "
        f"micro-batch(es)): {instance:.1f} passes over the instance-level images"
        + (f", {image_level:.1f} over the image-level ones" if index is not None else "")
    )
    rate = learning_rate(optim.warmup_steps, optim, train.images_per_step)
    decays = f", x {optim.decay_factor:g} at {', '.join(map(str, optim.decay_steps))}" * bool(
        optim.decay_steps
    )
    lines.append(
        f"lr {rate:g} (optim.lr {optim.lr:g} x {train.images_per_step} / {optim.lr_images} images), "
        f"{optim.warmup_steps} steps of warm-up{decays}; {train.precision}"
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    lines.append(
        f"{trained / 1e6:.1f} M parameters trained, {frozen / 1e6:.1f} M frozen or a momentum copy; "
        f"classification loss {config.loss.classification}"
    )
    parts = {
        "TSS": clis.task_specialized,
        "objectness": clis.objectness,
        "image-level supervision": clis.s > 0,
        "SS": clis.s > 0 and clis.siamese,
        "pasting": clis.t > 0,
        "CLR": clis.contrastive,
        "gradient clipping": optim.clip_norm is not None,
    }
    for word, state in (("on", True), ("off", False)):
        names = [name for name, on in parts.items() if bool(on) is state]
        lines.append(f"{word}: {', '.join(names) or 'nothing'}")
    return "\n".join(f"  {line}" for line in [*lines, f"run folder {config.output}"])


def describe_pretraining(
    config: Config, images: int, held_out: int, model: ImageClassifier, accumulation: int
) -> str:
    """As `describe_run`, of pre-training.

    Args:
        config: with `train` and `optim` as they are in pre-training.
        images: that are trained on.
    """
    pretrain, train, optim = config.pretrain, config.train, config.optim
    parameters = sum(p.numel() for p in model.parameters())
    decays = f", x {optim.decay_factor:g} after {', '.join(map(str, pretrain.decay_epochs))} epochs"
    lines = [
        f"{images} image-level images to learn {len(model.categories)} classes, {held_out} more are held out",
        f"{pretrain.epochs} epochs are {train.steps} steps of {train.images_per_step} images ({world_size()} "
        f"process(es), {accumulation} micro-batch(es)), crops of {pretrain.image_size} pixels",
        f"lr {pretrain.lr:g}{decays * bool(pretrain.decay_epochs)}; {train.precision}",
        f"{config.model.backbone.name}, {parameters / 1e6:.1f} M parameters, from "
        f"{config.model.backbone.weights or 'random weights'}",
    ]
    return "\n".join(f"  {line}" for line in lines)


def summarize_step(outputs: Sequence[TrainOutput], config: Config) -> dict[str, float]:
    """Weighted total and raw losses of the global batch, its counts for each instance-level image, and what
    `similarity_stats` sums, for each pair that has others beside it (left out where none has)."""
    losses = {name: sum(output.losses[name].detach() for output in outputs) for name in outputs[0].losses}
    stats = {name: sum(output.stats[name].detach() for output in outputs) for name in outputs[0].stats}
    values = torch.stack([value.double() for value in (*losses.values(), *stats.values())])
    values = all_reduce_sum(values).tolist()
    record = {name: value / world_size() for name, value in zip(losses, values)}
    total = sum(config.loss.weights[name] * loss for name, loss in record.items())
    sums = dict(zip(stats, values[len(losses) :]))
    contrasted = sums.pop("contrast_pairs", 0)
    contrast = {name: sums.pop(name) for name in list(sums) if name.startswith("contrast_")}
    record = {"loss": total} | record
    record |= {name: count / config.train.images_per_step for name, count in sums.items()}
    return record | ({name: value / contrasted for name, value in contrast.items()} if contrasted else {})


def queue_state(model: CLISDetector) -> dict[str, float]:
    """How many keys the queue holds and how alike they are (1: all equal), where there is one."""
    if model.contrastive is None:
        return {}
    queue = model.contrastive.queue
    return {"queue_filled": queue.num_filled(), "queue_concentration": queue.concentration()}


def measures(
    device: torch.device, norm: float, rate: float, data_time: float, compute_time: float, images: int
) -> dict[str, float]:
    """What metrics.jsonl has beside losses and counts; times in seconds a step, as rank 0 saw them.

    Args:
        images: in a step.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on Linux
    return {
        "gradient_norm": norm,
        "lr": rate,
        "data_time": data_time,
        "compute_time": compute_time,
        "images_per_second": images / (data_time + compute_time),
        "peak_memory": peak / 2**30,
    }


_SHORT = {
    "loss": "loss", "rpn_objectness": "rpn", "box": "box", "objectness": "obj", "instance_cls": "cls",
    "image_cls": "img", "contrastive": "con",
}  # fmt: skip


def one_line(record: dict[str, float]) -> str:
    """The losses in few letters: with rate and time left, the line fits 100 columns."""
    return " ".join(f"{short} {_four(record[name])}" for name, short in _SHORT.items() if name in record)


def _four(value: float) -> str:
    """In four characters, up to 9999."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
