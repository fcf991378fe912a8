"""The builder that node kinds are written with: ONNX's operators, and the parts that are made of several of them."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch

from dvit_infer.graph.nodes import Weights
from dvit_infer.reduction.predictor import PredictorPrune

V = TypeVar("V")  # a value of the graph that is being written


class Builder(ABC, Generic[V]):
    """Operators and weights of a graph that is being written.

    Attributes:
        dtype: the dtype of values and weights; float32 is used inside of norms, softmax, rotation and pooling.
        stem: prefix of the names of the values being written.
        rows: the original rows (B, P+k) of the tokens that remain; None: all do. `stage` names them. A fused token has
            the row behind all others, in tables with `fuses`.
        fuses: whether the graph fuses tokens.
        pads_to_even: whether products over an odd number of rows are slow.
        sizes: (B, P+k) float32, the number of patches in each token; None: 1.
        signal: what attention left for the reduction behind it (`graph.nodes.Signal`).
        branch: (B, n, C), what a node began beside x, which the next one adds to it.
        routes: which positions take the MLPs (B, k), the others (B, N-k), and where each is in both together (B, N).
    """

    pads_to_even = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.stem = "images"
        self.rows: V | None = None
        self.stage = ""
        self.fuses = False
        self.sizes: V | None = None
        self.signal: V | None = None
        self.branch: V | None = None
        self.routes: tuple[V, V, V] | None = None
        self._tables: dict[str, tuple[str, torch.Tensor]] = {}  # the last one of each name
        self._remaining: dict[tuple[str, str], V] = {}

    def begin(self) -> None:
        """Begin to write a graph; only weights are shared with what was written before."""
        self.rows, self.stage, self.sizes, self.signal = None, "", None, None
        self.branch, self.routes = None, None
        self._remaining.clear()

    @abstractmethod
    def emit_all(self, op: str, *inputs: V, outs: tuple[str, ...], **attributes: Any) -> tuple[V, ...]:
        """Emit an operator with several outputs, by their names."""

    @abstractmethod
    def weight(self, name: str, tensor: torch.Tensor) -> V:
        """Return a constant; one of the same name is emitted once."""

    @abstractmethod
    def fresh(self, op: str) -> str:
        """Return a name for the output of the next operator."""

    @abstractmethod
    def normalise(self, x: V, dim: int, eps: float, affine: tuple[V, V] | None = None) -> V:
        """Emit the LayerNorm of rows (..., dim) in float32, with gain and shift if they are not folded."""

    @abstractmethod
    def activate(self, x: V, act: str) -> V:
        """Emit an activation by its name in `Mlp.act`."""

    @abstractmethod
    def reduce(self, op: str, x: V, axis: int, keepdims: int = 0) -> V: ...

    @abstractmethod
    def halves(self, x: V) -> tuple[V, ...]:
        """Emit both halves of the last axis."""

    @abstractmethod
    def rows_of(self, x: V, index: V) -> V:
        """Emit the rows (B, k, C) of x (B, N, C) at index (B, k)."""

    @abstractmethod
    def for_each(self, row: torch.Tensor, x: V, out: str) -> V:
        """Emit a row (k,) once for each image of x, (B, k)."""

    @abstractmethod
    def prune_tokens(self, node: PredictorPrune, x: V) -> tuple[V, V]:
        """Emit `prune_tokens`, by the node's weights: the kept tokens, and their (B, k) positions among the patches."""

    def rounded(self, x: V, out: str) -> V:
        """Emit a float32 value in the dtype, as the output `out` of a node."""
        return self.emit("Identity", x, out=out)

    def emit(self, op: str, *inputs: V, out: str | None = None, **attributes: Any) -> V:
        return self.emit_all(op, *inputs, outs=(out or self.fresh(op),), **attributes)[0]

    def said(self, x: V, *shape: int, dtype: torch.dtype | None = None) -> V:
        """Return the value; a builder may record its shape, without the batch dimension, and dtype (None: its own)."""
        return x

    def result(self, x: V, name: str, width: int) -> V:
        """Emit the rows (B, width) that a node returns in float32."""
        return self.float32(x)

    @contextlib.contextmanager
    def exactly(self) -> Iterator[None]:
        """Keep float32 operators emitted in the block in float32, whatever a runtime does with the others."""
        yield

    def own(self, name: str, tensor: torch.Tensor) -> V:
        return self.weight(f"{self.stem}/{name}", tensor)

    def table(self, name: str, tensor: torch.Tensor) -> V:
        """Return a weight that may be the same in all nodes of a kind, and is stored once then."""
        return self.weight(self._table(name, tensor), tensor)

    def remaining(self, name: str, tensor: torch.Tensor) -> V:
        """Return the rows of a table for the tokens that remain, for each image; once if several nodes need them."""
        if self.rows is None:
            return self.table(name, tensor)
        key = self._table(name, tensor), self.stage
        if key not in self._remaining:
            self._remaining[key] = self.emit("Gather", self.table(name, tensor), self.rows, axis=0)
        return self._remaining[key]

    def _table(self, name: str, tensor: torch.Tensor) -> str:
        added, there = self._tables.get(name, ("", tensor))
        if not added or not torch.equal(there, tensor):
            added = f"{self.stem}/{name}"
            self._tables[name] = added, tensor
        return added

    def ints(self, *values: int) -> V:
        return self.weight("ints/" + "_".join(map(str, values)), torch.tensor(values, dtype=torch.int64))

    def number(self, value: float) -> V:
        return self.weight(f"float32/{value:g}", torch.tensor(value, dtype=torch.float32))

    def float32(self, x: V) -> V:
        return x

    def in_dtype(self, x: V) -> V:
        return x

    def product(self, x: V, name: str, weight: torch.Tensor) -> V:
        """Emit x weight^T; the weight is stored transposed for MatMul, (in, out)."""
        return self.emit("MatMul", x, self.own(f"{name}.weight", weight.t()))

    def linear(self, x: V, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> V:
        """Emit x weight^T + bias."""
        y = self.product(x, name, weight)
        return y if bias is None else self.emit("Add", y, self.own(f"{name}.bias", bias))

    def linear_of(self, x: V, name: str, weights: Weights) -> V:
        """Emit the linear `name` of a node's weights."""
        return self.linear(x, name, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def dense(self, x: V, weight: V, bias: V, act: str = "none", exact: bool = False) -> V:
        """Emit act(x weight + bias) for values: the weight is (in, out), the bias float32.

        The bias is rounded to the dtype unless `exact`, which is for x and weight in float32.
        """
        y = self.emit("Add", self.emit("MatMul", x, weight), bias if exact else self.in_dtype(bias))
        return y if act == "none" else self.activate(y, act)

    def norm(self, x: V, eps: float, dim: int) -> V:
        """Emit a LayerNorm whose gain and shift are folded into the following linear."""
        return self.in_dtype(self.normalise(self.float32(x), dim, eps))

    def norm_of(self, x: V, name: str, weights: Weights, eps: float) -> V:
        """Emit the LayerNorm `name` of a node's weights for float32 values; in float32."""
        gain, shift = (weights[f"{name}.{part}"].float() for part in ("weight", "bias"))
        return self.affine_norm(x, name, gain, shift, eps)

    def affine_norm(self, x: V, name: str, gain: torch.Tensor, shift: torch.Tensor, eps: float) -> V:
        """Emit a LayerNorm with gain and shift, which become weights `name`, for float32 values; in float32."""
        affine = self.own(f"{name}.weight", gain), self.own(f"{name}.bias", shift)
        return self.normalise(x, len(gain), eps, affine)

    def top(self, x: V, count: int, axis: int, largest: int = 1) -> tuple[V, ...]:
        """Emit the largest or smallest values along an axis, sorted, and where they are; of equal ones the first."""
        name = self.fresh("TopK")
        outs = f"{name}_values", f"{name}_places"
        return self.emit_all("TopK", x, self.ints(count), outs=outs, axis=axis, largest=largest, sorted=1)

    def attend(self, q: V, k: V, v: V, scale: float, bias: V | None = None, reader: str = "") -> V:
        """Emit softmax(scale * q k^T + bias) v for q, k, v (B, tokens, heads, head size), in that layout.

        The bias (heads, queries, tokens) or (B, heads, queries, tokens) is in float32. `reader` is the linear that
        reads the result as it is; "": none does.
        """
        q, k, v = (
            self.emit("Transpose", part, perm=perm)
            for part, perm in ((q, (0, 2, 1, 3)), (k, (0, 2, 3, 1)), (v, (0, 2, 1, 3)))
        )
        scores = self.emit("MatMul", q, k)
        if scale != 1.0:
            scores = self.emit("Mul", scores, self.own("scale", torch.tensor(scale, dtype=self.dtype)))
        scores = self.float32(scores)
        scores = scores if bias is None else self.emit("Add", scores, bias)
        mixed = self.emit("MatMul", self.in_dtype(self.emit("Softmax", scores, axis=-1)), v)
        return self.emit("Transpose", self.read_by(reader, mixed) if reader else mixed, perm=(0, 2, 1, 3))

    def read_by(self, linear: str, x: V) -> V:
        """Return a value in another layout than the linear reads it in; a builder may prepare it here already."""
        return x

    def tokens(self, x: V, first: int, end: int) -> V:
        return self.part(x, 1, first, end)

    def part(self, x: V, axis: int, first: int, end: int, step: int = 1) -> V:
        """Emit what lies from `first` up to `end` on an axis, or every second of these."""
        steps = () if step == 1 else (self.ints(step),)
        return self.emit("Slice", x, self.ints(first), self.ints(end), self.ints(axis), *steps)

    def token(self, x: V, at: int) -> V:
        """Emit one token of all images, (B, C)."""
        return self.emit("Gather", x, self.weight(f"int/{at}", torch.tensor(at)), axis=1)
