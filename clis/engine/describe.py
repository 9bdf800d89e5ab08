"""What a run says of itself: its effective recipe at the start, the record and the line of a step."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from clis.config import FIGURES, Config
from clis.data.annotations import Annotations
from clis.data.image_level import ImageLevelIndex
from clis.data.sampling import JointSampler
from clis.distributed import all_gather_rows, all_reduce_sum, world_size
from clis.engine.memory import peak_memory
from clis.engine.optim import learning_rate
from clis.models import CLISDetector, ImageClassifier, TrainOutput
from clis.models.contrastive import similarities
from clis.text import counted


def describe_run(
    config: Config,
    annotations: Annotations,
    index: ImageLevelIndex | None,
    sampler: JointSampler,
    model: CLISDetector,
    accumulation: int,
) -> str:
    """Return the recipe as it will run on these data and processes, line by line."""
    clis, train, optim = config.clis, config.train, config.optim
    passes = dict(zip(("instance-level", "image-level"), sampler.passes(train.steps)))
    unseen = {"instance-level": clis.detect_mosaics, "image-level": index is None}
    lines = _describe_streams(config, annotations, index, sampler)
    lines.append(
        f"{train.steps} steps of {train.images_per_step} images ({_division(accumulation)}): "
        + " and ".join(
            f"{count:.1f} passes over the {stream} images"
            for stream, count in passes.items()
            if not unseen[stream]
        )
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
        "image-level supervision": clis.s > 0 and not config.has_teacher,
        "SS": clis.siamese and config.classifies_images,
        "pasting": clis.t > 0,
        "CLR": clis.contrastive,
        "gradient clipping": optim.clip_norm is not None,
    }
    for word, state in (("on", True), ("off", False)):
        names = [name for name, on in parts.items() if bool(on) is state]
        lines.append(f"{word}: {', '.join(names) or 'nothing'}")
    lines.append(f"run folder {config.output}")
    lines += [f"WARNING: {each}" for each in schedule_warnings(config)]
    lines += [f"hint: {each}" for each in speed_hints(config, accumulation, next(model.parameters()).device)]
    return "\n".join(f"  {line}" for line in lines)


def _describe_streams(
    config: Config, annotations: Annotations, index: ImageLevelIndex | None, sampler: JointSampler
) -> list[str]:
    """Return a line for the instance-level images, and one for the image-level images if there are any."""
    data, clis, loss = config.data, config.clis, config.loss
    groups = [category.frequency for category in annotations.categories]
    counts = " ".join(f"{groups.count(group)} {group}" for group in "rcf")
    repeats = f"repeat factors {data.repeat_rounding}, threshold {data.repeat_threshold:g}"
    if data.repeat == "class-balanced":
        repeats = "classes drawn equally often"
    instance_level = (
        f"{len(annotations)} instance-level images, {len(annotations.labels)} boxes, {len(groups)} classes "
        f"({counts}); {repeats}: a pass is {sampler.instance_pass} images"
    )
    if index is None:
        return [instance_level]
    use = f", regions by {config.regions.rule}"
    if config.classifies_images:
        use += f", s={clis.s} t={clis.t}, alpha {loss.alpha:g} beta {loss.beta:g}"
    elif clis.detect_mosaics:
        use += "; detection is trained on their mosaics, and on no other images"
    else:
        use = _describe_teacher(config)
    image_level = (
        f"{len(index)} image-level images of {(index.image_counts > 0).sum()} classes"
        + f", of which a share of {data.image_level_share:g} is used" * (data.image_level_share < 1)
        + f", a share of {data.label_noise:g} with wrong labels" * (data.label_noise > 0)
        + use
    )
    return [instance_level, image_level]


def _describe_teacher(config: Config) -> str:
    teacher = config.teacher
    kind = "fixed" if teacher.momentum == 1 else f"of momentum {teacher.momentum:g}"
    return (
        f"; their labels are not used: detection is also trained, with weight {config.loss.pseudo:g}, on "
        f"boxes above {teacher.score:g} that a teacher ({kind}) finds in their mosaics, s={config.clis.s}"
    )


def schedule_warnings(config: Config) -> list[str]:
    """List what the schedule of a run never reaches: a warm-up or decays after its end."""
    optim, steps, found = config.optim, config.train.steps, []
    if optim.warmup_steps >= steps:
        found.append(
            f"optim.warmup_steps={optim.warmup_steps} is not over at the end, train.steps={steps}: the run "
            "never has its full learning rate"
        )
    return found + _late_decays("optim.decay_steps", optim.decay_steps, "train.steps", steps)


def pretraining_warnings(config: Config) -> list[str]:
    """List the decays that a run's pre-training, if it has one, never reaches."""
    pretrain = config.pretrain
    if pretrain.epochs == 0:
        return []
    return _late_decays("pretrain.decay_epochs", pretrain.decay_epochs, "pretrain.epochs", pretrain.epochs)


