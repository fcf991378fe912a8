"""Write the node kinds of models with maps as operators. A map (H, W) is tokens (B, H * W, C): channels-last."""

import torch

from dvit_infer.graph.maps import Depthwise, Downsample, Stem, WindowAttention
from dvit_infer.graph.routes import RoutedMlp
from dvit_infer.operators.builder import Builder, V


def stem(to: Builder[V], node: Stem, x: V) -> V:
    size = node.weights["weight"].shape[-1]
    given = [to.own(name, node.weights[name]) for name in ("weight", "bias")]
    x = to.emit("Conv", x, *given, strides=(size, size), pads=(0,) * 4)
    tokens, dim = node.out_shape
    x = to.emit("Transpose", to.emit("Reshape", x, to.ints(0, dim, tokens)), perm=(0, 2, 1))
    x = to.norm_of(to.float32(x), "norm", node.weights, node.eps)
    return to.said(to.rounded(x, node.name), tokens, dim)


def downsample(to: Builder[V], node: Downsample, x: V) -> V:
    w, dim, (height, width), (rows, columns) = node.weights, node.dim, node.map, node.half
    if not node.norms_four:
        x = to.norm(x, node.eps, dim)
    if (height, width) != (2 * rows, 2 * columns):
        x = to.emit("Reshape", x, to.ints(0, height, width, dim))
        if node.pads:
            x = to.emit("Pad", x, to.ints(0, 0, 0, 0, 0, 2 * rows - height, 2 * columns - width, 0))
        else:
            x = to.part(to.part(x, 1, 0, 2 * rows), 2, 0, 2 * columns)
    # Two neighbours in a row are together already.
    x = to.emit("Reshape", x, to.ints(0, rows, 2, columns, 2 * dim))
    x = to.emit("Reshape", to.emit("Transpose", x, perm=(0, 1, 3, 2, 4)), to.ints(0, rows * columns, 4 * dim))
    if node.norms_four:
        x = to.norm(x, node.eps, 4 * dim)
    y = to.linear_of(x, "reduction", w)
    return to.said(to.emit("Identity", y, out=node.name), *node.out_shape)


def depthwise(to: Builder[V], node: Depthwise, x: V) -> V:
    tokens, dim = node.in_shape
    kernel = node.weights["weight"].shape[-1]
    maps = to.emit("Transpose", to.emit("Reshape", x, to.ints(0, *node.map, dim)), perm=(0, 3, 1, 2))
    given = [to.own(name, node.weights[name]) for name in ("weight", "bias")]
    maps = to.emit("Conv", maps, *given, strides=(1, 1), pads=(kernel // 2,) * 4, group=dim)
    y = to.emit("Reshape", to.emit("Transpose", maps, perm=(0, 2, 3, 1)), to.ints(0, tokens, dim))
    to.branch = to.said(y, tokens, dim)
    return x


def taken(to: Builder[V], x: V) -> V:
    """Return the branch that was begun, which is then no more, or x."""
    branch, to.branch = to.branch, None
    return x if branch is None else branch


def window_attention(to: Builder[V], node: WindowAttention, x: V) -> V:
    w, dim, windows, heads = node.weights, node.dim, node.windows, node.num_heads
    m, count = windows.positions, windows.count
    index = windows.index.flatten()
    y = to.norm(x, node.eps, dim)
    if windows.is_padded:
        y = to.emit("Pad", y, to.ints(0, 0, 0, 0, 1, 0))
    y = to.emit("Gather", y, to.table(f"windows_{windows.side}_{windows.shift}", index), axis=1)
    parts = []
    for i, name in enumerate("qkv"):
        rows = slice(i * dim, (i + 1) * dim)
        part = to.linear(y, name, w["qkv.weight"][rows], w["qkv.bias"][rows])
        if windows.is_padded:
            is_padded = to.own("is_padded", (index == node.tokens)[:, None])
            part = to.emit("Where", is_padded, to.own(f"pad.{name}", w["pad"][rows]), part)
        parts.append(to.emit("Reshape", part, to.ints(-1, m, heads, dim // heads)))
    if len(w["bias"]) == 1:
        q, k, v = parts
        mixed = to.attend(q, k, v, node.scale, to.own("bias", w["bias"][0]))
    else:
        counts = torch.tensor([count for _, count in windows.kinds], device=w["bias"].device)
        mixed = _attend_by_window(to, node, parts, w["bias"].repeat_interleave(counts, dim=0))
    mixed = to.emit("Reshape", mixed, to.ints(-1, count * m, dim))
    mixed = to.emit("Gather", mixed, to.table(f"back_{windows.side}_{windows.shift}", windows.inverse), axis=1)
    branch = to.linear_of(mixed, "proj", w)
    return to.said(to.emit("Add", x, branch, out=node.name), node.tokens, dim)


def _attend_by_window(to: Builder[V], node: WindowAttention, parts: list[V], biases: torch.Tensor) -> V:
    """Emit attention of q, k, v (B * windows, M, heads, head size), with another bias (heads, M, M) in each window."""
    m, heads = node.windows.positions, node.num_heads
    q, k, v = (
        to.emit("Transpose", part, perm=perm)
        for part, perm in zip(parts, ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)), strict=True)
    )
    scores = to.float32(to.emit("MatMul", q, k))
    scores = to.emit("Reshape", scores, to.ints(-1, node.windows.count, heads, m, m))
    scores = to.emit("Softmax", to.emit("Add", scores, to.own("bias", biases)), axis=-1)
    scores = to.emit("Reshape", scores, to.ints(-1, heads, m, m))
    return to.emit("Transpose", to.emit("MatMul", to.in_dtype(scores), v), perm=(0, 2, 1, 3))


def routed_mlp(to: Builder[V], node: RoutedMlp, x: V) -> V:
    """Rows of each branch are gathered together, so that its linears run once, and all are put back by one gather."""
    assert to.routes is not None
    chosen, others, place = to.routes
    w, source = node.weights, taken(to, x)
    hidden = to.linear_of(to.norm(to.rows_of(source, chosen), node.eps, node.dim), "fc1", w)
    slow = to.linear_of(to.activate(hidden, node.act), "fc2", w)
    parts = [slow]
    if node.num_keep < node.tokens:
        parts.append(to.linear_of(to.norm(to.rows_of(source, others), node.eps, node.dim), "fast", w))
    branch = to.rows_of(to.emit("Concat", *parts, axis=1), place)
    return to.said(to.emit("Add", x, branch, out=node.name), *node.out_shape)
