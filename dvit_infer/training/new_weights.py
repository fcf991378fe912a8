"""Weights that a training begins with at random: score predictors, and heads for other classes."""

from collections.abc import Mapping

import torch
from torch import nn

from dvit_infer.reduction import predictor

HEADS = ("head", "head_dist", "aux_head")
STD = 0.02  # of the truncated normal, as in the official trainer


def new_predictors(count: int, dim: int, eps: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the state of `count` score predictors for tokens of `dim` channels."""
    modules = predictor.modules(dim, {"predictor_eps": eps}, count)
    for module in modules.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=STD, generator=generator)
            nn.init.zeros_(module.bias)
    return {f"{predictor.KEY}.{key}": value for key, value in modules.state_dict().items()}


def new_heads(
    state: Mapping[str, torch.Tensor], num_classes: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return the state of heads for `num_classes` classes, for each head in `state`."""
    found = {}
    for head in HEADS:
        if (old := state.get(f"{head}.weight")) is not None:
            weight = torch.empty(num_classes, old.shape[1])
            found[f"{head}.weight"] = nn.init.trunc_normal_(weight, std=STD, generator=generator)
            found[f"{head}.bias"] = torch.zeros(num_classes)
    return found
