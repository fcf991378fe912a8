"""Write the nodes of a graph as standard ONNX operators; nothing is traced.

A node's output has the node's name in the ONNX graph (`blocks.3.attn`), and the choice of a pruning stage is named
`prune.0/index`, so that both can be read or given by name.
"""

import math
from collections.abc import Mapping
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.nodes import Attention, Convolution, Embed, Head, Mlp, Prune
from dvit_infer.onnx.opsets import DEFAULT, IR_VERSIONS, axes_are_input, check_opset, has_gelu, needs_norm_bias
from dvit_infer.onnx.prune_tokens import DOMAIN, NAME, prune_tokens_function
from dvit_infer.reduction.predictor import PredictorPrune

_ELEMENT = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
_FOLDED_AWAY = ("norm.weight", "bn.weight", "in_conv.0.weight", "gamma")


def onnx_model(
    graph: Graph,
    *,
    opset: int = DEFAULT,
    uint8: bool = False,
    kept: bool = False,
) -> onnx.ModelProto:
    """Return a folded graph as an ONNX model for any number of images.

    Input `images` (B, 3, H, W), normalised, in the graph's dtype; outputs `logits` (B, K) float32 and, with `kept`,
    `kept_0` and so on, (B, k) int64 original patch positions, ascending. In a float16 model LayerNorm, softmax, the
    mean over patches and the scores are float32, below opset 20 also GELU, which is then written out.

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
    if graph.dtype not in _ELEMENT:
        raise InputError(f"dtype: {str(graph.dtype)[6:]} cannot be written as ONNX; float32 and float16 can")
    domains, functions = [helper.make_opsetid("", opset)], []
    if any(isinstance(node, PredictorPrune) for node in graph.nodes):
        domains.append(helper.make_opsetid(DOMAIN, 1))
        functions.append(prune_tokens_function(opset, _ELEMENT[graph.dtype], graph.config.body.embed_dim))
    model: onnx.ModelProto = helper.make_model(
        _Writer(graph, opset, uint8, kept).proto(),
        functions=functions,
        opset_imports=domains,
        ir_version=IR_VERSIONS[opset],
        producer_name="dvit_infer",
    )
    return model


class _Writer:
    """Writes the nodes in order, with a method for each kind, like a runner."""

    def __init__(self, graph: Graph, opset: int, uint8: bool, kept: bool) -> None:
        self._opset = opset
        self._config, self._dtype, self._kept = graph.config, graph.dtype, kept
        self._element = _ELEMENT[graph.dtype]
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._values: list[onnx.ValueInfoProto] = []
        self._outputs = [_value("logits", TensorProto.FLOAT, graph.config.num_classes)]
        self._positions = ""  # original positions of the remaining patches; "": all
        self._stem = "images"  # prefix of the names of the values being written
        height, width = graph.config.image_size
        if uint8:
            self._input = _value("images", TensorProto.UINT8, height, width, 3)
            x = self._normalised("images")
        else:
            self._input, x = _value("images", self._element, 3, height, width), "images"
        for node in graph.nodes:
            write = getattr(self, f"_{node.kind}", None)
            if write is None:
                raise InputError(f"format: {node.name}, a node of kind {node.kind!r}, cannot be written as ONNX")
            if any(name in node.weights for name in _FOLDED_AWAY) or getattr(node, "residual_scale", 1.0) != 1.0:
                raise ValueError(f"{node.name} is not folded; fold the graph first")
            self._stem = node.name
            x = write(node, x)

    def proto(self) -> onnx.GraphProto:
        weights = list(self._weights.values())
        return helper.make_graph(
            self._nodes, "dvit_infer", [self._input], self._outputs, weights, value_info=self._values
        )

    # Building blocks.

    def _emit(self, op: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        return self._emit_all(op, *inputs, outs=(out or f"{self._stem}/{op}_{len(self._nodes)}",), **attributes)[0]

    def _emit_all(self, op: str, *inputs: str, outs: tuple[str, ...], **attributes: Any) -> tuple[str, ...]:
        self._nodes.append(helper.make_node(op, inputs, outs, name=outs[0], **attributes))
        return outs

    def _weight(self, name: str, tensor: torch.Tensor) -> str:
        if name not in self._weights:
            self._weights[name] = numpy_helper.from_array(tensor.detach().cpu().contiguous().numpy(), name)
        return name

    def _own(self, name: str, tensor: torch.Tensor) -> str:
        return self._weight(f"{self._stem}/{name}", tensor)

    def _ints(self, *values: int) -> str:
        return self._weight("ints/" + "_".join(map(str, values)), torch.tensor(values, dtype=torch.int64))

    def _said(self, name: str, *shape: int) -> str:
        """Record the shape of a value, and return its name."""
        self._values.append(_value(name, self._element, *shape))
        return name

    def _float32(self, x: str) -> str:
        return x if self._dtype == torch.float32 else self._emit("Cast", x, to=TensorProto.FLOAT)

    def _in_dtype(self, x: str) -> str:
        return x if self._dtype == torch.float32 else self._emit("Cast", x, to=self._element)

    def _normalised(self, images: str) -> str:
        """Convert uint8 (B, H, W, 3) to normalised (B, 3, H, W) in the dtype, like `images.tensors.normalise`."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self._config.mean, self._config.std))
        x = self._emit("Cast", self._emit("Transpose", images, perm=(0, 3, 1, 2)), to=TensorProto.FLOAT)
        x = self._emit(
            "Sub", self._emit("Mul", x, self._own("inverse", torch.tensor(1 / 255))), self._own("mean", mean)
        )
        return self._in_dtype(self._emit("Mul", x, self._own("inverse_std", 1 / std)))

    def _linear(self, x: str, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
        """Emit x weight^T + bias; the weight is stored transposed for MatMul, (in, out)."""
        y = self._emit("MatMul", x, self._own(f"{name}.weight", weight.t()))
        return y if bias is None else self._emit("Add", y, self._own(f"{name}.bias", bias))

    def _norm(self, x: str, eps: float, dim: int) -> str:
        """Emit a LayerNorm whose gain and shift are folded into the following linear."""
        affine = [self._weight(f"ones/{dim}", torch.ones(dim))]
        if needs_norm_bias(self._opset):
            affine.append(self._weight(f"zeros/{dim}", torch.zeros(dim)))
        return self._in_dtype(self._emit("LayerNormalization", self._float32(x), *affine, axis=-1, epsilon=eps))

    def _gelu(self, x: str) -> str:
        """Emit GELU; where there is no such operator, x / sqrt(2), Erf, + 1, * x, * 0.5, which runtimes recognise."""
        if has_gelu(self._opset):
            return self._emit("Gelu", x)
        x = self._float32(x)
        root, one, half = (self._weight(f"float32/{v:g}", torch.tensor(v)) for v in (math.sqrt(2), 1.0, 0.5))
        y = self._emit("Add", self._emit("Erf", self._emit("Div", x, root)), one)
        return self._in_dtype(self._emit("Mul", self._emit("Mul", x, y), half))

    def _reduce(self, op: str, x: str, axis: int) -> str:
        if axes_are_input(self._opset):
            return self._emit(op, x, self._ints(axis), keepdims=0)
        return self._emit(op, x, axes=(axis,), keepdims=0)

    def _tokens(self, x: str, first: int, end: int) -> str:
        return self._emit("Slice", x, self._ints(first), self._ints(end), self._ints(1))

    # The node kinds.

    def _convolution(self, node: Convolution, x: str) -> str:
        weight = node.weights["weight"]
        size = weight.shape[-1]
        return self._said(
            self._emit("Relu", self._conv(node, x, stride=node.stride, padding=size // 2), out=node.name),
            *node.out_shape,
        )

    def _conv(self, node: Convolution | Embed, x: str, stride: int, padding: int) -> str:
        given = [self._own(name, node.weights[name]) for name in ("weight", "bias") if name in node.weights]
        return self._emit("Conv", x, *given, strides=(stride, stride), pads=(padding,) * 4)

    def _embed(self, node: Embed, x: str) -> str:
        w, (tokens, dim), prefix = node.weights, node.out_shape, node.num_prefix
        x = self._conv(node, x, stride=w["weight"].shape[-1], padding=0)
        x = self._emit("Transpose", self._emit("Reshape", x, self._ints(0, dim, tokens - prefix)), perm=(0, 2, 1))
        # Prefix tokens are constants: pad with rows of zeros, and add them as part of the position embedding.
        x = self._emit("Pad", x, self._ints(0, prefix, 0, 0, 0, 0))
        table = w["pos_embed"].to(torch.float32, copy=True)
        table[:, :prefix] += w["prefix"].float()
        return self._said(
            self._emit("Add", x, self._own("pos_embed", table.to(self._dtype)), out=node.name), tokens, dim
        )

    def _attention(self, node: Attention, x: str) -> str:
        w, dim = node.weights, node.dim
        y = self._norm(x, node.eps, dim)
        weights, biases = (_thirds(node.weights, part, dim) for part in ("weight", "bias"))
        asking = y if node.rows == node.tokens else self._tokens(y, 0, node.rows)
        x = x if node.rows == node.tokens else self._tokens(x, 0, node.rows)
        # Three products: in ONNX Runtime they are faster than one followed by a split.
        q, k, v = (
            self._linear(rows, part, weights[part], biases.get(part))
            for part, rows in (("q", asking), ("k", y), ("v", y))
        )
        q, k, v = (
            self._emit("Reshape", part, self._ints(0, -1, node.num_heads, dim // node.num_heads)) for part in (q, k, v)
        )
        q, k, v = (
            self._emit("Transpose", part, perm=perm)
            for part, perm in ((q, (0, 2, 1, 3)), (k, (0, 2, 3, 1)), (v, (0, 2, 1, 3)))
        )
        scores = self._emit("MatMul", q, k)
        if node.scale != 1.0:
            scores = self._emit("Mul", scores, self._own("scale", torch.tensor(node.scale, dtype=self._dtype)))
        mixed = self._emit("MatMul", self._in_dtype(self._emit("Softmax", self._float32(scores), axis=-1)), v)
        mixed = self._emit("Transpose", mixed, perm=(0, 2, 1, 3))
        mixed = self._emit("Reshape", mixed, self._ints(0, node.rows, dim))
        branch = self._linear(mixed, "proj", w["proj.weight"], w["proj.bias"])
        return self._said(self._emit("Add", x, branch, out=node.name), node.rows, dim)

    def _mlp(self, node: Mlp, x: str) -> str:
        w = node.weights
        hidden = self._linear(self._norm(x, node.eps, node.dim), "fc1", w["fc1.weight"], w["fc1.bias"])
        branch = self._linear(self._gelu(hidden), "fc2", w["fc2.weight"], w["fc2.bias"])
        return self._said(self._emit("Add", x, branch, out=node.name), node.tokens, node.dim)

    def _prune(self, node: Prune, x: str) -> str:
        if not isinstance(node, PredictorPrune):
            raise InputError(f"format: the reduction {self._config.reduction.method} cannot be written as ONNX")
        w1, _, *others = node.packed
        names = ("w1", "b1", "w2_own", "w2_mean", "b2", "w3", "b3", "w4", "b4")
        weights = [self._own(name, w.t() if w.ndim == 2 else w) for name, w in zip(names, (w1, *others), strict=True)]
        counts = {"num_keep": node.num_keep, "num_prefix": node.num_prefix, "eps": node.eps}
        outs = node.name, f"{node.name}/index"
        kept_x, index = self._emit_all(NAME, x, *weights, outs=outs, domain=DOMAIN, **counts)
        self._values.append(_value(index, TensorProto.INT64, node.num_keep))
        if self._kept:
            stage = f"kept_{len(self._outputs) - 1}"
            self._outputs.append(_value(stage, TensorProto.INT64, node.num_keep))
            if self._positions:
                self._positions = self._emit("GatherElements", self._positions, index, out=stage, axis=1)
            else:
                self._positions = self._emit("Identity", index, out=stage)
        return self._said(kept_x, *node.out_shape)

    def _head(self, node: Head, x: str) -> str:
        w = node.weights
        y = self._norm(x, node.eps, node.dim)
        if node.reads == "mean":
            patches = self._float32(self._tokens(y, node.num_prefix, node.tokens))
            y = self._in_dtype(self._reduce("ReduceMean", patches, 1))
            logits = self._linear(y, "head", w["head.weight"], w["head.bias"])
            return self._emit("Cast", logits, to=TensorProto.FLOAT, out="logits")
        logits = self._of_token(node, y, 0, "head")
        if "head_dist.weight" in w:
            logits = self._emit("Add", logits, self._of_token(node, y, 1, "head_dist"))
            logits = self._emit("Mul", logits, self._half())
        if node.reads == "all":
            patches = self._tokens(y, 1, node.tokens)
            aux = self._linear(patches, "aux_head", w["aux_head.weight"], w["aux_head.bias"])
            best = self._reduce("ReduceMax", aux, 1)
            logits = self._emit("Add", logits, self._emit("Mul", best, self._half()))
        return self._emit("Cast", logits, to=TensorProto.FLOAT, out="logits")

    def _of_token(self, node: Head, y: str, token: int, head: str) -> str:
        """Emit the logits of one prefix token, (B, K)."""
        w = node.weights
        row = self._emit("Gather", y, self._weight(f"int/{token}", torch.tensor(token)), axis=1)
        return self._linear(row, head, w[f"{head}.weight"], w[f"{head}.bias"])

    def _half(self) -> str:
        return self._weight("half", torch.tensor(0.5, dtype=self._dtype))


def _value(name: str, element: int, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, ("batch", *shape))


def _thirds(weights: Mapping[str, torch.Tensor], part: str, dim: int) -> dict[str, torch.Tensor]:
    """Return the weights or biases of q, k and v separately; empty if there is no bias."""
    rows = [weights[f"{name}.{part}"] for name in ("qkv", "q", "kv") if f"{name}.{part}" in weights]
    return dict(zip("qkv", torch.split(torch.cat(rows), dim), strict=True)) if rows else {}
