"""Arithmetic instructions: integers, floating point, predicates.

Approximate ones (ex2, rsqrt, div.full, tanh) return the nearest float32 or its neighbour; a GPU is less accurate.
"""

from collections.abc import Callable

import numpy as np

from emulate.errors import EmulationError
from emulate.machine import Machine
from emulate.opcodes import executes
from emulate.ptx import Instruction
from emulate.values import B32, F32, PRED, U32, Array, Type, flush


def _numbers(machine: Machine, instruction: Instruction, count: int) -> list[Array]:
    """Read the sources, with subnormals flushed if the instruction requires it."""
    kind = instruction.types[-1]
    found = [machine.read(operand, kind) for operand in instruction.operands[1 : count + 1]]
    return [flush(one) for one in found] if "ftz" in instruction.modifiers else found


def _finish(machine: Machine, instruction: Instruction, values: Array, kind: Type | None = None) -> None:
    kind = kind or instruction.types[-1]
    machine.write(instruction.operands[0], flush(values) if "ftz" in instruction.modifiers else values, kind)


_TWO: dict[str, Callable[[Array, Array], Array]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@executes("add", "sub", words="rn ftz")
def _add(machine: Machine, instruction: Instruction) -> None:
    a, b = _numbers(machine, instruction, 2)
    _finish(machine, instruction, _TWO[instruction.opcode.split(".")[0]](a, b))


@executes("mul", "mad", words="rn ftz lo hi wide")
def _multiply(machine: Machine, instruction: Instruction) -> None:
    """Multiply: for integers, the lower or upper half of the product or all of it; mad adds to that."""
    kind = result = instruction.types[-1]
    a, b = _numbers(machine, instruction, 2)
    if kind.is_float:
        if instruction.opcode.startswith("mad"):
            raise EmulationError("of floating point is not emulated")
        return _finish(machine, instruction, a * b)
    if "lo" in instruction.modifiers:
        product = a * b
    elif kind.size > 4:
        raise EmulationError("a product of 128 bits is not emulated")
    else:
        wide = kind.wider()
        product = a.astype(wide.values) * b.astype(wide.values)
        if "wide" in instruction.modifiers:
            result = wide
        elif "hi" in instruction.modifiers:
            product = (product >> wide.values(8 * kind.size)).astype(kind.values)
        else:
            raise EmulationError("says neither lo, hi nor wide")
    if instruction.opcode.startswith("mad"):
        product = product + machine.read(instruction.operands[3], result)
    _finish(machine, instruction, product, result)


@executes("fma", words="rn ftz")
def _fma(machine: Machine, instruction: Instruction) -> None:
    """Fused multiply-add in float64: the product is exact; rounding the sum twice breaks one tie in 2^29 wrongly."""
    if instruction.types[-1].size > 4:
        raise EmulationError("of float64 is not emulated")
    a, b, c = (one.astype(np.float64) for one in _numbers(machine, instruction, 3))
    _finish(machine, instruction, (a * b + c).astype(np.float32))


@executes("div", "rem", words="full approx rn ftz")
def _divide(machine: Machine, instruction: Instruction) -> None:
    """Divide; integers towards zero. Division by zero, undefined in PTX, sets all bits."""
    a, b = _numbers(machine, instruction, 2)
    if instruction.types[-1].is_float:
        return _finish(machine, instruction, a / b)
    one = np.where(b == 0, np.ones_like(b), b)
    quotient = a // one
    quotient = (quotient + ((a % one != 0) & ((a < 0) != (one < 0)))).astype(a.dtype)
    result = quotient if instruction.opcode.startswith("div") else a - quotient * one
    _finish(machine, instruction, np.where(b == 0, ~np.zeros_like(b), result))


@executes("min", "max", words="ftz NaN")
def _extreme(machine: Machine, instruction: Instruction) -> None:
    """Minimum or maximum; if one operand is NaN, the result is the other, unless the modifier is .NaN."""
    a, b = _numbers(machine, instruction, 2)
    least = instruction.opcode.startswith("min")
    if instruction.types[-1].is_float and "NaN" not in instruction.modifiers:
        return _finish(machine, instruction, (np.fmin if least else np.fmax)(a, b))
    _finish(machine, instruction, (np.minimum if least else np.maximum)(a, b))


_ONE: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs,
    "neg": np.negative,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rcp": lambda x: np.float32(1) / x,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "tanh": np.tanh,
}


