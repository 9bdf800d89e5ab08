"""What step.py and inference.py share: detectors of the paper's size, batches, turns, memory."""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from clis.config import Config
from clis.config_files import config_from_dict, merge_overrides
from clis.data.batch import Batch, Sample, collate
from clis.data.categories import Category
from clis.models import CLISDetector, build_model

SIZE = (800, 1088)
"""Height and width of an instance-level image."""
MOSAIC = 448


def paper_config(*overrides: str) -> Config:
    """The paper's recipe with R50-FPN from random weights, and `key.path=value` overrides."""
    return config_from_dict(merge_overrides({}, overrides), source="benchmark")


def long_tail(classes: int) -> list[Category]:
    """Classes of 1 to 2,000 training images, evenly on a log scale: about a third each up to 12 and 160."""
    tail = []
    for place in range(classes):
        images = round(2000 ** (place / max(1, classes - 1)))
        group = "r" if images <= 10 else "c" if images <= 100 else "f"
        tail.append(
            Category(
                id=place + 1, name=str(place), frequency=group, image_count=images, instance_count=2 * images
            )
        )
    return tail


def make_detector(classes: int, *overrides: str, device: str) -> CLISDetector:
    torch.manual_seed(0)
    detector = build_model(paper_config(*overrides), long_tail(classes))
    draw_dense(detector)
    if detector.teacher is not None:
        detector.teacher.restart(detector)  # a copy of what has been drawn
    return detector.to(device)


def make_peer(classes: int, device: str, **options: float) -> FasterRCNN:
    """torchvision's `fasterrcnn_resnet50_fpn` with random weights, frozen as with pretrained ones.

    The function itself gives trainable batch norm and freezes nothing where `weights` is None.
    """
    torch.manual_seed(0)
    backbone = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    options = {"rpn_post_nms_top_n_train": 1000, **options}
    peer = FasterRCNN(_resnet_fpn_extractor(backbone, 3), classes + 1, **options)
    frozen = {name.split(".")[1] for name, p in peer.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}, frozen
    assert not any(isinstance(module, nn.BatchNorm2d) for module in peer.modules())
    draw_dense(peer)
    heads = peer.roi_heads  # as ours begin
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.xavier_uniform_(layer.weight)
    for layer, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
    for layer in (heads.box_head.fc6, heads.box_head.fc7, *heads.box_predictor.children()):
        nn.init.zeros_(layer.bias)
    return peer.to(device)


GAINS = {"conv3": 0.25, "inner_blocks": 0.25, "layer_blocks": 0.25, "deltas": 0.2, "bbox_pred": 0.2}
"""Of convolutions by a part of their name, ours and torchvision's, so that features stay near 1 through all
blocks and proposals spread around their anchors, as those of a trained detector do."""


@torch.no_grad()
def draw_dense(detector: nn.Module) -> None:
    """The same backbone and RPN in ours and torchvision's, so that their proposals are alike."""
    generator = torch.Generator().manual_seed(0)
    for part in map(detector.get_submodule, ("backbone", "rpn")):
        for name, weight in part.named_parameters():
            if weight.dim() == 4:  # in the same order in both
                gain = next((gain for key, gain in GAINS.items() if key in name), 1.0)
                std = gain * (2 / weight[0].numel()) ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def make_batch(
    s: int,
    t: int,
    classes: int,
    device: str,
    images: int = 1,
    size: tuple[int, int] = SIZE,
    mosaic: int = MOSAIC,
) -> Batch:
    """Images of noise with ten boxes and t pasted ones each, and s / 4 mosaics with a region per tile.

    Sides are 0.05 to 0.4 of the image; of a region, whose image is of one object, 0.4 to 0.9 of its tile.
    """
    generator = torch.Generator().manual_seed(0)
    samples = [_make_sample(s, t, classes, size, mosaic, seed, generator) for seed in range(images)]
    return collate(samples).to(torch.device(device))


