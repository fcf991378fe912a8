"""cp.async: copies from global to shared memory, which land only when a lane waits for them."""

from typing import NamedTuple

import numpy as np

from emulate.errors import EmulationError
from emulate.machine import Machine
from emulate.opcodes import executes
from emulate.ptx import Instruction
from emulate.values import U32, Array


class _Copy(NamedTuple):
    """Copies of one instruction in flight, one per lane: lanes, commit groups, target chunks and data."""

    lanes: Array
    group: Array
    chunk: Array
    data: Array

    def of(self, some: Array) -> "_Copy":
        return _Copy(*(part[some] for part in self))


@executes("cp.async.ca.shared.global", "cp.async.cg.shared.global")
def _copy(machine: Machine, instruction: Instruction) -> None:
    """Issue copies of 4, 8 or 16 bytes per lane; bytes past the source size, if given, become zeros."""
    to, source, count, *given = instruction.operands
    size = int(machine.read(count, U32))
    if size not in (4, 8, 16) or (size != 16 and ".cg" in instruction.opcode):
        raise EmulationError(f"copies of {size} bytes there are not")
    valid = machine.lanes_of(given[0], U32) if given else np.full(machine.active, size)
    if (valid > size).any():
        raise EmulationError("the source is larger than the copy")
    lanes = np.arange(machine.count)[machine.lanes]
    block, warp = machine.block[lanes], machine.warp[lanes]
    chunk = machine.shared.chunks(block, machine.address(to, 4), size, "copy")
    data = np.zeros((len(lanes), size), np.uint8)
    reads = np.flatnonzero(valid)
    at = machine.address(source, 8)[reads]
    if (valid[reads] == size).all():
        data[reads] = machine.memory.load(at, size)
    else:
        raise EmulationError("a source smaller than the copy, but not empty, is not emulated")
    machine.shared.races.begin_copy(block, chunk, size, warp)
    if machine.early_copies:
        machine.shared.put(chunk, data)
    machine.copies.append(_Copy(lanes, machine.copy_groups[lanes], chunk, data))


@executes("cp.async.commit_group")
def _commit(machine: Machine, instruction: Instruction) -> None:
    machine.copy_groups[machine.lanes] += 1


@executes("cp.async.wait_group")
def _wait(machine: Machine, instruction: Instruction) -> None:
    """Land the lanes' committed copies except the last N groups; uncommitted copies stay in flight."""
    _land(machine, int(machine.read(instruction.operands[0], U32)))


@executes("cp.async.wait_all")
def _wait_all(machine: Machine, instruction: Instruction) -> None:
    machine.copy_groups[machine.lanes] += 1
    _land(machine, 0)


def _land(machine: Machine, left: int) -> None:
    waits = np.zeros(machine.count, np.bool_)
    waits[machine.lanes] = True
    rest: list[_Copy] = []
    for copy in machine.copies:
        done = waits[copy.lanes] & (copy.group < machine.copy_groups[copy.lanes] - left)
        if done.any():
            landed = copy.of(done)
            block, warp = machine.block[landed.lanes], machine.warp[landed.lanes]
            machine.shared.races.end_copy(block, landed.chunk, landed.data.shape[1], warp)
            machine.shared.put(landed.chunk, landed.data)
        if not done.all():
            rest.append(copy.of(~done))
    machine.copies[:] = rest
