"""The whole recipe: baseline, regions, CLIS, evaluation; and the training of a detector, step by step."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from clis.config import Config
from clis.data.batch import Batch
from clis.data.loader import MicroBatches, train_loader
from clis.data.streams import generate_data, make_streams
from clis.distributed import (
    all_gather_rows,
    all_reduce_sum,
    barrier,
    is_main,
    on_main,
    rank,
    world_size,
)
from clis.engine.at_work import at_work, only_process
from clis.engine.describe import (
    ContrastWatch,
    contrast_state,
    describe_run,
    format_losses,
    format_metrics,
    summarize_step,
)
from clis.engine.evaluate import evaluate_detector
from clis.engine.loop import Training
from clis.engine.optim import gradient_step, learning_rate, split_batch
from clis.engine.preemption import stopping_at_once
from clis.engine.preflight import check_files, needed_runs
from clis.engine.prerequisites import PlannedRun, plan_run
from clis.engine.pretrain import SETTINGS as PRETRAINING
from clis.engine.pretrain import pretrain
from clis.engine.region_search import find_regions
from clis.engine.run_folder import RunFolder, regions_file
from clis.engine.schedule import due_after
from clis.engine.skipped import NotFinite
from clis.engine.start import check_plan, starting_model
from clis.metric.lvis_eval import format_table
from clis.models import CLISDetector, Normalizers, Pending, TrainOutput
from clis.progress import say

ADVICE = "a lower optim.lr or loss.beta, a longer optim.warmup_steps or an optim.clip_norm may help"
"""What to try where a loss or gradient is not finite."""
LESS_MEMORY = (
    "a lower train.images_per_process, data.short_sides and data.max_size, or clis.s (and data.workers, if "
    "it is the machine's own memory)"
)
"""What to try where a training step does not fit into memory."""


Stages: TypeAlias = dict[tuple[str, str], tuple[str, Callable[[], object]]]
"""Titles and functions, by run folder and kind of stage."""


def recipe(config: Config, name: str, overrides: Sequence[str], device: torch.device) -> None:
    """Run the stages that the config needs and that are not done yet; then print the comparison.

    For CLIS these are, in this order: a baseline, which is the detector of the regions; the regions, found
    with it; the pre-training, if there is one; CLIS itself (`run`). All are checked before the first one
    begins, and the embedded benchmark is written first, if the config is on it.
    """
    plan = plan_run(config, name, overrides)
    check_plan(plan)  # mistakes are reported before any work starts
    stages = _stages(plan, device)
    runs = list(plan.walk())
    # others are not needed, whatever their folders hold
    trained = {each.config.output: each.config for each in runs if (each.config.output, "train") in stages}
    with _claimed(plan, list(trained.values())):
        _run_stages(stages, config.output)
        _compare([each.config for each in runs])


@contextlib.contextmanager
def _claimed(plan: PlannedRun, trained: Sequence[Config]) -> Iterator[None]:
    """Keep other processes from the folders of the runs that are trained; make and check the plan's files."""
    with contextlib.ExitStack() as stack:
        for config in trained:
            folder = RunFolder(config.output)
            folder.check(config)
            if not on_main(functools.partial(folder.is_finished, config)):
                if config.pretrain.epochs > 0:
                    folder.pretraining.check(config, PRETRAINING)
                stack.enter_context(only_process(folder))
        generate_data(plan.config)
        check_files(plan)
        for config in trained:
            RunFolder(config.output).claim(config)
        yield


def _run_stages(stages: Stages, run_output: str) -> None:
    """Run the stages in their order, each noted in its run's folder and in that of the run itself."""
    with stopping_at_once(), _at_work(run_output) as now:
        for number, ((output, _), (title, stage)) in enumerate(stages.items(), 1):
            text = f"{number}/{len(stages)} {title}"
            say(text)
            now(text)
            with contextlib.nullcontext(now) if output == run_output else _at_work(output) as here:
                here(text)
                stage()
                barrier()


def _at_work(output: str) -> contextlib.AbstractContextManager[Callable[[str], None]]:
    """Return `at_work` of a run folder; of a finished run, which is left alone, nothing of the kind."""
    folder = RunFolder(output)
    finished = on_main(folder.result.exists)
    return contextlib.nullcontext(lambda stage: None) if finished else at_work(folder)


def _stages(plan: PlannedRun, device: torch.device) -> Stages:
    """Return what has to be done, each stage after those that it needs."""
    stages: Stages = {}
    runs = {each.config.output: each for each in plan.walk()}
    # rank 0 decides, since files may show late elsewhere
    todo = on_main(lambda: [(each.config.output, list(_kinds(each))) for each in needed_runs(plan)])
    for output, kinds in todo:
        each, config = runs[output], runs[output].config
        detector, start = (None if run is None else run.config for run in (each.detector, each.start))
        every: dict[str, tuple[str, Callable[[], object]]] = {
            "regions": ("regions", functools.partial(find_regions, config, device, detector)),
            "pretrain": ("pre-training as an image classifier", functools.partial(pretrain, config, device)),
            "train": (each.title, functools.partial(run, config, device, start)),
        }
        stages |= {(output, kind): every[kind] for kind in kinds}
    return stages


def _kinds(run: PlannedRun) -> Iterator[str]:
    """Yield the kinds of stages that a run still has."""
    config, folder = run.config, RunFolder(run.config.output)
    if not folder.is_finished(config):
        if config.clis.s > 0 and not regions_file(config).exists():
            yield "regions"
        if config.pretrain.epochs > 0 and not folder.result.exists():
            yield "pretrain"
    yield "train"


