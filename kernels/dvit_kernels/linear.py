"""A linear layer in one launch: x w^T, with the operations around it in a transformer block (linear_epilogue.py).

Mean and variance for a LayerNorm before the layer come with x from an earlier launch, or are computed from the tiles
that the product reads anyway. There are two kernels: one program per tile, for any shapes and strides; and that of
linear_tma.py, for large products in half precision on Hopper and later.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from dvit_kernels.launch import Launch, run
from dvit_kernels.linear_epilogue import row_offset
from dvit_kernels.linear_tile import linear_tile
from dvit_kernels.linear_tma import _linear_tma_kernel, can_describe, operands, programs

WGMMA_ROWS = 64  # tiles with at least so many rows multiply asynchronously on Hopper (wgmma)
ENOUGH_PROGRAMS = 128  # about one per multiprocessor of a large GPU


@dataclass(frozen=True)
class LinearTile:
    """Block sizes and kernel of a launch, which affect only its speed and the order of rounding.

    Attributes:
        block_m, block_n, block_k: rows, columns and inner size of a block.
        num_warps, num_stages: warps of a program, stages of its pipeline.
        tma: 0: one program per tile; else a variant of linear_tma.py, with operands by TMA if possible.
        maxnreg: as in `Launch`.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: int = 0
    maxnreg: int = 0


# Largest first; none spills registers (AOT.md). The fastest tile must be measured.
TILES = (
    LinearTile(128, 128, 64, 8, 3),
    LinearTile(64, 128, 64, 4, 3),
    LinearTile(64, 64, 64, 8, 4),
    # For few rows: all loads of 384 channels are in flight before the first product; 1536 take 12 steps.
    LinearTile(32, 64, 128, 4, 4),
    LinearTile(32, 32, 128, 4, 4),
    LinearTile(16, 32, 128, 2, 4),
)
FLOAT32_TILE = LinearTile(32, 64, 16, 4, 2)  # without tensor cores, operands in registers


@triton.jit(do_not_specialize=["rows", "x_tokens", "residual_tokens"])
def _linear_kernel(
    x_ptr,  # (B, n, K)
    w_ptr,  # (N, K); gated, N is twice the columns of residual and y
    bias_ptr,  # (N,) or None
    w_sum_ptr,  # (N,) float32, row sums of w; None: no LayerNorm before
    stats_ptr,  # (rows, PARTS, 2) float32; None: computed here
    residual_ptr,  # (B, n, N) or None
    y_ptr,  # out (rows, N)
    y_stats_ptr,  # out (rows, N / BLOCK_N, 2) float32, or None
    stride_xb,
    stride_xn,
    stride_rb,
    stride_rn,
    rows,
    x_tokens,  # rows per image; it and strides may be None: row_offset
    residual_tokens,
    eps,
    DIM_IN: tl.constexpr,
    DIM_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,  # True or None
    PDL: tl.constexpr,
):
    blocks_n: tl.constexpr = (DIM_OUT + BLOCK_N - 1) // BLOCK_N
    # Blocks of one tile of rows are adjacent: x is read from memory once, and all of w stays in the L2 cache.
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    linear_tile(
        x_ptr,
        w_ptr,
        bias_ptr,
        w_sum_ptr,
        stats_ptr,
        residual_ptr,
        y_ptr,
        y_stats_ptr,
        row_offset(row, x_tokens, stride_xb, stride_xn, DIM_IN),
        row,
        row,
        tl.program_id(0) % blocks_n,
        stride_rb,
        stride_rn,
        rows,
        residual_tokens,
        eps,
        DIM_IN,
        DIM_OUT,
        PARTS,
        ACTIVATION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GATED,
        PDL,
    )


def _tiles(dtype: torch.dtype) -> tuple[LinearTile, ...]:
    return (FLOAT32_TILE,) if dtype == torch.float32 else TILES


def stats_blocks(dtype: torch.dtype) -> list[int]:
    """Return the `stats_block`s of the default tiles, largest first."""
    return sorted({t.block_n for t in _tiles(dtype)}, reverse=True)


def default_tile(rows: int, dim_out: int, dtype: torch.dtype, stats_block: int = 0) -> LinearTile:
    """Return the largest tile with enough programs for the GPU; `stats_block` fixes its columns."""
    tiles = [t for t in _tiles(dtype) if stats_block in (0, t.block_n)]
    if not tiles:
        raise ValueError(f"linear: stats_block {stats_block} is no tile's width")
    enough = (t for t in tiles if triton.cdiv(rows, t.block_m) * triton.cdiv(dim_out, t.block_n) >= ENOUGH_PROGRAMS)
    return next(enough, tiles[-1])


