"""Write attention as operators, with what it knows about the places of tokens."""

from typing import Generic

import torch

from dvit_infer.graph.nodes import Attention, Weights
from dvit_infer.operators.builder import Builder, V

EXACT = "mean_k"  # the linear whose result decides which tokens are merged: not for int8


def attention(to: Builder[V], node: Attention, x: V) -> V:
    w, dim, few = node.weights, node.dim, node.rows != node.tokens
    y = to.norm(x, node.eps, dim)
    weights, biases = (_thirds(w, part, dim) for part in ("weight", "bias"))
    asking = to.tokens(y, 0, node.rows) if few else y
    x = to.tokens(x, 0, node.rows) if few else x
    # Three products: in ONNX Runtime they are faster than one followed by a split.
    q, k, v = (
        to.linear(rows, part, weights[part], biases.get(part)) for part, rows in (("q", asking), ("k", y), ("v", y))
    )
    q, k, v = (to.emit("Reshape", part, to.ints(0, -1, node.num_heads, dim // node.num_heads)) for part in (q, k, v))
    places = _Places(to, node)
    q, k = (places.in_places(part, name, n) for part, name, n in ((q, "q", node.rows), (k, "k", node.tokens)))
    reader = "" if node.has_inner_norm else "proj"
    bias = places.bias()
    sizes = None
    if node.adds_sizes and to.sizes is not None:
        sizes = to.emit("Unsqueeze", to.emit("Log", to.sizes), to.ints(1, 2))
        bias = sizes if bias is None else to.emit("Add", bias, sizes)
    if node.leaves == "mean_keys" and not places.move:
        to.signal = _mean_keys(to, y, weights["k"], biases.get("k"), node.num_heads)
    else:
        to.signal = _signal(to, node, q, k, bias, sizes)
    mixed = to.attend(q, k, v, node.scale, bias, reader)
    mixed = to.emit("Reshape", mixed, to.ints(0, node.rows, dim))
    mixed = to.norm(mixed, node.eps, dim) if node.has_inner_norm else mixed
    branch = to.linear_of(mixed, "proj", w)
    return to.said(to.emit("Add", x, branch, out=node.name), node.rows, dim)


def _signal(to: Builder[V], node: Attention, q: V, k: V, bias: V | None, sizes: V | None) -> V | None:
    """Emit what a node's attention leaves for the reduction behind it, in float32."""
    if not node.leaves:
        return None
    with to.exactly():
        q, k = to.float32(q), to.float32(k)
        if node.leaves == "mean_keys":
            return to.reduce("ReduceMean", k, 2)
        if node.leaves == "class_attention":
            query = to.tokens(q, 0, 1)
            bias = None if bias is None else bias if bias is sizes else to.part(bias, -2, 0, 1)
        else:
            patches = to.tokens(q, node.num_prefix, node.tokens) if node.num_prefix else q
            query, bias = to.reduce("ReduceMean", patches, 1, keepdims=1), sizes
        query, k = to.emit("Transpose", query, perm=(0, 2, 1, 3)), to.emit("Transpose", k, perm=(0, 2, 3, 1))
        scores = to.emit("MatMul", query, k)
        scores = scores if node.scale == 1.0 else to.emit("Mul", scores, to.number(node.scale))
        scores = scores if bias is None else to.emit("Add", scores, bias)
        return to.emit("Reshape", to.emit("Softmax", scores, axis=-1), to.ints(0, node.num_heads, node.tokens))


def _mean_keys(to: Builder[V], y: V, weight: torch.Tensor, bias: torch.Tensor | None, heads: int) -> V:
    """Emit the mean over heads of linear keys, (B, n, D) float32: one small linear, which does not read the keys."""
    weight = weight.float().view(heads, -1, weight.shape[1]).mean(dim=0)
    keys = to.emit("MatMul", y, to.own(f"{EXACT}.weight", weight.t().to(to.dtype)))
    if bias is not None:
        mean = bias.float().view(heads, -1).mean(dim=0)
        keys = to.emit("Add", keys, to.own(f"{EXACT}.bias", mean.to(to.dtype)))
    return to.float32(keys)


class _Places(Generic[V]):
    """Norms of queries and keys, rotary positions and relative position bias of one node."""

    def __init__(self, to: Builder[V], node: Attention) -> None:
        self._to, self._node = to, node
        self._tables = self._rotation() if "sin" in node.weights else None
        self.move = node.has_qk_norm or self._tables is not None  # whether queries and keys differ from linears

    def in_places(self, x: V, name: str, tokens: int) -> V:
        """Emit queries or keys (B, tokens, heads, head size), normalised and rotated; prefix tokens come first."""
        to, node = self._to, self._node
        tables = self._tables if tokens > node.num_prefix else None
        if tables is None and not node.has_qk_norm:
            return x
        x = to.float32(x)
        if node.has_qk_norm:
            x = to.norm_of(x, f"{name}_norm", node.weights, node.eps)
        if tables is not None:
            sin, cos = tables
            first, second = to.halves(x)
            turned = to.emit("Concat", second, first, axis=-1)
            x = to.emit("Add", to.emit("Mul", x, cos), to.emit("Mul", turned, sin))
        return to.in_dtype(x)

    def _rotation(self) -> tuple[V, V]:
        """Emit tables of sines and cosines, (..., P+n, 1 or heads, head size), by which prefix tokens stay as they are.

        Each channel is paired with the one half of the head's channels away; the sign of the sines is part of them.
        """
        to, node = self._to, self._node
        sin, cos = (node.weights[name] for name in ("sin", "cos"))
        sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], dim=-1)
        found = []
        for name, table, prefix in (("sin", sin, 0.0), ("cos", cos, 1.0)):
            table = torch.nn.functional.pad(table, (0, 0, node.num_prefix, 0), value=prefix)
            if to.fuses and to.rows is not None:  # a row for tokens without a place
                table = torch.nn.functional.pad(table, (0, 0, 0, 1), value=prefix)
            table = table.transpose(0, 1) if table.ndim == 3 else table[:, None]
            found.append(to.remaining(name, table))
        return found[0], found[1]

    def bias(self) -> V | None:
        """Emit the relative position bias in float32, for what the scores are of; None if there is none."""
        to, node = self._to, self._node
        if "pair_bias" not in node.weights:
            return None
        table = node.weights["pair_bias"]  # (heads, all tokens, all tokens)
        if to.rows is None:
            return to.table("pair_bias", table[:, : node.rows])
        if to.fuses:  # a row and a column for tokens without a place
            table = torch.nn.functional.pad(table, (0, 1, 0, 1))
        queries = to.rows if node.rows == node.tokens else to.tokens(to.rows, 0, node.rows)
        start = to.emit("Mul", to.emit("Unsqueeze", queries, to.ints(2)), to.ints(table.shape[2]))
        pairs = to.emit("Add", start, to.emit("Unsqueeze", to.rows, to.ints(1)))
        found = to.emit("Gather", to.table("pairs", table.flatten(1).t()), pairs, axis=0)
        return to.emit("Transpose", found, perm=(0, 3, 1, 2))


def _thirds(weights: Weights, part: str, dim: int) -> dict[str, torch.Tensor]:
    """Return the weights or biases of q, k and v separately; empty if there is no bias."""
    rows = [weights[f"{name}.{part}"] for name in ("qkv", "q", "kv") if f"{name}.{part}" in weights]
    return dict(zip("qkv", (third for w in rows for third in torch.split(w, dim)), strict=True)) if rows else {}
