"""Inference at the paper's size: ours beside torchvision's, by how peaked the scores are.

    python benchmarks/inference.py [uniform] [peaked] [clis] [classes] [--repeats 5] [--device cpu]

R50-FPN, random weights, one 800 x 1088 image, 1203 classes, class-specific boxes, LVIS's settings: scores
above 1e-4 (how many is printed), NMS at 0.5 within classes, 300 detections of an image; 1000 proposals.
Seconds are of two variants in turns; peaks of memory (`--memory`) of a process for each.

* uniform: nearly uniform class scores, as early in training: all 1.2 million boxes are above the threshold.
* peaked: scores as late in training, by a wider last layer; torchvision's as it comes and with its
  convolutions in channels_last, as ours have them.
* clis: CLIS (a localization sub-network of its own, objectness) beside our baseline, peaked scores.
* classes: 80, 1203 and 21,842 of them, peaked scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectors import compare, make_batch, make_detector, make_peer, parse
from torch import Tensor

from clis.data.batch import Batch

CLASSES = 1203
THRESHOLD = 1e-4
UNIFORM, PEAKED = 0.01, 0.4
"""Standard deviations of the last classification layer's weights; of the logits 0.25 and 10."""


def torchvision_inference(
    std: float,
    device: str,
    memory_format: torch.memory_format = torch.contiguous_format,
    classes: int = CLASSES,
    batch: Batch | None = None,
    **options: float,
) -> Callable[[], object]:
    peer = make_peer(
        classes, device, box_score_thresh=THRESHOLD, box_nms_thresh=0.5, box_detections_per_img=300, **options
    )
    predictor = peer.to(memory_format=memory_format).eval().roi_heads.box_predictor
    torch.nn.init.normal_(predictor.cls_score.weight, std=std)
    image = (batch or make_batch(0, 0, classes, device)).images[0]

    @torch.no_grad()
    def detect() -> object:
        return peer([image / 255])

    count = predictor.register_forward_hook(lambda *args: _say_count(args[2][0].softmax(dim=1)[:, 1:]))
    detect()
    count.remove()
    return detect


def our_inference(
    std: float,
    device: str,
    *overrides: str,
    classes: int = CLASSES,
    batch: Batch | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> Callable[[], object]:
    detector = make_detector(classes, *overrides, f"model.roi.fc_cls_std={std}", device=device).eval()
    detector.to(memory_format=memory_format)
    image = (batch or make_batch(0, 0, classes, device)).images[0]
    assert detector.test_config.score_threshold == THRESHOLD
    _say_count(detector.predict([image])[0][1])
    return lambda: detector.detect([image])


def _say_count(scores: Tensor) -> None:
    print(f"  {int((scores > THRESHOLD).sum())} of {scores.numel()} scores are above the threshold")


def _classes(count: int) -> Callable[[str], Callable[[], object]]:
    return lambda device: our_inference(PEAKED, device, "clis=off", classes=count)


VARIANTS: dict[str, Callable[[str], Callable[[], object]]] = {
    "torchvision, uniform": lambda device: torchvision_inference(UNIFORM, device),
    "baseline, uniform": lambda device: our_inference(UNIFORM, device, "clis=off"),
    "torchvision, peaked": lambda device: torchvision_inference(PEAKED, device),
    "torchvision, channels_last, peaked": lambda device: torchvision_inference(
        PEAKED, device, torch.channels_last
    ),
    "baseline, peaked": lambda device: our_inference(PEAKED, device, "clis=off"),
    "CLIS, peaked": lambda device: our_inference(
        PEAKED, device, "clis.s=0", "clis.t=0", "clis.contrastive=false"
    ),
    **{f"{count} classes": _classes(count) for count in (80, 1203, 21_842)},
}


KINDS = {
    "uniform": ["torchvision, uniform", "baseline, uniform"],
    "peaked": ["torchvision, peaked", "torchvision, channels_last, peaked", "baseline, peaked"],
    "clis": ["baseline, peaked", "CLIS, peaked"],
    "classes": ["1203 classes", "80 classes", "21842 classes"],
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(__doc__, KINDS, VARIANTS, argv)
    for what in arguments.what:
        print(f"## {what}", flush=True)
        compare(__file__, VARIANTS, KINDS[what], arguments.repeats, arguments.device)


if __name__ == "__main__":
    main()
