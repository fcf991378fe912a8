"""Attention in one launch, for the short sequences of vision transformers, in dense or ragged batches.

For up to 256 keys in half precision, all keys and values of a head stay on chip and all scores of a tile of queries in
registers (attention_single_pass.py): one maximum, no rescaling. For more keys, and in float32, blocks of keys are
processed with a running maximum (attention_online.py). Queries and keys may be normalised and rotated while they are
loaded (attention_heads.py). Exponentials are to base 2, which takes one instruction.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from dvit_kernels.attention_online import _attention_online_kernel
from dvit_kernels.attention_parts import PAIR_STRIDES, STRIDES
from dvit_kernels.attention_signals import CLASS_ATTENTION, MEAN_KEYS, SIGNALS
from dvit_kernels.attention_single_pass import _attention_kernel
from dvit_kernels.launch import Launch, run

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


class Compared(NamedTuple):
    """How queries and keys are changed before they are compared; arguments as of `dvit::rotary_attention`."""

    sin: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    num_prefix: int = 0
    norms: torch.Tensor | None = None
    eps: float = 1e-6


@functools.cache
def key_chunks(n: int) -> tuple[int, int, int]:
    """Return up to three powers of two, at least 16, that hold n keys with the least padding; 0 for unused ones."""
    sizes = [16 << i for i in range(max(1, (max(n, 1) - 1).bit_length() - 3))]
    found = ((a, b, c) for a in sizes for b in (0, *sizes) for c in (0, *sizes) if a >= b >= c and a + b + c >= n)
    return min(found, key=lambda chunks: (sum(chunks), sum(map(bool, chunks))))


def default_tile(
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    pair_bias: bool = False,
    signal: bool = False,
    compared: bool = False,
) -> AttentionTile:
    """Return a tile that does not spill registers (AOT.md); the fastest tile must be measured."""
    if dtype == torch.float32:  # without tensor cores, operands in registers
        return AttentionTile(16, 32, num_stages=1 if compared else 2)
    few, narrow, aligned = queries <= 16, head_dim <= SINGLE_PASS_HEAD, head_dim % 8 == 0
    short = keys <= (SINGLE_PASS_PAIRS if pair_bias and not few else SINGLE_PASS_TOKENS)
    if short and narrow and aligned:
        return AttentionTile(16 if few else 64, *key_chunks(keys), num_warps=8 if few and compared else 4)
    if pair_bias and not few:
        return AttentionTile(64 if narrow else 32, 64 if narrow and aligned else 32, num_stages=2)
    if compared and not few:  # keys are changed again for every tile of queries: many of them, few keys at a time
        return AttentionTile(128, 32 if narrow else 16, num_warps=8, num_stages=2)
    block_m, num_warps = (16, 4) if few else (64, 4) if narrow and (short or signal) else (128, 8)
    return AttentionTile(block_m, 64, num_warps=num_warps, num_stages=3 if narrow else 2)


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


def _compared_arguments(compared: Compared | None) -> dict[str, Any]:
    """Return the kernels' arguments for queries and keys that are changed first; all None if they are not."""
    sin, cos, positions, num_prefix, norms, eps = compared or Compared()
    turns = sin is not None
    return {
        "norm_ptr": None if norms is None else norms.contiguous(),
        "norm_eps": None if norms is None else eps,
        "sin_ptr": None if sin is None else sin.contiguous(),
        "cos_ptr": None if cos is None else cos.contiguous(),
        "positions_ptr": None if positions is None or not turns else positions.contiguous(),
        "n_places": None if sin is None else sin.shape[-2],
        "NUM_PREFIX": num_prefix if turns else None,
        "BY_HEAD": True if sin is not None and sin.ndim == 3 else None,
    }


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
    compared: Compared | None = None,
) -> torch.Tensor:
    """Run `dvit::attention` as one Triton launch on q's device and current stream, without synchronising.

    Arguments and result are as for `dvit_infer.ops.attention.attention`; heads have 16 to 128 channels, in steps of 4;
    `tile` fixes the block sizes. For `launch_attention_with_signal`, `signal` is what the launch writes beside the
    result, as named by `leaves`; with `log_bias`, the bias is the logarithm of `bias`. For `dvit::rotary_attention`,
    `compared` describes how queries and keys are changed first.

    Raises:
        ValueError: the head size is not supported, a ragged batch has a pair bias, or queries and keys are changed with
            either of them or a signal.
    """
    if not supports(q.shape[-1]):
        raise ValueError(f"launch_attention: heads of {q.shape[-1]} channels; 16 to 128 in steps of 4 are supported")
    if pair_bias is not None and cu_seqlens is not None:
        raise ValueError("launch_attention: pair_bias is for dense batches, cu_seqlens is given")
    if compared is not None and not (cu_seqlens is signal is pair_bias is None):
        raise ValueError("launch_attention: heads are changed in dense batches, without pair bias or signal")
    ragged, full_rate = cu_seqlens is not None, q.dtype != torch.float32
    images = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    queries, keys = (max_tokens, max_tokens) if ragged else (q.shape[1], k.shape[1])
    heads, head_dim = q.shape[-2:]
    tile = tile or default_tile(
        queries, keys, head_dim, q.dtype, pair_bias is not None, signal is not None, compared is not None
    )
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
        **_compared_arguments(compared),
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
        "SLICE": 0 if full_rate or compared else 16,
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
