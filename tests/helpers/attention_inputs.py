"""What tests of attention share: its inputs, and the op in float64."""

import itertools

import torch

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


def make_pair_bias(heads: int, m: int, n: int, groups: int = 0) -> torch.Tensor:
    """(H, M, N), or (groups, H, M, N); a key in three hidden, but not the first."""
    generator = torch.Generator().manual_seed(100 * n + m)
    shape = (groups, heads, m, n) if groups else (heads, m, n)
    hidden = (torch.rand(shape, generator=generator) < 0.33) & (torch.arange(n) > 0)
    return (2 * torch.randn(shape, generator=generator)).masked_fill(hidden, -INF)


def make_ragged(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v (T, H, D) and cu_seqlens (B+1,)."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return *(x[0] for x in make_qkv(1, sum(lengths), sum(lengths), heads, head_dim, dtype)), ends


def exact(q, k, v, scale, bias=None, cu_seqlens=None, max_tokens=0, pair_bias=None):
    """In float64, on the CPU."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    bias, pair_bias = (None if t is None else t.cpu().double() for t in (bias, pair_bias))
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        images = [slice(start, end) for start, end in itertools.pairwise(ends)]
        biases = [None if bias is None else bias[p][None] for p in images]
        outs = [exact(q[p][None], k[p][None], v[p][None], scale, b)[0] for p, b in zip(images, biases, strict=True)]
        return torch.cat(outs)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
    added = torch.zeros_like(scores)
    if bias is not None:
        added += bias[:, None, None]
    if pair_bias is not None:
        for i, of_image in enumerate(added):
            of_image += pair_bias if pair_bias.ndim == 3 else pair_bias[i % len(pair_bias)]
    weights = (scores + added).softmax(dim=-1).masked_fill((added == -INF).all(dim=-1, keepdim=True), 0.0)
    return torch.einsum("bhmn,bnhd->bmhd", weights, v)
