"""Take the weights of a module of timm or transformers, and what it says of itself; it is neither kept nor changed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dvit_infer.errors import InputError
from dvit_infer.models.beside import Facts
from dvit_infer.models.vit.timm_module import module_facts


def read_module(module: nn.Module) -> tuple[str, dict[str, torch.Tensor], dict[str, Any], Facts]:
    """Return a name for messages, the state dict, JSON objects as files beside weights hold them, and stated facts."""
    inner = module
    while isinstance(wrapped := getattr(inner, "_orig_mod", None) or getattr(inner, "module", None), nn.Module):
        inner = wrapped
    name = type(inner).__name__
    try:
        state = dict(module.state_dict())
    except Exception as error:  # a module's own code can raise anything
        raise InputError(f"{name}: its state_dict() fails ({type(error).__name__})") from None
    config = getattr(inner, "config", None)
    if callable(to_dict := getattr(config, "to_dict", None)):
        return name, state, {"config.json": {**to_dict(), "architectures": [name]}}, {}
    stated = getattr(inner, "pretrained_cfg", None)
    if isinstance(stated, Mapping):
        # Without its architecture, from which this module may differ: what it is can be read off it.
        return name, state, {"config.json": {"pretrained_cfg": dict(stated)}}, module_facts(inner)
    return name, state, {}, {}
