"""keep_tokens in one launch: average the class token's attention over heads, choose, copy, and sum what is dropped.

Programs of two kinds share the grid: some copy kept rows, the others each sum the dropped rows in a block of channels.
All of them repeat the choice, which reads little.

Bytes, per image, for tokens of s bytes per element: x is read once and the result written once, (P+N + P+k+1) C s for k
of N tokens and a fused row; beyond that come 4 H N for the attention weights, from memory once, and 8 k for the index.
The result does not depend on the order of programs.
"""

import torch
import triton
import triton.language as tl

from dvit_kernels.launch import Launch, run, wait_for_inputs
from dvit_kernels.layer_norm import store_stats
from dvit_kernels.select_tokens import (
    RANK_TOKENS,
    copy_kept_rows,
    keep_by_radix,
    load_scores,
    order_key,
    rank_by_counting,
)

MAX_TOKENS, MAX_HEADS = 1024, 64
BLOCK_C = 128  # channels that are copied together
MANY_IMAGES = 64  # from here, fewer programs per image, so that the choice is repeated less often


@triton.jit
def _sum_dropped_rows(
    x_ptr,  # first patch row of the image
    score,
    keep,
    position,
    col,
    stride_xn,
    n_tokens,
    num_keep,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Return the sum of the dropped rows weighted by score, in some channels, in float32."""
    gone = (position < n_tokens) & ~keep
    slot = tl.where(gone, tl.cumsum(gone.to(tl.int32), 0) - 1, -1)
    acc = tl.zeros((BLOCK_ROWS, col.shape[0]), tl.float32)
    dropped = n_tokens - num_keep
    start = 0
    while start < dropped:
        wanted = start + tl.arange(0, BLOCK_ROWS)
        there = slot[:, None] == wanted[None, :]
        taken = tl.sum(tl.where(there, position[:, None], 0), axis=0).to(tl.int64)
        weight = tl.sum(tl.where(there, score[:, None], 0.0), axis=0)
        inside = (wanted < dropped)[:, None] & (col < DIM)[None, :]
        value = tl.load(x_ptr + taken[:, None] * stride_xn + col[None, :], mask=inside, other=0.0)
        acc += value.to(tl.float32) * weight[:, None]
        start += BLOCK_ROWS
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["n_tokens", "num_keep", "num_prefix", "num_groups", "programs"])
def _keep_tokens_kernel(
    x_ptr,  # (B, P+N, C)
    attention_ptr,  # (B, HEADS, P+N) float32
    kept_ptr,  # out (B, P+K, C), or (B, P+K+1, C) with a fused row
    index_ptr,  # out (B, K) int64
    stats_ptr,  # out (rows of kept, C / BLOCK_C, 2) float32, or None
    stride_xb,
    stride_xn,
    n_tokens,
    num_keep,
    num_prefix,
    num_groups,  # programs of an image that copy; others sum
    programs,  # all programs of an image
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    FUSE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,  # a power of two, at least N
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_FUSE: tl.constexpr,  # channels of a program that sums
    BY_RANK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Choose an image's tokens, then copy some of them or sum the others."""
    wait_for_inputs(PDL)
    image = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    position = tl.arange(0, BLOCK_TOKENS)
    stride_h = num_prefix + n_tokens
    attention_ptr += image * HEADS * stride_h + num_prefix
    # The sum over heads runs in the same order wherever it is repeated, so that all programs see the same bits.
    score = load_scores(attention_ptr, position, n_tokens, stride_h, HEADS)
    key = order_key(score)
    if BY_RANK:
        keep = rank_by_counting(key, position, attention_ptr, n_tokens, 32, stride_h, HEADS) < num_keep
    else:
        keep = keep_by_radix(key, num_keep)
    x_ptr += image * stride_xb
    rows = num_prefix + num_keep
    first_row = image * (rows + 1 if FUSE else rows)
    if part < num_groups:
        copy_kept_rows(
            x_ptr,
            kept_ptr,
            index_ptr + image * num_keep,
            first_row,
            keep,
            position,
            part,
            stride_xn,
            num_keep,
            num_prefix,
            num_groups,
            DIM,
            BLOCK_ROWS,
            BLOCK_C,
            stats_ptr,
        )
    elif FUSE:
        col = (part - num_groups) * BLOCK_FUSE + tl.arange(0, BLOCK_FUSE)
        x_ptr += num_prefix * stride_xn
        fused_ptr = kept_ptr + (first_row + rows) * DIM
        fused = _sum_dropped_rows(x_ptr, score, keep, position, col, stride_xn, n_tokens, num_keep, DIM, BLOCK_ROWS)
        fused = fused.to(kept_ptr.dtype.element_ty)
        tl.store(fused_ptr + col, fused, mask=col < DIM)
        if stats_ptr is not None:
            parts: tl.constexpr = BLOCK_FUSE // BLOCK_C
            block = (part - num_groups) * parts + tl.arange(0, parts)
            live = block < DIM // BLOCK_C
            inside = live[:, None] & (tl.arange(0, BLOCK_C) < BLOCK_C)[None, :]
            at = (first_row + rows) * (DIM // BLOCK_C) + block
            store_stats(stats_ptr, at, tl.reshape(fused, (parts, BLOCK_C)), inside, live, BLOCK_C)


def supports(n: int, heads: int) -> bool:
    """Return whether N patch tokens are supported with a number of heads: N up to 1024, up to 64 heads."""
    return 1 <= n <= MAX_TOKENS and 1 <= heads <= MAX_HEADS


def launch_keep_tokens(
    x: torch.Tensor,
    attention: torch.Tensor,
    num_keep: int,
    num_prefix: int,
    fuse: bool,
    stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dvit::keep_tokens` as one Triton launch on x's device and its current stream.

    Arguments and results are as for `dvit_infer.ops.keep_tokens.keep_tokens`; N up to 1024, up to 64 heads. A stride
    other than 1 in the last dimension of x, or attention that is not contiguous, costs a copy. `stats` (rows, C/128, 2)
    float32 is written with the row statistics of the kept tokens, by parts of 128 channels; C is a multiple of that.

    Raises:
        ValueError: a size is not supported.
    """
    b, n, c = x.shape[0], x.shape[1] - num_prefix, x.shape[2]
    heads = attention.shape[1]
    if num_prefix < 0 or not supports(n, heads) or not 1 <= num_keep <= n - fuse:
        raise ValueError(
            f"launch_keep_tokens: {num_keep} of {n} tokens behind {num_prefix}, {heads} heads; 1 to N of N up to "
            f"{MAX_TOKENS} tokens, one less with a fused row, and up to {MAX_HEADS} heads are supported"
        )
    if x.stride(2) != 1:
        x = x.contiguous()
    kept = x.new_empty(b, num_prefix + num_keep + fuse, c)
    index = x.new_empty(b, num_keep, dtype=torch.int64)
    block_tokens = max(32, triton.next_power_of_2(n))
    block_rows = 16 if block_tokens <= 512 else 8  # 16 spill
    block_fuse = 256 if b >= MANY_IMAGES and c > 128 else 128
    num_groups = min(triton.cdiv(num_prefix + num_keep, block_rows), max(2, 512 // max(b, 1)))
    programs = num_groups + (triton.cdiv(c, block_fuse) if fuse else 0)
    launch = Launch.of(
        _keep_tokens_kernel,
        (b * programs,),
        x_ptr=x,
        attention_ptr=attention.contiguous(),
        kept_ptr=kept,
        index_ptr=index,
        stats_ptr=stats,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        n_tokens=n,
        num_keep=num_keep,
        num_prefix=num_prefix,
        num_groups=num_groups,
        programs=programs,
        DIM=c,
        HEADS=heads,
        FUSE=fuse,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK_C=BLOCK_C,
        BLOCK_FUSE=block_fuse,
        BY_RANK=n <= RANK_TOKENS,
        num_warps=4 if block_tokens <= 128 else 8,
        num_stages=1,
    )
    run([launch], x.device)
    return kept, index
