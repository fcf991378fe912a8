"""One tile of a linear layer: the product of some rows with a block of columns, and its epilogue."""

import triton
import triton.language as tl

from dvit_kernels.launch import SMALL_TILE, prefetch_rows, wait_for_inputs
from dvit_kernels.linear_epilogue import (
    columns,
    finish,
    load_columns,
    load_many_stats,
    load_residual,
    load_stats,
    weight_rows,
)


@triton.jit
def linear_tile(
    x_ptr,  # pointers as for `_linear_kernel`
    w_ptr,
    bias_ptr,
    w_sum_ptr,
    stats_ptr,
    residual_ptr,
    y_ptr,
    y_stats_ptr,
    offset,  # of the tile's rows in x, in elements
    source,  # their rows in stats_ptr
    row,  # their rows in the residual and the result; those from `rows` on are neither read nor stored
    block_n,
    stride_rb,
    stride_rn,
    rows,
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
    PDL: tl.constexpr,  # False if the caller has waited for its inputs
):
    """Compute a tile's results and store them, after waiting for the launch's inputs."""
    find_stats: tl.constexpr = w_sum_ptr is not None and stats_ptr is None
    # A small tile has registers left: it loads the inputs of its epilogue before the product instead of after it.
    early: tl.constexpr = BLOCK_M * BLOCK_N <= SMALL_TILE and w_ptr.dtype.element_ty != tl.float32
    col, there = columns(block_n, DIM_OUT, BLOCK_N)
    w_row = weight_rows(col, DIM_OUT, GATED)
    inner = tl.arange(0, BLOCK_K)
    live = row < rows

    bias, w_sum, residual = None, None, None
    if early:
        if bias_ptr is not None:
            bias = load_columns(bias_ptr, w_row, there)
        if w_sum_ptr is not None:
            w_sum = load_columns(w_sum_ptr, w_row, there)
        if PDL and GATED:
            prefetch_rows(w_ptr, block_n, BLOCK_N // 2, DIM_OUT // 2, DIM_IN)
            prefetch_rows(w_ptr + DIM_OUT // 2 * DIM_IN, block_n, BLOCK_N // 2, DIM_OUT // 2, DIM_IN)
        elif PDL:
            prefetch_rows(w_ptr, block_n, BLOCK_N, DIM_OUT, DIM_IN)
    wait_for_inputs(PDL)
    if early and residual_ptr is not None and not GATED:
        mask = live[:, None] & there[None, :]
        residual = load_residual(residual_ptr, row, col, mask, residual_tokens, stride_rb, stride_rn, DIM_OUT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)  # squared deviations from the running mean
    if early and stats_ptr is not None:
        mean, squares = load_many_stats(stats_ptr, source, live, PARTS, DIM_IN // PARTS, triton.next_power_of_2(PARTS))
    for k in range(0, DIM_IN, BLOCK_K):
        x_mask, w_mask = live[:, None], there[None, :]
        if DIM_IN % BLOCK_K:
            x_mask, w_mask = x_mask & (k + inner < DIM_IN)[None, :], w_mask & (k + inner < DIM_IN)[:, None]
        x = tl.load(x_ptr + offset[:, None] + (k + inner)[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_ptr + w_row[None, :] * DIM_IN + (k + inner)[:, None], mask=w_mask, other=0.0)
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

    if not early and stats_ptr is not None:
        mean, squares = load_stats(stats_ptr, source, live, PARTS, DIM_IN // PARTS)
    finish(
        acc,
        mean,
        squares,
        bias,
        w_sum,
        residual,
        row,
        block_n,
        bias_ptr,
        w_sum_ptr,
        residual_ptr,
        y_ptr,
        y_stats_ptr,
        stride_rb,
        stride_rn,
        rows,
        residual_tokens,
        eps,
        DIM_IN,
        DIM_OUT,
        ACTIVATION,
        BLOCK_N,
        GATED,
    )
