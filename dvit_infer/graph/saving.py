"""The work that a reduction saves: MACs, or a share of the time, of the nodes behind it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dvit_infer.graph.nodes import Attention, Node, TokenNode
from dvit_infer.graph.reductions import Reduce
from dvit_infer.graph.routes import Route, RoutedMlp


def saved_macs(nodes: Sequence[Node], at: int) -> int | None:
    """Return by how many MACs later nodes would exceed theirs with the tokens that node `at` removes.

    Those of MLPs that some tokens pass by, if all took them.

    Of an attention whose queries are fewer rows only keys and values would be more. None: the node removes none.
    """
    node = nodes[at]
    if isinstance(node, Route):
        return sum(routed.mlp_macs - routed.macs for _, routed in _routed(nodes, at))
    if not isinstance(node, Reduce):
        return None
    removed = _removed(node)
    return sum(_with_more(later, removed).macs - later.macs for _, later in _affected(nodes, at))


def saved_time(nodes: Sequence[Node], seconds: Sequence[float], at: int) -> float | None:
    """Return by how much later nodes would take longer, if the time of each were proportional to its tokens.

    Of MLPs that some tokens pass by, if it were proportional to its MACs.
    """
    node = nodes[at]
    if isinstance(node, Route):
        return sum(seconds[i] * (routed.mlp_macs / routed.macs - 1) for i, routed in _routed(nodes, at))
    if not isinstance(node, Reduce):
        return None
    return sum(seconds[i] * _removed(node) / later.tokens for i, later in _affected(nodes, at))


def _removed(node: Reduce) -> int:
    return node.tokens - node.left if node.rows is None else 0


def _routed(nodes: Sequence[Node], at: int) -> Iterator[tuple[int, RoutedMlp]]:
    """Yield the MLPs, with their places, that follow the choice of node `at`."""
    for i in range(at + 1, len(nodes)):
        node = nodes[i]
        if isinstance(node, Route):
            return
        if isinstance(node, RoutedMlp):
            yield i, node


def _affected(nodes: Sequence[Node], at: int) -> Iterator[tuple[int, TokenNode]]:
    """Yield later nodes that would have more tokens, with their places: until one returns fewer rows for the head."""
    for i in range(at + 1, len(nodes)):
        node = nodes[i]
        if not isinstance(node, TokenNode):
            return
        yield i, node
        if isinstance(node, Attention) and node.rows < node.tokens:
            return


def _with_more(node: TokenNode, more: int) -> TokenNode:
    """Return the node with more tokens, none of which it removes."""
    changed: dict[str, Any] = {"tokens": node.tokens + more}
    if isinstance(node, Attention) and node.rows == node.tokens:
        changed["rows"] = node.rows + more
    if isinstance(node, Reduce):
        changed["num_keep"] = node.num_keep + more
    return replace(node, **changed)
