"""Folding: move constants into weights and skip rows that no node reads; exact up to rounding.

Weights are folded in double precision and rounded once.
"""

from dataclasses import replace
from itertools import zip_longest
from typing import TypeVar

import torch

from dvit_infer.graph.graph import Graph
from dvit_infer.graph.heads import Head, MapPool, Pool
from dvit_infer.graph.maps import WindowAttention
from dvit_infer.graph.nodes import PLACES, Attention, Branch, Convolution, Mlp, Node, NormNode, Weights
from dvit_infer.graph.reductions import Reduce
from dvit_infer.graph.routes import RoutedMlp

_ROWS = 32  # of a matrix that are in double precision at a time: whole ones would be a large part of a model
_QUICK = 1.702  # of CLIP's GELU


def fold(graph: Graph, dtype: torch.dtype = torch.float32) -> Graph:
    """Apply all folds. `dtype` is the dtype the graph will run in."""
    return fold_across(replace(graph, nodes=tuple(fold_node(node, dtype) for node in graph.nodes)))


def fold_node(node: Node, dtype: torch.dtype) -> Node:
    """Apply the folds within a node."""
    folds = (
        *(_layer_norm, _softmax_scale, _residual_scale, _layer_scale, _inner_norm),
        *(_rotary_pairs, _quick_gelu, _latent_query, _batch_norm),
    )
    node = node.folded_for(dtype)
    for apply in folds:  # each lets go of what it replaces
        node = apply(node)
    return node


def fold_across(graph: Graph) -> Graph:
    """Apply what concerns several nodes, each of which is folded."""
    return replace(graph, nodes=tuple(_leave_stats(_class_only(_share_places(list(graph.nodes))))))


_N = TypeVar("_N", bound=Node)


