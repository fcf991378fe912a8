"""DynamicViT's reduction: score predictors, trained with the model, in front of some blocks (Rao et al. 2021)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from dvit_infer.config import Setting, Stage
from dvit_infer.graph.reductions import Prune, Reduce
from dvit_infer.ops.prune_tokens import pack_predictor
from dvit_infer.reduction.choices import Keep, StageInput
from dvit_infer.reduction.settings import Known, always, fits_all, keep_rate, positive_float, reads_tokens_only

EPS = 1e-5
SETTINGS: Mapping[str, Known] = {
    "keep_rate": Known(always(0.7), "neither the weights nor the file's args say it", keep_rate),
    "predictor_eps": Known(always(EPS), "LayerNorm's default, as in DynamicViT", positive_float),
}
KEY: str | None = "score_predictor"
MERGES = False
EVERY_BLOCK = False

why_not, signal = fits_all, reads_tokens_only


class Predictor(nn.Module):
    """Scores patch tokens from their own features and the mean of the kept ones (Rao et al. 2021, section 3.2).

    `linear` makes its layers of rows (..., C), by the numbers of channels in and out.
    """

    def __init__(self, dim: int, eps: float, linear: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.eps = eps
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, eps=eps), linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            linear(dim, dim // 2),
            nn.GELU(),
            linear(dim // 2, dim // 4),
            nn.GELU(),
            linear(dim // 4, 2),
        )

    def forward(self, x: torch.Tensor, policy: torch.Tensor | None = None) -> torch.Tensor:
        """(B, N, C) patch tokens, and in training their (B, N, 1) policy -> (B, N, 2) logits: keep, drop."""
        own, shared = self.in_conv(x).chunk(2, dim=-1)
        if policy is None:
            mean = shared.mean(dim=1, keepdim=True)
        else:
            # At least 1: if all of a few patches are dropped by chance, the official 0 / 0 gives NaN.
            mean = (shared * policy).sum(dim=1, keepdim=True) / policy.sum(dim=1, keepdim=True).clamp(min=1)
        out: torch.Tensor = self.out_conv(torch.cat([own, mean.expand_as(shared)], dim=-1))
        return out


@dataclass(frozen=True, kw_only=True)
class Scores(Reduce):
    """A reduction that scores tokens by a predictor. Weights are the predictor's own, or packed for the op."""

    eps: float

    @property
    def packed(self) -> list[torch.Tensor]:
        return list(self.weights.values())

    @property
    def choice_macs(self) -> int:
        n, c = self.tokens - self.num_prefix, self.dim
        if "in_conv.0.weight" in self.weights:
            return n * (5 * c + c * c + c * (c // 2) + (c // 2) * (c // 4) + (c // 4) * 2)
        half = c // 2
        return n * (4 * c + c * c + half * half + half * (c // 4) + c // 4) + half * half

    def folded_for(self, dtype: torch.dtype) -> Self:
        """Pack the predictor: LayerNorm folded, one vector per image as mean half, one logit difference for two."""
        if "in_conv.0.weight" not in self.weights:
            return self
        packed = {f"packed.{i}": w for i, w in enumerate(pack_predictor(self.weights, dtype))}
        return replace(self, weights=packed, folded=(*self.folded, "LayerNorm", "mean half", "logit difference"))


@dataclass(frozen=True, kw_only=True)
class PredictorPrune(Scores, Prune):
    """The op dvit::prune_tokens: score, choose, gather."""

    def prune(self, x: torch.Tensor, signal: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        kept_x, index = torch.ops.dvit.prune_tokens(x, self.packed, self.num_keep, self.num_prefix, self.eps)
        return kept_x, index


def stages(settings: Mapping[str, Setting], blocks: Sequence[int], num_patches: int) -> tuple[Stage, ...]:
    """Return stages that keep r, r**2, r**3 of the original tokens.

    The counts are `int(N * rate)` in double precision, as in DynamicViT's own inference script (Rao et al. 2021,
    section 3.3, and `infer.py`): a rounded rate can change a count.
    """
    rate = settings["keep_rate"]
    assert isinstance(rate, float)
    return tuple(Stage(block, int(num_patches * rate ** (s + 1))) for s, block in enumerate(blocks))


def modules(
    dim: int, settings: Mapping[str, Setting], count: int, linear: Callable[[int, int], nn.Module] = nn.Linear
) -> nn.ModuleList:
    eps = settings["predictor_eps"]
    assert isinstance(eps, float)
    return nn.ModuleList(Predictor(dim, eps, linear) for _ in range(count))


def choose(given: StageInput) -> Keep:
    """Return the best tokens by the difference of the two logits: the order of log P(keep), without saturation."""
    logits = given.modules[given.stage](given.x[:, given.num_prefix :]).float()
    score, order = (logits[..., 0] - logits[..., 1]).sort(dim=1, descending=True, stable=True)
    keep = given.keep
    gap = score[:, keep - 1] - score[:, keep] if keep < score.shape[1] else torch.full_like(score[:, 0], torch.inf)
    return Keep(order[:, :keep].sort(dim=1).values, gap)


def weights_of(module: nn.Module) -> dict[str, Any]:
    """Return the weights and the eps of a predictor, as fields of `Scores`; 1x1 convolutions become linears."""
    assert isinstance(module, Predictor)
    state = {name: weight.detach() for name, weight in module.state_dict().items()}
    return {"weights": {name: w.flatten(1) if w.ndim == 4 else w for name, w in state.items()}, "eps": module.eps}


def node(
    stage: int, modules: Sequence[nn.Module], settings: Mapping[str, Setting], num_patches: int, **facts: Any
) -> PredictorPrune:
    return PredictorPrune(**weights_of(modules[stage]), **facts)
