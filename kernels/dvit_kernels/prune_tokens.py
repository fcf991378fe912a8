"""prune_tokens in three launches: project, score, select and copy. Deterministic; the same kernels at any batch size.

The formulas are DynamicViT's predictor (Rao et al. 2021, section 3.2) after algebra that is exact up to rounding:

* LayerNorm is a rank-1 correction behind the first product: LN(x) W^T = rstd * (x W^T - mean * rowsum(W)), gain and
  shift being folded into W and the bias. Mean and variance come out of the tiles the product reads anyway. The rounding
  of the product, in float32, counts mean / std times.
* The half of the hidden channels that is averaged over a picture never leaves the chip: its column sums do. Its part of
  the second layer is one vector a picture.
* The last layer gives one number a token, keep minus drop; ranking needs no softmax.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dvit_kernels.activations import gelu_erf, gelu_exact
from dvit_kernels.launch import Launch, run, wait_for_inputs

MAX_TOKENS, MIN_DIM, MAX_DIM = 1024, 64, 1024
_RANK_TOKENS = 256  # up to here counting the better ones is cheaper than 32 rounds of reduction


@triton.jit(do_not_specialize=["batch", "n_tokens", "num_prefix"])
def _project_kernel(
    x_ptr,  # (B, P+N, C)
    w1_ptr,  # (C, C)
    w1_sum_ptr,  # (C,) row sums of w1
    b1_ptr,  # (C,)
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
    """gelu(LN(x) w1^T + b1): the own half of every token, and the mean half's sums by (tile of rows, picture in it)."""
    wait_for_inputs(PDL)
    half: tl.constexpr = DIM // 2
    blocks_n: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // blocks_n
    block_n = tl.program_id(0) % blocks_n

    # Rows are the patch tokens of all pictures, one after the other: tiles pad at the end of the batch alone.
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image = row // n_tokens
    live = image < batch
    offset = image.to(tl.int64) * stride_xb + (num_prefix + row % n_tokens).to(tl.int64) * stride_xn
    col = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)  # of deviations from the mean so far
    for k in range(0, DIM, BLOCK_K):
        x = tl.load(x_ptr + offset[:, None] + (k + inner)[None, :], mask=live[:, None], other=0.0)
        w = tl.load(w1_ptr + col[None, :] * DIM + (k + inner)[:, None], mask=col[None, :] < DIM, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        # Chan et al. 1983: stable in one pass, whatever the mean.
        x = x.to(tl.float32)
        chunk_mean = tl.sum(x, axis=1) / BLOCK_K
        deviation = x - chunk_mean[:, None]
        delta = chunk_mean - mean
        mean += delta * (BLOCK_K / (k + BLOCK_K))
        squares += tl.sum(deviation * deviation, axis=1) + delta * delta * (k * (BLOCK_K / (k + BLOCK_K)))

    rstd = tl.math.rsqrt(squares / DIM + eps)
    w1_sum = tl.load(w1_sum_ptr + col, mask=col < DIM, other=0.0)
    b1 = tl.load(b1_ptr + col, mask=col < DIM, other=0.0)
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
    TILES: tl.constexpr,  # a power of two, at least as many as a picture can touch
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # at least C/4
    PDL: tl.constexpr,
):
    """The difference of the two logits, for BLOCK_M tokens of one picture."""
    wait_for_inputs(PDL)
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

    # Where the picture's sums are: in the tiles of the first launch that it touches.
    tile = first_tile + tl.arange(0, TILES)
    touched = (tile <= last_tile)[:, None]
    segment = tile * SEGMENTS + image - tile * TILE_M // n_tokens
    sums_ptr += segment.to(tl.int64)[:, None] * half

    # A block of hidden channels at a time goes on into the third layer, so that none has to be stored and widths need
    # not be powers of two.
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
    b3 = tl.load(b3_ptr + quarters, mask=quarters < quarter, other=0.0)
    w4 = tl.load(w4_ptr + quarters, mask=quarters < quarter, other=0.0)
    score = tl.sum(gelu_erf(acc3 + b3[None, :]) * w4[None, :], axis=1) + tl.load(b4_ptr)
    tl.store(score_ptr + row, score, mask=live)


