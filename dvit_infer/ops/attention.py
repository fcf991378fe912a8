"""attention: softmax(scale * q k^T + bias + pair_bias) v per head, for dense or ragged batches of images.

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
    pair_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(scale * q k^T + bias + pair_bias) v for each head, without synchronising with the device.

    Args:
        q: (B, M, H, D) in float32, float16 or bfloat16, any strides, such as a view of a packed (B, N, 3, H, D).
        k, v: (B, N, H, D), in q's dtype.
        scale: the factor of the scores, more than 0; None: D^-0.5.
        bias: (B, N) float32, added to the scores of each key; minus infinity masks a key. Queries whose keys are all
            masked get 0.
        cu_seqlens: for a ragged batch, (B+1,) int32 on q's device: the offsets of each image's tokens, from 0 to T.
            q, k, v are then (T, H, D) and `bias` is (T,); images may be empty.
        max_tokens: for a ragged batch, at least the number of tokens of its largest image. The values of `cu_seqlens`
            and `max_tokens` are not checked.
        pair_bias: (H, M, N) float32 for all images, or (G, H, M, N) where G divides B and image i takes that of i % G,
            such as relative positions with the masks of G windows; any strides. It is added to the scores of each
            query and key; minus infinity masks the pair. Not for a ragged batch.

    Returns:
        A contiguous tensor of q's shape and dtype.

    Raises:
        ValueError: a shape, a dtype or a number is invalid.
        RuntimeError: on backward.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = torch.ops.dvit.attention.default(q, k, v, scale, bias, cu_seqlens, max_tokens, pair_bias)
    return out


def attention_with_signal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    bias: torch.Tensor | None,
    leaves: str,
    pair_bias: torch.Tensor | None = None,
    log_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of `attention` for a dense batch, and a signal that token reduction reads; in one launch.

    Args:
        q, k, v, scale, bias, pair_bias: as for `attention`, with at least one query.
        leaves: "class_attention" for the weights of query row 0, the class token's; "mean_keys" for the mean of k over
            heads.
        log_bias: whether `bias` holds numbers above 0 whose logarithms are the bias, such as the tokens' sizes (Bolya
            et al. 2023, proportional attention).

    Returns:
        A contiguous tensor of q's shape and dtype; the signal in float32, (B, H, N) for the class token's weights, 0 if
        all keys are masked, and (B, N, D) for mean keys.

    Raises:
        ValueError: a shape, a dtype, a number or `leaves` is invalid.
        RuntimeError: on backward.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.dvit.attention_with_signal.default(
        q, k, v, scale, bias, leaves, pair_bias, log_bias
    )
    return result


def attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_tokens: int = 0,
    pair_bias: torch.Tensor | None = None,
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
    if bias is None and pair_bias is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
    added = _added(bias, pair_bias, len(q))
    if q.dtype == torch.float32 and q.device.type == "cpu":  # two to four times as fast; a masked row gives 0 there
        return F.scaled_dot_product_attention(q, k, v, added, scale=scale).transpose(1, 2).contiguous()
    # Elsewhere not by scaled_dot_product_attention, which would round the biases to q's dtype.
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1) * scale + added
    weights = scores.softmax(dim=-1).masked_fill((added == -math.inf).all(dim=-1, keepdim=True), 0.0)
    return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous()


def _added(bias: torch.Tensor | None, pair_bias: torch.Tensor | None, images: int) -> torch.Tensor:
    """Return the sum of the biases, in four dimensions that broadcast to (B, H, M, N)."""
    terms = [] if bias is None else [bias[:, None, None]]
    if pair_bias is not None:
        pair_bias = pair_bias[None] if pair_bias.ndim == 3 else pair_bias
        groups = len(pair_bias)
        terms.append(pair_bias if groups in (1, images) else pair_bias.repeat(images // groups, 1, 1, 1))
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


class _Call(NamedTuple):
    """A call's arguments, as in the schema; the dispatcher omits those that equal the default."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_tokens: int = 0
    pair_bias: torch.Tensor | None = None


