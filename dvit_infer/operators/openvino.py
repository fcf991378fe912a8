"""The builder of OpenVINO models."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from openvino import opset13 as ops

from dvit_infer.config import Ranges
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

    Args:
        core: OpenVINO's core.
        int8: names of the nodes whose linears are int8, weights by output channel and inputs as a whole.
        ranges: the lowest and the highest input of each of these linears, by 'node/linear'; (): the runtime takes them
            from the inputs themselves (dynamic quantisation).
        half: whether the model runs in bfloat16, whose products on matrix tiles (AMX) take pairs of rows: those over
            197 tokens of ViT-B took 6 times as long as those over 184.
    """

    def __init__(self, core: Any, int8: Collection[str] = (), ranges: Ranges = (), half: bool = False) -> None:
        super().__init__(torch.float32)
        self.pads_to_even = half
        self._leaves_mlas = not half and not int8 and torch.backends.cpu.get_cpu_capability() == "AVX512"
        self._attributes = dict(core.read_model(model=_EXACT.encode(), weights=b"").get_parameters()[0].get_rt_info())
        self._int8 = frozenset(int8)
        self._ranges = {name: (low, high) for name, low, high in ranges}
        self._quantised: dict[str, Value] = {}
        self._factors: dict[str, Value] = {}
        self._prepared: set[str] = set()  # linears whose input is quantised in another layout
        self._weights: dict[str, Value] = {}
        self._exact = False
        self._count = 0

    def begin(self) -> None:
        super().begin()
        self._quantised.clear()
        self._prepared.clear()

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
            if tensor.dtype == torch.bfloat16:  # as constants in bfloat16, OpenVINO would hold them in float32 too
                tensor = tensor.float()
            node = ops.constant(tensor.numpy(), shared_memory=tensor.ndim > 0)
            node.set_friendly_name(name)
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
        linear = f"{self.stem}/{name}"
        if self.stem in self._int8 and (not self._ranges or linear in self._ranges):
            x = x if linear in self._prepared else self._quantised_input(x, linear)
            factor = self._quantised_weight(name, weight)
        else:
            factor = self.own(f"{name}.weight", weight)
        return self._added(ops.matmul(x, factor, False, True), self.fresh("MatMul"))[0]

    def linear(self, x: Value, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Value:
        y = super().linear(x, name, weight, bias)
        if not (self._leaves_mlas and _is_aliased(x, weight)):
            return y
        # Something behind a product has OpenVINO take oneDNN's instead. This is the identity, and stays one of NaN.
        return self._added(ops.prelu(y, self.weight("float32/[1]", torch.ones(1))), self.fresh("PRelu"))[0]

    def read_by(self, linear: str, x: Value) -> Value:
        """Quantise attention's result before it is transposed, which is part of the product then (0 to 8% of speed)."""
        linear = f"{self.stem}/{linear}"
        if self.stem not in self._int8 or linear not in self._ranges:
            return x
        self._prepared.add(linear)
        return self._quantised_input(x, linear)

    def _quantised_weight(self, name: str, weight: torch.Tensor) -> Value:
        """Emit a weight (out, in) as int8, symmetric, with a scale for each output channel."""
        key = f"{self.stem}/{name}"
        if key in self._factors:
            return self._factors[key]
        scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        whole = self.own(f"{name}.weight", (weight.float() / scale).round().clamp(-127, 127).to(torch.int8))
        factor = ops.multiply(ops.convert(whole, "f32"), self.own(f"{name}.weight/scale", scale)).output(0)
        return self._factors.setdefault(key, factor)

    def _quantised_input(self, x: Value, linear: str) -> Value:
        """Emit the quantisation of a linear's input, once for all linears that read it."""
        if not self._ranges:
            return x
        key = f"{x.get_node().get_friendly_name()}/{x.get_index()}"
        if key not in self._quantised:
            low, high = _grid(*self._ranges[linear])
            ends = ops.constant(np.float32(low)), ops.constant(np.float32(high))
            node = ops.fake_quantize(x, *ends, *ends, 256)
            self._quantised[key] = self._added(node, self.fresh("FakeQuantize"))[0]
        return self._quantised[key]

    def dense(self, x: Value, weight: Value, bias: Value, act: str = "none", exact: bool = False) -> Value:
        if not (self._exact and (exact or self._int8)):
            return super().dense(x, weight, bias, act, exact)
        # The CPU plugin makes one linear of a product and a constant bias, and that one does not keep its precision. It
        # does not look across a reshape.
        rows, width = x.get_partial_shape()[1].get_length(), weight.get_shape()[1]
        y = self.emit("Reshape", self.emit("MatMul", x, weight), self.ints(0, 1, rows, width))
        y = self.emit("Add", y, bias)
        return self.emit("Reshape", y if act == "none" else self.activate(y, act), self.ints(0, rows, width))

    def normalise(self, x: Value, dim: int, eps: float, affine: tuple[Value, Value] | None = None) -> Value:
        y = self._added(ops.mvn(x, self.ints(-1), True, eps, "inside_sqrt"), self.fresh("MVN"))[0]
        return y if affine is None else self.emit("Add", self.emit("Mul", y, affine[0]), affine[1])

    def activate(self, x: Value, act: str) -> Value:
        if act == "quick_gelu":
            return self.emit("Mul", x, self.emit("Sigmoid", self.emit("Mul", x, self.number(1.702))))
        node = ops.swish(x) if act == "silu" else ops.gelu(x, "TANH" if act == "gelu_tanh" else "ERF")
        return self._added(node, self.fresh(act))[0]

    def reduce(self, op: str, x: Value, axis: int, keepdims: int = 0) -> Value:
        node = _REDUCTIONS[op](x, self.ints(axis), bool(keepdims))
        return self._added(node, self.fresh(op))[0]

    def halves(self, x: Value) -> tuple[Value, ...]:
        return self._added(ops.split(x, ops.constant(-1), 2), self.fresh("Split"))

    def rows_of(self, x: Value, index: Value) -> Value:
        return self._added(ops.gather(x, index, ops.constant(1), 1), self.fresh("Gather"))[0]

    def for_each(self, row: torch.Tensor, x: Value, out: str) -> Value:
        batch = ops.gather(ops.shape_of(x), ops.constant([0]), ops.constant(0))
        shape = ops.concat([batch, self.ints(*row.shape)], 0)
        return self._added(ops.broadcast(self.weight(f"{out}/row", row), shape), out)[0]

    def prune_tokens(self, node: PredictorPrune, x: Value) -> tuple[Value, Value]:
        weights = {name: self.own(name, w) for name, w in packed_by_name(node.packed).items()}
        counts = self.ints(node.num_keep), self.ints(node.num_prefix)
        return prune_tokens(self, x, weights, lambda y: self.norm(y, node.eps, node.dim), *counts)


def _is_aliased(x: Value, weight: torch.Tensor) -> bool:
    """Return whether MLAS, which OpenVINO prefers for float32, is slow in x weight^T, and oneDNN's product is not.

    Rows of x that begin a multiple of 4 KiB apart share the sets of a first-level cache. With 3072, 2048 or 1024
    columns oneDNN's kernel for convolutions, which needs AVX-512, was 1.01 to 1.39 x as fast (70 to 577 rows an image,
    1 or 8 images, two threads of an AMD EPYC), in most shapes 1.1 x; with 40 and 50 rows 0.93 to 1.11 x, with 1152,
    2304 or 2688 columns 0.99 to 1.05 x, with 768 and fewer 0.6 to 1.04 x. OpenVINO takes that kernel for up to 4096
    columns, at least 96 outputs, and weights under 16 MiB.
    """
    shape, (out, width) = x.get_partial_shape(), weight.shape
    rows = shape[1].get_length() if len(shape) == 3 and shape[1].is_static else 0
    return rows >= 64 and width % 1024 == 0 and width <= 4096 and out >= 96 and 4 * weight.numel() < 16 << 20


def _grid(low: float, high: float) -> tuple[float, float]:
    """Return the ends of 256 steps that hold a range, with a step at zero.

    They are symmetric, unless most of them would be empty, as behind GELU: then the kernels correct for a zero point.
    """
    if -low > high / 4:
        largest = max(-low, high)
        return -largest * 128 / 127, largest
    step = (high - low) / 255
    zero = round(-low / step)
    return -zero * step, (255 - zero) * step


def _pad(x: Value, pads: Value) -> Any:
    before, after = ops.split(pads, ops.constant(0), 2).outputs()
    return ops.pad(x, before, after, "constant")


def _conv(
    x: Value, weight: Value, *bias: Value, strides: tuple[int, int], pads: tuple[int, ...], group: int = 1
) -> Any:
    how = list(strides), list(pads[:2]), list(pads[2:]), [1, 1]
    if group == 1:
        y = ops.convolution(x, weight, *how)
    else:
        out, *kernel = weight.get_shape()
        y = ops.group_convolution(x, ops.reshape(weight, ops.constant([group, out // group, *kernel]), False), *how)
    return ops.add(y, ops.unsqueeze(bias[0], ops.constant([0, 2, 3]))) if bias else y


def _top_k(x: Value, k: Value, axis: int, largest: int, sorted: int) -> Any:
    return ops.topk(
        x, ops.squeeze(k, ops.constant([0])), axis, "max" if largest else "min", "value", "i64", stable=True
    )


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMax": ops.reduce_max,
    "ReduceMean": ops.reduce_mean,
    "ReduceMin": ops.reduce_min,
    "ReduceSum": ops.reduce_sum,
}

_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": ops.add,
    "CumSum": ops.cum_sum,
    "Div": ops.divide,
    "Equal": ops.equal,
    "Less": ops.less,
    "Log": ops.log,
    "Max": ops.maximum,
    "ScatterElements": lambda x, index, values, axis: ops.scatter_elements_update(x, index, values, axis),
    "Sqrt": ops.sqrt,
    "Concat": lambda *parts, axis: ops.concat(list(parts), axis),
    "Conv": _conv,
    "Gather": lambda x, index, axis: ops.gather(x, index, ops.constant(axis)),
    "GatherElements": lambda x, index, axis: ops.gather_elements(x, index, axis),
    "Identity": lambda x: ops.reshape(x, ops.constant([0] * len(x.get_partial_shape())), True),
    "IsNaN": ops.is_nan,
    "MatMul": lambda a, b: ops.matmul(a, b, False, False),
    "Min": ops.minimum,
    "Mul": ops.multiply,
    "Pad": _pad,
    "Relu": ops.relu,
    "Reshape": lambda x, shape: ops.reshape(x, shape, True),
    "Sigmoid": ops.sigmoid,
    "Slice": lambda x, start, end, axes, step=None: ops.slice(x, start, end, step or ops.constant([1]), axes),
    "Softmax": lambda x, axis: ops.softmax(x, axis),
    "Sub": ops.subtract,
    "Tanh": ops.tanh,
    "TopK": _top_k,
    "Transpose": lambda x, perm: ops.transpose(x, ops.constant(list(perm))),
    "Unsqueeze": ops.unsqueeze,
    "Where": ops.select,
}
