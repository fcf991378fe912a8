"""attention: softmax(scale * q k^T + bias) v per head, for dense or ragged batches of images.

On CUDA it runs as one Triton launch (dvit_kernels/attention.py) or PyTorch's own attention, whichever is faster on that
GPU for that shape (choices.py); elsewhere as PyTorch's.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dvit_infer.ops.choices import DTYPES, Choice, choices_for, runs_triton
from dvit_infer.ops.fallback import by_kernel, check_close, some_of, widened
from dvit_infer.ops.registration import register

OP = "dvit::attention"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_tokens: int = 0,
) -> torch.Tensor:
    """Return softmax(scale * q k^T + bias) v for each head, without synchronising with the device.

    Args:
        q: (B, M, H, D) in float32, float16 or bfloat16, any strides, such as a view of a packed (B, N, 3, H, D).
        k, v: (B, N, H, D), in q's dtype.
        scale: the factor of the scores, more than 0; None: D^-0.5.
        bias: (B, N) float32, added to the scores of each key; minus infinity masks a key. Queries whose keys are all
            masked get 0.
        cu_seqlens: for a ragged batch, (B+1,) int32 on q's device: the offsets of each image's tokens, from 0 to T.
            q, k, v are then (T, H, D) and `bias` is (T,); images may be empty.
        max_tokens: for a ragged batch, at least the number of tokens of its largest image. The values of the last two
            arguments are not checked.

    Returns:
        A contiguous tensor of q's shape and dtype.

    Raises:
        ValueError: a shape, a dtype or a number is invalid.
        RuntimeError: on backward.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = torch.ops.dvit.attention(q, k, v, scale, bias, cu_seqlens, max_tokens)
    return out


def attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_tokens: int = 0,
) -> torch.Tensor:
    """Run the op in plain PyTorch; arguments as `attention`. A ragged batch synchronises to read the lengths."""
    if cu_seqlens is not None:
        out = q.new_empty(q.shape)
        ends = cu_seqlens.tolist()
        for start, end in itertools.pairwise(ends):
            some = None if bias is None else bias[None, start:end]
            if start < end:
                out[start:end] = attention_ref(q[None, start:end], k[None, start:end], v[None, start:end], scale, some)
        return out
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
    # Not by scaled_dot_product_attention, which would round the bias to q's dtype.
    scores = q.float() @ k.float().transpose(-2, -1) * scale + bias[:, None, None]
    weights = scores.softmax(dim=-1).masked_fill((bias == -math.inf).all(dim=1)[:, None, None, None], 0.0)
    return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous()


class _Call(NamedTuple):
    """A call's arguments, as in the schema; the dispatcher omits those that equal the default."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_tokens: int = 0


def _checked(*arguments: Any, **named: Any) -> _Call:
    call = _Call(*arguments, **named)
    q, k, v, scale, bias, cu_seqlens, max_tokens = call
    ragged = cu_seqlens is not None
    expected = "(T, H, D)" if ragged else "(B, M, H, D)"
    if q.ndim != 4 - ragged or q.dtype not in DTYPES or q.shape[-1] < 1:
        raise ValueError(f"attention: q is {_found(q)}; {expected} in float32, float16 or bfloat16 is expected")
    shape = (*k.shape[:-2], *q.shape[-2:])
    if k.ndim != q.ndim or k.dtype != q.dtype or k.shape != shape or k.shape[0] != q.shape[0]:
        raise ValueError(f"attention: k is {_found(k)}, which does not go with q, {_found(q)}")
    if v.dtype != k.dtype or v.shape != k.shape:
        raise ValueError(f"attention: v is {_found(v)}, k is {_found(k)}; they have to be alike")
    if not ragged and k.shape[1] < 1:
        raise ValueError("attention: k has no keys")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"attention: scale is {scale}, more than 0 is expected")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != k.shape[:-2]):
        raise ValueError(f"attention: bias is {_found(bias)}; {tuple(k.shape[:-2])} in torch.float32 is expected")
    if cu_seqlens is not None and (cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 1):
        raise ValueError(f"attention: cu_seqlens is {_found(cu_seqlens)}; (B+1,) in torch.int32 is expected")
    if ragged and max_tokens < 1:
        raise ValueError(f"attention: max_tokens is {max_tokens}; a ragged batch needs that of its largest image")
    for name, tensor in zip(call._fields, call, strict=True):
        if isinstance(tensor, torch.Tensor) and tensor.device != q.device:
            raise ValueError(f"attention: {name} is on {tensor.device}, q on {q.device}")
    return call


def _found(x: torch.Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def choose(device: torch.device, dtype: torch.dtype, heads: int, queries: int, tokens: int, head_dim: int) -> Choice:
    """Return the choice for a dense batch on a device; `heads` counts those of all its images."""
    if not _supported(device, head_dim):
        return Choice("pytorch")
    return choices_for(device).of("attention", dtype, heads, queries=queries, tokens=tokens, head_dim=head_dim)


def _supported(device: torch.device, head_dim: int) -> bool:
    if not runs_triton(device, "attention"):
        return False
    from dvit_kernels.attention import supports  # here: Triton takes a while to import

    return supports(head_dim)


def _anywhere(*arguments: Any, **named: Any) -> torch.Tensor:
    call = _checked(*arguments, **named)
    q, (heads, head_dim) = call.q, call.q.shape[-2:]
    if call.cu_seqlens is None:
        choice = choose(q.device, q.dtype, len(q) * heads, q.shape[1], call.k.shape[1], head_dim)
    else:  # PyTorch would synchronise to read the lengths
        choice = Choice("triton" if _supported(q.device, head_dim) else "pytorch")
    if choice.by == "pytorch":
        return attention_ref(*call)
    return by_kernel(
        "attention",
        q.device,
        lambda: _by_kernel(call, choice),
        lambda: attention_ref(*call),
        lambda out: _fault(call, out),
        (*call, choice),
    )


def _by_kernel(call: _Call, choice: Choice) -> torch.Tensor:
    from dvit_kernels.attention import AttentionTile, launch_attention

    return launch_attention(*call, tile=AttentionTile(*choice.tile) if choice.tile else None)


def _fault(call: _Call, out: torch.Tensor) -> str | None:
    """Check the kernel's result in a few images, or in all tokens of a ragged batch."""
    few = call
    if call.cu_seqlens is None:
        some = some_of(call.q)
        bias = None if call.bias is None else call.bias[some]
        few, out = call._replace(q=call.q[some], k=call.k[some], v=call.v[some], bias=bias), out[some]
    return check_close(out, attention_ref(*few), attention_ref(*_Call(*map(widened, few))))


def _fake(*arguments: Any, **named: Any) -> torch.Tensor:
    q = _checked(*arguments, **named).q
    return q.new_empty(q.shape)


register(OP, attention_ref, _anywhere, _fake, "Train with torch.nn.functional.scaled_dot_product_attention.")
