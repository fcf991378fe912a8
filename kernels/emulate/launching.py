"""Run a Launch of CPU tensors: compile it for a GPU and emulate it."""

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
from triton.tools.tensor_descriptor import TensorDescriptor

from emulate.errors import EmulationError
from emulate.machine import Machine
from emulate.memory import GlobalMemory
from emulate.ptx import Program, parse
from emulate.schedule import Schedule
from emulate.tensors import TensorMap
from emulate.values import Array

# Arguments that each kernel may store to; all others are read-only.
OUTPUTS = {
    "_layer_norm_kernel": ("y_ptr",),
    "_row_stats_kernel": ("stats_ptr",),
    "_linear_kernel": ("y_ptr", "y_stats_ptr"),
    "_linear_tma_kernel": ("y_ptr", "y_stats_ptr"),
    "_project_kernel": ("hidden_ptr", "sums_ptr"),
    "_score_kernel": ("score_ptr",),
    "_select_kernel": ("kept_ptr", "index_ptr"),
    "_match_tokens_kernel": ("best_ptr", "match_ptr"),
    "_merge_tokens_kernel": ("merged_ptr", "merged_sizes_ptr", "rows_ptr", "stats_ptr"),
    "_keep_tokens_kernel": ("kept_ptr", "index_ptr", "stats_ptr"),
    "_attention_kernel": ("out_ptr", "signal_ptr"),
    "_attention_online_kernel": ("out_ptr", "signal_ptr"),
    "_patch_embedding_kernel": ("out_ptr",),
    "_order_kernel": ("order_ptr",),
    "_routed_fc1_kernel": ("hidden_ptr",),
    "_routed_add_kernel": ("y_ptr", "y_stats_ptr"),
}


@dataclass(frozen=True)
class Compiled:
    """A launch compiled by Triton: the kernel's PTX, and bytes of shared memory per block."""

    ptx: str
    shared: int
    maps: tuple[dict[str, Any], ...]  # block, element size and swizzle of every tensor descriptor


_compiled: dict[tuple[str, ...], Compiled] = {}
_programs: dict[str, Program] = {}


def compiled_for(launch: Launch, capability: int) -> Compiled:
    """Compile the launch for a compute capability, 80 or 90, as Triton does at run time."""
    source = _source(launch)
    options = launch.options_for(capability)
    key = source.hash(), str(capability), str(options)
    if key not in _compiled:
        target = GPUTarget("cuda", capability, 32)
        kernel = triton.compile(source, target=target, options=options)
        maps = tuple(getattr(kernel.metadata, "tensordesc_meta", None) or ())
        _compiled[key] = Compiled(kernel.asm["ptx"], kernel.metadata.shared, maps)
    return _compiled[key]


def _source(launch: Launch) -> ASTSource:
    """Return the same as `aot.source`, but with the tensors' true alignment; there all are aligned."""
    source = aot.source(launch)
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor) and value.storage_offset() * value.element_size() % 16:
            source.attrs.pop((i,))
    return source


def run(
    launch: Launch, capability: int = 80, order: str = "together", early_copies: bool = False, ptx: str | None = None
) -> int:
    """Execute a launch, write the results into its tensors and return the number of executed instructions.

    Args:
        launch: a launch with CPU tensors.
        capability: the compute capability to compile for, 80 or 90.
        order: the order of warps, one of `schedule.ORDERS`. A correct kernel does not depend on it.
        early_copies: asynchronous copies land when issued instead of when waited for. A correct kernel does not
            depend on it.
        ptx: PTX to run instead of the compiled one.

    Raises:
        EmulationError: the kernel makes an invalid access, races, deadlocks, or has an unknown instruction.
    """
    kernel = compiled_for(launch, capability)
    text = ptx or kernel.ptx
    program = _programs.get(text) or _programs.setdefault(text, parse(text))
    memory = GlobalMemory()
    addresses, written = _place(launch, memory)
    values = _arguments(launch, addresses, kernel.maps)
    # Triton adds pointers to global and profiling scratch memory, which these kernels do not use.
    if len(program.parameters) != len(values) + 2:
        raise EmulationError(f"{program.name}: {len(program.parameters)} parameters for {len(values)} arguments")
    parameters = dict(zip(program.parameters, [*values, 0, 0], strict=True))
    machine = Machine(program, launch.grid, 32 * launch.num_warps, memory, kernel.shared, parameters, early_copies)
    schedule = Schedule(machine, order)
    schedule.run()
    for data, address in written:
        data[:] = memory.bytes_at(address, len(data))
    return schedule.steps


