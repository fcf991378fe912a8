"""Write the nodes of a graph in order, by one function for each kind, like a runner; nothing is traced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch

from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.heads import Head, Wanted, nodes_for
from dvit_infer.graph.nodes import PLACES, Attention, Convolution, Embed, Mlp, Node, Norm, NormNode
from dvit_infer.graph.reductions import Prune, Reduce
from dvit_infer.operators.attention import attention
from dvit_infer.operators.builder import Builder, V
from dvit_infer.operators.heads import classify, head, last_norm, map_pool, mean_of, pool
from dvit_infer.operators.maps import depthwise, downsample, routed_mlp, stem, taken, window_attention
from dvit_infer.operators.reduce import Origins, keep, merge, route
from dvit_infer.reduction.predictor import PredictorPrune
from dvit_infer.reduction.random import RandomPrune
from dvit_infer.reduction.route import PredictorRoute
from dvit_infer.reduction.tome import Merge

_FOLDED_AWAY = (
    *("bn.weight", "in_conv.0.weight", "gamma", "inner_norm.weight", "latent"),
    *("fast_norm.weight", "fast_gamma"),
)


@dataclass(frozen=True)
class Written(Generic[V]):
    """What was written.

    Attributes:
        x: the output.
        kept: for each stage, if wanted, what it did, as a call of the engine returns it.
        choices: for each stage its choice by itself: the kept positions among its patches, (B, k) int64, or for every
            token its row among those that remain, (B, P+n) int64.
    """

    x: V
    kept: list[V]
    choices: list[V]


def write(
    to: Builder[V],
    graph: Graph,
    x: V,
    *,
    output: Wanted = "logits",
    kept: bool = False,
    given: Sequence[V] = (),
) -> Written[V]:
    """Write a folded graph.

    Args:
        to: the builder.
        x: images (B, 3, H, W), normalised, in the builder's dtype.
        output: what to return, as of a runner.
        kept: whether to return the kept positions too, named `kept_0` and so on.
        given: for each stage a choice in place of its own, as in `Written.choices`.

    Raises:
        InputError: a node kind cannot be written.
        ValueError: the graph is not folded.
    """
    to.begin()
    nodes, reader = nodes_for(graph.nodes, output)
    to.fuses = any(isinstance(node, Prune) and node.fused is not None for node in nodes)
    has_places = any(name in node.weights for node in nodes for name in PLACES)
    origins = Origins(to, graph.config.num_patches, kept, keeps_dropped=output == "feature_map")
    writer = _Writer(to, origins, given, has_places, follows=kept or has_places or origins.keeps_dropped)
    for node in nodes:
        x = writer.write(node, x)
    x = origins.on_grid(x) if origins.keeps_dropped else x
    if reader is not None:
        x = last_norm(to, reader, x)
        if isinstance(reader, Head) and output == "features":
            rows = reader.feature_rows
            end = rows.stop or reader.tokens
            features = to.tokens(x, rows.start, end)
            is_mean = reader.reads == "mean"
            x = mean_of(to, features, rows.start, end) if is_mean else to.reduce("ReduceMean", features, 1)
    return Written(x, origins.kept if kept else [], writer.choices)


class _Writer(Generic[V]):
    """Writes nodes, and follows where the tokens between them were."""

    def __init__(
        self, to: Builder[V], origins: Origins[V], given: Sequence[V], has_places: bool, follows: bool
    ) -> None:
        self._to, self._origins, self._given = to, origins, given
        self._has_places, self._follows = has_places, follows
        self.choices: list[V] = []

    def write(self, node: Node, x: V) -> V:
        if not isinstance(node, Reduce) and node.kind not in _WRITES:
            raise InputError(f"{node.name}, a node of kind {node.kind!r}, cannot be written")
        if not _is_folded(node):
            raise ValueError(f"{node.name} is not folded; fold the graph first")
        self._to.stem = node.name
        return self._reduce(node, x) if isinstance(node, Reduce) else _WRITES[node.kind](self._to, node, x)

    def _reduce(self, node: Reduce, x: V) -> V:
        to = self._to
        given, before = self._given[len(self.choices)] if self._given else None, x
        if isinstance(node, Merge):
            x, choice = merge(to, node, x, given)
        elif isinstance(node, PredictorPrune) and given is None:
            x, choice = to.prune_tokens(node, x)
        elif isinstance(node, PredictorRoute):
            choice = route(to, node, x, given)
        elif isinstance(node, RandomPrune) and given is None:
            x, choice = keep(to, node, x, to.for_each(node.weights["index"], x, f"{node.name}/index"))
        elif isinstance(node, Prune):
            x, choice = keep(to, node, x, given)
        else:
            raise InputError(f"{node.name}, a {type(node).__name__}, cannot be written")
        to.said(choice, node.choice_size, dtype=torch.int64)
        self.choices.append(choice)
        if self._follows:
            if isinstance(node, Merge):
                self._origins.note_merged(node, choice)
            elif isinstance(node, PredictorRoute):
                self._origins.note_routed(choice)
            else:
                self._origins.note_kept(node, choice, before)
        if self._has_places:
            to.rows, to.stage = self._origins.rows(node), node.name
        return x if node.rows is not None or isinstance(node, PredictorRoute) else to.said(x, *node.out_shape)


def _is_folded(node: Node) -> bool:
    w = node.weights
    left = any(name in w for name in _FOLDED_AWAY) or (isinstance(node, NormNode) and "norm.weight" in w)
    turned = isinstance(node, Attention) and "sin" in w and not node.rope_half
    return not left and not turned and getattr(node, "residual_scale", 1.0) == 1.0


# The other node kinds.


def _convolution(to: Builder[V], node: Convolution, x: V) -> V:
    size = node.weights["weight"].shape[-1]
    x = _conv(to, node, x, stride=node.stride, padding=size // 2)
    return to.said(to.emit("Relu", x, out=node.name), *node.out_shape)


def _conv(to: Builder[V], node: Convolution | Embed, x: V, stride: int, padding: int) -> V:
    given = [to.own(name, node.weights[name]) for name in ("weight", "bias") if name in node.weights]
    return to.emit("Conv", x, *given, strides=(stride, stride), pads=(padding,) * 4)


def _embed(to: Builder[V], node: Embed, x: V) -> V:
    w, (tokens, dim), prefix = node.weights, node.out_shape, node.num_prefix
    x = _conv(to, node, x, stride=w["weight"].shape[-1], padding=0)
    x = to.emit("Transpose", to.emit("Reshape", x, to.ints(0, dim, tokens - prefix)), perm=(0, 2, 1))
    # Prefix tokens are constants: pad with rows of zeros, and add them as part of the position embedding.
    x = to.emit("Pad", x, to.ints(0, prefix, 0, 0, 0, 0)) if prefix else x
    table = w["pos_embed"].to(torch.float32, copy=True)
    table[:, :prefix] += w["prefix"].float()
    return to.said(to.emit("Add", x, to.own("pos_embed", table.to(to.dtype)), out=node.name), tokens, dim)


def _norm(to: Builder[V], node: Norm, x: V) -> V:
    y = to.norm_of(to.float32(x), "norm", node.weights, node.eps)
    return to.said(to.rounded(y, node.name), *node.out_shape)


def _mlp(to: Builder[V], node: Mlp, x: V) -> V:
    w = node.weights
    y = to.norm(taken(to, x) if node.of_branch else x, node.eps, node.dim)
    if node.gated:
        weights, biases = w["fc1.weight"].chunk(2), w["fc1.bias"].chunk(2)
        gate, factor = (to.linear(y, f"fc1_{i}", *part) for i, part in enumerate(zip(weights, biases, strict=True)))
        hidden = to.emit("Mul", to.activate(gate, node.act), factor)
    else:
        hidden = to.activate(to.linear_of(y, "fc1", w), node.act)
    hidden = to.norm(hidden, node.eps, w["fc2.weight"].shape[1]) if node.has_inner_norm else hidden
    branch = to.linear_of(hidden, "fc2", w)
    return to.said(to.emit("Add", x, branch, out=node.name), node.tokens, node.dim)


_WRITES: dict[str, Callable[[Builder[Any], Any, Any], Any]] = {
    "convolution": _convolution,
    "embed": _embed,
    "norm": _norm,
    "attention": attention,
    "mlp": _mlp,
    "stem": stem,
    "downsample": downsample,
    "depthwise": depthwise,
    "window_attention": window_attention,
    "routed_mlp": routed_mlp,
    "head": head,
    "pool": pool,
    "map_pool": map_pool,
    "classify": classify,
}
