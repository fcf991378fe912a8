"""The epilogue of a linear layer, in registers: folded LayerNorm, bias, activation, residual, statistics.

* LayerNorm before the layer, its gain and shift folded into weight and bias, is a rank-1 correction of the product:
  LN(x) w^T = rstd * (x w^T - mean * rowsum(w)). This is exact up to rounding if the row sums are those of w as stored.
* A gated linear, activation(gate) * factor, takes one product: columns of a tile alternate between the two halves of w,
  so that a thread holds both and nothing moves between threads.
* Statistics for the next LayerNorm are stored beside the result: mean and sum of squared deviations of every block of
  columns, which combine without cancellation (Chan et al. 1983).
"""

import triton
import triton.language as tl

from dvit_kernels.activations import activate


@triton.jit
def row_offset(row, tokens, stride_b, stride_n, WIDTH: tl.constexpr):
    """Return offsets of rows in elements; without strides rows are WIDTH apart, without `tokens` stride_n.

    Omitting `tokens` saves two divisions by a number that is not a compile-time constant.
    """
    if stride_n is None:
        offset = row.to(tl.int64) * WIDTH
    elif tokens is None:
        offset = row.to(tl.int64) * stride_n
    else:
        offset = (row // tokens).to(tl.int64) * stride_b + (row % tokens).to(tl.int64) * stride_n
    return offset


@triton.jit
def columns(block_n, DIM_OUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the columns of a block and their mask, which is constant if BLOCK_N divides DIM_OUT."""
    col = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    there = col < DIM_OUT if DIM_OUT % BLOCK_N else tl.full((BLOCK_N,), True, tl.int1)
    return col, there


@triton.jit
def weight_rows(col, DIM_OUT: tl.constexpr, GATED: tl.constexpr):
    """Return the rows of w for columns of the product; gated, column 2i is row i, and 2i + 1 that of its factor."""
    if GATED:
        col = col % 2 * (DIM_OUT // 2) + col // 2
    return col


@triton.jit
def load_stats(stats_ptr, row, live, PARTS: tl.constexpr, PART: tl.constexpr):
    """Return mean and sum of squared deviations of rows from those of their PARTS blocks of PART columns."""
    at = stats_ptr + row.to(tl.int64) * (2 * PARTS)
    mean = tl.load(at, mask=live, other=0.0)
    squares = tl.load(at + 1, mask=live, other=0.0)
    for part in tl.static_range(1, PARTS):
        delta = tl.load(at + 2 * part, mask=live, other=0.0) - mean
        mean += delta / (part + 1)
        squares += tl.load(at + 2 * part + 1, mask=live, other=0.0) + delta * delta * (PART * part / (part + 1))
    return mean, squares


@triton.jit
def load_many_stats(stats_ptr, row, live, PARTS: tl.constexpr, PART: tl.constexpr, PADDED: tl.constexpr):
    """Return the same as `load_stats`, with the parts of a row in PADDED columns: two loads instead of a chain.

    All parts have one size: the mean is the mean of their means, and the means' deviations add to the squares.
    """
    part = tl.arange(0, PADDED)
    at = stats_ptr + (row.to(tl.int64) * (2 * PARTS))[:, None] + 2 * part[None, :]
    inside = live[:, None] & (part < PARTS)[None, :]
    means = tl.load(at, mask=inside, other=0.0)
    squares = tl.load(at + 1, mask=inside, other=0.0)
    mean = tl.sum(means, axis=1) / PARTS
    delta = tl.where(inside, means - mean[:, None], 0.0)
    return mean, tl.sum(squares + PART * delta * delta, axis=1)


@triton.jit
def load_columns(ptr, col, there):
    """Load a vector's values for the columns of a block, in float32."""
    return tl.load(ptr + col, mask=there, other=0.0).to(tl.float32)


@triton.jit
def load_residual(residual_ptr, row, col, mask, tokens, stride_b, stride_n, DIM_OUT: tl.constexpr):
    """Load a block of the residual, in float32."""
    at = row_offset(row, tokens, stride_b, stride_n, DIM_OUT)[:, None] + col[None, :]
    return tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def finish(
    acc,  # (rows of the block, BLOCK_N) float32, x w^T
    mean,  # means and sums of squared deviations of the rows of x; read only with w_sum_ptr
    squares,
    bias,  # for the block's columns; this and the next two are None if they are loaded here
    w_sum,
    residual,  # for the block
    row,  # indices of the rows
    block_n,  # index of the block of columns
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
    DIM_IN: tl.constexpr,
    DIM_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
):
    """Apply the epilogue and store the results; arguments as for `_linear_kernel`."""
    col, there = columns(block_n, DIM_OUT, BLOCK_N)
    w_row = weight_rows(col, DIM_OUT, GATED)
    live = row < rows
    if w_sum_ptr is not None:
        if w_sum is None:
            w_sum = load_columns(w_sum_ptr, w_row, there)
        acc = tl.math.rsqrt(squares / DIM_IN + eps)[:, None] * (acc - mean[:, None] * w_sum[None, :])
    if bias_ptr is not None:
        if bias is None:
            bias = load_columns(bias_ptr, w_row, there)
        acc += bias[None, :]
    width: tl.constexpr = DIM_OUT // 2 if GATED else DIM_OUT  # columns of the result
    block: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    if GATED:
        gate, factor = tl.split(tl.reshape(acc, (acc.shape[0], block, 2)))
        acc = activate(gate, ACTIVATION) * factor
        col, there = columns(block_n, width, block)
    else:
        acc = activate(acc, ACTIVATION)
    mask = live[:, None] & there[None, :]
    if residual_ptr is not None:
        if residual is None:
            residual = load_residual(residual_ptr, row, col, mask, residual_tokens, stride_rb, stride_rn, width)
        acc += residual
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (row.to(tl.int64) * width)[:, None] + col[None, :], y, mask=mask)
    if y_stats_ptr is not None:  # block divides width
        y = y.to(tl.float32)  # statistics of the rounded values that the next launch reads
        part_mean = tl.sum(y, axis=1) / block
        deviation = y - part_mean[:, None]
        at = y_stats_ptr + (row.to(tl.int64) * (width // block) + block_n) * 2
        tl.store(at, part_mean, mask=live)
        tl.store(at + 1, tl.sum(deviation * deviation, axis=1), mask=live)
