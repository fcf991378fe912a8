"""DynamicViT's sequel: score predictors choose which positions of a map take the MLPs (Rao et al. 2023, section 3.4).

All positions stay. Those that are not chosen take one cheap linear in place of the MLP. Every stage ranks all of them
anew, and its choice holds until the next one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dvit_infer.config import Reduction, Setting, Stage
from dvit_infer.errors import InputError
from dvit_infer.graph.routes import Route
from dvit_infer.ops.route_tokens import order_of, route_tokens
from dvit_infer.reduction import predictor
from dvit_infer.reduction.choices import Keep, StageInput
from dvit_infer.reduction.predictor import Scores
from dvit_infer.reduction.settings import Known, fits_all, positive_float, reads_tokens_only

STEP = 0.2  # by which the share falls from stage to stage
SETTINGS: Mapping[str, Known] = {
    "keep_rate": predictor.SETTINGS["keep_rate"],
    "predictor_eps": Known(lambda trunk: trunk.predictor_eps, "as in DynamicViT's code", positive_float),
}
KEY: str | None = "score_predictor"
MERGES = False
EVERY_BLOCK = False

why_not, signal, modules, choose = fits_all, reads_tokens_only, predictor.modules, predictor.choose


def stages(settings: Mapping[str, Setting], blocks: Sequence[int], num_patches: int) -> tuple[Stage, ...]:
    """Return stages that choose r, r - 0.2, r - 0.4 of all positions: `int(N * rate)` in double precision.

    Raises:
        InputError: a rate is negative.
    """
    rate = settings["keep_rate"]
    assert isinstance(rate, float)
    rates = [rate - STEP * s for s in range(len(blocks))]
    if rates and rates[-1] < 0:
        formula = "r, " + ", ".join(f"r-{STEP * s:g}" for s in range(1, len(rates)))
        least = STEP * (len(rates) - 1)
        raise InputError(
            f"keep_rate: {rate:g} makes {rates[-1]:.2g} at stage {len(rates) - 1}, as the stages choose {formula}; "
            f"a rate above {least:g} is needed"
        )
    return tuple(Stage(block, int(num_patches * r), "mlp") for block, r in zip(blocks, rates, strict=True))


@dataclass(frozen=True, kw_only=True)
class PredictorRoute(Scores, Route):
    """The op dvit::route_tokens: score, choose, order."""

    def order(self, x: torch.Tensor) -> torch.Tensor:
        order: torch.Tensor = route_tokens(x, self.packed, self.num_keep, self.eps)
        return order


def node(
    stage: int, modules: Sequence[nn.Module], settings: Mapping[str, Setting], num_patches: int, **facts: Any
) -> PredictorRoute:
    return PredictorRoute(**predictor.weights_of(modules[stage]), **facts)


class Routing:
    """The stages in one forward of a reference model.

    Args:
        reduction: which positions are chosen, where.
        modules: the predictors in the weights.
        given: the positions that every stage is to choose, (B, k) each; None: its own.

    Attributes:
        kept: what each stage so far chose, (B, k) ascending.
        margins: for each stage the gaps (B,) of its choice.
    """

    def __init__(
        self, reduction: Reduction, modules: Sequence[nn.Module], given: Sequence[torch.Tensor] | None = None
    ) -> None:
        self._reduction, self._modules, self._given = reduction, modules, given
        self._rest: torch.Tensor | None = None
        self.kept: list[torch.Tensor] = []
        self.margins: list[torch.Tensor] = []

    def before(self, block: int, x: torch.Tensor) -> None:
        """Begin a block of the third stage, with its input (B, N, C)."""
        reduction, number = self._reduction, len(self.kept)
        if number == len(reduction.stages) or reduction.stages[number].block != block:
            return
        keep = reduction.stages[number].keep
        assert keep is not None
        settings = dict(reduction.settings)
        choice = choose(StageInput(x, None, number, keep, 0, reduction.num_patches, self._modules, settings))
        assert isinstance(choice, Keep)
        kept = choice.index if self._given is None else self._given[number].to(x.device)
        self.kept.append(kept)
        self.margins.append(choice.gap)
        self._rest = order_of(kept, x.shape[1])[:, kept.shape[1] :]

    def __call__(
        self, x: torch.Tensor, mlp: Callable[[torch.Tensor], torch.Tensor], fast: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """(B, N, C) -> the same, the chosen positions through `mlp`, the others through `fast`."""
        if self._rest is None:
            return mlp(x)
        out = torch.empty_like(x)
        for index, branch in ((self.kept[-1], mlp), (self._rest, fast)):
            rows = index[:, :, None].expand(-1, -1, x.shape[2])
            out.scatter_(1, rows, branch(x.gather(1, rows)))
        return out
