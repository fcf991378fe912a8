"""What a reduction saves: MACs against graphs with one stage less, time by shares of tokens; and the table."""

from dataclasses import replace

import pytest
from any_vit import tiny

from dvit_infer.graph import Graph, fold
from dvit_infer.graph.nodes import Attention, Mlp
from dvit_infer.graph.reductions import Reduce
from dvit_infer.graph.saving import saved_macs, saved_time

METHODS = ["tome", "evit", "random", "predictor"]


def graph_of(kind: str, method: str, folded: bool = True) -> Graph:
    graph = tiny(kind, method).graph()
    return fold(graph) if folded else graph


def macs_without(graph: Graph, at: int) -> int:
    """MACs of the nodes behind `at` if it removed no token: every one counted anew from its own sizes."""
    node = graph.nodes[at]
    more, total = node.tokens - node.left, 0
    for later in graph.nodes[at + 1 :]:
        grows = "class rows only" not in later.folded
        if isinstance(later, Attention):
            tokens = later.tokens + more
            total += replace(later, tokens=tokens, rows=later.rows + more * grows).macs
        elif isinstance(later, Mlp):
            total += replace(later, tokens=later.tokens + more * grows).macs
        elif isinstance(later, Reduce):
            total += replace(later, tokens=later.tokens + more, num_keep=later.num_keep + more).macs
        else:
            total += replace(later, tokens=later.tokens + more * grows).macs if hasattr(later, "tokens") else later.macs
    return total


@pytest.mark.parametrize(
    ("kind", "method"),
    [*(("deit", method) for method in METHODS), ("distilled", "evit"), ("qk-norm", "tome"), ("siglip", "tome")],
)
def test_what_is_saved_is_what_later_nodes_would_need(kind, method):
    graph = graph_of(kind, method)
    for at, node in enumerate(graph.nodes):
        if not isinstance(node, Reduce):
            assert saved_macs(graph.nodes, at) is None
        elif node.rows is not None:  # it chooses only for those who ask
            assert saved_macs(graph.nodes, at) == 0
        else:
            assert saved_macs(graph.nodes, at) == macs_without(graph, at) - sum(n.macs for n in graph.nodes[at + 1 :])
            assert saved_macs(graph.nodes, at) > 0


def test_a_last_attention_of_class_rows_saves_keys_and_values_alone():
    graph = graph_of("deit", "random")
    at = max(i for i, node in enumerate(graph.nodes) if isinstance(node, Reduce))
    node, attention = graph.nodes[at], graph.nodes[at + 1]
    c, removed = attention.dim, node.tokens - node.left
    norm, keys_and_values, products = 4 * c, 2 * c * c, 2 * attention.rows * c
    assert saved_macs(graph.nodes, at) == removed * (norm + keys_and_values + products)


def test_time_is_saved_by_shares_of_tokens():
    graph = graph_of("deit", "tome")
    seconds = [1.0 + i for i in range(len(graph.nodes))]
    names = [node.name for node in graph.nodes]
    first = names.index("merge.0")
    removed = graph.nodes[first].merged
    behind = [names.index(name) for name in ("blocks.0.mlp", "blocks.1.attn")]
    expected = sum(seconds[i] * removed / graph.nodes[i].tokens for i in behind)
    assert saved_time(graph.nodes, seconds, first) == pytest.approx(expected)
    assert saved_time(graph.nodes, seconds, 0) is None


@pytest.mark.parametrize("method", METHODS)
def test_the_table_has_it_for_nodes_that_reduce(method):
    graph = graph_of("deit", method)
    lines = [line.split("│") for line in str(graph).splitlines() if line.startswith("│")]
    saved = {cells[1].strip(): cells[6].strip() for cells in lines}
    for at, node in enumerate(graph.nodes):
        macs = saved_macs(graph.nodes, at)
        assert saved[node.name] == ("" if macs is None else f"{macs / 1e6:.1f}")
    assert saved["total"] == ""
