"""A linear layer in one launch: x w^T, behind it what a transformer block wants next to it.

* LayerNorm before the layer, its gain and shift folded into weight and bias, is a rank-1 correction of the product:
  LN(x) w^T = rstd * (x w^T - mean * rowsum(w)). Exact up to rounding, provided the row sums are of w as stored. Mean
  and variance come with x from the launch that made it, or out of the tiles that the product reads anyway.
* Bias, GELU and residual are added in registers; what the next LayerNorm needs of the result is left with it, as mean
  and sum of squared deviations of every block of columns, which combine without cancellation (Chan et al. 1983).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dvit_kernels.activations import activate
from dvit_kernels.launch import Launch, run, wait_for_inputs

ENOUGH_PROGRAMS = 128  # about one a multiprocessor of a large GPU


@dataclass(frozen=True)
class LinearTile:
    """Block sizes of a launch, which change nothing but time: rows, columns, inner; warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Largest first, each with unspilled registers (AOT.md); which is best where, only a measurement can say.
TILES = (
    LinearTile(128, 128, 64, 8, 3),
    LinearTile(64, 128, 64, 4, 3),
    LinearTile(64, 64, 64, 8, 4),
    LinearTile(32, 64, 64, 4, 4),
    LinearTile(32, 32, 64, 4, 4),
)
FLOAT32_TILE = LinearTile(64, 64, 16, 8, 2)  # products on plain cores, from registers


@triton.jit
def _given_stats(stats_ptr, row, live, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, PART: tl.constexpr):
    """Mean and sum of squared deviations of whole rows, out of those of their PARTS blocks of PART columns."""
    part = tl.arange(0, PARTS_BLOCK)
    at = stats_ptr + (row.to(tl.int64)[:, None] * PARTS + part[None, :]) * 2
    there = live[:, None] & (part < PARTS)[None, :]
    means = tl.load(at, mask=there, other=0.0)
    mean = tl.sum(means, axis=1) / PARTS
    deviation = tl.where(there, means - mean[:, None], 0.0)
    squares = tl.sum(tl.load(at + 1, mask=there, other=0.0) + PART * deviation * deviation, axis=1)
    return mean, squares


