"""EViT: keep the patches to which the class token attends most and fuse the others into one (Liang et al. 2022).

Between attention and MLP of some blocks, patch tokens are ranked by the class token's attention, mean over heads;
`ceil(keep_rate * current)` stay, where tokens fused before count too. It needs no training, but gains from some.

A model without class token can be ranked by the attention of the patches' mean query (score "pooled"). Of 4,000 images
of cluttered digits (bench/proof), at keep rates 0.7 and 0.5, with the others fused, 98.9% and 97.7% then get the dense
model's answer; by the attention that patches receive, mean over all queries, 99.1% and 97.9%, which is as much for the
number of images, but needs all weights; by the distance of a patch's mean key from the mean of them 98.6% and 97.8%;
by the class token's attention 98.1% and 96.5%.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dvit_infer.config import Setting, Stage
from dvit_infer.errors import InputError
from dvit_infer.graph.nodes import Signal
from dvit_infer.graph.reductions import Prune
from dvit_infer.ops.keep_tokens import fuse_rows_ref, keep_tokens_ref
from dvit_infer.ops.prune_tokens import select_tokens_ref
from dvit_infer.reduction.choices import Keep, StageInput
from dvit_infer.reduction.settings import Known, Trunk, always, flag, keep_rates, no_modules

SCORES: Mapping[str, Signal] = {"class": "class_attention", "pooled": "pooled_attention"}


def _score(what: str, value: Any) -> str:
    if not isinstance(value, str) or value not in SCORES:
        raise InputError(f"{what}: {str(value)[:40]!r} is not one of {', '.join(SCORES)}")
    return value


SETTINGS: Mapping[str, Known] = {
    "keep_rate": Known(always(0.7), "as in EViT's paper", keep_rates),
    "fuse": Known(always(True), "EViT's default", flag),
    "score": Known(always("class"), "EViT's", _score),
}
KEY: str | None = None
MERGES = False
EVERY_BLOCK = False

modules = no_modules


@dataclass(frozen=True, kw_only=True)
class AttentionPrune(Prune):
    """Keeps the tokens that the class token attends to most, and may fuse the others into one, behind them."""

    @property
    def choice_macs(self) -> int:
        return 0 if self.fused is None else (self.tokens - self.num_prefix - self.num_keep) * self.dim

    def prune(self, x: torch.Tensor, signal: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert signal is not None
        if self.rows is not None:
            return x, select_tokens_ref(signal[..., self.num_prefix :].mean(dim=1), self.num_keep)
        return keep_tokens_ref(x, signal, self.num_keep, self.num_prefix, self.fused is not None)

    def keep(self, x: torch.Tensor, index: torch.Tensor, signal: torch.Tensor | None) -> torch.Tensor:
        if self.fused is None:
            return super().keep(x, index, signal)
        assert signal is not None
        return fuse_rows_ref(x, signal[..., self.num_prefix :].mean(dim=1), index, self.num_prefix)


def why_not(settings: Mapping[str, Setting], trunk: Trunk) -> str | None:
    if settings["score"] == "class" and not trunk.class_tokens:
        return (
            "ranks patches by the class token's attention, but the model has none; assume score=pooled, the attention "
            "of the patches' mean query, or take method tome, which needs no class token"
        )
    return None


def stages(settings: Mapping[str, Setting], blocks: Sequence[int], num_patches: int) -> tuple[Stage, ...]:
    """Return the stages; their counts are `ceil(rate * current)`, or as given (Liang et al. 2022, `evit.py`)."""
    stated = settings["keep_rate"]
    rates = stated if isinstance(stated, tuple) else (stated,) * len(blocks)
    if len(rates) != len(blocks):
        at = f"(prune_at {','.join(map(str, blocks))})"
        needed = f"1 stage {at} needs one" if len(blocks) == 1 else f"{len(blocks)} stages {at} need one each"
        raise InputError(f"keep_rate: {len(rates)} given, but {needed}")
    found, tokens = [], num_patches
    for block, rate in zip(blocks, rates, strict=True):
        assert isinstance(rate, int | float)
        keep = math.ceil(rate * tokens) if rate <= 1 else int(rate)
        if keep > tokens:
            raise InputError(f"keep_rate: {keep} tokens are to be kept in block {block}, where there are only {tokens}")
        found.append(Stage(block, keep, "after_attention"))
        tokens = keep + (bool(settings["fuse"]) and keep < tokens)
    return tuple(found)


def signal(settings: Mapping[str, Setting]) -> Signal:
    return SCORES[str(settings["score"])]


def _fused(settings: Mapping[str, Setting], stage: int, num_patches: int, drops: bool) -> int | None:
    return num_patches + stage if settings["fuse"] and drops else None


def choose(given: StageInput) -> Keep:
    assert given.signal is not None
    score, keep = given.signal[..., given.num_prefix :].mean(dim=1), given.keep
    ranked = score.sort(dim=1, descending=True).values
    drops = keep < score.shape[1]
    # Attention weights are small numbers: rounding changes them by a share of themselves.
    gap = 1 - ranked[:, keep] / ranked[:, keep - 1] if drops else torch.full_like(ranked[:, 0], torch.inf)
    fused = _fused(given.settings, given.stage, given.num_patches, drops)
    return Keep(select_tokens_ref(score, keep), gap, None if fused is None else score, fused)


def node(
    stage: int, modules: Sequence[nn.Module], settings: Mapping[str, Setting], num_patches: int, **facts: Any
) -> AttentionPrune:
    drops = facts["num_keep"] < facts["tokens"] - facts["num_prefix"]
    return AttentionPrune(weights={}, fused=_fused(settings, stage, num_patches, drops), **facts)
