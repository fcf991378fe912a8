"""Memory: whether an error means that there was too little, how much is free, and giving it back."""

import contextlib
import ctypes

import torch

from dvit_infer.errors import InputError
from dvit_infer.utils.devices import free_memory


def is_allocation_failure(error: BaseException) -> bool:
    """Return whether memory ran out, on any device: allocators of several libraries raise errors of their own kinds."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error)


def check_batch_fits(batch: int, needed: int) -> None:
    """Raise InputError if a batch, which needs so many bytes, would not fit in main memory.

    Linux would grant the allocation, and kill some process once it is used; a GPU says so itself.
    """
    free = free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise InputError(
            f"batch: {batch} images do not fit in memory: about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are "
            "free; use a smaller batch"
        )


def return_freed() -> None:
    """Give the system memory that was freed and that the C library keeps; with another one than glibc, do nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
