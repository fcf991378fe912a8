"""Training by several processes, started by torchrun; with one process all of this does nothing."""

import atexit
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed

from dvit_infer.errors import InputError

PATIENCE = datetime.timedelta(hours=2)  # other processes wait while one writes a file or reads a slow disk


@dataclass(frozen=True)
class World:
    """This process: `rank` of `size` over all machines; `local_rank` of `local_size` on this one, also its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        if self.size == 1:
            return values
        values = values.clone()
        distributed.all_reduce(values)
        return values


def world_of_environment() -> World:
    """Return this process, by the environment variables that torchrun sets.

    Raises:
        InputError: They are inconsistent.
    """
    try:
        rank, size, local_rank, local_size = (int(os.environ.get(*variable)) for variable in _VARIABLES.items())
    except ValueError:
        raise InputError(f"{', '.join(_VARIABLES)}: whole numbers are expected, as torchrun sets them") from None
    if size < 1 or not 0 <= rank < size:
        raise InputError(f"RANK: {rank} is not a process of WORLD_SIZE {size}")
    return World(rank, size, local_rank, max(1, local_size))


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@contextlib.contextmanager
def joined(world: World, device: torch.device) -> Iterator[None]:
    """Connect the processes for the duration of the block."""
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
    except RuntimeError as error:  # gloo has no exception type of its own
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            _leave_without_waiting(error)
            raise InputError("WORLD_SIZE: another process has ended; see its output for the reason") from None
        raise
    finally:
        distributed.destroy_process_group()


_abandoned: list[RuntimeError] = []


def _leave_without_waiting(error: RuntimeError) -> None:
    """Let the process exit although a peer is gone.

    A queued collective waits `PATIENCE` for that peer, and the process group's destructor waits for the collective. The
    frames of the error own the process group: keep them until the process exits, and exit without destructors.
    """
    _abandoned.append(error)
    atexit.register(_exit)


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)
