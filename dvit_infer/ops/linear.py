"""linear: a linear layer with the LayerNorm before it and the activation, gate or residual after it.

On CUDA it runs as one Triton launch (dvit_kernels/linear.py) or as cuBLAS and separate launches for the rest, whichever
is faster on that GPU for that shape (choices.py); elsewhere as plain PyTorch.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dvit_infer.ops.activations import activate
from dvit_infer.ops.choices import DTYPES, Choice, choices_for, runs_triton
from dvit_infer.ops.fallback import by_kernel, check_close, some_of, widened
from dvit_infer.ops.layer_norm import block_stats, layer_norm, row_stats, stats_fault
from dvit_infer.ops.registration import register

OP = "dvit::linear"
# From this many rows, missing row statistics are computed by a separate launch. Below, that launch costs more than
# computing them beside the product, once per block of columns, in tiles of few rows. Derived, not measured.
ROW_STATS_FROM = 1024
ACTIVATIONS = ("none", "gelu", "gelu_poly", "gelu_tanh", "quick_gelu", "silu")


def row_sums(weight: torch.Tensor) -> torch.Tensor:
    """(K, C) -> (K,) float32 row sums of the weight as stored, the `weight_sum` of `linear`."""
    return weight.double().sum(dim=1).float()


def linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    stats: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    stats_block: int = 0,
    out_dtype: torch.dtype | None = None,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return residual + activation(LayerNorm(x) weight^T + bias); LayerNorm, activation and residual are optional.

    With `gated`, the first half of the weight's rows gives a gate, the second a factor: activation(gate) * factor takes
    the activation's place, as in SwiGLU and its like (Shazeer 2020), and K below is half of those rows.

    The reference computes statistics itself, without reading `stats`.

    Args:
        x: (..., C) in float32, float16 or bfloat16, any strides.
        weight: (K, C), gated (2K, C), in x's dtype. If x is normalised, the gain is folded into it and the shift into
            `bias`.
        bias: (K,), gated (2K,), in any floating-point dtype.
        residual: (..., K), of x's leading sizes, any strides.
        weight_sum: as the bias, float32, row sums of `weight` as stored (`row_sums`). Given: x is normalised first.
        stats: (rows, parts, 2) float32, mean and sum of squared deviations of x's rows by blocks of C/parts columns, as
            returned by an earlier call or by `row_stats`; None: computed here if needed.
        eps: of LayerNorm.
        activation: one of `ACTIVATIONS`: gelu uses erf; gelu_poly is within 2.1e-7 of it in fewer instructions;
            gelu_tanh is the tanh form, within 4.8e-4; quick_gelu is y * sigmoid(1.702 y).
        stats_block: columns per part of the statistics of the stored result; it divides K; 0: no statistics.
        out_dtype: the dtype of the result; None: x's.
        gated: whether the weight's rows are gates and factors.

    Returns:
        (..., K), and its statistics (rows, K/stats_block, 2) float32 (an empty tensor without `stats_block`).

    Raises:
        ValueError: a shape, a dtype or a name is invalid.
        RuntimeError: on backward.
    """
    if weight_sum is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=eps)
    bias = None if bias is None else bias.to(x.dtype)
    if (
        activation == "gelu_tanh" and not gated and bias is not None and x.is_cuda
    ):  # cuBLAS fuses this form with its product
        flat = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
        y = flat.view(*x.shape[:-1], -1)
    else:
        y, factor = F.linear(x, weight, bias), None
        if gated:
            y, factor = y.chunk(2, dim=-1)
        y = activate(y, "gelu" if activation == "gelu_poly" else activation)
        y = y if factor is None else y * factor
    if residual is not None:
        y = y + residual
    y = y.to(out_dtype or x.dtype).contiguous()
    return y, block_stats(y, stats_block) if stats_block else y.new_empty(0, dtype=torch.float32)


