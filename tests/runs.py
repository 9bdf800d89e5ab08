"""Short runs of the recipe, on several processes too, and when two of them are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from clis.engine.checkpoint import load_checkpoint
from clis.engine.log import TIME_FIELDS
from clis.engine.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[1]
OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
"""Too old for `clis export`, and for the pretended device of the tests."""
CONFIG = str(REPOSITORY / "configs" / "shapes" / "clis.yaml")
BASELINE = str(REPOSITORY / "configs" / "shapes" / "baseline.yaml")
SHORT = [
    "data.generate=null", "data.workers=0", "train.device=cpu",
    "model.backbone.width=16", "model.backbone.fpn_channels=16",
    "model.roi.fc_dim=32", "model.roi.samples=16", "data.mosaic_size=64", "data.short_sides=[48]",
    "data.max_size=64", "data.paste_size=[10,24]", "test.short_side=48", "test.max_size=64",
    "test.detections=20", "train.images_per_step=4",
    "optim.warmup_steps=2", "train.log_every=1", "train.save_every=2", "train.steps=4", "train.keep_last=5",
]  # fmt: skip


def records(folder: Path) -> list[dict]:
    """metrics.jsonl without what differs from run to run."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]  # the last may be half written
    return [{k: v for k, v in json.loads(line).items() if k not in TIME_FIELDS} for line in lines]


def assert_same_state(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def assert_same_training(folder: Path, reference: Path) -> None:
    """Bit for bit: weights, queue, momentum copy, optimizer, metrics and results."""
    ours, expected = (load_checkpoint(each / "checkpoints" / "last.pt") for each in (folder, reference))
    assert ours["step"] == expected["step"]
    assert_same_state(ours["model"], expected["model"])
    momentum = [
        {str(k): v["momentum_buffer"] for k, v in state["optimizer"]["state"].items()}
        for state in (ours, expected)
    ]
    assert_same_state(*momentum)
    assert records(folder) == records(reference)
    assert RunFolder(folder).read_result() == RunFolder(reference).read_result()


def spawn(folder: Path, function: Callable, *arguments: Any) -> None:
    """Call function(rank, *arguments), of a module's top level, in two processes of one gloo group."""
    torch.multiprocessing.spawn(_in_group, (folder, function, arguments), nprocs=2)


def _in_group(rank: int, folder: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    function(rank, *arguments)
    torch.distributed.destroy_process_group()


def save_shares(folder: Path, steps: Callable, *arguments: Any, accumulations: tuple[int, ...]) -> None:
    """Save what steps(rank, processes, accumulation, *arguments) returns, of one process and of two.

    All have one thread. One process takes each of the accumulations, two take none; the files are
    ``{processes}x{accumulation}_{rank}.pt``.
    """
    threads = torch.get_num_threads()
    for accumulation in accumulations:
        _save_share(0, folder, steps, 1, accumulation, arguments)
    torch.set_num_threads(threads)
    spawn(folder, _save_share, folder, steps, 2, 1, arguments)


def _save_share(
    rank: int, folder: Path, steps: Callable, processes: int, accumulation: int, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    torch.save(
        steps(rank, processes, accumulation, *arguments), folder / f"{processes}x{accumulation}_{rank}.pt"
    )
