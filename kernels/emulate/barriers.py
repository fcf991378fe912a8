"""mbarrier: a phase ends when all arrivals and all announced bytes have come."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from emulate.errors import EmulationError
from emulate.machine import Machine
from emulate.opcodes import WARP, executes
from emulate.ptx import Instruction, Operand
from emulate.values import PRED, U32, Array


@dataclass
class TensorCopy:
    """A tensor copy in flight: data and its chunks of 16 bytes in shared memory."""

    chunk: Array
    data: Array


@dataclass
class Barrier:
    """One mbarrier.

    Attributes:
        count: the arrivals of a phase; `arrivals` are those still to come.
        bytes: bytes announced and not yet arrived.
        phase: the number of phases that have ended.
        copies: copies in flight. They land when a lane waits for the phase, the latest possible moment.
        landed: chunks written by the copies of the phase before.
    """

    count: int
    arrivals: int
    bytes: int = 0
    phase: int = 0
    copies: list[TensorCopy] = field(default_factory=list)
    landed: list[Array] = field(default_factory=list)

    def end_phase(self, machine: Machine) -> bool:
        """End the phase if all arrivals have come and all bytes are in flight or have landed."""
        if self.arrivals or self.bytes != sum(copy.data.size for copy in self.copies):
            return False
        for copy in self.copies:
            machine.shared.races.end_tensor_copy(copy.chunk, 16)
            machine.shared.put(copy.chunk, copy.data)
        self.landed = [copy.chunk for copy in self.copies]
        self.copies, self.bytes, self.arrivals = [], 0, self.count
        self.phase += 1
        return True


def _places(machine: Machine, operand: Operand, changed: bool = False) -> Iterator[tuple[tuple[int, int], Array]]:
    """Return (block, address) of the barriers that lanes name, and the indices of the lanes.

    A race for a barrier concerns its existence: `changed` means that it is created or deleted.
    """
    lanes = np.arange(machine.count)[machine.lanes]
    address = machine.address(operand, 4)
    chunk = machine.shared.chunks(machine.block[lanes], address, 8, "mbarrier")
    note = machine.shared.races.store if changed else machine.shared.races.load
    note(machine.block[lanes], chunk, 8, machine.warp[lanes])
    places = np.stack([machine.block[lanes], address], axis=1)
    for block, place in np.unique(places, axis=0):
        yield (int(block), int(place)), lanes[(places == (block, place)).all(axis=1)]


def barrier_at(machine: Machine, place: tuple[int, int]) -> Barrier:
    found: Barrier | None = machine.barriers.get(place)
    if found is None:
        raise EmulationError(f"there is no mbarrier at shared address {place[1]:#x}")
    return found


@executes("mbarrier.init.shared::cta.b64")
def _init(machine: Machine, instruction: Instruction) -> None:
    count = int(machine.read(instruction.operands[1], U32))
    for place, lanes in _places(machine, instruction.operands[0], changed=True):
        if place in machine.barriers or len(lanes) > 1:
            raise EmulationError(f"the mbarrier at shared address {place[1]:#x} is initialised twice")
        machine.barriers[place] = Barrier(count, count)


@executes("mbarrier.inval.shared::cta.b64")
def _invalidate(machine: Machine, instruction: Instruction) -> None:
    for place, _ in _places(machine, instruction.operands[0], changed=True):
        if barrier_at(machine, place).copies:
            raise EmulationError(f"copies are on their way to the mbarrier at shared address {place[1]:#x}")
        del machine.barriers[place]


@executes("mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.arrive.shared::cta.b64")
def _arrive(machine: Machine, instruction: Instruction) -> None:
    announced = int(machine.read(instruction.operands[2], U32)) if "expect_tx" in instruction.modifiers else 0
    for place, lanes in _places(machine, instruction.operands[1]):
        barrier = barrier_at(machine, place)
        if len(lanes) > barrier.arrivals:
            raise EmulationError(f"the mbarrier at shared address {place[1]:#x} has all its arrivals")
        barrier.arrivals -= len(lanes)
        barrier.bytes += announced * len(lanes)
        if not barrier.copies and not barrier.bytes:
            barrier.end_phase(machine)


@executes("mbarrier.try_wait.parity.shared::cta.b64")
def _wait(machine: Machine, instruction: Instruction) -> None:
    """Fail the first try, as allowed; then lanes whose phase has not ended stall, others see the copied data."""
    again = machine.tried[machine.lanes].copy()
    machine.write(instruction.operands[0], again, PRED)
    machine.tried[machine.lanes] = ~again
    machine.lanes = np.arange(machine.count)[machine.lanes][again]
    parity = np.empty(machine.count, np.int64)
    parity[machine.lanes] = machine.lanes_of(instruction.operands[2], U32)
    stalled = np.zeros(machine.count, np.bool_)
    for place, lanes in _places(machine, instruction.operands[1]):
        barrier = barrier_at(machine, place)
        current = parity[lanes] == barrier.phase % 2
        if current.any():
            current &= not barrier.end_phase(machine)
        stalled[lanes[current]] = True
        if len(warps := np.unique(machine.warp[lanes[~current]])):
            for chunk in barrier.landed:
                machine.shared.races.see(chunk, 16, warps)
    if stalled.any():
        machine.stalled, machine.tried = stalled, machine.tried | stalled


@executes("fence.proxy.async.shared::cta")
def _fence(machine: Machine, instruction: Instruction) -> None:
    """Fence: tensor copies and products see a warp's stores, and other stores visible to it, from now on."""
    machine.shared.races.fence(machine.of_lanes(machine.block), machine.of_lanes(machine.warp))


@executes("elect.sync", together=WARP)
def _elect(machine: Machine, instruction: Instruction) -> None:
    """Elect one lane of the warp: the first."""
    first = machine.of_lanes(machine.thread) % 32 == 0
    lane, chosen = machine.members(instruction.operands[0])
    machine.write(lane, np.zeros(machine.active, np.uint32), U32)
    machine.write(chosen, first, PRED)
