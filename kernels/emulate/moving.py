"""Instructions that move values between registers, between types, and to and from memory."""

import numpy as np

from emulate.errors import EmulationError
from emulate.machine import Machine
from emulate.opcodes import BLOCK, WARP, executes
from emulate.ptx import Group, Instruction, Operand, Register, Symbol
from emulate.values import B32, F32, PRED, U64, Type, float_to_half, flush
from emulate.wgmma import rename


@executes("mov")
def _move(machine: Machine, instruction: Instruction) -> None:
    """Move; also between one register and several that share its bits, the lowest first."""
    to, source = instruction.operands
    kind = instruction.types[-1]
    if isinstance(to, Group):
        part = Type("b", kind.size // len(to.members))
        bits = machine.read(source, kind)
        for i, member in enumerate(to.members):
            machine.write(member, (bits >> kind.bits(8 * part.size * i)).astype(part.bits), part)
    elif isinstance(source, Group):
        part = Type("b", kind.size // len(source.members))
        bits = np.zeros(machine.active, kind.bits)
        for i, member in enumerate(source.members):
            bits |= machine.read(member, part).astype(kind.bits) << kind.bits(8 * part.size * i)
        machine.write(to, bits, kind)
    elif not (machine.products and _rename(machine, to, source)):
        machine.write(to, machine.read(source, kind), kind, moved=True)


def _rename(machine: Machine, to: Operand, source: Operand) -> bool:
    return isinstance(to, Register) and isinstance(source, Register) and rename(machine, source.name, to.name)


@executes("cvta.param", "cvta.global")
def _generic(machine: Machine, instruction: Instruction) -> None:
    """Convert an address between spaces: here it is the same in all."""
    machine.write(instruction.operands[0], machine.read(instruction.operands[1], U64), U64)


@executes("selp")
def _select(machine: Machine, instruction: Instruction) -> None:
    to, a, b, which = instruction.operands
    kind = Type("b", instruction.types[-1].size)
    machine.write(to, np.where(machine.read(which, PRED), machine.read(a, kind), machine.read(b, kind)), kind)


@executes("prmt")
def _permute_bytes(machine: Machine, instruction: Instruction) -> None:
    """Select four of eight bytes, each by four bits; the highest of those replicates the byte's sign instead."""
    low, high, choice = (machine.lanes_of(one, B32).astype(np.uint64) for one in instruction.operands[1:])
    both = low | high << np.uint64(32)
    result = np.zeros(machine.active, np.uint64)
    for i in range(4):
        which = choice >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (which & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        result |= np.where(which >= 8, sign, byte) << np.uint64(8 * i)
    machine.write(instruction.operands[0], result.astype(np.uint32), B32)


_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@executes("cvt", words="rn ftz rzi rni rmi rpi")
def _convert(machine: Machine, instruction: Instruction) -> None:
    """Convert between types; two float32 become a pair of halves, the second source in the lower half."""
    to, *sources = instruction.operands
    pair = next((word[:-2] for word in instruction.modifiers if word.endswith("x2")), None)
    if pair is not None:
        if instruction.types[1:] != (F32,) or "rn" not in instruction.modifiers:
            raise EmulationError("is emulated from float32, to nearest, only")
        high, low = (float_to_half(machine.lanes_of(one, F32), pair).astype(np.uint32) for one in sources)
        return machine.write(to, low | high << np.uint32(16), B32)
    into, given = instruction.types
    value = machine.read(sources[0], given)
    if "ftz" in instruction.modifiers:
        value = flush(value)
    rounding = next((word for word in instruction.modifiers if word in _TO_INTEGER), None)
    if rounding is not None and given.is_float and not into.is_float:
        ends = np.iinfo(into.values)  # saturate; 0 for NaN
        exact = np.nan_to_num(_TO_INTEGER[rounding](value.astype(np.float64)), nan=0.0)
        value = np.where(exact >= ends.max, ends.max, np.where(exact <= ends.min, ends.min, exact).astype(into.values))
    elif rounding is not None or (given.is_float and not into.is_float):
        raise EmulationError("is not emulated")
    machine.write(to, value.astype(into.values), into)


@executes("ld.param")
def _load_parameter(machine: Machine, instruction: Instruction) -> None:
    to, source = instruction.operands
    kind = instruction.types[-1]
    base = getattr(source, "base", None)
    value = machine.parameters.get(base.name) if isinstance(base, Symbol) and source.offset == 0 else None  # type: ignore[union-attr]
    if not isinstance(value, int):
        raise EmulationError("this parameter cannot be loaded")
    machine.write(to, np.asarray(value & ((1 << 8 * kind.size) - 1), kind.bits), Type("b", kind.size))


@executes("ld.global", "st.global", "ld.shared", "st.shared", words="v2 v4 nc ca cg cs")
def _access(machine: Machine, instruction: Instruction) -> None:
    loads, shared = instruction.opcode.startswith("ld"), "shared" in instruction.modifiers
    address, values = reversed(instruction.operands) if loads else instruction.operands
    kind, members = instruction.types[-1], machine.members(values)
    if kind.is_float:
        kind = Type("b", kind.size)
    size = kind.size * len(members)
    at = machine.address(address, 4 if shared else 8)
    where = machine.of_lanes(machine.block), at, size, machine.of_lanes(machine.warp)
    if loads:
        bits = (machine.shared.load(*where) if shared else machine.memory.load(at, size)).view(kind.values)
        for i, member in enumerate(members):
            machine.write(member, np.ascontiguousarray(bits[:, i]), kind)  # sign-extend into a wider register
        return
    bits = np.stack([machine.lanes_of(member, kind) for member in members], axis=1)
    stored = np.ascontiguousarray(bits).view(np.uint8)
    if shared:
        machine.shared.store(where[0], at, stored, where[3])
    else:
        machine.memory.store(at, stored)


@executes("prefetch.global.L2")
def _prefetch(machine: Machine, instruction: Instruction) -> None:
    """Prefetch: load nothing, but check the address."""
    machine.memory.load(machine.address(instruction.operands[0], 8), 1)


@executes("bar.sync", together=BLOCK)
def _barrier(machine: Machine, instruction: Instruction) -> None:
    if len(instruction.operands) != 1 or getattr(instruction.operands[0], "bits", None) != 0:
        raise EmulationError("only barrier 0 of all threads is emulated")
    machine.shared.races.barrier(np.unique(machine.of_lanes(machine.block)))


@executes("bar.warp.sync", together=WARP)
def _warp_barrier(machine: Machine, instruction: Instruction) -> None:
    """Synchronise a warp: its lanes meet; their accesses are in order anyway."""


@executes("griddepcontrol.wait", "griddepcontrol.launch_dependents")
def _dependents(machine: Machine, instruction: Instruction) -> None:
    """Do nothing: launches run one after another here."""