class _Call(NamedTuple):
    """A call's arguments, as in the schema; the dispatcher omits those that equal the default."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    weight_sum: torch.Tensor | None = None
    stats: torch.Tensor | None = None
    eps: float = 1e-5
    activation: str = "none"
    stats_block: int = 0
    out_dtype: torch.dtype | None = None
    gated: bool = False

    @property
    def width(self) -> int:
        """The columns of the result."""
        return self.weight.shape[0] // (2 if self.gated else 1)


def _checked(*arguments: Any, **named: Any) -> _Call:
    call = _Call(*arguments, **named)
    x, weight, bias, residual, weight_sum, stats, _, activation, stats_block, _, gated = call
    if x.ndim < 1 or x.shape[-1] < 1 or x.dtype not in DTYPES:
        found = f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"linear: x is {found}; (..., C) in float32, float16 or bfloat16 is expected")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        found = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise ValueError(f"linear: weight is {found}; (K, {x.shape[-1]}) in {x.dtype} is expected")
    dim_out, width = weight.shape[0], call.width
    if gated and dim_out % 2:
        raise ValueError(f"linear: weight has {dim_out} rows; as many gates as factors are expected")
    for name, vector in (("bias", bias), ("weight_sum", weight_sum)):
        if vector is not None and (tuple(vector.shape) != (dim_out,) or not vector.is_floating_point()):
            raise ValueError(
                f"linear: {name} is {vector.dtype} of shape {tuple(vector.shape)}; ({dim_out},) is expected"
            )
    if residual is not None and tuple(residual.shape) != (*x.shape[:-1], width):
        expected = (*x.shape[:-1], width)
        raise ValueError(f"linear: residual has shape {tuple(residual.shape)}; {expected} is expected")
    if stats is not None and (stats.ndim != 3 or 0 in stats.shape[1:] or stats.dtype != torch.float32):
        raise ValueError(f"linear: stats is {stats.dtype} of shape {tuple(stats.shape)}; (rows, parts, 2) float32")
    rows = x.numel() // x.shape[-1]
    if stats is not None and (stats.shape[0] != rows or stats.shape[2] != 2 or x.shape[-1] % stats.shape[1]):
        raise ValueError(f"linear: stats has shape {tuple(stats.shape)}, which is not that of x's rows")
    for name, tensor in zip(call._fields, call, strict=True):
        if isinstance(tensor, torch.Tensor) and tensor.device != x.device:
            raise ValueError(f"linear: {name} is on {tensor.device}, x on {x.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if stats_block < 0 or (stats_block and width % stats_block):
        raise ValueError(f"linear: stats_block {stats_block} does not divide {width} columns")
    return call


def choose(device: torch.device, dtype: torch.dtype, rows: int, dim_in: int, dim_out: int, does: str) -> Choice:
    """Return the choice for a linear of that size on a device; `does` names its fused operations (`does_what`)."""
    if not runs_triton(device, "linear"):
        return Choice("pytorch")
    kind: dict[str, int | str] = {"in": dim_in, "out": dim_out, "does": does}  # "in" is a Python keyword
    return choices_for(device).of("linear", dtype, rows, **kind)


def free_stats_block(
    device: torch.device, dtype: torch.dtype, rows: int, dim_in: int, dim_out: int, norm: bool = False
) -> int:
    """Return the `stats_block` that is free for a linear with a residual: its tile's columns, or 0 if there is none."""
    choice = choose(device, dtype, rows, dim_in, dim_out, does_what(norm, residual=True, activation="none"))
    if choice.by == "pytorch":
        return 0
    if choice.tile is not None:
        return choice.tile[1] if dim_out % choice.tile[1] == 0 else 0
    from dvit_kernels.linear import default_stats_block

    return default_stats_block(rows, dim_out, dtype)


def does_what(norm: bool, residual: bool, activation: str, gated: bool = False) -> str:
    """Return the name in choices.py for the operations fused with a linear."""
    words = ["norm"] * norm + ["residual"] * residual + [activation] * (activation != "none") + ["gated"] * gated
    return "+".join(words) or "plain"


def _run(*arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _checked(*arguments, **named)
    (dim_out, dim_in), norm = call.weight.shape, call.weight_sum is not None
    does = does_what(norm, call.residual is not None, call.activation, call.gated)
    rows = call.x.numel() // dim_in
    choice = choose(call.x.device, call.x.dtype, rows, dim_in, dim_out, does)
    if choice.by == "pytorch":
        return _by_pytorch(call)
    if norm and call.stats is None and rows >= ROW_STATS_FROM:
        call = call._replace(stats=row_stats(call.x))
    return by_kernel(
        "linear",
        call.x.device,
        lambda: _by_kernel(call, choice),
        lambda: _by_pytorch(call),
        lambda result: _fault(call, *result),
        (*call, choice),
    )


def _by_pytorch(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    if call.weight_sum is not None and runs_triton(call.x.device):
        call = call._replace(x=layer_norm(call.x, eps=call.eps), weight_sum=None)
    return linear_ref(*call)


def _by_kernel(call: _Call, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
    from dvit_kernels.linear import LinearTile, launch_linear, stats_blocks  # here: Triton takes a while to import

    tile = LinearTile(*choice.tile) if choice.tile else None
    columns = call.stats_block * (2 if call.gated else 1)
    if columns in (0, tile and tile.block_n):
        return launch_linear(*call, tile=tile)
    if columns in stats_blocks(call.x.dtype):
        return launch_linear(*call)
    y, _ = launch_linear(*call._replace(stats_block=0), tile=tile)
    return y, block_stats(y, call.stats_block)


def _fault(call: _Call, y: torch.Tensor, y_stats: torch.Tensor) -> str | None:
    """Check the kernel's result in a few rows."""
    some = some_of(call.x)
    residual = None if call.residual is None else call.residual[some]
    few = call._replace(x=call.x[some], residual=residual, stats=None, stats_block=0)
    exact, _ = linear_ref(*_Call(*map(widened, few._replace(out_dtype=None))))
    if fault := check_close(y[some], linear_ref(*few)[0], exact):
        return fault
    if not call.stats_block:
        return None
    return stats_fault(y, y_stats)


def _fake(*arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _checked(*arguments, **named)
    x, rows, block = call.x, call.x.shape[:-1], call.stats_block
    y = x.new_empty(*rows, call.width, dtype=call.out_dtype or x.dtype)
    parts = (math.prod(rows), call.width // block, 2) if block else (0,)
    return y, x.new_empty(parts, dtype=torch.float32)


linear = register(OP, linear_ref, _run, _fake, "Train with torch.nn.functional.linear.")
