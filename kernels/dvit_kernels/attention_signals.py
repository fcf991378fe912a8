"""Signals that attention leaves for token reduction in the same launch: weights of the class token, mean keys."""

import triton
import triton.language as tl

from dvit_kernels.attention_parts import load_rows, mask_scores, pair_rows_of, weigh

CLASS_ATTENTION, MEAN_KEYS = "class_attention", "mean_keys"
SIGNALS = (CLASS_ATTENTION, MEAN_KEYS)


@triton.jit
def store_class_weights(
    signal_ptr,  # out (N,) float32 of the image and head
    q_ptr,  # query row 0
    k_ptr,
    bias_ptr,
    pair_ptr,
    row,  # (M,) rows of the tile that row 0 is in
    shift,  # (M, 1), of each
    total,  # (M, 1)
    n_keys,
    stride_kn,
    factor,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG_BIAS: tl.constexpr,
):
    """Store the weights of query row 0, which only the program of a head's first tile does.

    Scores are computed again from the keys, in the cache by now: kept until their total is known, they would take the
    registers of a whole tile.
    """
    biased: tl.constexpr = bias_ptr is not None or pair_ptr is not None
    shift = tl.sum(tl.where(row[:, None] == 0, shift, 0.0), axis=0)[:, None]
    total = tl.sum(tl.where(row[:, None] == 0, total, 0.0), axis=0)[:, None]
    if biased:
        total = tl.where(total == 0.0, 1.0, total)  # no key is left: 0, not 0/0
    dim = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + dim, mask=dim < HEAD, other=0.0).to(tl.float32)
    pair_rows = pair_rows_of(pair_ptr, tl.zeros((1,), tl.int32), 1, 0)
    for start in range(0, n_keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key, n_keys, stride_kn, dim, HEAD).to(tl.float32)
        s = tl.sum(k * q[None, :], axis=1)[None, :]
        p = weigh(mask_scores(s, bias_ptr, pair_rows, key, n_keys, factor, LOG_BIAS), shift, biased, factor)
        tl.store(signal_ptr + key[None, :], p * (1.0 / total), mask=(key < n_keys)[None, :])


@triton.jit
def store_mean_keys(
    signal_ptr,  # out (N, HEAD) float32 of the image
    k_ptr,  # (N, HEADS, HEAD) of the image
    part,
    parts,
    n_keys,
    stride_kn,
    stride_kh,
    HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store the mean over heads of every `parts`-th block of keys: the programs of an image share them."""
    dim = tl.arange(0, BLOCK_D)
    start = part * BLOCK_N
    while start < n_keys:
        key = start + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for head in tl.range(0, HEADS, loop_unroll_factor=4):  # so that four loads are in flight together
            total += load_rows(k_ptr + head * stride_kh, key, n_keys, stride_kn, dim, HEAD).to(tl.float32)
        inside = (key < n_keys)[:, None] & (dim < HEAD)[None, :]
        tl.store(signal_ptr + key[:, None] * HEAD + dim[None, :], total / HEADS, mask=inside)
        start += parts * BLOCK_N
