"""The file of a run: the trained model and, until the run is finished, the state needed to resume."""

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dvit_infer.errors import InputError
from dvit_infer.models.loading import load_torch
from dvit_infer.training.settings import MOST_EPOCHS, Settings
from dvit_infer.utils.files import atomic_write, write_error

KEY = "training"  # a finished file has no such key, but its args say under `run` which run it is of
# What runs of earlier versions did not say: how they were.
_BEFORE = {"new_head": False, "teacher": None, "ratio_weight": 2.0}
_NO_IDENTITY = ("classes", "run")  # facts in the args that do not identify a run; the images' digest covers the classes


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of weights, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def identity(
    settings: Settings, args: Mapping[str, Any], weights: Mapping[str, Any], images: str, torchvision: bool
) -> dict[str, Any]:
    """Return everything that must be equal for a run to be resumed as if it had not stopped.

    Args:
        weights: what the run begins with: `dense`, the weights' digest, and `new_head`, `teacher`.
    """
    model: dict[str, Any] = {name: value for name, value in args.items() if name != "dvit_infer"} | args["dvit_infer"]
    model = {name: value for name, value in model.items() if name not in _NO_IDENTITY}
    return asdict(settings) | model | dict(weights) | {"torchvision": torchvision, "data": images}


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
    """Return the content of a file whose run is unfinished; None if it is finished, or it is of another origin.

    Raises:
        InputError: It cannot be read, or is not a torch file.
    """
    content = _content(path)
    return content if isinstance(content.get(KEY), dict) else None


def resumable(path: str | Path) -> dict[str, Any] | None:
    """Return the content of a file to resume from, unfinished or finished; None: it is of another origin.

    A finished one gets a state under `KEY` too, in which `optimizer` is None: its file does not hold that.

    Raises:
        InputError: It cannot be read, or is not a torch file.
    """
    content = _content(path)
    if isinstance(content.get(KEY), dict):
        return content
    args = content.get("args")
    ours = vars(args).get("dvit_infer") if isinstance(args, argparse.Namespace) else None
    run = ours.get("run") if isinstance(ours, dict) else None
    if not isinstance(run, dict):
        return None
    state = {"identity": run, "epoch": content.get("epoch"), "step": 0, "student": None, "optimizer": None}
    return {**content, KEY: state}


def _content(path: str | Path) -> dict[str, Any]:
    """Return the content of a torch file; an empty dict if it is none of ours."""
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
    return content if isinstance(content, dict) else {}


def check_same(path: str | Path, state: Mapping[str, Any], expected: Mapping[str, Any]) -> int:
    """Return the file's number of epochs, which may be another one than expected.

    Raises:
        InputError: The file belongs to another run; the message names the first difference.
    """
    said = state.get("identity")
    epochs = said.get("epochs") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(epochs, int) or not 1 <= epochs <= MOST_EPOCHS:
        raise InputError(f"resume: {path}: is not a file of dvit-train")
    said = {**_BEFORE, **said}
    for name, value in expected.items():
        if name == "epochs" or (name in said and said[name] == value):
            continue
        if name == "dense":
            raise InputError(f"resume: {path}: was trained from another dense model")
        if name == "data":
            raise InputError(f"resume: {path}: was trained on other images than these")
        if name == "teacher":
            raise InputError(f"resume: {path}: was trained by another teacher")
        found = str(said.get(name, "unknown"))[:40]
        raise InputError(f"resume: {path}: was trained with {name} {found}, this run has {value}")
    return epochs
