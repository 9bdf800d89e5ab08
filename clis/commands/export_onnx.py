"""A detector as an ONNX model (the extra ``[onnx]``): what the exporter lacks, and onnxruntime."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clis.boxes import grouped_nms

try:
    import onnxruntime
    from onnxscript import opset18
except ImportError:
    raise ValueError('onnxscript or onnxruntime is not installed: pip install -e ".[onnx]"') from None

OPSET = 18
op: Any = opset18


def nms_in_onnx(
    scores: Tensor,
    candidates: Callable[[Tensor], tuple[Tensor, Tensor]],
    iou_threshold: float,
    k: int,
    score_threshold: float = -math.inf,
    min_size: float = 0.0,
    num_candidates: int | None = None,
) -> Tensor:
    """Stand in for `clis.boxes.nms_top_k`, as `nms_of_best`, with one operator that ONNX has too.

    ONNX's NMS is in float32, in which boxes of many classes cannot be set apart, but knows classes itself.
    """
    size: int | torch.SymInt = scores.shape[0]
    if num_candidates is not None:
        size = torch.sym_min(size, num_candidates)
    order = scores.sort(descending=True, stable=True).indices[:size]
    boxes, groups = candidates(order)
    small = (boxes[:, 2:] - boxes[:, :2] < min_size).any(dim=1)
    counts = ~(scores[order] <= score_threshold) & ~small
    kept = torch.ops.clis.nms_in_groups(boxes, groups, counts, iou_threshold)
    return order[kept][:k]


@torch.library.custom_op("clis::nms_in_groups", mutates_args=())
def nms_in_groups(boxes: Tensor, groups: Tensor, counts: Tensor, iou_threshold: float) -> Tensor:
    """Return the places of the boxes that count and survive NMS within their groups, ascending."""
    places = torch.nonzero(counts).squeeze(1)
    return places[grouped_nms(boxes[places], groups[places], iou_threshold)]


@nms_in_groups.register_fake
def _(boxes: Tensor, groups: Tensor, counts: Tensor, iou_threshold: float) -> Tensor:
    survivors = torch.library.get_ctx().new_dynamic_size()
    return groups.new_empty(survivors)


def _nms_in_groups(boxes: Any, groups: Any, counts: Any, iou_threshold: float) -> Any:
    """Write `nms_in_groups` as NonMaxSuppression: scores [1,G,n], the rank in the own group's row."""
    number = op.Shape(groups)  # [1]
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    n = op.Squeeze(number)
    rank = op.Cast(op.Sub(n, op.Range(zero, n, one)), to=1)  # n .. 1: in order already
    rank = op.Where(counts, rank, op.Constant(value_float=-1.0))
    rows = op.Range(zero, op.Add(op.ReduceMax(groups, keepdims=0), one), one)
    own = op.Equal(op.Unsqueeze(rows, op.Constant(value_ints=[1])), groups)
    scores = op.Where(own, rank, op.Constant(value_float=-1.0))
    batched = op.Constant(value_ints=[0])
    selected = op.NonMaxSuppression(
        op.Unsqueeze(boxes, batched), op.Unsqueeze(scores, batched), number,
        op.Constant(value_floats=[float(iou_threshold)]), op.Constant(value_floats=[0.0]),
    )  # fmt: skip
    places = op.Gather(selected, op.Constant(value_int=2), axis=1)
    ascending, _ = op.TopK(places, op.Shape(places), largest=0, sorted=1)
    return ascending


def _sort_stable(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Write a stable sort as TopK of all, whose ties are in the order of the index."""
    every = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, every, axis=dim, largest=int(descending), sorted=1)


def save_onnx(program: torch.export.ExportedProgram, path: Path, notes: dict[str, str]) -> None:
    """Write an exported program as an ONNX model, with `notes` among its metadata."""
    table: Any = {
        torch.ops.aten.sort.stable: _sort_stable,
        torch.ops.clis.nms_in_groups.default: _nms_in_groups,
    }
    converted = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        custom_translation_table=table,
        verbose=False,
        input_names=["image"],
        output_names=["boxes", "scores", "labels"],
    )
    assert converted is not None
    converted.model.metadata_props.update(notes)
    converted.save(path)


def run_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Return what runs an ONNX model by onnxruntime on the CPU: tensors of its one input."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return functools.partial(_run, session)


def _run(session: Any, images: Tensor) -> list[Tensor]:
    outputs = session.run(None, {"image": images.numpy()})
    return [torch.from_numpy(np.asarray(each)) for each in outputs]
