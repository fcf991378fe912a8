"""Attention in a single pass: all keys and values of a head on chip, all scores of a tile of queries in registers."""

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


@triton.jit(do_not_specialize=[*NUMBERS, *STRIDES, *PAIR_STRIDES])
def _attention_kernel(
    q_ptr,  # (B, M, H, HEAD), or (T, H, HEAD)
    k_ptr,  # (B, N, H, HEAD), or (T, H, HEAD)
    v_ptr,  # as k
    bias_ptr,  # (B, N) float32, or (T,), or None
    pair_ptr,  # (n_pair, H, M, N) float32, or None with its strides, n_pair and PAIR_UNIT
    cu_seqlens_ptr,  # (B+1,) int32, or None if dense
    out_ptr,  # out, as q
    norm_ptr,  # (2, 2, HEAD) float32, gain and shift of queries, then of keys, or None; see attention_heads.py
    sin_ptr,  # (n_places, HEAD) float32, or (H, n_places, HEAD) BY_HEAD, or None with cos_ptr and NUM_PREFIX
    cos_ptr,
    positions_ptr,  # (B, N - NUM_PREFIX) int64, or None
    signal_ptr,  # out (B, H, N) or (B, N, HEAD) float32, or None with LEAVES; see attention_signals.py
    stride_qb,  # strides in units of UNIT elements, so that loads are known to be aligned; if ragged, b is n
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
    stride_bias,  # this one in elements
    stride_pb,  # these in units of PAIR_UNIT elements
    stride_ph,
    stride_pm,
    n_pair,
    n_places,
    norm_eps,
    n_queries,
    n_heads,
    programs,  # number that share the queries of a head
    factor,  # scale * log2(e)
    N_KEYS: tl.constexpr,  # 0 if ragged
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    PAIR_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_A: tl.constexpr,
    CHUNK_B: tl.constexpr,
    CHUNK_C: tl.constexpr,
    LEAVES: tl.constexpr,
    HEADS: tl.constexpr,  # for mean keys, else None
    NUM_PREFIX: tl.constexpr,
    BY_HEAD: tl.constexpr,
    LOG_BIAS: tl.constexpr,  # bias_ptr holds numbers whose logarithms are the bias
    PDL: tl.constexpr,
):
    """Hold all keys of a head in up to three chunks, and loop over tiles of its queries."""
    wait_for_inputs(PDL)
    tile, head, at, n_queries = find_program(cu_seqlens_ptr, n_queries, n_heads, programs)
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

    # All loads are issued before the first product waits for any of them.
    dim = tl.arange(0, BLOCK_D)
    key_a = tl.arange(0, CHUNK_A)
    k_a = load_heads(
        k_ptr, key_a, n_keys, stride_kn * UNIT, k_norm_ptr, norm_eps, tables, n_places, HEAD, BLOCK_D, NUM_PREFIX
    )
    if CHUNK_B:
        key_b = CHUNK_A + tl.arange(0, CHUNK_B)
        k_b = load_heads(
            k_ptr, key_b, n_keys, stride_kn * UNIT, k_norm_ptr, norm_eps, tables, n_places, HEAD, BLOCK_D, NUM_PREFIX
        )
    if CHUNK_C:
        key_c = CHUNK_A + CHUNK_B + tl.arange(0, CHUNK_C)
        k_c = load_heads(
            k_ptr, key_c, n_keys, stride_kn * UNIT, k_norm_ptr, norm_eps, tables, n_places, HEAD, BLOCK_D, NUM_PREFIX
        )
    v_a = load_rows(v_ptr, key_a, n_keys, stride_vn * UNIT, dim, HEAD)
    if CHUNK_B:
        v_b = load_rows(v_ptr, key_b, n_keys, stride_vn * UNIT, dim, HEAD)
    if CHUNK_C:
        v_c = load_rows(v_ptr, key_c, n_keys, stride_vn * UNIT, dim, HEAD)

    for start in range(tile * BLOCK_M, n_queries, programs * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q = load_heads(
            q_ptr, row, n_queries, stride_qn * UNIT, norm_ptr, norm_eps, tables, n_places, HEAD, BLOCK_D, NUM_PREFIX
        )
        pair_rows = pair_rows_of(pair_ptr, row, n_queries, stride_pm)
        s_a = scores_of(q, k_a)
        s_a = mask_scores(s_a, bias_ptr, pair_rows, key_a, n_keys, factor, LOG_BIAS)
        top = tl.max(s_a, axis=1)
        if CHUNK_B:
            s_b = scores_of(q, k_b)
            s_b = mask_scores(s_b, bias_ptr, pair_rows, key_b, n_keys, factor, LOG_BIAS)
            top = tl.maximum(top, tl.max(s_b, axis=1))
        if CHUNK_C:
            s_c = scores_of(q, k_c)
            s_c = mask_scores(s_c, bias_ptr, pair_rows, key_c, n_keys, factor, LOG_BIAS)
            top = tl.maximum(top, tl.max(s_c, axis=1))
        shift = shift_of(top, biased, factor)[:, None]

        p = weigh(s_a, shift, biased, factor)
        total = tl.sum(p, axis=1)
        acc = tl.dot(p.to(v_a.dtype), v_a, input_precision="ieee")
        if CHUNK_B:
            p = weigh(s_b, shift, biased, factor)
            total += tl.sum(p, axis=1)
            acc = tl.dot(p.to(v_b.dtype), v_b, acc, input_precision="ieee")
        if CHUNK_C:
            p = weigh(s_c, shift, biased, factor)
            total += tl.sum(p, axis=1)
            acc = tl.dot(p.to(v_c.dtype), v_c, acc, input_precision="ieee")
        store_rows(out_ptr, acc, total, row, n_queries, stride_on * UNIT, dim, biased, HEAD)
        if LEAVES == "class_attention":
            if start == 0:
                store_class_weights(
                    signal_ptr + (at * n_heads + head) * N_KEYS,
                    q_ptr,
                    k_ptr,
                    bias_ptr,
                    pair_ptr,
                    row,
                    shift,
                    total[:, None],
                    n_keys,
                    stride_kn * UNIT,
                    factor,
                    HEAD,
                    BLOCK_D,
                    64,
                    LOG_BIAS,
                )
