"""A training step at the paper's size: ours beside torchvision's, and what image-level supervision costs.

    python benchmarks/step.py [baseline] [clis] [s] [t] [classes] [profile] [--repeats 5] [--device cpu]

R50-FPN, random weights, one 800 x 1088 image with ten boxes, 1203 classes, class-specific boxes, float32; a
step is forward, backward and SGD with momentum.

* baseline: our Faster R-CNN beside torchvision's with frozen batch norm, stem and layer1, and as many
  proposals and RoIs; also peak memory, each in a process of its own.
* clis: CLIS with s = 16 and t = 2 beside s = t = 0 (TSS and objectness alone); the paper has 0.479 / 0.249 = 1.92.
* s, t: the rows of the paper's tables V and VI. classes: 80, 1203 and 21,842 of them.
* profile: where the time of a step goes, and how much of it is convolutions and matrix products.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from detectors import (
    PLAIN,
    convolutions_share,
    make_batch,
    make_detector,
    make_peer,
    own_peak_megabytes,
    paper_config,
    peak_megabytes,
    print_ratios,
    take_turns,
)
from torch import nn

from clis.engine.optim import make_optimizer
from clis.engine.train import train_step

CLASSES = 1203
PAPER_S = {0: 0.249, 4: 0.275, 8: 0.296, 16: 0.381, 32: 0.416}
PAPER_T = {0: 0.381, 1: 0.403, 2: 0.479, 4: 0.531}
"""Seconds a step on V100s: the paper's tables V (t = 0) and VI (s = 16)."""
BAR = {"baseline": 0.9, "clis": 1.65}


def torchvision_step(device: str, classes: int = CLASSES) -> Callable[[], object]:
    peer = make_peer(classes, device).train()
    batch = make_batch(0, 0, classes, device)
    image, target = batch.images[0].float() / 255, {"boxes": batch.boxes[0], "labels": batch.labels[0] + 1}
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        sum(peer([image], [target]).values()).backward()
        nn.utils.clip_grad_norm_(trained, float("inf"))  # ours looks at the norm, too
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(device: str, *overrides: str, classes: int = CLASSES) -> Callable[[], object]:
    config = paper_config(*overrides, "train.images_per_step=1")
    model = make_detector(classes, *overrides, device=device).train()
    optimizer, scaler = make_optimizer(model, config), torch.amp.GradScaler(device, enabled=False)
    batch = make_batch(config.clis.s, config.clis.t, classes, device)
    return lambda: train_step(model, model, optimizer, scaler, [batch], 1e-6, config)


def parts(s: int, t: int) -> tuple[str, ...]:
    """TSS and objectness, with s image-level images and t pairs."""
    flags = {"siamese": s > 0, "contrastive": t > 0}
    return (f"clis.s={s}", f"clis.t={t}", *(f"clis.{name}={str(on).lower()}" for name, on in flags.items()))


VARIANTS: dict[str, Callable[[str], Callable[[], object]]] = {
    "torchvision": torchvision_step,
    "baseline": lambda device: our_step(device, *PLAIN),
    "s=0 t=0": lambda device: our_step(device, *parts(0, 0)),
    "s=16 t=2": lambda device: our_step(device, *parts(16, 2)),
}


def compare(names: Sequence[str], repeats: int, device: str) -> None:
    """Time and memory of the variants, relative to the first."""
    print_ratios(take_turns({name: VARIANTS[name](device) for name in names}, repeats, device), names[0])
    peaks = [peak_megabytes(__file__, name, device) for name in names]
    for name, peak in zip(names, peaks):
        print(f"| {name} | peak {peak:.0f} MB | {peak / peaks[0]:.3f} |")


def table(variants: dict[str, Callable[[], Callable[[], object]]], repeats: int, device: str) -> None:
    """Rows that are too large to be in memory together: each beside the first, in turns."""
    names = list(variants)
    for name in names[1:]:
        both = {names[0]: variants[names[0]](), name: variants[name]()}
        print_ratios(take_turns(both, repeats, device), names[0])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("baseline", "clis", "s", "t", "classes", "profile")
    parser.add_argument("what", nargs="*", choices=[*kinds, []], default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", choices=VARIANTS, help="print the peak of one variant, in MB")
    arguments = parser.parse_args(argv)
    device, repeats = arguments.device, arguments.repeats
    if arguments.memory:
        print(own_peak_megabytes(lambda: VARIANTS[arguments.memory](device), device))
        return
    for what in arguments.what or kinds:
        print(f"## {what}")
        if what == "baseline":
            compare(["torchvision", "baseline"], repeats, device)
        elif what == "clis":
            compare(["s=0 t=0", "s=16 t=2"], repeats, device)
        elif what == "s":
            table(
                {
                    f"s={s} t=0, the paper's {seconds / PAPER_S[0]:.2f}": lambda s=s: our_step(device, *parts(s, 0))
                    for s, seconds in PAPER_S.items()
                },
                repeats, device,
            )  # fmt: skip
        elif what == "t":
            table(
                {
                    f"s=16 t={t}, the paper's {seconds / PAPER_T[0]:.2f}": lambda t=t: our_step(device, *parts(16, t))
                    for t, seconds in PAPER_T.items()
                },
                repeats, device,
            )  # fmt: skip
        elif what == "classes":
            table(
                {
                    f"{classes} classes": lambda c=classes: our_step(device, *parts(16, 2), classes=c)
                    for classes in (80, 1203, 21_842)
                },
                repeats, device,
            )  # fmt: skip
        else:
            for name in ("baseline", "s=16 t=2"):
                step = VARIANTS[name](device)
                step()
                rows = convolutions_share(step, ())
                total = sum(seconds for _, seconds in rows)
                print(f"{name}: {total:.2f} s of CPU time")
                for key, seconds in rows[:14]:
                    print(f"| {key} | {seconds:.2f} s | {seconds / total:.1%} |")


if __name__ == "__main__":
    main()
