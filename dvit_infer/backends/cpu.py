"""The CPU backend: the fastest linear on this processor, and reused memory for results.

New memory for every large result causes page faults, which make GELU and softmax five times slower. Therefore PyTorch's
matmul writes into buffers that later linears reuse, GELU runs in place, and a linear adds into its residual. oneDNN's
prepacked linears allocate their results.
"""

import functools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dvit_infer.backends.state import State
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.nodes import Branch, Node
from dvit_infer.graph.reductions import Prune
from dvit_infer.graph.routes import Route
from dvit_infer.ops import prune_tokens as op
from dvit_infer.ops.activations import activate
from dvit_infer.ops.route_tokens import order_tokens_ref
from dvit_infer.reduction.predictor import PredictorPrune, Scores
from dvit_infer.utils.memory import return_freed

PROBE_SHAPE = 512, 384, 1536  # rows, in, out: fc1 of DeiT-S for three images
PROBE_ROUNDS = 9
# A later candidate replaces an earlier one if it is faster by more than this. The best of the rounds repeats within 2%;
# where the probe measured 1.12 x (an EPYC, two threads, torch 2.13), whole models gained as much: 1.10 to 1.23 x.
MIN_SPEEDUP = 1 / 0.94
_EXPECTED_ROWS = 1024  # oneDNN chooses a weight layout for about this many rows; others work too
_LARGE = ("qkv", "kv", "fc1", "proj", "fc2", "fast")  # linears of all tokens; the class token's queries are few rows


class Linear(NamedTuple):
    """An implementation of linears.

    Attributes:
        dtype: the dtype of the arithmetic; may be float32 for a model in lower precision.
        prepacked: use oneDNN with weights in its own layout and GELU fused, as torch.compile's freezing emits it,
            through private operators; else PyTorch's matmul into reused memory.
    """

    dtype: torch.dtype
    prepacked: bool

    def __str__(self) -> str:
        by = "oneDNN, prepacked" if self.prepacked else "PyTorch's matmul"
        return f"linears by {by}, in {str(self.dtype).removeprefix('torch.')}"


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
    return packed


# oneDNN's names of the activations that it fuses, and of their algorithms.
_FUSED = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


def _prepacked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    after, algorithm = _FUSED.get(activation, _FUSED["none"])
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], algorithm)
    return y if activation in _FUSED else activate(y, activation)