@triton.jit(do_not_specialize=["rows", "x_tokens", "residual_tokens"])
def _linear_kernel(
    x_ptr,  # (B, n, K)
    w_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    w_sum_ptr,  # (N,) float32, row sums of w; None: no LayerNorm before
    stats_ptr,  # (rows, PARTS, 2) float32; None: found here
    residual_ptr,  # (B, n, N) or None
    y_ptr,  # out (rows, N)
    y_stats_ptr,  # out (rows, N / BLOCK_N, 2) float32, or None
    stride_xb,
    stride_xn,
    stride_rb,
    stride_rn,
    rows,
    x_tokens,
    residual_tokens,
    eps,
    DIM_IN: tl.constexpr,
    DIM_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,  # a power of two, at least PARTS
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    find_stats: tl.constexpr = w_sum_ptr is not None and stats_ptr is None
    blocks_n: tl.constexpr = (DIM_OUT + BLOCK_N - 1) // BLOCK_N
    # Blocks of one tile of rows follow each other: x is read from memory once, and all of w stays in the L2 cache.
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    block_n = tl.program_id(0) % blocks_n
    col = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    live = row < rows
    offset = (row // x_tokens).to(tl.int64) * stride_xb + (row % x_tokens).to(tl.int64) * stride_xn

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)  # of deviations from the mean so far
    for k in range(0, DIM_IN, BLOCK_K):
        x_mask, w_mask = live[:, None], (col < DIM_OUT)[None, :]
        if DIM_IN % BLOCK_K:
            x_mask, w_mask = x_mask & (k + inner < DIM_IN)[None, :], w_mask & (k + inner < DIM_IN)[:, None]
        x = tl.load(x_ptr + offset[:, None] + (k + inner)[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_ptr + col[None, :] * DIM_IN + (k + inner)[:, None], mask=w_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if find_stats:
            count = tl.minimum(BLOCK_K, DIM_IN - k).to(tl.float32)
            x = x.to(tl.float32)
            chunk_mean = tl.sum(x, axis=1) / count
            deviation = x - chunk_mean[:, None]
            if DIM_IN % BLOCK_K:
                deviation = tl.where((k + inner < DIM_IN)[None, :], deviation, 0.0)
            delta = chunk_mean - mean
            mean += delta * (count / (k + count))
            squares += tl.sum(deviation * deviation, axis=1) + delta * delta * (k * (count / (k + count)))

    if w_sum_ptr is not None:
        if not find_stats:
            mean, squares = _given_stats(stats_ptr, row, live, PARTS, PARTS_BLOCK, DIM_IN // PARTS)
        w_sum = tl.load(w_sum_ptr + col, mask=col < DIM_OUT, other=0.0)
        acc = tl.math.rsqrt(squares / DIM_IN + eps)[:, None] * (acc - mean[:, None] * w_sum[None, :])
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=col < DIM_OUT, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    mask = live[:, None] & (col < DIM_OUT)[None, :]
    if residual_ptr is not None:
        image, token = row // residual_tokens, row % residual_tokens
        at = residual_ptr + image.to(tl.int64) * stride_rb + token.to(tl.int64) * stride_rn
        acc += tl.load(at[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row.to(tl.int64)[:, None] * DIM_OUT + col[None, :], y, mask=mask)
    if y_stats_ptr is not None:  # BLOCK_N divides DIM_OUT
        y = y.to(tl.float32)  # of what the next launch will read, rounded
        part_mean = tl.sum(y, axis=1) / BLOCK_N
        deviation = y - part_mean[:, None]
        at = y_stats_ptr + (row.to(tl.int64) * blocks_n + block_n) * 2
        tl.store(at, part_mean, mask=live)
        tl.store(at + 1, tl.sum(deviation * deviation, axis=1), mask=live)


def _tiles(dtype: torch.dtype) -> tuple[LinearTile, ...]:
    return (FLOAT32_TILE,) if dtype == torch.float32 else TILES


def default_tile(rows: int, dim_out: int, dtype: torch.dtype, stats_block: int = 0) -> LinearTile:
    """The largest tile with enough programs to go round; `stats_block` fixes its columns."""
    tiles = [t for t in _tiles(dtype) if stats_block in (0, t.block_n)]
    if not tiles:
        raise ValueError(f"linear: stats_block {stats_block} is no tile's width")
    enough = (t for t in tiles if triton.cdiv(rows, t.block_m) * triton.cdiv(dim_out, t.block_n) >= ENOUGH_PROGRAMS)
    return next(enough, tiles[-1])


def default_stats_block(rows: int, dim_out: int, dtype: torch.dtype) -> int:
    """The `stats_block` of the tile that would be taken anyway, or the next smaller that divides the columns."""
    widths = sorted({t.block_n for t in _tiles(dtype)}, reverse=True)
    most = default_tile(rows, dim_out, dtype).block_n
    return next((width for width in widths if width <= most and dim_out % width == 0), 0)


def linear_launch(
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
    tile: LinearTile | None = None,
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch, and the tensors it fills: y and its statistics. Arguments as `launch_linear`."""
    dim_out, dim_in = weight.shape
    rows = x.numel() // dim_in
    tile = tile or default_tile(rows, dim_out, x.dtype, stats_block)
    x, x_tokens, stride_xb, stride_xn = _rows_of(x)
    y = x.new_empty(*x.shape[:-1], dim_out, dtype=out_dtype or x.dtype)
    y_stats = x.new_empty((rows, dim_out // stats_block, 2) if stats_block else 0, dtype=torch.float32)
    r_tokens = stride_rb = stride_rn = 1
    if residual is not None:
        residual, r_tokens, stride_rb, stride_rn = _rows_of(residual)
    parts = 1 if stats is None else stats.shape[1]
    launch = Launch.of(
        _linear_kernel,
        (triton.cdiv(rows, tile.block_m) * triton.cdiv(dim_out, tile.block_n),),
        x_ptr=x,
        w_ptr=weight.contiguous(),
        bias_ptr=bias,
        w_sum_ptr=weight_sum,
        stats_ptr=stats,
        residual_ptr=residual,
        y_ptr=y,
        y_stats_ptr=y_stats if stats_block else None,
        stride_xb=stride_xb,
        stride_xn=stride_xn,
        stride_rb=stride_rb,
        stride_rn=stride_rn,
        rows=rows,
        x_tokens=x_tokens,
        residual_tokens=r_tokens,
        eps=eps,
        DIM_IN=dim_in,
        DIM_OUT=dim_out,
        PARTS=parts,
        PARTS_BLOCK=triton.next_power_of_2(parts),
        ACTIVATION=activation,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return launch, y, y_stats


def _rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """x (..., C) as rows of pictures: itself or a copy that strides can address, rows a picture, its two strides."""
    if x.stride(-1) != 1 or x.ndim not in (2, 3):
        x = x.contiguous()
    if x.is_contiguous():  # one picture, however long
        return x, max(1, x.numel() // x.shape[-1]), 0, x.shape[-1]
    stride_b, stride_n = (0, x.stride(0)) if x.ndim == 2 else (x.stride(0), x.stride(1))
    return x, max(1, x.shape[-2]), stride_b, stride_n


def launch_linear(
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
    tile: LinearTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dvit::linear` as one Triton launch on x's device and its current stream.

    Arguments and results as `dvit_infer.ops.linear.linear`; `tile` fixes the block sizes, and with `stats_block` its
    columns must be as wide.
    """
    launch, y, y_stats = linear_launch(
        x, weight, bias, residual, weight_sum, stats, eps, activation, stats_block, out_dtype, tile
    )
    run([launch], x.device)
    return y, y_stats
