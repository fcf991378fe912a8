"""Read a checkpoint file into a state dict and metadata; nothing in the file is trusted and nothing in it runs."""

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dvit_infer.errors import InputError
from dvit_infer.images.tensors import is_plain
from dvit_infer.models.beside import Facts, read_beside
from dvit_infer.models.containers import check_no_url, tensor_files
from dvit_infer.models.convnext import names as convnext
from dvit_infer.models.hub import is_hub_name, local_folder
from dvit_infer.models.kinds import check_kind, code_beside, is_timms
from dvit_infer.models.loading import load
from dvit_infer.models.modules import read_module
from dvit_infer.models.pickled import Inert
from dvit_infer.models.state_dicts import find_weights, official_names
from dvit_infer.models.swin import names as swin
from dvit_infer.models.vit import names as vit
from dvit_infer.models.vit.names import Plan, apply, unstacked
from dvit_infer.utils.files import check_name
from dvit_infer.utils.mapping import release_part

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WORTH_RELEASING = 1 << 20  # bytes
_PLANS = (swin.plan_of, convnext.plan_of, vit.plan_of)  # the first that knows the keys
_COUNTERS = (torch.int64, torch.int32, *_DTYPES)  # BatchNorm's num_batches_tracked, which is not used

Source = str | Path | Mapping[str, Any] | nn.Module  # what a checkpoint is read from


