"""The scores of patch tokens in two launches: project, score.

The formulas are those of DynamicViT's predictor (Rao et al. 2021, section 3.2), rearranged exactly up to rounding:

* LayerNorm is a rank-1 correction after the first product: LN(x) W^T = rstd * (x W^T - mean * rowsum(W)), with gain
  and shift folded into W and the bias. Mean and variance are computed from the tiles that the product reads anyway; in
  large batches by an earlier launch (layer_norm.py). The product's float32 rounding error is amplified by mean / std.
* The half of the hidden channels that is averaged over an image never leaves the chip; only its column sums do. Its
  part of the second layer is one vector per image.
* The last layer gives one number per token, keep minus drop; ranking needs no softmax.
"""

import triton
import triton.language as tl

from dvit_kernels.activations import gelu_erf, gelu_exact
from dvit_kernels.launch import SMALL_TILE, prefetch_rows, wait_for_inputs
from dvit_kernels.linear_epilogue import load_columns, load_stats


@triton.jit(do_not_specialize=["batch", "n_tokens", "num_prefix"])
def _project_kernel(
    x_ptr,  # (B, P+N, C)
    w1_ptr,  # (C, C)
    w1_sum_ptr,  # (C,) row sums of w1
    b1_ptr,  # (C,)
    stats_ptr,  # (B*N, 1, 2) float32, mean and sum of squared deviations of the patch tokens; None: computed here
    hidden_ptr,  # out (B*N, C/2)
    sums_ptr,  # out (tiles, SEGMENTS, C/2) float32
    stride_xb,
    stride_xn,
    batch,
    n_tokens,
    num_prefix,
    eps,
    DIM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """gelu(LN(x) w1^T + b1): store the own half of every token, and sums of the mean half per tile and image in it."""
    half: tl.constexpr = DIM // 2
    blocks_n: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // blocks_n
    block_n = tl.program_id(0) % blocks_n

    # Rows are the patch tokens of all images in order: only the last tile of the batch has padding.
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image = row // n_tokens
    live = image < batch
    offset = image.to(tl.int64) * stride_xb + (num_prefix + row % n_tokens).to(tl.int64) * stride_xn
    col = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)

    # As in linear.py: small tiles load the inputs of their epilogue before the product.
    early: tl.constexpr = BLOCK_M * BLOCK_N <= SMALL_TILE and w1_ptr.dtype.element_ty != tl.float32
    if early:
        w1_sum, b1 = load_columns(w1_sum_ptr, col, col < DIM), load_columns(b1_ptr, col, col < DIM)
        if PDL:
            prefetch_rows(w1_ptr, block_n, BLOCK_N, DIM, DIM)
    wait_for_inputs(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)  # squared deviations from the running mean
    for k in range(0, DIM, BLOCK_K):
        x = tl.load(x_ptr + offset[:, None] + (k + inner)[None, :], mask=live[:, None], other=0.0)
        w = tl.load(w1_ptr + col[None, :] * DIM + (k + inner)[:, None], mask=col[None, :] < DIM, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if stats_ptr is None:  # Chan et al. 1983: stable in one pass, whatever the mean
            x = x.to(tl.float32)
            chunk_mean = tl.sum(x, axis=1) / BLOCK_K
            deviation = x - chunk_mean[:, None]
            delta = chunk_mean - mean
            mean += delta * (BLOCK_K / (k + BLOCK_K))
            squares += tl.sum(deviation * deviation, axis=1) + delta * delta * (k * (BLOCK_K / (k + BLOCK_K)))

    if stats_ptr is not None:
        mean, squares = load_stats(stats_ptr, row, live, 1, DIM)
    rstd = tl.math.rsqrt(squares / DIM + eps)
    if not early:
        w1_sum, b1 = load_columns(w1_sum_ptr, col, col < DIM), load_columns(b1_ptr, col, col < DIM)
    y = rstd[:, None] * (acc - mean[:, None] * w1_sum[None, :]) + b1[None, :]
    y = gelu_exact(y, hidden_ptr.dtype.element_ty)

    own = live[:, None] & (col[None, :] < half)
    tl.store(hidden_ptr + row.to(tl.int64)[:, None] * half + col[None, :], y.to(hidden_ptr.dtype.element_ty), mask=own)
    if (block_n + 1) * BLOCK_N > half:
        averaged = (col >= half) & (col < DIM)
        first = tile * BLOCK_M // n_tokens
        for segment in tl.static_range(SEGMENTS):
            member = live & (image == first + segment)
            total = tl.sum(tl.where(member[:, None], y, 0.0), axis=0)
            tl.store(sums_ptr + (tile * SEGMENTS + segment).to(tl.int64) * half + col - half, total, mask=averaged)


@triton.jit
def _last_layer(b3_ptr, w4_ptr, b4_ptr, col, width):
    """Load the vectors used after the third product."""
    b3, w4 = load_columns(b3_ptr, col, col < width), load_columns(w4_ptr, col, col < width)
    return b3, w4, tl.load(b4_ptr)


@triton.jit(do_not_specialize=["n_tokens"])
def _score_kernel(
    hidden_ptr,  # (B*N, C/2)
    sums_ptr,  # (tiles, SEGMENTS, C/2) float32
    w2_own_ptr,  # (C/2, C/2)
    w2_mean_ptr,  # (C/2, C/2)
    b2_ptr,  # (C/2,)
    w3_ptr,  # (C/4, C/2)
    b3_ptr,  # (C/4,)
    w4_ptr,  # (C/4,)
    b4_ptr,  # (1,)
    score_ptr,  # out (B, N) float32
    n_tokens,
    DIM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TILE_M: tl.constexpr,  # rows of a tile of the first launch
    TILES: tl.constexpr,  # a power of two, at least the number of tiles that an image can overlap
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # at least C/4
    PDL: tl.constexpr,
):
    """Compute the difference of the two logits for BLOCK_M tokens of one image."""
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    half: tl.constexpr = DIM // 2
    quarter: tl.constexpr = DIM // 4
    blocks_m = tl.cdiv(n_tokens, BLOCK_M)
    image = tl.program_id(0) // blocks_m
    token = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < n_tokens
    start = image * n_tokens
    first_tile, last_tile = start // TILE_M, (start + n_tokens - 1) // TILE_M
    row = (start + token).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    quarters = tl.arange(0, BLOCK_Q)

    early: tl.constexpr = BLOCK_M * BLOCK_Q <= SMALL_TILE
    if early:
        b3, w4, b4 = _last_layer(b3_ptr, w4_ptr, b4_ptr, quarters, quarter)
    wait_for_inputs(PDL)
    # The image's sums are in the tiles of the first launch that it overlaps.
    tile = first_tile + tl.arange(0, TILES)
    touched = (tile <= last_tile)[:, None]
    segment = tile * SEGMENTS + image - tile * TILE_M // n_tokens
    sums_ptr += segment.to(tl.int64)[:, None] * half

    # Hidden channels enter the third layer block by block, so that none are stored and widths need not be powers of
    # two.
    acc3 = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
    for h in range(0, half, BLOCK_H):
        col = h + tl.arange(0, BLOCK_H)
        shared = tl.zeros((BLOCK_H, BLOCK_K), tl.float32)
        for k in range(0, half, BLOCK_K):
            total = tl.sum(tl.load(sums_ptr + (k + inner)[None, :], mask=touched, other=0.0), axis=0)
            w = tl.load(w2_mean_ptr + col[:, None] * half + (k + inner)[None, :], mask=col[:, None] < half, other=0.0)
            shared += w.to(tl.float32) * (total / n_tokens)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for k in range(0, half, BLOCK_K):
            x = tl.load(hidden_ptr + row[:, None] * half + (k + inner)[None, :], mask=live[:, None], other=0.0)
            w = tl.load(w2_own_ptr + col[None, :] * half + (k + inner)[:, None], mask=col[None, :] < half, other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        bias = tl.sum(shared, axis=1) + tl.load(b2_ptr + col, mask=col < half, other=0.0)
        z = gelu_exact(acc + bias[None, :], dtype).to(dtype)
        fits = (quarters[None, :] < quarter) & (col[:, None] < half)
        w3 = tl.load(w3_ptr + quarters[None, :] * half + col[:, None], mask=fits, other=0.0)
        acc3 = tl.dot(z, w3, acc3, input_precision="ieee")
    if not early:
        b3, w4, b4 = _last_layer(b3_ptr, w4_ptr, b4_ptr, quarters, quarter)
    score = tl.sum(gelu_erf(acc3 + b3[None, :]) * w4[None, :], axis=1) + b4
    tl.store(score_ptr + row, score, mask=live)
