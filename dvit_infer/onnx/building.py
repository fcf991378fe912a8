"""Emit ONNX operators: the parts that node kinds are written of."""

import math
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from dvit_infer.graph.nodes import Weights
from dvit_infer.onnx.opsets import axes_are_input, has_gelu, has_num_outputs, needs_norm_bias

ELEMENT = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}


class Builder:
    """The operators, weights and shapes of an ONNX graph that is being written.

    Attributes:
        opset: opset version of the default domain.
        dtype, element: the dtype of values and weights, for PyTorch and for ONNX; float32 is used inside of norms,
            softmax, rotation and pooling.
        nodes, values: what has been emitted.
        stem: prefix of the names of the values being written.
        rows: the value with the original rows (B, P+k) of the tokens that remain; "": all do.
        last: the name of the node whose output is `logits`.
    """

    def __init__(self, opset: int, dtype: torch.dtype, last: str) -> None:
        self.opset, self.dtype, self.element, self.last = opset, dtype, ELEMENT[dtype], last
        self.nodes: list[onnx.NodeProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self.stem, self.rows = "images", ""
        self._weights: dict[str, onnx.TensorProto] = {}
        self._tables: dict[str, tuple[str, torch.Tensor]] = {}  # the last one of each name
        self._remaining: dict[tuple[str, str], str] = {}

    @property
    def weights(self) -> list[onnx.TensorProto]:
        return list(self._weights.values())

    def emit(self, op: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        return self.emit_all(op, *inputs, outs=(out or self.fresh(op),), **attributes)[0]

    def emit_all(self, op: str, *inputs: str, outs: tuple[str, ...], **attributes: Any) -> tuple[str, ...]:
        self.nodes.append(helper.make_node(op, inputs, outs, name=outs[0], **attributes))
        return outs

    def fresh(self, op: str) -> str:
        """Return a name for the output of the next operator."""
        return f"{self.stem}/{op}_{len(self.nodes)}"

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        if name not in self._weights:
            self._weights[name] = numpy_helper.from_array(tensor.detach().cpu().contiguous().numpy(), name)
        return name

    def own(self, name: str, tensor: torch.Tensor) -> str:
        return self.weight(f"{self.stem}/{name}", tensor)

    def table(self, name: str, tensor: torch.Tensor) -> str:
        """Add a weight that may be the same in all nodes of a kind, and is stored once then."""
        added, there = self._tables.get(name, ("", tensor))
        if not added or not torch.equal(there, tensor):
            added = self.own(name, tensor)
            self._tables[name] = added, tensor
        return added

    def remaining(self, table: str, rows: str) -> str:
        """Emit the rows of a table, for each image; once if several nodes need the same."""
        if (table, rows) not in self._remaining:
            self._remaining[table, rows] = self.emit("Gather", table, rows, axis=0)
        return self._remaining[table, rows]

    def ints(self, *values: int) -> str:
        return self.weight("ints/" + "_".join(map(str, values)), torch.tensor(values, dtype=torch.int64))

    def number(self, value: float) -> str:
        return self.weight(f"float32/{value:g}", torch.tensor(value))

    def said(self, name: str, *shape: int, element: int | None = None) -> str:
        """Record the shape of a value, and return its name."""
        self.values.append(value_info(name, self.element if element is None else element, *shape))
        return name

    def result(self, x: str, name: str, width: int) -> str:
        """Emit the rows (B, width) that a node returns in float32: `logits` if it is the last one."""
        if name == self.last:
            return self.emit("Cast", x, to=TensorProto.FLOAT, out="logits")
        return self.said(self.emit("Cast", x, to=TensorProto.FLOAT, out=name), width, element=TensorProto.FLOAT)

    def float32(self, x: str) -> str:
        return x if self.dtype == torch.float32 else self.emit("Cast", x, to=TensorProto.FLOAT)

    def in_dtype(self, x: str) -> str:
        return x if self.dtype == torch.float32 else self.emit("Cast", x, to=self.element)

    def linear(self, x: str, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
        """Emit x weight^T + bias; the weight is stored transposed for MatMul, (in, out)."""
        y = self.emit("MatMul", x, self.own(f"{name}.weight", weight.t()))
        return y if bias is None else self.emit("Add", y, self.own(f"{name}.bias", bias))

    def linear_of(self, x: str, name: str, weights: Weights) -> str:
        """Emit the linear `name` of a node's weights."""
        return self.linear(x, name, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(self, x: str, eps: float, dim: int) -> str:
        """Emit a LayerNorm whose gain and shift are folded into the following linear."""
        affine = [self.weight(f"ones/{dim}", torch.ones(dim))]
        if needs_norm_bias(self.opset):
            affine.append(self.weight(f"zeros/{dim}", torch.zeros(dim)))
        return self.in_dtype(self.emit("LayerNormalization", self.float32(x), *affine, axis=-1, epsilon=eps))

    def norm_of(self, x: str, name: str, weights: Weights, eps: float) -> str:
        """Emit the LayerNorm `name` of a node's weights for float32 values; in float32."""
        affine = [self.own(f"{name}.{part}", weights[f"{name}.{part}"].float()) for part in ("weight", "bias")]
        return self.emit("LayerNormalization", x, *affine, axis=-1, epsilon=eps)

    def activate(self, x: str, act: str) -> str:
        """Emit an activation by its name in `Mlp.act`: one operator for GELU where there is one, else in float32."""
        if act == "gelu" and has_gelu(self.opset):
            return self.emit("Gelu", x)
        if act == "gelu_tanh" and has_gelu(self.opset):
            return self.emit("Gelu", x, approximate="tanh")
        x = self.float32(x)
        if act == "gelu":
            # x / sqrt(2), Erf, + 1, * x, * 0.5 is what runtimes recognise.
            y = self.emit("Erf", self.emit("Div", x, self.number(math.sqrt(2))))
        elif act == "gelu_tanh":
            cube = self.emit("Mul", self.emit("Mul", self.emit("Mul", x, x), x), self.number(0.044715))
            y = self.emit("Tanh", self.emit("Mul", self.emit("Add", x, cube), self.number(math.sqrt(2 / math.pi))))
        else:
            inner = self.emit("Mul", x, self.number(1.702)) if act == "quick_gelu" else x
            return self.in_dtype(self.emit("Mul", x, self.emit("Sigmoid", inner)))
        y = self.emit("Mul", x, self.emit("Add", y, self.number(1.0)))
        return self.in_dtype(self.emit("Mul", y, self.number(0.5)))

    def reduce(self, op: str, x: str, axis: int) -> str:
        if axes_are_input(self.opset):
            return self.emit(op, x, self.ints(axis), keepdims=0)
        return self.emit(op, x, axes=(axis,), keepdims=0)

    def halves(self, x: str) -> tuple[str, ...]:
        """Emit both halves of the last axis."""
        count = {"num_outputs": 2} if has_num_outputs(self.opset) else {}
        name = self.fresh("Split")
        return self.emit_all("Split", x, outs=(f"{name}_first", f"{name}_second"), axis=-1, **count)

    def tokens(self, x: str, first: int, end: int) -> str:
        return self.emit("Slice", x, self.ints(first), self.ints(end), self.ints(1))

    def token(self, x: str, at: int) -> str:
        """Emit one token of all images, (B, C)."""
        return self.emit("Gather", x, self.weight(f"int/{at}", torch.tensor(at)), axis=1)


def value_info(name: str, element: int, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, ("batch", *shape))
