"""Select the tokens with the best scores and copy their rows, in one launch: ties to the lower position, NaN last."""

import triton
import triton.language as tl

from dvit_kernels.launch import wait_for_inputs
from dvit_kernels.layer_norm import store_stats

RANK_TOKENS = 256  # up to here, counting better tokens is cheaper than 32 rounds of reduction


@triton.jit
def order_key(score):
    """Return uint32 keys in the order of the scores: -0.0 as 0.0, NaN below all."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    key = bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000)
    return tl.where(score == score, key, 0)


@triton.jit
def load_scores(score_ptr, position, n_tokens, stride_h, HEADS: tl.constexpr):
    """Load scores, or their means over several heads; past the end NaN, which ranks after all."""
    score = tl.load(score_ptr + position, mask=position < n_tokens, other=float("nan"))
    if HEADS > 1:
        for head in tl.static_range(1, HEADS):
            score += tl.load(score_ptr + head * stride_h + position, mask=position < n_tokens, other=float("nan"))
        score = score / HEADS
    return score


@triton.jit
def rank_by_counting(key, position, score_ptr, n_tokens, BLOCK: tl.constexpr, stride_h=0, HEADS: tl.constexpr = 1):
    """Return how many tokens are better, or equal and at a lower position."""
    rank = tl.zeros(key.shape, tl.int32)
    for start in range(0, key.shape[0], BLOCK):
        other = start + tl.arange(0, BLOCK)
        theirs = order_key(load_scores(score_ptr, other, n_tokens, stride_h, HEADS))[None, :]
        ahead = (theirs > key[:, None]) | ((theirs == key[:, None]) & (other[None, :] < position[:, None]))
        rank += tl.sum(ahead.to(tl.int32), axis=1)
    return rank


@triton.jit
def keep_by_radix(key, num_keep):
    """Return whether a key is above the num_keep-th largest, or equals it and is among the first that fill up."""
    cut = tl.zeros((1,), tl.uint32)
    for bit in range(32):
        higher = cut | (tl.full((1,), 1, tl.uint32) << (31 - bit))
        cut = tl.where(tl.sum((key >= higher).to(tl.int32), axis=0) >= num_keep, higher, cut)
    above, equal = (key > cut).to(tl.int32), (key == cut).to(tl.int32)
    return (above != 0) | ((equal != 0) & (tl.cumsum(equal, 0) <= num_keep - tl.sum(above, axis=0)))


@triton.jit
def copy_kept_rows(
    x_ptr,  # (P+N, C) of the image
    kept_ptr,  # out (rows of all images, C)
    index_ptr,  # out (K,) int64 of the image
    first_row,  # of the image in kept_ptr
    keep,
    position,
    group,
    stride_xn,
    num_keep,
    num_prefix,
    num_groups,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    stats_ptr=None,  # out (rows of all images, C / BLOCK_C, 2) float32, if BLOCK_C divides C
):
    """Copy every num_groups-th block of the prefix rows and the kept ones, and store the positions of the latter."""
    slot = tl.where(keep, tl.cumsum(keep.to(tl.int32), 0) - 1, -1)
    rows = num_prefix + num_keep
    start = group * BLOCK_ROWS
    while start < rows:
        row = start + tl.arange(0, BLOCK_ROWS)
        wanted = row - num_prefix
        taken = tl.sum(tl.where(slot[:, None] == wanted[None, :], position[:, None], 0), axis=0)
        tl.store(index_ptr + wanted, taken.to(tl.int64), mask=(wanted >= 0) & (row < rows))
        source = tl.where(wanted < 0, row, num_prefix + taken).to(tl.int64)
        for c in range(0, DIM, BLOCK_C):
            col = c + tl.arange(0, BLOCK_C)
            inside = (row < rows)[:, None] & (col < DIM)[None, :]
            value = tl.load(x_ptr + source[:, None] * stride_xn + col[None, :], mask=inside)
            tl.store(kept_ptr + (first_row + row)[:, None] * DIM + col[None, :], value, mask=inside)
            if stats_ptr is not None:
                part = (first_row + row) * (DIM // BLOCK_C) + c // BLOCK_C
                store_stats(stats_ptr, part, value, inside, row < rows, BLOCK_C)
        start += num_groups * BLOCK_ROWS


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
    """Choose an image's tokens and copy every num_groups-th block of kept rows; each program repeats the choice."""
    wait_for_inputs(PDL)
    image = (tl.program_id(0) // num_groups).to(tl.int64)
    group = tl.program_id(0) % num_groups
    position = tl.arange(0, BLOCK_TOKENS)
    score_ptr += image * n_tokens
    # Padding ranks like NaN and after every real token, as its position is higher.
    key = order_key(load_scores(score_ptr, position, n_tokens, 0, 1))
    if BY_RANK:
        keep = rank_by_counting(key, position, score_ptr, n_tokens, 32) < num_keep
    else:
        keep = keep_by_radix(key, num_keep)
    copy_kept_rows(
        x_ptr + image * stride_xb,
        kept_ptr,
        index_ptr + image * num_keep,
        image * (num_prefix + num_keep),
        keep,
        position,
        group,
        stride_xn,
        num_keep,
        num_prefix,
        num_groups,
        DIM,
        BLOCK_ROWS,
        BLOCK_C,
    )
