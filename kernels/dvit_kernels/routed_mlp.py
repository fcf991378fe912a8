"""routed_mlp in two launches: fc1 of the chosen rows, then fc2 of these together with the fast linear of the others.

Both read rows of x, its statistics and the residual through the order of tokens, and the second writes every row to its
own place, so that no row is gathered or scattered apart from a product. Every row is written by one branch alone: no
atomics. Tiles of fc2, which take the longest, come first, so that those of the fast linear fill the last wave.

Bytes, for R = B N rows of C channels, s bytes an element, of which k are chosen, and H hidden channels: x is read once
and the residual once, the result written once, hidden rows written and read once; (3 R C + 2 k H) s. That is the least
for two products per branch with the hidden rows in memory. Beyond it come 24 k + 16 (R - k) for the order, which
programs of a block of rows share in the cache, and the statistics, 8 a row and part. A permuted copy of x would add
2 R C s.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from dvit_kernels.launch import SMALL_TILE, Launch, prefetch_rows, run, wait_for_inputs
from dvit_kernels.layer_norm import launch_row_stats
from dvit_kernels.linear import TILES, WGMMA_ROWS, LinearTile, default_tile
from dvit_kernels.linear_tile import linear_tile

# For the second launch, whose LayerNorm and residual need more registers than either alone: as tile of 128 x 128 it
# takes 165 on Hopper, one program per multiprocessor; of this one three fit, and it spills nowhere (AOT.md).
WIDE_TILE = LinearTile(64, 128, 32, 4, 4)


@triton.jit
def _places(order_ptr, row, rows, n_tokens, per_image, first):
    """Return the rows of x that a branch's rows are: `per_image` of each image, from place `first` in its order.

    Past the branch's last row they are past the last row of x.
    """
    image = row // per_image
    place = image * n_tokens + first + row % per_image
    token = tl.load(order_ptr + place, mask=row < rows, other=0).to(tl.int32)
    return tl.where(row < rows, image * n_tokens + token, 0x7FFFFFFF)


@triton.jit(do_not_specialize=["rows", "n_tokens", "num_keep"])
def _routed_fc1_kernel(
    x_ptr,  # (B N, DIM)
    order_ptr,  # (B, N) int64
    w_ptr,  # (HIDDEN, DIM)
    bias_ptr,  # (HIDDEN,)
    w_sum_ptr,  # (HIDDEN,) float32, row sums of w
    stats_ptr,  # (B N, PARTS, 2) float32; None: computed here
    hidden_ptr,  # out (rows, HIDDEN)
    rows,  # chosen ones of all images
    n_tokens,
    num_keep,
    eps,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute a tile of activation(LayerNorm(x) w^T + b) for chosen rows."""
    blocks_n: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    if PDL and BLOCK_M * BLOCK_N <= SMALL_TILE:
        prefetch_rows(w_ptr, tl.program_id(0) % blocks_n, BLOCK_N, HIDDEN, DIM)
    wait_for_inputs(PDL)
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    source = _places(order_ptr, row, rows, n_tokens, num_keep, 0)
    linear_tile(
        x_ptr,
        w_ptr,
        bias_ptr,
        w_sum_ptr,
        stats_ptr,
        None,
        hidden_ptr,
        None,
        source.to(tl.int64) * DIM,
        source,
        row,
        tl.program_id(0) % blocks_n,
        None,
        None,
        rows,
        None,
        eps,
        DIM,
        HIDDEN,
        PARTS,
        ACTIVATION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        None,
        False,
    )


