"""Products of a warpgroup (wgmma): operands described in shared memory, results there when they are waited for."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emulate.errors import EmulationError
from emulate.machine import WARP_LANES, Machine
from emulate.opcodes import WARPGROUP, executes
from emulate.ptx import Group, Immediate, Instruction, Register
from emulate.tensors import swizzle
from emulate.values import PRED, U32, U64, Array, half_to_float
from emulate.warps import halves_of

ROWS, INNER = 64, 16  # of every product
_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes of a row of the pattern, by the descriptor's two highest bits


@dataclass(frozen=True)
class _Operand:
    """A matrix (rows, 16) in shared memory, one for each warpgroup: chunks (groups, chunks) of 8 elements."""

    chunk: Array
    rows: int
    transposed: bool


@dataclass(frozen=True)
class _Product:
    """Products of one instruction that have not been waited for, by warpgroup.

    Attributes:
        lanes: (groups, 128).
        number: (groups,), which of each warpgroup's groups of products it belongs to.
        results: names of the accumulators.
        a: an operand, or the numbers (groups, 64, 16) that its registers held, which are `sources`.
        added: (groups,), whether the accumulators are added.
        began: when it was issued.
        renamed: (accumulator, register, lanes): moves of accumulators that were not there yet. LLVM puts such moves in
            front of the wait, and ptxas makes one register of the two; the result goes to both.
        early: both operands as they were then, where they are not to be read at the wait.
    """

    lanes: Array
    number: Array
    results: tuple[str, ...]
    sources: tuple[str, ...]
    a: "_Operand | Array"
    b: _Operand
    kind: str
    added: Array
    began: int
    renamed: list[tuple[str, str, Array]]
    early: "tuple[Array, Array] | None" = None

    def of(self, some: Array) -> "_Product":
        def part(one: Any) -> Any:
            return replace(one, chunk=one.chunk[some]) if isinstance(one, _Operand) else one[some]

        early = self.early and (self.early[0][some], self.early[1][some])
        parts = {name: part(getattr(self, name)) for name in ("lanes", "number", "a", "b", "added")}
        return replace(self, **parts, early=early)


_SHAPES = " ".join(f"m64n{n}k16" for n in range(8, 257, 8))


@executes("wgmma.mma_async.sync.aligned", words=_SHAPES, together=WARPGROUP)
def _multiply(machine: Machine, instruction: Instruction) -> None:
    to, a, b, added, *immediates = instruction.operands
    shape, kind = instruction.modifiers[3], instruction.modifiers[-1]
    if instruction.modifiers[4:] not in (("f32", half, half) for half in ("bf16", "f16")):
        raise EmulationError("is emulated of halves into float32 only")
    in_registers = isinstance(a, Group)
    scale_a, scale_b, *transposed = (one.bits for one in immediates if isinstance(one, Immediate))
    if (scale_a, scale_b) != (1, 1) or len(transposed) != (1 if in_registers else 2):
        raise EmulationError("is emulated without changes of sign only")
    lanes = np.arange(machine.count)[machine.lanes].reshape(-1, WARPGROUP)
    results, sources = _names(machine, to), _names(machine, a) if in_registers else ()
    _check_fenced(machine, (*results, *sources))
    product = _Product(
        lanes,
        machine.product_groups[lanes[:, 0]],
        results,
        sources,
        _from_registers(machine, a, kind) if in_registers else _operand(machine, a, ROWS, bool(transposed[0])),
        _operand(machine, b, int(shape[4:-3]), bool(transposed[-1])),
        kind,
        machine.lanes_of(added, PRED).reshape(lanes.shape)[:, 0],
        machine.shared.races.now,
        [],
    )
    warps = machine.warp[lanes[:, ::WARP_LANES]]
    for operand in (product.a, product.b):
        if isinstance(operand, _Operand):
            block, each = (np.repeat(x, operand.chunk.shape[1], axis=0) for x in (machine.block[lanes[:, 0]], warps))
            machine.shared.races.begin_product(block, operand.chunk.reshape(-1), 16, each)
    if machine.early_copies:
        product = replace(product, early=(_numbers(machine, product.a, kind), _numbers(machine, product.b, kind)))
    machine.products.append(product)
    _mark_busy(machine)


def _names(machine: Machine, operand: object) -> tuple[str, ...]:
    return tuple(one.name for one in machine.members(operand) if isinstance(one, Register))  # type: ignore[arg-type]


def _check_fenced(machine: Machine, names: tuple[str, ...]) -> None:
    """Registers that other instructions have written need a fence before a product uses them."""
    fenced = machine.fenced[machine.lanes]
    for name in names:
        if (machine.written[name][machine.lanes] > fenced).any():
            raise EmulationError(f"no wgmma.fence since {name} was written")


def _from_registers(machine: Machine, operand: Group, kind: str) -> Array:
    """(groups, 64, 16): a warp holds 16 rows, as for mma."""
    halves = halves_of(machine, operand.members, kind).reshape(-1, 4, 8, 4, 2, 2, 2)
    return halves.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, ROWS, INNER)


def _operand(machine: Machine, descriptor: object, rows: int, transposed: bool) -> _Operand:
    """PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout".

    Eight neighbours of a row (or, transposed, of a column) follow each other: a chunk. A swizzled pattern has 8 rows of
    32, 64 or 128 bytes; without a swizzle it is 8 chunks one after another.
    """
    given = machine.lanes_of(descriptor, U64).reshape(-1, WARPGROUP)  # type: ignore[arg-type]
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
    if transposed:  # chunks of 8 rows, each of one inner place
        row, inner = np.arange(rows // 8)[:, None], np.arange(INNER)
        if width:
            offset = row % (width // 16) * 16 + row // (width // 16) * leading + inner % 8 * width + inner // 8 * stride
        else:
            offset = row * stride + inner % 8 * 16 + inner // 8 * leading
    else:  # chunks of 8 inner places, each of one row
        row, inner = np.arange(rows)[:, None], np.arange(INNER // 8)
        if width:
            offset = row % 8 * width + row // 8 * stride + inner * 16
        else:
            offset = row % 8 * 16 + row // 8 * stride + inner * leading
    at = swizzle(start[:, None, None] + offset, width).reshape(len(given), -1)
    block = np.repeat(machine.block[machine.lanes][::WARPGROUP], at.shape[1])
    return _Operand(machine.shared.chunks(block, at.reshape(-1), 16, "load").reshape(at.shape), rows, transposed)


def _numbers(machine: Machine, operand: "_Operand | Array", kind: str) -> Array:
    """(groups, rows, 16)."""
    if not isinstance(operand, _Operand):
        return operand
    groups = len(operand.chunk)
    numbers = half_to_float(machine.shared.peek(operand.chunk.reshape(-1), 16).view(np.uint16), kind)
    if operand.transposed:
        return numbers.reshape(groups, operand.rows // 8, INNER, 8).swapaxes(2, 3).reshape(groups, -1, INNER)
    return numbers.reshape(groups, operand.rows, INNER)


@executes("wgmma.fence.sync.aligned", together=WARPGROUP)
def _fence(machine: Machine, instruction: Instruction) -> None:
    machine.fenced[machine.lanes] = machine.shared.races.now


@executes("wgmma.commit_group.sync.aligned", together=WARPGROUP)
def _commit(machine: Machine, instruction: Instruction) -> None:
    machine.product_groups[machine.lanes] += 1


@executes("wgmma.wait_group.sync.aligned", together=WARPGROUP)
def _wait(machine: Machine, instruction: Instruction) -> None:
    """Finish what the warpgroups have committed but for the last so many groups."""
    left = int(machine.read(instruction.operands[0], U32))
    waits = np.zeros(machine.count, np.bool_)
    waits[machine.lanes] = True
    rest = []
    for product in machine.products:
        first = product.lanes[:, 0]
        done = waits[first] & (product.number < machine.product_groups[first] - left)
        if done.any():
            _finish(machine, product.of(done))
        if not done.all():
            rest.append(product.of(~done))
    machine.products[:] = rest
    _mark_busy(machine)


def _finish(machine: Machine, product: _Product) -> None:
    """Products and sums are exact in float64 and rounded once, as those of mma."""
    for operand in (product.a, product.b):
        if isinstance(operand, _Operand):
            machine.shared.races.end_product(operand.chunk.reshape(-1), 16, product.began)
    a, b = product.early or (_numbers(machine, product.a, product.kind), _numbers(machine, product.b, product.kind))
    result = a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2)
    # A warp has 16 rows: a lane, in every 8 columns, two neighbours in a row and the two 8 rows below.
    lanes = result.reshape(-1, 4, 2, 8, b.shape[1] // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6)
    lanes = lanes.reshape(*product.lanes.shape, -1)
    values = {}
    for i, name in enumerate(product.results):
        register = machine.register(name)
        before = np.where(product.added[:, None], register[product.lanes].view(np.float32), np.float32(0))
        values[name] = register[product.lanes] = (lanes[:, :, i] + before).astype(np.float32).view(np.uint32)
    for name, other, moved in product.renamed:
        here = moved[product.lanes]
        machine.register(other)[product.lanes[here]] = values[name][here]


def rename(machine: Machine, name: str, other: str) -> bool:
    """Move an accumulator that is not there yet, if it is one: the last product that has it will write both."""
    moved = np.zeros(machine.count, np.bool_)
    moved[machine.lanes] = True
    if not (name in machine.unreadable and machine.unreadable[name][moved].all()):
        return False
    for product in reversed(machine.products):
        here = moved & np.isin(np.arange(machine.count), product.lanes)
        if name in product.results and here.any():
            product.renamed.append((name, other, here))
            moved &= ~here
    if moved.any():
        raise EmulationError(f"{name} is moved twice while a product has it")
    _mark_busy(machine)
    return True


def _mark_busy(machine: Machine) -> None:
    """Accumulators on their way may be neither read nor written, registers of an operand not be written."""
    machine.unreadable.clear()
    machine.unwritable.clear()
    for product in machine.products:
        for name in product.results:
            machine.unreadable.setdefault(name, np.zeros(machine.count, np.bool_))[product.lanes] = True
        for _, name, moved in product.renamed:
            for busy in (machine.unreadable, machine.unwritable):
                busy.setdefault(name, np.zeros(machine.count, np.bool_))[product.lanes] |= moved[product.lanes]
        for name in (*product.results, *product.sources):
            machine.unwritable.setdefault(name, np.zeros(machine.count, np.bool_))[product.lanes] = True
