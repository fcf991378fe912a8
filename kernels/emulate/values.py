"""PTX types, and conversion between register bits and numbers."""

import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
UINT: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # register types, by size in bytes
_SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_FLOAT: dict[int, Any] = {2: np.float16, 4: np.float32, 8: np.float64}
_HALF = {"f2": "f16", "bf2": "bf16"}
SMALLEST_NORMAL = np.float32(2.0**-126)


@dataclass(frozen=True)
class Type:
    """A PTX type.

    Attributes:
        kind: "b" (bits), "u", "s", "f", "bf" or "pred"; "f2" and "bf2" are two halves in one register.
        size: size in bytes; 1 for a predicate.
    """

    kind: str
    size: int

    @property
    def is_float(self) -> bool:
        return self.kind in ("f", "bf", "f2", "bf2")

    @property
    def bits(self) -> Any:
        """The NumPy type of a register of that size."""
        return np.bool_ if self.kind == "pred" else UINT[self.size]

    @property
    def values(self) -> Any:
        """The NumPy type for arithmetic: bfloat16 and pairs use float32 and are rounded when stored."""
        if self.kind == "pred":
            return np.bool_
        if self.kind in ("bf", "f2", "bf2"):
            return np.float32
        return {"f": _FLOAT, "s": _SIGNED}.get(self.kind, UINT)[self.size]

    def wider(self) -> "Type":
        """The type of a `wide` product."""
        return Type(self.kind, 2 * self.size)


PRED, B32, S32, U32, U64, F32 = (
    Type("pred", 1),
    Type("b", 4),
    Type("s", 4),
    Type("u", 4),
    Type("u", 8),
    Type("f", 4),
)


@functools.cache
def type_named(name: str) -> Type | None:
    """Return the PTX type of that name, or None."""
    if name == "pred":
        return PRED
    if name in ("f16x2", "bf16x2"):
        return Type("bf2" if name[0] == "b" else "f2", 4)
    found = re.fullmatch(r"(bf|[busf])(8|16|32|64)", name)
    if found is None or (found[1] == "f" and found[2] == "8") or (found[1] == "bf" and found[2] != "16"):
        return None
    return Type(found[1], int(found[2]) // 8)


def to_values(bits: Array, kind: Type) -> Array:
    """Convert bits to numbers; pairs become (lanes, 2)."""
    if kind.kind in ("f2", "bf2"):
        return half_to_float(np.ascontiguousarray(bits).view(np.uint16), _HALF[kind.kind]).reshape(-1, 2)
    if kind.kind == "bf":
        return bf16_to_float(bits)
    return bits if bits.dtype == kind.values else bits.view(kind.values)


def to_bits(values: Array, kind: Type) -> Array:
    """Convert numbers to bits, rounded to the type."""
    if kind.kind in ("f2", "bf2"):
        return float_to_half(np.asarray(values, np.float32), _HALF[kind.kind]).view(np.uint32)[:, 0]
    if kind.kind == "bf":
        return float_to_bf16(values)
    values = np.asarray(values)
    if values.dtype != kind.values:
        values = values.astype(kind.values)
    return values if values.dtype == kind.bits else np.ascontiguousarray(values).view(kind.bits)


def bf16_to_float(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: Array) -> Array:
    """Round to nearest, ties to even; NaN becomes the canonical 0x7fff, as PTX specifies for cvt."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def half_to_float(bits: Array, kind: str) -> Array:
    """Convert 16 bits of `kind`, "f16" or "bf16", to float32."""
    return bf16_to_float(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def float_to_half(values: Array, kind: str) -> Array:
    """Round float32 to 16 bits of `kind`, "f16" or "bf16"."""
    return float_to_bf16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)


def flush(values: Array) -> Array:
    """Flush float32 subnormals to zeros of their sign, as `.ftz` does."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)
