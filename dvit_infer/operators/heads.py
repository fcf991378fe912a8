"""Write what follows the blocks as operators: heads, pooling, classifiers."""

import torch

from dvit_infer.graph.heads import Classify, Head, MapPool, Pool
from dvit_infer.operators.builder import Builder, V


def head(to: Builder[V], node: Head, x: V) -> V:
    y = to.norm(x, node.eps, node.dim)
    if node.reads == "mean":
        patches = to.float32(to.tokens(y, node.num_prefix, node.tokens))
        y = to.in_dtype(mean_of(to, patches, node.num_prefix, node.tokens))
        return to.result(to.linear_of(y, "head", node.weights), node.name, *node.out_shape)
    logits = to.linear_of(to.token(y, 0), "head", node.weights)
    if "head_dist.weight" in node.weights:
        logits = to.emit("Add", logits, to.linear_of(to.token(y, 1), "head_dist", node.weights))
        logits = to.emit("Mul", logits, _half(to))
    if node.reads == "all":
        aux = to.linear_of(to.tokens(y, 1, node.tokens), "aux_head", node.weights)
        best = to.reduce("ReduceMax", aux, 1)
        logits = to.emit("Add", logits, to.emit("Mul", best, _half(to)))
    return to.result(logits, node.name, *node.out_shape)


def _half(to: Builder[V]) -> V:
    return to.weight("half", torch.tensor(0.5, dtype=to.dtype))


def pool(to: Builder[V], node: Pool, x: V) -> V:
    rows = node.class_rows
    few = node.reads == "prefix" and node.tokens > rows
    y = last_norm(to, node, to.tokens(x, 0, rows) if few else x)
    parts = []
    if node.reads.startswith("prefix"):
        parts.append(to.token(y, 0) if rows == 1 else to.reduce("ReduceMean", to.tokens(y, 0, rows), 1))
    if node.reads != "prefix":
        first = 0 if node.reads == "all" else node.num_prefix
        parts.append(mean_of(to, to.tokens(y, first, node.tokens) if first else y, first, node.tokens))
    return _after_pooling(to, node, to.emit("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0])


def mean_of(to: Builder[V], x: V, first: int, end: int) -> V:
    """Emit the mean (B, C) of x (B, n, C), the tokens from `first` up to `end`, by the number of patches in each."""
    if to.sizes is None:
        return to.reduce("ReduceMean", x, 1)
    with to.exactly():
        sizes = to.tokens(to.sizes, first, end)
        shares = to.emit("Div", sizes, to.reduce("ReduceSum", sizes, 1, keepdims=1))
        mean = to.emit("MatMul", to.emit("Unsqueeze", shares, to.ints(1)), x)
        return to.emit("Reshape", mean, to.ints(0, -1))


def map_pool(to: Builder[V], node: MapPool, x: V) -> V:
    w, heads, size = node.weights, node.num_heads, node.dim // node.num_heads
    x = to.tokens(x, node.num_prefix, node.tokens) if node.num_prefix else x
    x = to.in_dtype(last_norm(to, node, x))
    k, v = (
        to.linear(x, name, weight, bias)
        for name, weight, bias in zip("kv", w["kv.weight"].chunk(2), w["kv.bias"].chunk(2), strict=True)
    )
    k, v = (to.emit("Reshape", part, to.ints(0, -1, heads, size)) for part in (k, v))
    q = to.own("queries", w["queries"].reshape(1, 1, heads, size))
    y = to.emit("Reshape", to.attend(q, k, v, node.scale), to.ints(0, node.dim))
    y = to.linear_of(y, "proj", w)
    hidden = to.in_dtype(to.norm_of(to.float32(y), "mlp_norm", w, node.eps))
    hidden = to.activate(to.linear_of(hidden, "fc1", w), node.act)
    y = to.emit("Add", y, to.linear_of(hidden, "fc2", w))
    return _after_pooling(to, node, to.float32(y))


def classify(to: Builder[V], node: Classify, x: V) -> V:
    w = node.weights
    return to.result(to.linear(to.in_dtype(x), "head", w["weight"], w.get("bias")), node.name, *node.out_shape)


def last_norm(to: Builder[V], node: Head | Pool, x: V) -> V:
    """Emit the last LayerNorm of rows, gain and shift included, in float32; the rows in float32 without one."""
    if node.last_norm is None:
        return to.float32(x)
    gain, shift = node.last_norm
    return to.affine_norm(to.float32(x), "last_norm", gain.float(), shift.float(), node.eps)


def _after_pooling(to: Builder[V], node: Pool, y: V) -> V:
    """Emit what follows pooling, for rows in float32."""
    w = node.weights
    y = to.norm_of(y, "fc_norm", w, node.eps) if "fc_norm.weight" in w else y
    if "pre_logits.weight" in w:
        y = to.emit("Tanh", to.float32(to.linear_of(to.in_dtype(y), "pre_logits", w)))
    if "projection.weight" in w:
        y = to.linear_of(to.in_dtype(y), "projection", w)
    return to.result(y, node.name, *node.out_shape)
