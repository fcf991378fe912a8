"""All lanes of a grid: their registers, positions and memory."""

from typing import Any

import numpy as np

from emulate.errors import EmulationError
from emulate.memory import GlobalMemory, SharedMemory
from emulate.ptx import DISCARD, Address, Group, Immediate, Operand, Program, Register, Symbol
from emulate.values import Array, Type, to_bits, to_values

WARP_LANES = 32
PARAMETERS = 1 << 56  # address of the first parameter; the others follow. Only tensor maps are addressed
_SHARED = "global_smem"


class Machine:
    """Lanes, ordered by block and thread, with their registers.

    Attributes:
        lanes: the lanes that execute the current instruction, as an index into arrays of all lanes.
        block, thread, warp: indices for every lane, the last two within its block.
        early_copies: whether asynchronous copies land when issued instead of when waited for.
        stalled: a mask of all lanes, set by an instruction that some of `lanes` must repeat.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, ...],
        threads: int,
        memory: GlobalMemory,
        shared_bytes: int,
        parameters: dict[str, Any],
        early_copies: bool = False,
    ) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        self.program, self.threads, self.blocks = program, threads, x * y * z
        self.count = self.blocks * threads
        self.memory, self.shared = memory, SharedMemory(self.blocks, shared_bytes, threads // WARP_LANES)
        self.parameters, self.early_copies = parameters, early_copies
        self.block = np.repeat(np.arange(self.blocks), threads)
        self.thread = np.tile(np.arange(threads), self.blocks)
        self.warp = self.thread // WARP_LANES
        self.lanes: Any = slice(None)
        self.stalled: Array | None = None
        # State of copies.py, barriers.py, tensors.py and wgmma.py.
        self.copies: list[Any] = []
        self.copy_groups = np.zeros(self.count, np.int64)
        self.barriers: dict[tuple[int, int], Any] = {}
        self.stores: list[Any] = []
        self.store_groups = np.zeros(self.count, np.int64)
        self.tried = np.zeros(self.count, np.bool_)
        self.products: list[Any] = []
        self.product_groups = np.zeros(self.count, np.int64)
        self.fenced = np.zeros(self.count, np.int64)
        self.written = {name: np.zeros(self.count, np.int64) for name in _of_products(program)}  # when
        self.unreadable: dict[str, Array] = {}
        self.unwritable: dict[str, Array] = {}
        one = np.ones(self.count, np.uint32)
        self._special = {
            "%tid.x": self.thread.astype(np.uint32),
            "%tid.y": 0 * one,
            "%tid.z": 0 * one,
            "%ntid.x": threads * one,
            "%laneid": (self.thread % WARP_LANES).astype(np.uint32),
            "%ctaid.x": (self.block % x).astype(np.uint32),
            "%ctaid.y": (self.block // x % y).astype(np.uint32),
            "%ctaid.z": (self.block // (x * y)).astype(np.uint32),
            "%nctaid.x": x * one,
            "%nctaid.y": y * one,
            "%nctaid.z": z * one,
        }
        self._registers: dict[str, Array] = {}

    @property
    def active(self) -> int:
        """The number of lanes that execute the current instruction."""
        return self.count if isinstance(self.lanes, slice) else len(self.lanes)

    def of_lanes(self, values: Array) -> Array:
        """Return the elements of the active lanes from an array of all lanes."""
        found: Array = values[self.lanes]
        return found

    def read(self, operand: Operand, kind: Type) -> Array:
        """Return numbers (lanes,), or one for all lanes."""
        match operand:
            case Immediate(bits):
                one = np.bool_(bits != 0) if kind.kind == "pred" else kind.bits(bits & ((1 << 8 * kind.size) - 1))
                return to_values(np.asarray(one), kind)
            case Symbol(name):
                return np.asarray(self._symbol(name), kind.bits)
            case Register(name):
                held = self._special.get(name)
                self._refuse(self.unreadable, name, "read")
                bits = (self.register(name) if held is None else held)[self.lanes]
                return to_values(bits if bits.dtype.itemsize == kind.size else bits.astype(kind.bits), kind)
        raise EmulationError(f"{operand} cannot be read")

    def lanes_of(self, operand: Operand, kind: Type) -> Array:
        """Return numbers (lanes,)."""
        values = self.read(operand, kind)
        return values if values.ndim else np.full(self.active, values)

    def write(self, operand: Operand, values: Array, kind: Type, moved: bool = False) -> None:
        """Round numbers (lanes,), or one for all lanes, to the type and store them in a register.

        `moved` means that they come from another register: a product may then use them without another fence. LLVM
        puts such moves after the fence, and ptxas then adds a fence (its note C7519).
        """
        if operand == DISCARD:
            return
        if not isinstance(operand, Register):
            raise EmulationError(f"{operand} cannot be written")
        register, held = self.register(operand.name), self.program.registers[operand.name]
        self._refuse(self.unwritable, operand.name, "written")
        if operand.name in self.written and not moved:
            self.written[operand.name][self.lanes] = self.shared.races.now
        bits = to_bits(values, kind)
        if held.size < kind.size or (held.kind == "pred") != (kind.kind == "pred"):
            raise EmulationError(f"{operand.name} does not hold {kind.size} bytes")
        if held.size > kind.size:  # sign-extend a signed number
            bits = (bits.view(kind.values) if kind.kind == "s" else bits).astype(held.bits)
        register[self.lanes] = bits

    def _refuse(self, busy: dict[str, Array], name: str, what: str) -> None:
        """Raise if a product in flight uses the register."""
        if name in busy and busy[name][self.lanes].any():
            raise EmulationError(f"{name} is {what} while a product has it")

    def register(self, name: str) -> Array:
        """Return a register of all lanes; NaN before it is written, no error: unused values may be shuffled."""
        register = self._registers.get(name)
        if register is None:
            held = self.program.registers.get(name)
            if held is None:
                raise EmulationError(f"{name} is unknown")
            poison = False if held.kind == "pred" else np.iinfo(held.bits).max
            register = self._registers[name] = np.full(self.count, poison, held.bits)
        return register

    def members(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.members if isinstance(operand, Group) else (operand,)

    def address(self, operand: Operand, bytes_wide: int) -> Array:
        """Return addresses (lanes,) in int64; `bytes_wide` is 8 for global memory, 4 for shared."""
        if not isinstance(operand, Address):
            raise EmulationError(f"{operand} is no address")
        base = self.lanes_of(operand.base, Type("u", bytes_wide)).astype(np.int64)
        return base + operand.offset

    def _symbol(self, name: str) -> int:
        if name == _SHARED:
            return 0
        names = list(self.parameters)
        if name not in names:
            raise EmulationError(f"{name} is unknown")
        return PARAMETERS + names.index(name)

    def parameter_at(self, address: int) -> Any:
        """Return the parameter at an address."""
        index = address - PARAMETERS
        if not 0 <= index < len(self.parameters):
            raise EmulationError(f"{address:#x} is no parameter's address")
        return list(self.parameters.values())[index]

    def guard(self, name: str, negated: bool) -> Array:
        """Return the mask of lanes that pass a guard."""
        return self.read(Register(name), Type("pred", 1)) ^ negated

    def in_warps(self, values: Array) -> Array:
        """Reshape (lanes,) to (warps, 32)."""
        return values.reshape(-1, WARP_LANES)


def _of_products(program: Program) -> set[str]:
    """Return the registers used by products of a warpgroup."""
    products = (one for one in program.code if one.opcode.startswith("wgmma.mma_async"))
    groups = (operand for one in products for operand in one.operands[:2] if isinstance(operand, Group))
    return {member.name for group in groups for member in group.members if isinstance(member, Register)}
