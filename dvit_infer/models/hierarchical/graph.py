"""Parts of the graphs of models of four stages."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dvit_infer.config import Config
from dvit_infer.graph.nodes import Mlp, Node
from dvit_infer.graph.routes import Route, RoutedMlp
from dvit_infer.reduction import route

Tensors = dict[str, torch.Tensor]
THIRD = 2  # the number of the stage that routes


def own(module: nn.Module, **names: str) -> Tensors:
    """Return the parameters whose names begin with a keyword's value, by the keyword in its place."""
    found: Tensors = {}
    for key, value in module.state_dict().items():
        for ours, theirs in names.items():
            if key == theirs or key.startswith(f"{theirs}."):
                found[ours + key.removeprefix(theirs)] = value.detach()
    return found


def unprefixed(weights: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): w for name, w in weights.items()}


class Routes:
    """The choices of the third stage, in the order of its blocks.

    Args:
        config: of the model.
        predictors: in its weights.
        name: what stands before a block's number.
    """

    def __init__(self, config: Config, predictors: Any, name: str) -> None:
        self._config, self._predictors, self._name = config, list(predictors or ()), name
        self._keep: int | None = None  # of the last stage

    def before(self, number: int, block: int) -> Iterator[Route]:
        """Yield the node that stands before a block of a stage, if there is one."""
        reduction = self._config.reduction
        stage = next((stage for stage in reduction.stages if (number, stage.block) == (THIRD, block)), None)
        if stage is None:
            return
        count, self._keep = reduction.stages.index(stage), stage.keep
        facts = {"tokens": self._config.num_patches, "num_keep": stage.keep, "num_prefix": 0}
        yield route.node(
            count,
            self._predictors,
            dict(reduction.settings),
            self._config.num_patches,
            name=f"route.{count}",
            equals=f"{self._name}{block}:in",
            channels=self._config.body.embed_dim,
            **facts,
        )

    def mlp(self, number: int, weights: Tensors, fast: Tensors, **facts: Any) -> Node:
        """Return the node of an MLP of a stage, with its other branch if there was a choice."""
        if number != THIRD or self._keep is None:
            return Mlp(weights=weights, **facts)
        return RoutedMlp(weights=weights | fast, num_keep=self._keep, **facts)
