"""Attention in one launch, for the short sequences of vision transformers, in dense or ragged batches.

For up to 256 keys in half precision, all keys and values of a head stay on chip and all scores of a tile of queries in
registers: one maximum, no rescaling. For more keys, and in float32, blocks of keys are processed with a running maximum
(Milakov and Gimelshein 2018; Dao et al. 2022). Exponentials are to base 2, which takes one instruction.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from dvit_kernels.attention_online import _attention_online_kernel
from dvit_kernels.attention_parts import (
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
from dvit_kernels.attention_signals import CLASS_ATTENTION, MEAN_KEYS, SIGNALS, store_class_weights, store_mean_keys
from dvit_kernels.launch import Launch, run, wait_for_inputs

SINGLE_PASS_TOKENS, SINGLE_PASS_HEAD = 256, 64  # beyond, registers are too few on some GPUs
SINGLE_PASS_PAIRS = 64  # tokens with a pair bias, which needs a register for each score
MIN_HEAD, MAX_HEAD, HEAD_STEP = 16, 128, 4
ENOUGH_PROGRAMS = 384  # about three per multiprocessor of a large GPU


@dataclass(frozen=True)
class AttentionTile:
    """Block sizes of a launch, which affect only its speed.

    Attributes:
        block_m: queries per block.
        chunk_a, chunk_b, chunk_c: keys per block, powers of two from 16 up, largest first; 0: none. If together they
            hold all keys, there is a single pass; otherwise (and in float32) a loop over blocks of `chunk_a`.
        num_warps, num_stages: Triton's.
        programs: in a single pass, the number that share the queries of a head; 0: as many as fill a large GPU.
    """

    block_m: int
    chunk_a: int
    chunk_b: int = 0
    chunk_c: int = 0
    num_warps: int = 4
    num_stages: int = 1
    programs: int = 0

    def holds(self, keys: int) -> bool:
        return keys <= self.chunk_a + self.chunk_b + self.chunk_c


@functools.cache
def key_chunks(n: int) -> tuple[int, int, int]:
    """Return up to three powers of two, at least 16, that hold n keys with the least padding; 0 for unused ones."""
    sizes = [16 << i for i in range(max(1, (max(n, 1) - 1).bit_length() - 3))]
    found = ((a, b, c) for a in sizes for b in (0, *sizes) for c in (0, *sizes) if a >= b >= c and a + b + c >= n)
    return min(found, key=lambda chunks: (sum(chunks), sum(map(bool, chunks))))


def default_tile(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype, pair_bias: bool = False, signal: bool = False
) -> AttentionTile:
    """Return a tile that does not spill registers (AOT.md); the fastest tile must be measured."""
    if dtype == torch.float32:  # without tensor cores, operands in registers
        return AttentionTile(16, 32, num_stages=2)
    few, narrow, aligned = queries <= 16, head_dim <= SINGLE_PASS_HEAD, head_dim % 8 == 0
    short = keys <= (SINGLE_PASS_PAIRS if pair_bias and not few else SINGLE_PASS_TOKENS)
    if short and narrow and aligned:
        return AttentionTile(16 if few else 64, *key_chunks(keys))
    if pair_bias and not few:
        return AttentionTile(64 if narrow else 32, 64 if narrow and aligned else 32, num_stages=2)
    block_m, num_warps = (16, 4) if few else (64, 4) if narrow and (short or signal) else (128, 8)
    return AttentionTile(block_m, 64, num_warps=num_warps, num_stages=3 if narrow else 2)


@triton.jit(do_not_specialize=["n_queries", "n_heads", "programs", "stride_bias", "n_pair", *STRIDES, *PAIR_STRIDES])
def _attention_kernel(
    q_ptr,  # (B, M, H, HEAD), or (T, H, HEAD)
    k_ptr,  # (B, N, H, HEAD), or (T, H, HEAD)
    v_ptr,  # as k
    bias_ptr,  # (B, N) float32, or (T,), or None
    pair_ptr,  # (n_pair, H, M, N) float32, or None with its strides, n_pair and PAIR_UNIT
    cu_seqlens_ptr,  # (B+1,) int32, or None if dense
    out_ptr,  # out, as q
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

    # All loads are issued before the first product waits for any of them.
    dim = tl.arange(0, BLOCK_D)
    key_a = tl.arange(0, CHUNK_A)
    k_a = load_rows(k_ptr, key_a, n_keys, stride_kn * UNIT, dim, HEAD)
    if CHUNK_B:
        key_b = CHUNK_A + tl.arange(0, CHUNK_B)
        k_b = load_rows(k_ptr, key_b, n_keys, stride_kn * UNIT, dim, HEAD)
    if CHUNK_C:
        key_c = CHUNK_A + CHUNK_B + tl.arange(0, CHUNK_C)
        k_c = load_rows(k_ptr, key_c, n_keys, stride_kn * UNIT, dim, HEAD)
    v_a = load_rows(v_ptr, key_a, n_keys, stride_vn * UNIT, dim, HEAD)
    if CHUNK_B:
        v_b = load_rows(v_ptr, key_b, n_keys, stride_vn * UNIT, dim, HEAD)
    if CHUNK_C:
        v_c = load_rows(v_ptr, key_c, n_keys, stride_vn * UNIT, dim, HEAD)

    for start in range(tile * BLOCK_M, n_queries, programs * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, row, n_queries, stride_qn * UNIT, dim, HEAD)
        pair_rows = pair_rows_of(pair_ptr, row, n_queries, stride_pm)
        s_a = tl.dot(q, tl.trans(k_a), input_precision="ieee")
        s_a = mask_scores(s_a, bias_ptr, pair_rows, key_a, n_keys, factor, LOG_BIAS)
        top = tl.max(s_a, axis=1)
        if CHUNK_B:
            s_b = tl.dot(q, tl.trans(k_b), input_precision="ieee")
            s_b = mask_scores(s_b, bias_ptr, pair_rows, key_b, n_keys, factor, LOG_BIAS)
            top = tl.maximum(top, tl.max(s_b, axis=1))
        if CHUNK_C:
            s_c = tl.dot(q, tl.trans(k_c), input_precision="ieee")
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


def supports(head_dim: int) -> bool:
    """Return whether the kernels support a head size: 16 to 128, in steps of 4."""
    return MIN_HEAD <= head_dim <= MAX_HEAD and head_dim % HEAD_STEP == 0


def _addressable(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return x, or a copy if its channels are not contiguous or offsets within an image exceed 32 bits."""
    return x if x.stride(-1) == 1 and tokens * _strides(x)[1] < 2**31 else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Return strides of image, token, head in (B, N, H, D), of token, token, head in (T, H, D); 0 for a size of 1."""
    n, h = (0 if x.shape[d] == 1 else x.stride(d) for d in (-3, -2))
    b = n if x.ndim == 3 else 0 if x.shape[0] == 1 else x.stride(0)
    return b, n, h


def _pair_arguments(pair_bias: torch.Tensor | None) -> dict[str, Any]:
    """Return the kernels' arguments for (H, M, N) or (n_pair, H, M, N), any strides; all None without a pair bias."""
    if pair_bias is None:
        return dict.fromkeys(("pair_ptr", "n_pair", "PAIR_UNIT", *PAIR_STRIDES))
    if pair_bias.ndim == 3:
        pair_bias = pair_bias[None]
    if pair_bias.stride(3) != 1 or pair_bias.shape[2] * pair_bias.stride(2) >= 2**31:
        pair_bias = pair_bias.contiguous()
    strides = [
        0 if size == 1 else stride for size, stride in zip(pair_bias.shape[:3], pair_bias.stride(), strict=False)
    ]
    unit = math.gcd(16 // pair_bias.element_size(), *strides)
    given = {"pair_ptr": pair_bias, "n_pair": pair_bias.shape[0], "PAIR_UNIT": unit}
    return given | {name: stride // unit for name, stride in zip(PAIR_STRIDES, strides, strict=True)}


def launch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_tokens: int = 0,
    pair_bias: torch.Tensor | None = None,
    tile: AttentionTile | None = None,
    leaves: str | None = None,
    signal: torch.Tensor | None = None,
    log_bias: bool = False,
) -> torch.Tensor:
    """Run `dvit::attention` as one Triton launch on q's device and current stream, without synchronising.

    Arguments and result are as for `dvit_infer.ops.attention.attention`; heads have 16 to 128 channels, in steps of 4;
    `tile` fixes the block sizes. For `launch_attention_with_signal`, `signal` is what the launch writes beside the
    result, as named by `leaves`; with `log_bias`, the bias is the logarithm of `bias`.

    Raises:
        ValueError: the head size is not supported, or a ragged batch has a pair bias.
    """
    if not supports(q.shape[-1]):
        raise ValueError(f"launch_attention: heads of {q.shape[-1]} channels; 16 to 128 in steps of 4 are supported")
    if pair_bias is not None and cu_seqlens is not None:
        raise ValueError("launch_attention: pair_bias is for dense batches, cu_seqlens is given")
    ragged, full_rate = cu_seqlens is not None, q.dtype != torch.float32
    images = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    queries, keys = (max_tokens, max_tokens) if ragged else (q.shape[1], k.shape[1])
    heads, head_dim = q.shape[-2:]
    tile = tile or default_tile(queries, keys, head_dim, q.dtype, pair_bias is not None, signal is not None)
    out = q.new_empty(q.shape)
    q, k, v = (_addressable(x, max_tokens if ragged else x.shape[1]) for x in (q, k, v))
    strides = [stride for x in (q, k, v, out) for stride in _strides(x)]
    unit = math.gcd(16 // q.element_size(), *strides)
    tiles = triton.cdiv(queries, tile.block_m)
    given = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": None if bias is None else bias.contiguous(),
        "cu_seqlens_ptr": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "out_ptr": out,
        "signal_ptr": signal,
        **_pair_arguments(pair_bias),
        **{name: stride // unit for name, stride in zip(STRIDES, strides, strict=True)},
        "stride_bias": 1 if ragged else keys,
        "n_queries": queries,
        "n_heads": heads,
        "factor": scale * math.log2(math.e),
        "N_KEYS": 0 if ragged else keys,
        "HEAD": head_dim,
        "UNIT": unit,
        "BLOCK_M": tile.block_m,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "LEAVES": leaves,
        "HEADS": heads if leaves == MEAN_KEYS else None,
        "LOG_BIAS": True if log_bias and bias is not None else None,
    }
    warps_and_stages = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if full_rate and tile.holds(keys):
        programs = min(tiles, tile.programs or triton.cdiv(ENOUGH_PROGRAMS, max(1, images * heads)))
        chunks = {"CHUNK_A": tile.chunk_a, "CHUNK_B": tile.chunk_b, "CHUNK_C": tile.chunk_c}
        grid = (programs * heads * images,)
        run([Launch.of(_attention_kernel, grid, **given, programs=programs, **chunks, **warps_and_stages)], q.device)
        return out
    rest = tile.chunk_a if ragged else keys % tile.chunk_a
    blocks = {
        "programs": tiles,
        "BLOCK_N": tile.chunk_a,
        "REST": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "SLICE": 0 if full_rate else 16,
    }
    grid = (tiles * heads * images,)
    run([Launch.of(_attention_online_kernel, grid, **given, **blocks, **warps_and_stages)], q.device)
    return out


def launch_attention_with_signal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    leaves: str,
    pair_bias: torch.Tensor | None = None,
    log_bias: bool = False,
    tile: AttentionTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dvit::attention_with_signal` as the launch of `launch_attention`, for dense batches with queries.

    Raises:
        ValueError: the head size or the signal is not supported, or there are no queries.
    """
    if leaves not in SIGNALS or not q.shape[1]:
        raise ValueError(f"launch_attention_with_signal: {leaves} of {q.shape[1]} queries; {SIGNALS} of 1 or more")
    (b, n, heads, head_dim) = k.shape
    shape = (b, heads, n) if leaves == CLASS_ATTENTION else (b, n, head_dim)
    signal = q.new_empty(shape, dtype=torch.float32)
    out = launch_attention(q, k, v, scale, bias, None, 0, pair_bias, tile, leaves, signal, log_bias)
    return out, signal
