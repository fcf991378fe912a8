"""Products of a warpgroup (wgmma): operands in shared memory by descriptor, results available after the wait."""

from dataclasses import dataclass, replace

import numpy as np

from emulate.descriptors import INNER, Matrix, described
from emulate.errors import EmulationError
from emulate.machine import WARP_LANES, Machine
from emulate.opcodes import WARPGROUP, executes
from emulate.ptx import Group, Immediate, Instruction, Operand, Register
from emulate.values import PRED, U32, Array
from emulate.warps import halves_of

ROWS = 64  # for every product


@dataclass(frozen=True)
class _Product:
    """Products of one instruction in flight, by warpgroup.

    Attributes:
        lanes: (groups, 128).
        number: (groups,), index of the commit group of each warpgroup.
        results: the names of the accumulators.
        a: an operand, or the numbers (groups, 64, 16) that its registers, `sources`, held.
        added: (groups,), whether the product is added to the accumulators.
        began: the time of issue.
        renamed: (accumulator, register, lanes): moves of accumulators that were not available yet. LLVM puts such moves
            before the wait, and ptxas merges the two registers; the result goes to both.
        early: both operands at issue, if they are not to be read at the wait.
    """

    lanes: Array
    number: Array
    results: tuple[str, ...]
    sources: tuple[str, ...]
    a: Matrix | Array
    b: Matrix
    kind: str
    added: Array
    began: int
    renamed: list[tuple[str, str, Array]]
    early: tuple[Array, Array] | None = None

    def of(self, some: Array) -> "_Product":
        a = self.a.of(some) if isinstance(self.a, Matrix) else self.a[some]
        early = self.early and (self.early[0][some], self.early[1][some])
        lanes, number, added = self.lanes[some], self.number[some], self.added[some]
        return replace(self, lanes=lanes, number=number, a=a, b=self.b.of(some), added=added, early=early)

    def matrices(self) -> list[Matrix]:
        """The operands in shared memory."""
        return [one for one in (self.a, self.b) if isinstance(one, Matrix)]

    def operands(self, machine: Machine) -> tuple[Array, Array]:
        """Return the current operands, (groups, 64, 16) and (groups, columns, 16)."""
        a = self.a.numbers(machine, self.kind) if isinstance(self.a, Matrix) else self.a
        return a, self.b.numbers(machine, self.kind)


_SHAPES = " ".join(f"m64n{n}k16" for n in range(8, 257, 8))


@executes("wgmma.mma_async.sync.aligned", words=_SHAPES, together=WARPGROUP)
def _multiply(machine: Machine, instruction: Instruction) -> None:
    to, a, b, added, *immediates = instruction.operands
    shape, kind = instruction.modifiers[3], instruction.modifiers[-1]
    if ".".join(instruction.modifiers[4:]) not in ("f32.bf16.bf16", "f32.f16.f16"):
        raise EmulationError("is emulated of halves into float32 only")
    scale_a, scale_b, *transposed = (one.bits for one in immediates if isinstance(one, Immediate))
    if (scale_a, scale_b) != (1, 1) or len(transposed) != (1 if isinstance(a, Group) else 2):
        raise EmulationError("is emulated without changes of sign only")
    lanes = np.arange(machine.count)[machine.lanes].reshape(-1, WARPGROUP)
    results, sources = _names(machine, to), _names(machine, a) if isinstance(a, Group) else ()
    _check_fenced(machine, (*results, *sources))
    product = _Product(
        lanes,
        machine.product_groups[lanes[:, 0]],
        results,
        sources,
        _from_registers(machine, a, kind) if isinstance(a, Group) else described(machine, a, ROWS, bool(transposed[0])),
        described(machine, b, int(shape[4:-3]), bool(transposed[-1])),
        kind,
        machine.lanes_of(added, PRED).reshape(lanes.shape)[:, 0],
        machine.shared.races.now,
        [],
    )
    warps = machine.warp[lanes[:, ::WARP_LANES]]
    for matrix in product.matrices():
        block, each = (np.repeat(x, matrix.chunk.shape[1], axis=0) for x in (machine.block[lanes[:, 0]], warps))
        machine.shared.races.begin_read(block, matrix.chunk.reshape(-1), 16, each)
    if machine.early_copies:
        product = replace(product, early=product.operands(machine))
    machine.products.append(product)
    _mark_busy(machine)


def _names(machine: Machine, operand: Operand) -> tuple[str, ...]:
    return tuple(one.name for one in machine.members(operand) if isinstance(one, Register))


def _check_fenced(machine: Machine, names: tuple[str, ...]) -> None:
    """Raise if a product uses registers that other instructions have written without a fence since."""
    fenced = machine.fenced[machine.lanes]
    for name in names:
        if (machine.written[name][machine.lanes] > fenced).any():
            raise EmulationError(f"no wgmma.fence since {name} was written")


def _from_registers(machine: Machine, operand: Group, kind: str) -> Array:
    """Return (groups, 64, 16) from registers: a warp holds 16 rows, as for mma."""
    halves = halves_of(machine, operand.members, kind).reshape(-1, 4, 8, 4, 2, 2, 2)
    return halves.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, ROWS, INNER)


@executes("wgmma.fence.sync.aligned", together=WARPGROUP)
def _fence(machine: Machine, instruction: Instruction) -> None:
    machine.fenced[machine.lanes] = machine.shared.races.now


@executes("wgmma.commit_group.sync.aligned", together=WARPGROUP)
def _commit(machine: Machine, instruction: Instruction) -> None:
    machine.product_groups[machine.lanes] += 1


@executes("wgmma.wait_group.sync.aligned", together=WARPGROUP)
def _wait(machine: Machine, instruction: Instruction) -> None:
    """Finish the warpgroups' committed products except the last N groups."""
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
    """Compute products and sums exactly in float64 and round once, as for mma."""
    for matrix in product.matrices():
        machine.shared.races.end_read(matrix.chunk.reshape(-1), 16, product.began)
    a, b = product.early or product.operands(machine)
    result = a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2)
    # A warp has 16 rows. In every 8 columns, a lane holds two neighbours in a row and the two 8 rows below.
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
    """Move a register that is an accumulator in flight, if it is one: its last product will write both."""
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
    """Forbid reads and writes of accumulators in flight, and writes of operand registers."""
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
