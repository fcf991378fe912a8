"""Map instructions to functions; unknown modifiers are rejected before anything runs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from emulate.errors import EmulationError
from emulate.ptx import Instruction
from emulate.values import type_named

if TYPE_CHECKING:
    from emulate.machine import Machine

LANE, WARP, WARPGROUP, BLOCK = 1, 32, 128, 0  # lanes that must execute together


class Opcode(NamedTuple):
    run: "Callable[[Machine, Instruction], None]"
    words: frozenset[str]  # accepted modifiers besides types
    together: int


_OPCODES: dict[str, Opcode] = {}


def executes(*names: str, words: str = "", together: int = LANE) -> Callable[..., Callable[..., None]]:
    """Register a function for opcodes that begin with one of the names; the longest match wins."""

    def register(run: "Callable[[Machine, Instruction], None]") -> "Callable[[Machine, Instruction], None]":
        _OPCODES.update(dict.fromkeys(names, Opcode(run, frozenset(words.split()), together)))
        return run

    return register


def opcode_of(instruction: Instruction) -> Opcode:
    parts = instruction.opcode.split(".")
    for length in range(len(parts), 0, -1):
        found = _OPCODES.get(".".join(parts[:length]))
        if found is None:
            continue
        unknown = [word for word in parts[length:] if word not in found.words and type_named(word) is None]
        if unknown:
            raise EmulationError(f"{instruction.text}: unknown modifier {unknown[0]}")
        return found
    raise EmulationError(f"{instruction.text}: unknown instruction")
