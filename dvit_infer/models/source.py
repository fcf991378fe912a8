"""The source of a model's weights, read again when they are needed: an engine keeps no second copy of them."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import Checkpoint, read_checkpoint
from dvit_infer.models.containers import tensor_files
from dvit_infer.models.hub import is_hub_name, local_folder
from dvit_infer.models.loading import load
from dvit_infer.models.state_dicts import find_weights


class WeightSource:
    """A file, a folder or index of shards, or a state dict, whose tensors are shared with the caller and not copied.

    Of a module, its state dict.

    Copies share it; a pickled one still names its file, but holds no state dict.

    Args:
        source: the path of a checkpoint or saved engine, a model on the Hugging Face Hub, a state dict or a module.
        checkpoint: what was read from it.
    """

    def __init__(self, source: str | Path | Mapping[str, Any] | nn.Module, checkpoint: Checkpoint) -> None:
        self._path: str | None = None
        if isinstance(source, str | Path):
            self._path = str(source) if is_hub_name(source) else os.path.abspath(source)
        self._state: dict[str, torch.Tensor] | None = checkpoint.origin
        self._weights = checkpoint.weights
        self._digest = _digest(checkpoint)

    @property
    def digest(self) -> bytes:
        """A digest of the weights and their names."""
        return self._digest

    @property
    def is_file(self) -> bool:
        """Whether it can be read again without the caller's own tensors."""
        return self._path is not None

    def __deepcopy__(self, memo: object) -> "WeightSource":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_state": None}

    def read(self) -> Checkpoint:
        """Read it again.

        Raises:
            InputError: it cannot be read any more, or holds other weights than before.
        """
        if self._state is not None:
            checkpoint = read_checkpoint(self._state)
        elif self._path is not None:
            checkpoint = read_checkpoint(self._path, self._weights)
        else:
            raise InputError("the weights came from a state dict, which is not part of a pickled engine")
        if _digest(checkpoint) != self._digest:
            raise InputError(f"{checkpoint.name}: has changed since the engine was made of it; convert it again")
        return checkpoint

    def tensors_in_file(self) -> dict[str, torch.Tensor]:
        """Return the tensors by their owner's names, as they are in the file or the caller's state dict."""
        if self._state is not None or self._path is None:
            return dict(self._state or {})
        path = local_folder(self._path) if is_hub_name(self._path) else self._path
        found: dict[str, torch.Tensor] = {}
        for file, keys in tensor_files(Path(path)).items():
            found |= find_weights(str(file), load(file, keys).content, self._weights).state
        return found


def _digest(checkpoint: Checkpoint) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in checkpoint.content():
        digest.update(part)
    return digest.digest()
