"""Races in shared memory: two warps at one place, one of them writing, with no barrier between them.

What one warp does counts as ordered. Every access leaves a time and a warp at each two bytes it touches; an access is
in a race if a conflicting one of another warp is later than the block's last barrier. Between issue and wait_group the
target of a cp.async belongs to nobody. None of this depends on the order in which warps happen to run.
"""

import numpy as np

from emulate.errors import EmulationError
from emulate.values import Array

CELL = 2  # bytes: Triton shares nothing narrower between warps
SEVERAL = -1  # warps have read it


class Races:
    def __init__(self, blocks: int, stride: int) -> None:
        cells = blocks * stride // CELL
        self.now = 1
        self._stride = stride
        self._barrier = np.zeros(blocks, np.int64)  # when each block was last all together
        self._written, self._read = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
        self._writer, self._reader = np.zeros(cells, np.int16), np.zeros(cells, np.int16)
        self._pending = np.zeros(cells, np.bool_)

    def barrier(self, blocks: Array) -> None:
        self._barrier[blocks] = self.now

    def load(self, block: Array, chunk: Array, size: int, warp: Array) -> None:
        cells, since, warp = self._cells(chunk, size), self._barrier[block][:, None], warp[:, None]
        self._refuse(self._pending[cells], cells, "load of bytes that a copy is still writing")
        other = (self._written[cells] > since) & (self._writer[cells] != warp)
        self._refuse(other, cells, "race: load of what another warp stored with no barrier between")
        reader = np.where((self._read[cells] > since) & (self._reader[cells] != warp), SEVERAL, warp)
        self._reader[cells] = reader
        self._reader[cells[self._reader[cells] != reader]] = SEVERAL  # warps that read it in one instruction
        self._read[cells] = self.now

    def store(self, block: Array, chunk: Array, size: int, warp: Array, landing: bool = False) -> None:
        """Of an instruction, or of a copy at the end of its wait."""
        cells, since, warp = self._cells(chunk, size), self._barrier[block][:, None], warp[:, None]
        if not landing:
            self._refuse(self._pending[cells], cells, "store over bytes that a copy is still writing")
        other = (self._written[cells] > since) & (self._writer[cells] != warp)
        self._refuse(other, cells, "race: store over what another warp stored with no barrier between")
        other = (self._read[cells] > since) & (self._reader[cells] != warp)
        self._refuse(other, cells, "race: store over what another warp loads with no barrier between")
        self._written[cells], self._writer[cells] = self.now, np.broadcast_to(warp, cells.shape)

    def begin_copy(self, block: Array, chunk: Array, size: int, warp: Array) -> None:
        self.store(block, chunk, size, warp)
        self._pending[self._cells(chunk, size)] = True

    def end_copy(self, block: Array, chunk: Array, size: int, warp: Array) -> None:
        self.store(block, chunk, size, warp, landing=True)
        self._pending[self._cells(chunk, size)] = False

    @staticmethod
    def _cells(chunk: Array, size: int) -> Array:
        """(lanes, cells of an access)."""
        return (chunk * size)[:, None] // CELL + np.arange(max(1, size // CELL))

    def _refuse(self, wrong: Array, cells: Array, why: str) -> None:
        if wrong.any():
            raise EmulationError(f"{why}, at shared address {int(cells[wrong][0]) * CELL % self._stride:#x}")
