"""The source of a model's weights, read again when they are needed: an engine keeps no second copy of them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import Checkpoint, read_checkpoint
from dvit_infer.models.containers import all_files


class WeightSource:
    """A file, a folder or index of shards, or a state dict, whose tensors are shared with the caller and not copied.

    Copies share it; a pickled one still names its file, but holds no state dict.

    Args:
        source: the path of a checkpoint or saved engine, or a state dict.
        weights: which of several sets of weights was taken; None: the first.
    """

    def __init__(self, source: str | Path | Mapping[str, Any], weights: str | None) -> None:
        self._weights = weights
        self._path = None if isinstance(source, Mapping) else Path(os.path.abspath(source))
        self._state = dict(source) if isinstance(source, Mapping) else None
        self._seen = self._identity()

    def __deepcopy__(self, memo: object) -> "WeightSource":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_state": None}

    def read(self) -> tuple[Checkpoint, bool]:
        """Return the checkpoint, and whether it cannot have changed since.

        Raises:
            InputError: it cannot be read any more.
        """
        source = self._path or self._state
        if source is None:
            raise InputError("the weights came from a state dict, which is not part of a pickled engine")
        unchanged = self._identity() == self._seen
        return read_checkpoint(source, self._weights), unchanged

    def _identity(self) -> object:
        if self._state is not None:
            return [_version(tensor) for part in (self._state, *self._state.values()) for tensor in _tensors(part)]
        try:
            found = [os.stat(file) for file in all_files(self._path or Path())]
        except (OSError, InputError):
            return None
        return [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found]


def _tensors(part: object) -> list[torch.Tensor]:
    values = part.values() if isinstance(part, Mapping) else ()
    return [value for value in values if isinstance(value, torch.Tensor)]


def _version(tensor: torch.Tensor) -> object:
    """Return a number that grows with every change in place; an inference tensor has none, and compares as changed."""
    return object() if tensor.is_inference() else tensor._version
