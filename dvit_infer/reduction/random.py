"""Random pruning, a control: what a method that learned or measured something has to beat. It needs no training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dvit_infer.config import Setting
from dvit_infer.graph.reductions import Prune
from dvit_infer.ops.prune_tokens import gather_tokens_ref
from dvit_infer.reduction import predictor
from dvit_infer.reduction.choices import Keep, StageInput
from dvit_infer.reduction.settings import Known, always, fits_all, keep_rate, no_modules, reads_tokens_only

SETTINGS: Mapping[str, Known] = {"keep_rate": Known(always(0.7), "as DynamicViT's", keep_rate)}
KEY: str | None = None
MERGES = False
EVERY_BLOCK = False
SEED = 0

why_not, signal, modules = fits_all, reads_tokens_only, no_modules
stages = predictor.stages  # r, r**2, r**3 of the original tokens too, so that the two can be compared


@dataclass(frozen=True, kw_only=True)
class RandomPrune(Prune):
    """Keeps the rows `index` (k,), the same in every image."""

    @property
    def choice_macs(self) -> int:
        return 0

    def prune(self, x: torch.Tensor, signal: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.weights["index"].expand(len(x), -1)
        return gather_tokens_ref(x, index, self.num_prefix), index


def indices(tokens: int, keep: int) -> torch.Tensor:
    """Return which of `tokens` patch tokens a stage keeps, (keep,) int64, ascending."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    return torch.randperm(tokens, generator=generator, device="cpu")[:keep].sort().values


def choose(given: StageInput) -> Keep:
    x = given.x
    index = indices(x.shape[1] - given.num_prefix, given.keep).to(x.device)
    return Keep(index.expand(x.shape[0], -1), torch.full_like(x[:, 0, 0], torch.inf))


def node(
    stage: int, modules: Sequence[nn.Module], settings: Mapping[str, Setting], num_patches: int, **facts: Any
) -> RandomPrune:
    index = indices(facts["tokens"] - facts["num_prefix"], facts["num_keep"])
    return RandomPrune(weights={"index": index}, **facts)
