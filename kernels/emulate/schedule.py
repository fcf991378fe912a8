"""Pick the lanes that execute next, and let lanes wait for those they must execute with."""

from typing import Any

import numpy as np

from emulate import arithmetic, copies, moving, tensors, warps, wgmma  # noqa: F401  (they register their instructions)
from emulate.errors import EmulationError
from emulate.machine import Machine
from emulate.opcodes import BLOCK, LANE, Opcode, opcode_of
from emulate.ptx import Instruction

ORDERS = ("together", "first", "last")


class Schedule:
    """One run of a program.

    All lanes run together, and where they diverge, those furthest behind run first; or ("first", "last") each warp runs
    as far as it can before the next one of its block, starting from the first or the last. If an instruction needs it,
    lanes wait until all of their warp, warpgroup or block arrive: the order of LLVM's blocks does not ensure this.
    """

    def __init__(self, machine: Machine, order: str = "together") -> None:
        self.machine = machine
        try:
            self.code = [(one, _opcode(one)) for one in machine.program.code]
        except EmulationError as error:
            raise EmulationError(f"{machine.program.name}: {error}") from None
        self.steps = 0
        self._alive = np.ones(machine.count, np.bool_)
        self._at = np.zeros(machine.count, np.int64)  # the next instruction of every lane
        self._waiting = np.zeros(machine.count, np.bool_)
        self._released_at = -1
        upwards = [*range(machine.threads // 32)]
        self._turns: list[int] = {"together": [], "first": upwards, "last": upwards[::-1]}[order]

    def run(self) -> None:
        with np.errstate(all="ignore"):
            try:
                while self._alive.any():
                    if self._one_place():
                        self._together()
                    else:
                        self._apart()
                if self.machine.stores:
                    raise EmulationError("ends while tensor copies read its shared memory")
            except EmulationError as error:
                raise EmulationError(f"{self.machine.program.name}: {error}") from None

    def _one_place(self) -> bool:
        """Return whether all remaining lanes are at one instruction and none waits."""
        if len(self._turns) > 1 or self._waiting.any():
            return False
        places = self._at[self._alive]
        return bool((places == places[0]).all())

    def _together(self) -> None:
        """Execute while all lanes are at one instruction, until they diverge."""
        everyone: Any = slice(None) if self._alive.all() else np.flatnonzero(self._alive)
        at = int(self._at[everyone][0])
        while True:
            instruction, opcode = self._fetch(at)
            self.machine.lanes = everyone
            allowed = self._guarded(instruction)
            if allowed is not None and not allowed.any():
                at += 1
                continue
            if allowed is None and instruction.target >= 0:
                at = instruction.target
                continue
            if allowed is not None:
                self.machine.lanes = _chosen(everyone, allowed)
            goes_elsewhere = instruction.target >= 0 or _ends(instruction)
            if not goes_elsewhere:
                self._execute(instruction, opcode)
                if self.machine.stalled is None:
                    at += 1
                    continue
            self._at[everyone] = at + 1
            self._leave(instruction, at)
            return

    def _apart(self) -> None:
        """Execute one instruction for the lanes whose turn it is."""
        turn = self._turn()
        at = int(self._at[turn].min())
        instruction, opcode = self._fetch(at)
        here = self._alive & (self._at == at)
        lanes = self._gather(here, here & turn, opcode.together)
        if not lanes.any():
            return
        self.machine.lanes = chosen = np.flatnonzero(lanes)
        allowed = self._guarded(instruction)
        if allowed is not None:
            self.machine.lanes = chosen[allowed]
        self._at[chosen] = at + 1
        if len(self.machine.lanes):
            if instruction.target < 0 and not _ends(instruction):
                self._execute(instruction, opcode)
            self._leave(instruction, at)

    def _leave(self, instruction: Instruction, at: int) -> None:
        """Move lanes on: they branch, end, or stay because the instruction could not be completed."""
        lanes, stalled = self.machine.lanes, self.machine.stalled
        if instruction.target >= 0:
            self._at[lanes] = instruction.target
        elif _ends(instruction):
            self._alive[lanes] = False
            self.steps += 1
        elif stalled is not None:
            self._at[stalled] = at
            self._waiting |= stalled
            self.machine.stalled = None

    def _turn(self) -> Any:
        """Return the mask of lanes whose turn it is; waiting lanes retry when no other can run."""
        ready = self._alive & ~self._waiting
        if not ready.any():
            if self._released_at == self.steps:
                places = sorted({int(i) for i in self._at[self._alive]})
                raise EmulationError(f"deadlock: lanes wait at {' and '.join(self.code[i][0].text for i in places)}")
            self._released_at = self.steps
            self._waiting[:] = False
            ready = self._alive
        for warp in self._turns:
            if (mine := ready & (self.machine.warp == warp)).any():
                return mine
        return ready

    def _gather(self, here: Any, turn: Any, together: int) -> Any:
        """Return the lanes at an instruction that may execute it; let the others whose turn it is wait."""
        if together == LANE:
            return turn
        size = self.machine.threads if together == BLOCK else together
        complete = (here | ~self._alive).reshape(-1, size).all(axis=1) & turn.reshape(-1, size).any(axis=1)
        lanes = here & np.repeat(complete, size)
        self._waiting = (self._waiting | turn) & ~lanes
        return lanes

    def _fetch(self, at: int) -> tuple[Instruction, Opcode]:
        if at >= len(self.code):
            raise EmulationError("lanes run past the last instruction")
        return self.code[at]

    def _guarded(self, instruction: Instruction) -> Any:
        """Return the lanes that pass the guard; None: all."""
        if instruction.guard is None:
            return None
        allowed = self.machine.guard(*instruction.guard)
        return None if allowed.all() else allowed

    def _execute(self, instruction: Instruction, opcode: Opcode) -> None:
        machine = self.machine
        machine.shared.races.now += 1
        try:
            if opcode.together != LANE:
                self._check_all_there(opcode.together)
            opcode.run(machine, instruction)
        except EmulationError as error:
            raise EmulationError(f"{instruction.text}: {error}") from None
        self.steps += machine.stalled is None or machine.stalled.sum() < machine.active

    def _check_all_there(self, together: int) -> None:
        """Raise if a guard passes only some of the lanes that must execute together."""
        if isinstance(self.machine.lanes, slice):
            return
        size = self.machine.threads if together == BLOCK else together
        groups, counts = np.unique(self.machine.lanes // size, return_counts=True)
        needed = self._alive.reshape(-1, size).sum(axis=1)[groups] if together == BLOCK else size
        if (counts != needed).any():
            raise EmulationError(f"some lanes of {size} do not execute it")


def _opcode(instruction: Instruction) -> Opcode:
    if instruction.target >= 0 or _ends(instruction):
        if set(instruction.modifiers) - {"uni"}:
            raise EmulationError(f"{instruction.text}: unknown instruction")
        return Opcode(_of_schedule, frozenset(), LANE)
    return opcode_of(instruction)


def _of_schedule(machine: Machine, instruction: Instruction) -> None:
    raise AssertionError(f"{machine.program.name}: {instruction.text}: branches are the schedule's")


def _ends(instruction: Instruction) -> bool:
    return instruction.opcode in ("ret", "exit")


def _chosen(everyone: Any, allowed: Any) -> Any:
    return np.flatnonzero(allowed) if isinstance(everyone, slice) else everyone[allowed]
