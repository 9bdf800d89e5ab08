"""A training step at the paper's size: ours beside torchvision's, and what image-level supervision costs.

    python benchmarks/step.py [KIND ...] [--repeats 5] [--device cpu]  # all kinds, or these

R50-FPN, random weights, one 800 x 1088 image with ten boxes, 1203 classes, class-specific boxes, float32; a
step is forward, backward and SGD with momentum. Ours trains batch norm's affine and pools adaptively, as the
recipe does; torchvision's affine is frozen, and it pools 2 x 2 points a bin. Seconds are of two variants in
turns; peaks of memory (`--memory`, not for s, t, systems and losses) of a process for each.

* baseline: our Faster R-CNN beside torchvision's with frozen batch norm, stem and layer1, and as many
  proposals and RoIs, as it comes and with its convolutions in channels_last, as ours have them.
* clis: CLIS with s = 16 and t = 2 beside s = t = 0 (TSS and objectness alone), which the paper has at 0.479
  and 0.249 s: 1.92.
* s, t: the rows of the paper's tables V and VI. classes: 80, 1203 and 21,842 of them.
* systems: stages of other systems with image-level images beside the baseline, with one mosaic (s = 4), which
  MosaicOS has in place of the image. A teacher of random weights finds nothing, so mosaics are background.
* losses: every classification loss beside cross-entropy, on the baseline; Seesaw as in its recipe, with
  the cosine classifier, and PCB with its three rounds of refinement.
* profile: where the time of a step goes, and how much of it is convolutions and matrix products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from detectors import (
    compare,
    make_batch,
    make_detector,
    make_peer,
    operator_seconds,
    paper_config,
    parse,
)
from torch import nn
from torchvision.models.detection import FasterRCNN

from clis.data.batch import Batch
from clis.engine.optim import autocast, make_optimizer, make_scaler
from clis.engine.train import global_normalizers, train_step
from clis.losses import CLASSIFICATION_LOSSES
from clis.models import CLISDetector

CLASSES = 1203
PAPER = {
    "s": {(0, 0): 0.249, (4, 0): 0.275, (8, 0): 0.296, (16, 0): 0.381, (32, 0): 0.416},
    "t": {(16, 0): 0.381, (16, 1): 0.403, (16, 2): 0.479, (16, 4): 0.531},
}
"""Seconds a step on V100s by (s, t): the paper's tables V and VI."""
PLAIN = tuple(f"clis.{name}=false" for name in ("task_specialized", "objectness", "contrastive"))
ONE_MOSAIC = (*PLAIN, "clis.s=4", "clis.t=0")
TEACHER = (*ONE_MOSAIC, "regions.rule=full", "start.from=unread.pt")
SYSTEMS = {
    "L_imcls": ONE_MOSAIC,
    "Detic": (*ONE_MOSAIC, "regions.rule=max-size"),
    "Self-Training": (*TEACHER, "teacher={momentum: 1, boxes: true, strong: false}"),
    "Unbiased Teacher": (*TEACHER, "teacher.momentum=0.9996", "loss.classification=focal"),
}
"""Overrides of the stages with image-level images, by system."""
COSINE, ROUNDS = "model.roi.cosine=20", "model.roi.refinement_rounds=3"
LOSSES: dict[str, tuple[str, ...]] = {
    **{name: (f"loss.classification={name}",) for name in ("cross_entropy", *CLASSIFICATION_LOSSES)},
    "seesaw": ("loss.classification=seesaw", COSINE),
    "seesaw, PCB": ("loss.classification=seesaw(pcb=0.05)", COSINE),
    "seesaw, PCB, three rounds": ("loss.classification=seesaw(pcb=0.05)", COSINE, ROUNDS),
}
"""Overrides of the baseline, by what the loss is called in the table."""
DENSE = {
    "aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::convolution_backward", "aten::addmm",
    "aten::mm",
}  # fmt: skip


