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


def is_programmatic() -> bool:
    """Whether launches built here are."""
    return _programmatic.get()


SMALL_TILE = tl.constexpr(2048)  # elements of a tile of results, up to which what its epilogue reads fits beside it


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """In every kernel before it reads what a launch has made or writes anything, and never in a loop.

    With PDL: wait until all kernels before have finished, and let the next one start. Weights are no launch's work, so
    that they can be read, or asked for, before it. Every program waits, whether it reads or not: one that did not could
    let a later kernel past an earlier one. In a loop Triton would move pipelined loads before it.
    """
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch_rows(ptr, block, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Ask the L2 cache for a block of ROWS rows of a contiguous (HEIGHT, WIDTH) matrix: one run of memory, in lines."""
    line: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # elements in 128 bytes
    lines: tl.constexpr = (ROWS * WIDTH + line - 1) // line
    at = tl.minimum(tl.arange(0, triton.next_power_of_2(lines)) * line, ROWS * WIDTH - 1)
    address = ptr + tl.minimum(block * (ROWS * WIDTH) + at, HEIGHT * WIDTH - 1)
    prefetch: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(prefetch, "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


def _capability() -> int:
    """Of the current device; without one, as in the interpreter, the one that kernels are written for."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


@dataclass(frozen=True)
class Launch:
    """What `kernel[grid](**arguments)` would run.

    Attributes:
        kernel: a `triton.jit` function that calls `wait_for_inputs(PDL)`.
        grid: programs, along up to three axes.
        arguments: tensors, descriptors of tensors and numbers by the kernel's own argument names (None where it takes
            none); its constexpr ones are compiled in.
        num_warps, num_stages: as Triton takes them.
        maxnreg: registers a thread at most on Hopper, so that more programs share a multiprocessor; 0: the compiler's
            choice, as on other GPUs, whose compiler would spill others.
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

    def options_for(self, capability: int) -> dict[str, int | bool]:
        """The same for one GPU: 90 is compute capability 9.0."""
        return {name: value for name, value in self.options.items() if name != "maxnreg" or capability // 10 == 9}

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options_for(_capability()))


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run them in order on the device's current stream; those without programs are nothing to run."""
    with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton launches on the current device
        for launch in launches:
            if all(launch.grid):
                launch.run()
