"""Folding: move constants into weights and skip rows that no node reads; exact up to rounding.

Weights are folded in double precision and rounded once.
"""

import functools
from dataclasses import replace
from itertools import zip_longest
from typing import TypeVar

import torch

from dvit_infer.graph.graph import Graph
from dvit_infer.graph.nodes import Attention, Branch, Convolution, Head, Mlp, Node, NormNode, Weights


def fold(graph: Graph, dtype: torch.dtype = torch.float32) -> Graph:
    """Apply all folds. `dtype` is the dtype the graph will run in."""
    folds = (_layer_norm, _softmax_scale, _residual_scale, _layer_scale, _batch_norm)
    nodes = [functools.reduce(lambda n, f: f(n), folds, node.folded_for(dtype)) for node in graph.nodes]
    return replace(graph, nodes=tuple(_leave_stats(_class_only(nodes))))


_N = TypeVar("_N", bound=Node)


def _noted(node: _N, what: str, weights: Weights, drop: str | None = None) -> _N:
    """Return the node with some weights replaced (in float32), those of the module `drop` removed, and a note."""
    kept = {name: w for name, w in node.weights.items() if drop is None or not name.startswith(f"{drop}.")}
    new = {name: w.float() for name, w in weights.items()}
    return replace(node, weights={**kept, **new}, folded=(*node.folded, what))


def _batch_norm(node: Node) -> Node:
    """Fold BatchNorm with running statistics, one factor and one shift per channel, into the convolution before it."""
    if not isinstance(node, Convolution) or "bn.weight" not in node.weights:
        return node
    w = {name: value.double() for name, value in node.weights.items()}
    factor = w["bn.weight"] * torch.rsqrt(w["bn.running_var"] + node.eps)
    bias = w["bn.bias"] - w["bn.running_mean"] * factor
    return _noted(node, "BatchNorm", {"weight": w["weight"] * factor[:, None, None, None], "bias": bias}, drop="bn")


def _layer_norm(node: Node) -> Node:
    """Fold the gain and shift of LayerNorm into the linear after it: W (g * x + s) + b = (W g) x + (b + W s)."""
    if not isinstance(node, NormNode) or "norm.weight" not in node.weights:
        return node
    w = {name: value.double() for name, value in node.weights.items()}
    folded = {}
    for linear in node.normed:
        if f"{linear}.weight" in w:
            weight, shift = w[f"{linear}.weight"], w[f"{linear}.weight"] @ w["norm.bias"]
            folded[f"{linear}.weight"] = weight * w["norm.weight"]
            folded[f"{linear}.bias"] = shift + w[f"{linear}.bias"] if f"{linear}.bias" in w else shift
    if isinstance(node, Head):
        folded |= {f"kept_{name}": node.weights[name] for name in ("norm.weight", "norm.bias")}
    return _noted(node, "LayerNorm", folded, drop="norm")


def _softmax_scale(node: Node) -> Node:
    """Fold the scale of the attention scores into the query rows of qkv."""
    if not isinstance(node, Attention) or node.scale == 1.0:
        return node
    rows = node.weights["qkv.weight"].new_ones(3 * node.dim, dtype=torch.float64)
    rows[: node.dim] = node.scale
    folded = {"qkv.weight": node.weights["qkv.weight"].double() * rows[:, None]}
    if "qkv.bias" in node.weights:
        folded["qkv.bias"] = node.weights["qkv.bias"].double() * rows
    return replace(_noted(node, "softmax scale", folded), scale=1.0)


def _residual_scale(node: Node) -> Node:
    """Fold LV-ViT's 1 / skip_lam into the last linear of the branch."""
    if not isinstance(node, Branch) or node.residual_scale == 1.0:
        return node
    names = (f"{node.last}.weight", f"{node.last}.bias")
    scaled = {name: node.weights[name].double() * node.residual_scale for name in names}
    return replace(_noted(node, "1/skip_lam", scaled), residual_scale=1.0)


def _layer_scale(node: Node) -> Node:
    """Fold a factor for each channel into the last linear of the branch."""
    if not isinstance(node, Branch) or "gamma" not in node.weights:
        return node
    gamma = node.weights["gamma"].double()
    weight, bias = (node.weights[f"{node.last}.{part}"].double() for part in ("weight", "bias"))
    scaled = {f"{node.last}.weight": weight * gamma[:, None], f"{node.last}.bias": bias * gamma}
    kept = {name: w for name, w in node.weights.items() if name != "gamma"}
    return _noted(replace(node, weights=kept), "layer scale", scaled)


def _class_only(nodes: list[Node]) -> list[Node]:
    """If the head reads only prefix tokens, compute queries, projection and MLP of the last block only for them."""
    *front, attention, mlp, head = nodes
    if not isinstance(head, Head) or head.reads != "prefix":
        return nodes
    if not isinstance(attention, Attention) or not isinstance(mlp, Mlp):
        return nodes
    rows, note = head.rows, "class rows only"
    return [
        *front,
        replace(attention, rows=rows, weights=_queries_apart(attention), folded=(*attention.folded, note)),
        replace(mlp, tokens=rows, folded=(*mlp.folded, note)),
        replace(head, tokens=rows, num_prefix=rows, folded=(*head.folded, note)),
    ]


def _leave_stats(nodes: list[Node]) -> list[Node]:
    """Let each node with a residual leave statistics of its output, where the next one normalises all its rows."""
    return [
        replace(node, leaves_stats=True) if isinstance(node, Branch) and isinstance(following, Branch) else node
        for node, following in zip_longest(nodes, nodes[1:])
    ]


def _queries_apart(node: Attention) -> dict[str, torch.Tensor]:
    """Return the weights with qkv split into q and kv, as there are fewer query rows than key rows."""
    weights = {name: w for name, w in node.weights.items() if not name.startswith("qkv.")}
    for part in ("weight", "bias"):
        if (qkv := node.weights.get(f"qkv.{part}")) is not None:
            weights |= {f"q.{part}": qkv[: node.dim].clone(), f"kv.{part}": qkv[node.dim :].clone()}
    return weights
