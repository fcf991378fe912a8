"""Read a checkpoint file into a state dict and metadata; nothing in the file is trusted and nothing in it runs."""

import argparse
import re
import threading
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dvit_infer.errors import InputError
from dvit_infer.images.tensors import is_plain
from dvit_infer.models.beside import read_beside
from dvit_infer.models.header import HEADER_KEY, WEIGHT_SETS, read_header
from dvit_infer.utils.files import check_name

PREFIXES = ("module.", "backbone.", "_orig_mod.")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COUNTERS = (torch.int64, torch.int32, *_DTYPES)  # BatchNorm's num_batches_tracked, which is not used
_LOADING = threading.Lock()  # the classes that torch.load accepts are a setting of the whole process
_GAMMA = re.compile(r"^(blocks\.\d+)\.gamma_([12])$")  # layer scale, as DeiT III calls what timm calls ls1 and ls2
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


@dataclass
class Checkpoint:
    """Weights under their official names, and the metadata of the file."""

    name: str  # for messages: the path, or 'state dict'
    state: dict[str, torch.Tensor]
    weights: str | None = None  # the set that was taken; None: the file holds a bare state dict
    other_sets: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)  # the trainer's args
    header: str | None = None  # the text under `HEADER_KEY` of a saved engine
    beside: dict[str, Any] = field(default_factory=dict)  # JSON files in the file's folder (`read_beside`)

    @property
    def is_saved_engine(self) -> bool:
        return self.header is not None

    def params(self, dense: bool) -> int:
        """Return the number of weights: without the predictors if `dense`, and without BatchNorm's statistics."""
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        weights = {key: w.numel() for key, w in self.state.items() if not key.endswith(buffers)}
        return sum(n for key, n in weights.items() if not (dense and key.startswith("score_predictor.")))


