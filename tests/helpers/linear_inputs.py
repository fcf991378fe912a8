"""What tests of linear share: its inputs, and the op in float64."""

import torch
from torch.nn import functional as F


def make_linear(dim_in, dim_out, dtype=torch.float32, seed=0):
    """weight (K, C), bias (K,), in dtype."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(dim_out, dim_in, generator=generator) / dim_in**0.5
    return weight.to(dtype), torch.randn(dim_out, generator=generator).to(dtype)


def make_rows(*shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 2 + 0.5).to(dtype)


def exact_linear(x, weight, bias=None, residual=None, norm=False, eps=1e-5, activation="none", gated=False):
    """What the op approximates, in float64 on the CPU."""
    x, weight = x.cpu().double(), weight.cpu().double()
    y = F.linear(F.layer_norm(x, x.shape[-1:], eps=eps) if norm else x, weight)
    y = y if bias is None else y + bias.cpu().double()
    y, factor = y.chunk(2, dim=-1) if gated else (y, 1.0)
    if activation in ("silu", "quick_gelu"):
        y = y * torch.sigmoid(y * (1.702 if activation == "quick_gelu" else 1.0))
    elif activation != "none":
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    y = y * factor
    return y if residual is None else y + residual.cpu().double()


def exact_stats(y, block):
    """Mean and sum of squared deviations by blocks of columns, in float64."""
    parts = y.cpu().double().reshape(-1, y.shape[-1] // block, block)
    mean = parts.mean(dim=2)
    return torch.stack([mean, (parts - mean[..., None]).square().sum(dim=2)], dim=2)