def _scaled(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return weight * factor, computed in double precision, in float32."""
    out = torch.empty_like(weight, dtype=torch.float32)
    for into, part, by in zip(*(torch.split(x, _ROWS) for x in (out, weight, factor.expand_as(weight))), strict=True):
        into.copy_(part.double().mul_(by))
    return out


def _product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return weight x in double precision."""
    return torch.cat([part.double() @ x for part in torch.split(weight, _ROWS)])


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
    w, folded = node.weights, {}
    gain, shift = w["norm.weight"].double(), w["norm.bias"].double()
    for linear in node.normed:
        if (weight := w.get(f"{linear}.weight")) is not None:
            bias = _product(weight, shift)
            folded[f"{linear}.weight"] = _scaled(weight, gain)
            folded[f"{linear}.bias"] = bias + w[f"{linear}.bias"].double() if f"{linear}.bias" in w else bias
    if isinstance(node, RoutedMlp):
        weight, bias = w["fast.weight"], w["fast.bias"].double()
        folded["fast.weight"] = _scaled(weight, w["fast_norm.weight"].double())
        folded["fast.bias"] = bias + _product(weight, w["fast_norm.bias"].double())
        node = replace(node, weights={n: v for n, v in node.weights.items() if not n.startswith("fast_norm.")})
    if isinstance(node, Head):
        folded |= {f"kept_{name}": node.weights[name] for name in ("norm.weight", "norm.bias")}
    return _noted(node, "LayerNorm", folded, drop="norm")


def _softmax_scale(node: Node) -> Node:
    """Fold the scale of the attention scores into the query rows of qkv, or into the norm of the queries."""
    if not isinstance(node, Attention | WindowAttention) or node.scale == 1.0:
        return node
    if isinstance(node, Attention) and node.has_qk_norm:
        scaled = {name: w.double() * node.scale for name, w in node.weights.items() if name.startswith("q_norm.")}
        return replace(_noted(node, "softmax scale", scaled), scale=1.0)
    rows = node.weights["qkv.weight"].new_ones(3 * node.dim, dtype=torch.float64)
    rows[: node.dim] = node.scale
    folded = {"qkv.weight": _scaled(node.weights["qkv.weight"], rows[:, None])}
    folded |= {name: node.weights[name].double() * rows for name in ("qkv.bias", "pad") if name in node.weights}
    return replace(_noted(node, "softmax scale", folded), scale=1.0)


def _residual_scale(node: Node) -> Node:
    """Fold LV-ViT's 1 / skip_lam into the last linear of the branch."""
    if not isinstance(node, Branch) or node.residual_scale == 1.0:
        return node
    factor = node.weights[f"{node.last}.bias"].new_tensor(node.residual_scale, dtype=torch.float64)
    scaled = {name: _scaled(node.weights[name], factor) for name in (f"{node.last}.weight", f"{node.last}.bias")}
    return replace(_noted(node, "1/skip_lam", scaled), residual_scale=1.0)


def _layer_scale(node: Node) -> Node:
    """Fold a factor for each channel into the last linear of the branch."""
    if not isinstance(node, Branch) or "gamma" not in node.weights:
        return node
    gamma = node.weights["gamma"].double()
    weight, bias = (node.weights[f"{node.last}.{part}"] for part in ("weight", "bias"))
    scaled = {f"{node.last}.weight": _scaled(weight, gamma[:, None]), f"{node.last}.bias": _scaled(bias, gamma)}
    kept = {name: w for name, w in node.weights.items() if name not in ("gamma", "fast_gamma")}
    if "fast_gamma" in node.weights:
        fast = node.weights["fast_gamma"].double()
        scaled["fast.weight"] = _scaled(node.weights["fast.weight"], fast[:, None])
        scaled["fast.bias"] = _scaled(node.weights["fast.bias"], fast)
    return _noted(replace(node, weights=kept), "layer scale", scaled)


def _inner_norm(node: Node) -> Node:
    """Fold the gain and shift of the LayerNorm before a branch's last linear into it."""
    if not isinstance(node, Branch) or "inner_norm.weight" not in node.weights:
        return node
    weight, gain = node.weights[f"{node.last}.weight"], node.weights["inner_norm.weight"].double()
    bias = node.weights[f"{node.last}.bias"].double() + _product(weight, node.weights["inner_norm.bias"].double())
    folded = {f"{node.last}.weight": _scaled(weight, gain), f"{node.last}.bias": bias}
    return _noted(node, "inner LayerNorm", folded, drop="inner_norm")


def _rotary_pairs(node: Node) -> Node:
    """Order the channels of heads so that rotary positions pair one with that half of them away, not its neighbour.

    Halves are contiguous, which is faster. Scores do not depend on the order of channels.
    """
    if not isinstance(node, Attention) or "sin" not in node.weights or node.rope_half:
        return node
    w, size = node.weights, node.dim // node.num_heads
    order = torch.arange(size).view(-1, 2).t().flatten()
    ordered = {name: w[name][..., order] for name in ("sin", "cos")}
    ordered |= {name: value[order] for name, value in w.items() if name.startswith(("q_norm.", "k_norm."))}
    rows = torch.arange(3 * node.dim).view(3, node.num_heads, size)
    rows = torch.cat([rows[:2, :, order].flatten(), rows[2].flatten()])
    ordered |= {name: value[rows] for name, value in w.items() if name.startswith("qkv.")}
    return replace(_noted(node, "rotary pairs", ordered), rope_half=True)


def _quick_gelu(node: Node) -> Node:
    """Turn CLIP's GELU into SiLU: x * sigmoid(1.702 x) = silu(1.702 x) / 1.702."""
    if not isinstance(node, Mlp) or node.act != "quick_gelu" or node.gated or node.has_inner_norm:
        return node
    scaled = {name: node.weights[name].double() * _QUICK for name in ("fc1.weight", "fc1.bias")}
    scaled["fc2.weight"] = node.weights["fc2.weight"].double() / _QUICK
    return replace(_noted(node, "quick GELU", scaled), act="silu")


def _latent_query(node: Node) -> Node:
    """Compute the query of attention pooling, which depends on weights alone, with the scale of the scores."""
    if not isinstance(node, MapPool) or "latent" not in node.weights:
        return node
    w = {name: value.double() for name, value in node.weights.items()}
    queries = (w["latent"] @ w["q.weight"].t() + w["q.bias"]) * node.scale
    kept = {name: value for name, value in node.weights.items() if name != "latent"}
    return replace(_noted(replace(node, weights=kept), "latent query", {"queries": queries}, drop="q"), scale=1.0)


def _share_places(nodes: list[Node]) -> list[Node]:
    """Let nodes hold one table of places together where theirs are equal, as those of most models are."""
    last: dict[str, torch.Tensor] = {}
    shared = []
    for node in nodes:
        tables = {name: node.weights[name] for name in PLACES if name in node.weights}
        for name, table in tables.items():
            if name not in last or table.shape != last[name].shape or not torch.equal(table, last[name]):
                last[name] = table
        ours = {name: last[name] for name in tables}
        shared.append(replace(node, weights={**node.weights, **ours}) if ours else node)
    return shared


def _class_only(nodes: list[Node]) -> list[Node]:
    """If the head reads only prefix tokens, compute queries, projection and MLP of the last block only for them."""
    at = next((i for i, node in enumerate(nodes) if isinstance(node, Head | Pool)), 0)
    reader = nodes[at]
    start = next((i for i in (at - 2, at - 3) if i >= 0 and isinstance(nodes[i], Attention)), at)
    last = nodes[start:at]  # attention, perhaps a reduction, MLP
    if not last or not isinstance(attention := last[0], Attention) or not isinstance(mlp := last[-1], Mlp):
        return nodes
    if not isinstance(reader, Head | Pool) or reader.reads != "prefix" or attention.leaves == "pooled_attention":
        return nodes
    rows, note = reader.rows, "class rows only"
    between = [replace(node, rows=rows, folded=(*node.folded, note)) for node in last[1:-1] if isinstance(node, Reduce)]
    return [
        *nodes[:start],
        replace(attention, rows=rows, weights=_queries_apart(attention), folded=(*attention.folded, note)),
        *between,
        replace(mlp, tokens=rows, folded=(*mlp.folded, note)),
        replace(reader, tokens=rows, num_prefix=rows, folded=(*reader.folded, note)),
        *nodes[at + 1 :],
    ]


def _leave_stats(nodes: list[Node]) -> list[Node]:
    """Let each node with a residual leave statistics of its output, where the next one normalises all its rows."""

    def takes(node: Node | None) -> bool:
        return isinstance(node, Branch) and node.takes_stats and not (isinstance(node, Mlp) and node.of_branch)

    return [
        replace(node, leaves_stats=True) if isinstance(node, Branch) and takes(following) else node
        for node, following in zip_longest(nodes, nodes[1:])
    ]


def _queries_apart(node: Attention) -> dict[str, torch.Tensor]:
    """Return the weights with qkv split into q and kv, as there are fewer query rows than key rows."""
    weights = {name: w for name, w in node.weights.items() if not name.startswith("qkv.")}
    for part in ("weight", "bias"):
        if (qkv := node.weights.get(f"qkv.{part}")) is not None:
            weights |= {f"q.{part}": qkv[: node.dim].clone(), f"kv.{part}": qkv[node.dim :].clone()}
    return weights