def torchvision_step(
    device: str,
    memory_format: torch.memory_format,
    precision: str = "float32",
    peer: FasterRCNN | None = None,
    batch: Batch | None = None,
) -> Callable[[], object]:
    """A step of torchvision's detector; `peer` and `batch` are made where there are none."""
    peer = (peer or make_peer(CLASSES, device)).to(memory_format=memory_format).train()
    batch = batch or make_batch(0, 0, CLASSES, device)
    images = [image.float() / 255 for image in batch.images]
    targets = [{"boxes": boxes, "labels": labels + 1} for boxes, labels in zip(batch.boxes, batch.labels)]
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    config = paper_config(f"train.precision={precision}")
    scaler = make_scaler(config, torch.device(device))

    def step() -> None:
        with autocast(precision, torch.device(device)):
            loss = sum(peer(images, targets).values())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, float("inf"))  # ours looks at the norm, too
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def our_step(
    device: str,
    *overrides: str,
    classes: int = CLASSES,
    model: CLISDetector | None = None,
    batch: Batch | None = None,
) -> Callable[[], object]:
    """A step of ours with `key=value` overrides; `model` and `batch` are made where there are none."""
    model = (model or make_detector(classes, *overrides, device=device)).train()
    config = paper_config(*overrides)
    batch = batch or make_batch(config.clis.s, config.clis.t, classes, device)
    config = paper_config(*overrides, f"train.images_per_step={len(batch.images)}")
    optimizer, scaler = make_optimizer(model, config), make_scaler(config, torch.device(device))
    normalizers = global_normalizers(batch.counts, config)
    return lambda: train_step(model, model, optimizer, scaler, [batch], normalizers, 1e-6, 0.0, config)


def parts(s: int, t: int) -> tuple[str, ...]:
    """TSS and objectness, with s image-level images and t pairs."""
    flags = {"siamese": s > 0, "contrastive": t > 0}
    return (f"clis.s={s}", f"clis.t={t}", *(f"clis.{name}={str(on).lower()}" for name, on in flags.items()))


def _pair(s: int, t: int) -> str:
    return f"s={s} t={t}"


def _our_pair(s: int, t: int, device: str) -> Callable[[], object]:
    return our_step(device, *parts(s, t))


def _our_classes(count: int, device: str) -> Callable[[], object]:
    return our_step(device, *parts(16, 2), classes=count)


def _ours(overrides: Sequence[str], device: str) -> Callable[[], object]:
    return our_step(device, *overrides)


VARIANTS: dict[str, Callable[[str], Callable[[], object]]] = {
    "torchvision": lambda device: torchvision_step(device, torch.contiguous_format),
    "torchvision, channels_last": lambda device: torchvision_step(device, torch.channels_last),
    "baseline": lambda device: our_step(device, "clis=off"),
    **{_pair(s, t): functools.partial(_our_pair, s, t) for s, t in (*PAPER["s"], *PAPER["t"])},
    **{f"{count} classes": functools.partial(_our_classes, count) for count in (80, 1203, 21_842)},
    **{name: functools.partial(_ours, overrides) for name, overrides in SYSTEMS.items()},
    **{name: functools.partial(_ours, ("clis=off", *overrides)) for name, overrides in LOSSES.items()},
}


def profile(name: str, device: str, shown: int = 14) -> None:
    """The operators that take most of a step, and the share of convolutions and matrix products."""
    if device != "cpu":
        raise SystemExit("profile: counts operators of the CPU; `gpu.py --parts h` has a GPU's kernels")
    step = VARIANTS[name](device)
    step()
    seconds = operator_seconds(step)
    total = sum(seconds.values())
    dense = sum(value for key, value in seconds.items() if key in DENSE)
    print(f"{name}: {total:.2f} s, of which {dense / total:.1%} are convolutions and matrix products")
    for key, value in list(seconds.items())[:shown]:
        print(f"| {key} | {value:.2f} s | {value / total:.1%} |")


KINDS = {
    "baseline": ["torchvision", "torchvision, channels_last", "baseline"],
    "clis": ["s=0 t=0", "s=16 t=2"],
    "s": [_pair(*pair) for pair in PAPER["s"]],
    "t": [_pair(*pair) for pair in PAPER["t"]],
    "classes": ["1203 classes", "80 classes", "21842 classes"],
    "systems": ["baseline", *SYSTEMS],
    "losses": list(LOSSES),
    "profile": ["baseline", "s=16 t=2"],
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(__doc__, KINDS, VARIANTS, argv)
    for what in arguments.what:
        print(f"## {what}", flush=True)
        if what == "profile":
            for name in KINDS[what]:
                profile(name, arguments.device)
            continue
        memory = what not in (*PAPER, "systems", "losses")
        compare(__file__, VARIANTS, KINDS[what], arguments.repeats, arguments.device, memory)
        if what in PAPER:
            first, *_ = PAPER[what].values()
            ratios = [f"{_pair(*pair)} {seconds / first:.2f}" for pair, seconds in PAPER[what].items()]
            print(f"the paper's ratios: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
