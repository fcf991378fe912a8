"""Read which parts a plain ViT has and who trained it; refuse parts that are not supported, by name."""

from collections.abc import Sequence
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.models.reading import Reading


def trainer_of(read: Reading, family: str, predictors: int, num_prefix: int) -> str | None:
    """Return why preprocessing is known without being stated: its trainer has only one. None: it is not known.

    timm has weights with DeiT's keys that want another mean and std, and anybody may train such a model. But only
    DynamicViT's trainer makes predictors, only token labeling's an LV-ViT, and only DeiT's a distillation token; a file
    of DeiT's trainer says so.
    """
    if predictors:
        return "the score predictors are of DynamicViT's trainer"
    if family == "lvvit":
        return "token labeling's trainer"
    model = read.metadata.get("model")
    if num_prefix == 2 or (isinstance(model, str) and model.startswith("deit")):
        return "DeiT's trainer"
    return None


def check_channels(read: Reading, first: str) -> None:
    """Raise InputError for a model of images with other than three channels, by its first convolution."""
    kernel = read.shapes.get(first, ())
    if len(kernel) == 4 and kernel[1] not in (0, 3):
        channels = f"{kernel[1]} channel{'s' if kernel[1] > 1 else ''}"
        raise InputError(f"{read.name}: is made for images of {channels} ({first}); 3 are supported")


def check_classes(read: Reading, class_heads: Sequence[str]) -> None:
    """Raise InputError for a model without classes."""
    if not any(f"{head}.{part}" in read.shapes for head in class_heads for part in ("weight", "bias")):
        raise InputError(f"{read.name}: has no classes (no head.weight), which a DynamicViT has")


def note_trained_as(read: Reading, predictors: int) -> None:
    """Note the name that the trainer gave the model, and what it trained that is not in the file."""
    if isinstance(model := read.metadata.get("model"), str):
        read.note("read", "trained as", model, f"{read.metadata_source}: model")
    if not predictors and read.metadata.get("base_rate") is not None:
        why = f"{read.metadata_source}: base_rate; the file holds no predictors, so the model is dense"
        read.note("read", "trained as", "DynamicViT", why)


def has_layer_scale(read: Reading, depth: int) -> bool:
    """Return whether most blocks have factors for their branches' channels, so that one without is reported."""
    found = sum(key.endswith((".ls1.gamma", ".ls2.gamma")) for key in read.shapes)
    if found > depth:
        read.note("read", "layer_scale", "yes", "keys: ls1.gamma and ls2.gamma; folded into proj and fc2")
    return found > depth


def has_no_qkv_bias(read: Reading, family: str) -> bool:
    """Return whether no block of a DeiT has a bias for queries, keys and values; LV-ViT never has one."""
    without = family == "deit" and not any(key.endswith(".attn.qkv.bias") for key in read.shapes)
    if without:
        read.note("read", "qkv bias", "none", "keys: no attn.qkv.bias")
    return without


def one_of(read: Reading, what: str, assumed: Any, why: str, known: tuple[str, ...]) -> Any:
    """Return a resolved value; raise InputError unless it is one of the known ones."""
    value = read.resolve(what, assumed, why)
    if value not in known:
        raise InputError(f"{read.origin(what)}: {str(value)[:40]!r} is not one of {', '.join(known)}")
    return value
