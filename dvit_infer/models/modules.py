"""Take the weights of a module of timm or transformers, and what it says of itself; it is neither kept nor changed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dvit_infer.errors import InputError
from dvit_infer.models.beside import Facts
from dvit_infer.models.vit.timm_module import module_facts

_READ_ALONE = "its state_dict() given instead is read as the model that its keys name"
_OWNERS = ("transformers.", "timm.", "torch.nn.")  # whose classes transformers' models consist of


def read_module(module: nn.Module) -> tuple[str, dict[str, torch.Tensor], dict[str, Any], Facts]:
    """Return a name for messages, the state dict, JSON objects as files beside weights hold them, and stated facts.

    Raises:
        InputError: it computes, or may compute, something else than its class: a class that only derives from one of
            transformers or timm, a forward or hook that was put in.
    """
    inner = module
    while isinstance(wrapped := getattr(inner, "_orig_mod", None) or getattr(inner, "module", None), nn.Module):
        inner = wrapped
    name = type(inner).__name__
    _check_unpatched(name, inner)
    state = dict(module.state_dict())  # its own code: an error in it keeps its traceback
    config = getattr(inner, "config", None)
    if callable(to_dict := getattr(config, "to_dict", None)):
        _check_transformers(name, inner)
        return name, state, {"config.json": {**to_dict(), "architectures": [name]}}, {}
    stated = getattr(inner, "pretrained_cfg", None)
    if isinstance(stated, Mapping):
        # Without its architecture, from which this module may differ: what it is can be read off it.
        return name, state, {"config.json": {"pretrained_cfg": dict(stated)}}, module_facts(inner)
    return name, state, {}, {}


def _check_unpatched(name: str, module: nn.Module) -> None:
    """Raise InputError if a forward was replaced, or a hook put in, in an instance."""
    for path, part in module.named_modules():
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        # transformers puts in its own, which note outputs that the caller asked for.
        foreign = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]
        what = "a forward of its own" if "forward" in vars(part) else "a forward hook" if foreign else ""
        if what:
            where = f"{path} has {what}" if path else f"the module has {what}"
            raise InputError(f"{name}: {where}, which may compute anything; remove it, or {_READ_ALONE}")


def _check_transformers(name: str, module: nn.Module) -> None:
    """Raise InputError if a model, or a part of it, is of someone's class that derives from one of transformers."""
    for path, part in module.named_modules():
        kind = type(part)
        derived = any(base.__module__.startswith("transformers.") for base in kind.__mro__[1:])
        if derived and not kind.__module__.startswith(_OWNERS):
            where = f"{path} is a" if path else "a"
            raise InputError(
                f"{name}: {where} class of {kind.__module__}, not of transformers, so it may compute anything; "
                f"{_READ_ALONE}"
            )
