"""Runs a Launch of CPU tensors: compiled for a GPU that is not there, executed here."""

import struct
from dataclasses import dataclass
from typing import Any

import aot
import numpy as np
import torch
import triton
from dvit_kernels.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from emulate.errors import EmulationError
from emulate.machine import Machine
from emulate.memory import GlobalMemory
from emulate.ptx import Program, parse
from emulate.schedule import Schedule
from emulate.values import Array

# What each kernel stores to; everything else it may only load.
OUTPUTS = {
    "_layer_norm_kernel": ("y_ptr",),
    "_row_stats_kernel": ("stats_ptr",),
    "_linear_kernel": ("y_ptr", "y_stats_ptr"),
    "_linear_tma_kernel": ("y_ptr", "y_stats_ptr"),
    "_project_kernel": ("hidden_ptr", "sums_ptr"),
    "_score_kernel": ("score_ptr",),
    "_select_kernel": ("kept_ptr", "index_ptr"),
    "_attention_kernel": ("out_ptr",),
    "_attention_online_kernel": ("out_ptr",),
    "_patch_embedding_kernel": ("out_ptr",),
}


@dataclass(frozen=True)
class Compiled:
    """What Triton made of a launch: the kernel's text, and bytes of shared memory of a block."""

    ptx: str
    shared: int


_compiled: dict[tuple[str, ...], Compiled] = {}
_programs: dict[str, Program] = {}


def compiled_for(launch: Launch, capability: int) -> Compiled:
    """The launch compiled for a compute capability, 80 or 90, as Triton would at run time."""
    source = _source(launch)
    key = source.hash(), str(capability), str(launch.options)
    if key not in _compiled:
        target = GPUTarget("cuda", capability, 32)
        kernel = triton.compile(source, target=target, options=launch.options)
        _compiled[key] = Compiled(kernel.asm["ptx"], kernel.metadata.shared)
    return _compiled[key]


def _source(launch: Launch) -> ASTSource:
    """As `aot.source`, where every tensor is aligned, but with the tensors' true alignment."""
    source = aot.source(launch)
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor) and value.storage_offset() * value.element_size() % 16:
            source.attrs.pop((i,))
    return source


def run(
    launch: Launch, capability: int = 80, order: str = "together", early_copies: bool = False, ptx: str | None = None
) -> int:
    """Execute a launch and leave its results in its tensors; the number of instructions executed.

    Args:
        launch: its tensors are on the CPU.
        capability: of the GPU that it is compiled for: 80 or 90.
        order: how warps take turns, one of `schedule.ORDERS`. A right kernel does not depend on it.
        early_copies: asynchronous copies land when issued instead of when waited for. Nor on that.
        ptx: another text in place of the compiled one, to see what becomes of it.

    Raises:
        EmulationError: the kernel accesses what it must not, races, cannot go on, or has an unknown instruction.
    """
    kernel = compiled_for(launch, capability)
    text = ptx or kernel.ptx
    program = _programs.get(text) or _programs.setdefault(text, parse(text))
    memory = GlobalMemory()
    values, written = _place(launch, memory)
    # Triton adds pointers to global and to profiling scratch memory, of which these kernels have none.
    if len(program.parameters) != len(values) + 2:
        raise EmulationError(f"{program.name}: {len(program.parameters)} parameters for {len(values)} arguments")
    parameters = dict(zip(program.parameters, [*values, 0, 0], strict=True))
    machine = Machine(program, launch.grid, 32 * launch.num_warps, memory, kernel.shared, parameters, early_copies)
    schedule = Schedule(machine, order)
    schedule.run()
    for data, address in written:
        data[:] = memory.bytes_at(address, len(data))
    return schedule.steps


def _place(launch: Launch, memory: GlobalMemory) -> tuple[list[Any], list[tuple[Array, int]]]:
    """Put the tensors' storages into memory. The kernel's arguments; bytes of outputs, and where they are."""
    outputs = OUTPUTS.get(launch.kernel.__name__)
    if outputs is None:
        raise EmulationError(f"{launch.kernel.__name__}: emulate/launching.py does not say what it stores to")
    signature = aot.source(launch).signature
    names = [p.name for p in launch.kernel.params if signature[p.name] != "constexpr"]
    storages: dict[int, list[str]] = {}
    for name in names:
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            storages.setdefault(_key(value), []).append(name)
    addresses: dict[int, int] = {}
    written = []
    for key, sharing in storages.items():
        tensors = {name: launch.arguments[name] for name in sharing}
        data = _bytes_of(next(iter(tensors.values())))
        readable, writable = (np.zeros(len(data), np.bool_) for _ in range(2))
        for name, tensor in tensors.items():
            _mark(readable, tensor)
            if name in outputs:
                _mark(writable, tensor)
        addresses[key] = memory.add(data, sharing, readable, writable)
        if writable.any():
            written.append((data, addresses[key]))
    memory.seal()
    return [_argument(launch.arguments[name], signature[name], addresses) for name in names], written


def _argument(value: Any, kind: str, addresses: dict[int, int]) -> int:
    if isinstance(value, torch.Tensor):
        return addresses[_key(value)] + value.storage_offset() * value.element_size()
    return struct.unpack("<I", struct.pack("<f", value))[0] if kind == "fp32" else int(value)


def _key(tensor: torch.Tensor) -> int:
    """The same for tensors that share memory; without memory every tensor has its own."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or -id(tensor)


def _bytes_of(tensor: torch.Tensor) -> Array:
    """All of a tensor's storage, shared with it."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _mark(flags: Array, tensor: torch.Tensor) -> None:
    """Set the flags of the bytes that belong to an element of the tensor."""
    size = tensor.element_size()
    elements = np.array(tensor.storage_offset())
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements = elements[..., None] + np.arange(length) * stride
    flags[: len(flags) // size * size].reshape(-1, size)[elements.reshape(-1)] = True
