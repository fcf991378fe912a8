"""Where and in what an engine runs."""

import re
from pathlib import Path

import torch

from dvit_infer.errors import InputError

# Images that go through a model together, on a CPU at least so many; larger batches are cut, so that memory does not
# grow with them. For CUDA nothing has been measured yet.
MICRO_BATCH = {"cpu": 16, "cuda": 256}
# Patches times channels of as many as are best on a CPU, 16 of DeiT-S at 224 pixels. Of DeiT-S/0.7 (two threads of a
# Xeon, float32, interleaved) 4 were 0.92 x as fast as 8, 16 and 32 1.05 x; of the digits model, 64 patches 96 wide, 64
# were 1.24 x as fast as 16; of DeiT-T 32 and of DeiT-S at 128 pixels 64, 1.01 x and 1.06 x (two threads of an EPYC).
_CPU_VALUES, _CPU_MOST = 16 * 196 * 384, 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had too little memory: PyTorch's allocator says so by its own kind, CUDA and cuBLAS in words."""
    words = "CUDA error: out of memory", "[CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(one in str(error) for one in words)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken without others giving theirs back; None where this system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def micro_batch(device: torch.device, patches: int, channels: int) -> int:
    """How many images are to go through a model together."""
    if device.type != "cpu":
        return MICRO_BATCH[device.type]
    return min(max(MICRO_BATCH["cpu"], _CPU_VALUES // (patches * channels)), _CPU_MOST)


def slug(name: str) -> str:
    """A processor's name as a file's: 'NVIDIA H200' becomes h200, 'NVIDIA H100 80GB HBM3' h100.

    A GPU's memory is not part of it; another form of the chip is ('NVIDIA H100 PCIe' has fewer multiprocessors).
    """
    name = re.sub(r" \d+gb hbm\d\w?$|\(\w+\)", "", name.removeprefix("NVIDIA ").lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; by default, CUDA if there is one. A CUDA device always with its index: it may not drift.

    Raises:
        InputError: there is no such device here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device: {device!r} is no device; cpu or cuda is expected") from None
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type not in MICRO_BATCH:
        raise InputError(f"device: {resolved.type} is not supported; cpu and cuda are")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {device} was asked for, and there is none here; cpu would do")
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; by default, bfloat16 on CUDA and float32 on a CPU.

    Raises:
        InputError: it is none of `DTYPES`.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise InputError(f"dtype: {dtype} is not one of {', '.join(DTYPES)}")
    return resolved