def _make_sample(
    s: int, t: int, classes: int, size: tuple[int, int], mosaic: int, seed: int, generator: torch.Generator
) -> Sample:
    def noise(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    def boxes(count: int, size: tuple[int, int], least: float, most: float) -> Tensor:
        sides = least + (most - least) * torch.rand(count, 2, generator=generator)
        low = (1 - sides) * torch.rand(count, 2, generator=generator)
        return torch.cat([low, low + sides], dim=1) * torch.tensor(size[::-1]).repeat(2)

    pasted, tile = boxes(t, size, 0.05, 0.4), mosaic // 2
    tiles = torch.tensor([[0.0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]]) * tile
    return Sample(
        image=noise(3, *size),
        boxes=torch.cat([boxes(10, size, 0.05, 0.4), pasted]),
        labels=torch.randint(classes, (10 + t,), generator=generator),
        mosaics=noise(s // 4, 3, mosaic, mosaic),
        regions=boxes(s, (tile, tile), 0.4, 0.9) + tiles.repeat(s // 4, 1),
        region_labels=torch.randint(classes, (s,), generator=generator),
        region_mosaics=torch.arange(s) // 4,
        pair_boxes=pasted,
        pair_regions=torch.arange(t),
        seed=seed,
        image_id=seed,
        unreadable=(),
    )


def take_turns(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each variant, `repeats` times in turns, after one run of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, variant in variants.items():
            began = time.perf_counter()
            variant()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def print_ratios(seconds: dict[str, list[float]], reference: str) -> None:
    """A line a variant: its median seconds, and its ratio to the reference: median (lowest .. highest)."""
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, seconds[reference])]
        low, high = min(ratios), max(ratios)
        print(
            f"| {name} | {statistics.median(values):.3f} s "
            f"| {statistics.median(ratios):.3f} ({low:.3f} .. {high:.3f}) |",
            flush=True,
        )


def parse(
    doc: str | None,
    kinds: Mapping[str, Sequence[str]],
    variants: Mapping[str, Callable[[str], Callable[[], object]]],
    argv: Sequence[str] | None,
) -> argparse.Namespace:
    """The command line: which kinds, how often, where; ``--memory NAME`` prints a peak and ends."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=", ".join(kinds))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", choices=variants, help="print the peak of one variant, in MB")
    arguments = parser.parse_args(argv)
    if arguments.memory:
        make = variants[arguments.memory]
        print(own_peak_megabytes(lambda: make(arguments.device), arguments.device))
        parser.exit()
    if unknown := sorted(set(arguments.what) - set(kinds)):
        parser.error(f"{unknown[0]}: one of {', '.join(kinds)}")
    arguments.what = arguments.what or list(kinds)
    return arguments


def compare(
    script: str,
    variants: Mapping[str, Callable[[str], Callable[[], object]]],
    names: Sequence[str],
    repeats: int,
    device: str,
    memory: bool = True,
) -> None:
    """Seconds of the variants `names`, each in turns with the first, and their peak memory.

    Args:
        script: the file that prints the peak of one variant with ``--memory NAME``.
        variants: by name, what makes a variant for a device.
    """
    peaks = [peak_megabytes(script, name, device) for name in names] if memory else []
    reference, *others = names
    for name in others:  # two at a time, for memory
        seconds = take_turns({each: variants[each](device) for each in (reference, name)}, repeats, device)
        print_ratios(seconds, reference)
    for name, peak in zip(names, peaks):
        print(f"| {name} | peak {peak:.0f} MB | {peak / peaks[0]:.3f} |", flush=True)


def peak_megabytes(script: str, variant: str, device: str) -> float:
    """Most memory of a process of its own that runs one variant twice, beyond that of the imports."""
    command = [sys.executable, script, "--memory", variant, "--device", device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def own_peak_megabytes(work: Callable[[], Callable[[], object]], device: str) -> float:
    """Peak of this process over what it has now: what `work` makes, and two runs of what it returns."""
    if device != "cpu":
        variant = work()
        for _ in range(2):
            variant()
        return torch.cuda.max_memory_allocated() / 1e6
    before = _peak_kilobytes()
    variant = work()
    for _ in range(2):
        variant()
    return (_peak_kilobytes() - before) / 1e3


def _peak_kilobytes() -> int:
    """Of this process (Linux). A child's ru_maxrss would begin with its parent's."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes)


def operator_seconds(variant: Callable[[], object]) -> dict[str, float]:
    """Seconds on the CPU that the operators of one run took themselves, most first.

    On a GPU they would be those of launching alone: gpu.py's part h has the kernels there.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        variant()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {event.key: event.self_cpu_time_total / 1e6 for event in events}
