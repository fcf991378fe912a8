"""The builder of OpenVINO models."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import openvino
import torch
from openvino import opset13 as ops

from dvit_infer.operators.builder import Builder
from dvit_infer.operators.prune_tokens import packed_by_name, prune_tokens
from dvit_infer.reduction.predictor import PredictorPrune

Value = Any  # openvino.Output, whose package has no types

# The attributes by which a model says that a node keeps its precision, before and since OpenVINO 2026.3. Python gets
# values of their types only by reading a model.
_EXACT = """<net name="exact" version="11"><layers><layer id="0" name="x" type="Parameter" version="opset1">
<data shape="1" element_type="f32"/><rt_info><attribute name="precise" version="0"/>
<attribute name="DisablePrecisionConversion" version="0" value="dynamic:bf16,f16;"/></rt_info>
<output><port id="0" precision="FP32"><dim>1</dim></port></output></layer>
<layer id="1" name="y" type="Result" version="opset1"><input><port id="0" precision="FP32"><dim>1</dim></port></input>
</layer></layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>"""


class OpenVinoBuilder(Builder[Value]):
    """The operators and constants of an OpenVINO model that is being written, in float32.

    Constants share the memory of the weights that they are made of.
    """

    def __init__(self, core: Any) -> None:
        super().__init__(torch.float32)
        self._attributes = dict(core.read_model(model=_EXACT.encode(), weights=b"").get_parameters()[0].get_rt_info())
        self._weights: dict[str, Value] = {}
        self._exact = False
        self._count = 0

    def emit_all(self, op: str, *inputs: Value, outs: tuple[str, ...], **attributes: Any) -> tuple[Value, ...]:
        node = _OPERATORS[op](*inputs, **attributes)
        return self._added(node, outs[0])[: len(outs)]

    def _added(self, node: Any, name: str) -> tuple[Value, ...]:
        node.set_friendly_name(name)
        if self._exact:
            for key, value in self._attributes.items():
                node.set_rt_info(value, key)
        return tuple(node.outputs())

    def fresh(self, op: str) -> str:
        self._count += 1
        return f"{self.stem}/{op}_{self._count}"

    def weight(self, name: str, tensor: torch.Tensor) -> Value:
        if name not in self._weights:
            tensor = tensor.detach().contiguous()
            if tensor.dtype == torch.bfloat16:  # NumPy has none
                constant = ops.constant(tensor.float().numpy(), dtype=openvino.Type.bf16)
                node = ops.convert(constant, "f32")
            else:
                node = constant = ops.constant(tensor.numpy(), shared_memory=tensor.ndim > 0)
            constant.set_friendly_name(name)
            self._weights[name] = node.output(0)
        return self._weights[name]

    @contextlib.contextmanager
    def exactly(self) -> Iterator[None]:
        self._exact = True
        try:
            yield
        finally:
            self._exact = False

    def product(self, x: Value, name: str, weight: torch.Tensor) -> Value:
        node = ops.matmul(x, self.own(f"{name}.weight", weight), False, True)
        return self._added(node, self.fresh("MatMul"))[0]

    def normalise(
        self,
        x: Value,
        dim: int,
        eps: float,
        gain: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        name: str = "",
    ) -> Value:
        y = self._added(ops.mvn(x, self.ints(-1), True, eps, "inside_sqrt"), self.fresh("MVN"))[0]
        if gain is None or shift is None:
            return y
        return self.emit("Add", self.emit("Mul", y, self.own(f"{name}.weight", gain)), self.own(f"{name}.bias", shift))

    def activate(self, x: Value, act: str) -> Value:
        if act == "quick_gelu":
            return self.emit("Mul", x, self.emit("Sigmoid", self.emit("Mul", x, self.number(1.702))))
        node = ops.swish(x) if act == "silu" else ops.gelu(x, "TANH" if act == "gelu_tanh" else "ERF")
        return self._added(node, self.fresh(act))[0]

    def reduce(self, op: str, x: Value, axis: int, keepdims: int = 0) -> Value:
        node = {"ReduceMean": ops.reduce_mean, "ReduceMax": ops.reduce_max}[op](x, self.ints(axis), bool(keepdims))
        return self._added(node, self.fresh(op))[0]

    def halves(self, x: Value) -> tuple[Value, ...]:
        return self._added(ops.split(x, ops.constant(-1), 2), self.fresh("Split"))

    def rows_of(self, x: Value, index: Value) -> Value:
        return self._added(ops.gather(x, index, ops.constant(1), 1), self.fresh("Gather"))[0]

    def for_each(self, row: torch.Tensor, x: Value, out: str) -> Value:
        batch = ops.gather(ops.shape_of(x), ops.constant([0]), ops.constant(0))
        shape = ops.concat([batch, self.ints(*row.shape)], 0)
        return self._added(ops.broadcast(self.own("row", row), shape), out)[0]

    def prune_tokens(self, node: PredictorPrune, x: Value) -> tuple[Value, Value]:
        weights = {name: self.own(name, w) for name, w in packed_by_name(node.packed).items()}
        counts = self.ints(node.num_keep), self.ints(node.num_prefix)
        return prune_tokens(self, x, weights, lambda y: self.norm(y, node.eps, node.dim), *counts)


def _pad(x: Value, pads: Value) -> Any:
    before, after = ops.split(pads, ops.constant(0), 2).outputs()
    return ops.pad(x, before, after, "constant")


def _conv(x: Value, weight: Value, *bias: Value, strides: tuple[int, int], pads: tuple[int, ...]) -> Any:
    y = ops.convolution(x, weight, list(strides), list(pads[:2]), list(pads[2:]), [1, 1])
    return ops.add(y, ops.unsqueeze(bias[0], ops.constant([0, 2, 3]))) if bias else y


def _top_k(x: Value, k: Value, axis: int, largest: int, sorted: int) -> Any:
    return ops.topk(
        x, ops.squeeze(k, ops.constant([0])), axis, "max" if largest else "min", "value", "i64", stable=True
    )


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": ops.add,
    "Concat": lambda *parts, axis: ops.concat(list(parts), axis),
    "Conv": _conv,
    "Gather": lambda x, index, axis: ops.gather(x, index, ops.constant(axis)),
    "GatherElements": lambda x, index, axis: ops.gather_elements(x, index, axis),
    "Identity": lambda x: ops.reshape(x, ops.constant([0, 0]), True),
    "IsNaN": ops.is_nan,
    "MatMul": lambda a, b: ops.matmul(a, b, False, False),
    "Min": ops.minimum,
    "Mul": ops.multiply,
    "Pad": _pad,
    "Relu": ops.relu,
    "Reshape": lambda x, shape: ops.reshape(x, shape, True),
    "Sigmoid": ops.sigmoid,
    "Slice": lambda x, start, end, axes: ops.slice(x, start, end, ops.constant([1]), axes),
    "Softmax": lambda x, axis: ops.softmax(x, axis),
    "Sub": ops.subtract,
    "Tanh": ops.tanh,
    "TopK": _top_k,
    "Transpose": lambda x, perm: ops.transpose(x, ops.constant(list(perm))),
    "Unsqueeze": ops.unsqueeze,
    "Where": ops.select,
}