def check_attention(*arguments: Any, **named: Any) -> _Call:
    """Return the arguments of a call; raise ValueError if any is invalid."""
    call = _Call(*arguments, **named)
    q, k, v, scale, bias, cu_seqlens, max_tokens, pair_bias = call
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
    if pair_bias is not None and ragged:
        raise ValueError("attention: pair_bias is for dense batches, cu_seqlens is given")
    if pair_bias is not None and not _goes_with(pair_bias, q, k):
        pairs = f"{(q.shape[2], q.shape[1], k.shape[1])} in torch.float32, or (G, ...) where G divides {q.shape[0]},"
        raise ValueError(f"attention: pair_bias is {_found(pair_bias)}; {pairs} is expected")
    for name, tensor in zip(call._fields, call, strict=True):
        if isinstance(tensor, torch.Tensor) and tensor.device != q.device:
            raise ValueError(f"attention: {name} is on {tensor.device}, q on {q.device}")
    return call


def _goes_with(pair_bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> bool:
    if pair_bias.dtype != torch.float32 or pair_bias.shape[-3:] != (q.shape[2], q.shape[1], k.shape[1]):
        return False
    groups, images = pair_bias.shape[0], q.shape[0]
    return pair_bias.ndim == 3 or (pair_bias.ndim == 4 and (groups == images or (groups > 0 and images % groups == 0)))


def _found(x: torch.Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def choose(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    queries: int,
    tokens: int,
    head_dim: int,
    pair_bias: bool = False,
) -> Choice:
    """Return the choice for a dense batch on a device; `heads` counts those of all its images."""
    if not supported(device, head_dim):
        return Choice("pytorch")
    # Rows of its own: a tile that was measured without a pair bias may spill with one.
    op = "attention with pair bias" if pair_bias else "attention"
    return choices_for(device).of(op, dtype, heads, queries=queries, tokens=tokens, head_dim=head_dim)


def supported(device: torch.device, head_dim: int, op: str = "attention") -> bool:
    """Return whether an op's kernels run on a device, for heads of that size."""
    if not runs_triton(device, op):
        return False
    from dvit_kernels.attention import supports  # here: Triton takes a while to import

    return supports(head_dim)


def _anywhere(*arguments: Any, **named: Any) -> torch.Tensor:
    call = check_attention(*arguments, **named)
    q, (heads, head_dim) = call.q, call.q.shape[-2:]
    if call.cu_seqlens is None:
        sizes = len(q) * heads, q.shape[1], call.k.shape[1], head_dim
        choice = choose(q.device, q.dtype, *sizes, pair_bias=call.pair_bias is not None)
    else:  # PyTorch would synchronise to read the lengths
        choice = Choice("triton" if supported(q.device, head_dim) else "pytorch")
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
        q, k, v, bias, pair_bias, some = few_images(call.q, call.k, call.v, call.bias, call.pair_bias)
        few, out = call._replace(q=q, k=k, v=v, bias=bias, pair_bias=pair_bias), out[some]
    return check_close(out, attention_ref(*few), attention_ref(*_Call(*map(widened, few))))


def few_images(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, pair_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, Any]:
    """Return the arguments for a few images of a dense batch, and the index of these images."""
    some = some_of(q)
    if pair_bias is not None and pair_bias.ndim == 4:
        pair_bias = pair_bias[torch.arange(len(q), device=q.device)[some] % len(pair_bias)]
    return q[some], k[some], v[some], None if bias is None else bias[some], pair_bias, some


def _fake(*arguments: Any, **named: Any) -> torch.Tensor:
    q = check_attention(*arguments, **named).q
    return q.new_empty(q.shape)


register(OP, attention_ref, _anywhere, _fake, "Train with torch.nn.functional.scaled_dot_product_attention.")
