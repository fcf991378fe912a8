"""A kernel launch as data, to be run on a device or compiled ahead of time without one."""

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
    """Make launches built inside the block programmatic dependent ones."""
    before = _programmatic.set(on)
    try:
        yield
    finally:
        _programmatic.reset(before)


def is_programmatic() -> bool:
    """Return whether launches built now are programmatic dependent ones."""
    return _programmatic.get()


SMALL_TILE = tl.constexpr(2048)  # a tile of up to so many elements has registers left for the inputs of its epilogue


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """With PDL, wait until all earlier kernels have finished, and let the next one start.

    Every kernel calls this before it reads the output of a launch or writes anything, and never in a loop: Triton would
    move pipelined loads before it. Weights are not outputs of a launch and may be read or prefetched earlier. Every
    program must wait, even if it reads nothing: otherwise a later kernel could overtake an earlier one.
    """
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch_rows(ptr, block, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Prefetch a block of ROWS rows of a contiguous (HEIGHT, WIDTH) matrix into the L2 cache, line by line."""
    line: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # elements in 128 bytes
    lines: tl.constexpr = (ROWS * WIDTH + line - 1) // line
    at = tl.minimum(tl.arange(0, triton.next_power_of_2(lines)) * line, ROWS * WIDTH - 1)
    address = ptr + tl.minimum(block * (ROWS * WIDTH) + at, HEIGHT * WIDTH - 1)
    prefetch: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(prefetch, "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


def _capability() -> int:
    """Return the compute capability of the current device; without a GPU, as in the interpreter, 90."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


@dataclass(frozen=True)
class Launch:
    """The arguments of `kernel[grid](**arguments)`.

    Attributes:
        kernel: a `triton.jit` function that calls `wait_for_inputs(PDL)`.
        grid: the number of programs along up to three axes.
        arguments: tensors, tensor descriptors and numbers by the kernel's argument names (None for absent ones);
            constexpr arguments are compiled in.
        num_warps, num_stages: Triton's.
        maxnreg: the most registers per thread on Hopper, so that more programs share a multiprocessor; 0: the
            compiler's choice. Ignored on other GPUs, where it would cause spills.
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
        """Options of the compiler. Triton 3.10 fuses multiply and add only with `enable_fp_fusion`."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        options |= {"maxnreg": self.maxnreg} if self.maxnreg else {}
        return options | ({"launch_pdl": True} if self.arguments["PDL"] else {})

    def options_for(self, capability: int) -> dict[str, int | bool]:
        """Return the options for a compute capability: 90 is 9.0."""
        return {name: value for name, value in self.options.items() if name != "maxnreg" or capability // 10 == 9}

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options_for(_capability()))


_collected: ContextVar[list[Launch] | None] = ContextVar("collected", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[list[Launch]]:
    """Collect the launches of the launchers called inside the block, in order, instead of running them.

    The launchers return their output tensors uninitialised. With tensors on the device "meta" nothing is allocated.
    """
    launches: list[Launch] = []
    before = _collected.set(launches)
    try:
        yield launches
    finally:
        _collected.reset(before)


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run launches in order on the device's current stream, or collect them; skip those without programs."""
    if (collected := _collected.get()) is not None:
        collected.extend(launches)
        return
    with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton launches on the current device
        for launch in launches:
            if all(launch.grid):
                launch.run()
