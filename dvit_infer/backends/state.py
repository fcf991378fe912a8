"""What travels between the nodes of a graph while it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dvit_infer.graph.nodes import Node


@dataclass(slots=True)
class State:
    """What travels from node to node.

    Attributes:
        x: images (B, 3, H, W), then tokens (B, P+N, C), and after the head logits (B, K) float32.
        given: one (B, k) tensor per stage, original positions to keep instead of the graph's choice; None: none are.
        positions: (B, N) original positions of x's patches; None: all, in order.
        stats: statistics of x's rows for the next LayerNorm; None: it computes them.
        choices: what each stage so far kept, (B, k) original positions.
    """

    x: torch.Tensor
    given: Sequence[torch.Tensor] | None = None
    positions: torch.Tensor | None = None
    stats: torch.Tensor | None = None
    choices: list[torch.Tensor] = field(default_factory=list)


Hook = Callable[[Node, torch.Tensor], None]
