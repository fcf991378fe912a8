"""routed_mlp: the MLP for the chosen tokens of each image, one linear for the others, added in place of each.

`route_tokens` chooses. On CUDA two Triton launches run both branches (dvit_kernels/routed_mlp.py), which read and write
rows of the map itself; elsewhere PyTorch gathers each branch's rows once and adds its results. `torch.ops.dvit.
routed_mlp` exists once this module is imported.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dvit_infer.ops.choices import DTYPES, choices_for, runs_triton
from dvit_infer.ops.fallback import by_kernel, check_close, some_of, widened
from dvit_infer.ops.layer_norm import block_stats, stats_fault
from dvit_infer.ops.linear import ACTIVATIONS, linear_ref
from dvit_infer.ops.registration import register
from dvit_infer.ops.route_tokens import branch_rows

OP = "dvit::routed_mlp"


def routed_mlp_ref(
    x: torch.Tensor,
    residual: torch.Tensor,
    order: torch.Tensor,
    num_keep: int,
    mlp: Sequence[torch.Tensor],
    fast: Sequence[torch.Tensor],
    stats: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    stats_block: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return residual + MLP(LayerNorm(x)) for the chosen tokens, residual + linear(LayerNorm(x)) for the others.

    The two norms share their statistics and eps; gains, shifts and layer scales are folded into the weights. In
    DynamicSwin both x and the residual are the block's map after attention; in DynamicConvNeXt x is its depthwise
    convolution and the residual its input, with channels last.

    Args:
        x: (B, N, C) in float32, float16 or bfloat16, any strides.
        residual: (B, N, C) in x's dtype, any strides; may be x.
        order: (B, N) int64, of which the first num_keep positions of each image take the MLP, as `route_tokens` returns
            it or `order_of` makes it from given positions; a permutation in every image, which is not checked.
        num_keep: from 1 to N.
        mlp: fc1's weight (H, C) in x's dtype, bias (H,) and row sums (H,) float32 (`row_sums`), fc2's weight (C, H) and
            bias (C,).
        fast: the linear's weight (C, C), bias (C,) and row sums (C,) float32.
        stats: (B N, parts, 2) float32, statistics of x's rows as `linear` and `row_stats` return them; None: computed
            here if needed. The reference computes its own.
        eps: of both LayerNorms.
        activation: of the MLP, one of `ACTIVATIONS` of linear.
        stats_block: columns per part of the statistics of the stored result; it divides C; 0: no statistics.

    Returns:
        y (B, N, C) in x's dtype, contiguous, every token in its place, and its statistics (B N, C/stats_block, 2)
        float32 (an empty tensor without `stats_block`).

    Raises:
        ValueError: a shape, a dtype, a device, a count or a name is invalid.
        RuntimeError: on backward.
    """
    (w1, b1, sums, w2, b2), (weight, bias, fast_sums) = mlp, fast
    chosen, others = branch_rows(order, num_keep)
    rows = x.reshape(-1, x.shape[2])
    # Whole rows, as prune_tokens gathers them.
    hidden, _ = linear_ref(F.embedding(chosen, rows), w1, b1, None, sums, None, eps, activation)
    slow, _ = linear_ref(hidden, w2, b2)
    quick, _ = linear_ref(F.embedding(others, rows), weight, bias, None, fast_sums, None, eps)
    y = residual.reshape(rows.shape).contiguous().index_add(0, chosen, slow).index_add_(0, others, quick)
    return y.view(x.shape), block_stats(y, stats_block) if stats_block else y.new_empty(0, dtype=torch.float32)


class _Call(NamedTuple):
    """A call's arguments, as in the schema; the dispatcher omits those that equal the default."""

    x: torch.Tensor
    residual: torch.Tensor
    order: torch.Tensor
    num_keep: int
    mlp: Sequence[torch.Tensor]
    fast: Sequence[torch.Tensor]
    stats: torch.Tensor | None = None
    eps: float = 1e-5
    activation: str = "gelu"
    stats_block: int = 0


