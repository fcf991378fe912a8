"""Windows of a map: which positions are in each, and which of these are neighbours only by a shift."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

CUT = -100.0  # added to scores of positions that a cut separates, as in Swin's own code


@dataclass(frozen=True)
class Windows:
    """Square windows that cover a map, perhaps shifted and padded.

    Shifted by s, the map is rolled by s positions up and to the left. The last windows down and across then hold
    positions of both ends of the map: they are cut, and each part attends to itself.

    Attributes:
        map: height and width.
        side: positions per side of a window.
        shift: s; 0: they are not shifted.
        pads: whether a map that is no multiple of the window is padded after it is rolled, or before; "": it is one.
    """

    map: tuple[int, int]
    side: int
    shift: int = 0
    pads: Literal["", "after_roll", "before_roll"] = ""

    @property
    def positions(self) -> int:
        """The number of positions of a window."""
        return self.side * self.side

    @property
    def grid(self) -> tuple[int, int]:
        """The number of windows down and across."""
        return -(-self.map[0] // self.side), -(-self.map[1] // self.side)

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def is_padded(self) -> bool:
        return bool(self.map[0] % self.side or self.map[1] % self.side)

    @functools.cached_property
    def kinds(self) -> tuple[tuple[int, int], ...]:
        """Runs of windows that are cut alike, in the order of `index`: (kind, number).

        Kind 0 is whole, 1 cut across, 2 down, 3 both.
        """
        rows, columns = self.grid
        if not self.shift:
            return ((0, rows * columns),)
        runs = ((rows - 1) * (columns - 1), rows - 1, columns - 1, 1)
        return tuple((kind, run) for kind, run in enumerate(runs) if run)

    @functools.cached_property
    def index(self) -> torch.Tensor:
        """The positions (windows, M) of the map in each window, row by row; H * W where it is padded.

        Windows that are cut alike are together.
        """
        (rows, columns), (height, width), side = self.grid, self.map, self.side
        down, across = (self._axis(count * side, size) for count, size in ((rows, height), (columns, width)))
        place = down[:, None] * width + across
        place = torch.where((down[:, None] < 0) | (across < 0), height * width, place)
        place = place.view(rows, side, columns, side).transpose(1, 2)
        if not self.shift:
            return place.reshape(-1, self.positions)
        parts = place[:-1, :-1], place[:-1, -1:], place[-1:, :-1], place[-1:, -1:]
        return torch.cat([part.reshape(-1, self.positions) for part in parts])

    def _axis(self, padded: int, size: int) -> torch.Tensor:
        """Return where the positions along one axis of the rolled and padded map come from; -1: they are padded."""
        at = torch.arange(padded, device="cpu")
        if self.pads == "before_roll":
            at = (at + self.shift) % padded
            return torch.where(at < size, at, -1)
        return torch.where(at < size, (at + self.shift) % size, -1)

    @functools.cached_property
    def inverse(self) -> torch.Tensor:
        """For every position of the map, (H * W,), its place in `index` flattened."""
        return self.index.flatten().argsort(stable=True)[: self.map[0] * self.map[1]]

    def mask(self, kind: int) -> torch.Tensor | None:
        """Return what is added to the scores of windows cut so, (M, M) float32; None: nothing."""
        if not kind:
            return None
        at = (torch.arange(self.side, device="cpu") >= self.side - self.shift).int()
        part = (at[:, None] * (2 if kind & 2 else 0) + at * (kind & 1)).flatten()
        return (part[:, None] != part).float() * CUT

    def biases(self, bias: torch.Tensor) -> torch.Tensor:
        """Return what is added to scores for each run of `kinds`, (runs, heads, M, M), by the bias (heads, M, M)."""
        masks = [self.mask(kind) for kind, _ in self.kinds]
        return torch.stack([bias if mask is None else bias + mask.to(bias) for mask in masks])
