"""Load one file of weights, whose format its content shows; nothing in it is trusted and nothing in it runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dvit_infer.errors import InputError
from dvit_infer.models.containers import describe
from dvit_infer.models.header import HEADER_KEY, read_header
from dvit_infer.models.npz_file import is_npz, read_npz
from dvit_infer.models.torch_file import first_line, read_torch

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


@dataclass(frozen=True)
class Loaded:
    """The content of one file; the header of a saved engine; the classes in it that are not known."""

    content: Any
    header: str | None = None
    skipped: tuple[str, ...] = ()


def load(path: Path, keys: frozenset[str] | None) -> Loaded:
    """Load one file; if an index says which keys are in a shard, check that they are."""
    loaded = _load_file(path)
    if keys is not None and (not isinstance(loaded.content, Mapping) or keys - loaded.content.keys()):
        raise InputError(f"{path}: is not the shard that its index describes: {min(keys)} is not in it")
    return loaded


def _load_file(path: Path) -> Loaded:
    name = str(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{name}: is no regular file; a checkpoint is expected")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise InputError(f"{name}: the file is empty")
    is_torch = head.startswith((_ZIP, _PICKLE))
    # A safetensors header may by chance begin with a pickle's first byte, so byte 8 decides first.
    is_safetensors = head[8:9] == b"{"
    if not is_torch and not is_safetensors and (what := describe(path, head)) is not None:
        raise InputError(f"{name}: {what}")
    if is_safetensors or (path.suffix == ".safetensors" and not is_torch):
        tensors, header = _load_safetensors(path)
        if header is not None:
            read_header(name, header)  # a damaged one is named before a damaged tensor
        return Loaded(tensors, header)
    if head.startswith(_ZIP) and is_npz(path):
        return Loaded(read_npz(path))
    if is_torch:
        content, skipped = read_torch(path, head.startswith(_ZIP))
        return Loaded(content, None, skipped)
    if path.suffix.lower() == ".onnx":
        raise InputError(f"{name}: is ONNX, no checkpoint; dvit-bench, dvit-eval, dvit-predict and dvit-viz run it")
    raise InputError(f"{name}: is no checkpoint (neither a torch file nor safetensors)")


def load_torch(path: Path, is_zip: bool) -> Any:
    """Return the content of a file of torch.save; see `read_torch`."""
    return read_torch(path, is_zip)[0]


def _load_safetensors(path: Path) -> tuple[dict[str, Any], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: damaged safetensors file ({first_line(str(error))})") from None
    return tensors, metadata.get(HEADER_KEY)
