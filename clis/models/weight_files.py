"""Other people's weight files, read without running any code that they hold."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Order = Literal["C", "F"]
"""Of an array's numbers; NumPy refuses what else a pickle may say."""

_CONTAINERS = ("state_dict", "model_state_dict", "model", "model_state")
"""Keys that training scripts keep the weights below, beside optimizer, arguments and the like."""
SHOWN = 4
"""Names of a file that a message shows."""

_REMEDY = (
    "Where you trust it, read it yourself and write the weights alone: torch.save({name: "
    "torch.as_tensor(value) for name, value in state_dict.items()}, 'weights.pth')"
)
_REFUSED = r"(?:unsupported GLOBAL|it asks for|reduce for unrecognized function|an array of) (\S+)"
"""How the readers say that a file asks for more than data."""
_KINDS = (
    (rb"\s*(<!doctype|<html|<\?xml)", "a web page, not weights; fetch the file itself"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the weights; fetch them by `git lfs pull`"),
    (rb"\x89HDF", "an HDF5 file, not weights of PyTorch; save a state dict by torch.save"),
    (rb".{8}\{\"", "a safetensors file; save its tensors by torch.save(safetensors.torch.load_file(...))"),
    (rb"\xff\xd8\xff|\x89PNG", "an image, not weights"),
    (rb"\s*[\[{]", "a text (JSON?), not weights"),
)
"""What files that are no weights begin with, and what to do."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors, by name, of a file of torch.save or of a pickle of NumPy arrays (.pkl).

    They may be below ``state_dict`` (mmdetection, MoCo), ``model`` (torchvision's references, detectron2),
    ``model_state_dict`` or the one other key that holds tensors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not readable, or holds something else; says how to make a file that is.
    """
    weights = state_dict_in(read_content(path), str(path))
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is a {_kind(value)}, not a tensor")
    return weights


def read_content(path: Path) -> Any:
    """Read what torch.save or pickle (.pkl) has written, onto the CPU.

    Objects other than tensors, plain values and NumPy's numbers, which training scripts keep beside the
    weights, become `Unread`. Their classes are never imported, and none of their code is run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not readable; the message has what it looks like and no advice of other libraries.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; fetch or write it again")
    try:
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                return _ArrayUnpickler(file, encoding="latin1").load()
        return _torch_load(path)
    except Exception as error:
        with open(path, "rb") as file:
            start = file.read(64)
        for pattern, what in _KINDS:
            if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
                raise ValueError(f"{path}: {what}") from None
        refused = re.search(_REFUSED, str(error))
        if refused:
            what = f"not readable without running code in it ({refused[1]}). {_REMEDY}"
        else:
            what = f"damaged, or not a state dict of torch.save ({_reason(error)}); fetch or write it again"
        raise ValueError(f"{path}: {what}") from None


def state_dict_in(content: Any, source: str) -> dict[str, Any]:
    """Find the mapping of names to tensors in what a file holds.

    Raises:
        ValueError: there is none, or more than one; says what there is.
    """
    for _ in range(3):
        if isinstance(content, Unread):
            raise ValueError(
                f"{source}: a whole object ({content}), not a state dict; save its weights alone: "
                "torch.save(model.state_dict(), 'weights.pth')"
            )
        if not isinstance(content, dict):
            raise ValueError(f"{source}: a {_kind(content)}, not a state dict")
        below = {key: value for key, value in content.items() if isinstance(value, dict)}
        known = [key for key in _CONTAINERS if key in below]
        holding = known or [key for key, value in below.items() if _has_tensors(value)]
        if not known and (_has_tensors(content) or len(holding) != 1):
            break
        content = below[holding[0]]
    if not _has_tensors(content):
        what = (
            f"tensors below each of {first_names(holding)}"
            if holding
            else f"no tensor in {first_names(content)}"
        )
        raise ValueError(
            f"{source}: not a state dict: {what}; save one by torch.save(model.state_dict(), FILE)"
        )
    return {str(name): x.tensor if isinstance(x, _Array) else x for name, x in content.items()}


def prefixes_of(weights: Iterable[str], name: str) -> list[str]:
    """List what comes before a parameter's name in a file, e.g. ``module.`` for DDP; ``""`` is nothing."""
    ends = (each.removesuffix(name) for each in weights if each.endswith(name))
    return sorted({prefix for prefix in ends if not prefix or prefix.endswith(".")})


def first_names(names: Iterable[Any]) -> str:
    """List the first names of a file for a message."""
    every = list(map(str, names))
    return ", ".join(every[:SHOWN]) + ", ..." * (len(every) > SHOWN) if every else "nothing"


class Unread:
    """An object of a class that is not known here; what it holds is passed over."""

    origin = ""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __new__(cls, *_: object, **__: object) -> Unread:
        """Make it of any arguments, as unpickling has them."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)

    def __str__(self) -> str:
        return self.origin


def _torch_load(path: Path) -> Any:
    """Load by torch's own restricted reader, with stand-ins for the classes that it does not know."""
    names = set(_STAND_INS) | {"argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath"}
    names |= {name.replace("numpy.core.", "numpy._core.") for name in _STAND_INS}
    with contextlib.suppress(Exception):  # only of the archives that torch >= 1.6 writes
        names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    stand_ins: list[Any] = []
    for name in sorted(names):
        known = _STAND_INS.get(name.replace("numpy._core.", "numpy.core."))
        if known is None:
            stand_ins.append((type("Unread", (Unread,), {"origin": name}), name))
        elif isinstance(known, type) and known is not OrderedDict:
            stand_ins.append((known, name))
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """Return what a reader has found, without its advice and without codes for a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"WeightsUnpickler error: (.+)", text)
    first = found[1] if found else (text.splitlines() or [""])[0]
    return first.rstrip(".") if first and "weights_only" not in first else type(error).__name__


def _has_tensors(values: Mapping[str, Any]) -> bool:
    return any(isinstance(x, Tensor | _Array) and not isinstance(x, _Number) for x in values.values())


def _kind(value: Any) -> str:
    return str(value) if isinstance(value, Unread) else type(value).__name__


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain Python values, and arrays of numbers into `_Array`; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # NumPy 2's name
        if wanted not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STAND_INS[wanted]


class _NumberType:
    """In the place of numpy.dtype, which trusts what a pickle says of memory."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = state[1] + self.code  # the byte order

    def array(self, data: bytes | str, shape: tuple[int, ...], order: Order) -> np.ndarray:
        if not re.fullmatch(r"[<>|=]?[fiub]\d", self.code):
            raise pickle.UnpicklingError(f"an array of {self.code}")
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2's bytes
        return np.frombuffer(data, self.code).reshape(shape, order=order)


class _Array:
    """In the place of numpy.ndarray and the function that makes an empty one."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, number_type, column_major, data = state
        self._take(number_type.array(data, shape, "F" if column_major else "C"))

    @classmethod
    def from_buffer(
        cls, data: bytes, number_type: _NumberType, shape: tuple[int, ...], order: Order
    ) -> _Array:
        array = cls()
        array._take(number_type.array(data, shape, order))
        return array

    def _take(self, array: np.ndarray) -> None:
        self.tensor = torch.tensor(array.astype(array.dtype.newbyteorder("="), order="C"))


class _Number(_Array):
    """In the place of the function that makes a NumPy number."""

    def __init__(self, number_type: _NumberType, data: bytes | str) -> None:
        self._take(number_type.array(data, (), "C"))


def _to_bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


_STAND_INS = {
    "collections.OrderedDict": OrderedDict,
    "numpy.dtype": _NumberType,
    "numpy.ndarray": _Array,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _Number,
    "numpy.core.numeric._frombuffer": _Array.from_buffer,  # protocol 5
    "_codecs.encode": _to_bytes,  # protocol 2
}