def _late_decays(field: str, decays: Sequence[int], length: str, end: int) -> list[str]:
    late = [str(decay) for decay in decays if decay >= end]
    if not late:
        return []
    return [
        f"{field}: {', '.join(late)} are not before the end, {length}={end}: the learning rate does not "
        "decay there"
    ]


def speed_hints(config: Config, accumulation: int, device: torch.device) -> list[str]:
    """List what would make the steps of a run faster on a GPU: more images at once, up to eight."""
    at_once = config.train.images_per_process
    share = at_once * accumulation
    more = max(count for count in range(1, 9) if share % count == 0)
    if device.type == "cpu" or more <= at_once:
        return []
    return [
        f"a step is {accumulation} micro-batches of {counted(at_once, 'image')}, which may leave a GPU idle; "
        f"train.images_per_process={more} may be faster (docs/scaling.md)"
    ]


def _division(accumulation: int) -> str:
    """Say how a step is divided."""
    micro_batches = counted(accumulation, "micro-batch", "micro-batches")
    return f"{counted(world_size(), 'process', 'processes')}, {micro_batches}"


def describe_pretraining(
    config: Config, images: int, held_out: int, model: ImageClassifier, accumulation: int
) -> str:
    """Return the recipe of a pre-training as it will run, line by line.

    Args:
        config: with `train` and `optim` as they are in pre-training.
        images: that are trained on.
    """
    pretrain, train, optim = config.pretrain, config.train, config.optim
    parameters = sum(p.numel() for p in model.parameters())
    decays = f", x {optim.decay_factor:g} after {', '.join(map(str, pretrain.decay_epochs))} epochs"
    lines = [
        f"{images} image-level images to learn {len(model.categories)} classes, {held_out} more are held out",
        f"{pretrain.epochs} epochs are {train.steps} steps of {train.images_per_step} images "
        f"({_division(accumulation)}), crops of {pretrain.image_size} pixels",
        f"lr {pretrain.lr:g}{decays * bool(pretrain.decay_epochs)}; {train.precision}",
        f"{config.model.backbone.name}, {parameters / 1e6:.1f} M parameters, from "
        f"{config.model.backbone.weights or 'random weights'}",
    ]
    lines += [f"WARNING: {each}" for each in pretraining_warnings(config)]
    return "\n".join(f"  {line}" for line in lines)


def summarize_step(outputs: Sequence[TrainOutput], config: Config) -> dict[str, float]:
    """Return weighted total and raw losses of the global batch, and its counts per instance-level image."""
    losses = {name: _sum(output.losses[name] for output in outputs) for name in outputs[0].losses}
    stats = {name: _sum(output.stats[name] for output in outputs) for name in outputs[0].stats}
    summed = torch.stack([value.double() for value in (*losses.values(), *stats.values())])
    values = all_reduce_sum(summed).tolist()
    record = {name: value / world_size() for name, value in zip(losses, values)}
    total = sum(config.loss.weights[name] * loss for name, loss in record.items())
    counts = zip(stats, values[len(losses) :])
    return {"loss": total} | record | {name: count / config.train.images_per_step for name, count in counts}


def _sum(values: Iterable[Tensor]) -> Tensor:
    """Add at least one scalar, without their graphs."""
    return functools.reduce(torch.add, (value.detach() for value in values))


