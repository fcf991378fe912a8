"""What tests of attention share: its inputs, and the op in float64."""

import itertools

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF = float("inf")


def make_qkv(b: int, m: int, n: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q (B, M, H, D), k and v (B, N, H, D), as views of what one linear packs, or two where M is not N."""
    generator = torch.Generator().manual_seed(1000 * n + m)
    packed = torch.randn(b, n, 3, heads, head_dim, generator=generator).to(dtype)
    q, k, v = packed.unbind(2)
    if m != n:
        q = torch.randn(b, m, heads, head_dim, generator=generator).to(dtype)
    return q, k, v


def make_bias(b: int, n: int) -> torch.Tensor:
    """(B, N), a key in three hidden, but not the first."""
    generator = torch.Generator().manual_seed(n)
    bias = torch.randn(b, n, generator=generator)
    return bias.masked_fill((torch.rand(b, n, generator=generator) < 0.33) & (torch.arange(n) > 0), -INF)


def make_ragged(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v (T, H, D) and cu_seqlens (B+1,)."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return *(x[0] for x in make_qkv(1, sum(lengths), sum(lengths), heads, head_dim, dtype)), ends


def exact(q, k, v, scale, bias=None, cu_seqlens=None, max_tokens=0):
    """In float64, on the CPU."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    bias = None if bias is None else bias.cpu().double()
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        images = [slice(start, end) for start, end in itertools.pairwise(ends)]
        biases = [None if bias is None else bias[p][None] for p in images]
        outs = [exact(q[p][None], k[p][None], v[p][None], scale, b)[0] for p, b in zip(images, biases, strict=True)]
        return torch.cat(outs)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
    if bias is not None:
        scores = scores + bias[:, None, None]
        hidden = (bias == -INF).all(dim=1)[:, None, None, None]
        scores = scores.masked_fill(hidden, 0.0)
        v = v.masked_fill(hidden, 0.0)
    return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(dim=-1), v)
