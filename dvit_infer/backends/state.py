"""What travels between the nodes of a graph while it runs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from dvit_infer.graph.nodes import Node
from dvit_infer.graph.reductions import Reduce
from dvit_infer.graph.tokens import Tokens


@dataclass(slots=True)
class State(Tokens):
    """What travels from node to node: tokens, with what is known about them.

    Attributes:
        x: images (B, 3, H, W), then tokens (B, P+n, C), or the positions of a map row by row (B, H * W, C), and after
            the head logits (B, K) float32.
        given: for each stage what to do instead of the graph's choice, as `choices`; None: nothing is given.
        stats: statistics of x's rows for the next LayerNorm; None: it computes them.
        branch: (B, n, C), what a node began beside x, which the next one adds to it.
        order: (B, N) the positions that take the MLPs, then the others, both ascending.
        decided: what every stage so far decided, in the form of its node.
        follows: whether `choices` and `positions` are followed; if not, they can be from `decided` (`follow`).
    """

    given: Sequence[torch.Tensor] | None = None
    stats: torch.Tensor | None = None
    branch: torch.Tensor | None = None
    order: torch.Tensor | None = None
    decided: list[tuple[Reduce, torch.Tensor]] = field(default_factory=list)
    follows: bool = True

    def decide(self, node: Reduce, choice: torch.Tensor) -> None:
        """Note what a stage decided about the tokens, which it has moved."""
        self.decided.append((node, choice))
        if self.follows:
            node.note(self, choice)


def follow(x: torch.Tensor, decided: Iterable[tuple[Reduce, torch.Tensor]]) -> State:
    """Return the state of an output x, with the choices that its stages made and the positions they left."""
    state = State(x)
    for node, choice in decided:
        state.decide(node, choice)
    return state


Hook = Callable[[Node, torch.Tensor], None]
