"""The feature extractor shared by all tasks: ResNet + FPN, from uint8 images to P2-P6."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from clis.config import BackboneConfig
from clis.resize import padded_size

STRIDES = (4, 8, 16, 32, 64)
"""Of P2-P6."""

IMAGE_MEAN = (123.675, 116.28, 103.53)
IMAGE_STD = (58.395, 57.12, 57.375)
"""ImageNet statistics of RGB in 0..255 (mmdetection)."""

BLOCKS = {
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
BOTTLENECK = ("resnet50", "resnet101")


class FixedBatchNorm(nn.Module):
    """Batch norm in evaluation mode: y = (x - mean) / sqrt(var + eps) * weight + bias, with fixed statistics.

    `fold` and `conv_norm` put it into the convolution before it, so that it costs O(weights) and keeps no
    activation; the gradient still reaches `weight` and `bias`. Names as in torchvision; its state dicts load.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))


Norm = Callable[[int], nn.Module]
"""Makes a norm from its number of channels."""


def make_norm(config: BackboneConfig, channels: int) -> nn.Module:
    """Build the norm of `BackboneConfig.norm`: `folded`, `frozen` or `group` (16 channels per group)."""
    if config.norm == "group":
        return nn.GroupNorm(channels // 16, channels, config.norm_eps)
    return FixedBatchNorm(channels, config.norm_eps).requires_grad_(config.norm == "folded")


Folded = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""Weight and bias of each convolution with its `FixedBatchNorm` in them."""


def fold(layer: nn.Module) -> Folded:
    """Put every `FixedBatchNorm` of a layer into the convolution before it, in the type that autocast wants.

    Scales and shifts are computed together: a dozen launches on a GPU instead of five for each norm.
    """
    norms = [module for module in layer.modules() if isinstance(module, FixedBatchNorm)]
    if not norms:
        return {}
    convs = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
    weight, bias, mean, variance = (
        torch.cat([getattr(norm, name) for norm in norms])
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight * (variance + norms[0].eps).rsqrt()
    device, dtype = scale.device.type, scale.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    shift = (bias - mean * scale).to(dtype)
    channels = [len(norm.weight) for norm in norms]
    scales, shifts = scale[:, None, None, None].split(channels), shift.split(channels)
    weights = [(conv.weight * scale).to(dtype) for conv, scale in zip(convs, scales, strict=True)]
    return dict(zip(convs, zip(weights, shifts)))


SharedFolds = dict[int, Folded]
"""What is folded of each layer, by its number, for several passes of one step."""


def _fold_once(number: int, layer: nn.Module, shared: SharedFolds | None) -> Folded:
    """Fold a layer when it is first needed.

    So the gradient of its weights is complete as soon as the backward pass has left the layer, and DDP can
    send it; with all layers folded before the first pass it would be complete at the very end.
    """
    if shared is None:
        return fold(layer)
    if number not in shared:
        shared[number] = fold(layer)
    return shared[number]


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module, folded: Folded) -> Tensor:
    """Return norm(conv(x)), as one convolution where the statistics are fixed."""
    if conv not in folded:
        return norm(conv(x))
    weight, bias = folded[conv]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (ResNet-18)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, config: BackboneConfig, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), norm(width)
        self.conv2, self.bn2 = _conv(width, width, 3), norm(width)
        self.downsample = _shortcut(inputs, width, stride, norm)

    def forward(self, x: Tensor, folded: Folded) -> Tensor:
        """Return relu(shortcut + two convolutions of x) [B, width, H/stride, W/stride]."""
        out = conv_norm(x, self.conv1, self.bn1, folded).relu_()
        out = conv_norm(out, self.conv2, self.bn2, folded)
        return out.add_(_shortened(x, self.downsample, folded)).relu_()


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut (ResNet-50); the stride is in the 3x3 or in the first 1x1."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, config: BackboneConfig, norm: Norm) -> None:
        super().__init__()
        outputs = width * self.expansion
        stride_1x1, stride_3x3 = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1, self.bn1 = _conv(inputs, width, 1, stride_1x1), norm(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride_3x3), norm(width)
        self.conv3, self.bn3 = _conv(width, outputs, 1), norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor, folded: Folded) -> Tensor:
        """Return relu(shortcut + three convolutions of x) [B, 4 width, H/stride, W/stride]."""
        out = conv_norm(x, self.conv1, self.bn1, folded).relu_()
        out = conv_norm(out, self.conv2, self.bn2, folded).relu_()
        out = conv_norm(out, self.conv3, self.bn3, folded)
        return out.add_(_shortened(x, self.downsample, folded)).relu_()


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))


def _shortened(x: Tensor, downsample: nn.Sequential | None, folded: Folded) -> Tensor:
    if downsample is None:
        return x
    conv, norm = downsample
    assert isinstance(conv, nn.Conv2d)
    return conv_norm(x, conv, norm, folded)


class ResidualLayers(nn.Module):
    """The layers of a residual network, with torchvision's parameter names."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, config: BackboneConfig, norm: Norm) -> None:
        super().__init__()
        block = Bottleneck if config.name in BOTTLENECK else BasicBlock
        self.conv1, self.bn1 = nn.Conv2d(3, config.width, 7, 2, 3, bias=False), norm(config.width)
        channels, self.channels = config.width, []
        for stage, num_blocks in enumerate(BLOCKS[config.name]):
            width, blocks = config.width * 2**stage, []
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width, stride, config, norm))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(channels)
        self._initialize()
        for layer in self._layers()[: 5 - config.trainable_layers]:
            layer.requires_grad_(False)

    def _layers(self) -> list[nn.Module]:
        stem = nn.ModuleList([self.conv1, self.bn1])
        return [stem, self.layer1, self.layer2, self.layer3, self.layer4]

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor, shared: SharedFolds | None = None) -> list[Tensor]:
        """Return C2-C5 (strides 4-32) of normalized images [B,3,H,W].

        Args:
            shared: what other passes with the same weights have folded; this one adds what it is the first
                to need.
        """
        stem, *stages = self._layers()
        x = conv_norm(x, self.conv1, self.bn1, _fold_once(0, stem, shared)).relu_()
        x = F.max_pool2d(x, 3, 2, 1)
        outputs = []
        for number, layer in enumerate(stages, 1):
            folded = _fold_once(number, layer, shared)
            for block in layer.children():
                x = block(x, folded)
            outputs.append(x)
        return outputs


