"""A pretended device: tensors on the CPU that say they are elsewhere, so a CPU shows what mixes devices."""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)
"""A type of device that nothing here uses, and for which autograd needs no threads of its own."""
PACKAGE = str(Path(__file__).resolve().parents[1] / "clis")
COPIES = ("aten._to_copy.default", "aten.copy_.default")


WAITING = ("nonzero", "nms", "masked_select", "_local_scalar_dense", "aten.equal.", "unique")


def is_wait(name: str, arguments: tuple) -> bool:
    """Whether the host waits for an operator: for the size of its result, or for a value."""
    if any(word in name for word in WAITING):
        return True
    if not name.startswith(("aten.index.", "aten.index_put")):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])


class OnDevice(Tensor):
    """A tensor of the pretended device around one on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise RuntimeError(f"{function}: outside of the pretended device")


class PretendedDevice(TorchDispatchMode):
    """While it is entered, tensors can be moved to `DEVICE` and computed with there, on the CPU.

    Attributes:
        mixed: operators on tensors of both devices, which CUDA refuses or answers with a copy that the host
            waits for; numbers and tensors without dimensions are free to mix. By operator and line.
        copies: copies to the device, and back, by direction and line.
        waits: values that the host reads, by operator and line.
        launches: operators on the device that are no views: a CUDA device would launch kernels for them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.mixed: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # unknown to it
        monkeypatch.setattr(Tensor, "tolist", self._counted_tolist(Tensor.tolist))
        for module in (_foreach_utils, importlib.import_module("torch.optim.optimizer")):
            # one launch for many parameters, as on CUDA
            monkeypatch.setattr(module, "_get_foreach_kernels_supported_devices", lambda: [DEVICE.type])
            monkeypatch.setattr(module, "_foreach_supported_types", [Tensor, OnDevice])

    def _counted_tolist(self, tolist):
        def call(tensor: Tensor) -> list:
            if isinstance(tensor, OnDevice):
                self.waits["tolist", _line()] += 1
            return tolist(_inner(tensor))

        return call

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options, name = options or {}, str(function)
        leaves = tree_leaves((arguments, options))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        if here and name not in COPIES:
            self._note(
                function, name, arguments, [each for each in tensors if not isinstance(each, OnDevice)]
            )
        result = function(*tree_map(_inner, arguments), **tree_map(_inner, options))
        if name == "aten.copy_.default":
            if len(here) == 1:
                self.copies["to the device" if here[0] is arguments[0] else "to the host", _line()] += 1
            return arguments[0]
        if name == "aten._to_copy.default" and target is not None and len(here) != (target == DEVICE):
            self.copies["to the host" if here else "to the device", _line()] += 1
            return OnDevice(result) if target == DEVICE else result
        if not here and target != DEVICE:
            return result
        result = tree_map(lambda each: OnDevice(each) if isinstance(each, Tensor) else each, result)
        return return_and_correct_aliasing(function, arguments, options, result) if here else result

    def _note(self, function: Any, name: str, arguments: tuple, elsewhere: list[Tensor]) -> None:
        if any(tensor.dim() > 0 for tensor in elsewhere):
            self.mixed[name, _line()] += 1
        if is_wait(name, arguments):
            self.waits[name, _line()] += 1
        aliases = [each.alias_info for each in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.launches[name] += 1

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, in place; shared parameters stay shared."""
        moved: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    new = nn.Parameter(OnDevice(value.detach()), requires_grad=value.requires_grad)
                    part._parameters[name] = moved.setdefault(id(value), new)
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = OnDevice(value)
        return module


def on_host(value: Any) -> Any:
    """The same with tensors on the CPU, as a test compares them."""
    return tree_map(_inner, value)


def _inner(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value == DEVICE else value


def _line() -> str:
    """The innermost line of the package that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(PACKAGE):
            return f"{frame.filename.removeprefix(PACKAGE)}:{frame.lineno}: {frame.line}"
    return "outside of the package"
