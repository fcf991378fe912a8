"""rotary_attention: attention of queries and keys that are normalised for each head and rotated by their places first.

On CUDA it is the launch of `attention` (dvit_kernels/attention.py), which changes them while it loads them; elsewhere,
or where PyTorch's own attention is faster (choices.py), plain PyTorch does so before.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dvit_infer.ops.attention import attention_ref, check_attention, few_images, supported
from dvit_infer.ops.choices import Choice, choices_for
from dvit_infer.ops.fallback import by_kernel, check_close, widened
from dvit_infer.ops.registration import register

OP = "dvit::rotary_attention"


def rotary_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    num_prefix: int = 0,
    norms: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Return `attention` of queries and keys after LayerNorm of each head and rotation; each of the two is optional.

    Channel i of a head is rotated together with channel i + D/2 (Su et al. 2021, in the order of GPT-NeoX).

    Args:
        q, k, v, scale, bias: as for `attention`, for a dense batch. Query i and key i are the same token.
        sin, cos: (P, D) or (H, P, D) float32, for every place; D is even, and the second half of the channels repeats
            the first. Without them nothing is rotated.
        positions: (B, N - num_prefix) int64, the places of the tokens behind the first `num_prefix`; a token with
            another number than 0 to P - 1 is not rotated. None: 0, 1, 2, ...
        num_prefix: the number of first tokens, which have no place and are not rotated.
        norms: (2, 2, D) float32, gain and shift for queries, then for keys. Without them nothing is normalised.
        eps: of the LayerNorms.

    Returns:
        A contiguous tensor of q's shape and dtype.

    Raises:
        ValueError: a shape, a dtype or a number is invalid.
        RuntimeError: on backward.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    changed = []
    for x, norm in zip((q, k), (None, None) if norms is None else norms, strict=True):
        y = x.to(wide)
        if norm is not None:
            y = F.layer_norm(y, y.shape[-1:], norm[0].to(wide), norm[1].to(wide), eps)
        if sin is not None and cos is not None:
            places = _places(x, num_prefix, positions, sin.shape[-2])
            s, c = (_rows(table, places, other).to(wide) for table, other in ((sin, 0.0), (cos, 1.0)))
            first, second = y.chunk(2, dim=-1)
            y = y * c + torch.cat([-second, first], dim=-1) * s
        changed.append(y.to(x.dtype))
    return attention_ref(changed[0], changed[1], v, scale, bias)


def _places(x: torch.Tensor, num_prefix: int, positions: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return the rows (B or 1, N) of the tables for tokens (B, N, H, D); `count`, one past them, if not rotated."""
    n = x.shape[1]
    if positions is None:
        places = torch.arange(-num_prefix, n - num_prefix, device=x.device)[None]
    else:
        places = F.pad(positions, (num_prefix, 0), value=-1)[:, :n]
    return places.masked_fill((places < 0) | (places >= count), count)


def _rows(table: torch.Tensor, places: torch.Tensor, other: float) -> torch.Tensor:
    """Return rows of a table (P, D) or (H, P, D), and of `other` past its end, as (B, N, 1 or H, D)."""
    padded = F.pad(table, (0, 0, 0, 1), value=other)
    rows = padded[..., places, :]  # ([H,] B, N, D)
    return rows.unsqueeze(-2) if table.ndim == 2 else rows.movedim(0, -2)