def _matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, out: torch.Tensor
) -> torch.Tensor:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    if activation in ("gelu", "gelu_tanh"):
        torch.ops.aten.gelu_(out, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation == "silu":
        F.silu(out, inplace=True)
    elif activation != "none":
        out.copy_(activate(out, activation))
    return out


@functools.cache
def fastest_linear(dtype: torch.dtype, threads: int) -> Linear:
    """Return the fastest candidate for a model in `dtype`, by measuring each once per process.

    Measured with AVX-512 on two cores: on an EPYC, oneDNN's prepacked linears run at 2.4 times the speed of PyTorch's
    matmul in float32, and bfloat16 at twice that; on a Xeon without matrix tiles (AMX), all float32 candidates are
    equally fast and bfloat16 runs at 0.6 times their speed. A candidate must run here and give the expected result.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):  # the modes of the first call's context must not decide
        return _fastest(dtype)


def _fastest(dtype: torch.dtype) -> Linear:
    seconds = time_linears(dtype, PROBE_SHAPE, PROBE_ROUNDS)
    best = Linear(dtype, prepacked=False)
    for candidate in seconds:
        if seconds[candidate] * MIN_SPEEDUP < seconds.get(best, math.inf):
            best = candidate
    return best


@torch.no_grad()
def time_linears(
    dtype: torch.dtype, shape: tuple[int, int, int], rounds: int, gelu: bool = True
) -> dict[Linear, float]:
    """Return the best seconds of a linear, (rows, in) -> (rows, out), for each candidate with the expected result."""
    rows, fan_in, fan_out = shape
    generator = torch.Generator("cpu").manual_seed(0)
    shapes: tuple[tuple[int, ...], ...] = (rows, fan_in), (fan_out, fan_in), (fan_out,)
    x, weight, bias = (torch.randn(s, generator=generator, device="cpu").to(dtype) for s in shapes)
    expected = F.linear(x.float(), weight.float(), bias.float())
    expected = F.gelu(expected) if gelu else expected
    calls: dict[Linear, Callable[[], torch.Tensor]] = {}
    for candidate in [
        Linear(d, prepacked) for d in dict.fromkeys((dtype, torch.float32)) for prepacked in (False, True)
    ]:
        try:
            call = _probe(candidate, x, weight, bias, gelu)
            error = (call().float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        except (RuntimeError, AttributeError):  # the operator does not exist or does not support this processor
            continue
        if error < max(torch.finfo(candidate.dtype).eps, 2e-6):  # not NaN either
            calls[candidate] = call
    seconds = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for candidate, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[candidate] = min(seconds[candidate], time.perf_counter() - start)
    return seconds


def _probe(
    candidate: Linear, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool
) -> Callable[[], torch.Tensor]:
    x, weight, bias = (t.to(candidate.dtype) for t in (x, weight, bias))
    if candidate.prepacked:
        packed = _pack(weight)
        return lambda: _prepacked(x, packed, bias, "gelu" if gelu else "none")
    out = x.new_empty(len(x), len(weight))
    return lambda: _matmul(x, weight, bias, "gelu" if gelu else "none", out)


class _Buffers(threading.local):
    """Memory of one thread that all nodes reuse; it grows to the largest request and is never freed."""

    def __init__(self) -> None:
        self.flat: dict[str, torch.Tensor] = {}

    def get(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        if name not in self.flat or self.flat[name].numel() < size:
            with torch.inference_mode(False):  # buffers outlive the caller's inference mode
                self.flat[name] = like.new_empty(size)
        return self.flat[name][:size].view(shape)

    def holds(self, name: str, x: torch.Tensor) -> bool:
        return name in self.flat and self.flat[name].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


class CpuRunner(TorchRunner):
    """Runs a graph on a CPU.

    Args:
        graph: a graph with its weights on the CPU. Weights needed in another form are copied.
        linear: the implementation of linears; None: the fastest here.
        why: the reason why no faster backend runs it; shown in `runtime`.
        weights: returns the graph anew; given, weights that are copied are taken out of it. None: they stay.
    """

    def __init__(
        self,
        graph: Graph,
        linear: Linear | None = None,
        why: str = "",
        weights: Callable[[], Graph] | None = None,
    ) -> None:
        super().__init__(graph)
        self._graph, self._weights = graph, weights
        self._linear = linear or fastest_linear(self.dtype, torch.get_num_threads())
        self._runtime = self.describe(f"PyTorch, {self._linear}", usually="PyTorch") + (f" ({why})" if why else "")
        self._native = self.prunes_by == "native (CPU)"
        self._buffers = _Buffers()
        self._copied_bytes, nodes = 0, []
        for node in graph.nodes:
            nodes.append(self._prepared(node))
            for name, w in nodes[-1].weights.items():
                if w is not node.weights[name] and weights is not None:
                    node.weights[name] = node.weights[name].to("meta")
                elif w is not node.weights[name]:
                    self._copied_bytes += w.numel() * w.element_size()
            if weights is not None:
                return_freed()
        self.nodes = nodes

    def __reduce__(self) -> tuple[Any, ...]:  # buffers and oneDNN's layouts cannot be copied
        if self._weights is None:
            return CpuRunner, (self._graph, self._linear)
        return _unpickled, (self._weights, self._linear)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of copied weights and of the calling thread's buffers."""
        return self._copied_bytes + sum(b.numel() * b.element_size() for b in self._buffers.flat.values())

    def _prepared(self, node: Node) -> Node:
        if "gamma" in node.weights:
            raise ValueError(f"{node.name} is not folded, which the CPU backend needs for its layer scale")

        def prepared(name: str, w: torch.Tensor) -> torch.Tensor:
            if w.dtype == self.dtype:  # a predictor's vectors are in float32 already
                w = w.to(self._linear.dtype)
            large = name.removesuffix(".weight") in _LARGE and (isinstance(node, Branch) or name == "kv.weight")
            if isinstance(node, Scores):  # but for the mean half, one row per image
                large = not self._native and w.ndim == 2 and name != "packed.4"
            return _pack(w) if large and self._linear.prepacked else w

        return replace(node, weights={name: prepared(name, w) for name, w in node.weights.items()})

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        return super().prepare(images).to(self._linear.dtype)

    def select(self, node: Prune, state: State) -> torch.Tensor:
        if not isinstance(node, PredictorPrune):
            return super().select(node, state)
        x = state.x
        if self._native:
            from dvit_infer.ops.native import prune_tokens  # here: not needed otherwise

            state.x, index = prune_tokens(x, node.packed, node.num_keep, node.num_prefix, node.eps)
            return index
        score = op.score_tokens_ref(x[:, node.num_prefix :], node.packed, node.eps, self._score_product)
        index = op.select_tokens_ref(score, node.num_keep)
        state.x = op.gather_tokens_ref(x, index, node.num_prefix)
        return index

    def order(self, node: Route, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(node, Scores):
            return super().order(node, x)
        return order_tokens_ref(op.score_tokens_ref(x, node.packed, node.eps, self._score_product), node.num_keep)

    def linear(
        self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
    ) -> torch.Tensor:
        if name not in _LARGE:
            return super().linear(name, x, weight, bias, activation)
        return self._product(x, weight, bias, activation)

    def linear_add(self, node: Branch, name: str, y: torch.Tensor, state: State) -> None:
        weight, bias, scale = node.weights[f"{name}.weight"], node.weights[f"{name}.bias"], node.residual_scale
        x = state.x.contiguous()  # the class token's rows are not
        if weight.is_mkldnn:
            x.add_(self._product(y, weight, bias), alpha=scale)
        else:
            flat = x.view(-1, x.shape[-1]).add_(bias, alpha=scale)
            flat.addmm_(y.reshape(len(flat), -1), weight.t(), alpha=scale)
        state.x = x

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None = None,
        pair_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # float16 scores may overflow; CPU attention keeps them in float32
        if q.dtype != torch.bfloat16 or pair_bias is not None:
            return super().mix(q, k, v, scale, bias, pair_bias)
        # In bfloat16, plain softmax is 2.4 times as fast as CPU attention at these lengths (measured on an EPYC).
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-2, -1)
        scores = scores if scale == 1.0 else scores * scale
        scores = scores if bias is None else scores + bias[:, None, None].to(scores.dtype)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)

    def _score_product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False
    ) -> torch.Tensor:
        return self._product(x, weight, bias, "gelu" if gelu else "none")

    def _product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
    ) -> torch.Tensor:
        """Return activation(x weight^T + bias); valid until the second product after this one."""
        flat = x.reshape(-1, x.shape[-1])
        if weight.is_mkldnn:
            y = _prepacked(flat.contiguous(), weight, bias, activation)
        else:
            free = "second" if self._buffers.holds("first", x) else "first"
            y = _matmul(flat, weight, bias, activation, self._buffers.get(free, x, len(flat), len(weight)))
        return y.view(*x.shape[:-1], -1)


def _unpickled(weights: Callable[[], Graph], linear: Linear) -> CpuRunner:
    return CpuRunner(weights(), linear)
