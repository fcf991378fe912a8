"""Operands of wgmma in shared memory: locate a matrix's elements from its 64-bit descriptor."""

from dataclasses import dataclass, replace

import numpy as np

from emulate.errors import EmulationError
from emulate.machine import Machine
from emulate.opcodes import WARPGROUP
from emulate.ptx import Operand
from emulate.tensors import swizzle
from emulate.values import U64, Array, half_to_float

INNER = 16  # the depth of a product
_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes per row of the pattern, by the descriptor's two highest bits


@dataclass(frozen=True)
class Matrix:
    """A matrix (rows, 16) in shared memory for each warpgroup: chunks (groups, chunks) of 8 elements."""

    chunk: Array
    rows: int
    transposed: bool

    def of(self, some: Array) -> "Matrix":
        return replace(self, chunk=self.chunk[some])

    def numbers(self, machine: Machine, kind: str) -> Array:
        """Return the current elements (groups, rows, 16), read as "bf16" or "f16"."""
        groups = len(self.chunk)
        numbers = half_to_float(machine.shared.peek(self.chunk.reshape(-1), 16).view(np.uint16), kind)
        if self.transposed:
            return numbers.reshape(groups, self.rows // 8, INNER, 8).swapaxes(2, 3).reshape(groups, -1, INNER)
        return numbers.reshape(groups, self.rows, INNER)


def described(machine: Machine, descriptor: Operand, rows: int, transposed: bool) -> Matrix:
    """Decode descriptors (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout").

    A chunk is eight adjacent elements of a row (transposed: of a column). A swizzled pattern has 8 rows of 32, 64 or
    128 bytes; without a swizzle it is 8 adjacent chunks.
    """
    given = machine.lanes_of(descriptor, U64).reshape(-1, WARPGROUP)
    if (given != given[:, :1]).any():
        raise EmulationError("lanes of a warpgroup have different descriptors")
    start, leading, stride = (
        ((given[:, 0] >> np.uint64(bit)) & np.uint64(0x3FFF)).astype(np.int64) * 16 for bit in (0, 16, 32)
    )
    modes = given[:, 0] >> np.uint64(62)
    if (modes != modes[0]).any() or ((given[:, 0] >> np.uint64(49)) & np.uint64(7)).any():
        raise EmulationError("descriptors of different kinds, or with an offset of their base, are not emulated")
    width = _SWIZZLE[int(modes[0])]
    leading, stride = leading[:, None, None], stride[:, None, None]
    if transposed:  # chunks of 8 rows at one depth
        row, inner = np.arange(rows // 8)[:, None], np.arange(INNER)
        if width:
            offset = row % (width // 16) * 16 + row // (width // 16) * leading + inner % 8 * width + inner // 8 * stride
        else:
            offset = row * stride + inner % 8 * 16 + inner // 8 * leading
    else:  # chunks of 8 depths in one row
        row, inner = np.arange(rows)[:, None], np.arange(INNER // 8)
        if width:
            offset = row % 8 * width + row // 8 * stride + inner * 16
        else:
            offset = row % 8 * 16 + row // 8 * stride + inner * leading
    at = swizzle(start[:, None, None] + offset, width).reshape(len(given), -1)
    block = np.repeat(machine.block[machine.lanes][::WARPGROUP], at.shape[1])
    return Matrix(machine.shared.chunks(block, at.reshape(-1), 16, "load").reshape(at.shape), rows, transposed)