class ResNet(ResidualLayers):
    """The detector's residual network; returns C2-C5."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config, functools.partial(make_norm, config))

    def forward(self, x: Tensor, shared: SharedFolds | None = None) -> list[Tensor]:
        """Return C2-C5 (strides 4-32) of normalized images [B,3,H,W]; `shared` as for `features`."""
        return self.features(x, shared)


class Normalize(nn.Module):
    """Map RGB in 0..255 to the mean 0 and standard deviation 1 of ImageNet, in the type of its buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (images - mean) / std of images [...,3,H,W]."""
        return (images - self.mean) / self.std


class ImageClassifier(ResidualLayers):
    """The detector's residual network, all of it trained, with global average pooling and one fc layer.

    Batch norm trains where the detector fixes its statistics. The state dict is a torchvision ResNet's.
    """

    def __init__(self, config: BackboneConfig, categories: Sequence[Any]) -> None:
        norm: Norm = functools.partial(nn.BatchNorm2d, eps=config.norm_eps)
        if config.norm == "group":
            norm = functools.partial(make_norm, config)
        super().__init__(dataclasses.replace(config, trainable_layers=5), norm)
        self.fc = nn.Linear(self.channels[-1], len(categories))
        self.normalize = Normalize()
        self.categories = tuple(categories)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B,C] of uint8 RGB images [B,3,H,W]."""
        return self.fc(self.features(self.normalize(images))[-1].mean(dim=(2, 3)))


class Backbone(nn.Module):
    """Normalize, pad and batch images; ResNet; FPN (arXiv 1612.03144) with P6 a subsampled P5.

    The FPN's convolutions start as torchvision's and detectron2's; mmdetection draws those of 1 x 1 wider, by
    a factor of 1.2 to 1.3.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.square = config.canvas == "square"
        self.normalize = Normalize()
        self.body = ResNet(config)
        self.fpn = FeaturePyramidNetwork(
            self.body.channels,
            config.fpn_channels,
            norm_layer=functools.partial(make_norm, config) if config.norm == "group" else None,
        )

    def forward(
        self, images: Sequence[Tensor], max_size: int | None = None, shared: SharedFolds | None = None
    ) -> list[Tensor]:
        """Return features P2-P6, [B, fpn_channels, H/stride, W/stride], of RGB images [3,H,W] in 0..255.

        Args:
            max_size: the longest side that such images may have; see `BackboneConfig.canvas`.
            shared: the body's folded weights, for passes that share them; see `ResidualLayers.features`.
        """
        return self.levels(self.top_down(images, max_size, shared))

    def levels(self, summed: Sequence[Tensor]) -> list[Tensor]:
        """Return P2-P6 of what `top_down` returns."""
        levels = [layer(x) for layer, x in zip(self.output_convs, summed)]
        return [*levels, F.max_pool2d(levels[-1], 1, 2)]

    @property
    def output_convs(self) -> nn.ModuleList:
        """Return the 3x3 convolution of each of P2-P5, with its norm if there is one."""
        return self.fpn.layer_blocks

    def top_down(
        self, images: Sequence[Tensor], max_size: int | None = None, shared: SharedFolds | None = None
    ) -> list[Tensor]:
        """Return the pyramid's top-down sums, from which `output_convs` make P2-P5."""
        features = self.body(self.batch(images, max_size), shared)
        summed = [lateral(x) for lateral, x in zip(self.fpn.inner_blocks, features)]
        for level in range(len(summed) - 2, -1, -1):
            size = summed[level].shape[2:]
            summed[level] = summed[level] + F.interpolate(summed[level + 1], size=size, mode="nearest")
        return summed

    def batch(self, images: Sequence[Tensor], max_size: int | None = None) -> Tensor:
        """Normalize images and zero-pad them, right and bottom, to a common multiple of 32: [B,3,H,W]."""
        least = max_size if self.square and max_size is not None else 0
        height = max(least, *(image.shape[1] for image in images))
        width = max(least, *(image.shape[2] for image in images))
        batch = self.normalize.mean.new_zeros((len(images), 3, *padded_size((height, width))))
        for row, image in zip(batch, images):
            row[:, : image.shape[1], : image.shape[2]] = self.normalize(image)
        return batch
