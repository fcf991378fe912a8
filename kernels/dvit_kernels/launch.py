"""A kernel launch as data: run at once on a device, or compiled ahead of time without one from the same arguments."""

from dataclasses import dataclass
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Launch:
    """What `kernel[grid](**arguments)` would run.

    Attributes:
        kernel: a `triton.jit` function.
        grid: programs, along up to three axes.
        arguments: tensors and numbers by the kernel's own argument names; its constexpr ones are compiled in.
        num_warps, num_stages: as Triton takes them.
    """

    kernel: Any  # Triton's decorator has no types
    grid: tuple[int, ...]
    arguments: dict[str, torch.Tensor | int | float]
    num_warps: int
    num_stages: int

    @classmethod
    def of(
        cls,
        kernel: Any,
        grid: tuple[int, ...],
        *,
        num_warps: int,
        num_stages: int,
        **arguments: torch.Tensor | int | float,
    ) -> Self:
        return cls(kernel, grid, arguments, num_warps, num_stages)

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the compiler. Triton 3.10 will not fuse multiply and add unless told to."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)