class _Call(NamedTuple):
    """A call's arguments, as in the schema; the dispatcher omits those that equal the default."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    num_prefix: int = 0
    norms: torch.Tensor | None = None
    eps: float = 1e-6


def _checked(*arguments: Any, **named: Any) -> _Call:
    call = _Call(*arguments, **named)
    check_attention(*call[:5])
    q, k, sin, cos, positions, norms = call.q, call.k, call.sin, call.cos, call.positions, call.norms
    (b, n, heads, head_dim), num_prefix = k.shape, call.num_prefix
    if q.shape[1] > n:
        raise ValueError(f"rotary_attention: q has {q.shape[1]} rows, k {n}; every query is a key's token")
    if (sin is None) != (cos is None):
        raise ValueError("rotary_attention: sin and cos go together, one is missing")
    if sin is not None and cos is not None:
        shape = f"(P, {head_dim}) or {(heads, 'P', head_dim)} in torch.float32".replace("'", "")
        for name, table in (("sin", sin), ("cos", cos)):
            leading = table.shape[:-2] in ((), (heads,))
            if table.ndim < 2 or not leading or table.shape[-1] != head_dim or table.dtype != torch.float32:
                raise ValueError(f"rotary_attention: {name} is {_found(table)}; {shape} is expected")
        if head_dim % 2 or sin.shape != cos.shape:
            raise ValueError(
                f"rotary_attention: sin is {_found(sin)}, cos {_found(cos)}; one even head size is expected"
            )
    if not 0 <= num_prefix <= n:
        raise ValueError(f"rotary_attention: num_prefix is {num_prefix}; 0 to {n} is expected")
    if positions is not None and (positions.dtype != torch.int64 or positions.shape != (b, n - num_prefix)):
        expected = f"{(b, n - num_prefix)} in torch.int64 is expected"
        raise ValueError(f"rotary_attention: positions is {_found(positions)}; {expected}")
    if norms is not None and (norms.dtype != torch.float32 or norms.shape != (2, 2, head_dim)):
        expected = f"{(2, 2, head_dim)} in torch.float32 is expected"
        raise ValueError(f"rotary_attention: norms is {_found(norms)}; {expected}")
    for name, tensor in zip(call._fields, call, strict=True):
        if isinstance(tensor, torch.Tensor) and tensor.device != q.device:
            raise ValueError(f"rotary_attention: {name} is on {tensor.device}, q on {q.device}")
    return call


def _found(x: torch.Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def choose(device: torch.device, dtype: torch.dtype, heads: int, queries: int, tokens: int, head_dim: int) -> Choice:
    """Return the choice for a dense batch on a device; `heads` counts those of all its images.

    Its rows are its own: PyTorch takes several launches more, and a tile of `attention` may spill.
    """
    if not supported(device, head_dim, "rotary_attention"):
        return Choice("pytorch")
    kind = {"queries": queries, "tokens": tokens, "head_dim": head_dim}
    return choices_for(device).of("rotary attention", dtype, heads, **kind)


def _run(*arguments: Any, **named: Any) -> torch.Tensor:
    call = _checked(*arguments, **named)
    q, (heads, head_dim) = call.q, call.q.shape[2:]
    choice = choose(q.device, q.dtype, len(q) * heads, q.shape[1], call.k.shape[1], head_dim)
    if choice.by == "pytorch":
        return rotary_attention_ref(*call)
    return by_kernel(
        "rotary_attention",
        q.device,
        lambda: _by_kernel(call, choice),
        lambda: rotary_attention_ref(*call),
        lambda out: _fault(call, out),
        (*call, choice),
    )


def _by_kernel(call: _Call, choice: Choice) -> torch.Tensor:
    from dvit_kernels.attention import AttentionTile, Compared, launch_attention  # here: Triton imports slowly

    tile = AttentionTile(*choice.tile) if choice.tile else None
    return launch_attention(*call[:5], tile=tile, compared=Compared(*call[5:]))


def _fault(call: _Call, out: torch.Tensor) -> str | None:
    """Check the kernel's result in a few images."""
    q, k, v, bias, _, some = few_images(call.q, call.k, call.v, call.bias, None)
    positions = None if call.positions is None else call.positions[some]
    few = call._replace(q=q, k=k, v=v, bias=bias, positions=positions)
    return check_close(out[some], rotary_attention_ref(*few), rotary_attention_ref(*_Call(*map(widened, few))))


def _fake(*arguments: Any, **named: Any) -> torch.Tensor:
    q = _checked(*arguments, **named).q
    return q.new_empty(q.shape)


rotary_attention = register(
    OP, rotary_attention_ref, _run, _fake, "Train with torch.nn.functional.scaled_dot_product_attention."
)
