"""CLIS: long-tailed object detection with image-level supervision (arXiv 2210.05568), in pure PyTorch.

Conventions of the whole package: boxes are xyxy in absolute pixels of the tensor that they belong to,
float32; labels are 0..C-1, background is C; images are uint8 RGB [3,H,W] and are normalized in the model.
Letters: B images, M mosaics, N RoIs, R regions, P pairs, C classes, K logits, D features, E embedding, Q
queue. *Instance-level* and *image-level* are the two streams; a *region* is the pre-defined box of an
image-level image; a *pair* is a region and its pasted copy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clis.config import Config
    from clis.config_files import load_config
    from clis.data.annotations import load_annotations
    from clis.data.categories import Category
    from clis.engine.checkpoint import load_detector
    from clis.metric.detections import Detections
    from clis.metric.lvis_eval import evaluate
    from clis.models import CLISDetector, build_model

__version__ = "0.1.0"

_HOME = {
    "CLISDetector": "clis.models",
    "Category": "clis.data.categories",
    "Config": "clis.config",
    "Detections": "clis.metric.detections",
    "build_model": "clis.models",
    "evaluate": "clis.metric.lvis_eval",
    "load_annotations": "clis.data.annotations",
    "load_config": "clis.config_files",
    "load_detector": "clis.engine.checkpoint",
}

__all__ = [
    "CLISDetector",
    "Category",
    "Config",
    "Detections",
    "build_model",
    "evaluate",
    "load_annotations",
    "load_config",
    "load_detector",
]


def __getattr__(name: str) -> Any:
    """Import the requested name when it is first used, so that `import clis` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'clis' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names, of which most are not imported yet."""
    return [*__all__, "__version__"]
