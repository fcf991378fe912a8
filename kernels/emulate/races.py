"""Race detection in shared memory: two unordered accesses by different warps to one place, at least one a write.

Accesses of one warp count as ordered. Every access records time and warp for each two bytes that it touches; an access
races if a conflicting access of another warp is later than the block's last barrier. Between its issue and its wait,
nobody may access the target of a copy. Tensor copies and products use the asynchronous proxy: a product sees stores
only after a fence between the two. None of this depends on the order in which warps happen to run.
"""

import numpy as np

from emulate.errors import EmulationError
from emulate.values import Array

CELL = 2  # bytes: Triton shares nothing smaller between warps
SEVERAL, TENSOR = -1, -2  # instead of a warp: several have read it; a tensor copy has written it


class Races:
    """The last accesses to every cell, by warp and time. Cells of all blocks are in one array.

    Attributes:
        now: the time, which the schedule advances with every instruction.
    """

    def __init__(self, blocks: int, stride: int, warps: int) -> None:
        cells = blocks * stride // CELL
        self.now = 1
        self._stride = stride
        self._barrier = np.zeros(blocks, np.int64)  # time of the last barrier of each block
        self._fence = np.zeros((blocks, warps), np.int64)  # time of the last proxy fence of each warp
        self._written, self._read = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
        self._writer, self._reader = np.zeros(cells, np.int16), np.zeros(cells, np.int16)
        self._pending = np.zeros(cells, np.bool_)
        self._seen = np.zeros(cells, np.uint64)  # bit mask of the warps that waited for the tensor copy that wrote it

    def barrier(self, blocks: Array) -> None:
        self._barrier[blocks] = self.now

    def fence(self, block: Array, warp: Array) -> None:
        self._fence[block, warp] = self.now

    def load(self, block: Array, chunk: Array, size: int, warp: Array) -> None:
        """Record the loads of an instruction, for lanes of blocks and warps (lanes,)."""
        cells, since, warp = self._cells(chunk, size), self._barrier[block][:, None], warp[:, None]
        self._refuse(self._pending[cells], cells, "load of bytes that a copy is still writing")
        other = self._from_another(cells, since, warp)
        self._refuse(other, cells, "race: load of what another warp stored with no barrier between")
        reader = np.where((self._read[cells] > since) & (self._reader[cells] != warp), SEVERAL, warp)
        self._reader[cells] = reader
        self._reader[cells[self._reader[cells] != reader]] = SEVERAL  # warps that read it in this instruction
        self._read[cells] = self.now

    def store(self, block: Array, chunk: Array, size: int, warp: Array, landing: bool = False) -> None:
        """Record the stores of an instruction, or of a copy at the end of its wait."""
        cells, since, warp = self._cells(chunk, size), self._barrier[block][:, None], warp[:, None]
        if not landing:
            self._refuse(self._pending[cells], cells, "store over bytes that a copy is still writing")
        other = self._from_another(cells, since, warp)
        self._refuse(other, cells, "race: store over what another warp stored with no barrier between")
        other = (self._read[cells] > since) & (self._reader[cells] != warp)
        self._refuse(other, cells, "race: store over what another warp loads with no barrier between")
        self._written[cells], self._writer[cells] = self.now, np.broadcast_to(warp, cells.shape)

    def check_writer(self, chunk: Array, size: int, warp: Array) -> None:
        """Raise if another warp stored a different value in the same instruction."""
        cells = self._cells(chunk, size)
        other = self._writer[cells] != warp[:, None]
        self._refuse(other, cells, "race: warps store different values at one place")

    def begin_copy(self, block: Array, chunk: Array, size: int, warp: Array) -> None:
        self.store(block, chunk, size, warp)
        self._pending[self._cells(chunk, size)] = True

    def end_copy(self, block: Array, chunk: Array, size: int, warp: Array) -> None:
        self.store(block, chunk, size, warp, landing=True)
        self._pending[self._cells(chunk, size)] = False

    def end_tensor_copy(self, chunk: Array, size: int) -> None:
        cells = self._cells(chunk, size)
        self._pending[cells] = False
        self._written[cells], self._writer[cells], self._seen[cells] = self.now, TENSOR, 0

    def see(self, chunk: Array, size: int, warps: Array) -> None:
        """Record that warps have waited for the tensor copy that wrote these chunks."""
        self._seen[self._cells(chunk, size)] |= np.bitwise_or.reduce(np.uint64(1) << warps.astype(np.uint64))

    def begin_read(self, block: Array, chunk: Array, size: int, warps: Array) -> None:
        """Record that a product or tensor copy of warps (chunks, count) starts to read by the asynchronous proxy."""
        cells, since = self._cells(chunk, size), self._barrier[block][:, None]
        self._refuse(self._pending[cells], cells, "asynchronous read of bytes that a copy is still writing")
        written, writer = self._written[cells], self._writer[cells]
        for warp in warps.T[:, :, None]:
            other = self._from_another(cells, since, warp)
            self._refuse(other, cells, "race: asynchronous read of what another warp just stored")
        stored = writer != TENSOR
        fenced = self._fence[block[:, None], np.maximum(writer, 0)] > written
        for warp in warps.T:
            fenced |= (self._fence[block, warp] > written.T).T
        unseen = stored & (written > 0) & ~fenced
        self._refuse(unseen, cells, "asynchronous read of what was stored with no fence of its proxy since")
        self._reader[cells], self._read[cells] = SEVERAL, self.now

    def end_read(self, chunk: Array, size: int, began: int) -> None:
        """Check, after the wait, that nobody wrote in the meantime."""
        cells = self._cells(chunk, size)
        overwritten = self._pending[cells] | (self._written[cells] > began)
        self._refuse(overwritten, cells, "written over what was still being read asynchronously")
        self._reader[cells], self._read[cells] = SEVERAL, self.now

    def _from_another(self, cells: Array, since: Array, warp: Array) -> Array:
        """Return the cells written since the barrier by another warp, or by a tensor copy not waited for."""
        other: Array = (self._written[cells] > since) & (self._writer[cells] != warp)
        if (landed := other & (self._writer[cells] == TENSOR)).any():
            bit = np.broadcast_to(np.uint64(1) << warp.astype(np.uint64), cells.shape)
            other &= ~(landed & (self._seen[cells] & bit != 0))
        return other

    @staticmethod
    def _cells(chunk: Array, size: int) -> Array:
        """Return the cells (chunks, cells per chunk)."""
        cells: Array = (chunk * size)[:, None] // CELL + np.arange(max(1, size // CELL))
        return cells

    def _refuse(self, wrong: Array, cells: Array, why: str) -> None:
        if wrong.any():
            raise EmulationError(f"{why}, at shared address {int(cells[wrong][0]) * CELL % self._stride:#x}")