@triton.jit(do_not_specialize=["batch", "n_tokens", "num_keep"])
def _routed_add_kernel(
    hidden_ptr,  # (B K, HIDDEN)
    x_ptr,  # (B N, DIM)
    order_ptr,  # (B, N) int64
    w_ptr,  # (DIM, HIDDEN)
    bias_ptr,  # (DIM,)
    fast_ptr,  # (DIM, DIM)
    fast_bias_ptr,  # (DIM,)
    fast_sum_ptr,  # (DIM,) float32, row sums of the fast weight
    stats_ptr,  # (B N, PARTS, 2) float32; None: computed here
    residual_ptr,  # (B N, DIM)
    y_ptr,  # out (B N, DIM)
    y_stats_ptr,  # out (B N, DIM / BLOCK_N, 2) float32, or None
    batch,
    n_tokens,
    num_keep,
    eps,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add a tile of hidden w^T + b to chosen rows of the residual, or one of the fast linear to others."""
    blocks_n: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
    block_m, block_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    chosen = batch * num_keep
    tiles = tl.cdiv(chosen, BLOCK_M)
    if PDL and BLOCK_M * BLOCK_N <= SMALL_TILE:
        if block_m < tiles:
            prefetch_rows(w_ptr, block_n, BLOCK_N, DIM, HIDDEN)
        else:
            prefetch_rows(fast_ptr, block_n, BLOCK_N, DIM, DIM)
    wait_for_inputs(PDL)
    if block_m < tiles:
        row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        place = _places(order_ptr, row, chosen, n_tokens, num_keep, 0)
        linear_tile(
            hidden_ptr,
            w_ptr,
            bias_ptr,
            None,
            None,
            residual_ptr,
            y_ptr,
            y_stats_ptr,
            row.to(tl.int64) * HIDDEN,
            row,
            place,
            block_n,
            None,
            None,
            batch * n_tokens,
            None,
            eps,
            HIDDEN,
            DIM,
            1,
            "none",
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            None,
            False,
        )
    else:
        left = n_tokens - num_keep
        row = (block_m - tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        place = _places(order_ptr, row, batch * left, n_tokens, left, num_keep)
        linear_tile(
            x_ptr,
            fast_ptr,
            fast_bias_ptr,
            fast_sum_ptr,
            stats_ptr,
            residual_ptr,
            y_ptr,
            y_stats_ptr,
            place.to(tl.int64) * DIM,
            place,
            place,
            block_n,
            None,
            None,
            batch * n_tokens,
            None,
            eps,
            DIM,
            DIM,
            PARTS,
            "none",
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            None,
            False,
        )


def launch_routed_mlp(
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
    tiles: tuple[LinearTile, LinearTile] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dvit::routed_mlp` as two Triton launches on x's device and its current stream.

    Missing statistics are a third one if a tile is too large to compute them beside its product. Arguments and results
    are as for `dvit_infer.ops.routed_mlp.routed_mlp`; `tiles` fixes the block sizes of the two launches, and the
    columns of the second must equal `stats_block` if that is given. Strides that are not contiguous cost a copy.
    """
    (b, n, c), (w1, b1, w1_sum, w2, b2), (w, bias, w_sum) = x.shape, mlp, fast
    hidden, chosen = len(w1), b * num_keep
    one, two = tiles or (_fc1_tile(chosen, hidden, x.dtype), _add_tile(b * n, c, x.dtype, stats_block))
    if stats_block and (stats_block != two.block_n or c % stats_block):
        raise ValueError(f"routed_mlp: stats_block {stats_block} has to be the tile's {two.block_n} and divide {c}")
    # Not computed beside an asynchronous product, for the reason given in linear.py.
    if stats is None and max(one.block_m, two.block_m) >= WGMMA_ROWS and x.dtype != torch.float32:
        stats = launch_row_stats(x)
    x, residual, order = x.contiguous(), residual.contiguous(), order.contiguous()
    w1, b1, w1_sum, w2, b2, w, bias, w_sum = (t.contiguous() for t in (w1, b1, w1_sum, w2, b2, w, bias, w_sum))
    between, y = x.new_empty(chosen, hidden), torch.empty_like(residual)
    y_stats = x.new_empty((b * n, c // stats_block, 2) if stats_block else 0, dtype=torch.float32)
    common: dict[str, Any] = {
        "x_ptr": x,
        "order_ptr": order,
        "stats_ptr": None if stats is None else stats.contiguous(),
        "hidden_ptr": between,
        "n_tokens": n,
        "num_keep": num_keep,
        "eps": eps,
        "DIM": c,
        "HIDDEN": hidden,
        "PARTS": 1 if stats is None else stats.shape[1],
    }
    fc1 = Launch.of(
        _routed_fc1_kernel,
        (triton.cdiv(chosen, one.block_m) * triton.cdiv(hidden, one.block_n),),
        w_ptr=w1,
        bias_ptr=b1,
        w_sum_ptr=w1_sum,
        rows=chosen,
        ACTIVATION=activation,
        **common,
        **_options(one),
    )
    rows = triton.cdiv(chosen, two.block_m) + triton.cdiv(b * n - chosen, two.block_m)
    add = Launch.of(
        _routed_add_kernel,
        (rows * triton.cdiv(c, two.block_n),),
        w_ptr=w2,
        bias_ptr=b2,
        fast_ptr=w,
        fast_bias_ptr=bias,
        fast_sum_ptr=w_sum,
        residual_ptr=residual,
        y_ptr=y,
        y_stats_ptr=y_stats if stats_block else None,
        batch=b,
        **common,
        **_options(two),
    )
    run([fc1, add], x.device)
    return y, y_stats


def _fc1_tile(rows: int, dim_out: int, dtype: torch.dtype) -> LinearTile:
    """Return the default tile of the first launch: that of a linear, with which four stages spill in Triton 3.6.0."""
    tile = default_tile(rows, dim_out, dtype)
    return replace(tile, num_stages=min(tile.num_stages, 3))


def _add_tile(rows: int, dim_out: int, dtype: torch.dtype, stats_block: int) -> LinearTile:
    """Return the default tile of the second launch: that of a linear, but for the two with the most columns."""
    tile = default_tile(rows, dim_out, dtype, stats_block)
    return WIDE_TILE if tile in TILES[:2] else tile


def _options(tile: LinearTile) -> dict[str, int]:
    """Return block sizes and options of a launch; a tile with operands by TMA, which cannot gather rows, has none."""
    if tile.tma:
        raise ValueError("routed_mlp: a tile with operands by TMA, which cannot gather rows")
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return blocks | {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.maxnreg}
