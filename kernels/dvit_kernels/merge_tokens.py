"""merge_tokens in two launches: match tokens (match_tokens.py), then choose the most similar matches and move rows.

Each program of the second launch repeats the choice among the E = N/2 matches, and searches the sources of its own
output rows in ascending order: no lists, no atomics, and the same sums in every run.

Bytes, for tokens of s bytes per element and T = P+N: the second launch reads x once and writes the merged rows once,
(T + T - merge) C s. Beyond that come the keys, 4 D (E + ceil(E / BLOCK_EVENS) (N - E)), of which only 4 D N are read
from memory (blocks of even rows share the odd ones in the cache); 8 E for the matches, written once and read by every
program; 12 T for rows and sizes. `bytes_moved` counts them.
"""

import torch
import triton
import triton.language as tl

from dvit_kernels.launch import Launch, run, wait_for_inputs
from dvit_kernels.layer_norm import store_stats
from dvit_kernels.match_tokens import _match_tokens_kernel
from dvit_kernels.select_tokens import RANK_TOKENS, keep_by_radix, order_key, rank_by_counting

MAX_TOKENS, MAX_KEY = 2048, 256
MAX_BLOCK = 1024  # channels of a row that are merged together
ENOUGH_PROGRAMS = 132  # multiprocessors of a large GPU
TILE = 4096  # elements of a block of output rows