def _checked(*arguments: Any, **named: Any) -> _Call:
    call = _Call(*arguments, **named)
    x, residual, order, num_keep, mlp, fast, stats, _, activation, stats_block = call
    if x.ndim != 3 or x.dtype not in DTYPES:
        raise ValueError(f"routed_mlp: x is {_found(x)}; (B, N, C) in float32, float16 or bfloat16 is expected")
    b, n, c = x.shape
    if not 1 <= num_keep <= n:
        raise ValueError(f"routed_mlp: num_keep is {num_keep}, from 1 to {n} tokens can be chosen")
    hidden = mlp[0].shape[0] if len(mlp) and mlp[0].ndim else 0
    own, f32 = x.dtype, torch.float32
    _check_fit("residual", [residual], [(own, b, n, c)], x)
    _check_fit("order", [order], [(torch.int64, b, n)], x)
    _check_fit("mlp", mlp, [(own, hidden, c), (None, hidden), (f32, hidden), (own, c, hidden), (None, c)], x)
    _check_fit("fast", fast, [(own, c, c), (None, c), (f32, c)], x)
    if stats is not None:
        parts = stats.shape[1] if stats.ndim == 3 and stats.shape[1] and c % stats.shape[1] == 0 else 1
        _check_fit("stats", [stats], [(f32, b * n, parts, 2)], x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"routed_mlp: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if stats_block < 0 or (stats_block and c % stats_block):
        raise ValueError(f"routed_mlp: stats_block {stats_block} does not divide {c} columns")
    return call


def _check_fit(name: str, tensors: Sequence[torch.Tensor], fit: list[tuple[Any, ...]], x: torch.Tensor) -> None:
    """Raise ValueError if tensors are not of those dtypes (None: any floating-point one) and shapes, on x's device."""

    def fits(t: torch.Tensor, dtype: torch.dtype | None, *shape: int) -> bool:
        right = t.is_floating_point() if dtype is None else t.dtype == dtype
        return right and tuple(t.shape) == shape and t.device == x.device

    if len(tensors) != len(fit) or not all(fits(t, *wanted) for t, wanted in zip(tensors, fit, strict=True)):
        found = ", ".join(f"{_found(t)} on {t.device}" for t in tensors)
        raise ValueError(f"routed_mlp: {name} is {found}; it does not fit x, {_found(x)} on {x.device}")


def _found(x: torch.Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def backend_of(device: torch.device, dtype: torch.dtype, rows: int, dim: int, hidden: int) -> str:
    """Return the backend of the op for B N = `rows` tokens of C = `dim` channels: 'Triton' or 'PyTorch'."""
    if not runs_triton(device, "routed_mlp"):
        return "PyTorch"
    by = choices_for(device).of("routed_mlp", dtype, rows, dim=dim, hidden=hidden).by
    return "Triton" if by == "triton" else "PyTorch"


def free_stats_block(device: torch.device, dtype: torch.dtype, rows: int, dim: int, hidden: int) -> int:
    """Return the `stats_block` that is free: the columns of the tile of the second launch, or 0 if there is none."""
    if backend_of(device, dtype, rows, dim, hidden) == "PyTorch":
        return 0
    from dvit_kernels.linear import default_stats_block

    return default_stats_block(rows, dim, dtype)


def _run(*arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _checked(*arguments, **named)
    (b, n, c), hidden = call.x.shape, len(call.mlp[0])
    if backend_of(call.x.device, call.x.dtype, b * n, c, hidden) == "PyTorch":
        return routed_mlp_ref(*call)
    return by_kernel(
        "routed_mlp",
        call.x.device,
        lambda: _by_kernel(call),
        lambda: routed_mlp_ref(*call),
        lambda result: _fault(call, *result),
        call,
    )


def _by_kernel(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    from dvit_kernels.linear import stats_blocks  # here: Triton takes a while to import
    from dvit_kernels.routed_mlp import launch_routed_mlp

    if call.stats_block in (0, *stats_blocks(call.x.dtype)):
        return launch_routed_mlp(*call)
    y, _ = launch_routed_mlp(*call._replace(stats_block=0))
    return y, block_stats(y, call.stats_block)


def _fault(call: _Call, y: torch.Tensor, y_stats: torch.Tensor) -> str | None:
    """Check the kernels' result in a few images."""
    some = some_of(call.x)
    x, residual, order = call.x[some], call.residual[some], call.order[some]
    few = call._replace(x=x, residual=residual, order=order, stats=None, stats_block=0)
    mlp, fast = ([widened(t) for t in branch] for branch in (call.mlp, call.fast))
    exact, _ = routed_mlp_ref(*few._replace(x=widened(x), residual=widened(residual), mlp=mlp, fast=fast))
    if fault := check_close(y[some], routed_mlp_ref(*few)[0], exact):
        return fault
    return stats_fault(y, y_stats) if call.stats_block else None


def _fake(*arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _checked(*arguments, **named)
    (b, n, c), block = call.x.shape, call.stats_block
    return call.x.new_empty(b, n, c), call.x.new_empty((b * n, c // block, 2) if block else 0, dtype=torch.float32)


_ADVICE = "Train with the reference model."
routed_mlp = register(OP, routed_mlp_ref, _run, _fake, _ADVICE)
