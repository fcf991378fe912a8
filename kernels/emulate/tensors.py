"""Tensor copies (TMA): a block of a matrix in global memory, described by a map, to and from shared memory."""

from dataclasses import dataclass

import numpy as np

from emulate.barriers import TensorCopy, barrier_at
from emulate.errors import EmulationError
from emulate.machine import Machine
from emulate.opcodes import executes
from emulate.ptx import Address, Instruction
from emulate.values import S32, U32, U64, Array

SWIZZLED_BITS = {32: 1, 64: 2, 128: 3}  # by bytes per row of the pattern


def swizzle(address: Array, row_bytes: int) -> Array:
    """Return the real offset in a swizzled block: bits from 4 up are XORed with as many bits from 7 up."""
    bits = SWIZZLED_BITS.get(row_bytes, 0)
    place: Array = address ^ (address >> 3 & ((1 << bits) - 1) << 4)
    return place


@dataclass(frozen=True)
class TensorMap:
    """A matrix in global memory and its blocks, with the arguments of cuTensorMapEncodeTiled.

    Attributes:
        address: the address of the first element.
        shape: rows and columns.
        stride: elements from row to row.
        block: rows and columns of a block.
        element_bytes: bytes per element.
        swizzle_bytes: 32, 64, 128; 0: no swizzle.
    """

    address: int
    shape: tuple[int, int]
    stride: int
    block: tuple[int, int]
    element_bytes: int
    swizzle_bytes: int

    def __post_init__(self) -> None:
        row = self.block[1] * self.element_bytes
        if self.address % 16 or self.stride * self.element_bytes % 16:
            raise EmulationError("a tensor map needs addresses and strides of multiples of 16 bytes")
        if row % 16 or max(self.block) > 256 or (self.swizzle_bytes and row > self.swizzle_bytes):
            raise EmulationError(f"a tensor map has no blocks of {self.block} with a swizzle of {self.swizzle_bytes}")
        if self.swizzle_bytes and row != self.swizzle_bytes:
            raise EmulationError("a block narrower than its swizzle is not emulated")

    def elements(self, column: int, row: int) -> tuple[Array, Array]:
        """Return global addresses (rows, columns) of a block's elements, and the mask of those inside the matrix."""
        rows, columns = (start + np.arange(size) for start, size in zip((row, column), self.block, strict=True))
        there = ((rows >= 0) & (rows < self.shape[0]))[:, None] & ((columns >= 0) & (columns < self.shape[1]))
        return self.address + (rows[:, None] * self.stride + columns) * self.element_bytes, there

    def chunks(self) -> Array:
        """Return offsets of a block's 16-byte chunks in shared memory, before the swizzle."""
        return np.arange(0, self.block[0] * self.block[1] * self.element_bytes, 16)


_NAME = "cp.async.bulk.tensor.2d"


@executes(
    f"{_NAME}.shared::cta.global.mbarrier::complete_tx::bytes",
    f"{_NAME}.shared::cluster.global.mbarrier::complete_tx::bytes",
)
def _load(machine: Machine, instruction: Instruction) -> None:
    """Load a whole block for one lane; elements outside the matrix arrive as zeros and count as bytes."""
    to, source, barrier = instruction.operands
    starts, places = machine.address(to, 4), machine.address(barrier, 4)
    for i, (lane, tensor, column, row) in enumerate(_blocks(machine, source)):
        chunk = _chunks(machine, tensor, int(starts[i]), int(machine.block[lane]))
        data = np.zeros((*tensor.block, tensor.element_bytes), np.uint8)
        at, there = tensor.elements(column, row)
        data[there] = machine.memory.load(at[there], tensor.element_bytes)
        block, warp = (np.full(len(chunk), one[lane]) for one in (machine.block, machine.warp))
        machine.shared.races.begin_copy(block, chunk, 16, warp)
        copy = TensorCopy(chunk, data.reshape(-1, 16))
        if machine.early_copies:
            machine.shared.put(copy.chunk, copy.data)
        barrier_at(machine, (int(machine.block[lane]), int(places[i]))).copies.append(copy)


@dataclass(frozen=True, eq=False)
class _Store:
    """A store of a block to global memory in flight: lane, commit group, source, target and time of issue.

    `data` is the source data at issue, if it is not to be read at the wait.
    """

    lane: int
    group: int
    chunk: Array
    at: Array
    there: Array
    began: int
    data: Array | None


@executes(f"{_NAME}.global.shared::cta.bulk_group")
def _store(machine: Machine, instruction: Instruction) -> None:
    """Store a block; elements outside the matrix are skipped."""
    to, source = instruction.operands
    starts, races = machine.address(source, 4), machine.shared.races
    for i, (lane, tensor, column, row) in enumerate(_blocks(machine, to)):
        chunk = _chunks(machine, tensor, int(starts[i]), int(machine.block[lane]))
        block, warp = (np.full(len(chunk), one[lane]) for one in (machine.block, machine.warp))
        races.begin_read(block, chunk, 16, warp[:, None])
        data = machine.shared.peek(chunk, 16) if machine.early_copies else None
        group = int(machine.store_groups[lane])
        machine.stores.append(_Store(lane, group, chunk, *tensor.elements(column, row), races.now, data))


@executes("cp.async.bulk.commit_group")
def _commit(machine: Machine, instruction: Instruction) -> None:
    machine.store_groups[machine.lanes] += 1


@executes("cp.async.bulk.wait_group", words="read")
def _wait(machine: Machine, instruction: Instruction) -> None:
    """Finish the lanes' committed stores except the last N groups."""
    left = int(machine.read(instruction.operands[0], U32))
    waits = np.zeros(machine.count, np.bool_)
    waits[machine.lanes] = True
    for store in list(machine.stores):
        if waits[store.lane] and store.group < machine.store_groups[store.lane] - left:
            machine.shared.races.end_read(store.chunk, 16, store.began)
            data = machine.shared.peek(store.chunk, 16) if store.data is None else store.data
            machine.memory.store(store.at[store.there], data.reshape(*store.there.shape, -1)[store.there])
            machine.stores.remove(store)


def _blocks(machine: Machine, source: object) -> list[tuple[int, TensorMap, int, int]]:
    """Yield lane, map, column and row of the block that each lane names."""
    if not isinstance(source, Address) or len(source.coordinates) != 2:
        raise EmulationError("names no block of a matrix")
    lanes = np.arange(machine.count)[machine.lanes]
    addresses = machine.lanes_of(source.base, U64)
    columns, rows = (machine.lanes_of(one, S32) for one in source.coordinates)
    found = []
    for lane, address, column, row in zip(lanes, addresses, columns, rows, strict=True):
        tensor = machine.parameter_at(int(address))
        if not isinstance(tensor, TensorMap):
            raise EmulationError(f"{int(address):#x} is no tensor map's address")
        found.append((int(lane), tensor, int(column), int(row)))
    return found


def _chunks(machine: Machine, tensor: TensorMap, start: int, block: int) -> Array:
    """Return the indices of the 16-byte chunks of a block in shared memory."""
    if start % 128:
        raise EmulationError(f"misaligned block at shared address {start:#x}")
    at = swizzle(start + tensor.chunks(), tensor.swizzle_bytes)
    return machine.shared.chunks(np.full(len(at), block), at, 16, "copy")
