"""Reductions: which tokens stay. One file per method; `METHODS` lists them.

A method decides; a node of the graph moves the rows. It is a module with the names of `Method`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from dvit_infer.config import Stage
from dvit_infer.graph.nodes import Prune
from dvit_infer.reduction import predictor, random


class Method(Protocol):
    """A method of choosing tokens.

    Attributes:
        SETTINGS: the facts that it needs, by name, each with its default and the reason for it.
        KEY: the prefix of its modules' keys in official files; None: it has no weights.
    """

    SETTINGS: Mapping[str, tuple[float, str]]
    KEY: str | None

    def stages(self, settings: Mapping[str, float], blocks: Sequence[int], num_patches: int) -> tuple[Stage, ...]:
        """Return the stages at these blocks, with the number of patch tokens that each keeps."""

    def modules(self, dim: int, settings: Mapping[str, float], count: int) -> nn.ModuleList:
        """Return the modules of `count` stages for tokens of `dim` channels, with uninitialised weights."""

    def choose(
        self, patches: torch.Tensor, stage: int, keep: int, modules: Sequence[nn.Module]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose tokens in the reference model; this defines the method.

        Args:
            patches: (B, N, C), the tokens that earlier stages left.
            stage: 0-based.
            keep: how many of them to keep.
            modules: those in the weights.

        Returns:
            (B, keep) ascending indices among the N, and (B,) the gap between the scores of the last token kept and the
            first one dropped; inf if the choice cannot be changed by rounding.
        """

    def node(self, stage: int, modules: Sequence[nn.Module], **facts: Any) -> Prune:
        """Return the node that does the same in a graph; `facts` are the fields of every `Prune`."""


METHODS: dict[str, Method] = {"predictor": predictor, "random": random}
