"""What travels between the nodes of a graph while it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dvit_infer.graph.nodes import Node
from dvit_infer.graph.tokens import Tokens


@dataclass(slots=True)
class State(Tokens):
    """What travels from node to node: tokens, with what is known about them.

    Attributes:
        x: images (B, 3, H, W), then tokens (B, P+n, C), and after the head logits (B, K) float32.
        given: for each stage what to do instead of the graph's choice, as `choices`; None: nothing is given.
        stats: statistics of x's rows for the next LayerNorm; None: it computes them.
    """

    given: Sequence[torch.Tensor] | None = None
    stats: torch.Tensor | None = None


Hook = Callable[[Node, torch.Tensor], None]
