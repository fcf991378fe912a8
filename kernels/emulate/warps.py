"""Instructions of a whole warp: shuffles, matrices in shared memory, matrix products (mma)."""

from collections.abc import Callable

import numpy as np

from emulate.errors import EmulationError
from emulate.machine import WARP_LANES, Machine
from emulate.opcodes import WARP, executes
from emulate.ptx import Instruction, Operand
from emulate.values import B32, F32, PRED, U32, Array, half_to_float

_LANE = np.arange(WARP_LANES)
ROW, PAIR = _LANE // 4, 2 * (_LANE % 4)  # positions of a lane's two elements in an 8 x 8 matrix


@executes("shfl.sync", words="bfly up down idx", together=WARP)
def _shuffle(machine: Machine, instruction: Instruction) -> None:
    """Read another lane's value; beyond the clamp, the lane's own, and the predicate is false."""
    to, value, *given, _ = instruction.operands
    mode = instruction.modifiers[1]
    by, clamp = (machine.in_warps(machine.lanes_of(one, U32)).astype(np.int64) for one in given)
    segment, last = clamp >> 8 & 31, clamp & 31
    first = _LANE & segment
    end = first | last & ~segment
    source = {"bfly": _LANE ^ by, "up": _LANE - by, "down": _LANE + by, "idx": first | by & ~segment}[mode]
    inside = source >= end if mode == "up" else source <= end
    values = machine.in_warps(machine.lanes_of(value, B32))
    found = np.take_along_axis(values, np.where(inside, source, _LANE), axis=1)
    register, *predicate = machine.members(to)
    machine.write(register, found.reshape(-1), B32)
    for one in predicate:
        machine.write(one, inside.reshape(-1), PRED)


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


@executes("redux.sync", words=" ".join(_REDUCTIONS), together=WARP)
def _reduce(machine: Machine, instruction: Instruction) -> None:
    kind = instruction.types[-1]
    values = machine.in_warps(machine.lanes_of(instruction.operands[1], kind))
    result = _REDUCTIONS[instruction.modifiers[1]](values, axis=1).astype(kind.values)
    machine.write(instruction.operands[0], np.repeat(result, WARP_LANES), kind)


def _matrix_rows(machine: Machine, instruction: Instruction) -> tuple[Array, Array, Array, int]:
    """Return block, address and warp of the rows of a warp's 8 x 8 matrices, and their number, from its first lanes."""
    count = next(int(word[1]) for word in instruction.modifiers if word in ("x1", "x2", "x4"))
    address = instruction.operands[0 if instruction.opcode.startswith("st") else 1]
    at = machine.in_warps(machine.address(address, 4))[:, : 8 * count].reshape(-1)
    block, warp = (machine.in_warps(machine.of_lanes(one)) for one in (machine.block, machine.warp))
    return block[:, : 8 * count].reshape(-1), at, warp[:, : 8 * count].reshape(-1), count


@executes("ldmatrix.sync.aligned", words="m8n8 x1 x2 x4 trans shared", together=WARP)
def _load_matrices(machine: Machine, instruction: Instruction) -> None:
    """Load up to four 8 x 8 matrices of 16-bit elements, or their transposes, two elements of each per lane."""
    block, at, warp, count = _matrix_rows(machine, instruction)
    rows = machine.shared.load(block, at, 16, warp).view(np.uint16).reshape(-1, count, 8, 8)
    if "trans" in instruction.modifiers:
        rows = rows.swapaxes(2, 3)
    for i, member in enumerate(machine.members(instruction.operands[0])):
        pair = rows[:, i, ROW, PAIR].astype(np.uint32) | rows[:, i, ROW, PAIR + 1].astype(np.uint32) << np.uint32(16)
        machine.write(member, pair.reshape(-1), B32)


@executes("stmatrix.sync.aligned", words="m8n8 x1 x2 x4 trans shared", together=WARP)
def _store_matrices(machine: Machine, instruction: Instruction) -> None:
    block, at, warp, count = _matrix_rows(machine, instruction)
    matrices = np.empty((machine.active // WARP_LANES, count, 8, 8), np.uint16)
    for i, member in enumerate(machine.members(instruction.operands[1])):
        pair = machine.in_warps(machine.lanes_of(member, B32))
        matrices[:, i, ROW, PAIR], matrices[:, i, ROW, PAIR + 1] = pair & 0xFFFF, pair >> np.uint32(16)
    if "trans" in instruction.modifiers:
        matrices = matrices.swapaxes(2, 3)
    machine.shared.store(block, at, np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8), warp)


def halves_of(machine: Machine, registers: tuple[Operand, ...], kind: str) -> Array:
    """Return (warps, 32, registers, 2) float32: the two 16-bit numbers in each register of a lane."""
    bits = np.stack([machine.lanes_of(one, B32) for one in registers], axis=1)
    return half_to_float(bits.view(np.uint16), kind).reshape(-1, WARP_LANES, len(registers), 2)


@executes("mma.sync.aligned.m16n8k16.row.col", together=WARP)
def _multiply_matrices(machine: Machine, instruction: Instruction) -> None:
    """Multiply 16 x 16 by 16 x 8 in half precision and add to float32.

    Products and sums are exact in float64 and rounded once; the order and width of a GPU's additions differ. A lane
    holds two neighbours in a row of every 8 x 8 quarter: rows are lane // 4, columns 2 * (lane % 4) and the next.
    """
    if ".".join(instruction.modifiers[5:]) not in ("f32.bf16.bf16.f32", "f32.f16.f16.f32"):
        raise EmulationError("is emulated of halves into float32 only")
    kind = instruction.modifiers[-2]
    to, a_registers, b_registers, c_registers = (machine.members(one) for one in instruction.operands)
    # Axes: warp, row, pair of columns, right half or not, lower half or not, column of the pair.
    a = halves_of(machine, a_registers, kind).reshape(-1, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5)
    b = halves_of(machine, b_registers, kind).reshape(-1, 8, 4, 2, 2).transpose(0, 3, 2, 4, 1)
    c = np.stack([machine.lanes_of(one, F32) for one in c_registers], axis=1).reshape(-1, 8, 4, 2, 2)
    product = a.reshape(-1, 16, 16).astype(np.float64) @ b.reshape(-1, 16, 8).astype(np.float64)
    result = product + c.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)
    lanes = result.astype(np.float32).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
    for i, register in enumerate(to):
        machine.write(register, np.ascontiguousarray(lanes[:, i]), F32)
