"""Other people's weight files, read without running any code that they hold."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Order = Literal["C", "F"]
"""Of an array's numbers; NumPy refuses what else a pickle may say."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors, by name, of a file of torch.save or of a pickle of NumPy arrays (.pkl).

    They may be below ``state_dict`` (mmdetection) or ``model`` (detectron2).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not readable, or holds something else; says how to make a file that is.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                content = _ArrayUnpickler(file, encoding="latin1").load()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: not readable without running code in it ({reason}). Where you trust it, read it "
            "yourself and write the weights alone: torch.save({name: torch.as_tensor(value) for name, value "
            "in state_dict.items()}, 'weights.pth')"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__}, not a state dict")
    weights = {name: x.tensor if isinstance(x, _Array) else x for name, x in content.items()}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
    return weights


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


def _to_bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


_STAND_INS = {
    "collections.OrderedDict": OrderedDict,
    "numpy.dtype": _NumberType,
    "numpy.ndarray": _Array,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.numeric._frombuffer": _Array.from_buffer,  # protocol 5
    "_codecs.encode": _to_bytes,  # protocol 2
}
