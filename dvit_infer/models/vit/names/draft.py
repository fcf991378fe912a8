"""A state dict while its names are turned into timm's: tensors, their keys in the file, and what is left over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dvit_infer.errors import InputError
from dvit_infer.models.facts import NOT_YET, Facts

QKV = ("q", "k", "v")


@dataclass
class Draft:
    """Tensors under new names.

    Attributes:
        name: of the file, for messages.
        state: the tensors; values and dtypes are the file's.
        files: for every new name, and for those that are missing, the key in the file, or several of them.
        left_over: keys of the file, or a beginning of keys with a star, and why they are not used.
        implied: facts that follow from the keys.
        depth: the number of blocks, by the highest number.
        prefix: what stood before the names of the model's parts.
        shapes: the tensors' shapes in the file.
    """

    name: str
    state: dict[str, torch.Tensor]
    files: dict[str, str]
    left_over: dict[str, str] = field(default_factory=dict)
    implied: Facts = field(default_factory=dict)
    depth: int = 0
    prefix: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def has(self, beginning: str) -> bool:
        return any(key.startswith(beginning) for key in self.state)

    def mostly(self, part: str) -> bool:
        """Return whether most blocks have a part, so that a block without it is reported, and not the others."""
        return 2 * sum(f"blocks.{i}.{part}" in self.state for i in range(self.depth)) > self.depth

    def imply(self, why: str, **facts: Any) -> None:
        self.implied |= {what: (value, why) for what, value in facts.items()}

    def imply_projection(self, why: str) -> None:
        """Imply that the head, if there is one, projects the embedding; one of another shape is reported later."""
        weight = self.state.get("head.weight")
        if weight is not None and weight.dim() == 2:
            self.imply(why, projection=len(weight))

    def check_pre_logits(self) -> None:
        """Raise InputError if the linear between pooling and head, Hugging Face's pooler, changes the width."""
        weight = self.state.get("pre_logits.fc.weight")
        if weight is not None and weight.dim() == 2 and weight.shape[0] != weight.shape[1]:
            key, shape = self.files["pre_logits.fc.weight"], self.shapes["pre_logits.fc.weight"]
            raise InputError(
                f"{self.name}: {key} has shape {shape}: a pooler of another width than the model's is not supported; "
                f"{NOT_YET}"
            )

    def drop(self, beginning: str, why: str) -> None:
        """Leave out the tensors whose names begin so."""
        found = [key for key in self.state if key.startswith(beginning)]
        files = [self.files.pop(key) for key in found]
        for key in found:
            del self.state[key]
        if files:
            self.left_over[_together(files)] = why

    def rename(self, old: str, new: str) -> None:
        """Rename the tensors whose names begin with `old`, and those that are missing."""
        for key in [key for key in self.files if key.startswith(old)]:
            renamed = new + key.removeprefix(old)
            self.files[renamed] = self.files.pop(key)
            if key in self.state:
                self.state[renamed] = self.state.pop(key)

    def rename_in_blocks(self, old: str, new: str) -> None:
        for i in range(self.depth):
            self.rename(f"blocks.{i}.{old}", f"blocks.{i}.{new}")

    def change(self, key: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace a tensor, if it is there, by its values in another order.

        Raises:
            InputError: `how` raised a ValueError, which says what shape it expects.
        """
        if key in self.state:
            try:
                self.state[key] = how(self.state[key]).contiguous()
            except ValueError as error:
                shape = tuple(self.state[key].shape)
                raise InputError(f"{self.name}: {self.files[key]} has shape {shape}, {error}") from None

    def join(self, new: str, parts: Sequence[str]) -> None:
        """Concatenate tensors along the first dimension; if one is missing, so is the new one, under its key.

        Raises:
            InputError: their other dimensions differ.
        """
        files = [self.files.pop(part, part) for part in parts]
        tensors = [self.state.pop(part, None) for part in parts]
        there = [tensor for tensor in tensors if tensor is not None]
        missing = [key for key, tensor in zip(files, tensors, strict=True) if tensor is None]
        self.files[new] = ", ".join(missing or files)
        if missing:
            return
        for key, tensor in zip(files, there, strict=True):
            if tensor.dim() == 0 or tensor.shape[1:] != there[0].shape[1:]:
                shapes = f"{key} has shape {tuple(tensor.shape)}, {files[0]} {tuple(there[0].shape)}"
                raise InputError(f"{self.name}: {shapes}; they become one tensor and do not fit together")
        self.state[new] = torch.cat(there)

    def split(self, old: str, parts: Sequence[tuple[str, int, int]], of: int) -> None:
        """Split a tensor of `of` equal pieces, if it is there, into new ones: a name, the first piece and the end."""
        if old not in self.files:
            return
        key, tensor = self.files.pop(old), self.state.pop(old, None)
        if tensor is not None and (tensor.dim() == 0 or len(tensor) % of):
            raise InputError(f"{self.name}: {key} has shape {tuple(tensor.shape)}, no multiple of {of} rows")
        for new, start, end in parts:
            self.files[new] = key
            if tensor is not None:
                step = len(tensor) // of
                self.state[new] = tensor[start * step : end * step].clone()


def join_qkv(draft: Draft) -> None:
    """Make of separate queries, keys and values what timm has: one linear, or q_bias and v_bias beside its weight."""
    biased = "".join(part for part in QKV if draft.mostly(f"attn.{part}.bias"))
    if biased not in ("", "qv", "qkv"):
        separate_qkv(draft)
        return
    for i in range(draft.depth):
        at = f"blocks.{i}.attn."
        draft.join(f"{at}qkv.weight", [f"{at}{part}.weight" for part in QKV])
        if biased == "qkv":
            draft.join(f"{at}qkv.bias", [f"{at}{part}.bias" for part in QKV])
        if biased == "qv":
            draft.rename(f"{at}q.bias", f"{at}q_bias")
            draft.rename(f"{at}v.bias", f"{at}v_bias")


def separate_qkv(draft: Draft) -> None:
    """Name queries, keys and values as timm's Eva does where they are three linears."""
    for part in QKV:
        draft.rename_in_blocks(f"attn.{part}.", f"attn.{part}_proj.")


def _together(keys: Sequence[str]) -> str:
    """Return one text for keys: the key, or the modules' names that they share and a star."""
    if len(keys) == 1:
        return keys[0]
    shared = keys[0]
    for key in keys:
        while not key.startswith(shared):
            shared = shared[:-1]
    return f"{shared[: max(shared.rfind('.'), shared.rfind('/')) + 1]}*"
