"""The whole recipe: baseline, regions, CLIS, evaluation; and the loop that trains a detector."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clis.config import (
    Config,
    config_differences,
    config_from_dict,
    config_to_yaml,
    data_path,
    load_config,
    read_yaml,
)
from clis.data.annotations import Category, check_same_categories
from clis.data.loader import Batch, MicroBatches, train_loader
from clis.data.shapes import ShapesSpec, write_shapes
from clis.distributed import (
    agreed,
    all_gather_rows,
    all_reduce_sum,
    barrier,
    choose_device,
    is_main,
    process_group,
    rank,
    world_size,
)
from clis.engine.bad_images import BadImages
from clis.engine.checkpoint import load_last_checkpoint, save_checkpoint, saved_checkpoints
from clis.engine.describe import describe_run, measures, one_line, summarize_step
from clis.engine.evaluate import check_validation, evaluate_detector
from clis.engine.log import MetricsLog, Progress, say
from clis.engine.lvis_eval import format_table
from clis.engine.optim import learning_rate, make_optimizer
from clis.engine.preemption import Preempted, StopRequest, mark, unmark
from clis.engine.regions import detector_config, find_regions
from clis.engine.schedule import Schedule
from clis.engine.streams import make_streams, regions_file
from clis.files import remove_leftovers, written_whole
from clis.losses import find_classification_loss
from clis.models import CLISDetector, Normalizers, TrainOutput, build_model
from clis.models.backbone import load_state


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``train.py --config FILE [key=value ...]``, alone or under torchrun."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a detector; what its config needs is made first (benchmark, baseline, regions).",
    )
    parser.add_argument("--config", required=True, help="e.g. configs/shapes/clis.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="change the config, e.g. train.steps=100 output=runs/short. Those of the model, the "
        "instance-level data and the training also apply to the detector that finds the regions",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    device = choose_device(config.train.device)
    with process_group(device):
        recipe(config, arguments.config, arguments.overrides, device)


def recipe(config: Config, name: str, overrides: Sequence[str], device: torch.device) -> None:
    """Runs the stages that the config needs, leaving out what is done; then prints the comparison."""
    detector = detector_config(config, overrides)
    configs = [config] if detector is None else [detector, config]
    for each in configs:
        find_classification_loss(each.loss.classification)  # a slip is told before anything is made
    for each in configs:
        _claim(Path(each.output), each)
    stages: list[tuple[str, Callable[[], None]]] = []
    if config.data.generate == "shapes":
        stages.append(("embedded benchmark", lambda: generate_shapes(data_path(config, "shapes"))))
    if config.clis.s > 0 and not regions_file(config).exists():
        if detector is not None:
            stages.append(
                (f"detector for the regions: {config.regions.detector}", lambda: run(detector, device))
            )
        stages.append(("regions", lambda: find_regions(config, device, detector)))
    stages.append((name, lambda: run(config, device)))
    for number, (title, stage) in enumerate(stages, 1):
        say(f"{number}/{len(stages)} {title}")
        stage()
        barrier()
    _compare(configs)


def run(config: Config, device: torch.device) -> None:
    """Trains and evaluates one detector in its run folder, going on from its last checkpoint."""
    folder = Path(config.output)
    _claim(folder, config)
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
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "float16")
    first_step, skipped = _resume(folder, model, optimizer, scaler, config)
    network = _distribute(model, device)
    network.train()
    say(describe_run(config, annotations, dataset.index, sampler, model, accumulation))
    unmark(folder)

    steps = range(first_step, config.train.steps)
    micro_batches = MicroBatches(sampler, steps, rank(), world_size(), images_per_process)
    loader = train_loader(dataset, micro_batches, config.data.workers, device.type == "cuda")
    log = MetricsLog(folder / "metrics.jsonl", first_step)
    schedule = Schedule(config, folder)
    bad_images = BadImages(config.data.max_bad_images)

    def save(done: int) -> None:
        if is_main():
            save_checkpoint(folder / "checkpoints", done, model, optimizer, scaler, config, skipped)
            schedule.saved()
        barrier()

    def evaluate(done: int) -> None:
        metrics = evaluate_detector(model.eval(), config, schedule.evaluation_folder(done))
        network.train()
        if is_main():
            schedule.evaluated(done, metrics["AP"])
        log.write({"step": done, **metrics})

    times: list[tuple[float, float]] = []  # waiting for data and computing, since the last record
    with (
        contextlib.closing(_batches(loader)) as batches,  # ends the loader processes, however the loop ends
        StopRequest() as stop,
        Progress("train", config.train.steps, first_step) as progress,
    ):
        if schedule.evaluation_due(first_step) and agreed(not log.has_evaluation(first_step)):
            evaluate(first_step)  # the run was stopped behind the step's checkpoint
        for step in steps:
            began = time.monotonic()
            step_batches = bad_images.load(batches, accumulation, device)
            # What the processes have to agree on, in one message a step.
            minutes_over = is_main() and schedule.minutes_are_over()
            wishes = [len(bad_images.new), bad_images.gone is not None, stop.received, minutes_over]
            *bad, stopping, minutes_over = all_reduce_sum(torch.tensor(wishes)).tolist()
            if (reason := bad_images.verdict(*bad, step)) is not None:
                if step > first_step:
                    say(f"{reason}; saving step {step}")  # said first: the disk may be the same
                    save(step)
                raise reason from bad_images.gone
            loaded = time.monotonic()

            rate = learning_rate(step, config.optim, config.train.images_per_step)
            outputs, norm = train_step(network, model, optimizer, scaler, step_batches, rate, config)
            times.append((loaded - began, time.monotonic() - loaded))
            if not math.isfinite(norm) and not scaler.is_enabled():  # float16 scaling expects some
                skipped += 1
                _check_skipped(skipped, step, outputs, step_batches, folder, config)

            done = step + 1
            text = ""
            if done % config.train.log_every == 0 or done == config.train.steps:
                record = summarize_step(outputs, config)
                seconds = [sum(column) / len(times) for column in zip(*times)]
                log.write({"step": done, **record, **measures(model, norm, rate, *seconds, config)})
                text = one_line(record)
                times.clear()
            progress.advance(text=text)
            if schedule.checkpoint_due(done) or minutes_over or stopping:
                save(done)
            if stopping and done < config.train.steps:
                mark(folder, done)
                barrier()
                raise Preempted(f"{folder}: asked to stop; step {done} is saved, the same command goes on")
            if schedule.evaluation_due(done):
                evaluate(done)
    return model


def train_step(
    network: nn.Module,
    model: CLISDetector,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Batch],
    rate: float,
    config: Config,
) -> tuple[list[TrainOutput], float]:
    """One step on this process's micro-batches: Eq. 2, backward, clip, step, momentum copy and queue.

    A gradient that is NaN or infinite changes nothing. It is looked for in the reduced gradient, so that all
    processes find the same, and a process whose own loss is not finite still takes part in the reduction.

    Args:
        network: the model, or DDP around it.
        rate: the step's learning rate.

    Returns:
        What `CLISDetector.forward` gave for each micro-batch, and the norm of the gradient before clipping.
    """
    device = batches[0].regions.device
    normalizers = count_normalizers(batches, config, device)
    outputs = []
    for number, batch in enumerate(batches, 1):
        # gradients travel between processes once a step, with the last micro-batch
        with _gradients_local(network, number < len(batches)):
            with _autocast(config, device):
                output = network(batch, normalizers)
            total = sum(config.loss.weights[name] * loss for name, loss in output.losses.items())
            # An infinite loss may have a finite gradient; as NaN it tells all processes, without a wait.
            total = total * torch.where(total.detach().isfinite(), 1.0, math.nan)
            scaler.scale(total).backward()
        outputs.append(output)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or math.inf).item()
    finite = math.isfinite(norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    if finite or scaler.is_enabled():  # the scaler leaves the step out itself, and lowers its scale
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if finite:
        _update_momentum_copy(model, outputs)
    return outputs, norm


def split_batch(config: Config, processes: int) -> tuple[int, int]:
    """Images a process takes at once, and micro-batches a step (gradient accumulation).

    Raises:
        ValueError: the global batch does not divide so.
    """
    share, rest = divmod(config.train.images_per_step, processes)
    at_once = min(config.train.images_per_process, share)
    if rest or share % at_once:
        raise ValueError(
            f"train.images_per_step={config.train.images_per_step} is not a whole number of micro-batches of "
            f"train.images_per_process={config.train.images_per_process} on {processes} processes"
        )
    return at_once, share // at_once


def count_normalizers(batches: Sequence[Batch], config: Config, device: torch.device) -> Normalizers:
    """Images, regions and pairs of the global batch, over the number of processes; at least one of each."""
    counts = torch.tensor(
        [sum(len(b.regions) for b in batches), sum(len(b.pair_boxes) for b in batches)],
        dtype=torch.float64 if device.type == "cpu" else torch.float32,
        device=device,
    )
    regions, pairs = all_reduce_sum(counts).clamp(min=1).tolist()
    processes = world_size()
    return Normalizers(config.train.images_per_step / processes, regions / processes, pairs / processes)


# ---------------------------------------------------------------------------------------------------------


def generate_shapes(folder: Path, spec: ShapesSpec | None = None) -> None:
    """Writes the embedded benchmark, by rank 0, if it is not there."""
    spec = spec or ShapesSpec()
    if is_main():
        with Progress(f"write {folder}", spec.num_images) as progress:
            write_shapes(folder, spec, lambda *_: progress.advance())
    barrier()


def _claim(folder: Path, config: Config) -> None:
    """Writes config.yaml into a new run folder; one that belongs to another config is an error."""
    path = folder / "config.yaml"
    if path.exists():
        differences = config_differences(config_from_dict(read_yaml(path), source=str(path)), config)
        if differences:
            raise ValueError(
                f"{folder} belongs to another config: {'; '.join(differences[:5])}; "
                "pass output=ANOTHER_FOLDER, or remove it"
            )
    barrier()
    if is_main():
        with written_whole(path) as temporary:
            temporary.write_text(config_to_yaml(config))


def _resume(
    folder: Path,
    model: CLISDetector,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: Config,
) -> tuple[int, int]:
    """Loads the last readable checkpoint, if there is one: the step to go on with, and the steps skipped.

    Raises:
        ValueError: it was trained by another config or for other categories.
    """
    if is_main():
        remove_leftovers(folder)
    found = load_last_checkpoint(folder / "checkpoints")
    if found is None:
        return 0, 0
    state, path = found
    differences = config_differences(config_from_dict(state["config"], source=str(path)), config)
    if differences:
        raise ValueError(f"{path} is of another config: {'; '.join(differences[:5])}; remove it")
    saved = [Category(**category) for category in state["categories"]]
    check_same_categories(saved, str(path), model.categories, "the training split")
    load_state(model, state["model"], str(path))
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    say(f"{path}: going on from step {state['step']}")
    return state["step"], state.get("skipped", 0)


def _distribute(model: CLISDetector, device: torch.device) -> nn.Module:
    if world_size() == 1:
        return model
    # the queue is the same on all ranks by construction: 59 MB that need not travel each step
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, **{sync_buffers: False})


@contextlib.contextmanager
def _gradients_local(network: nn.Module, local: bool) -> Iterator[None]:
    with network.no_sync() if local and world_size() > 1 else contextlib.nullcontext():
        yield


def _autocast(config: Config, device: torch.device) -> torch.autocast:
    precision = config.train.precision
    return torch.autocast(
        device.type,
        getattr(torch, precision if precision != "float32" else "bfloat16"),
        enabled=precision != "float32",
    )


_UNSTABLE = (
    "a lower optim.lr or loss.beta, a longer optim.warmup_steps or an optim.clip_norm may help, or "
    "train.on_nonfinite=skip"
)


def _batches(loader: Iterable[Batch]) -> Generator[Batch, None, None]:
    yield from loader


def _check_skipped(
    skipped: int,
    step: int,
    outputs: Sequence[TrainOutput],
    batches: Sequence[Batch],
    folder: Path,
    config: Config,
) -> None:
    """Says what was not finite; raises `FloatingPointError` unless the step may be left out."""
    parts = []
    for output, batch in zip(outputs, batches):
        bad = [name for name, loss in output.losses.items() if not math.isfinite(loss.item())]
        if bad:
            parts.append(f"loss {', '.join(bad)} on images {batch.image_ids}")
    images = [image_id for batch in batches for image_id in batch.image_ids]
    what = f"step {step + 1}: not finite: {'; '.join(parts) or f'the gradient, images {images}'}"
    if config.train.on_nonfinite == "skip" and skipped <= config.train.max_skipped:
        print(f"{what}; left out, {skipped} of at most {config.train.max_skipped}", flush=True)
        return
    saved = saved_checkpoints(folder / "checkpoints")
    last = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
    raise FloatingPointError(f"{what}; {last}; {_UNSTABLE}")


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
