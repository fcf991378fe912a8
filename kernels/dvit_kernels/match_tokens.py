"""Match each patch token in an even row with the most similar one in an odd row, by the cosine of their keys."""

import triton
import triton.language as tl

from dvit_kernels.launch import wait_for_inputs


@triton.jit(do_not_specialize=["n_tokens", "n_evens", "n_odds", "first_even", "first_odd", "blocks"])
def _match_tokens_kernel(
    keys_ptr,  # (B, P+N, DIM) float32
    best_ptr,  # out (B, E) float32: similarity of each even row's match
    match_ptr,  # out (B, E) int32: the match, counted among the odd rows
    n_tokens,  # P+N
    n_evens,  # E
    n_odds,
    first_even,  # row of the first patch token in an even row
    first_odd,
    blocks,  # programs per image
    DIM: tl.constexpr,
    BLOCK_EVENS: tl.constexpr,
    BLOCK_ODDS: tl.constexpr,
    SLICE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Match a block of an image's even rows; the lower index wins between equals.

    Products are in float32, not TF32, whose rounding would decide between tokens that are nearly alike. They take
    operands from registers, so few channels at a time. Keys of NaN are as dissimilar as can be: minus infinity.
    """
    wait_for_inputs(PDL)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    keys_ptr += image * n_tokens * DIM
    even = tl.program_id(0) % blocks * BLOCK_EVENS + tl.arange(0, BLOCK_EVENS)
    inner = tl.arange(0, SLICE)
    even_at = keys_ptr + (first_even + 2 * even)[:, None] * DIM
    squares = tl.zeros((BLOCK_EVENS,), tl.float32)
    for d in range(0, DIM, SLICE):
        fits = (even < n_evens)[:, None] & (d + inner < DIM)[None, :]
        some = tl.load(even_at + (d + inner)[None, :], mask=fits, other=0.0)
        squares += tl.sum(some * some, axis=1)
    even_scale = 1.0 / tl.maximum(tl.sqrt(squares), 1e-30)

    best = tl.full((BLOCK_EVENS,), float("-inf"), tl.float32)
    match = tl.zeros((BLOCK_EVENS,), tl.int32)
    start = 0
    while start < n_odds:
        odd = start + tl.arange(0, BLOCK_ODDS)
        odd_at = keys_ptr + (first_odd + 2 * odd)[:, None] * DIM
        s = tl.zeros((BLOCK_EVENS, BLOCK_ODDS), tl.float32)
        odd_squares = tl.zeros((BLOCK_ODDS,), tl.float32)
        for d in range(0, DIM, SLICE):
            inside = (d + inner < DIM)[None, :]
            one = tl.load(even_at + (d + inner)[None, :], mask=(even < n_evens)[:, None] & inside, other=0.0)
            other = tl.load(odd_at + (d + inner)[None, :], mask=(odd < n_odds)[:, None] & inside, other=0.0)
            odd_squares += tl.sum(other * other, axis=1)
            s = tl.dot(one, tl.trans(other), s, input_precision="ieee")
        # One scale after the other: the product of those of two keys of length 0 is infinite.
        s = s * even_scale[:, None] * (1.0 / tl.maximum(tl.sqrt(odd_squares), 1e-30))[None, :]
        s = tl.where((odd < n_odds)[None, :] & (s == s), s, float("-inf"))
        top = tl.max(s, axis=1)
        first = tl.min(tl.where(s == top[:, None], odd[None, :], 2147483647), axis=1)
        match = tl.where(top > best, first, match)
        best = tl.maximum(top, best)
        start += BLOCK_ODDS
    tl.store(best_ptr + image * n_evens + even, best, mask=even < n_evens)
    tl.store(match_ptr + image * n_evens + even, match, mask=even < n_evens)
