"""Load state dicts by name, with errors that list every mismatch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clis.models.backbone import ResidualLayers
from clis.models.weight_files import first_names, prefixes_of, read_content, state_dict_in

WEIGHTS_URL = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
"""torchvision's IMAGENET1K_V1 weights, the ones that mmdetection's `torchvision://resnet50` names."""


FROM_SCRATCH = "model.backbone={weights: null, trainable_layers: 5, norm: group}"
"""Overrides of a recipe for a training without weights: nothing is frozen, and norms need no statistics."""
PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
"""Of a ResNet; a file's other names are of its classifier, projection heads and the like."""
ONLINE = ("encoder_q", "online", "student")
"""Words that mark the trained one of two networks in self-supervised learning; the other is its average."""


def load_backbone_weights(body: ResidualLayers, name: str, path: Path, download: bool = False) -> None:
    """Load a ResNet state dict with torchvision's names; what is no part of a ResNet is left alone.

    The names may have a prefix (DDP's ``module.``, MoCo's ``module.encoder_q.``) and the state dict may be
    below a key; see `clis.models.weight_files.read_weights`.

    Raises:
        FileNotFoundError: no such file, and `download` is false; says where to get it.
        OSError: the download failed; names the URL and the file.
        ValueError: it is not a state dict of this network; names the tensors that differ.
    """
    if not path.exists():
        url = WEIGHTS_URL.get(name)
        if not download or url is None:
            where = f"get it from {url}, or set model.backbone.download=true" if url else "name another file"
            raise FileNotFoundError(
                f"{path}: backbone weights are missing; {where}. To train from random weights, set "
                f"{FROM_SCRATCH}"
            )
        _download(url, path)
    state = state_dict_in(read_content(path), str(path))
    prefix = _prefix(state, str(path))
    given = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and key.removeprefix(prefix).partition(".")[0] in PARTS
    }
    for key, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {prefix}{key} is a {type(value).__name__}, not a tensor")
    own = body.state_dict()
    loaded = {k: v for k, v in given.items() if not k.endswith("num_batches_tracked")} | {
        k: v for k, v in own.items() if k.partition(".")[0] not in PARTS or k.endswith("num_batches_tracked")
    }
    hint = f"; the file has {first_names(state)}"
    if "conv1.weight" in given and ("bn1.running_mean" in given) != ("bn1.running_mean" in own):
        hint = "; model.backbone.norm=group is for weights with group norm, folded and frozen for batch norm"
    load_state(body, loaded, str(path), hint)


def _prefix(state: Mapping[str, Any], source: str) -> str:
    """Return what comes before the names of a ResNet in a state dict, `""` where there is no ResNet."""
    prefixes = prefixes_of(state, "layer1.0.conv1.weight")
    if "" in prefixes or not prefixes:
        return ""
    online = [prefix for prefix in prefixes if any(word in prefix for word in ONLINE)]
    if len(prefixes) > 1 and len(online) != 1:
        raise ValueError(
            f"{source}: several ResNets, below {', '.join(prefixes)}: write a file of one of them"
        )
    return prefixes[0] if len(prefixes) == 1 else online[0]


def _download(url: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=url.split("-")[-1].split(".")[0])
    except (OSError, RuntimeError) as error:  # a RuntimeError where the hash is another
        raise OSError(
            f"{path}: {url} could not be downloaded to it ({error}); fetch it by hand, or name "
            "another file in model.backbone.weights"
        ) from error


def load_state(module: nn.Module, state: dict[str, Tensor], source: str, hint: str = "") -> None:
    """Load a state dict strictly, with an error that lists what is missing, left over or of another shape.

    Where a module is shared, its tensors have several names, which must be given one value.

    Args:
        source: what the error calls the state.
        hint: what it ends with.

    Raises:
        ValueError: the tensors are not those of the module.
    """
    own = module.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unknown {key}" for key in state if key not in own]
    problems += [
        f"{key} is {list(state[key].shape)}, the model's is {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems += [
        f"{first} and {other} are one tensor in the model, and differ"
        for first, *others in shared_names(module)
        for other in others
        if first in state and other in state and not torch.equal(state[first], state[other])
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source}: weights of another model: {shown}{hint}")
    module.load_state_dict(state)


def shared_names(module: nn.Module) -> list[list[str]]:
    """Return the names of each tensor of a module that has several, since modules are shared."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [each for each in names.values() if len(each) > 1]
