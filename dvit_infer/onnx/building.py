"""The builder of ONNX graphs."""

import math
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from dvit_infer.onnx.opsets import axes_are_input, has_gelu, has_num_outputs, needs_norm_bias
from dvit_infer.operators.builder import Builder
from dvit_infer.operators.prune_tokens import packed_by_name
from dvit_infer.reduction.predictor import PredictorPrune

ELEMENT = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.int64: TensorProto.INT64}
DOMAIN, NAME = "dvit", "prune_tokens"


class OnnxBuilder(Builder[str]):
    """The operators, weights and shapes of an ONNX graph that is being written.

    Values are their names. A node's output has the node's name, and the choice of a pruning stage is named
    `prune.0/index`, so that both can be read or given by name.

    Attributes:
        opset: opset version of the default domain.
        element: the dtype for ONNX.
        nodes, values: what has been emitted, and its shapes.
        last: the name of the node whose output is `logits`.
    """

    def __init__(self, opset: int, dtype: torch.dtype, last: str = "") -> None:
        super().__init__(dtype)
        self.opset, self.element, self.last = opset, ELEMENT[dtype], last
        self.nodes: list[onnx.NodeProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}

    @property
    def weights(self) -> list[onnx.TensorProto]:
        return list(self._weights.values())

    def emit_all(self, op: str, *inputs: str, outs: tuple[str, ...], **attributes: Any) -> tuple[str, ...]:
        self.nodes.append(helper.make_node(op, inputs, outs, name=outs[0], **attributes))
        return outs

    def fresh(self, op: str) -> str:
        return f"{self.stem}/{op}_{len(self.nodes)}"

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        if name not in self._weights:
            self._weights[name] = numpy_helper.from_array(tensor.detach().cpu().contiguous().numpy(), name)
        return name

    def said(self, x: str, *shape: int, dtype: torch.dtype | None = None) -> str:
        self.values.append(value_info(x, ELEMENT[dtype or self.dtype], *shape))
        return x

    def result(self, x: str, name: str, width: int) -> str:
        if name == self.last:
            return self.emit("Cast", x, to=TensorProto.FLOAT, out="logits")
        return self.said(self.emit("Cast", x, to=TensorProto.FLOAT, out=name), width, dtype=torch.float32)

    def rounded(self, x: str, out: str) -> str:
        return self.emit("Cast", x, to=self.element, out=out)

    def float32(self, x: str) -> str:
        return x if self.dtype == torch.float32 else self.emit("Cast", x, to=TensorProto.FLOAT)

    def in_dtype(self, x: str) -> str:
        return x if self.dtype == torch.float32 else self.emit("Cast", x, to=self.element)

    def normalise(self, x: str, dim: int, eps: Any, affine: tuple[str, str] | None = None) -> str:
        given: tuple[str, ...] = affine or (self.weight(f"ones/{dim}", torch.ones(dim, dtype=torch.float32)),)
        if affine is None and needs_norm_bias(self.opset):
            given += (self.weight(f"zeros/{dim}", torch.zeros(dim, dtype=torch.float32)),)
        return self.emit("LayerNormalization", x, *given, axis=-1, epsilon=eps)

    def activate(self, x: str, act: str) -> str:
        """Emit an activation: one operator for GELU where there is one, else in float32."""
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

    def reduce(self, op: str, x: str, axis: int, keepdims: int = 0) -> str:
        if axes_are_input(self.opset) or op == "ReduceSum":
            return self.emit(op, x, self.ints(axis), keepdims=keepdims)
        return self.emit(op, x, axes=(axis,), keepdims=keepdims)

    def halves(self, x: str) -> tuple[str, ...]:
        count = {"num_outputs": 2} if has_num_outputs(self.opset) else {}
        name = self.fresh("Split")
        return self.emit_all("Split", x, outs=(f"{name}_first", f"{name}_second"), axis=-1, **count)

    def rows_of(self, x: str, index: str) -> str:
        return self.emit("GatherND", x, self.emit("Unsqueeze", index, self.ints(-1)), batch_dims=1)

    def for_each(self, row: torch.Tensor, x: str, out: str) -> str:
        batch = self.emit("Shape", x, start=0, end=1)
        shape = self.emit("Concat", batch, self.ints(*row.shape), axis=0)
        return self.emit("Expand", self.weight(f"{out}/row", row), shape, out=out)

    def prune_tokens(self, node: PredictorPrune, x: str) -> tuple[str, str]:
        """Emit a call of the function `dvit.prune_tokens`."""
        weights = [self.own(name, w) for name, w in packed_by_name(node.packed).items()]
        counts = {"num_keep": node.num_keep, "num_prefix": node.num_prefix, "eps": node.eps}
        outs = node.name, f"{node.name}/index"
        kept_x, index = self.emit_all(NAME, x, *weights, outs=outs, domain=DOMAIN, **counts)
        return kept_x, index


def value_info(name: str, element: int, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, ("batch", *shape))
