"""Memory: whether an error means that there was too little, and how much is free."""

import torch


def is_allocation_failure(error: BaseException) -> bool:
    """Return whether memory ran out, on any device: allocators of several libraries raise errors of their own kinds."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error)
