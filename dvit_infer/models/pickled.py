"""What stands in a pickle for tensors, arrays and objects: functions that check their arguments, and inert objects."""

import argparse
import math
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
_NUMBERS = re.compile(r"[<>|=]?([?bhilqBHILQefdgFDG]|[biufcSU]\d{1,4})")
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Refused(pickle.UnpicklingError):
    """A pickle that names something that could act; `name` is it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Inert:
    """A class that is not known, or an object of it: its name, without content."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_module = False  # whether it is an object with the content of an nn.Module


@dataclass(frozen=True)
class Known:
    """A function of this file in the place of the one that the pickle names."""

    name: str
    make: Callable[..., Any]


@dataclass(frozen=True)
class Storage:
    """The data of tensors, and their dtype, which most files keep with it."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype


@dataclass
class NumpyType:
    """A NumPy dtype of numbers or text; its byte order follows as its state."""

    dtype: "np.dtype[Any]"


def set_array(array: Any, version: Any, shape: Any, kind: Any, fortran: Any, data: Any) -> bool:
    """Give an array its shape, type and data; return False, leaving it empty, if its elements are objects."""
    if not isinstance(kind, NumpyType):
        return False
    raw = data.encode("latin1") if isinstance(data, str) else data
    _check(isinstance(raw, bytes) and _are_sizes(shape) and len(shape) <= 32)
    _check(math.prod(shape) * kind.dtype.itemsize == len(raw))
    array.__setstate__((1, shape, kind.dtype, bool(fortran), raw))
    return True


def _check(fits: bool) -> None:
    if not fits:
        raise pickle.UnpicklingError("a call with arguments that do not fit")


def _of(kind: type[T], value: Any) -> T:
    """Return the value if it is of that type."""
    if not isinstance(value, kind):
        raise pickle.UnpicklingError("a call with arguments that do not fit")
    return value


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= 64 and all(type(n) is int and 0 <= n < 2**60 for n in values)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_: Any, kind: torch.dtype | None = None
) -> torch.Tensor:
    """Return a view of a storage, after checking that all of it lies inside."""
    _check(isinstance(storage, Storage) and _are_sizes((offset,)) and _are_sizes(size) and _are_sizes(stride))
    _check(len(size) == len(stride))
    dtype = kind or storage.dtype
    if 0 in size:
        return torch.empty(size, dtype=dtype, device="cpu")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (last + 1) * dtype.itemsize > storage.untyped.nbytes():
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} is larger than its data")
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage.untyped, offset, size, stride)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, kind: Any, *_: Any) -> Any:
    _check(isinstance(kind, torch.dtype))
    return _tensor(storage, offset, size, stride, kind=kind)


def _parameter(data: Any, *_: Any) -> torch.Tensor:
    return _of(torch.Tensor, data)


def _tensor_from_numpy(array: Any, dtype: Any, *_: Any) -> torch.Tensor:
    _check(isinstance(array, np.ndarray) and isinstance(dtype, torch.dtype))
    return torch.tensor(array, dtype=dtype, device="cpu")


def _tensor_subclass(function: Any, kind: Any, args: Any, *_: Any) -> Any:
    """Return the tensor of a subclass, or of one with attributes, which are dropped."""
    _check(isinstance(function, Known | Inert) and isinstance(args, tuple))
    return function.make(*args) if isinstance(function, Known) else Inert(function.name)


def _numpy_type(code: Any, *_: Any) -> Any:
    if isinstance(code, str) and _NUMBERS.fullmatch(code):
        return NumpyType(np.dtype(code))
    return Inert("numpy.dtype")


def _numpy_scalar(kind: Any, data: Any = None, *_: Any) -> Any:
    if not isinstance(kind, NumpyType):
        return Inert("numpy.generic")
    raw = data.encode("latin1") if isinstance(data, str) else data
    _check(isinstance(raw, bytes) and len(raw) == kind.dtype.itemsize > 0)
    return np.frombuffer(raw, kind.dtype)[0]


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    _check(encoding in ("latin1", "latin-1"))
    return _of(str, text).encode("latin1")


def _list(items: Any = None, *_: Any) -> Any:
    return items if type(items) is list else []


def _dict(items: Any = None, *_: Any) -> Any:
    """Return a dict for any kind of dict; old files give its items as pairs."""
    if type(items) is dict:
        return items
    pairs: Iterable[Any] = items if type(items) is list else ()
    return {key: value for key, value in pairs if isinstance(key, str | int)}


def _attribute(owner: Any = None, name: Any = None, *_: Any) -> Inert:
    """Return an inert object for a nested class or a member of an enum, as some Pythons name them."""
    if not isinstance(owner, Inert) or not isinstance(name, str):
        raise Refused("builtins.getattr")
    return Inert(owner.name)


def _first(value: Any = (), *_: Any) -> Any:
    return value


KNOWN: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _bytes,
    "argparse.Namespace": lambda *_: argparse.Namespace(),
    "builtins.bytes": lambda *_: b"",  # as the older protocols write no bytes
    "builtins.frozenset": _list,
    "builtins.getattr": _attribute,
    "builtins.set": _list,
    "collections.Counter": _dict,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda *_: {},
    "collections.deque": _list,
    "numpy.dtype": _numpy_type,
    "torch.Size": _first,
    "torch._tensor._rebuild_from_type_v2": _tensor_subclass,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,
    "torch._utils._rebuild_device_tensor_from_numpy": _tensor_from_numpy,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.serialization._get_layout": _first,
}
for _numpy in ("numpy.core", "numpy._core"):
    KNOWN[f"{_numpy}.multiarray.scalar"] = _numpy_scalar
    KNOWN[f"{_numpy}.multiarray._reconstruct"] = lambda *_: np.empty(0, np.uint8)  # its state follows