def read_checkpoint(source: str | Path | Mapping[str, Any], weights: str | None = None) -> Checkpoint:
    """Read a `.pth`, `.pth.tar`, `.pt` or `.safetensors` file (distinguished by content), or take a loaded state dict.

    Args:
        source: path, or a state dict, bare or inside a training checkpoint.
        weights: which of several sets of weights to take; by default the first of `WEIGHT_SETS` in the file.

    Raises:
        InputError: the file cannot be read, holds no weights, would run code, or holds a tensor that is not plain,
            dense, floating-point and finite.
    """
    if isinstance(source, Mapping):
        return _take_weights("state dict", dict(source), weights)
    if not isinstance(source, str | Path):
        raise InputError(f"a path or a state dict is expected, not a {type(source).__name__}")
    path = check_name(source)
    name = str(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(
                f"{name}: is {'a folder' if path.is_dir() else 'no regular file'}; a checkpoint is expected"
            )
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from None
    if not head:
        raise InputError(f"{name}: the file is empty")
    # A safetensors header may by chance begin with a pickle's first byte, so byte 8 decides first.
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        tensors, header = _load_safetensors(path)
        if header is not None:
            read_header(name, header)  # a damaged one is named before a damaged tensor
        checkpoint = _take_weights(name, tensors, weights)
        checkpoint.header = header
        checkpoint.beside = read_beside(path.parent)
        return checkpoint
    if head.startswith((_ZIP, _PICKLE)):
        checkpoint = _take_weights(name, load_torch(path, head.startswith(_ZIP)), weights)
        checkpoint.beside = read_beside(path.parent)
        return checkpoint
    if path.suffix.lower() == ".onnx":
        raise InputError(f"{name}: is ONNX, no checkpoint; dvit-bench, dvit-eval, dvit-predict and dvit-viz run it")
    raise InputError(f"{name}: is no checkpoint (neither a torch file nor safetensors)")


def _harmless() -> list[Any]:
    """Return the only classes that a pickle may name beside torch's own: argparse's Namespace and numpy scalars."""
    scalar = np.float64(0).__reduce__()[0]  # numpy's constructor of scalars, under its old and new names
    numeric = "?bhilqBHILQefd"
    return [
        argparse.Namespace,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *{type(np.dtype(code)) for code in numeric},
    ]


def load_torch(path: Path, is_zip: bool) -> Any:
    """Read a file of torch.save onto the CPU without running anything in it.

    Raises:
        InputError: it is damaged, or names a class that is not harmless.
    """
    harmless = _harmless()
    mmap = is_zip and _check_zip(path)
    try:
        with _LOADING, torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an unusual pickle protocol; errors are reported below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged or hostile pickle can raise anything; the message names the file
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise  # not the file's fault
        raise InputError(f"{path}: {_why_not(str(error), is_zip)}") from None


def _check_zip(path: Path) -> bool:
    """Compare every record with its checksum, as torch does not; return whether the file may be memory-mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as record:
                    while info.CRC and record.read(1 << 22):  # all checksums are 0 if torch was set to write none
                        pass
            return all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    # RuntimeError is an encrypted record, NotImplementedError a compression that zipfile does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: truncated or damaged torch file ({_first_line(str(error))})") from None


def _why_not(message: str, is_zip: bool) -> str:
    """Return one line for a message of torch.load, which may have many."""
    if found := re.search(r"GLOBAL (\S+)", message):
        return f"refused: loading it would run {found.group(1)}; only plain weights are read, nothing was run"
    if "Unsupported operand" in message:
        return "refused: its pickle has instructions that plain weights do not need; nothing was run"
    if "TorchScript" in message:
        return "is a TorchScript archive; save the model's state_dict instead"
    if is_zip:
        return f"truncated or damaged torch file ({_first_line(message)})"
    return f"is no torch checkpoint, or is damaged ({_first_line(message)})"


def _first_line(message: str) -> str:
    line = re.split(r"[\n.] ?", message.strip() or "unreadable", maxsplit=1)[0]
    return line[:120]


def _load_safetensors(path: Path) -> tuple[dict[str, Any], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: damaged safetensors file ({_first_line(str(error))})") from None
    return tensors, metadata.get(HEADER_KEY)


def _take_weights(name: str, content: Any, weights: str | None) -> Checkpoint:
    """Find the state dict in a loaded object, strip the wrappers' prefixes and check every tensor."""
    if not isinstance(content, Mapping):
        raise InputError(f"{name}: holds a {type(content).__name__}, no state dict")
    sets = [key for key in WEIGHT_SETS if _has_tensors(content.get(key))]
    if weights is not None and weights not in sets:
        there = ", ".join(sets) if sets else "none: its weights are bare"
        raise InputError(f"{name}: weights={weights!r} is not in it; sets of weights there: {there}")
    chosen = weights or (sets[0] if sets else None)
    state = {} if chosen is None and not _has_tensors(content) else dict(content[chosen] if chosen else content)
    if not state:
        raise InputError(
            f"{name}: holds no state dict (looked for tensors at the top and under {', '.join(WEIGHT_SETS)})"
        )
    args = content.get("args") if chosen else None
    found = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    found = {key: content[key] for key in ("pretrained_cfg",) if chosen and key in content} | dict(found)
    clean: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        short = _GAMMA.sub(r"\1.ls\2.gamma", _without_prefixes(name, key))
        if short in clean:
            raise InputError(f"{name}: two tensors are called {short!r} once {', '.join(PREFIXES)} are stripped")
        clean[short] = _checked(name, key, value)
    others = tuple(key for key in sets if key != chosen)
    return Checkpoint(name, clean, chosen, others, found)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())


def _without_prefixes(name: str, key: Any) -> str:
    if not isinstance(key, str) or not key.isprintable() or not 0 < len(key) < 300:
        raise InputError(f"{name}: {str(key)[:40]!r} is no parameter name")
    short = str(key)
    while prefix := next((p for p in PREFIXES if short.startswith(p)), None):
        short = short.removeprefix(prefix)
    return short


def _checked(name: str, key: str, value: Any) -> torch.Tensor:
    """Return a copy of the tensor if it is plain, dense, floating-point (or a counter) and finite.

    It is a copy because the file may be overwritten in place, and the caller may resume training.
    """
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name}: {key} is a {type(value).__name__}, no tensor")
    if not is_plain(value):
        raise InputError(f"{name}: {key} is no plain dense tensor with data")
    tensor: torch.Tensor = value.detach()
    # With strides of zero, a few stored bytes can claim to be terabytes.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{name}: {key} claims shape {tuple(tensor.shape)}, more than the file holds for it")
    is_counter = key.endswith(("num_batches_tracked", "relative_position_index", "position_ids"))
    if tensor.dtype not in (_COUNTERS if is_counter else _DTYPES):
        raise InputError(f"{name}: {key} is {tensor.dtype}; float32, float64, float16 or bfloat16 is expected")
    tensor = tensor.cpu().clone(memory_format=torch.contiguous_format)
    if not is_counter and not torch.isfinite(tensor.float()).all():
        raise InputError(f"{name}: {key} has NaN or Inf in it, or is too large for float32")
    if key.endswith("running_var") and (tensor < 0).any():
        raise InputError(f"{name}: {key} has a negative variance in it")
    return tensor
