"""Node kinds of maps of which some positions take the MLPs and the others one cheap linear; all stay."""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch

from dvit_infer.graph.nodes import Mlp, norm_macs
from dvit_infer.graph.reductions import Reduce
from dvit_infer.graph.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Route(Reduce):
    """Chooses the positions that take the MLPs from here on; moves none. Its choice are they, (B, k), ascending."""

    kind = "route"
    choice_name = "index"

    @property
    def left(self) -> int:
        return self.tokens

    @property
    def keeps_x(self) -> bool:
        return True

    @property
    def choice_size(self) -> int:
        return self.num_keep

    def note(self, tokens: Tokens, choice: torch.Tensor) -> None:
        tokens.choices.append(choice.contiguous())  # the first columns of an order

    def choice_of(self, tokens: Tokens, given: torch.Tensor) -> torch.Tensor:
        return given

    @abstractmethod
    def order(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> all positions (B, N): the chosen ones, ascending, then the others, ascending."""


@dataclass(frozen=True, kw_only=True)
class RoutedMlp(Mlp):
    """x + the MLP of LayerNorm(x) at `num_keep` positions, x + fast(LayerNorm(x)) at the others.

    The other branch has a LayerNorm of its own (weights `fast_norm`, with the same eps) and one linear (`fast`), whose
    channels may be scaled (`fast_gamma`).
    """

    kind = "routed_mlp"
    num_keep: int

    @property
    def macs(self) -> int:
        rest = self.tokens - self.num_keep
        fast = norm_macs(self.weights, rest, self.dim, "fast_norm") + rest * self.weights["fast.weight"].numel()
        return replace(self, tokens=self.num_keep).mlp_macs + fast

    @property
    def mlp_macs(self) -> int:
        """The number of MACs of an MLP of all positions."""
        return super().macs
