"""route_tokens in three launches: project and score, as prune_tokens, then rank; no row of x is moved.

Large batches compute row statistics first. The last launch reads 4 N bytes of scores per image and writes 8 N of order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dvit_kernels.launch import Launch, run, wait_for_inputs
from dvit_kernels.prune_tokens import MAX_DIM, MAX_TOKENS, MIN_DIM, score_launches, supports
from dvit_kernels.select_tokens import RANK_TOKENS, keep_by_radix, load_scores, order_key, rank_by_counting


@triton.jit(do_not_specialize=["n_tokens", "num_keep"])
def _order_kernel(
    score_ptr,  # (B, N) float32
    order_ptr,  # out (B, N) int64
    n_tokens,
    num_keep,
    BLOCK_TOKENS: tl.constexpr,  # a power of two, at least N
    BY_RANK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Store an image's chosen positions, ascending, then the others."""
    wait_for_inputs(PDL)
    image = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK_TOKENS)
    score_ptr += image * n_tokens
    key = order_key(load_scores(score_ptr, position, n_tokens, 0, 1))
    if BY_RANK:
        keep = rank_by_counting(key, position, score_ptr, n_tokens, 32) < num_keep
    else:
        keep = keep_by_radix(key, num_keep)
    before = tl.cumsum(keep.to(tl.int32), 0)  # chosen ones up to and including a position
    place = tl.where(keep, before - 1, num_keep + position - before)
    tl.store(order_ptr + image * n_tokens + place, position.to(tl.int64), mask=position < n_tokens)


def launch_route_tokens(x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, eps: float) -> torch.Tensor:
    """Run `dvit::route_tokens` as three or four Triton launches on x's device and its current stream.

    Args:
        x: (B, N, C) tokens in float32, float16 or bfloat16; N up to 1024, C from 64 to 1024 in multiples of 32; any
            strides (one other than 1 in the last dimension costs a copy).
        packed: the result of `pack_predictor` for x.dtype, on x's device.
        num_keep: the number of tokens to choose, 1 to N.
        eps: of the predictor's LayerNorm.

    Returns:
        order (B, N) int64, as `dvit::route_tokens`.

    Raises:
        ValueError: a size is not supported, or packed weights have another width or dtype.
    """
    b, n, c = x.shape
    if not supports(n, c) or not 1 <= num_keep <= n:
        raise ValueError(
            f"launch_route_tokens: {num_keep} of {n} tokens with {c} channels; 1 to N of N up to {MAX_TOKENS} tokens "
            f"with {MIN_DIM} to {MAX_DIM} channels, a multiple of 32, are supported"
        )
    scoring, score = score_launches(x if x.stride(2) == 1 else x.contiguous(), packed, 0, eps)
    order = x.new_empty(b, n, dtype=torch.int64)
    block_tokens = max(32, triton.next_power_of_2(n))
    place = Launch.of(
        _order_kernel,
        (b,),
        score_ptr=score,
        order_ptr=order,
        n_tokens=n,
        num_keep=num_keep,
        BLOCK_TOKENS=block_tokens,
        BY_RANK=n <= RANK_TOKENS,
        num_warps=4 if block_tokens <= 128 else 8,
        num_stages=1,
    )
    run([*scoring, place], x.device)
    return order
