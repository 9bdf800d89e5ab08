"""The whole recipe: baseline, regions, CLIS, evaluation; and the loop that trains a detector."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clis.config import Config, data_path
from clis.data.batch import Batch
from clis.data.loader import MicroBatches, train_loader
from clis.data.shapes import generate_shapes
from clis.data.streams import make_streams, regions_file
from clis.distributed import (
    all_gather_rows,
    barrier,
    broadcast_flag,
    is_main,
    rank,
    world_size,
    wrap_ddp,
)
from clis.engine.checkpoint import resume, save_checkpoint
from clis.engine.describe import (
    ContrastWatch,
    contrast_state,
    describe_run,
    format_losses,
    step_metrics,
    summarize_step,
)
from clis.engine.evaluate import check_validation, evaluate_detector
from clis.engine.log import MetricsLog
from clis.engine.loop import Loop, SkippedSteps
from clis.engine.optim import gradient_step, learning_rate, make_optimizer, make_scaler, split_batch
from clis.engine.preemption import clear_preempted_marker
from clis.engine.pretrain import pretrain
from clis.engine.regions import detector_config, find_regions
from clis.engine.run_folder import claim_run_folder
from clis.engine.schedule import Schedule
from clis.losses import find_classification_loss
from clis.metric.lvis_eval import format_table
from clis.models import CLISDetector, Normalizers, TrainOutput, build_model
from clis.progress import say

NOT_FINITE = "a lower optim.lr or loss.beta, a longer optim.warmup_steps or an optim.clip_norm may help"
"""What to try where a loss or gradient is not finite."""


def recipe(config: Config, name: str, overrides: Sequence[str], device: torch.device) -> None:
    """Runs the stages that the config needs, leaving out what is done; then prints the comparison."""
    detector = detector_config(config, overrides)
    configs = [config] if detector is None else [detector, config]
    for each in configs:
        find_classification_loss(each.loss.classification)  # a slip is told before anything is made
    for each in configs:
        claim_run_folder(Path(each.output), each)
    stages: list[tuple[str, Callable[[], None]]] = []

    def add_training(title: str, each: Config) -> None:
        if each.pretrain.epochs > 0 and not Path(each.output, "eval.json").exists():
            stages.append(("pre-training as an image classifier", lambda: pretrain(each, device)))
        stages.append((title, lambda: run(each, device)))

    if config.data.generate == "shapes":
        stages.append(("embedded benchmark", lambda: generate_shapes(data_path(config, "shapes"))))
    if config.clis.s > 0 and not broadcast_flag(regions_file(config).exists()):
        if detector is not None:
            add_training(f"detector for the regions: {config.regions.detector}", detector)
        stages.append(("regions", lambda: find_regions(config, device, detector)))
    add_training(name, config)
    for number, (title, stage) in enumerate(stages, 1):
        say(f"{number}/{len(stages)} {title}")
        stage()
        barrier()
    _compare(configs)


def run(config: Config, device: torch.device) -> None:
    """Trains and evaluates one detector in its run folder, going on from its last checkpoint."""
    folder = Path(config.output)
    claim_run_folder(folder, config)
    if (folder / "eval.json").exists():
        say(f"{folder} is finished already")
        return
    detector = train(config, folder, device)
    evaluate_detector(detector.eval(), config, folder)


def train(config: Config, folder: Path, device: torch.device) -> CLISDetector:
    """Trains a detector for `train.steps` steps, or goes on where its last checkpoint left off.

    Every random choice is a function of (seed, step, place in the global batch), so a resumed run equals the
    uninterrupted one (bit for bit on the CPU), and another number of processes sees the same images.
    """
    annotations, dataset, sampler = make_streams(config)
    check_validation(config, annotations.categories)
    images_per_process, accumulation = split_batch(config, world_size())
    torch.manual_seed(config.train.seed)
    model = build_model(config, annotations.categories).to(device)
    optimizer = make_optimizer(model, config)
    scaler = make_scaler(config, device)
    first_step, num_skipped = resume(folder, model, optimizer, scaler, config)
    skipped = SkippedSteps(num_skipped, scaler, folder, config, NOT_FINITE)
    network = wrap_ddp(model, device)
    network.train()
    say(describe_run(config, annotations, dataset.index, sampler, model, accumulation))
    clear_preempted_marker(folder)

    steps = range(first_step, config.train.steps)
    micro_batches = MicroBatches(sampler, steps, rank(), world_size(), images_per_process)
    loader = train_loader(dataset, micro_batches, config.data.workers, device.type == "cuda")
    log = MetricsLog(folder / "metrics.jsonl", first_step)
    schedule, watch = Schedule(config, folder), ContrastWatch()

    def save(done: int) -> None:
        if is_main():
            save_checkpoint(folder / "checkpoints", done, model, optimizer, scaler, config, skipped.total)
            schedule.saved()
        barrier()

    def evaluate(done: int) -> None:
        metrics = evaluate_detector(model.eval(), config, schedule.evaluation_folder(done))
        network.train()
        if is_main():
            schedule.evaluated(done, metrics["AP"])
        log.write({"step": done, **metrics})

    with Loop("train", config, schedule, steps, loader, accumulation, device, save, Batch) as loop:
        if schedule.evaluation_due(first_step) and broadcast_flag(not log.has_evaluation(first_step)):
            evaluate(first_step)  # the run was stopped behind the step's checkpoint
        for step, batches in loop:
            rate = learning_rate(step, config.optim, config.train.images_per_step)
            normalizers = global_normalizers(loop.counts, config)
            outputs, norm = train_step(network, model, optimizer, scaler, batches, normalizers, rate, config)
            loop.computed()
            skipped.check(norm, functools.partial(_not_finite, step, outputs, batches))

            done, text = step + 1, ""
            if schedule.record_due(done):
                record = summarize_step(outputs, config)
                state = step_metrics(device, norm, rate, *loop.seconds(), config.train.images_per_step)
                contrast = contrast_state(model, outputs)
                log.write({"step": done, **record, **contrast, **state})
                text = format_losses(record)
                if (warning := watch.look(done, contrast)) is not None:
                    say(warning)
            loop.end_step(done, text)
            if schedule.evaluation_due(done):
                evaluate(done)
    return model


def train_step(
    network: nn.Module,
    model: CLISDetector,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Batch],
    normalizers: Normalizers,
    rate: float,
    config: Config,
) -> tuple[list[TrainOutput], float]:
    """One step on this process's micro-batches: Eq. 2 and SGD, then momentum copy and queue.

    A gradient that is NaN or infinite changes nothing, on all processes alike (see `gradient_step`).

    Args:
        network: the model, or DDP around it.
        rate: the step's learning rate.

    Returns:
        What `CLISDetector.forward` gave for each micro-batch, and the norm of the gradient before clipping.
    """
    device = batches[0].regions.device
    outputs = []

    def total_loss(batch: Batch) -> Tensor:
        outputs.append(network(batch, normalizers))
        return sum(config.loss.weights[name] * loss for name, loss in outputs[-1].losses.items())

    norm = gradient_step(network, optimizer, scaler, batches, total_loss, rate, config, device)
    if math.isfinite(norm):
        _update_momentum_copy(model, outputs)
    return outputs, norm


def global_normalizers(counts: Sequence[int], config: Config) -> Normalizers:
    """What the losses are divided by, from regions and pairs of the global batch; at least one of each."""
    regions, pairs = (max(1, count) / world_size() for count in counts)
    return Normalizers(config.train.images_per_step / world_size(), regions, pairs)


# ---------------------------------------------------------------------------------------------------------


def _not_finite(step: int, outputs: Sequence[TrainOutput], batches: Sequence[Batch]) -> str:
    """Which loss of which images was not finite in a step."""
    parts = []
    for output, batch in zip(outputs, batches):
        bad = [name for name, loss in output.losses.items() if not math.isfinite(loss.item())]
        if bad:
            parts.append(f"loss {', '.join(bad)} on images {batch.image_ids}")
    images = [image_id for batch in batches for image_id in batch.image_ids]
    return f"step {step + 1}: not finite: {'; '.join(parts) or f'the gradient, images {images}'}"


def _update_momentum_copy(model: CLISDetector, outputs: Sequence[TrainOutput]) -> None:
    """After the step: move the momentum copy and push all ranks' keys in the order of the global batch."""
    if model.contrastive is None:
        return
    keys = all_gather_rows(torch.cat([output.keys[0] for output in outputs]))
    labels = all_gather_rows(torch.cat([output.keys[1] for output in outputs]))
    model.contrastive.update(model.classification.sub_network, keys, labels)


def _compare(configs: Sequence[Config]) -> None:
    """Prints the results of the runs that have any, one below the other."""
    files = {config.output: Path(config.output, "eval.json") for config in configs}
    if is_main():
        say(
            format_table(
                {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
            )
        )