@triton.jit
def _order_key(score):
    """uint32 in the order of the scores: -0.0 as 0.0, NaN below all."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    key = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000)
    return tl.where(score == score, key, 0)


@triton.jit
def _keep_by_rank(key, position, score_ptr, n_tokens, num_keep, BLOCK: tl.constexpr):
    """Whether fewer than num_keep tokens are better, or as good and before."""
    rank = tl.zeros(key.shape, tl.int32)
    for start in range(0, key.shape[0], BLOCK):
        other = start + tl.arange(0, BLOCK)
        score = tl.load(score_ptr + other, mask=other < n_tokens, other=float("nan"))
        theirs = _order_key(score)[None, :]
        ahead = (theirs > key[:, None]) | ((theirs == key[:, None]) & (other[None, :] < position[:, None]))
        rank += tl.sum(ahead.to(tl.int32), axis=1)
    return rank < num_keep


@triton.jit
def _keep_by_radix(key, num_keep):
    """Whether a key is above the num_keep-th largest, or equals it and is among the first that fill up."""
    cut = tl.zeros((1,), tl.uint32)
    for bit in range(32):
        higher = cut | (tl.full((1,), 1, tl.uint32) << (31 - bit))
        cut = tl.where(tl.sum((key >= higher).to(tl.int32), axis=0) >= num_keep, higher, cut)
    above, equal = (key > cut).to(tl.int32), (key == cut).to(tl.int32)
    return (above != 0) | ((equal != 0) & (tl.cumsum(equal, 0) <= num_keep - tl.sum(above, axis=0)))


@triton.jit(do_not_specialize=["n_tokens", "num_keep", "num_prefix", "num_groups"])
def _select_kernel(
    x_ptr,  # (B, P+N, C)
    score_ptr,  # (B, N) float32
    kept_ptr,  # out (B, P+K, C)
    index_ptr,  # out (B, K) int64
    stride_xb,
    stride_xn,
    n_tokens,
    num_keep,
    num_prefix,
    num_groups,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,  # a power of two, at least N
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_RANK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Choose a picture's tokens and copy every num_groups-th block of the rows that stay; each program chooses anew."""
    wait_for_inputs(PDL)
    image = (tl.program_id(0) // num_groups).to(tl.int64)
    group = tl.program_id(0) % num_groups
    position = tl.arange(0, BLOCK_TOKENS)
    score_ptr += image * n_tokens
    # Padding ranks with NaN and behind every real token, which comes before it.
    key = _order_key(tl.load(score_ptr + position, mask=position < n_tokens, other=float("nan")))
    if BY_RANK:
        keep = _keep_by_rank(key, position, score_ptr, n_tokens, num_keep, 32)
    else:
        keep = _keep_by_radix(key, num_keep)
    slot = tl.where(keep, tl.cumsum(keep.to(tl.int32), 0) - 1, -1)

    rows = num_prefix + num_keep
    start = group * BLOCK_ROWS
    while start < rows:
        row = start + tl.arange(0, BLOCK_ROWS)
        wanted = row - num_prefix
        taken = tl.sum(tl.where(slot[:, None] == wanted[None, :], position[:, None], 0), axis=0)
        tl.store(index_ptr + image * num_keep + wanted, taken.to(tl.int64), mask=(wanted >= 0) & (row < rows))
        source = tl.where(wanted < 0, row, num_prefix + taken).to(tl.int64)
        for c in range(0, DIM, BLOCK_C):
            col = c + tl.arange(0, BLOCK_C)
            inside = (row < rows)[:, None] & (col < DIM)[None, :]
            value = tl.load(x_ptr + image * stride_xb + source[:, None] * stride_xn + col[None, :], mask=inside)
            tl.store(kept_ptr + ((image * rows + row)[:, None]) * DIM + col[None, :], value, mask=inside)
        start += num_groups * BLOCK_ROWS


def supports(n: int, c: int) -> bool:
    """Whether the kernels take N patch tokens with C channels: N up to 1024, C from 64 to 1024 in multiples of 32."""
    return n <= MAX_TOKENS and MIN_DIM <= c <= MAX_DIM and c % 32 == 0


def prune_tokens_launches(
    x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, num_prefix: int, eps: float
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The three launches, in order, and the tensors they fill: kept_x and index. Arguments as `launch_prune_tokens`."""
    b, n, c = x.shape[0], x.shape[1] - num_prefix, x.shape[2]
    half = c // 2
    w1, w1_sum, b1, w2_own, w2_mean, b2, w3, b3, w4, b4 = (t.contiguous() for t in packed)
    if x.stride(2) != 1:
        x = x.contiguous()
    full_rate = x.dtype != torch.float32  # float32 products run on plain cores, from registers: smaller tiles
    few = b * n <= 4096  # too few rows to fill a GPU with large tiles

    # Block sizes are those that keep registers unspilled (AOT.md); none has been timed yet.
    tile_m = min(64 if few or not full_rate else 128, max(16, triton.next_power_of_2(n)))
    block_n = 64 if few or not full_rate or c < 256 else 128
    tiles = triton.cdiv(b * n, tile_m)
    segments = min(tile_m, (tile_m - 2) // n + 2)  # pictures that a tile can touch
    hidden = x.new_empty(b * n, half)
    sums = x.new_empty(tiles, segments, half, dtype=torch.float32)
    score = x.new_empty(b, n, dtype=torch.float32)
    kept_x = x.new_empty(b, num_prefix + num_keep, c)
    index = x.new_empty(b, num_keep, dtype=torch.int64)

    project = Launch.of(
        _project_kernel,
        (tiles * triton.cdiv(c, block_n),),
        x_ptr=x,
        w1_ptr=w1,
        w1_sum_ptr=w1_sum,
        b1_ptr=b1,
        hidden_ptr=hidden,
        sums_ptr=sums,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        batch=b,
        n_tokens=n,
        num_prefix=num_prefix,
        eps=eps,
        DIM=c,
        SEGMENTS=segments,
        BLOCK_M=tile_m,
        BLOCK_N=block_n,
        BLOCK_K=_divisor(c, 64 if full_rate else 16),
        num_warps=4 if few and full_rate else 8,
        num_stages=3,
    )
    block_m = 64 if full_rate else 16
    score_tokens = Launch.of(
        _score_kernel,
        (b * triton.cdiv(n, block_m),),
        hidden_ptr=hidden,
        sums_ptr=sums,
        w2_own_ptr=w2_own,
        w2_mean_ptr=w2_mean,
        b2_ptr=b2,
        w3_ptr=w3,
        b3_ptr=b3,
        w4_ptr=w4,
        b4_ptr=b4,
        score_ptr=score,
        n_tokens=n,
        DIM=c,
        SEGMENTS=segments,
        TILE_M=tile_m,
        TILES=triton.next_power_of_2((n + tile_m - 2) // tile_m + 1),
        BLOCK_M=block_m,
        BLOCK_H=64 if full_rate else 16,
        BLOCK_K=_divisor(half, 64 if full_rate else 16),
        BLOCK_Q=max(16, triton.next_power_of_2(c // 4)),
        num_warps=8 if full_rate else 4,
        num_stages=3 if full_rate else 2,
    )
    block_tokens, block_rows = max(32, triton.next_power_of_2(n)), 16
    # Few pictures: a program for every block of rows. Many: two a picture, so that choosing is not repeated so often.
    num_groups = min(triton.cdiv(num_prefix + num_keep, block_rows), max(2, 512 // max(b, 1)))
    select = Launch.of(
        _select_kernel,
        (b * num_groups,),
        x_ptr=x,
        score_ptr=score,
        kept_ptr=kept_x,
        index_ptr=index,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        n_tokens=n,
        num_keep=num_keep,
        num_prefix=num_prefix,
        num_groups=num_groups,
        DIM=c,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK_C=128,
        BY_RANK=n <= _RANK_TOKENS,
        num_warps=4 if block_tokens <= 128 else 8,
        num_stages=1,
    )
    return [project, score_tokens, select], kept_x, index


def launch_prune_tokens(
    x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, num_prefix: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dvit::prune_tokens` as three Triton launches on x's device and its current stream.

    Args:
        x: (B, P+N, C) tokens in float32, float16 or bfloat16; N up to 1024, C from 64 to 1024 in multiples of 32; any
            strides (one other than 1 in the last dimension costs a copy).
        packed: what `pack_predictor` returned for x.dtype, on x's device.
        num_keep: how many of the N patch tokens stay, 1 to N.
        num_prefix: how many leading tokens P are kept unseen.
        eps: of the predictor's LayerNorm.

    Returns:
        kept_x (B, P+num_keep, C) and index (B, num_keep) int64, as `dvit::prune_tokens`.

    Raises:
        ValueError: a size that the kernels do not take, or packed weights of another width or dtype.
    """
    n, c = x.shape[1] - num_prefix, x.shape[2]
    if len(packed) != 10 or packed[0].shape != (c, c) or packed[0].dtype != x.dtype:
        raise ValueError(f"launch_prune_tokens: packed does not fit x, with {c} channels in {x.dtype}")
    if num_prefix < 0 or not supports(n, c) or not 1 <= num_keep <= n:
        raise ValueError(
            f"launch_prune_tokens: {num_keep} of {n} tokens with {c} channels behind {num_prefix}; 1 to N of N up to "
            f"{MAX_TOKENS} tokens with {MIN_DIM} to {MAX_DIM} channels, a multiple of 32, are supported"
        )
    launches, kept_x, index = prune_tokens_launches(x, packed, num_keep, num_prefix, eps)
    run(launches, x.device)
    return kept_x, index


def _divisor(size: int, most: int) -> int:
    """The largest power of two that divides `size`, at most `most`: blocks of it leave no tail."""
    return min(most, size & -size)
