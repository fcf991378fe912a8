"""The PyTorch backend: every node kind in plain PyTorch operators, on any device."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from dvit_infer.graph.graph import Graph
from dvit_infer.graph.nodes import Attention, Convolution, Embed, Head, Mlp, Node, Prune
from dvit_infer.ops.prune_tokens import gather_tokens_ref

NAME = "torch"

Watch = Callable[[Node, torch.Tensor], None]


def _convolution(node: Convolution, x: torch.Tensor) -> torch.Tensor:
    w = node.weights
    x = F.conv2d(x, w["weight"], w.get("bias"), stride=node.stride, padding=w["weight"].shape[-1] // 2)
    if "bn.weight" in w:
        x = F.batch_norm(x, w["bn.running_mean"], w["bn.running_var"], w["bn.weight"], w["bn.bias"], eps=node.eps)
    return x.relu()


def _embed(node: Embed, x: torch.Tensor) -> torch.Tensor:
    w = node.weights
    patches = F.conv2d(x, w["weight"], w["bias"], stride=w["weight"].shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([w["prefix"].expand(len(x), -1, -1), patches], dim=1) + w["pos_embed"]


def _norm(node: Attention | Mlp | Head, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], node.weights.get("norm.weight"), node.weights.get("norm.bias"), node.eps)


def _attention(node: Attention, x: torch.Tensor) -> torch.Tensor:
    w, (b, n, c), rows = node.weights, x.shape, node.rows
    y = _norm(node, x)
    weight, bias = w["qkv.weight"], w.get("qkv.bias")
    if rows == n:
        qkv = F.linear(y, weight, bias).view(b, n, 3, node.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q_bias, kv_bias = (None, None) if bias is None else (bias[:c], bias[c:])
        q = F.linear(y[:, :rows], weight[:c], q_bias).view(b, rows, node.num_heads, -1).transpose(1, 2)
        k, v = F.linear(y, weight[c:], kv_bias).view(b, n, 2, node.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, scale=node.scale).transpose(1, 2).reshape(b, rows, c)
    return _residual(x[:, :rows], F.linear(out, w["proj.weight"], w["proj.bias"]), node.residual_scale)


def _mlp(node: Mlp, x: torch.Tensor) -> torch.Tensor:
    w = node.weights
    hidden = F.gelu(F.linear(_norm(node, x), w["fc1.weight"], w["fc1.bias"]))
    return _residual(x, F.linear(hidden, w["fc2.weight"], w["fc2.bias"]), node.residual_scale)


def _residual(x: torch.Tensor, branch: torch.Tensor, scale: float) -> torch.Tensor:
    return x + branch if scale == 1.0 else x + branch * scale


def _head(node: Head, x: torch.Tensor) -> torch.Tensor:
    w = node.weights
    x = _norm(node, x)
    logits = F.linear(x[:, 0], w["head.weight"], w["head.bias"])
    if "head_dist.weight" in w:
        logits = (logits + F.linear(x[:, 1], w["head_dist.weight"], w["head_dist.bias"])) / 2
    if node.reads_patches:
        logits = logits + 0.5 * F.linear(x[:, 1:], w["aux_head.weight"], w["aux_head.bias"]).amax(dim=1)
    return logits.float()


_RUN: dict[type[Node], Callable[[Any, torch.Tensor], torch.Tensor]] = {
    Convolution: _convolution,
    Embed: _embed,
    Attention: _attention,
    Mlp: _mlp,
    Head: _head,
}


_CUDNN: Any = torch.backends.cudnn  # its stubs do not know the setting
_PRECISION = threading.Lock()
_in_full = 0  # how many runs need full precision right now
_before = ""


@contextlib.contextmanager
def as_asked(images: torch.Tensor) -> Iterator[None]:
    """Arithmetic in the dtype of `images` and no other: no autocast around the call, no TF32 in float32 convolutions.

    TF32 is what cuDNN's convolutions use by default. The setting is the process's: the first run in changes it, the
    last one out puts it back.
    """
    global _in_full, _before
    with torch.autocast(images.device.type, enabled=False):
        if not images.is_cuda or images.dtype != torch.float32:
            yield
            return
        with _PRECISION:
            if _in_full == 0:
                _before = _CUDNN.conv.fp32_precision
                _CUDNN.conv.fp32_precision = "ieee"
            _in_full += 1
        try:
            yield
        finally:
            with _PRECISION:
                _in_full -= 1
                if _in_full == 0:
                    _CUDNN.conv.fp32_precision = _before


def run(
    graph: Graph, images: torch.Tensor, kept: Sequence[torch.Tensor] | None = None, watch: Watch | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a graph.

    Args:
        graph: its Prune nodes packed by `fold`.
        images: (B, 3, H, W), normalised, on the weights' device and in their dtype.
        kept: a stage each, (B, k) original patch positions to keep instead of the predictors' choice.
        watch: called with every node and its output.

    Returns:
        Logits (B, K) float32, and the kept original positions, a stage each.
    """
    with as_asked(images):
        return _run(graph, images, kept, watch)


def _run(
    graph: Graph, x: torch.Tensor, kept: Sequence[torch.Tensor] | None, watch: Watch | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    chosen: list[torch.Tensor] = []
    positions: torch.Tensor | None = None  # original positions of the surviving patches; None: all are there
    for node in graph.nodes:
        if isinstance(node, Prune):
            if kept is None:
                x, index = torch.ops.dvit.prune_tokens(x, node.packed, node.num_keep, node.num_prefix, node.eps)
            else:
                given = kept[len(chosen)]
                index = given if positions is None else torch.searchsorted(positions, given)
                x = gather_tokens_ref(x, index, node.num_prefix)
            positions = index if positions is None else positions.gather(1, index)
            chosen.append(positions)
        else:
            x = _RUN[type(node)](node, x)
        if watch is not None:
            watch(node, x)
    return x, chosen
