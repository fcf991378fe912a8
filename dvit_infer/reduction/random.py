"""Random pruning, a control: what a method that learned or measured something has to beat. It needs no training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dvit_infer.graph.nodes import Prune
from dvit_infer.ops.prune_tokens import gather_tokens_ref
from dvit_infer.reduction import predictor

SETTINGS: Mapping[str, tuple[float, str]] = {"keep_rate": (0.7, "as DynamicViT's")}
KEY: str | None = None
SEED = 0

stages = predictor.stages  # r, r**2, r**3 of the original tokens too, so that the two can be compared


@dataclass(frozen=True, kw_only=True)
class RandomPrune(Prune):
    """Keeps the rows `index` (k,), the same in every image."""

    @property
    def macs(self) -> int:
        return 0

    def prune(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.weights["index"].expand(len(x), -1)
        return gather_tokens_ref(x, index, self.num_prefix), index


def indices(tokens: int, keep: int) -> torch.Tensor:
    """Return which of `tokens` patch tokens a stage keeps, (keep,) int64, ascending."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    return torch.randperm(tokens, generator=generator, device="cpu")[:keep].sort().values


def modules(dim: int, settings: Mapping[str, float], count: int) -> nn.ModuleList:
    return nn.ModuleList()


def choose(
    patches: torch.Tensor, stage: int, keep: int, modules: Sequence[nn.Module]
) -> tuple[torch.Tensor, torch.Tensor]:
    index = indices(patches.shape[1], keep).to(patches.device)
    return index.expand(patches.shape[0], -1), torch.full_like(patches[:, 0, 0], torch.inf)


def node(stage: int, modules: Sequence[nn.Module], **facts: Any) -> RandomPrune:
    index = indices(facts["tokens"] - facts["num_prefix"], facts["num_keep"])
    return RandomPrune(weights={"index": index}, **facts)
