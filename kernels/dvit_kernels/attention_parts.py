"""What both attention kernels do with a block of scores: find their place, load, mask, weigh, store."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
STRIDES = tuple(f"stride_{tensor}{dim}" for tensor in "qkvo" for dim in "bnh")


@triton.jit
def find_program(cu_seqlens_ptr, n_queries, n_heads, programs):
    """Which of the programs of a head this is, the head, what strides between images count, its number of queries."""
    program = tl.program_id(0)
    at = (program // programs // n_heads).to(tl.int64)
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + at)
        n_queries = tl.load(cu_seqlens_ptr + at + 1) - start
        at = start.to(tl.int64)
    return program % programs, (program // programs % n_heads).to(tl.int64), at, n_queries


@triton.jit
def load_rows(x_ptr, row, n_rows, stride, dim, HEAD: tl.constexpr):
    """Rows of a head, zeros where there are none: memory behind the last may hold anything, also NaN."""
    at = x_ptr + row[:, None] * stride + dim[None, :]
    return tl.load(at, mask=(row < n_rows)[:, None] & (dim < HEAD)[None, :], other=0.0)


@triton.jit
def mask_scores(s, bias_ptr, key, n_keys, factor):
    """Scores, minus infinity behind the last key; with a bias, which is added, they are exponents already."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + key, mask=key < n_keys, other=float("-inf"))
        s = s * factor + (bias * LOG2E)[None, :]
    else:
        s = tl.where((key < n_keys)[None, :], s, float("-inf"))
    return s


@triton.jit
def shift_of(top, bias_ptr, factor):
    """The greatest exponent, to be subtracted. A bias may leave none but infinite ones: all weights are 0 then."""
    if bias_ptr is not None:
        shift = tl.where(top == float("-inf"), 0.0, top)
    else:
        shift = top * factor
    return shift


@triton.jit
def weigh(s, shift, bias_ptr, factor):
    """Unless they are exponents already, the scale goes in with the shift: one instruction and an exponential each."""
    if bias_ptr is not None:
        p = tl.math.exp2(s - shift)
    else:
        p = tl.math.exp2(s * factor - shift)
    return p


@triton.jit
def store_rows(out_ptr, acc, total, row, n_queries, stride, dim, bias_ptr, HEAD: tl.constexpr):
    if bias_ptr is not None:
        total = tl.where(total == 0.0, 1.0, total)  # no key counts: 0, not 0/0
    out = acc * (1.0 / total)[:, None]
    at = out_ptr + row[:, None] * stride + dim[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(row < n_queries)[:, None] & (dim < HEAD)[None, :])
