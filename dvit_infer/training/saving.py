"""The file of a run: the trained model and, until the run is finished, the state needed to resume."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import load_torch
from dvit_infer.training.settings import Settings
from dvit_infer.utils.files import atomic_write, write_error

KEY = "training"  # a finished file has no such key


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of weights, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def identity(
    settings: Settings, args: Mapping[str, Any], teacher: nn.Module, images: str, torchvision: bool
) -> dict[str, Any]:
    """Return everything that must be equal for a run to be resumed as if it had not stopped."""
    model: dict[str, Any] = {name: value for name, value in args.items() if name != "dvit_infer"} | args["dvit_infer"]
    data = {"torchvision": torchvision, "data": images}
    return asdict(settings) | model | {"dense": digest(teacher.state_dict())} | data


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file atomically; on failure the old file remains.

    Raises:
        InputError: Writing failed, e.g. the disk is full.
    """
    with atomic_write(path, "out") as part:
        try:
            torch.save(dict(content), part)
        except RuntimeError as error:  # torch's writer raises this for a full disk, and does not say so
            raise write_error(part) or OSError(f"cannot be written ({str(error).splitlines()[0]})") from None


def unfinished(path: str | Path) -> dict[str, Any] | None:
    """Return the content of a file to resume from; None if its run is finished, or it is of another origin.

    Raises:
        InputError: It cannot be read, or is not a torch file.
    """
    file = Path(path)
    try:
        with file.open("rb") as opened:
            head = opened.read(4)
    except OSError as error:
        raise InputError(f"resume: {path}: {error.strerror or error}") from None
    if head != b"PK\x03\x04":
        raise InputError(f"resume: {path}: is not a file of dvit-train")
    try:
        content = load_torch(file, True)
    except InputError as error:
        raise InputError(f"resume: {error}") from None
    return content if isinstance(content, dict) and isinstance(content.get(KEY), dict) else None


def check_same(path: str | Path, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise InputError, naming the first difference, unless the file belongs to this run."""
    said = state.get("identity")
    if not isinstance(said, dict):
        raise InputError(f"resume: {path}: is not a file of dvit-train")
    for name, value in expected.items():
        if name in said and said[name] == value:
            continue
        if name == "dense":
            raise InputError(f"resume: {path}: was trained from another dense model")
        if name == "data":
            raise InputError(f"resume: {path}: was trained on other images than these")
        found = str(said.get(name, "unknown"))[:40]
        raise InputError(f"resume: {path}: was trained with {name} {found}, this run has {value}")