@dataclass
class Checkpoint:
    """Weights under their official names, and the metadata of the file."""

    name: str  # for messages: the path, or 'state dict'
    state: dict[str, torch.Tensor]
    weights: str | None = None  # the set that was taken; None: the file holds a bare state dict
    other_sets: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)  # the trainer's args
    header: str | None = None  # the text under `HEADER_KEY` of a saved engine
    origin: dict[str, torch.Tensor] | None = None  # of a state dict: the caller's own tensors, by the caller's names
    skipped: tuple[str, ...] = ()  # keys of counters, and classes of objects, that are not read
    beside: dict[str, Any] = field(default_factory=dict)  # JSON files in the file's folder (`read_beside`)
    owner: str | None = None  # whose names the file has; None: timm's, or unknown ones
    whose: str = ""  # the owner and the model in words
    renamed: str = "timm's"  # whose names they have become
    left_over: tuple[tuple[str, str], ...] = ()  # keys that are not used, together, and why
    implied: Facts = field(default_factory=dict)  # what follows from the names
    stated: Facts = field(default_factory=dict)  # what a module says of itself
    names_in_file: dict[str, str] = field(default_factory=dict)  # a name here -> the file's, or several of them

    def in_file(self, key: str) -> str:
        """Return how messages name a tensor: by its key in the file, with the name here where that is another."""
        theirs = self.names_in_file.get(key, key)
        return key if theirs == key or theirs.endswith(f".{key}") else f"{theirs} ({key} here)"

    @property
    def is_saved_engine(self) -> bool:
        return self.header is not None

    def shared(self) -> "Checkpoint":
        """Return one of the same tensors, which may be taken out of it."""
        return replace(self, state=dict(self.state))

    def content(self) -> Iterator[bytes | memoryview]:
        """Yield names, dtypes, shapes and values of all tensors, for digests."""
        for name, tensor in sorted(self.state.items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data

    def params(self, unused: str | None) -> int:
        """Return the number of weights, without keys of the pattern `unused` and without BatchNorm's statistics."""
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        weights = {key: w.numel() for key, w in self.state.items() if not key.endswith(buffers)}
        return sum(n for key, n in weights.items() if unused is None or not re.match(unused, key))


def read_checkpoint(source: Source, weights: str | None = None, or_bare: bool = False) -> Checkpoint:
    """Read weights and what is known beside them; those of a vision transformer get timm's names, whosever they were.

    Args:
        source: path of a `.pth`, `.pth.tar`, `.pt`, `.bin`, `.npz` or `.safetensors` file (distinguished by content),
            of the index of shards, or of the folder of either; `hf-hub:user/name` or `timm/name` on the Hugging Face
            Hub; a state dict, bare or inside a training checkpoint; or a module, whose tensors are taken.
        weights: which of several sets of weights to take, by its key, with dots between keys of nested dicts; by
            default the first of `WEIGHT_SETS` in the file, else the only one.
        or_bare: whether weights under no key do for `weights`.

    Raises:
        InputError: the file cannot be read, holds no weights, would run code, holds a tensor that is not plain, dense,
            floating-point and finite, is another model than a vision transformer by its config.json, or has a key that
            no such model of its owner has.
    """
    if isinstance(source, Mapping):
        return _take_weights("state dict", dict(source), weights, or_bare, shared=True)
    if isinstance(source, nn.Module):
        name, state, beside, stated = read_module(source)
        check_kind(name, beside)
        checkpoint = _take_weights(name, state, None, or_bare, beside, shared=True)
        checkpoint.stated = stated
        return checkpoint
    if not isinstance(source, str | Path):
        raise InputError(f"a path, a state dict or a module is expected, not a {type(source).__name__}")
    check_no_url(source)
    if is_hub_name(source):
        source = local_folder(str(source))
    is_folder = str(source).endswith(os.sep)
    if is_folder and not os.path.isdir(source):
        raise InputError(f"{source}: there is no such folder")
    path = check_name(str(source).rstrip(os.sep) if is_folder else source)
    try:
        folder = path if path.is_dir() else path.parent
        beside = read_beside(folder)
        if path.is_dir():
            check_kind(str(path), beside)  # before gigabytes of a language model are read
        files = tensor_files(path)
        loaded = [load(file, keys) for file, keys in files.items()]
        code = code_beside(folder if path.is_dir() else None, beside)
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from None
    name = str(next(iter(files)) if len(files) == 1 else path)
    content = loaded[0].content if len(loaded) == 1 else {k: v for part in loaded for k, v in part.content.items()}
    header = loaded[0].header if len(loaded) == 1 else None
    checkpoint = _take_weights(name, content, weights, or_bare, beside, header)
    checkpoint.skipped += tuple(dict.fromkeys(what for part in loaded for what in part.skipped))
    checkpoint.left_over += code
    return checkpoint


def _take_weights(
    name: str,
    content: Any,
    weights: str | None,
    or_bare: bool,
    beside: Mapping[str, Any] | None = None,
    header: str | None = None,
    shared: bool = False,
) -> Checkpoint:
    """Find the state dict in a loaded object, strip the wrappers' prefixes, check every tensor and translate its name.

    With `shared`, the caller holds on to the tensors, and the checkpoint refers to them. What this project saved keeps
    its names.
    """
    found = find_weights(name, content, weights, or_bare)
    named, skipped = official_names(name, found.state, as_saved=header is not None)
    args = found.args if found.key else None
    metadata = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    metadata = {key: content[key] for key in ("pretrained_cfg",) if found.key and key in content} | dict(metadata)
    origin = dict(found.state) if shared else None
    checkpoint = Checkpoint(name, {}, found.key, found.others, metadata, header, origin, skipped, dict(beside or {}))
    named = named if header is not None else unstacked(named)
    keys = {short: key for short, (key, _) in named.items()}
    plan = None if header is not None else _plan(name, keys, checkpoint.beside)
    used = {key: value for key, value in named.items() if plan is None or plan.places[key].unused is None}
    checkpoint.state = {short: _checked(name, key, value, shared) for short, (key, value) in used.items()}
    checkpoint.names_in_file = keys
    if plan is not None:
        draft = apply(name, plan, checkpoint.state, keys)
        checkpoint.state, checkpoint.names_in_file = draft.state, draft.files
        checkpoint.owner, checkpoint.whose = plan.table.owner or None, plan.table.whose
        checkpoint.renamed = plan.table.into
        checkpoint.left_over = tuple(draft.left_over.items())
        checkpoint.implied = draft.implied
    return checkpoint


def _plan(name: str, keys: Mapping[str, str], beside: Mapping[str, Any]) -> Plan | None:
    """Return whose names the keys are; a model that its config.json says is another kind is called by that."""
    try:
        plan = next(filter(None, (plan_of(name, keys) for plan_of in _PLANS)), None)
    except InputError:
        check_kind(name, beside)
        raise
    if plan.table.owner == "huggingface" if plan is not None else not is_timms(keys):
        check_kind(name, beside)
    return plan


def _checked(name: str, key: str, value: Any, shared: bool) -> torch.Tensor:
    """Return a copy of the tensor if it is plain, dense, floating-point (or a counter) and finite.

    It is a copy because the file may be overwritten in place, and the caller may resume training.
    """
    if not isinstance(value, torch.Tensor):
        kind = value.name if isinstance(value, Inert) else type(value).__name__
        raise InputError(f"{name}: {key} is a {kind}, no tensor")
    if not is_plain(value):
        raise InputError(f"{name}: {key} is no plain dense tensor with data")
    tensor: torch.Tensor = value.detach()
    # With strides of zero, a few stored bytes can claim to be terabytes.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{name}: {key} claims shape {tuple(tensor.shape)}, more than the file holds for it")
    is_counter = key.endswith(("num_batches_tracked", "relative_position_index", "position_ids"))
    if tensor.dtype not in (_COUNTERS if is_counter else _DTYPES):
        raise InputError(f"{name}: {key} is {tensor.dtype}; float32, float64, float16 or bfloat16 is expected")
    if is_counter and tensor.shape == (1,):  # of PyTorch before 0.4
        tensor = tensor[0]
    mapped = None if shared or tensor.nbytes < _WORTH_RELEASING else tensor
    tensor = tensor.cpu().clone(memory_format=torch.contiguous_format)
    if mapped is not None and mapped.is_contiguous():
        release_part(mapped.data_ptr(), mapped.nbytes)  # nothing writes to what was loaded
    if not is_counter and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor.float()))):
        raise InputError(f"{name}: {key} has NaN or Inf in it, or is too large for float32")
    if key.endswith("running_var") and (tensor < 0).any():
        raise InputError(f"{name}: {key} has a negative variance in it")
    return tensor