def default_stats_block(rows: int, dim_out: int, dtype: torch.dtype) -> int:
    """Return the `stats_block` of the default tile, or the next smaller one that divides the columns."""
    most = default_tile(rows, dim_out, dtype).block_n
    return next((width for width in stats_blocks(dtype) if width <= most and dim_out % width == 0), 0)


def _plain(tile: LinearTile, dtype: torch.dtype) -> LinearTile:
    """Return a replacement for a TMA tile, with the same columns for the statistics and as many rows as fit."""
    most = FLOAT32_TILE if dtype == torch.float32 else TILES[0]
    rows = min(tile.block_m, most.block_m * most.block_n // tile.block_n)
    return LinearTile(rows, tile.block_n, most.block_k, most.num_warps, most.num_stages)


def _rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int | None, int | None, int | None]:
    """Return x (..., C), or a copy, with rows per image and the two strides that `row_offset` needs.

    The first two are None if all rows are one stride apart, and all three if that stride is C.
    """
    if x.stride(-1) != 1 or x.ndim not in (2, 3):
        x = x.contiguous()
    if x.is_contiguous():
        return x, None, None, None
    if x.ndim == 2 or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1):
        return x, None, None, x.stride(-2)
    if x.shape[1] == 1:  # the row of the class token of every image
        return x, None, None, x.stride(0)
    return x, x.shape[1], x.stride(0), x.stride(1)


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
    gated: bool = False,
    tile: LinearTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dvit::linear` as one Triton launch on x's device and its current stream.

    Arguments and results are as for `dvit_infer.ops.linear.linear`; `tile` fixes the block sizes, and its columns must
    equal `stats_block` if that is given; a gated linear has a result column for every two.
    """
    dim_out, dim_in = weight.shape
    rows = x.numel() // dim_in
    per_column = 2 if gated else 1
    tile = tile or default_tile(rows, dim_out, x.dtype, stats_block * per_column)
    width, block = dim_out // per_column, tile.block_n // per_column
    if stats_block and (stats_block != block or width % stats_block):
        raise ValueError(f"linear: stats_block {stats_block} has to be the tile's {block} and divide {width}")
    x, x_tokens, stride_xb, stride_xn = _rows_of(x)
    y = x.new_empty(*x.shape[:-1], width, dtype=out_dtype or x.dtype)
    y_stats = x.new_empty((rows, width // stats_block, 2) if stats_block else 0, dtype=torch.float32)
    r_tokens = stride_rb = stride_rn = None
    if residual is not None:
        residual, r_tokens, stride_rb, stride_rn = _rows_of(residual)
    weight = weight.contiguous()
    bias, weight_sum, stats = (None if t is None else t.contiguous() for t in (bias, weight_sum, stats))
    parts = 1 if stats is None else stats.shape[1]
    common: dict[str, Any] = {
        "bias_ptr": bias,
        "w_sum_ptr": weight_sum,
        "stats_ptr": stats,
        "residual_ptr": residual,
        "y_ptr": y,
        "y_stats_ptr": y_stats if stats_block else None,
        "stride_rb": stride_rb,
        "stride_rn": stride_rn,
        "rows": rows,
        "residual_tokens": r_tokens,
        "eps": eps,
        "DIM_IN": dim_in,
        "DIM_OUT": dim_out,
        "PARTS": parts,
        "ACTIVATION": activation,
    }
    row_stride = dim_in if stride_xn is None else stride_xn
    in_line = x_tokens is None and (weight_sum is None or stats is not None)
    # TMA reads rows of w in their order; a gated tile alternates between its halves.
    if tile.tma and not (in_line and not gated and can_describe(x, weight, row_stride, tile.block_k)):
        tile = _plain(tile, x.dtype)
    if weight_sum is not None and stats is None and tile.block_m >= WGMMA_ROWS and x.dtype != torch.float32:
        # If x is also summed beside an asynchronous product, Triton allocates one buffer too few: later copies land
        # in a buffer that the product still reads. Products of fewer rows are not asynchronous.
        tile = LinearTile(32, tile.block_n, 64, 4, 4)
    blocks = tile.block_m, tile.block_n, tile.block_k
    common |= dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
    common |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.maxnreg}
    count = triton.cdiv(rows, tile.block_m) * triton.cdiv(dim_out, tile.block_n)
    if tile.tma:
        read = operands(x, weight, rows, row_stride, blocks, tile.tma)
        launch = Launch.of(_linear_tma_kernel, (min(count, programs(x.device, tile.tma)),), **read, **common)
    else:
        read = {"x_ptr": x, "w_ptr": weight, "stride_xb": stride_xb, "stride_xn": stride_xn, "x_tokens": x_tokens}
        read["GATED"] = gated or None
        launch = Launch.of(_linear_kernel, (count,), **read, **common)
    run([launch], x.device)
    return y, y_stats
