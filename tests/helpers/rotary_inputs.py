"""What tests of rotary_attention share: tables, positions and norms, and the op in float64 by complex numbers."""

import torch
from attention_inputs import exact


def make_tables(*leading: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sin and cos (..., P, D), each angle twice."""
    angles = torch.randn(*leading, head_dim // 2, generator=torch.Generator().manual_seed(sum(leading)))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.sin(), angles.cos()


def make_places(b: int, n: int, places: int) -> torch.Tensor:
    """(B, n) of as many places and two more, which have no row in the tables; another order in every image."""
    generator = torch.Generator().manual_seed(n)
    return torch.stack([torch.randperm(places + 2, generator=generator)[:n] for _ in range(b)])


def make_norms(head_dim: int) -> torch.Tensor:
    return torch.randn(2, 2, head_dim, generator=torch.Generator().manual_seed(head_dim))


def exact_rotary(q, k, v, scale, bias=None, sin=None, cos=None, positions=None, num_prefix=0, norms=None, eps=1e-6):
    """In float64, on the CPU, token by token."""
    half, changed = q.shape[-1] // 2, []
    for i, x in enumerate((q, k)):
        y = x.cpu().double()
        if norms is not None:
            gain, shift = norms[i].cpu().double()
            y = (y - y.mean(dim=-1, keepdim=True)) * (y.var(dim=-1, keepdim=True, correction=0) + eps).rsqrt()
            y = y * gain + shift
        if sin is not None:
            turn = torch.complex(cos.cpu().double(), sin.cpu().double())[..., :half]  # ([H,] P, D/2)
            pairs = torch.complex(y[..., :half], y[..., half:])
            for b in range(len(y)):
                for token in range(num_prefix, y.shape[1]):
                    place = token - num_prefix if positions is None else int(positions[b, token - num_prefix])
                    if place < turn.shape[-2]:
                        pairs[b, token] *= turn[..., place, :]
            y = torch.cat([pairs.real, pairs.imag], dim=-1)
        changed.append(y)
    return exact(*changed, v, scale, bias)
