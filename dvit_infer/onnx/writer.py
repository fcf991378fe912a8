"""Write the nodes of a graph as standard ONNX operators; nothing is traced.

A node's output has the node's name in the ONNX graph (`blocks.3.attn`), and the choice of a pruning stage is named
`prune.0/index`, so that both can be read or given by name.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.nodes import PLACES, Attention, Convolution, Embed, Mlp, Node, Norm, NormNode, Prune
from dvit_infer.onnx.attention import attention
from dvit_infer.onnx.building import ELEMENT, Builder, value_info
from dvit_infer.onnx.heads import classify, head, map_pool, pool
from dvit_infer.onnx.opsets import DEFAULT, IR_VERSIONS, check_opset
from dvit_infer.onnx.prune_tokens import DOMAIN, NAME, prune_tokens_function
from dvit_infer.reduction.predictor import PredictorPrune

_FOLDED_AWAY = ("bn.weight", "in_conv.0.weight", "gamma", "inner_norm.weight", "latent")


def onnx_model(
    graph: Graph,
    *,
    opset: int = DEFAULT,
    uint8: bool = False,
    kept: bool = False,
) -> onnx.ModelProto:
    """Return a folded graph as an ONNX model for any number of images.

    Input `images` (B, 3, H, W), normalised, in the graph's dtype; outputs `logits` (B, K) float32, of a model without
    classes the embedding, and, with `kept`, `kept_0` and so on, (B, k) int64 original patch positions, ascending. In a
    float16 model LayerNorm, softmax, rotation, pooling and scores are float32, and so are activations that opset lacks.

    Args:
        graph: folded, in float32 or float16.
        opset: opset version of the default domain, one of `IR_VERSIONS`.
        uint8: take uint8 (B, H, W, 3) images instead and normalise them by the config's mean and std.
        kept: also output the kept positions.

    Raises:
        InputError: A node kind, the dtype or the opset is not supported.
        ValueError: The graph is not folded.
    """
    check_opset(opset)
    if graph.dtype not in ELEMENT:
        raise InputError(f"dtype: {str(graph.dtype)[6:]} cannot be written as ONNX; float32 and float16 can")
    domains, functions = [helper.make_opsetid("", opset)], []
    if any(isinstance(node, PredictorPrune) for node in graph.nodes):
        domains.append(helper.make_opsetid(DOMAIN, 1))
        functions.append(prune_tokens_function(opset, ELEMENT[graph.dtype], graph.config.body.embed_dim))
    model: onnx.ModelProto = helper.make_model(
        _Writer(graph, opset, uint8, kept).proto(),
        functions=functions,
        opset_imports=domains,
        ir_version=IR_VERSIONS[opset],
        producer_name="dvit_infer",
    )
    return model


class _Writer:
    """Writes the nodes in order, by one function for each kind, like a runner."""

    def __init__(self, graph: Graph, opset: int, uint8: bool, kept: bool) -> None:
        self._config, self._kept = graph.config, kept
        self._has_places = any(name in node.weights for node in graph.nodes for name in PLACES)
        self._positions = ""  # original positions (B, k) of the remaining patches; "": all
        self._to = to = Builder(opset, graph.dtype, graph.nodes[-1].name)
        self._outputs = [value_info("logits", TensorProto.FLOAT, *graph.nodes[-1].out_shape)]
        height, width = graph.config.image_size
        if uint8:
            self._input = value_info("images", TensorProto.UINT8, height, width, 3)
            x = self._normalised("images")
        else:
            self._input, x = value_info("images", to.element, 3, height, width), "images"
        for node in graph.nodes:
            if node.kind != "prune" and node.kind not in _WRITES:
                raise InputError(f"format: {node.name}, a node of kind {node.kind!r}, cannot be written as ONNX")
            if not _is_folded(node):
                raise ValueError(f"{node.name} is not folded; fold the graph first")
            to.stem = node.name
            x = self._prune(node, x) if isinstance(node, Prune) else _WRITES[node.kind](to, node, x)

    def proto(self) -> onnx.GraphProto:
        return helper.make_graph(
            self._to.nodes,
            "dvit_infer",
            [self._input],
            self._outputs,
            self._to.weights,
            value_info=self._to.values,
        )

    def _normalised(self, images: str) -> str:
        """Convert uint8 (B, H, W, 3) to normalised (B, 3, H, W) in the dtype, like `images.tensors.normalise`."""
        to = self._to
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self._config.mean, self._config.std))
        x = to.emit("Cast", to.emit("Transpose", images, perm=(0, 3, 1, 2)), to=TensorProto.FLOAT)
        x = to.emit("Sub", to.emit("Mul", x, to.own("inverse", torch.tensor(1 / 255))), to.own("mean", mean))
        return to.in_dtype(to.emit("Mul", x, to.own("inverse_std", 1 / std)))

    def _prune(self, node: Prune, x: str) -> str:
        if not isinstance(node, PredictorPrune):
            raise InputError(f"format: the reduction {self._config.reduction.method} cannot be written as ONNX")
        to, (w1, _, *others) = self._to, node.packed
        names = ("w1", "b1", "w2_own", "w2_mean", "b2", "w3", "b3", "w4", "b4")
        weights = [to.own(name, w.t() if w.ndim == 2 else w) for name, w in zip(names, (w1, *others), strict=True)]
        counts = {"num_keep": node.num_keep, "num_prefix": node.num_prefix, "eps": node.eps}
        outs = node.name, f"{node.name}/index"
        kept_x, index = to.emit_all(NAME, x, *weights, outs=outs, domain=DOMAIN, **counts)
        to.said(index, node.num_keep, element=TensorProto.INT64)
        out = None
        if self._kept:
            out = f"kept_{len(self._outputs) - 1}"
            self._outputs.append(value_info(out, TensorProto.INT64, node.num_keep))
        if not self._positions:
            self._positions = to.emit("Identity", index, out=out)
        elif self._kept or self._has_places:
            self._positions = to.emit("GatherElements", self._positions, index, out=out, axis=1)
        if self._has_places:
            to.rows = self._with_prefix(node)
        return to.said(kept_x, *node.out_shape)

    def _with_prefix(self, node: Prune) -> str:
        """Emit the original rows of all tokens that remain, (B, P+k): those of prefix tokens come first."""
        to, prefix = self._to, node.num_prefix
        if not prefix:
            return self._positions
        first = to.own("first", torch.tensor([*range(prefix), *[prefix] * node.num_keep]))
        return to.emit("Add", to.emit("Pad", self._positions, to.ints(0, prefix, 0, 0)), first)


def _is_folded(node: Node) -> bool:
    w = node.weights
    left = any(name in w for name in _FOLDED_AWAY) or (isinstance(node, NormNode) and "norm.weight" in w)
    turned = isinstance(node, Attention) and "sin" in w and not node.rope_half
    return not left and not turned and getattr(node, "residual_scale", 1.0) == 1.0


# The other node kinds.


def _convolution(to: Builder, node: Convolution, x: str) -> str:
    size = node.weights["weight"].shape[-1]
    x = _conv(to, node, x, stride=node.stride, padding=size // 2)
    return to.said(to.emit("Relu", x, out=node.name), *node.out_shape)


def _conv(to: Builder, node: Convolution | Embed, x: str, stride: int, padding: int) -> str:
    given = [to.own(name, node.weights[name]) for name in ("weight", "bias") if name in node.weights]
    return to.emit("Conv", x, *given, strides=(stride, stride), pads=(padding,) * 4)


def _embed(to: Builder, node: Embed, x: str) -> str:
    w, (tokens, dim), prefix = node.weights, node.out_shape, node.num_prefix
    x = _conv(to, node, x, stride=w["weight"].shape[-1], padding=0)
    x = to.emit("Transpose", to.emit("Reshape", x, to.ints(0, dim, tokens - prefix)), perm=(0, 2, 1))
    # Prefix tokens are constants: pad with rows of zeros, and add them as part of the position embedding.
    x = to.emit("Pad", x, to.ints(0, prefix, 0, 0, 0, 0)) if prefix else x
    table = w["pos_embed"].to(torch.float32, copy=True)
    table[:, :prefix] += w["prefix"].float()
    return to.said(to.emit("Add", x, to.own("pos_embed", table.to(to.dtype)), out=node.name), tokens, dim)


def _norm(to: Builder, node: Norm, x: str) -> str:
    y = to.norm_of(to.float32(x), "norm", node.weights, node.eps)
    return to.said(to.emit("Cast", y, to=to.element, out=node.name), *node.out_shape)


def _mlp(to: Builder, node: Mlp, x: str) -> str:
    w, y = node.weights, to.norm(x, node.eps, node.dim)
    if node.gated:
        weights, biases = w["fc1.weight"].chunk(2), w["fc1.bias"].chunk(2)
        gate, factor = (to.linear(y, f"fc1_{i}", *part) for i, part in enumerate(zip(weights, biases, strict=True)))
        hidden = to.emit("Mul", to.activate(gate, node.act), factor)
    else:
        hidden = to.activate(to.linear_of(y, "fc1", w), node.act)
    hidden = to.norm(hidden, node.eps, w["fc2.weight"].shape[1]) if node.has_inner_norm else hidden
    branch = to.linear_of(hidden, "fc2", w)
    return to.said(to.emit("Add", x, branch, out=node.name), node.tokens, node.dim)


_WRITES: dict[str, Callable[[Builder, Any, str], str]] = {
    "convolution": _convolution,
    "embed": _embed,
    "norm": _norm,
    "attention": attention,
    "mlp": _mlp,
    "head": head,
    "pool": pool,
    "map_pool": map_pool,
    "classify": classify,
}