def contrast_state(model: CLISDetector, outputs: Sequence[TrainOutput]) -> dict[str, float]:
    """Return what the log says of L_con: similarities of the pairs' views, and the state of the queue.

    `queue_filled` is the number of keys that the queue holds, `queue_concentration` says how alike they are
    (1: all equal). Empty without L_con.
    """
    if model.contrastive is None:
        return {}
    f_i, f_d = (all_gather_rows(torch.cat(views)) for views in zip(*(output.views for output in outputs)))
    queue = model.contrastive.queue
    mean_key = queue.mean_key()
    state = {"queue_filled": queue.num_filled(), "queue_concentration": mean_key.norm().item()}
    return similarities(f_i, f_d, mean_key) | state


class ContrastWatch:
    """Says once, from step 100 on, that L_con does not tell instances apart.

    The sign of it, in the mean of 100 steps and at least `LEAST` records: within a batch f_i is hardly more
    similar to its own f_d than to those of other pairs (by less than `APART`), while it is far more similar
    to these than to the queue's keys (by `AWAY`). The loss falls by that alone. On the embedded benchmark, at
    step 100: 0.00 and 1.0 for `pasted_view` ``online``, 0.04 and 0.5 for ``momentum``, 0.0 and below 0.6 for
    ``symmetric``.
    """

    FIRST_STEP, LEAST, APART, AWAY = 100, 5, 0.1, 0.8

    def __init__(self) -> None:
        self.records: list[tuple[int, float, float, float]] = []
        self.said = False

    def look(self, step: int, record: Mapping[str, float]) -> str | None:
        """Return the warning that is due after a record of metrics.jsonl, or None."""
        if self.said or "contrast_other" not in record:
            return None
        positive, other, queue = (record[f"contrast_{name}"] for name in ("positive", "other", "queue"))
        self.records.append((step, positive, other, queue))
        recent = [each for each in self.records if each[0] > step - self.FIRST_STEP]
        self.records = max(recent, self.records[-self.LEAST :], key=len)
        positive, other, queue = (sum(column) / len(self.records) for column in list(zip(*self.records))[1:])
        if step < self.FIRST_STEP or len(self.records) < self.LEAST:
            return None
        if positive - other >= self.APART or other - queue < self.AWAY:
            return None
        self.said = True
        return (
            f"step {step}: L_con does not tell instances apart: similarity {positive:.2f} of a pair's views, "
            f"{other:.2f} to other pairs, {queue:.2f} to the keys; see clis.pasted_view, loss.beta "
            "and the contrast_ fields of metrics.jsonl"
        )


def step_metrics(
    device: torch.device, norm: float, rate: float, seconds: Sequence[tuple[float, float]], images: int
) -> dict[str, float]:
    """Return what metrics.jsonl has beside losses and counts; times are rank 0's mean seconds.

    Args:
        seconds: of each step since the last record, waiting for data and computing.
        images: per step.
    """
    data_time, compute_time = (sum(column) / len(seconds) for column in zip(*seconds))
    return {
        "gradient_norm": norm,
        "lr": rate,
        "data_time": data_time,
        "compute_time": compute_time,
        "images_per_second": images / (data_time + compute_time),
        "peak_memory": peak_memory(device) / 2**30,
    }


_SHORT = {
    "loss": "loss", "rpn_objectness": "rpn", "box": "box", "objectness": "obj", "instance_cls": "cls",
    "image_cls": "img", "contrastive": "con", "pseudo": "pse",
}  # fmt: skip


def format_losses(record: dict[str, float]) -> str:
    """Return the losses in few letters: with rate and time left, the line fits 100 columns."""
    return " ".join(f"{short} {_four(record[name])}" for name, short in _SHORT.items() if name in record)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Return AP of all, rare, common and frequent classes in percent; an undefined one is ``-``."""
    return " ".join(
        f"{name} {100 * metrics[name]:.1f}" if metrics.get(name, -1) >= 0 else f"{name} -" for name in FIGURES
    )


def _four(value: float) -> str:
    """Format a number in four characters, up to 9999."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