@executes(*_ONE, words="approx rn ftz")
def _function(machine: Machine, instruction: Instruction) -> None:
    name = instruction.opcode.split(".")[0]
    if name not in ("abs", "neg") and instruction.types[-1] != F32:
        raise EmulationError("is emulated in float32 only")
    _finish(machine, instruction, _ONE[name](*_numbers(machine, instruction, 1)))


_LOGIC: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@executes("and", "or", "xor")
def _logic(machine: Machine, instruction: Instruction) -> None:
    a, b = _numbers(machine, instruction, 2)
    _finish(machine, instruction, _LOGIC[instruction.opcode.split(".")[0]](a, b))


@executes("not")
def _not(machine: Machine, instruction: Instruction) -> None:
    _finish(machine, instruction, ~_numbers(machine, instruction, 1)[0])


@executes("shl", "shr")
def _shift(machine: Machine, instruction: Instruction) -> None:
    """Shift; by as many bits as the type has or more, all bits are shifted out."""
    kind = instruction.types[-1]
    value = machine.read(instruction.operands[1], kind)
    by = machine.read(instruction.operands[2], U32)
    most = 8 * kind.size - 1
    step = np.minimum(by, most).astype(value.dtype)
    if instruction.opcode.startswith("shr") and kind.kind == "s":
        return _finish(machine, instruction, value >> step)
    shifted = value << step if instruction.opcode.startswith("shl") else value >> step
    _finish(machine, instruction, np.where(by > most, np.zeros_like(shifted), shifted))


@executes("bfe")
def _bit_field(machine: Machine, instruction: Instruction) -> None:
    """Extract bits from a position; for a signed type the last of them is the sign."""
    kind = instruction.types[-1]
    if kind.size != 4:
        raise EmulationError("is emulated for 32 bits only")
    value = machine.read(instruction.operands[1], kind).astype(np.int64)
    start, length = (machine.read(one, U32).astype(np.int64) & 255 for one in instruction.operands[2:])
    if (start + length > 32).any():
        raise EmulationError("a field beyond the last bit is not emulated")
    field = (value >> start) & ((np.int64(1) << length) - 1)
    sign = (field >> np.maximum(length - 1, 0)) & 1
    _finish(machine, instruction, np.where(sign, field - (np.int64(1) << length), field) if kind.kind == "s" else field)


@executes("popc")
def _count_bits(machine: Machine, instruction: Instruction) -> None:
    value = machine.read(instruction.operands[1], instruction.types[-1])
    machine.write(instruction.operands[0], np.bitwise_count(value).astype(np.uint32), B32)


@executes("lop3")
def _any_logic(machine: Machine, instruction: Instruction) -> None:
    """Apply any logic function of three bits, given as a table of eight."""
    a, b, c, table = (machine.read(one, U32) for one in instruction.operands[1:])
    result = np.zeros(machine.active, np.uint32)
    for i in range(8):
        if int(table) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    _finish(machine, instruction, result)


_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_UNORDERED = {name + "u": _ORDERED[name] for name in ("eq", "ne", "lt", "le", "gt", "ge")}  # true for NaN
_COMPARISONS = " ".join([*_ORDERED, *_UNORDERED, "num", "nan"])


@executes("setp", words=f"{_COMPARISONS} and or xor ftz")
def _compare(machine: Machine, instruction: Instruction) -> None:
    word, joined = instruction.modifiers[0], instruction.modifiers[1]
    a, b = _numbers(machine, instruction, 2)
    nan = np.isnan(a) | np.isnan(b) if instruction.types[-1].is_float else np.zeros_like(a, np.bool_)
    if word in ("num", "nan"):
        result = ~nan if word == "num" else nan
    else:
        result = _UNORDERED[word](a, b) | nan if word in _UNORDERED else _ORDERED[word](a, b) & ~nan
    if joined in _LOGIC:
        result = _LOGIC[joined](result, machine.read(instruction.operands[3], PRED))
    machine.write(instruction.operands[0], result, PRED)
