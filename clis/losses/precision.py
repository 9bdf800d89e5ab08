"""Losses are computed in float32 at least, whatever autocast did to the network."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32; wider types stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
