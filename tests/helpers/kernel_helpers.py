"""What tests of kernels share: where they run, outputs inside buffers of sentinels, the measure of an error."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
import triton
from dvit_kernels.launch import Launch, collecting

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# For checks of schemas and of what is traced, where the dtype hardly matters.
ONE_DTYPE = [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.large) for dtype in DTYPES[1:])]
WHERE = [
    pytest.param("cpu", torch.float32, id="interpreter-float32", marks=pytest.mark.interpreter),
    # not bfloat16: the interpreter's dot is wrong for it
    pytest.param("cpu", torch.float16, id="interpreter-float16", marks=(pytest.mark.interpreter, pytest.mark.slow)),
    pytest.param("cuda", torch.float32, id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-float16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=pytest.mark.gpu),
]
# In place of these with --emulate: compiled for a GPU, executed on the CPU.
EMULATED = [
    pytest.param("cpu", dtype, id=f"sm{capability}-{str(dtype)[6:]}", marks=pytest.mark.emulated(capability))
    for capability in (80, 90)
    for dtype in (torch.bfloat16, torch.float16)
]
# And in float32, where tests ask for it: products from registers take long.
EMULATED_FLOAT32 = [pytest.param("cpu", torch.float32, id="sm80-float32", marks=pytest.mark.emulated(80))]
needs_loops = pytest.mark.skipif(
    not torch.cuda.is_available()
    and triton.__version__.startswith("3.6.")
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton 3.6's interpreter cannot loop up to a tensor under NumPy 2.4",
)
QUICK = pytest.mark.quick  # the shape of a kernel that `--emulate quick` runs
LARGE = pytest.mark.large  # a shape that takes the interpreter long
GUARD = 4096  # elements before and after every output
SENTINEL = -77


def collected(launcher: Callable[..., Any], *arguments: Any, **named: Any) -> list[Launch]:
    """What a launcher would run."""
    with collecting() as launches:
        launcher(*arguments, **named)
    return launches


def guarded(
    launches: list[Launch], names: Collection[str]
) -> tuple[list[Launch], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The launches with every output inside a larger buffer of sentinels; the outputs and the buffers by name."""
    outputs: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    for launch in launches:
        for name, tensor in launch.arguments.items():
            if name in names and name not in outputs and isinstance(tensor, torch.Tensor):
                buffers[name] = torch.full_like(tensor.new_empty(tensor.numel() + 2 * GUARD), SENTINEL)
                outputs[name] = buffers[name][GUARD:-GUARD].view(tensor.shape)
    return [dataclasses.replace(one, arguments=one.arguments | _of(one, outputs)) for one in launches], outputs, buffers


def _of(launch: Launch, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in launch.arguments}


def run_guarded(launches: list[Launch], names: Collection[str]) -> dict[str, torch.Tensor]:
    """Run the launches; nothing outside their outputs is written, everything inside is. The outputs by name."""
    launches, outputs, buffers = guarded(launches, names)
    for launch in launches:
        launch.run()
    for name, buffer in buffers.items():
        assert (buffer[:GUARD] == SENTINEL).all(), name
        assert (buffer[-GUARD:] == SENTINEL).all(), name
        assert (outputs[name] != SENTINEL).all(), name
    return outputs


def rms(error: torch.Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def check(got: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    """Assert that the error against float64 is at most twice that of plain PyTorch in the same dtype."""
    assert rms(got.cpu() - expected) <= 2 * rms(plain.cpu() - expected) + 1e-6


def assert_same_sums(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of summation.

    A view that is not aligned as its copy is loaded in a layout of its own, and rows are summed in the layout that they
    were loaded in: compiled, the last bits differ.
    """
    tolerance = 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
