"""Attention in a loop over blocks of keys, with a running maximum (Milakov and Gimelshein 2018; Dao et al. 2022)."""

import triton
import triton.language as tl

from dvit_kernels.attention_heads import load_heads, scores_of
from dvit_kernels.attention_parts import (
    NUMBERS,
    PAIR_STRIDES,
    STRIDES,
    find_program,
    load_rows,
    mask_scores,
    pair_bias_of,
    pair_rows_of,
    shift_of,
    store_rows,
    weigh,
)
from dvit_kernels.attention_signals import store_class_weights, store_mean_keys
from dvit_kernels.launch import wait_for_inputs


@triton.jit
def _sliced_scores(q_ptr, k_ptr, row, key, n_queries, n_keys, stride_qn, stride_kn, HEAD: tl.constexpr, SLICE):
    """Return scores with operands in registers: few channels at a time, with q reloaded for every block of keys."""
    s = tl.zeros((row.shape[0], key.shape[0]), tl.float32)
    for d in range(0, HEAD, SLICE):
        some = d + tl.arange(0, SLICE)
        q_some = load_rows(q_ptr, row, n_queries, stride_qn, some, HEAD)
        k_some = load_rows(k_ptr, key, n_keys, stride_kn, some, HEAD)
        s = tl.dot(q_some, tl.trans(k_some), s, input_precision="ieee")
    return s


@triton.jit
def _add(s, v, acc, total, top, BIASED: tl.constexpr, factor):
    """Add a block of keys to the running sum, total weight and maximum."""
    higher = tl.maximum(top, tl.max(s, axis=1))
    shift = shift_of(higher, BIASED, factor)
    rescale = weigh(top, shift, BIASED, factor)
    p = weigh(s, shift[:, None], BIASED, factor)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, total * rescale + tl.sum(p, axis=1), higher


@triton.jit(do_not_specialize=[*NUMBERS, *STRIDES, *PAIR_STRIDES])
def _attention_online_kernel(
    q_ptr,  # all arguments as in _attention_kernel
    k_ptr,
    v_ptr,
    bias_ptr,
    pair_ptr,
    cu_seqlens_ptr,
    out_ptr,
    norm_ptr,
    sin_ptr,
    cos_ptr,
    positions_ptr,
    signal_ptr,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_on,
    stride_oh,
    stride_bias,
    stride_pb,
    stride_ph,
    stride_pm,
    n_pair,
    n_places,
    norm_eps,
    n_queries,
    n_heads,
    programs,
    factor,
    N_KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    PAIR_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,  # a power of two, at least 16, that holds the keys after the last full block
    SLICE: tl.constexpr,  # in float32, channels of a head per step; 0: all; not if heads are normalised or rotated
    LEAVES: tl.constexpr,
    HEADS: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
    BY_HEAD: tl.constexpr,
    LOG_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Process one tile of queries in a loop over blocks of keys."""
    wait_for_inputs(PDL)
    tile, head, at, n_queries = find_program(cu_seqlens_ptr, n_queries, n_heads, programs)
    if tile * BLOCK_M >= n_queries:
        return
    n_keys = N_KEYS if cu_seqlens_ptr is None else n_queries
    if LEAVES == "mean_keys":
        store_mean_keys(
            signal_ptr + at * (N_KEYS * HEAD),
            k_ptr + at * stride_kb * UNIT,
            head * programs + tile,
            n_heads * programs,
            n_keys,
            stride_kn * UNIT,
            stride_kh * UNIT,
            HEAD,
            HEADS,
            BLOCK_D,
            16,
        )
    q_ptr += (at * stride_qb + head * stride_qh) * UNIT
    k_ptr += (at * stride_kb + head * stride_kh) * UNIT
    v_ptr += (at * stride_vb + head * stride_vh) * UNIT
    out_ptr += (at * stride_ob + head * stride_oh) * UNIT
    biased: tl.constexpr = bias_ptr is not None or pair_ptr is not None
    if bias_ptr is not None:
        bias_ptr += at * stride_bias
    if pair_ptr is not None:
        pair_ptr = pair_bias_of(pair_ptr, at, head, n_pair, stride_pb * PAIR_UNIT, stride_ph * PAIR_UNIT)
        stride_pm *= PAIR_UNIT
    k_norm_ptr = None if norm_ptr is None else norm_ptr + 2 * HEAD
    if BY_HEAD:
        sin_ptr += head * n_places * HEAD
        cos_ptr += head * n_places * HEAD
    if positions_ptr is not None:
        positions_ptr += at * (N_KEYS - NUM_PREFIX)
    tables = (sin_ptr, cos_ptr, positions_ptr)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    pair_rows = pair_rows_of(pair_ptr, row, n_queries, stride_pm)
    stride_qn *= UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    if not SLICE:
        q = load_heads(
            q_ptr, row, n_queries, stride_qn, norm_ptr, norm_eps, tables, n_places, HEAD, BLOCK_D, NUM_PREFIX
        )
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = n_keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        if SLICE:
            s = _sliced_scores(q_ptr, k_ptr, row, key, n_queries, whole, stride_qn, stride_kn, HEAD, SLICE)
        else:
            k = load_heads(
                k_ptr, key, whole, stride_kn, k_norm_ptr, norm_eps, tables, n_places, HEAD, BLOCK_D, NUM_PREFIX
            )
            s = scores_of(q, k)
        if biased:
            s = mask_scores(s, bias_ptr, pair_rows, key, whole, factor, LOG_BIAS)
        v = load_rows(v_ptr, key, whole, stride_vn, dim, HEAD)
        acc, total, top = _add(s, v, acc, total, top, biased, factor)
    if REST:
        key = whole + tl.arange(0, REST)
        if SLICE:
            s = _sliced_scores(q_ptr, k_ptr, row, key, n_queries, n_keys, stride_qn, stride_kn, HEAD, SLICE)
        else:
            k = load_heads(
                k_ptr, key, n_keys, stride_kn, k_norm_ptr, norm_eps, tables, n_places, HEAD, BLOCK_D, NUM_PREFIX
            )
            s = scores_of(q, k)
        v = load_rows(v_ptr, key, n_keys, stride_vn, dim, HEAD)
        s = mask_scores(s, bias_ptr, pair_rows, key, n_keys, factor, LOG_BIAS)
        acc, total, top = _add(s, v, acc, total, top, biased, factor)
    store_rows(out_ptr, acc, total, row, n_queries, stride_on * UNIT, dim, biased, HEAD)
    if LEAVES == "class_attention":
        if tile == 0:
            store_class_weights(
                signal_ptr + (at * n_heads + head) * N_KEYS,
                q_ptr,
                k_ptr,
                bias_ptr,
                pair_ptr,
                row,
                shift_of(top, biased, factor)[:, None],
                total[:, None],
                n_keys,
                stride_kn,
                factor,
                HEAD,
                BLOCK_D,
                32,
                LOG_BIAS,
            )