@triton.jit(do_not_specialize=["n_tokens", "n_evens", "merge", "num_prefix", "first_even", "first_odd", "num_groups"])
def _merge_tokens_kernel(
    x_ptr,  # (B, T, DIM)
    sizes_ptr,  # (B, T) float32, or None: all are 1
    best_ptr,  # (B, E) float32
    match_ptr,  # (B, E) int32, from 0 to O - 1, counted among the odd rows
    merged_ptr,  # out (B, T-merge, DIM)
    merged_sizes_ptr,  # out (B, T-merge) float32
    rows_ptr,  # out (B, T) int64
    stats_ptr,  # out (B (T-merge), 1, 2) float32, or None: of the merged rows, if BLOCK_C holds one
    stride_xb,
    stride_xn,
    n_tokens,  # T
    n_evens,  # E
    merge,
    num_prefix,
    first_even,
    first_odd,
    num_groups,
    DIM: tl.constexpr,
    BY_FALLING: tl.constexpr,  # even rows that stay are ordered by falling similarity, else ascending
    BY_RANK: tl.constexpr,
    BLOCK_EVENS: tl.constexpr,  # a power of two, at least E
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Choose the even rows that merge, and compute every num_groups-th block of output rows."""
    wait_for_inputs(PDL)
    image = (tl.program_id(0) // num_groups).to(tl.int64)
    group = tl.program_id(0) % num_groups
    n_rows = n_tokens - merge
    x_ptr += image * stride_xb
    best_ptr += image * n_evens
    merged_ptr += image * n_rows * DIM
    merged_sizes_ptr += image * n_rows
    rows_ptr += image * n_tokens

    even = tl.arange(0, BLOCK_EVENS)
    live = even < n_evens
    key = order_key(tl.load(best_ptr + even, mask=live, other=float("nan")))
    match = tl.load(match_ptr + image * n_evens + even, mask=live, other=0)
    if BY_RANK:
        rank = rank_by_counting(key, even, best_ptr, n_evens, 32)
        goes = rank < merge
    else:
        goes = keep_by_radix(key, merge)
    stays = live & ~goes
    if BY_FALLING:
        slot = tl.where(stays, rank - merge, -1)
    else:
        slot = tl.where(stays, tl.cumsum(stays.to(tl.int32), 0) - 1, -1)
    if sizes_ptr is not None:
        sizes_ptr += image * n_tokens
        even_size = tl.load(sizes_ptr + first_even + 2 * even, mask=live, other=0.0)

    start = group * BLOCK_ROWS
    while start < n_rows:
        row = start + tl.arange(0, BLOCK_ROWS)
        wanted = row - num_prefix
        odd = wanted - (n_evens - merge)
        staying = tl.sum(tl.where(slot[:, None] == wanted[None, :], even[:, None], 0), axis=0)
        token = tl.where(odd < 0, first_even + 2 * staying, first_odd + 2 * odd)
        token = tl.where(wanted < 0, row, token)
        tl.store(rows_ptr + token, row.to(tl.int64), mask=row < n_rows)
        joins = goes[:, None] & (match[:, None] == odd[None, :])
        count = tl.sum(joins.to(tl.int32), axis=0)
        if sizes_ptr is None:
            own = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
            total = own + count.to(tl.float32)
        else:
            own = tl.load(sizes_ptr + token, mask=row < n_rows, other=1.0)
            total = own + tl.sum(tl.where(joins, even_size[:, None], 0.0), axis=0)
        tl.store(merged_sizes_ptr + row, total, mask=row < n_rows)
        most = tl.max(count, axis=0)
        for c in range(0, DIM, BLOCK_C):
            col = c + tl.arange(0, BLOCK_C)
            inside = (row < n_rows)[:, None] & (col < DIM)[None, :]
            x = tl.load(x_ptr + token[:, None].to(tl.int64) * stride_xn + col[None, :], mask=inside, other=0.0)
            acc = x.to(tl.float32) * (own / total)[:, None]
            source = tl.full((BLOCK_ROWS,), -1, tl.int32)
            done = tl.zeros_like(most)
            while done < most:
                later = joins & (even[:, None] > source[None, :])
                source = tl.min(tl.where(later, even[:, None], BLOCK_EVENS), axis=0)
                found = source < BLOCK_EVENS
                merging = first_even + 2 * source
                share = 1.0 / total
                if sizes_ptr is not None:
                    share = tl.load(sizes_ptr + merging, mask=found, other=0.0) / total
                at = x_ptr + merging[:, None].to(tl.int64) * stride_xn + col[None, :]
                acc += tl.load(at, mask=found[:, None] & inside, other=0.0).to(tl.float32) * share[:, None]
                tl.store(rows_ptr + merging, row.to(tl.int64), mask=found)
                done += 1
            # A token alone is copied, bits of a NaN as well.
            y = tl.where((count == 0)[:, None], x, acc.to(x.dtype))
            tl.store(merged_ptr + row[:, None].to(tl.int64) * DIM + col[None, :], y, mask=inside)
            if stats_ptr is not None:
                store_stats(stats_ptr, image * n_rows + row, y, inside, row < n_rows, DIM)
        start += num_groups * BLOCK_ROWS


def supports(n: int, key_dim: int) -> bool:
    """Return whether N patch tokens with keys of D channels are supported: N from 2 to 2048, D up to 256."""
    return 2 <= n <= MAX_TOKENS and 1 <= key_dim <= MAX_KEY


def block_of_evens(b: int, n_evens: int) -> int:
    """Return how many even rows a program matches: the most that leave enough programs for the GPU."""
    enough = (block for block in (64, 32) if b * triton.cdiv(n_evens, block) >= ENOUGH_PROGRAMS)
    return next(enough, 16)


def bytes_moved(b: int, tokens: int, c: int, key_dim: int, merge: int, element: int, num_prefix: int = 1) -> int:
    """Return the bytes that both launches read and write, without what they find in the cache; sizes are given."""
    n_evens = (tokens - num_prefix + (num_prefix + 1) % 2) // 2
    patches, rows = tokens - num_prefix, tokens - merge
    match = 4 * key_dim * patches + 8 * n_evens
    move = (tokens + rows) * c * element + 8 * n_evens + 4 * tokens + 4 * rows + 8 * tokens
    return b * (match + move)


def launch_merge_tokens(
    x: torch.Tensor,
    keys: torch.Tensor,
    sizes: torch.Tensor | None,
    merge: int,
    num_prefix: int,
    stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run `dvit::merge_tokens` as two Triton launches on x's device and its current stream.

    Arguments and results are as for `dvit_infer.ops.merge_tokens.merge_tokens`; N from 2 to 2048, D up to 256. A stride
    other than 1 in the last dimension of x, or keys or sizes that are not contiguous, cost a copy. `stats`
    (B (P+N-merge), 1, 2) float32 is written with the row statistics of the merged tokens, of up to 1024 channels.

    Raises:
        ValueError: a size is not supported.
    """
    (b, tokens, c), p = x.shape, num_prefix
    n, key_dim = tokens - p, keys.shape[2]
    if p < 0 or not supports(n, key_dim) or not 1 <= merge <= n // 2:
        raise ValueError(
            f"launch_merge_tokens: {merge} of {n} tokens behind {p}, keys of {key_dim} channels; 1 to N // 2 of N "
            f"from 2 to {MAX_TOKENS} tokens, and keys of up to {MAX_KEY} channels are supported"
        )
    if x.stride(2) != 1:
        x = x.contiguous()
    first_even, first_odd = p + p % 2, p + 1 - p % 2
    n_evens = (tokens - first_even + 1) // 2
    best = x.new_empty(b, n_evens, dtype=torch.float32)
    match = x.new_empty(b, n_evens, dtype=torch.int32)
    merged = x.new_empty(b, tokens - merge, c)
    merged_sizes = x.new_empty(b, tokens - merge, dtype=torch.float32)
    rows = x.new_empty(b, tokens, dtype=torch.int64)
    block = block_of_evens(b, n_evens)
    blocks = triton.cdiv(n_evens, block)
    match_tokens = Launch.of(
        _match_tokens_kernel,
        (b * blocks,),
        keys_ptr=keys.contiguous(),
        best_ptr=best,
        match_ptr=match,
        n_tokens=tokens,
        n_evens=n_evens,
        n_odds=n - n_evens,
        first_even=first_even,
        first_odd=first_odd,
        blocks=blocks,
        DIM=key_dim,
        BLOCK_EVENS=block,
        BLOCK_ODDS=32,
        SLICE=16,
        num_warps=4,
        num_stages=2,
    )
    block_evens = max(32, triton.next_power_of_2(n_evens))
    block_c = min(MAX_BLOCK, max(64, triton.next_power_of_2(c)))
    block_rows = min(4 if stats is not None else 16, TILE // block_c)  # 8 with statistics spill
    # Few images: one program per block of rows. Many: fewer per image, so that the choice is repeated less often.
    num_groups = min(triton.cdiv(tokens - merge, block_rows), max(2, 2048 // max(b, 1)))
    merge_tokens = Launch.of(
        _merge_tokens_kernel,
        (b * num_groups,),
        x_ptr=x,
        sizes_ptr=None if sizes is None else sizes.contiguous(),
        best_ptr=best,
        match_ptr=match,
        merged_ptr=merged,
        merged_sizes_ptr=merged_sizes,
        rows_ptr=rows,
        stats_ptr=stats,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        n_tokens=tokens,
        n_evens=n_evens,
        merge=merge,
        num_prefix=p,
        first_even=first_even,
        first_odd=first_odd,
        num_groups=num_groups,
        DIM=c,
        BY_FALLING=p == 0,
        BY_RANK=p == 0 or n_evens <= RANK_TOKENS,
        BLOCK_EVENS=block_evens,
        BLOCK_ROWS=block_rows,
        BLOCK_C=block_c,
        num_warps=4 if block_evens <= 128 else 8,
        num_stages=1,
    )
    run([match_tokens, merge_tokens], x.device)
    return merged, merged_sizes, rows
