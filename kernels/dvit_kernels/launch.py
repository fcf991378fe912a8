"""A kernel launch as data: run at once on a device, or compiled ahead of time without one from the same arguments."""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from triton.tools.tensor_descriptor import TensorDescriptor

# Programmatic dependent launch: a kernel may start while the one before it on the stream drains (compute capability 9.0
# and later).
_programmatic = ContextVar("programmatic", default=False)


@contextlib.contextmanager
def programmatic_launches(on: bool) -> Iterator[None]:
    """Launches built inside are programmatic dependent ones, where their kernels can be."""
    before = _programmatic.set(on)
    try:
        yield
    finally:
        _programmatic.reset(before)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """First in every kernel: with PDL, wait until all kernels before have finished, and let the next one start.

    Every program waits, whether it reads or not: one that did not could let a later kernel past an earlier one.
    """
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@dataclass(frozen=True)
class Launch:
    """What `kernel[grid](**arguments)` would run.

    Attributes:
        kernel: a `triton.jit` function that begins with `wait_for_inputs(PDL)`.
        grid: programs, along up to three axes.
        arguments: tensors, descriptors of tensors and numbers by the kernel's own argument names (None where it takes
            none); its constexpr ones are compiled in.
        num_warps, num_stages: as Triton takes them.
        maxnreg: registers a thread at most, so that more programs share a multiprocessor; 0: the compiler's choice.
    """

    kernel: Any  # Triton's decorator has no types
    grid: tuple[int, ...]
    arguments: dict[str, torch.Tensor | TensorDescriptor | int | float | str | None]
    num_warps: int
    num_stages: int
    maxnreg: int = 0

    @classmethod
    def of(
        cls,
        kernel: Any,
        grid: tuple[int, ...],
        *,
        num_warps: int,
        num_stages: int,
        maxnreg: int = 0,
        **arguments: torch.Tensor | TensorDescriptor | int | float | str | None,
    ) -> Self:
        return cls(kernel, grid, arguments | {"PDL": _programmatic.get()}, num_warps, num_stages, maxnreg)

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the compiler. Triton 3.10 will not fuse multiply and add unless told to."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        options |= {"maxnreg": self.maxnreg} if self.maxnreg else {}
        return options | ({"launch_pdl": True} if self.arguments["PDL"] else {})

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run them in order on the device's current stream; those without programs are nothing to run."""
    with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton launches on the current device
        for launch in launches:
            if all(launch.grid):
                launch.run()
