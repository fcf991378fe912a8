"""Steps shared by both attention kernels: find the program, load rows, mask scores, weigh, store."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
STRIDES = tuple(f"stride_{tensor}{dim}" for tensor in "qkvo" for dim in "bnh")
NUMBERS = ("n_queries", "n_heads", "programs", "stride_bias", "n_pair", "n_places")
PAIR_STRIDES = ("stride_pb", "stride_ph", "stride_pm")


@triton.jit
def find_program(cu_seqlens_ptr, n_queries, n_heads, programs):
    """Return the program's index within its head, the head, the index for strides between images, and the queries."""
    program = tl.program_id(0)
    at = (program // programs // n_heads).to(tl.int64)
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + at)
        n_queries = tl.load(cu_seqlens_ptr + at + 1) - start
        at = start.to(tl.int64)
    return program % programs, (program // programs % n_heads).to(tl.int64), at, n_queries


@triton.jit
def pair_bias_of(pair_ptr, at, head, n_pair, stride_pb, stride_ph):
    """Return a pointer to the pair bias of an image and a head: image i has that of index i modulo n_pair."""
    return pair_ptr + (at.to(tl.int32) % n_pair).to(tl.int64) * stride_pb + head * stride_ph


@triton.jit
def pair_rows_of(pair_ptr, row, n_queries, stride_pm):
    """Return pointers (rows, 1) to rows of a pair bias, or None; past the last query to the last row."""
    rows = None
    if pair_ptr is not None:
        rows = pair_ptr + (tl.minimum(row, n_queries - 1) * stride_pm)[:, None]
    return rows


@triton.jit
def load_rows(x_ptr, row, n_rows, stride, dim, HEAD: tl.constexpr):
    """Load rows of a head, zeros past the end, where memory may hold anything, even NaN."""
    at = x_ptr + row[:, None] * stride + dim[None, :]
    return tl.load(at, mask=(row < n_rows)[:, None] & (dim < HEAD)[None, :], other=0.0)


@triton.jit
def mask_scores(s, bias_ptr, pair_rows, key, n_keys, factor, LOG_BIAS: tl.constexpr):
    """Set scores past the last key to minus infinity; with a bias, scale and add it: the result is exponents.

    With LOG_BIAS the bias is the logarithm of what is loaded.
    """
    if bias_ptr is not None:
        if LOG_BIAS:
            exponent = tl.math.log2(tl.load(bias_ptr + key, mask=key < n_keys, other=1.0))
            s = s * factor + tl.where(key < n_keys, exponent, float("-inf"))[None, :]
        else:
            bias = tl.load(bias_ptr + key, mask=key < n_keys, other=float("-inf"))
            s = s * factor + (bias * LOG2E)[None, :]
    if pair_rows is not None:
        pair = tl.load(pair_rows + key[None, :], mask=(key < n_keys)[None, :], other=float("-inf"))
        s = (s if bias_ptr is not None else s * factor) + pair * LOG2E
    if bias_ptr is None and pair_rows is None:
        s = tl.where((key < n_keys)[None, :], s, float("-inf"))
    return s


@triton.jit
def shift_of(top, BIASED: tl.constexpr, factor):
    """Return the largest exponent, to be subtracted. If a bias makes all infinite, all weights become 0."""
    if BIASED:
        shift = tl.where(top == float("-inf"), 0.0, top)
    else:
        shift = top * factor
    return shift


@triton.jit
def weigh(s, shift, BIASED: tl.constexpr, factor):
    """Return the weights 2^(score - shift); without a bias, scale and shift are one instruction per score."""
    if BIASED:
        p = tl.math.exp2(s - shift)
    else:
        p = tl.math.exp2(s * factor - shift)
    return p


@triton.jit
def store_rows(out_ptr, acc, total, row, n_queries, stride, dim, BIASED: tl.constexpr, HEAD: tl.constexpr):
    if BIASED:
        total = tl.where(total == 0.0, 1.0, total)  # no key is left: 0, not 0/0
    out = acc * (1.0 / total)[:, None]
    at = out_ptr + row[:, None] * stride + dim[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(row < n_queries)[:, None] & (dim < HEAD)[None, :])
