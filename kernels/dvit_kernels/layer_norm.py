"""LayerNorm of rows, and row statistics alone, for a product with the normalisation folded into it.

Both compute the mean first and then the squared deviations from it, in float32 with the row in registers: exact up to
rounding, however far the rows are from zero.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from dvit_kernels.launch import Launch, run, wait_for_inputs

MAX_DIM = 2048  # a row must fit in registers
_BLOCK = 2048  # elements per program: one row, or as many short rows as fit


@triton.jit
def _centred_rows(
    x_ptr, row, rows, n_tokens, stride_xb, stride_xn, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return ROWS rows from `row` minus their means, zero past column DIM; their means; sums of squared deviations."""
    row = row + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < DIM)[None, :]
    offset = (row // n_tokens).to(tl.int64) * stride_xb + (row % n_tokens).to(tl.int64) * stride_xn
    x = tl.load(x_ptr + offset[:, None] + col[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / DIM
    deviation = tl.where(inside, x - mean[:, None], 0.0)
    return deviation, mean, tl.sum(deviation * deviation, axis=1)


@triton.jit
def store_stats(stats_ptr, part, y, inside, live, WIDTH: tl.constexpr):
    """Store mean and sum of squared deviations of y's rows, of WIDTH columns, as parts of the statistics of rows.

    Past the last column y is zero.
    """
    y = y.to(tl.float32)  # statistics of the rounded values that the next launch reads
    mean = tl.sum(y, axis=1) / WIDTH
    deviation = tl.where(inside, y - mean[:, None], 0.0)
    at = stats_ptr + part.to(tl.int64) * 2
    tl.store(at, mean, mask=live)
    tl.store(at + 1, tl.sum(deviation * deviation, axis=1), mask=live)


@triton.jit(do_not_specialize=["rows", "n_tokens"])
def _layer_norm_kernel(
    x_ptr,  # (B, n, C)
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    y_ptr,  # out (rows, C)
    stride_xb,
    stride_xn,
    rows,
    n_tokens,
    eps,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    first = tl.program_id(0) * ROWS
    y, _, squares = _centred_rows(x_ptr, first, rows, n_tokens, stride_xb, stride_xn, DIM, ROWS, BLOCK_C)
    col = tl.arange(0, BLOCK_C)
    y *= tl.math.rsqrt(squares / DIM + eps)[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + col, mask=col < DIM, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask=col < DIM, other=0.0).to(tl.float32)[None, :]
    row = first + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (col < DIM)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * DIM + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "n_tokens"])
def _row_stats_kernel(
    x_ptr,  # (B, n, C)
    stats_ptr,  # out (rows, 1, 2) float32
    stride_xb,
    stride_xn,
    rows,
    n_tokens,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    first = tl.program_id(0) * ROWS
    _, mean, squares = _centred_rows(x_ptr, first, rows, n_tokens, stride_xb, stride_xn, DIM, ROWS, BLOCK_C)
    row = first + tl.arange(0, ROWS)
    at = stats_ptr + row.to(tl.int64) * 2
    tl.store(at, mean, mask=row < rows)
    tl.store(at + 1, squares, mask=row < rows)


def supports(c: int) -> bool:
    """Return whether the kernels support rows of C channels: 1 to 2048."""
    return 1 <= c <= MAX_DIM


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x as (B, n, C) with C contiguous; copy only if its strides require it."""
    if x.ndim != 3:
        x = x.reshape(1, -1, x.shape[-1])
    return x if x.stride(2) == 1 else x.contiguous()


def _common(x: torch.Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Return grid and arguments common to both kernels, for x of shape (B, n, C)."""
    b, n, c = x.shape
    block_c = triton.next_power_of_2(c)
    rows_each = max(1, min(32, _BLOCK // block_c))
    shape = {"rows": b * n, "n_tokens": n, "DIM": c, "ROWS": rows_each, "BLOCK_C": block_c}
    return (triton.cdiv(b * n, rows_each),), {"x_ptr": x, "stride_xb": x.stride(0), "stride_xn": x.stride(1), **shape}


def launch_layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Run `dvit::layer_norm` as a Triton launch on x's device and its current stream.

    Args:
        x: (..., C) in float32, float16 or bfloat16, C up to 2048, any strides (up to three dimensions with the last
            contiguous are read in place).
        weight, bias: gain and shift (C,), in any floating-point dtype, or None.
        eps: added to the variance.

    Returns:
        (..., C) in x's dtype, contiguous.

    Raises:
        ValueError: the width is not supported.
    """
    _check_width("launch_layer_norm", x)
    y = x.new_empty(x.shape)
    grid, common = _common(_in_rows(x))
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    given: dict[str, Any] = {"weight_ptr": weight, "bias_ptr": bias, "y_ptr": y, "eps": eps}
    run([Launch.of(_layer_norm_kernel, grid, num_warps=4, num_stages=1, **common, **given)], x.device)
    return y


def launch_row_stats(x: torch.Tensor) -> torch.Tensor:
    """Run `dvit::row_stats` as a Triton launch on x's device and its current stream.

    Args:
        x: (..., C) as for `launch_layer_norm`.

    Returns:
        (rows, 1, 2) float32: mean and sum of squared deviations of every row.

    Raises:
        ValueError: the width is not supported.
    """
    _check_width("launch_row_stats", x)
    x = _in_rows(x)
    stats = x.new_empty(x.shape[0] * x.shape[1], 1, 2, dtype=torch.float32)
    grid, common = _common(x)
    run([Launch.of(_row_stats_kernel, grid, num_warps=4, num_stages=1, **common, stats_ptr=stats)], x.device)
    return stats


def _check_width(name: str, x: torch.Tensor) -> None:
    if not supports(x.shape[-1]):
        raise ValueError(f"{name}: x has {x.shape[-1]} channels, 1 to {MAX_DIM} are supported")
