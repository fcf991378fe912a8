"""Parse PTX into a list of instructions: only the part of the language that Triton emits."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from emulate.errors import EmulationError
from emulate.values import Type, type_named


class Register(NamedTuple):
    name: str


class Immediate(NamedTuple):
    bits: int  # bits, for a float; may be negative


class Symbol(NamedTuple):
    """Shared memory, a parameter, or the target of a branch."""

    name: str


class Address(NamedTuple):
    base: "Register | Symbol"
    offset: int
    coordinates: "tuple[Operand, ...]" = ()  # for a tensor map


class Group(NamedTuple):
    """A vector in braces, or a register and a predicate separated by a bar."""

    members: "tuple[Operand, ...]"


Operand = Register | Immediate | Symbol | Address | Group
DISCARD = Register("_")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        text: the source, on one line.
        opcode: the opcode with modifiers and types, such as "setp.lt.s32".
        modifiers: all modifiers, including types.
        types: the types among the modifiers.
        operands: the operands, in order.
        guard: the predicate register and whether it is negated; None: it always runs.
        target: for a branch, the index of the target instruction.
    """

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    types: tuple[Type, ...]
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None = None
    target: int = -1


@dataclass(frozen=True)
class Program:
    """A kernel: its name, parameters by name with their sizes in bytes, registers and instructions."""

    name: str
    parameters: dict[str, int]
    registers: dict[str, Type]
    code: tuple[Instruction, ...]


_STATEMENT = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[$\w]+):(?!:)|(?P<text>[^;]+);)")
_PARAMETER = re.compile(r"\.param(?P<words>[^,]*?)(?P<name>\w+)(?:\[(?P<bytes>\d+)\])?\s*(?:,|$)")


def parse(ptx: str) -> Program:
    """Return the only kernel of a module."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"^\s*\.(loc|file|section)\b[^\n]*", "", ptx, flags=re.M)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", ptx, re.S)
    if head is None:
        raise EmulationError("the module has no kernel")
    if unknown := set(re.findall(r"\.\w+", head[3])) - {".reqntid", ".maxntid", ".maxnreg", ".minnctapersm"}:
        raise EmulationError(f"{head[1]}: unknown directives {sorted(unknown)}")
    parameters = {}
    for found in _PARAMETER.finditer(head[2].strip()):
        kind = next(t for word in re.findall(r"\w+", found["words"]) if (t := type_named(word)))
        parameters[found["name"]] = int(found["bytes"] or 1) * kind.size
    try:
        registers, code = _body(ptx, head.end())
    except EmulationError as error:
        raise EmulationError(f"{head[1]}: {error}") from None
    return Program(head[1], parameters, registers, code)


def _statements(ptx: str, at: int) -> Iterator[tuple[str, str]]:
    """Yield kind and text of every statement of a body, up to its closing brace."""
    depth = 1
    while depth:
        found = _STATEMENT.match(ptx, at)
        if found is None or found.lastgroup is None:
            raise EmulationError(f"cannot read {ptx[at : at + 60]!r}")
        depth += {"open": 1, "close": -1}.get(found.lastgroup, 0)
        at = found.end()
        yield found.lastgroup, " ".join(found[found.lastgroup].split())


def _body(ptx: str, start: int) -> tuple[dict[str, Type], tuple[Instruction, ...]]:
    """Parse registers and instructions. Names declared in an inner block get a suffix."""
    registers: dict[str, Type] = {}
    labels: dict[str, int] = {}
    lines: list[tuple[str, tuple[str, ...]]] = []
    scopes, count = [""], 0
    for kind, text in _statements(ptx, start):
        if kind == "open":
            count += 1
            scopes.append(f"@{count}")
        elif kind == "close":
            scopes.pop()
        elif kind == "label":
            labels[text + scopes[-1]] = len(lines)
        elif text.startswith(".reg"):
            registers |= {name + scopes[-1]: of for name, of in _declared(text)}
        elif text.startswith(".pragma"):
            continue
        elif text.startswith("."):
            raise EmulationError(f"unknown directive {text!r}")
        else:
            lines.append((text, tuple(reversed(scopes))))
    names = _Names(registers, labels)
    return registers, tuple(names.instruction(text, scopes) for text, scopes in lines)


def _declared(text: str) -> Iterator[tuple[str, Type]]:
    words = re.fullmatch(r"\.reg \.(\w+) (.*)", text)
    of = type_named(words[1]) if words else None
    if words is None or of is None:
        raise EmulationError(f"unknown registers {text!r}")
    for name in words[2].split(","):
        many = re.fullmatch(r"\s*(%?\w+)<(\d+)>", name)
        yield from ((f"{many[1]}{i}", of) for i in range(int(many[2]))) if many else [(name.strip(), of)]


class _Names:
    """Resolves the names of a program's operands."""

    def __init__(self, registers: dict[str, Type], labels: dict[str, int]) -> None:
        self.registers, self.labels = registers, labels

    def instruction(self, text: str, scopes: tuple[str, ...]) -> Instruction:
        found = re.fullmatch(r"(?:@(!?)([%\w]+) )?([a-z][\w.:]*)(?: (.*))?", text)
        if found is None:
            raise EmulationError(f"cannot read {text!r}")
        negated, guard, opcode, rest = found.groups()
        modifiers = tuple(opcode.split("."))[1:]
        types = tuple(t for word in modifiers if (t := type_named(word)))
        operands = tuple(self.operand(part, scopes) for part in _split(rest or ""))
        target = -1
        if opcode.startswith("bra"):
            target = self._find(operands[0].name, scopes, self.labels)  # type: ignore[union-attr]
        guarded = None if guard is None else (self.operand(guard, scopes).name, bool(negated))  # type: ignore[union-attr]
        return Instruction(text, opcode, modifiers, types, operands, guarded, target)

    @staticmethod
    def _find(name: str, scopes: tuple[str, ...], where: dict[str, int]) -> int:
        found = next((where[name + scope] for scope in scopes if name + scope in where), None)
        if found is None:
            raise EmulationError(f"there is no label {name}")
        return found

    def operand(self, text: str, scopes: tuple[str, ...]) -> Operand:
        if text.startswith("{"):
            return Group(tuple(self.operand(part, scopes) for part in _split(text.strip("{} "))))
        if text.startswith("["):
            return self._address(text.strip("[] "), scopes)
        if "|" in text:
            return Group(tuple(self.operand(part.strip(), scopes) for part in text.split("|")))
        scoped = next((text + scope for scope in scopes if text + scope in self.registers), None)
        if scoped is not None or text.startswith("%") or text == "_":
            return Register(scoped or text)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
            return Immediate(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.fullmatch(r"[$\w]+", text):
            return Symbol(text)
        raise EmulationError(f"unknown operand {text!r}")

    def _address(self, text: str, scopes: tuple[str, ...]) -> Address:
        first, *rest = _split(text)
        found = re.fullmatch(r"(\S+?)(?:\s*\+\s*(-?\d+))?", first)
        if found is None:
            raise EmulationError(f"unknown address {text!r}")
        base = self.operand(found[1], scopes)
        if not isinstance(base, Register | Symbol):
            raise EmulationError(f"unknown address {text!r}")
        coordinates = tuple(m for part in rest for m in self.operand(part, scopes).members)  # type: ignore[union-attr]
        return Address(base, int(found[2] or 0), coordinates)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