def run(config: Config, device: torch.device, start: Config | None = None) -> None:
    """Train and evaluate one detector in its run folder, or resume it there.

    Args:
        start: the config that `start.from` names; None where it names a checkpoint or nothing.
    """
    folder = RunFolder(config.output)
    folder.claim(config)
    if on_main(folder.result.exists):
        say(f"{folder} is already finished")
        return
    training = train(config, folder, device, start)
    evaluate_detector(training.model.tested.eval(), config, folder, training.record)


def train(
    config: Config, folder: RunFolder, device: torch.device, start: Config | None = None
) -> Training[CLISDetector]:
    """Train a detector for `train.steps` steps, or resume where its last checkpoint left off.

    Every random choice is a function of (seed, step, place in the global batch), so a resumed run equals the
    uninterrupted one (bit for bit on the CPU), and another number of processes sees the same images.

    Returns:
        The finished training, with the model and the record of where it comes from.
    """
    annotations, dataset, sampler = make_streams(config, regions_file(config))
    images_per_process, accumulation = split_batch(config.train, world_size())
    torch.manual_seed(config.train.seed)
    model = starting_model(config, annotations.categories, folder, start).to(device)
    training = Training(model, config, folder, device, ADVICE)
    say(describe_run(config, annotations, dataset.index, sampler, model, accumulation))
    micro_batches = MicroBatches(sampler, training.remaining, rank(), world_size(), images_per_process)
    loader = train_loader(dataset, micro_batches, config.data.workers, device.type == "cuda")
    watch = ContrastWatch()

    def evaluate(step: int) -> None:
        metrics = evaluate_detector(model.tested.eval(), config, folder.evaluation(step), training.record)
        say(f"step {step}: {format_metrics(metrics)}")
        training.network.train()
        on_main(lambda: folder.mark_best(step, metrics["AP"]))
        training.log.write({"step": step, **metrics})

    where = functools.partial(_where, folder)
    with training.run(
        loader, Batch, accumulation, "train", where=where, less_memory=LESS_MEMORY, evaluate=evaluate
    ) as steps:
        for step, given in steps:
            rate = learning_rate(step, config.optim, config.train.images_per_step)
            normalizers = global_normalizers(given.counts, config)
            done, text = step + 1, ""
            outputs, norm = train_step(
                training.network, model, training.optimizer, training.scaler, given.batches, normalizers,
                rate, done / config.train.steps, config,
            )  # fmt: skip
            training.made(given, norm, functools.partial(_not_finite, outputs, given.batches))
            if due_after(done, config.train).record:
                record = summarize_step(outputs, config)
                state = contrast_state(model, outputs) | model.classification_loss.summary()
                training.write(done, record | state, norm, rate)
                text = format_losses(record)
                if (warning := watch.look(done, state)) is not None:
                    say(warning)
            training.progress.advance(text=text)
    return training


def train_step(
    network: nn.Module,
    model: CLISDetector,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Batch],
    normalizers: Normalizers,
    rate: float,
    progress: float,
    config: Config,
) -> tuple[list[TrainOutput], float]:
    """Make one step on this process's micro-batches: Eq. 2 and SGD, then what `after_step` moves.

    A gradient that is NaN or infinite changes nothing, on all processes alike (see `gradient_step`).

    Args:
        network: the model, or DDP around it.
        rate: the step's learning rate.
        progress: share of the training that this step completes.

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
        model.after_step(_of_all_processes([output.pending for output in outputs]), progress)
    return outputs, norm


def global_normalizers(counts: Sequence[int], config: Config) -> Normalizers:
    """Return what the losses are divided by: regions and pairs of the global batch, at least one of each."""
    regions, pairs = (max(1, count) / world_size() for count in counts)
    return Normalizers(config.train.images_per_step / world_size(), regions, pairs)


# ---------------------------------------------------------------------------------------------------------


def _where(folder: RunFolder, done: int) -> str:
    """Say in which step a run is, and from where it can be resumed."""
    saved = folder.saved_checkpoints()
    checkpoint = (
        f"the last checkpoint is of step {folder.steps_done}" if saved else "there is no checkpoint yet"
    )
    return f"{folder}: step {done + 1}, {checkpoint}"


def _not_finite(outputs: Sequence[TrainOutput], batches: Sequence[Batch]) -> NotFinite:
    """Say which loss of which images was not finite in a step."""
    losses = []
    for output, batch in zip(outputs, batches):
        bad = [name for name, loss in output.losses.items() if not math.isfinite(loss.item())]
        if bad:
            losses.append(f"loss {', '.join(bad)} on images {', '.join(map(str, batch.image_ids))}")
    return NotFinite(losses, [str(image_id) for batch in batches for image_id in batch.image_ids])


def _of_all_processes(parts: Sequence[Pending]) -> Pending:
    """Join what the micro-batches of all processes left for after the step."""
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum(dim=0) for name in parts[0].sums}
    return Pending(
        sums={name: all_reduce_sum(value) if value.numel() else value for name, value in sums.items()},
        rows={
            name: all_gather_rows(torch.cat([part.rows[name] for part in parts])) for name in parts[0].rows
        },
    )


def _compare(configs: Sequence[Config]) -> None:
    """Print the results of the runs that have any, one below the other."""
    folders = [RunFolder(config.output) for config in configs]
    if is_main():
        say(format_table({str(each): each.read_result() for each in folders if each.result.exists()}))
