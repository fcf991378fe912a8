"""Several processes that train one model together, as torchrun starts them; alone, all of this does nothing."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed

from dvit_infer.errors import InputError

PATIENCE = datetime.timedelta(hours=2)  # a process may write a file, or wait for a slow disk, while others wait for it


@dataclass(frozen=True)
class World:
    """Attributes: rank, 0 to size - 1, over all machines; local_rank, of local_size on this one, which is its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        if self.size == 1:
            return values
        values = values.clone()
        distributed.all_reduce(values)
        return values


def world_of_environment() -> World:
    """Which process this is, by the variables that torchrun sets.

    Raises:
        InputError: they make no sense.
    """
    try:
        rank, size, local_rank, local_size = (int(os.environ.get(*variable)) for variable in _VARIABLES.items())
    except ValueError:
        raise InputError(f"{', '.join(_VARIABLES)}: whole numbers are expected, as torchrun sets them") from None
    if size < 1 or not 0 <= rank < size:
        raise InputError(f"RANK: {rank} is no process of WORLD_SIZE {size}")
    return World(rank, size, local_rank, max(1, local_size))


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@contextlib.contextmanager
def joined(world: World, device: torch.device) -> Iterator[None]:
    """The processes find each other for the length of the block."""
    if world.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(f"WORLD_SIZE: {world.size} processes cannot find each other: {error}") from None
    try:
        yield
    except RuntimeError as error:  # gloo has no kind of its own
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise InputError("WORLD_SIZE: another process has ended; what it said tells why") from None
        raise
    finally:
        distributed.destroy_process_group()
