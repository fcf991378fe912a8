"""Devices, dtypes and micro-batch sizes."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from dvit_infer.errors import InputError

# Images that run through a model together (on a CPU, at least); larger batches are split, so that memory does not grow
# with them. The values for CUDA and MPS have not been measured.
MICRO_BATCH = {"cpu": 16, "cuda": 256, "mps": 64}
# Images x patches x channels of the best micro-batch on a CPU: 16 images of DeiT-S at 224 pixels. Measured on two
# threads of a Xeon (float32, interleaved): DeiT-S/0.7 with 4 images at 0.92 x the speed of 8, with 16 and 32 at 1.05 x;
# the digits model (64 patches, 96 channels) with 64 images at 1.24 x the speed of 16. On two threads of an EPYC: DeiT-T
# with 32 images at 1.01 x, DeiT-S at 128 pixels with 64 at 1.06 x.
_CPU_VALUES, _CPU_MOST = 16 * 196 * 384, 256
_Out = TypeVar("_Out")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a GPU ran out of memory: PyTorch's allocator raises its own class, the others a message."""
    words = (
        "CUDA error: out of memory",
        "[CUDA]: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "MPS backend out of memory",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(one in str(error) for one in words)


def free_memory(device: torch.device) -> int | None:
    """Return the free memory in bytes; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":  # of the memory that it shares with the processor, what Metal recommends to use at most
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was launched; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(call: Callable[[], _Out], device: torch.device) -> tuple[_Out, float]:
    """Return the result of a call and its wall time in seconds, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    out = call()
    synchronize(device)
    return out, time.perf_counter() - start


def micro_batch(device: torch.device, patches: int, channels: int) -> int:
    """Return how many images should run through a model together."""
    if device.type != "cpu":
        return MICRO_BATCH[device.type]
    return min(max(MICRO_BATCH["cpu"], _CPU_VALUES // (patches * channels)), _CPU_MOST)


def slug(name: str) -> str:
    """Turn a processor's name into a file name: 'NVIDIA H200' becomes h200, 'NVIDIA H100 80GB HBM3' h100.

    The memory size is dropped; the variant of the chip is not ('NVIDIA H100 PCIe' has fewer multiprocessors).
    """
    name = re.sub(r" \d+gb hbm\d\w?$|\(\w+\)", "", name.removeprefix("NVIDIA ").lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the requested device; by default CUDA if available, else the CPU. A GPU always gets its index.

    'mps', Apple's GPUs, runs plain PyTorch. It is never the default.

    Raises:
        InputError: the device does not exist.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device: {device!r} is not a device; cpu, cuda or mps is expected") from None
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type not in MICRO_BATCH:
        raise InputError(f"device: {resolved.type} is not supported; cpu, cuda and mps are")
    if resolved.type == "mps":
        if not torch.backends.mps.is_available():
            raise InputError(f"device: {device}: not available here; use cpu instead")
        if resolved.index:
            raise InputError(f"device: {device} does not exist on this machine; use mps instead")
        return torch.device("mps", 0)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {device} does not exist on this machine; use cpu instead")
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the requested dtype; by default bfloat16 on CUDA and float32 on a CPU.

    Raises:
        InputError: it is not one of `DTYPES`.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise InputError(f"dtype: {dtype} is not one of {', '.join(DTYPES)}; engines on CPUs take int8 too")
    return resolved


def is_int8(dtype: str | torch.dtype | None) -> bool:
    """Return whether linears are to be int8; all else is then what a CPU's default says."""
    return dtype in ("int8", torch.int8)
