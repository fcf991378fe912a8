"""prune_tokens in three launches: project, score, select and copy; large batches compute row statistics first.

The result is deterministic. The kernels are in score_tokens.py, select_tokens.py and layer_norm.py.
"""

from collections.abc import Sequence

import torch
import triton

from dvit_kernels.launch import Launch, run
from dvit_kernels.layer_norm import launch_row_stats
from dvit_kernels.linear import ENOUGH_PROGRAMS, WGMMA_ROWS, LinearTile
from dvit_kernels.score_tokens import _project_kernel, _score_kernel
from dvit_kernels.select_tokens import RANK_TOKENS, _select_kernel

MAX_TOKENS, MIN_DIM, MAX_DIM = 1024, 64, 1024
# For the first product, largest first; none spills registers (AOT.md). The first tile runs three programs per
# multiprocessor: while one is in its epilogue, which takes as long as its product, the others multiply.
TILES = (LinearTile(64, 128, 64, 4, 3), LinearTile(64, 64, 64, 4, 3), LinearTile(32, 32, 128, 4, 3))
FLOAT32_TILE = LinearTile(64, 64, 16, 8, 3)  # without tensor cores, operands in registers


def supports(n: int, c: int) -> bool:
    """Return whether N patch tokens with C channels are supported: N <= 1024, C from 64 to 1024 in steps of 32."""
    return n <= MAX_TOKENS and MIN_DIM <= c <= MAX_DIM and c % 32 == 0


def _project_tile(rows: int, c: int, dtype: torch.dtype) -> LinearTile:
    """Return the largest tile of the first product with enough programs for the GPU."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    tiles = TILES if c >= 256 else TILES[1:]  # for narrow models half of the widest tile would be padding
    enough = (t for t in tiles if triton.cdiv(rows, t.block_m) * triton.cdiv(c, t.block_n) >= ENOUGH_PROGRAMS)
    return next(enough, tiles[-1])


def _divisor(size: int, most: int) -> int:
    """Return the largest power of two, at most `most`, that divides `size`, so that blocks have no tail."""
    return min(most, size & -size)


def score_launches(
    x: torch.Tensor, packed: Sequence[torch.Tensor], num_prefix: int, eps: float
) -> tuple[list[Launch], torch.Tensor]:
    """Return the two launches that score patch tokens, and the scores (B, N) float32 that they write.

    Arguments as for `launch_prune_tokens`, with the last dimension of x contiguous. Row statistics that the first
    launch reads are computed here, by a launch of their own.

    Raises:
        ValueError: packed weights have another width or dtype.
    """
    b, n, c = x.shape[0], x.shape[1] - num_prefix, x.shape[2]
    if len(packed) != 10 or packed[0].shape != (c, c) or packed[0].dtype != x.dtype:
        raise ValueError(f"score_launches: packed does not fit x, with {c} channels in {x.dtype}")
    half = c // 2
    w1, w1_sum, b1, w2_own, w2_mean, b2, w3, b3, w4, b4 = (t.contiguous() for t in packed)
    tile = _project_tile(b * n, c, x.dtype)
    tile_m = min(tile.block_m, max(16, triton.next_power_of_2(n)))
    tiles = triton.cdiv(b * n, tile_m)
    segments = min(tile_m, (tile_m - 2) // n + 2)  # images that a tile can overlap
    hidden = x.new_empty(b * n, half)
    sums = x.new_empty(tiles, segments, half, dtype=torch.float32)
    score = x.new_empty(b, n, dtype=torch.float32)

    # Not computed beside an asynchronous product, for the reason given in linear.py.
    with_stats = tile_m >= WGMMA_ROWS and x.dtype != torch.float32
    stats = launch_row_stats(x[:, num_prefix:]) if with_stats else None
    project = Launch.of(
        _project_kernel,
        (tiles * triton.cdiv(c, tile.block_n),),
        x_ptr=x,
        w1_ptr=w1,
        w1_sum_ptr=w1_sum,
        b1_ptr=b1,
        stats_ptr=stats,
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
        BLOCK_N=tile.block_n,
        BLOCK_K=_divisor(c, tile.block_k),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    half_precision = x.dtype != torch.float32
    if not half_precision:
        block_m, block_h, block_k = 16, 16, 16
    elif b * triton.cdiv(n, 64) >= ENOUGH_PROGRAMS:
        block_m, block_h, block_k = 64, 64, 64
    else:
        block_m, block_h, block_k = 16, *((64, 32) if c <= 384 else (32, 64))
    touched = triton.next_power_of_2((n + tile_m - 2) // tile_m + 1)
    # With a few registers fewer than the compiler chooses, a multiprocessor holds two programs; only where none spill.
    can_pair = block_m == 64 and (c <= 384 or (c <= 512 and touched <= 4))
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
        TILES=touched,
        BLOCK_M=block_m,
        BLOCK_H=block_h,
        BLOCK_K=_divisor(half, block_k),
        BLOCK_Q=max(16, triton.next_power_of_2(c // 4)),
        num_warps=8 if half_precision else 4,
        num_stages=3 if half_precision else 2,
        maxnreg=128 if can_pair else 0,
    )
    return [project, score_tokens], score


def launch_prune_tokens(
    x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, num_prefix: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dvit::prune_tokens` as three or four Triton launches on x's device and its current stream.

    Args:
        x: (B, P+N, C) tokens in float32, float16 or bfloat16; N up to 1024, C from 64 to 1024 in multiples of 32; any
            strides (one other than 1 in the last dimension costs a copy).
        packed: the result of `pack_predictor` for x.dtype, on x's device.
        num_keep: the number of the N patch tokens to keep, 1 to N.
        num_prefix: the number P of leading tokens, always kept.
        eps: of the predictor's LayerNorm.

    Returns:
        kept_x (B, P+num_keep, C) and index (B, num_keep) int64, as `dvit::prune_tokens`.

    Raises:
        ValueError: a size is not supported, or packed weights have another width or dtype.
    """
    b, n, c = x.shape[0], x.shape[1] - num_prefix, x.shape[2]
    if num_prefix < 0 or not supports(n, c) or not 1 <= num_keep <= n:
        raise ValueError(
            f"launch_prune_tokens: {num_keep} of {n} tokens with {c} channels behind {num_prefix}; 1 to N of N up to "
            f"{MAX_TOKENS} tokens with {MIN_DIM} to {MAX_DIM} channels, a multiple of 32, are supported"
        )
    if x.stride(2) != 1:
        x = x.contiguous()
    scoring, score = score_launches(x, packed, num_prefix, eps)
    kept_x = x.new_empty(b, num_prefix + num_keep, c)
    index = x.new_empty(b, num_keep, dtype=torch.int64)
    block_tokens, block_rows = max(32, triton.next_power_of_2(n)), 16
    # Few images: one program per block of rows. Many: two per image, so that the choice is repeated less often.
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
        BY_RANK=n <= RANK_TOKENS,
        num_warps=4 if block_tokens <= 128 else 8,
        num_stages=1,
    )
    run([*scoring, select], x.device)
    return kept_x, index