def _tensor(value: Any) -> torch.Tensor | None:
    """Return the tensor of an argument: a tensor or a tensor descriptor."""
    value = value.base if isinstance(value, TensorDescriptor) else value
    return value if isinstance(value, torch.Tensor) else None


def _place(launch: Launch, memory: GlobalMemory) -> tuple[dict[int, int], list[tuple[Array, int]]]:
    """Copy the tensors' storages into memory; return their addresses, and the outputs' bytes and addresses."""
    outputs = OUTPUTS.get(launch.kernel.__name__)
    if outputs is None:
        raise EmulationError(f"{launch.kernel.__name__}: emulate/launching.py does not say what it stores to")
    storages: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in launch.arguments.items():
        if (tensor := _tensor(value)) is not None:
            storages.setdefault(_key(tensor), {})[name] = tensor
    addresses, written = {}, []
    for key, tensors in storages.items():
        data = _bytes_of(next(iter(tensors.values())))
        readable, writable = np.zeros(len(data), np.bool_), np.zeros(len(data), np.bool_)
        for name, tensor in tensors.items():
            _mark(readable, tensor)
            if name in outputs:
                _mark(writable, tensor)
        addresses[key] = memory.add(data, list(tensors), readable, writable)
        if writable.any():
            written.append((data, addresses[key]))
    memory.seal()
    return addresses, written


def _arguments(launch: Launch, addresses: dict[int, int], maps: tuple[dict[str, Any], ...]) -> list[Any]:
    """Return the kernel's parameters: a descriptor becomes a map, the sizes and the strides."""
    signature, described = aot.source(launch).signature, iter(maps)
    found: list[Any] = []
    for parameter in launch.kernel.params:
        value: Any = launch.arguments[parameter.name]
        kind, tensor = signature[parameter.name], _tensor(value)
        if kind == "constexpr":
            continue
        if tensor is None:
            found.append(struct.unpack("<I", struct.pack("<f", value))[0] if kind == "fp32" else int(value))
            continue
        address = addresses[_key(tensor)] + int(tensor.storage_offset()) * tensor.element_size()
        if isinstance(value, TensorDescriptor):
            found += [_map(value, address, next(described)), *value.shape, *value.strides]
        else:
            found.append(address)
    return found


def _map(descriptor: TensorDescriptor, address: int, given: dict[str, Any]) -> TensorMap:
    if len(descriptor.shape) != 2 or descriptor.strides[1] != 1 or descriptor.padding != "zero":
        raise EmulationError("of tensor descriptors only those of matrices, padded with zeros, are emulated")
    (rows, columns), (block_rows, block_columns) = descriptor.shape, given["block_size"]
    swizzled = {0: 0, 1: 32, 2: 64, 3: 128}[given["swizzle"]]  # CUtensorMapSwizzle
    stride, block = descriptor.strides[0], (block_rows, block_columns)
    return TensorMap(address, (rows, columns), stride, block, given["elem_size"], swizzled)


def _key(tensor: torch.Tensor) -> int:
    """Return a key that is equal for tensors sharing memory; tensors without memory have their own."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or -id(tensor)


def _bytes_of(tensor: torch.Tensor) -> Array:
    """Return all bytes of a tensor's storage, as a view."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _mark(flags: Array, tensor: torch.Tensor) -> None:
    """Set the flags of the bytes that belong to an element of the tensor."""
    size = tensor.element_size()
    elements = np.array(tensor.storage_offset())
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements = elements[..., None] + np.arange(length) * stride
    flags[: len(flags) // size * size].reshape(-1, size)[elements.reshape(-1)] = True
