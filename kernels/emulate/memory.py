"""Global memory with the arguments' tensors, and the shared memory of all blocks; every access is checked."""

from dataclasses import dataclass

import numpy as np

from emulate.errors import EmulationError
from emulate.races import Races
from emulate.values import Array

BASE = 1 << 40  # of global memory, so that no small number is a valid address
_BETWEEN = 4096  # bytes around every argument's memory
_POISON = 0xFF  # NaN in every floating-point type


@dataclass(frozen=True)
class _Region:
    names: list[str]
    start: int
    data: Array
    readable: Array
    writable: Array


class GlobalMemory:
    """The memory of the arguments.

    A byte may be loaded if it belongs to an element of some argument's view, and stored if to an output's. Any other
    access is an error, even where a GPU would find mapped memory.
    """

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._size = _BETWEEN
        self._data = self._readable = self._writable = np.zeros(0, np.uint8)

    def add(self, data: Array, names: list[str], readable: Array, writable: Array) -> int:
        """Place bytes with flags for permitted loads and stores; return the address of the first."""
        start = self._size
        self._regions.append(_Region(names, start, data, readable, writable))
        self._size = (start + len(data) + _BETWEEN + 255) // 256 * 256
        return BASE + start

    def seal(self) -> None:
        """Allocate the memory after everything is placed."""
        self._data = np.full(self._size, _POISON, np.uint8)
        self._readable, self._writable = np.zeros(self._size, np.bool_), np.zeros(self._size, np.bool_)
        for region in self._regions:
            span = slice(region.start, region.start + len(region.data))
            self._data[span], self._readable[span], self._writable[span] = region.data, region.readable, region.writable

    def bytes_at(self, address: int, count: int) -> Array:
        return self._data[address - BASE : address - BASE + count]

    def load(self, at: Array, size: int) -> Array:
        """Load (lanes, size) bytes from addresses (lanes,)."""
        return _rows(self._data, size)[self._checked(at, size, self._readable, "load")]

    def store(self, at: Array, values: Array) -> None:
        """Store (lanes, size) bytes."""
        size = values.shape[1]
        _rows(self._data, size)[self._checked(at, size, self._writable, "store")] = values

    def _checked(self, at: Array, size: int, allowed: Array, what: str) -> Array:
        """Check addresses and return the indices of their chunks of `size` bytes."""
        at = at - BASE
        if (wrong := at % size != 0).any():
            raise EmulationError(f"misaligned {what} of {size} bytes at {self._name(at[wrong][0])}")
        chunk = at // size
        inside = (at >= 0) & (at < self._size)
        wrong = ~inside
        wrong[inside] = ~_rows(allowed, size)[chunk[inside]].all(axis=1)
        if wrong.any():
            raise EmulationError(f"{what} of {size} bytes outside what may be at {self._name(at[wrong][0])}")
        return chunk

    def _name(self, at: int) -> str:
        """Return an address for messages, with the argument that it is in or next to."""
        near = min(self._regions, key=lambda r: max(r.start - at, at - r.start - len(r.data), 0), default=None)
        place = f", byte {at - near.start} of {len(near.data)} of {' and '.join(near.names)}" if near else ""
        return f"{at + BASE:#x}{place}"


class SharedMemory:
    """The shared memory of every block, initially NaN, with race detection."""

    def __init__(self, blocks: int, size: int, warps: int) -> None:
        self.size = size
        self._stride = (size + 127) // 128 * 128 + 128
        self._data = np.full(blocks * self._stride, _POISON, np.uint8)
        self.races = Races(blocks, self._stride, warps)

    def load(self, block: Array, at: Array, size: int, warp: Array) -> Array:
        """Load (lanes, size) bytes for lanes of blocks and warps (lanes,)."""
        chunk = self.chunks(block, at, size, "load")
        self.races.load(block, chunk, size, warp)
        return _rows(self._data, size)[chunk]

    def store(self, block: Array, at: Array, values: Array, warp: Array) -> None:
        """Store; if lanes of a warp write to one place, the last one wins; values of several warps must be equal.

        On a GPU the winner is undefined. Triton has several lanes store a value that all hold, and butterfly sums whose
        first step became a fused multiply-add may differ in the last bit.
        """
        size = values.shape[1]
        chunk = self.chunks(block, at, size, "store")
        self.races.store(block, chunk, size, warp)
        rows = _rows(self._data, size)
        rows[chunk] = values
        if (lost := (rows[chunk] != values).any(axis=1)).any():
            self.races.check_writer(chunk[lost], size, warp[lost])

    def peek(self, chunk: Array, size: int) -> Array:
        """Return (chunks, size) bytes without race detection."""
        return _rows(self._data, size)[chunk]

    def put(self, chunk: Array, values: Array) -> None:
        """Write the data of copies; if two write to one place, their data must agree."""
        rows = _rows(self._data, values.shape[1])
        rows[chunk] = values
        if (rows[chunk] != values).any():
            raise EmulationError("copies of different values to one address of shared memory")

    def chunks(self, block: Array, at: Array, size: int, what: str) -> Array:
        """Return the indices of chunks of `size` bytes in the memory of all blocks."""
        if (wrong := at % size != 0).any():
            raise EmulationError(f"misaligned {what} of {size} bytes at shared address {at[wrong][0]:#x}")
        if (wrong := (at < 0) | (at + size > self.size)).any():
            end = f"of {self.size} bytes of shared memory"
            raise EmulationError(f"{what} of {size} bytes outside, at shared address {at[wrong][0]:#x} {end}")
        return (block * self._stride + at) // size


def _rows(memory: Array, size: int) -> Array:
    return memory.reshape(-1, size)
