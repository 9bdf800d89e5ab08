"""State dicts by name: into a module with an error that says what does not fit, and into a ResNet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from clis.models.backbone import ResidualLayers

WEIGHTS_URL = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
"""torchvision's IMAGENET1K_V1 weights, the ones that mmdetection's `torchvision://resnet50` names."""


def load_backbone_weights(body: ResidualLayers, name: str, path: Path, download: bool = False) -> None:
    """Load a ResNet state dict with torchvision's names; a classifier and batch counters are left alone.

    Raises:
        FileNotFoundError: no such file, and `download` is false; says where to get it.
        ValueError: it is not a state dict of this network; names the tensors that differ.
    """
    if not path.exists():
        url = WEIGHTS_URL.get(name)
        if not download or url is None:
            where = f"get it from {url}, or set model.backbone.download=true, " if url else ""
            raise FileNotFoundError(
                f"{path}: backbone weights are missing; {where}or train from random weights with "
                "model.backbone.weights=null"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=url.split("-")[-1].split(".")[0])
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a state dict that torch.load can read safely: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: a {type(state).__name__}, not a state dict")
    own = body.state_dict()
    loaded = {k: v for k, v in state.items() if _is_backbone(k)} | {
        k: v for k, v in own.items() if not _is_backbone(k)
    }
    hint = ""
    if ("bn1.running_mean" in state) != ("bn1.running_mean" in own):
        hint = "; model.backbone.norm=group is for weights with group norm, folded and frozen for batch norm"
    load_state(body, loaded, str(path), hint)


def _is_backbone(key: str) -> bool:
    return not key.startswith("fc.") and not key.endswith("num_batches_tracked")


def load_state(module: nn.Module, state: dict[str, Tensor], source: str, hint: str = "") -> None:
    """Load a state dict strictly, with an error that lists what is missing, left over or of another shape.

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
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source}: weights of another model: {shown}{hint}")
    module.load_state_dict(state)
