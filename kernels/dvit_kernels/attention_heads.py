"""Queries and keys as attention compares them: normalised for each head and rotated by their places while loaded.

A rotation turns channel i of a head with channel i + half of them (Su et al. 2021, in the order of GPT-NeoX), so that
the two halves are loaded as tiles of their own, no channel is loaded twice, and scores are the sum of two products.
"""

import triton
import triton.language as tl

from dvit_kernels.attention_parts import load_rows


@triton.jit
def place_of(positions_ptr, row, n_rows, NUM_PREFIX: tl.constexpr):
    """Return the rows of the tables that tokens turn by; a prefix token's is negative."""
    place = row - NUM_PREFIX
    if positions_ptr is not None:
        place = tl.load(positions_ptr + place, mask=(place >= 0) & (row < n_rows), other=-1).to(tl.int32)
    return place


@triton.jit
def _normalise(first, second, inside, norm_ptr, dim, eps, HEAD: tl.constexpr):
    """Return the halves of rows (rows, HEAD/2) after LayerNorm over both, with gain and shift (2, HEAD)."""
    half: tl.constexpr = HEAD // 2
    mean = ((tl.sum(first, axis=1) + tl.sum(second, axis=1)) / HEAD)[:, None]
    first = tl.where(inside, first - mean, 0.0)
    second = tl.where(inside, second - mean, 0.0)
    variance = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / HEAD
    rstd = tl.math.rsqrt(variance + eps)[:, None]
    there = dim < half
    first = first * rstd * tl.load(norm_ptr + dim, mask=there, other=0.0)[None, :]
    first += tl.load(norm_ptr + HEAD + dim, mask=there, other=0.0)[None, :]
    second = second * rstd * tl.load(norm_ptr + half + dim, mask=there, other=0.0)[None, :]
    second += tl.load(norm_ptr + HEAD + half + dim, mask=there, other=0.0)[None, :]
    return first, second


@triton.jit
def load_heads(
    x_ptr,  # row 0 of an image's head
    row,
    n_rows,
    stride,
    norm_ptr,  # (2, HEAD) float32, gain and shift, or None
    eps,
    tables,  # sin_ptr and cos_ptr, the head's (n_places, HEAD); positions_ptr, the image's (N - NUM_PREFIX,); or None
    n_places,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
):
    """Load rows of a head, zeros past the end: one tile, or those of its halves if they are normalised or rotated.

    Sines and cosines are there twice, half a head apart; the first ones are read. Tokens whose place is not in the
    tables, such as prefix tokens, are not rotated.
    """
    sin_ptr, cos_ptr, positions_ptr = tables
    if norm_ptr is None and sin_ptr is None:
        tiles = (load_rows(x_ptr, row, n_rows, stride, tl.arange(0, BLOCK_D), HEAD),)
    else:
        half: tl.constexpr = HEAD // 2
        dim = tl.arange(0, BLOCK_D // 2 if BLOCK_D > 32 else 16)  # products need 16 channels
        first = load_rows(x_ptr, row, n_rows, stride, dim, half).to(tl.float32)
        second = load_rows(x_ptr + half, row, n_rows, stride, dim, half).to(tl.float32)
        inside = (dim < half)[None, :]
        if norm_ptr is not None:
            first, second = _normalise(first, second, inside, norm_ptr, dim, eps, HEAD)
        if sin_ptr is not None:
            place = place_of(positions_ptr, row, n_rows, NUM_PREFIX)
            turns = ((place >= 0) & (place < n_places))[:, None] & inside
            at = place[:, None] * HEAD + dim[None, :]
            sin = tl.load(sin_ptr + at, mask=turns, other=0.0)
            cos = tl.load(cos_ptr + at, mask=turns, other=1.0)
            first, second = first * cos - second * sin, second * cos + first * sin
        tiles = (first.to(x_ptr.dtype.element_ty), second.to(x_ptr.dtype.element_ty))  # type: ignore[assignment]  # two
    return tiles


@triton.jit
def scores_of(q, k):
    """Return q k^T in float32, for the tiles that `load_heads` returns of each."""
    s = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if len(k) == 2:
        s = tl.dot(q[1], tl.trans(k[1]), s, input_precision="ieee")
    return s
